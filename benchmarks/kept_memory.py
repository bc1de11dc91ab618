"""What it gains, and takes, that the memory of large tensors is kept from step to step (``clead.devices.keep_freed_memory``).

    python benchmarks/kept_memory.py --out benchmarks/kept_memory.json            (one core: about 15 minutes)

A PGD-AT step (PGD-3, SGD) of networks with random weights on random images, one thread. ``given back`` is what glibc does when it
is left alone (a variable ``MALLOC_…`` in the environment), ``kept`` what training and attacks do. Each is a process of its own,
interleaved, ``--rounds`` of each: CPU seconds per image (median of the steps, then of the rounds) and the largest memory of
the process. ``same`` says whether the weights after the steps are the same to the last bit.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

POINTS = {  # network, side in pixels, images of a batch, steps, dtype
    "EfficientNet-Lite0, 224 pixels": ("efficientnet_lite0", 224, 32, 3, "float32"),
    "EfficientNet-Lite0, 128 pixels": ("efficientnet_lite0", 128, 16, 5, "float32"),
    "EfficientNet-Lite0, 64 pixels": ("efficientnet_lite0", 64, 32, 5, "float32"),
    "ResNet-18, 32 pixels, bfloat16": ("resnet18", 32, 128, 5, "bfloat16"),
    "ResNet-10 of width 16, 32 pixels": ("resnet10", 32, 128, 10, "float32"),
}


def steps(name):
    """Take the steps of a point; print CPU seconds per image, MiB and a digest of the weights."""
    from clead.attacks.pgd import PGD
    from clead.devices import keep_freed_memory
    from clead.interfaces import Batch
    from clead.methods.pgd_at import PGDAT
    from clead.models import MODELS
    from clead.threats.linf import Linf

    network, size, batch, count, dtype = POINTS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = {"efficientnet_lite0": {"pretrained": False}, "resnet10": {"width": 16}}.get(network, {})
    model = MODELS.get(network)(**options).build(3, 10, [0.5] * 3, [0.25] * 3).train()
    model = model.to(memory_format=torch.channels_last)
    generator, seconds = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    method, attack = PGDAT(), PGD(steps=3, step_size="2/255")
    for _ in range(count + 1):
        start = time.process_time()
        x = torch.rand(batch, 3, size, size, generator=generator)
        images = Batch(x, torch.randint(0, 10, (batch,), generator=generator))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = method(model, images, threat=Linf(eps="8/255"), attack=attack, generator=generator).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        keep_freed_memory(torch.device("cpu"))  # as the trainer does; without effect where the environment has chosen
        seconds.append((time.process_time() - start) / batch)
    weights = b"".join(value.detach().numpy().tobytes() for value in model.parameters())
    status = Path("/proc/self/status").read_text()
    mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
    result = {"seconds": statistics.median(seconds[1:]), "mib": mib, "weights": hashlib.sha256(weights).hexdigest()}
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*POINTS], default=[*POINTS])
    parser.add_argument("--point", choices=[*POINTS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        return steps(arguments.point)
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    environments = {"given back": usual | {"MALLOC_ARENA_TEST": "8"}, "kept": usual}
    points = {}
    for name in arguments.only:
        runs = {way: [] for way in environments}
        for _ in range(arguments.rounds):
            for way, environment in environments.items():
                command = [sys.executable, __file__, "--point", name]
                output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                runs[way].append(json.loads(output.splitlines()[-1]))
        point = {
            way: {key: round(statistics.median(run[key] for run in rows), 4) for key in ("seconds", "mib")}
            for way, rows in runs.items()
        }
        point["gain"] = round(point["given back"]["seconds"] / point["kept"]["seconds"], 3)
        point["memory"] = round(point["kept"]["mib"] / point["given back"]["mib"], 2)
        point["same"] = len({run["weights"] for rows in runs.values() for run in rows}) == 1
        points[name] = point
        print(name, json.dumps(point), flush=True)
    result = {"torch": torch.__version__, "threads": 1, "rounds": arguments.rounds, "points": points}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
