"""The C-LEAD training step (PGD-7, three views, batch 128) against the same step as the peers write it.

    pip install --no-deps torchattacks==3.5.1 && pip install requests
    python benchmarks/train_step.py --out benchmarks/train_step.json

The straightforward step is float32: torchattacks' PGD on the unfrozen model, then one forward per view, losses from
their formulas. Ours runs in float32 and in bfloat16, both channels_last, batch-norm folded in the inner loop. All are measured
interleaved in one process, medians quoted; peak memory in one process each. ``bound`` is what the arithmetic allows:
forward-equivalents × a measured training-mode forward in the same precision, so ``over_bound`` is 1 for a step that does nothing
but its forwards and backwards at a forward's speed.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.nn import functional as F

from clead.attacks.pgd import PGD
from clead.interfaces import Batch
from clead.methods.clead import CLead
from clead.models import MODELS
from clead.models.compute_cost import CostMeter
from clead.threats.linf import Linf

EPS, STEP, STEPS, TAU, WEIGHT = 8 / 255, 2 / 255, 7, 0.1, 0.1
MODES = {
    "peer float32": None,
    "clead float32 channels_last": (torch.float32, True),
    "clead bfloat16 channels_last": (torch.bfloat16, True),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS.get(name)().build(3, 10, [0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    model.add_projection(128)
    return model.train()


def batch_of(size):
    generator = torch.Generator().manual_seed(1)
    x, x_aug = (torch.rand(size, 3, 32, 32, generator=generator) for _ in range(2))
    return Batch(x, torch.randint(0, 10, (size,), generator=generator), x_aug)


def peer_step(model, optimizer, batch, random_start=True):
    """One step as it is usually written."""
    import torchattacks

    x, y, x_aug = batch[:3]
    attack = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=random_start)
    x_adv = attack(x, y)
    model.train()
    features, logits = model.features_and_logits(x)
    features_aug, _ = model.features_and_logits(x_aug)
    features_adv, logits_adv = model.features_and_logits(x_adv)
    z, z_aug, z_adv = (F.normalize(model.projection(f), dim=1) for f in (features, features_aug, features_adv))
    contrast = 0
    for other in (z_aug, z_adv):
        similarity = torch.cat([z @ other.T, z @ z.T - 1e9 * torch.eye(len(z))], dim=1) / TAU
        contrast = contrast + F.cross_entropy(similarity, torch.arange(len(z))) / 2
    kl = F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="batchmean")
    loss = F.cross_entropy(logits, y) + 6 * kl + WEIGHT * contrast
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def our_step(model, optimizer, batch, dtype, channels_last, random_start=True, separate=False):
    method = CLead(
        contrastive_loss="published",
        contrastive_weight=WEIGHT,
        temperature=TAU,
        inner="cross_entropy",
        separate_forwards=separate,
        fold_batch_norm=not separate,
    )
    attack = PGD(steps=STEPS, step_size="2/255", random_start=random_start)
    if channels_last:
        batch = Batch(*(p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in batch[:3]))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss, _ = method(
            model, batch, threat=Linf(eps="8/255"), attack=attack, generator=torch.Generator().manual_seed(0)
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def stepper(name, mode, size):
    """Return a function that makes one step of this mode on its own model."""
    model = build(name)
    settings = MODES[mode]
    if settings and settings[1]:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=settings is not None
    )
    batch = batch_of(size)
    if settings is None:
        return lambda **options: peer_step(model, optimizer, batch, **options)
    return lambda **options: our_step(model, optimizer, batch, *settings, **options)


def forward_seconds(name, mode, size, repeats):
    """Return the median time of one training-mode forward per image, in the mode's precision."""
    dtype, channels_last = MODES[mode] or (torch.float32, False)
    model, x = build(name), batch_of(size).images
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    times = []
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / size


def forward_equivalents(name, size=4):
    model = build(name)
    batch = Batch(*(part[:size] for part in batch_of(size)[:3]))
    method = CLead(contrastive_loss="published", inner="cross_entropy")
    with CostMeter(model) as meter:
        method(
            model, batch, threat=Linf(eps="8/255"), attack=PGD(steps=STEPS), generator=torch.Generator().manual_seed(0)
        ).loss.backward()
    return meter.forward_equivalents / size


def main():
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet18"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        stepper(*arguments.memory, arguments.batch)()
        # Not ru_maxrss: a child inherits its parent's peak through fork.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 1024)
        return
    result = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor(),
        "batch": arguments.batch,
    }
    result["command"] = "python benchmarks/train_step.py " + " ".join(sys.argv[1:])
    for name in arguments.models:
        losses = {mode: stepper(name, mode, arguments.batch)(random_start=False) for mode in MODES}
        losses["clead float32, separate forwards"] = stepper(name, "clead float32 channels_last", arguments.batch)(
            random_start=False, separate=True
        )
        steps = {mode: stepper(name, mode, arguments.batch) for mode in MODES}
        times = {mode: [] for mode in MODES}
        for round_ in range(arguments.rounds + 1):
            for mode, step in steps.items():
                start = time.perf_counter()
                step()
                if round_:  # the first round warms up
                    times[mode].append(time.perf_counter() - start)
        equivalents = forward_equivalents(name)
        rows = {}
        for mode, seconds in times.items():
            memory = subprocess.run(
                [sys.executable, __file__, "--batch", str(arguments.batch), "--memory", name, mode],
                capture_output=True,
                text=True,
                check=True,
            )
            per_image = statistics.median(seconds) / arguments.batch
            bound = equivalents * forward_seconds(name, mode, arguments.batch, arguments.rounds)
            rows[mode] = {
                "ms_per_image": 1000 * per_image,
                "images_per_second": 1 / per_image,
                "speedup_over_peer": statistics.median(times["peer float32"]) / statistics.median(seconds),
                "bound_ms_per_image": 1000 * bound,
                "over_bound": per_image / bound,
                "peak_memory_mib": float(memory.stdout),
                "first_loss_without_random_start": losses[mode],
            }
            print(name, mode, {key: round(value, 5) for key, value in rows[mode].items()}, flush=True)
        difference = abs(losses["clead float32, separate forwards"] - losses["peer float32"])
        print(f"{name}: same loss as the peer's with separate forwards up to {difference:.2g}")
        assert difference < 1e-3, losses
        result[name] = {"forward_equivalents": equivalents, "loss_difference_to_peer": difference, "modes": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
