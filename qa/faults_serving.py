"""Faults of clients against a running ``clead serve``: each sends something hostile and asserts what comes back.

``FAULTS`` lists (name, function); a function takes the server's address, such as ``http://127.0.0.1:8000``, and raises
AssertionError if the server does not hold. The server may be started with any limits; ``--read-seconds`` of a second or less keeps
the run short. ``python qa/faults_serving.py ADDRESS`` runs all of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

WAIT = 60.0


@dataclass
class Answer:
    """One answer: status, headers by lower-case name, body."""

    status: int
    headers: dict[str, str]
    body: bytes


def send(base: str, content: bytes, *more: bytes) -> Answer | None:
    """Send bytes as they are, and return the first answer; None if the server only closes the connection."""
    address = urlsplit(base)
    received = b""
    with socket.create_connection((str(address.hostname), int(address.port or 80)), timeout=WAIT) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in (content, *more):
                connection.sendall(part)
        with contextlib.suppress(ConnectionResetError):
            while True:
                head, blank, body = received.partition(b"\r\n\r\n")
                if blank and (parsed := _parsed(head, body)) is not None:
                    return parsed
                part = connection.recv(65536)
                if not part:
                    return None if not received else _parsed(received.partition(b"\r\n\r\n")[0], b"", whole=True)
                received += part
    return None


def _parsed(head: bytes, body: bytes, whole: bool = False) -> Answer | None:
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(first.split()[1])
    length = int(headers.get("content-length", "0"))
    if status == 100:
        rest, blank, body = body.partition(b"\r\n\r\n")
        return _parsed(rest, body) if blank else None
    return Answer(status, headers, body[:length]) if whole or len(body) >= length else None


def request(
    base: str, method: str = "POST", path: str = "/v1/predict", body: bytes = b"", kind: str = "", *extra: str
) -> Answer | None:
    """Send a request with the right Host, unless ``extra`` header lines hold another one."""
    lines = [f"{method} {path} HTTP/1.1"]
    if not any(line.lower().startswith("host:") for line in extra):
        lines.append(f"Host: {urlsplit(base).netloc}")
    if kind:
        lines.append(f"Content-Type: {kind}")
    if method == "POST" and not any("content-length" in line.lower() for line in extra):
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, *extra, "Connection: close", "", ""]).encode("latin-1")
    return send(base, head + body)


def problem(answer: Answer | None, *statuses: int) -> None:
    """Assert that an answer is a problem (RFC 9457) of one line with one of these statuses."""
    assert answer is not None, "the connection was closed without an answer"
    assert answer.status in statuses, (answer.status, answer.body[:300])
    assert answer.headers["content-type"] == "application/problem+json", answer.headers
    content = json.loads(answer.body)
    assert content["status"] == answer.status and content["title"] and "\n" not in content["detail"], content
    assert len(answer.body) < 2000 and b"Traceback" not in answer.body


def lives(base: str) -> None:
    """Assert that the server is alive, ready, and answers others."""
    for path in ("/healthz", "/readyz"):
        answer = request(base, "GET", path)
        assert answer is not None and answer.status == 200, (path, answer)
    answer = request(base, body=png(np.zeros((8, 8), np.uint8)), kind="image/png")
    assert answer is not None and answer.status in (200, 422), answer  # 422: a model of images that are not square


def png(array: np.ndarray) -> bytes:
    """Return an image file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int, bits: int = 1) -> bytes:
    """Return a small PNG file of black pixels that says it has ``width`` times ``height``."""
    packer = zlib.compressobj(9)
    length = min((1 + (width * bits + 7) // 8) * height, 2**25)  # a reader that believes the head meets some of it
    rows = packer.compress(bytes(length)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def npy(shape: str, descr: str = "|u1", content: bytes = b"") -> bytes:
    """Return a .npy file whose header says what is given."""
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + content


def form(*files: bytes, name: str = "images", boundary: str = "b", end: bool = True) -> bytes:
    """Return a multipart body."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n\r\n'.encode()
        + file
        + b"\r\n"
        for file in files
    ]
    return b"".join(parts) + (f"--{boundary}--\r\n".encode() if end else b"")


JSON, OCTETS, FORM = "application/json", "application/octet-stream", "multipart/form-data; boundary=b"


def zipped() -> bytes:
    """Return a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


# Heads


def raw(content: bytes, *statuses: int) -> Callable[[str], None]:
    """Return a fault that sends ``content``, in which HOST stands for the server's name."""

    def fault(base: str) -> None:
        problem(send(base, content.replace(b"HOST", urlsplit(base).netloc.encode())), *statuses)
        lives(base)

    return fault


def endless_head(base: str) -> None:
    """A header that never ends, as fast as it is taken."""
    answer = send(base, f"GET /healthz HTTP/1.1\r\nHost: {urlsplit(base).netloc}\r\nX: ".encode(), *[b"a" * 65536] * 60)
    problem(answer, 431)
    lives(base)


def endless_line(base: str) -> None:
    """An address that never ends."""
    problem(send(base, b"GET /", *[b"a" * 65536] * 60), 414, 431)
    lives(base)


def slow_heads(base: str) -> None:
    """Thirty clients that begin a head and say no more (a slow loris)."""
    address = urlsplit(base)
    with contextlib.ExitStack() as stack:
        for number in range(30):
            connection = stack.enter_context(
                socket.create_connection((str(address.hostname), int(address.port or 80)), WAIT)
            )
            connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"[: 10 + number])
        lives(base)


def slow_bodies(base: str) -> None:
    """More clients that send half a body than requests are worked on at once."""
    address = urlsplit(base)
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: {OCTETS}\r\nContent-Length: 5000\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(80):
            connection = stack.enter_context(
                socket.create_connection((str(address.hostname), int(address.port or 80)), WAIT)
            )
            connection.sendall(head.encode() + bytes(10))
        lives(base)


def vanishing(base: str) -> None:
    """Fifty clients that go away in the middle of a body, with a reset."""
    address = urlsplit(base)
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: {OCTETS}\r\nContent-Length: 9000\r\n\r\n"
    )
    for _ in range(50):
        with socket.create_connection((str(address.hostname), int(address.port or 80)), WAIT) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head.encode() + bytes(100))
    lives(base)


def large_body_is_told_why(base: str) -> None:
    """A client that sends on while it is refused still reads why."""
    head = f"POST /v1/predict HTTP/1.1\r\nHost: {urlsplit(base).netloc}\r\nContent-Type: {OCTETS}\r\n"
    problem(send(base, f"{head}Content-Length: {2**31}\r\n\r\n".encode(), *[bytes(65536)] * 80), 413)
    chunked = [f"{65536:x}\r\n".encode() + bytes(65536) + b"\r\n"] * 600
    problem(send(base, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), *chunked), 413)
    lives(base)


