"""On a GPU, in ten minutes or less: the training step, AutoAttack beside the reference, and a run like FastAT benchmark's.

    CLEAD_DATA=... python benchmarks/gpu.py --out benchmarks/gpu.json            (--device cpu --tiny tries the script without one)

Three parts, and the JSON file is written after each; what it has is not measured again.

``step``: ResNet-18, batch 128, N-FGSM and PGD-10 of PGD-AT; float32, bfloat16 channels_last, and that compiled. Median of steps,
interleaved by mode; peak memory of the device; how often the step makes the host wait, as PyTorch counts it
(``torch.cuda.set_sync_debug_mode``), logging left out: it should be 0.
``fast``: ResNet-18 on CIFAR-10 by N-FGSM for ``--minutes``, as the FastAT benchmark trains it (weight averaging 0.9995, label
smoothing 0.4, arXiv:2604.22853), then AutoAttack on the first images of the test set.
``autoattack``: the same weights and images under our ``standard`` and, if it is installed, under the reference (``autoattack``, of
github.com/fra31/auto-attack), which is not on PyPI: seconds of each, and the images on which their verdicts differ.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch

import clead
from clead.runs.loading import build
from clead.training.step import Step

MODES = {
    "float32": ("float32", False, False),
    "bfloat16 channels_last": ("bfloat16", True, False),
    "bfloat16 channels_last, compiled": ("bfloat16", True, True),
}
METHODS = {"n_fgsm": "--method.name n_fgsm", "pgd_at": "--attack.name pgd --attack.steps 10 --method.name pgd_at"}
FAST = "cifar10-small-fgsm-rs --method.name n_fgsm --method.fold_batch_norm true --method.label_smoothing 0.4 --train.ema 0.9995"


def recipe(arguments, *words):
    """Return the configuration of the FastAT-like run with the network and the device of this script."""
    name, *common = FAST.split()
    network = ["--model.name", "resnet8"] if arguments.tiny else ["--model.name", "resnet18", "--model.width", "64"]
    return clead.load_recipe(name, [*common, *network, "--train.device", arguments.device, *words])


def wait(device):
    """Let the device finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stepped:
    """One mode of one method: its own model, and a batch that stays the same."""

    def __init__(self, arguments, splits, method, mode):
        precision, channels_last, compiled = MODES[mode]
        words = METHODS[method].split()
        config = recipe(arguments, *words, "--train.precision", precision)
        self.device = torch.device(arguments.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = build(config, splits).to(device=self.device, memory_format=layout).train()
        if compiled:
            self.model.compile()
        lower = precision != "float32"
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower)
        self.step = Step(config, self.model, None, autocast, torch.amp.GradScaler(self.device.type, enabled=False))
        images = splits.train.images[: arguments.batch].float().div(255)
        self.batch = clead.interfaces.Batch(
            images.to(self.device).contiguous(memory_format=layout),
            splits.train.labels[: arguments.batch].to(self.device),
            index=torch.arange(arguments.batch, device=self.device),
        )
        self.generator = torch.Generator(self.device).manual_seed(0)

    def __call__(self):
        """Make a step without the optimiser; return its seconds."""
        start = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        self.step.forward_backward(self.batch, 0.0, self.generator)
        wait(self.device)
        return time.perf_counter() - start

    def host_waits(self):
        """Return how often the step makes the host wait for the device; None where that is not counted."""
        if self.device.type != "cuda":
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.model.zero_grad(set_to_none=True)
                self.step.forward_backward(self.batch, 0.0, self.generator)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def steps(arguments, splits):
    """Return for each method and mode what a step takes."""
    rows = {}
    for method in METHODS:
        stepped = {mode: Stepped(arguments, splits, method, mode) for mode in MODES}
        seconds, peaks = {mode: [] for mode in MODES}, {}
        for repeat in range(arguments.repeats + 2):
            for mode, step in stepped.items():
                if step.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(step.device)
                taken = step()
                if repeat > 1:  # the first two warm up, or compile
                    seconds[mode].append(taken)
                if step.device.type == "cuda":
                    peaks[mode] = torch.cuda.max_memory_allocated(step.device) / 2**20
        for mode, step in stepped.items():
            per_image = statistics.median(seconds[mode]) / arguments.batch
            rows[f"{method}, {mode}"] = {
                "ms_per_image": 1000 * per_image,
                "peak_memory_mib": peaks.get(mode),
                "host_waits": step.host_waits(),
            }
    return rows


def fast(arguments, run):
    """Train the run, or go on with it, and attack it; return what came out."""
    lasting = ["--train.minutes", str(arguments.minutes), "--train.precision", "bfloat16"]
    if not (run / "outcome.json").exists():
        clead.train(recipe(arguments, *lasting), out=run, resume=run.exists())
    outcome = json.loads((run / "outcome.json").read_text())
    return {key: outcome[key] for key in ("steps", "seconds", "forward_equivalents") if key in outcome}


def autoattack(arguments, splits, run):
    """Return seconds and verdicts of our ``standard`` and of the reference on the run's weights."""
    device = torch.device(arguments.device)
    model = clead.load(run).to(device).eval()
    images, labels = splits.test.images[: arguments.images], splits.test.labels[: arguments.images]
    start = time.perf_counter()
    nothing = {"curve_points": 0, "check_images": 0, "gallery": 0}
    record = clead.evaluate(model, images, labels, suite="standard", eps="8/255", **nothing)
    rows = {"clead": {"seconds": time.perf_counter() - start, "clean": record.clean_accuracy}}
    rows["clead"]["robust"] = record.robust_accuracy
    try:
        from autoattack import AutoAttack
    except ImportError:
        return {**rows, "reference": "not installed"}
    x, y = images.float().div(255).to(device), labels.to(device)
    start = time.perf_counter()
    reference = AutoAttack(model, norm="Linf", eps=8 / 255, version="standard", device=arguments.device, verbose=False)
    x_adv = reference.run_standard_evaluation(x, y, bs=500)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        held = model(x_adv).argmax(1) == y
    flags = torch.tensor([flag == "1" for flag in record.worst.flags])
    verdicts = {"robust": held.float().mean().item(), "images that differ": int((flags != held.cpu()).sum())}
    return {**rows, "reference": {"seconds": seconds, **verdicts}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "clead-gpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    splits = recipe(arguments).data.load(0)
    results = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    results["setting"] = {"torch": torch.__version__, "device": arguments.device, "batch": arguments.batch}
    if arguments.device != "cpu":
        results["setting"]["name"] = torch.cuda.get_device_name()
    run = arguments.work / "fast"
    parts = {
        "step": lambda: steps(arguments, splits),
        "fast": lambda: fast(arguments, run),
        "autoattack": lambda: autoattack(arguments, splits, run),
    }
    for name, part in parts.items():
        if name not in results:
            results[name] = part()
            print(name, json.dumps(results[name], indent=1), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
