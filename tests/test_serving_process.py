"""``clead serve`` as a process: slow clients, SIGTERM, ports, mistakes on the command line."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import clead
import clead.cli.serve
from clead.errors import UserError

KEY = "0123456789abcdef"
OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "small"
    clead.train(clead.load_recipe("digits-standard", ["--train.budget", "3", "--model.name", "small_cnn"]), out=path)
    return path


def command(*arguments):
    return [sys.executable, "-m", "clead", "serve", *map(str, arguments)]


class Server:
    """``clead serve`` on a free port; ``log`` holds its lines once it has ended."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            command(*arguments, "--port", 0, "--threads", 1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+);", line)
        assert found, line + self.process.communicate(timeout=60)[1]
        self.port = int(found.group(1))

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        return answer.status, content

    def stop(self):
        self.process.terminate()
        _, self.log = self.process.communicate(timeout=60)  # closes the pipes too
        return self.process.returncode


@pytest.fixture(scope="module")
def server(run):
    server = Server(run, "--read-seconds", 0.4)
    yield server
    assert server.stop() == 0


def body():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 1, 8, 8), np.uint8))
    return buffer.getvalue()


def head(length, path="/v1/predict"):
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def everything(connection):
    """Return what comes until the server closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def test_a_client_that_says_nothing_or_half_a_head_is_cut_off(server):
    for start in (b"", b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n"):
        with server.connect() as connection:
            connection.sendall(start)
            with contextlib.suppress(ConnectionResetError):
                assert everything(connection) == b""


def test_half_a_second_request_on_an_open_connection_is_cut_off(server):
    with server.connect() as connection:
        connection.sendall(head(len(body())) + body())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        try:
            rest = everything(connection)
        except ConnectionResetError:
            rest = b""
        assert b"HTTP/1.1" not in rest


def test_half_a_body_is_answered_408(server):
    with server.connect() as connection:
        connection.sendall(head(len(body())) + body()[:50])
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b"0.4 seconds" in answer and b"application/problem+json" in answer


def test_a_client_that_does_not_read_its_answer_is_cut_off(server):
    def sockets():
        folder = Path(f"/proc/{server.process.pid}/fd")
        return sum(os.readlink(each).startswith("socket:") for each in folder.iterdir() if each.is_symlink())

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("what a process has open is seen on Linux only")
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((20, 1, 8, 8), np.uint8))
    asked = head(len(buffer.getvalue()), "/v1/explain?neighbours=32") + buffer.getvalue()
    time.sleep(1)  # connections of the tests before are gone
    before = sockets()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(asked * 40)  # more answers than the kernel keeps
        deadline = time.monotonic() + 30
        while sockets() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sockets() == before + 1
        while sockets() > before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sockets() == before


def test_a_slow_client_does_not_hold_up_another(server):
    with server.connect() as slow:
        slow.sendall(head(len(body())))
        status, answer = server.request("POST", "/v1/predict", body(), {"Content-Type": "application/octet-stream"})
        assert status == 200 and answer["model"] == "small"


def test_no_http_at_all(server):
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 400")


def test_sigterm_finishes_the_request_in_work_and_tells_new_ones_so(run):
    server = Server(run, "--detector", "none")
    with server.connect() as connection:
        connection.sendall(head(len(body())) + body()[:50])
        server.request("GET", "/healthz")  # so the head above has been read too
        server.process.send_signal(signal.SIGTERM)
        for line in server.process.stderr:
            if "draining" in line:
                break
        status, problem = server.request("POST", "/v1/predict", body(), OCTETS)
        assert status == problem["status"] == 503 and "stopping" in problem["detail"]
        assert server.request("GET", "/healthz")[0] == 200
        assert server.request("GET", "/readyz")[0] == 503
        connection.sendall(body()[50:])
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 200") and b'"predictions"' in answer
    rest = server.process.communicate(timeout=60)[1]
    assert server.process.returncode == 0 and "Traceback" not in rest
    with pytest.raises(OSError):
        server.connect().close()


def test_a_second_server_on_the_run_with_a_key_in_a_file_and_its_log(run, server, tmp_path):
    key, before = tmp_path / "key", {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    key.write_text(f"{KEY}\n")
    other = Server(run, "--detector", "none", "--api-key-file", key, "--max-connections", 3)
    assert server.request("GET", "/healthz")[0] == 200
    octets = {"Content-Type": "application/octet-stream"}
    assert other.request("POST", "/v1/predict?model=small", body(), octets)[0] == 401
    assert other.request("POST", "/v1/predict?model=small", body(), {**octets, "X-API-Key": KEY})[0] == 200
    with other.connect(), other.connect(), other.connect() as third:  # as many as may be open
        third.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert everything(third).startswith(b"HTTP/1.1 503")
    assert other.stop() == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before  # nothing is written
    lines = [json.loads(line) for line in other.log.splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert [(line["path"], line["status"]) for line in requests] == [("/v1/predict", 401), ("/v1/predict", 200)]
    for line in requests:
        assert line["milliseconds"] > 0 and line["client"] == "127.0.0.1" and line["time"].endswith("Z")
    assert KEY not in other.log


def test_mistakes_are_one_line(run, tmp_path, monkeypatch):
    from clead.cli.application import app

    def mistake(*arguments):
        with pytest.raises(UserError) as caught:
            app(["serve", *map(str, arguments)], standalone_mode=False)
        assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
        return str(caught.value)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} of 127.0.0.1 is in use" in mistake(tmp_path, "--port", port)  # before a run is looked at
    assert "--host 192.0.2.1" in mistake(run, "--host", "192.0.2.1")
    assert "serve.max_batch" in mistake(run, "--max-batch", 0)
    assert "'tensorrt'" in mistake(run, "--engine", "tensorrt")
    assert "--api-key-file" in mistake(run, "--api-key-file", tmp_path / "nothing")
    assert "is not a run directory" in mistake(tmp_path, "--port", 0)
    assert "changes nothing here" in mistake(run, "--port", 0, "--threat.eps", "0.1")
    monkeypatch.setenv("CLEAD_API_KEY", "short")
    assert "serve.api_key" in mistake(run, "--port", 0)
    with pytest.raises(UserError, match="CLEAD_API_KEY: the playground asks for no key"):
        app(["playground", str(run), "--port", "0"], standalone_mode=False)
