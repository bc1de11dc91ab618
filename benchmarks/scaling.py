"""Data-parallel training on 1, 2 and 4 processes of this machine, and a model of cost that predicts more.

    python benchmarks/scaling.py --out benchmarks/scaling.json            (6 minutes on 2 cores)

The C-LEAD step of the recipe cifar10-small-clead (ResNet-8, PGD, generated images) with a fixed number of images per process, one
thread each, gloo on the loopback. Measured per step: seconds, collectives, and the bytes that a process gives into each kind.
**Model**: a step of n processes takes ``compute + calls · latency + carried / bandwidth``. Nothing is fitted to the trainings that
it predicts: compute is the step of n trainings that know nothing of each other on the same machine (they share its cores and
memory), calls and bytes are counted, latency is that of a small all-reduce between n processes, bandwidth that of a large one
between 2. A ring carries 2 (n − 1) / n times the bytes of an all-reduce and (n − 1) times those of an all-gather. What the model
leaves out is waiting for each other. Then the same for GPUs, whose step time is given by ``--gpu-step``, over NVLink inside a
machine of 8 and 50 GB/s between machines.
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

IMAGES = 32
GATHERED, REDUCED = ("join", "gather", "statistics"), ("average", "sums")
GPU = {"latency_s": 20e-6, "inside_bytes_per_s": 300e9, "between_bytes_per_s": 50e9}


def worker(folder, steps):
    """Train some steps; process 0 leaves what a step took and sent."""
    from clead import distributed
    from clead.config import load_recipe
    from clead.runs.directory import RunDir
    from clead.runs.loading import build
    from clead.training.trainer import Callbacks, fit

    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    words = f"--data.name npz --data.path {folder}/images.npz --data.batch_size {IMAGES * size} --train.device cpu"
    words += f" --train.precision float32 --train.epochs {steps * IMAGES * size / 2000}"
    words += " --train.validate_images 2 --train.validate_every 1000"
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

    dist.init_process_group("gloo")
    found = {}
    for size in (64, 2**22):
        tensor, spent = torch.zeros(size // 4), []
        for _ in range(30):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            spent.append(time.perf_counter() - begin)
        found[size] = statistics.median(spent)
    if dist.get_rank() == 0:
        latency = found[64]
        (Path(folder) / "messages.json").write_text(
            json.dumps({"latency_s": latency, "bytes_per_s": 2**22 / (found[2**22] - latency)})
        )
    dist.destroy_process_group()


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def together(count, *arguments):
    """Start ``count`` processes that are one training."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    subprocess.run([sys.executable, *launch, __file__, *arguments], check=True, env=ENVIRONMENT)


def apart(count, folder, steps):
    """Start ``count`` trainings at the same time; return the median seconds of their steps."""
    folders = [Path(folder) / f"apart-{number}" for number in range(count)]
    for each in folders:
        each.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / "images.npz", each)
    started = [
        subprocess.Popen([sys.executable, __file__, "--worker", str(each), str(steps)], env=ENVIRONMENT)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-step", type=float, default=0.05, help="seconds of a step on one GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--messages", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker[0], int(arguments.worker[1]))
        return
    if arguments.messages:
        messages(arguments.messages)
        return
    cores = os.cpu_count() or 1
    found = {count: [] for count in (1, 2, 4)}
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
        bandwidth = widths[0]
        computes = {count: [] for count in found}
        for _ in range(arguments.rounds):
            for count in found:
                together(count, "--worker", folder, str(arguments.steps))
                found[count].append(json.loads(Path(folder, "result.json").read_text()))
                computes[count].append(apart(count, folder, arguments.steps))
    seconds = {count: statistics.median(part["seconds"] for part in parts) for count, parts in found.items()}
    compute = {count: statistics.median(values) for count, values in computes.items()}
    rows = []
    for count in found:
        sent = found[count][0]["sent"]
        guess = predicted(compute[count], sent, count, latency.get(count), bandwidth)
        rows.append(
            {
                "processes": count,
                "steps_per_second": round(1 / seconds[count], 3),
                "images_per_second": round(IMAGES * count / seconds[count], 1),
                "sent_per_step": sent,
                "predicted_steps_per_second": round(1 / guess, 3),
                "predicted_parts_s": {
                    "compute": round(compute[count], 4),
                    "latency": round(sent["calls"] * latency[count], 4) if sent else 0,
                    "carried": round(carried(sent, count) / bandwidth, 4) if sent else 0,
                },
            }
        )
        print(rows[-1], flush=True)
    gpus, sent = [], found[2][0]["sent"]
    for count in (8, 64):
        width = GPU["inside_bytes_per_s"] if count <= 8 else GPU["between_bytes_per_s"]
        guess = predicted(arguments.gpu_step, sent, count, GPU["latency_s"], width)
        gpus.append(
            {"gpus": count, "seconds_per_step": round(guess, 5), "efficiency": round(arguments.gpu_step / guess, 3)}
        )
        print(gpus[-1])
    result = {
        "command": "python benchmarks/scaling.py --out benchmarks/scaling.json",
        "machine": {"cores": cores, "system": platform.system()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "images_per_process": IMAGES,
        "link": {"latency_s": latency, "bytes_per_s": bandwidth},
        "measured": rows,
        "predicted_gpus": {"assumed": {**GPU, "step_s": arguments.gpu_step}, "rows": gpus},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
