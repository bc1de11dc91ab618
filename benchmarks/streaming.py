"""Training from Parquet shards: does decoding keep a training step fed, and does memory stay flat?

    python benchmarks/streaming.py --out benchmarks/streaming.json            (5 minutes on 2 cores)

Images of 224 × 224 pixels are generated (smooth noise, JPEG) and written as shards. **Step**: a plain training step, the cheapest
there is (one forward, one backward) and so the hardest to feed, on batches of the stream and on the same images in memory, in
turns; ``stream_over_memory`` is the median ratio, 1 where decoding hides behind the step. **Decoding** alone: images per second.
**Memory**: what the process has after the first batches and at its peak, while an epoch reads ``read_over_room`` times what
``shuffle_buffer`` keeps; in a process of its own.
"""

import argparse
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from clead.data.datasets.parquet_stream import ParquetStream
from clead.data.loaders import Loader
from clead.interfaces import ImageSet
from clead.models import MODELS

SIZE = 224


def write(folder, count, shards):
    noise = np.random.default_rng(0)
    for part, images in (("train", count), ("test", 20)):
        files = shards if part == "train" else 1
        for shard in range(files):
            blobs, labels = [], noise.integers(0, 10, images // files).tolist()
            for _ in labels:
                small = Image.fromarray(noise.integers(0, 256, (28, 28, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                blobs.append({"bytes": buffer.getvalue(), "path": None})
            table = pa.table({"image": blobs, "label": labels})
            pq.write_table(table, folder / f"{part}-{shard:05d}-of-{files:05d}.parquet", row_group_size=50)


def used(kind):
    return int(re.search(kind + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def opened(folder, buffer):
    return ParquetStream(path=folder, image_size=SIZE, shuffle_buffer=buffer, val_fraction=0.01)


def steps(folder, name, width, batch, rounds):
    train = opened(folder, 500).load(0).train
    whole = ImageSet(torch.cat(list(train.images.split(200))), train.labels)
    torch.manual_seed(0)
    model = MODELS.get(name)(width=width, stem="large").build(3, 10, [0.5] * 3, [0.25] * 3).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    times = {"stream": [], "memory": []}
    loaders = {"stream": Loader(train, batch), "memory": Loader(whole, batch)}
    for turn in range(rounds + 2):
        for kind, loader in loaders.items():
            begin = time.perf_counter()
            for index in range(4 * turn, 4 * turn + 4):
                found = loader.batch(0, index % loader.steps_per_epoch)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(found.images), found.labels).backward()
                optimizer.step()
            if turn >= 2:
                times[kind].append((time.perf_counter() - begin) / 4)
    seconds = {kind: statistics.median(found) for kind, found in times.items()}
    return {
        "model": f"{name}, width {width}",
        "batch": batch,
        "seconds_per_step": {kind: round(value, 4) for kind, value in seconds.items()},
        "stream_over_memory": round(statistics.median(map(lambda a, b: a / b, *times.values())), 3),
    }


def decoding(folder):
    images = opened(folder, 500).load(0).train.images
    begin = time.perf_counter()
    count = sum(len(part) for part in images.split(100))
    return round(count / (time.perf_counter() - begin))


def memory(folder, buffer):
    loader = Loader(opened(folder, buffer).load(0).train, 16)
    for index in range(10):
        loader.batch(0, index)
    before = used("VmRSS")
    for index in range(10, loader.steps_per_epoch):
        loader.batch(0, index)
    read = sum(file.stat().st_size for file in Path(folder).glob("train-*")) / 2**20
    room = 2 * (buffer + 50) / (16 * loader.steps_per_epoch) * read
    result = {
        "before_mib": round(before),
        "peak_mib": round(used("VmHWM")),
        "read_mib": round(read),
        "room_mib": round(room, 1),
    }
    print(json.dumps({**result, "read_over_room": round(read / room, 1)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        memory(Path(arguments.memory[0]), int(arguments.memory[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        for folder, count in ((small, 1200), (large, arguments.count)):
            folder.mkdir()
            write(folder, count, 4)
        result = {
            "command": "python benchmarks/streaming.py --out benchmarks/streaming.json",
            "machine": {"cores": os.cpu_count(), "system": platform.system()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "pyarrow": pa.__version__},
            "decoded_images_per_second": decoding(small),
            "steps": [steps(small, "resnet18", 16, 16, arguments.rounds), steps(small, "resnet50", 64, 16, 2)],
        }
        print(json.dumps(result, indent=1), flush=True)
        command = [sys.executable, __file__, "--memory", str(large), "100"]
        result["memory"] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(json.dumps(result["memory"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