def body(content: bytes, kind: str, *statuses: int, extra: tuple[str, ...] = ()) -> Callable[[str], None]:
    """Return a fault that posts ``content``."""

    def fault(base: str) -> None:
        started = time.monotonic()
        for path in ("/v1/predict", "/v1/explain"):
            problem(request(base, "POST", path, content, kind, *extra), *statuses, 404)  # 404: no detector, no explain
        assert time.monotonic() - started < WAIT
        lives(base)

    return fault


def head_says(line: str, *statuses: int, method: str = "POST") -> Callable[[str], None]:
    """Return a fault with one more header line."""

    def fault(base: str) -> None:
        path = "/v1/predict" if method == "POST" else "/healthz"
        problem(request(base, method, path, b"x", "", line), *statuses)
        lives(base)

    return fault


def posts(lines: str, *statuses: int, content: bytes = b"", kind: str = "image/png") -> Callable[[str], None]:
    """Return a fault with these header lines in place of a length."""
    head = f"POST /v1/predict HTTP/1.1\r\nHost: HOST\r\nContent-Type: {kind}\r\n{lines}\r\n\r\n"
    return raw(head.encode() + content, *statuses)


def asks(method: str, path: str, *statuses: int) -> Callable[[str], None]:
    """Return a fault that asks for a path."""

    def fault(base: str) -> None:
        problem(request(base, method, path), *statuses)
        lives(base)

    return fault


def extreme(width: int, height: int) -> Callable[[str], None]:
    """Return a fault with a picture of one pixel in one direction: resized by its shorter side it would fill the memory."""

    def fault(base: str) -> None:
        answer = request(base, body=bomb(width, height), kind="image/png")
        assert answer is not None and answer.status in (200, 413, 422), answer
        lives(base)

    return fault


