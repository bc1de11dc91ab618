"""``clead serve`` over the loopback: throughput against a plain onnxruntime loop, and single-image latency with and without load.

    CLEAD_DATA=... python benchmarks/serving.py digits=RUN cifar10=RUN --out benchmarks/serving.json     (5 minutes)

**Throughput.** For each run and batch size B, in turns: a plain loop, ``session.run(["logits"], …)`` on one float32 batch of B
images that lies in memory; and the server (``--engine onnx --max-batch B``) under requests of B test images each, as uint8
``.npy`` over several connections that are kept open. It answers as always, with classes, all probabilities and the suspicion
score. Both compute with ``--threads`` threads. ``server_over_plain`` is the median over the rounds. One HTTP request per image
is another matter: that is ``single_images_per_second``, where HTTP is most of the work.

**Latency.** One PNG per request, server with the first batch size. Requests arrive at random times (Poisson), and each time counts
from the planned arrival, so that waiting for a free connection counts too. Unloaded: ``--unloaded`` requests per second, so few
that hardly two meet. Under load: at each ``--load`` of the rate that the server manages on 16 connections without pause. They
take turns; of each round the median and the 99th percentile are taken, and of the rounds the median. ``back_to_back_median_ms``:
one after the other over one connection, which never lets a core fall asleep and is faster than the same server called seldom.
"""

import argparse
import http.client
import io
import json
import os
import platform
import random
import re
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

from clead.api import load
from clead.export.onnx import to_onnx
from clead.runs.directory import RunDir


