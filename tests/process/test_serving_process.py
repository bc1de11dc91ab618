"""``clead serve`` as a process: slow clients, SIGTERM, ports, mistakes on the command line."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn

import clead
import clead.cli.serve
from clead.errors import UserError
from clead.inference.hosts import hosts_of
from clead.inference.models import ServedModel
from clead.serving import ServeSettings, create_app
from clead.serving.protocol import limited_protocol
from clead.serving.server import _Server
from support import ROOT

_SPEC = importlib.util.spec_from_file_location("faults_serving", ROOT / "qa" / "faults_serving.py")
faults = importlib.util.module_from_spec(_SPEC)
sys.modules["faults_serving"] = faults
_SPEC.loader.exec_module(faults)

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


@pytest.mark.parametrize("fault", [fault for _, fault in faults.FAULTS], ids=[name for name, _ in faults.FAULTS])
def test_a_hostile_client_gets_a_problem_and_others_are_answered(server, fault):
    fault(f"http://127.0.0.1:{server.port}")


def test_after_all_of_them_the_server_is_whole_and_no_log_line_is_forged(server):
    status, health = server.request("GET", "/readyz")
    assert (status, health["status"]) == (200, "ready")
    rss = next(line for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert int(rss.split()[1]) < 2 * 2**20, rss  # KiB: no picture and no array of a few kB filled the memory


@contextlib.contextmanager
def threaded(run, **values):
    """Serve ``run`` in a thread; give the application, the server and its port."""
    settings = ServeSettings(threads=1, detector=None, **values)
    app = create_app([run], settings)
    app.state.hosts = hosts_of(settings.allowed_hosts, "127.0.0.1", "127.0.0.1")
    config = uvicorn.Config(
        app,
        http=limited_protocol(settings, app.state.metrics),
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    bound = socket.create_server(("127.0.0.1", 0))
    server, port = _Server(config), bound.getsockname()[1]
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield app, server, port
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def opened(port, content=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(content)
    return connection


GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def test_one_address_has_so_many_connections_and_those_too_many_are_told(run):
    with threaded(run, max_per_client=2, max_connections=4) as (app, server, port), contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(opened(port)) for _ in range(2))
        while len(server.server_state.connections) < 2:
            time.sleep(0.01)
        answer = everything(stack.enter_context(opened(port, GET)))
        assert answer.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in answer and b"--max-per-client" in answer
        started = time.monotonic()
        silent = stack.enter_context(opened(port))
        with contextlib.suppress(ConnectionResetError):
            assert everything(silent) == b""
        assert time.monotonic() - started < 10  # not the 20 seconds of those within the limit
        first.sendall(GET)
        assert everything(first).startswith(b"HTTP/1.1 200")
        assert everything(stack.enter_context(opened(port, GET))).startswith(b"HTTP/1.1 200")  # a place is free again
        text = app.state.metrics.text()
    assert b'clead_connections_refused_total{reason="too_many"} 2.0' in text
    assert b'clead_connections_refused_total{reason="slow_head"} 1.0' in text


def test_twice_as_many_connections_as_allowed_are_never_open(run):
    with threaded(run, max_connections=3) as (_, server, port), contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(opened(port))
        time.sleep(0.2)
        assert len(server.server_state.connections) <= 6


def test_a_body_that_drips_is_cut_off_before_the_time_for_all(run, monkeypatch):
    monkeypatch.setattr("clead.inference.request_parsing._GRACE", 0.2)
    with threaded(run, min_rate=10_000) as (_, _, port), opened(port, head(5000)) as connection:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 10:
                connection.sendall(b"x")
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(65536)
                    break
        assert time.monotonic() - started < 10
        assert answer.startswith(b"HTTP/1.1 408") and b"10000 bytes per second" in answer


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_is_answered_while_the_model_works_and_head_has_no_body(run, monkeypatch, method):
    go, computing, plain = threading.Event(), threading.Event(), ServedModel.answer

    def slow(self, images):
        computing.set()
        assert go.wait(60)
        return plain(self, images)

    monkeypatch.setattr(ServedModel, "answer", slow)
    with threaded(run) as (_, _, port), opened(port, head(len(body())) + body()) as working:
        assert computing.wait(60)
        with opened(port, GET.replace(b"GET", method.encode())) as other:
            answer, _, content = everything(other).partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200") and (content == b"") == (method == "HEAD")
        go.set()
        assert working.recv(65536).startswith(b"HTTP/1.1 200")


def test_what_is_not_answered_when_the_time_for_stopping_is_over_is_told_so(run, monkeypatch):
    go, computing = threading.Event(), threading.Event()

    def stuck(self, images):
        computing.set()
        assert go.wait(60)
        raise RuntimeError

    monkeypatch.setattr(ServedModel, "answer", stuck)
    with threaded(run, drain_seconds=1) as (_, server, port), opened(port, head(len(body())) + body()) as waiting:
        assert computing.wait(60)
        server.should_exit = True
        answer = everything(waiting)
        assert (
            answer.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in answer and b"application/problem+json" in answer
        )
        go.set()


def test_a_start_that_fails_is_no_success(run, monkeypatch):
    from clead.serving import serve

    def broken(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("clead.serving.batching.Batcher.start", broken)
    monkeypatch.setattr("clead.serving.server.log_as_json", contextlib.nullcontext)
    settings = ServeSettings(threads=1, detector=None)
    with pytest.raises(SystemExit) as caught:
        serve(lambda: create_app([run], settings), settings, port=0, say=lambda _: None)
    assert caught.value.code not in (0, None)


def test_all_names_are_answered_to_only_where_that_is_said(run, monkeypatch):
    from clead.serving import serve

    monkeypatch.setattr("clead.serving.server.log_as_json", contextlib.nullcontext)
    for names, said in ((("*",), True), ((), False)):
        settings, lines = ServeSettings(threads=1, detector=None, allowed_hosts=names), []
        monkeypatch.setattr(_Server, "run", lambda self, sockets: None)
        app = create_app([run], settings)
        serve(lambda app=app: app, settings, port=0, say=lines.append)
        assert any("--allowed-hosts *" in line for line in lines) is said and (app.state.hosts is None) is said


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


def test_a_log_that_nobody_reads_holds_up_nothing():
    from clead.serving.logs import _JsonHandler

    reading, writing = os.pipe()
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as stream:
        handler = _JsonHandler(stream, most=50)
        started = time.monotonic()
        for _ in range(300):
            handler.emit(logging.makeLogRecord({"msg": "x" * 2000, "levelno": 20}))  # 600 kB, a pipe takes 64
        assert time.monotonic() - started < 10
        with os.fdopen(reading) as reader:
            lines = []
            while len(lines) < 50:
                lines.append(json.loads(reader.readline()))
            handler.emit(logging.makeLogRecord({"msg": "last", "levelno": 20}))
            while lines[-1]["message"] != "last":
                lines.append(json.loads(reader.readline()))
        dropped = [line["count"] for line in lines if line["message"] == "log lines dropped"]
        assert dropped and sum(dropped) + len(lines) - len(dropped) - 1 == 300
        handler.emit(logging.makeLogRecord({"msg": "nobody reads any more", "levelno": 20}))
        handler.finish(10)


def test_mistakes_are_one_line(run, tmp_path, monkeypatch):
    from clead.cli.app import app

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
    assert "without http://" in mistake(run, "--allowed-hosts", "https://demo.example.org")
    assert "'tensorrt'" in mistake(run, "--engine", "tensorrt")
    assert "--api-key-file" in mistake(run, "--api-key-file", tmp_path / "nothing")
    assert "is not a run directory" in mistake(tmp_path, "--port", 0)
    assert "changes nothing here" in mistake(run, "--port", 0, "--threat.eps", "0.1")
    monkeypatch.setenv("CLEAD_API_KEY", "short")
    assert "serve.api_key" in mistake(run, "--port", 0)
    with pytest.raises(UserError, match="CLEAD_API_KEY: the playground asks for no key"):
        app(["playground", str(run), "--port", "0"], standalone_mode=False)
