"""Which files lie below a folder, which of them are images, and what to call them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".webp", ".gif"),
    *(".tif", ".tiff", ".avif", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf"),
)
"""File names of images end like this, in any case; a name without an ending is decided by the file's first bytes."""

_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")
_HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_DEEPEST = 50  # folders in folders


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder`` that are not hidden, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry))


def is_image(file: Path) -> bool:
    """Say whether a regular file is an image by its name, or by its first bytes if the name has no ending."""
    if file.suffix.lower() in EXTENSIONS:
        return True
    if file.suffix:
        return False
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
    except OSError:
        return False
    return head.startswith(_HEADS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


def files_below(folder: Path, seen: set[Path] | None = None) -> Iterator[tuple[Path, str | None]]:
    """Yield each file below a folder, sorted in every folder, with the reason why it is not read; None for an image.

    Links are followed, but no folder is entered twice, nor those in ``seen``, to which the ones entered here are added. What is not
    read is yielded as well: hidden files, what is no regular file, and a folder that cannot be entered.
    """
    yield from _below(folder, set() if seen is None else seen, _DEEPEST, None)


def holds_image(folder: Path) -> bool:
    """Say whether an image lies below a folder."""
    return any(reason is None for _, reason in files_below(folder))


def describe(folder: Path) -> str:
    """Say in a few words what lies in a folder: "5 folders, 3 of them with images, a file annotations.txt"."""
    folders = visible_folders(folder)
    kinds: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() and not entry.name.startswith("."):
            kinds.setdefault(entry.suffix.lower(), []).append(display(entry.name))
    sentences = []
    if folders:
        count = sum(map(holds_image, folders))
        which = f"a folder {display(folders[0].name)}" if len(folders) == 1 else f"{len(folders)} folders"
        sentences += [
            which,
            f"{count} of them with images" if len(folders) > 1 else "with images" if count else "without images",
        ]
    common = sorted(kinds.items(), key=lambda item: -len(item[1]))
    sentences += [
        f"a file {names[0]}" if len(names) == 1 else f"{len(names)} files *{suffix}" for suffix, names in common[:4]
    ]
    more = sum(len(names) for _, names in common[4:])
    return ", ".join([*sentences, *([f"{more} other files"] if more else [])]) or "nothing"


def display(path: Path | str) -> str:
    """Return a path as one line of text, whatever bytes its name has."""
    text = str(path).encode(errors="surrogateescape").decode(errors="replace")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _below(folder: Path, seen: set[Path], deeper: int, hidden: str | None) -> Iterator[tuple[Path, str | None]]:
    try:
        real = folder.resolve()
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield folder, f"cannot be entered ({error.strerror})"
        return
    if real in seen or not deeper:
        if folder.is_symlink() or not deeper:
            yield (
                folder,
                "leads to a folder that is read already" if deeper else f"lies more than {_DEEPEST} folders deep",
            )
        return
    seen.add(real)
    for entry in entries:
        if entry.is_dir():
            inside = hidden or ("lies in a hidden folder" if _is_hidden(entry) else None)
            yield from _below(entry, seen, deeper - 1, inside)
        elif entry.name.lower() in _LITTER:
            yield entry, "belongs to the operating system"
        elif hidden or entry.name.startswith("."):
            yield entry, hidden or "is hidden"
        elif not entry.is_file():
            yield entry, "leads nowhere" if entry.is_symlink() else "is no regular file"
        else:
            yield entry, None if is_image(entry) else "is no image of a format that is read"
