"""How seconds and memory grow with image size, classes, batch and images, for a training step and for AutoAttack ``standard``.

    python benchmarks/cost.py --out benchmarks/cost.json --plot docs/cost.png            (one core: about 15 minutes)
    python benchmarks/cost.py --out benchmarks/cost.json --only "train,size"             (some of the points)

ResNet-10 of width 16 with random weights and the stem for small images, float32, one thread. **train**: the C-LEAD step of
``clead`` with PGD-3. **standard**: every attack with a twentieth of its steps or queries, times 20; eps is tiny and the labels are
the model's own answers, so that every image stands and pays for all attacks. Batches have 32 and 8 images, 16 and 4 where the size
grows. **images**: what it takes to open N images of 32
pixels and to draw batches of 128 from them, in memory (uint8) and streamed from Parquet. Every point is a process of its own:
CPU seconds (median of the repetitions), and the largest memory of the process above that of its imports. ``slope`` is that of a
straight line through the logarithms of the last two points: 1 where twice as much costs twice as much.
What ``--out`` holds is not measured again.
"""

import argparse
import io
import json
import math
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

AXES = {
    "size": ([32, 64, 128, 224], "side of the image, pixels"),
    "classes": ([10, 100, 1000], "classes"),
    "batch": ([16, 32, 64, 128], "images per batch"),
}
IMAGES = [1_000, 10_000, 100_000, 1_000_000]
LARGEST_IN_MEMORY = 100_000
USUAL = {"size": 32, "classes": 10, "batch": 32}


