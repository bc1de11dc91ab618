"""Make the pictures of a report for the documentation: python docs/screenshots.py REPORT.html OUT.png [--width 390].

A page is photographed in a headless Chromium by Playwright, from the first to the last of the named sections.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright


def photograph(
    page: str, out: Path, *, width: int, height: int, sections: list[str], dark: bool, chromium: str | None
) -> None:
    """Write a PNG of ``page`` (a path or an address), ``width`` pixels wide, from its top or the first of ``sections``."""
    address = page if "://" in page else Path(page).resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", device_scale_factor=1
        )
        view.goto(address)
        top, end = 0.0, float(height)
        if sections:
            boxes = [view.locator(f"#{name}").bounding_box() for name in sections]
            if missing := [name for name, box in zip(sections, boxes, strict=True) if box is None]:
                raise SystemExit(f"{page} has no section {', '.join(missing)}")
            top = min(box["y"] for box in boxes if box) - 12
            end = min(max(box["y"] + box["height"] for box in boxes if box) + 12, top + height)
        view.screenshot(path=out, full_page=True, clip={"x": 0, "y": top, "width": width, "height": end - top})
        browser.close()


def main() -> None:
    """Read the arguments and write one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", help="an HTML file or an address")
    parser.add_argument("out", type=Path, help="the PNG")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels: 1280 desktop, 390 phone")
    parser.add_argument("--height", type=int, default=1400, help="the most of the page that is shown, in pixels")
    parser.add_argument("--sections", nargs="*", default=[], help="ids of the sections to show; from the top if none")
    parser.add_argument("--dark", action="store_true", help="in the dark colours")
    parser.add_argument("--chromium", help="the browser's executable; Playwright's own if not given")
    given = parser.parse_args()
    photograph(
        given.page,
        given.out,
        width=given.width,
        height=given.height,
        sections=given.sections,
        dark=given.dark,
        chromium=given.chromium,
    )


if __name__ == "__main__":
    main()
