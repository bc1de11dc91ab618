"""Make docs/playground.png: python docs/screenshot_playground.py ADDRESS, where ADDRESS is of a running clead playground.

The picture in the docs is of the demo's models: clead playground DEMO/standard DEMO/clead, then ADDRESS with ?image=13.
It needs playwright and a Chromium ($CLEAD_BROWSER, else one on the PATH).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

FILE = Path(__file__).with_name("playground.png")


def picture(address: str, path: Path, width: int = 1280, height: int = 1000) -> None:
    """Save what a visitor of ``address`` sees when the attack that it names has been run."""
    browser = os.environ.get("CLEAD_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    arguments = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=arguments)
        page = opened.new_page(viewport={"width": width, "height": height})
        page.goto(address)
        page.wait_for_selector("#plot svg", timeout=60_000)
        page.wait_for_timeout(1500)  # until gradio has faded its progress bars out
        page.screenshot(path=path, full_page=True)
        opened.close()


if __name__ == "__main__":
    picture(sys.argv[1], FILE)
    print(FILE, f"{FILE.stat().st_size / 1000:.0f} kB")