def _sent(text: str, *statuses: int, method: str = "GET") -> Callable[[str], None]:
    return raw(f"{method} /healthz HTTP/1.1\r\nHost: HOST\r\n{text}\r\n\r\n".encode("latin-1"), *statuses)


SMALL = png(np.zeros((8, 8), np.uint8))
NOISE = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))

FAULTS: list[tuple[str, Callable[[str], None]]] = [
    # heads and connections
    ("a header that never ends", endless_head),
    ("an address that never ends", endless_line),
    ("ten thousand headers", _sent("\r\n".join(f"X{i}: 1" for i in range(10_000)), 431)),
    ("a hundred and one headers", _sent("\r\n".join(f"X{i}: 1" for i in range(101)), 431)),
    ("a header of 40,000 bytes", _sent("X: " + "a" * 40_000, 431)),
    ("an address of 9,000 bytes", asks("GET", "/" + "a" * 9000, 414)),
    ("a query of 9,000 bytes", asks("GET", "/healthz?" + "a" * 9000, 414)),
    ("no HTTP", raw(b"\x16\x03\x01\x02\x00 hello\r\n\r\n", 400)),
    ("HTTP/2 without asking", raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400)),
    ("an unknown version", raw(b"GET / HTTP/9.9\r\nHost: HOST\r\n\r\n", 400)),
    ("an unknown method", raw(b"BREW /healthz HTTP/1.1\r\nHost: HOST\r\n\r\n", 400, 405)),
    ("a NUL in a header", _sent("X: a\x00b", 400)),
    ("a space before the colon", _sent("X : a", 400)),
    ("a header without a colon", _sent("nothing", 400)),
    ("two lengths", posts("Content-Length: 1\r\nContent-Length: 2", 400, content=b"ab")),
    ("a length and chunks", posts("Content-Length: 1\r\nTransfer-Encoding: chunked", 400, content=b"0\r\n\r\n")),
    ("a negative length", posts("Content-Length: -1", 400)),
    ("a length with a sign", posts("Content-Length: +1", 400, content=b"x")),
    ("a length of thirty digits", posts("Content-Length: " + "9" * 30, 400, 413)),
    ("a broken chunk", posts("Transfer-Encoding: chunked", 400, content=b"zz\r\n")),
    ("bytes above ASCII in a path", raw(b"GET /\xff\xfe HTTP/1.1\r\nHost: HOST\r\n\r\n", 400, 404)),
    ("CONNECT", raw(b"CONNECT evil.org:443 HTTP/1.1\r\nHost: HOST\r\n\r\n", 400, 404, 405)),
    (
        "an address of another server",
        raw(b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: HOST\r\n\r\n", 400, 404),
    ),
    ("slow heads", slow_heads),
    ("slow bodies, more than places", slow_bodies),
    ("clients that vanish", vanishing),
    ("a large body, refused while it is sent", large_body_is_told_why),
    # names
    ("another host", head_says("Host: evil.org", 421)),
    ("another host with this one in it", head_says("Host: 127.0.0.1.evil.org", 421)),
    ("the metadata service's name", head_says("Host: metadata.google.internal", 421)),
    ("no host", raw(b"GET /healthz HTTP/1.1\r\n\r\n", 400)),
    ("two hosts", raw(b"GET /healthz HTTP/1.1\r\nHost: HOST\r\nHost: evil.org\r\n\r\n", 400)),
    ("a host with a user", head_says("Host: localhost@evil.org", 400)),
    ("a host with a port that is none", head_says("Host: localhost:99999", 400)),
    ("a page from elsewhere", head_says("Origin: http://evil.org", 403)),
    ("a page from nowhere", head_says("Origin: null", 403)),
    ("a page whose name begins like ours", head_says("Origin: http://localhost.evil.org", 403)),
    ("a page from elsewhere that reads", head_says("Origin: https://evil.org", 403, method="GET")),
    # paths and methods
    ("a path above the root", asks("GET", "/../../etc/passwd", 404)),
    ("an encoded path above the root", asks("GET", "/static-offline-docs/..%2f..%2f..%2fetc%2fpasswd", 404)),
    ("a path with a NUL", asks("GET", "/static-offline-docs/a%00b", 404, 400)),
    ("a path with line breaks", asks("GET", "/a%0d%0aX:%20y", 404)),
    ("a method that is not taken", asks("DELETE", "/v1/predict", 405)),
    ("TRACE", asks("TRACE", "/healthz", 405)),
    ("an unknown key", asks("POST", "/v1/predict?rejct=true", 422, 415)),
    # bodies
    ("no type", body(SMALL, "", 415)),
    ("a type that is not read", body(b"a: b", "application/yaml", 415)),
    ("a packed body", body(zlib.compress(SMALL), "image/png", 415, extra=("Content-Encoding: gzip",))),
    ("nothing", body(b"", "image/png", 422)),
    ("a zip archive", body(zipped(), "image/png", 415)),
    (
        "a pickle",
        body(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", OCTETS, 400),
    ),
    ("an SVG that names a file", body(b"<svg><image href='file:///etc/passwd'/></svg>", "image/png", 415)),
    ("half a picture", body(NOISE[: len(NOISE) // 2], "image/png", 422)),
    ("a picture with a hole", body(NOISE[:3000] + bytes(64) + NOISE[3064:], "image/png", 422)),
    ("a bomb of 30,000 times 30,000", body(bomb(30_000, 30_000), "image/png", 413)),
    ("a bomb that Pillow itself refuses", body(bomb(2**31 - 1, 2**31 - 1), "image/png", 413, 422)),
    ("a picture of no size", body(bomb(0, 0), "image/png", 413, 415, 422)),
    ("bombs that together are too large", body(form(*[bomb(4000, 4000)] * 3), FORM, 413)),
    ("a row of 20 million pixels", extreme(20_000_000, 1)),
    ("a column of 20 million pixels", extreme(1, 20_000_000)),
    ("an array of a terabyte", body(npy("(1000000000000, 1, 8, 8)"), OCTETS, 400)),
    ("an array of negative sides", body(npy("(-1, -1, -8, 8)", content=bytes(64)), OCTETS, 400)),
    ("an array of objects", body(npy("(1, 1, 8, 8)", "|O", bytes(512)), OCTETS, 400, 422)),
    ("an array whose header is code", body(npy("__import__('os').getpid()"), OCTETS, 400)),
    ("an array of 40 dimensions", body(npy("(" + "1, " * 40 + ")", content=b"x"), OCTETS, 400, 422)),
    ("lists in lists in lists", body(b"[" * 1_000_000, JSON, 400, 422)),
    ("objects in objects", body(b'{"a":' * 100_000, JSON, 400, 422)),
    ("millions of empty lists", body(b'{"images": [' + b"[]," * 2_000_000 + b"[]]}", JSON, 422)),
    ("a number of a million digits", body(b'{"images": [[[[' + b"9" * 1_000_000 + b"]]]]}", JSON, 400, 422)),
    ("text for pixels", body(b'{"images": [[[["' + b"A" * 1_000_000 + b'"]]]]}', JSON, 422)),
    ("not a number", body(b'{"images": [[[[NaN]]]]}', JSON, 422)),
    ("an address for an image", body(b'{"url": "http://169.254.169.254/"}', JSON, 422)),
    ("a form without an end", body(form(SMALL, end=False), FORM, 400, 422)),
    ("a form of another boundary", body(form(SMALL, boundary="c"), FORM, 400, 422)),
    ("a form without a boundary", body(form(SMALL), "multipart/form-data", 400)),
    ("ten thousand files", body(form(*[b"x"] * 10_000), FORM, 422)),
    ("a file under another name", body(form(SMALL, name="../../etc/passwd"), FORM, 422)),
    (
        "a part with a head of a megabyte",
        body(b"--b\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\nx\r\n--b--\r\n", FORM, 400, 422),
    ),
]


def main(base: str) -> int:
    """Run all of them and print those that do not hold; return their number."""
    failed = 0
    for name, fault in FAULTS:
        try:
            fault(base)
        except (AssertionError, OSError) as error:
            failed += 1
            print(f"{name}: {error!r}")
    print(f"{len(FAULTS) - failed} of {len(FAULTS)} held")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1].rstrip("/")), 1))