def memory(kind):
    """Return MiB of this process: VmRSS now, VmHWM the largest so far."""
    return int(re.search(kind + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measured(work, repeats):
    """Return median CPU seconds of ``work()`` after one for warming up, and the largest MiB above what there was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far begins anew
    before, seconds = memory("VmRSS"), []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return {"seconds": statistics.median(seconds[1:]), "mib": round(memory("VmHWM") - before)}


def network(classes):
    from clead.models import MODELS

    torch.manual_seed(0)
    model = MODELS.get("resnet10")(width=16).build(3, classes, [0.5] * 3, [0.25] * 3)
    model.add_projection(128)
    return model


def train(size, classes, batch):
    """One step: views, attack, loss, backward, optimiser; seconds per image."""
    from clead.attacks.pgd import PGD
    from clead.devices import keep_freed_memory
    from clead.interfaces import Batch
    from clead.methods.clead import CLead
    from clead.threats.linf import Linf

    model, generator = network(classes).train(), torch.Generator().manual_seed(1)
    x, x_aug = (torch.rand(batch, 3, size, size, generator=generator) for _ in range(2))
    images = Batch(x, torch.randint(0, classes, (batch,), generator=generator), x_aug)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    method, attack = CLead(fold_batch_norm=True), PGD(steps=3, step_size="2/255")

    def step():
        loss = method(model, images, threat=Linf(eps="8/255"), attack=attack, generator=generator).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        keep_freed_memory(torch.device("cpu"))  # as the trainer does

    result = measured(step, 3)
    return {**result, "seconds": result["seconds"] / batch}


def standard(size, classes, batch):
    """AutoAttack with a twentieth of its steps; seconds per image of the whole."""
    import clead

    model = network(classes).eval()
    x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    options = {"eps": 1e-7, "suite": "standard", "steps": 5, "batch_size": batch, "curve_points": 0, "check_images": 0}

    def attack():
        record = clead.evaluate(model, x, y, show=False, gallery=0, **options)
        if record.worst.accuracy < 1:
            raise RuntimeError("an image fell, and did not pay for all attacks")

    result = measured(attack, 1)
    return {**result, "seconds": 20 * result["seconds"] / batch}


def images(count, streamed):
    """Open ``count`` images and draw batches of 128; ``seconds`` are per image, ``opening`` those until the first batch."""
    from clead.data.datasets.parquet_stream import ParquetStream
    from clead.data.loaders import Loader
    from clead.interfaces import ImageSet

    with tempfile.TemporaryDirectory() as folder:
        if streamed:
            writer = multiprocessing.get_context("spawn").Process(target=write, args=(Path(folder), count))
            writer.start()  # a process of its own, whose memory is none of this one's
            writer.join()
        Path("/proc/self/clear_refs").write_text("5")
        before, start = memory("VmRSS"), time.process_time()
        if streamed:
            train_set = ParquetStream(path=folder, image_size=32, shuffle_buffer=2000, val_fraction=0.01).load(0).train
        else:
            train_set = ImageSet(
                torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.zeros(count).long()
            )
        loader = Loader(train_set, 128)
        loader.batch(0, 0)
        opening, begin = time.process_time() - start, time.process_time()
        steps = min(loader.steps_per_epoch - 1, 200)
        for index in range(1, 1 + steps):
            loader.batch(0, index)
        seconds = (time.process_time() - begin) / steps / 128
        return {"seconds": seconds, "opening": opening, "mib": round(memory("VmHWM") - before)}


def write(folder, count):
    """Write Parquet shards of PNG images, the same 500 again and again."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    noise, blobs = np.random.default_rng(0), []
    for _ in range(500):
        buffer = io.BytesIO()
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
        blobs.append({"bytes": buffer.getvalue(), "path": None})
    for part, total in (("train", count), ("test", 500)):
        files = max(1, total // 50_000)
        for shard in range(files):
            rows = total // files
            table = pa.table({"image": (blobs * (rows // 500 + 1))[:rows], "label": [n % 10 for n in range(rows)]})
            pq.write_table(table, folder / f"{part}-{shard:05d}-of-{files:05d}.parquet", row_group_size=500)


def points():
    """Return every point: its name, and what is called with which arguments."""
    work = {}
    for kind in ("train", "standard"):
        for axis, (values, _) in AXES.items():
            for value in values:
                work[f"{kind},{axis},{value}"] = (kind, {**usual(kind, axis), axis: value})
    for streamed in (False, True):
        for count in IMAGES:
            if streamed or count <= LARGEST_IN_MEMORY:
                name = "streamed" if streamed else "in memory"
                work[f"images,{name},{count}"] = ("images", {"count": count, "streamed": streamed})
    return work


def usual(kind, axis):
    """Return the usual settings, with fewer images per batch where one of them is expensive."""
    batch = (32 if kind == "train" else 8) if axis != "size" else (16 if kind == "train" else 4)
    return {**USUAL, "batch": batch}


def slope(rows):
    """Return d log(seconds) / d log(value) between the last two points."""
    (a, first), (b, last) = rows[-2:]
    return round(math.log(last["seconds"] / first["seconds"]) / math.log(b / a), 2)


def lines(measurements):
    """Return every line of the plot: its kind and axis -> [(value, point)]."""
    result = {}
    for name, point in measurements.items():
        kind, axis, value = name.split(",")
        result.setdefault((kind, axis), []).append((int(value), point))
    return {key: sorted(rows, key=lambda row: row[0]) for key, rows in result.items()}


def plot(measurements, file):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = lines(measurements)
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
    titles = {axis: label for axis, (_, label) in AXES.items()} | {"images": "images in all"}
    for column, axis in enumerate(titles):
        groups = {k: v for k, v in drawn.items() if (k[1] == axis if axis != "images" else k[0] == "images")}
        for (kind, which), rows in groups.items():
            label = f"{which if axis == 'images' else kind}, slope {slope(rows)}" if len(rows) > 1 else kind
            for row, key in enumerate(("seconds", "mib")):
                axes[row, column].plot(
                    [value for value, _ in rows], [max(point[key], 1e-6) for _, point in rows], "o-", label=label
                )
        for row, text in enumerate(("CPU seconds per image", "memory, MiB")):
            axes[row, column].set(xscale="log", yscale="log", ylabel=text if not column else "", xlabel=titles[axis])
            ticks = sorted({value for rows in groups.values() for value, _ in rows})
            axes[row, column].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes[row, column].minorticks_off()
            low, high = axes[row, column].get_ylim()
            axes[row, column].set_ylim(low / 3, high * 3)  # what hardly changes looks flat
        axes[0, column].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", default="", help="measure the points whose name begins like this")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = points()
    if arguments.point:
        torch.set_num_threads(1)
        kind, settings = work[arguments.point]
        print(json.dumps({"train": train, "standard": standard, "images": images}[kind](**settings)))
        return
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"points": {}}
    kept["what"] = {"torch": torch.__version__, "processor": platform.machine(), "network": "resnet10, width 16"}
    for name in work:
        if name not in kept["points"] and name.startswith(arguments.only):
            command = [sys.executable, __file__, "--out", str(arguments.out), "--point", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            kept["points"][name] = json.loads(done.stdout.splitlines()[-1])
            kept["slope"] = {
                ", ".join(key): slope(rows) for key, rows in lines(kept["points"]).items() if len(rows) > 1
            }
            arguments.out.write_text(json.dumps(kept, indent=1))
            print(name, kept["points"][name], flush=True)
    if arguments.plot:
        plot(kept["points"], arguments.plot)


if __name__ == "__main__":
    main()
