"""Data-parallel training on 1, 2 and 4 processes of this machine, and a model of cost that predicts more.

    python benchmarks/scaling.py --out benchmarks/scaling.json            (20 minutes on 2 cores)

The C-LEAD step of the recipe cifar10-small-clead (ResNet-10, PGD, generated images) with a fixed number of images per process, one
thread each, gloo on the loopback, for each of ``CASES``: 32 images or 64 per process, statistics of batch-norm of all or of
each. Measured per step: seconds, collectives, and the bytes that a process gives into each kind. **Model**: a step of n processes
takes ``compute + calls · latency + carried / bandwidth``. Nothing is fitted to the trainings that it predicts: compute is the step
of n trainings that know nothing of each other on the same machine (they share its cores and memory), calls and bytes are counted,
bandwidth is that of a large all-reduce between 2 processes. Latency is what a small all-reduce adds to n processes that compute for
``SEGMENT`` seconds before each: it holds waking up and waiting for the slower one. A ring carries 2 (n − 1) / n times the bytes of
an all-reduce and (n − 1) times those of an all-gather. Then the same for GPUs, whose step time is given by ``--gpu-step``, over
NVLink inside a machine of 8 and 50 GB/s between machines. ``efficiency`` is images per second over n times those of one process.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

CASES = {
    "32 images": (32, ""),
    "64 images": (64, ""),
    "64 images, own statistics": (64, "--train.sync_batch_norm false"),
}
SEGMENT = 0.005
GATHERED, REDUCED = ("join", "gather", "statistics"), ("average", "sums")
GPU = {"latency_s": 20e-6, "inside_bytes_per_s": 300e9, "between_bytes_per_s": 50e9}


def worker(folder, steps, case):
    """Train some steps; process 0 leaves what a step took and sent."""
    from clead import distributed
    from clead.config import load_recipe
    from clead.runs.directory import RunDir
    from clead.runs.loading import build
    from clead.training.trainer import Callbacks, fit

    torch.set_num_threads(1)
    size, (images, more) = int(os.environ.get("WORLD_SIZE", "1")), CASES[case]
    words = f"--data.name npz --data.path {folder}/images.npz --data.batch_size {images * size} --train.device cpu"
    words += f" --train.precision float32 --train.epochs {steps * images * size / 2000}"
    words += f" --train.validate_images 2 --train.validate_every 1000 {more}"
    config = load_recipe("cifar10-small-clead", words.split())
    splits = config.data.load(0)
    run = RunDir(Path(tempfile.mkdtemp(dir=folder)))
    times, bytes_before = [time.perf_counter()], []

    def step():
        times.append(time.perf_counter())
        bytes_before.append(dict(distributed.TRAFFIC))

    fit(config, splits, build(config, splits), run, show=False, callbacks=Callbacks(step))
    if int(os.environ.get("RANK", "0")) == 0:
        spent = np.diff(times)[2:]
        sent = {
            kind: (bytes_before[-1].get(kind, 0) - bytes_before[1].get(kind, 0)) // (len(bytes_before) - 2)
            for kind in (*GATHERED, *REDUCED, "calls")
        }
        result = {"seconds": float(statistics.median(spent)), "sent": sent if size > 1 else {}}
        (Path(folder) / "result.json").write_text(json.dumps(result))
    distributed.exit_process(0)


def messages(folder):
    """Measure latency and bandwidth of all-reduce between processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    small, large, square = torch.zeros(16), torch.zeros(2**20), torch.rand(256, 256)
    begin = time.perf_counter()
    for _ in range(200):
        square @ square
    products = max(1, round(SEGMENT / (time.perf_counter() - begin) * 200))
    latency = seconds_of(lambda: dist.all_reduce(small), square, products) - seconds_of(None, square, products)
    wide = []
    for _ in range(30):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(large)
        wide.append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        (Path(folder) / "messages.json").write_text(
            json.dumps({"latency_s": latency, "bytes_per_s": 2**22 / statistics.median(wide)})
        )
    dist.destroy_process_group()