def request(path, kind, body):
    head = f"POST {path} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection:
    """A connection that is kept open, with as little work as possible: it competes with the server for the cores."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message):
        """Send a request and return the body of its answer."""
        self.socket.sendall(message)
        return self.receive()

    def receive(self):
        """Return the body of the answer that is on its way."""
        answer = bytearray(self.socket.recv(65536))
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self.socket.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), bytes(answer[:400])
        at = answer.lower().index(b"content-length:") + 15
        missing = end + 4 + int(answer[at : answer.index(b"\r\n", at)]) - len(answer)
        while missing > 0:
            part = self.socket.recv(65536)
            answer += part
            missing -= len(part)
        return bytes(answer[end + 4 :])


class Server:
    """A server in a process of its own."""

    def __init__(self, run, threads, batch):
        options = ["--engine", "onnx", "--threads", threads, "--max-batch", batch, "--max-images", batch, "--port", 0]
        # Its log goes to the null device: a line per request is part of the work, a terminal is not.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "clead", "serve", str(run), *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        line = self.process.stdout.readline()
        self.port = int(re.search(r":(\d+);", line).group(1))
        for _ in range(200):
            try:
                health = http.client.HTTPConnection("127.0.0.1", self.port)
                health.request("GET", "/healthz")
                health.getresponse().read()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)

    def close(self):
        """Stop the process."""
        self.process.terminate()
        self.process.wait()


def flood(port, message, connections, seconds):
    """Return how many requests per second are answered on connections that never pause."""
    opened = [Connection(port) for _ in range(connections)]
    for connection in opened:
        connection.send(message)
    counts, end = [0] * connections, time.perf_counter() + seconds
    begin = time.perf_counter()

    def work(number):
        while time.perf_counter() < end:
            opened[number].send(message)
            counts[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - begin)


def one_by_one(port, message, count):
    """Return the seconds of each of ``count`` requests, one after the other."""
    connection, times = Connection(port), []
    for number in range(count + 20):
        start = time.perf_counter()
        connection.send(message)
        if number >= 20:
            times.append(time.perf_counter() - start)
    return times


def at_random(port, message, rate, seconds, seed):
    """Return the seconds from planned arrival to answer of requests that arrive at random times, ``rate`` per second.

    One thread: threads would wait for each other here, and that would be counted as the server's.
    """
    drawn, planned, now = random.Random(seed), [], 0.0
    while now < seconds:
        now += drawn.expovariate(rate)
        planned.append(now)
    waiting, times, idle, selector = 0, [], [Connection(port) for _ in range(32)], selectors.DefaultSelector()
    for connection in idle:
        connection.send(message)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    due, begin = {}, time.perf_counter() + 0.1
    while len(times) < len(planned):
        now = time.perf_counter() - begin
        while idle and waiting < len(planned) and planned[waiting] <= now:
            connection = idle.pop()
            due[connection] = planned[waiting]
            connection.socket.sendall(message)
            waiting += 1
        pause = max(0.0, planned[waiting] - now) if idle and waiting < len(planned) else None
        for key, _ in selector.select(pause):
            key.data.receive()
            times.append(time.perf_counter() - begin - due.pop(key.data))
            idle.append(key.data)
    return times


def plain_loop(session, batch, seconds):
    """Return the images per second of a loop that does nothing else."""
    for _ in range(3):
        session.run(["logits"], {"images": batch})
    count, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        session.run(["logits"], {"images": batch})
        count += len(batch)
    return count / spent


def png(image):
    buffer = io.BytesIO()
    array = image.transpose(1, 2, 0)
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def latencies(port, image, arguments):
    message = request("/v1/predict", "image/png", image)
    rate = flood(port, message, 16, arguments.seconds)
    shares = [arguments.unloaded / rate, *arguments.load]
    rounds = []
    for number in range(arguments.rounds):
        hot = 1000 * statistics.median(one_by_one(port, message, 300))
        times = [1000 * np.array(at_random(port, message, share * rate, arguments.seconds, number)) for share in shares]
        rounds.append([hot, *((np.median(one), np.percentile(one, 99)) for one in times)])

    def middle(values):
        return round(float(statistics.median(values)), 3)

    hot, unloaded = middle(row[0] for row in rounds), middle(row[1][0] for row in rounds)
    return {
        "single_images_per_second": round(rate),
        "back_to_back_median_ms": hot,
        "unloaded_median_ms": unloaded,
        "under_load": [
            {
                "load": load,
                "requests_per_second": round(load * rate),
                "median_ms": middle(row[place][0] for row in rounds),
                "p99_ms": (p99 := middle(row[place][1] for row in rounds)),
                "p99_over_unloaded_median": middle(row[place][1] / row[1][0] for row in rounds),
                "p99_over_back_to_back_median": round(p99 / hot, 3),
                "of_each_round": [round(float(row[place][1] / row[1][0]), 2) for row in rounds],
            }
            for place, load in enumerate(arguments.load, 2)
        ],
    }


def measured(name, run, arguments):
    config = RunDir.open(run).config()
    images = config.data.load(config.train.seed).test.images.numpy()
    model = load(run)
    content = to_onnx(model, images.shape[1:])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "image": list(images.shape[1:]),
        "throughput": [],
    }
    rng = np.random.default_rng(0)
    for batch in arguments.batch:
        chosen = images[rng.choice(len(images), batch, replace=len(images) < batch)]
        floats = chosen.astype(np.float32) / 255
        buffer = io.BytesIO()
        np.save(buffer, chosen)
        message = request("/v1/predict", "application/octet-stream", buffer.getvalue())
        server = Server(run, arguments.threads, batch)
        try:
            answer = json.loads(Connection(server.port).send(message))
            expected = session.run(["logits"], {"images": floats})[0].argmax(1)
            labels = [answer["classes"].index(one["label"]) for one in answer["predictions"]]
            assert labels == expected.tolist()  # the same work is done
            rounds = []
            for _ in range(arguments.rounds):
                plain = plain_loop(session, floats, arguments.seconds)
                served = batch * flood(server.port, message, arguments.connections, arguments.seconds)
                rounds.append((plain, served, served / plain))
            plain, served, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
            row = {
                "batch": batch,
                "plain_images_per_second": round(plain),
                "server_images_per_second": round(served),
                "server_over_plain": round(ratio, 3),
                "ratio_of_each_round": [round(one[2], 3) for one in rounds],
            }
            result["throughput"].append(row)
            print(name, row, flush=True)
            if batch == arguments.batch[0]:
                result["latency"] = latencies(server.port, png(images[0]), arguments)
                print(name, result["latency"], flush=True)
        finally:
            server.close()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement in a round")
    parser.add_argument("--unloaded", type=float, default=20, help="requests per second")
    parser.add_argument("--load", type=float, nargs="+", default=[0.25, 0.5], help="of the rate without pause")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    result = {
        "command": "python benchmarks/serving.py " + " ".join(sys.argv[1:]),
        "machine": {
            "cores": os.cpu_count(),
            "cpu": names[0] if names else platform.machine(),
            "system": platform.system(),
        },
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "threads": arguments.threads,
        "connections": arguments.connections,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "runs": {},
    }
    start = time.monotonic()
    for pair in arguments.runs:
        name, _, run = pair.partition("=")
        result["runs"][name] = measured(name, Path(run), arguments)
    print(f"{time.monotonic() - start:.0f} s")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
