"""What a file is, by its first bytes: for errors about files that are not what their name says."""

from __future__ import annotations

from pathlib import Path

_HEADS: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer, the file itself was not downloaded; fetch it with: git lfs pull",
    ),
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras); export the model as ONNX, with tf2onnx"),
    (4, b"ORTM", "a model in onnxruntime's own format; give it as --model, with a name that ends in .ort"),
    (4, b"TFL3", "a TensorFlow Lite model; export the model as ONNX, with tf2onnx"),
    (0, b"GGUF", "a GGUF file; give the weights as safetensors"),
    (0, b"\x1f\x8b", "packed with gzip; unpack it with: gunzip"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (0, b"BZh", "packed with bzip2; unpack it with: bunzip2"),
    (0, b"\xfd7zXZ", "packed with xz; unpack it with: unxz"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PK\x03\x04", "a zip archive"),
)


def is_pickle(head: bytes) -> bool:
    r"""Say whether a file that begins so is a pickle, or a zip archive, as ``torch.save`` writes them.

    A safetensors file begins with the length of its header, whose bytes can be those of a pickle; then the header follows.

    >>> is_pickle(b"\x80\x02}q\x00X"), is_pickle((0x280).to_bytes(8, "little") + b'{"fc.bias"')
    (True, False)
    """
    begins = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    return begins and head[8:9] != b"{"


def describe_file(path: Path) -> str | None:
    """Return what ``path`` is, as a noun with what to do about it; None if its first bytes say nothing.

    >>> describe_file(Path("/dev/null"))
    'no file; give the path of a file'
    """
    if not path.is_file():  # a FIFO would wait for its writer
        return "no file; give the path of a file"
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file; download or copy it again"
    for offset, magic, name in _HEADS:
        if head[offset:].startswith(magic):
            return name
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, not the file; download the file itself, by its raw link"
    return "a JSON text" if text.startswith((b"{", b"[")) else None