def seconds_of(call, square, products, repeats=200):
    """Return the mean seconds of some matrix products and then ``call``, over ``repeats`` of both."""
    begin = time.perf_counter()
    for _ in range(repeats):
        for _ in range(products):
            square @ square
        if call:
            call()
    return (time.perf_counter() - begin) / repeats


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def together(count, *arguments):
    """Start ``count`` processes that are one training."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    subprocess.run([sys.executable, *launch, __file__, *arguments], check=True, env=ENVIRONMENT)


def apart(count, folder, steps, case):
    """Start ``count`` trainings at the same time; return the median seconds of their steps."""
    folders = [Path(folder) / f"apart-{number}" for number in range(count)]
    for each in folders:
        each.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / "images.npz", each)
    started = [
        subprocess.Popen([sys.executable, __file__, "--worker", str(each), str(steps), case], env=ENVIRONMENT)
        for each in folders
    ]
    if any([process.wait() for process in started]):
        raise SystemExit("a training failed")
    return statistics.median(json.loads((each / "result.json").read_text())["seconds"] for each in folders)


def predicted(compute, sent, count, latency, bandwidth):
    """Return the seconds of a step on ``count`` processes."""
    return compute if count == 1 else compute + sent["calls"] * latency + carried(sent, count) / bandwidth


def carried(sent, count):
    """Return the bytes that a process of ``count`` passes on in a step, in a ring."""
    reduced, gathered = (sum(sent[kind] for kind in kinds) for kinds in (REDUCED, GATHERED))
    return 2 * (count - 1) / count * reduced + (count - 1) * gathered


def rows_of(case, folder, arguments, latency, bandwidth):
    """Return what one case took on 1, 2 and 4 processes, in turns, and what the model says."""
    runs, computes = {count: [] for count in (1, 2, 4)}, {count: [] for count in (1, 2, 4)}
    for _ in range(arguments.rounds):
        for count in runs:
            together(count, "--worker", folder, str(arguments.steps), case)
            runs[count].append(json.loads(Path(folder, "result.json").read_text()))
            computes[count].append(apart(count, folder, arguments.steps, case))
    seconds = {count: statistics.median(run["seconds"] for run in each) for count, each in runs.items()}
    compute = {count: statistics.median(values) for count, values in computes.items()}
    rows = []
    for count, each in runs.items():
        sent = each[0]["sent"]
        guess = predicted(compute[count], sent, count, latency.get(count), bandwidth)
        rows.append(
            {
                "processes": count,
                "steps_per_second": round(1 / seconds[count], 3),
                "images_per_second": round(CASES[case][0] * count / seconds[count], 1),
                "efficiency": round(seconds[1] / seconds[count], 3),
                "sent_per_step": sent,
                "predicted_steps_per_second": round(1 / guess, 3),
                "predicted_parts_s": {
                    "compute": round(compute[count], 4),
                    "latency": round(sent["calls"] * latency[count], 4) if sent else 0,
                    "carried": round(carried(sent, count) / bandwidth, 4) if sent else 0,
                },
            }
        )
        print(case, rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-step", type=float, default=0.05, help="seconds of a step on one GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--messages", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], int(arguments.worker[1]), arguments.worker[2])
        return
    if arguments.messages:
        messages(arguments.messages)
        return
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        labels = np.arange(2300) % 10
        images = random.integers(0, 256, (2300, 32, 32, 3), dtype=np.uint8)
        np.savez(f"{folder}/images.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
        latency, widths = {}, []
        for count in (2, 4):
            together(count, "--messages", folder)
            link = json.loads(Path(folder, "messages.json").read_text())
            latency[count] = link["latency_s"]
            widths.append(link["bytes_per_s"])
        print(latency, widths, flush=True)
        for case in CASES:
            measured[case] = rows_of(case, folder, arguments, latency, widths[0])
    sent = measured["32 images"][1]["sent_per_step"]
    gpus = []
    for count in (8, 64):
        width = GPU["inside_bytes_per_s"] if count <= 8 else GPU["between_bytes_per_s"]
        guess = predicted(arguments.gpu_step, sent, count, GPU["latency_s"], width)
        gpus.append(
            {"gpus": count, "seconds_per_step": round(guess, 5), "efficiency": round(arguments.gpu_step / guess, 3)}
        )
        print(gpus[-1])
    result = {
        "command": "python benchmarks/scaling.py --out benchmarks/scaling.json",
        "machine": {"cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "link": {"latency_s": latency, "bytes_per_s": widths[0]},
        "measured": measured,
        "predicted_gpus": {"assumed": {**GPU, "step_s": arguments.gpu_step}, "rows": gpus},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
