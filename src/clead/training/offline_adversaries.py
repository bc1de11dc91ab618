"""Adversarial images that are made once, of the model that a training starts from, and kept in parts on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clead.attacks.capabilities import capabilities
from clead.attacks.runner import check_finite, finite_images, run_attack
from clead.config import RunConfig
from clead.data.base import shuffle_if_sorted
from clead.data.loaders import make_generator
from clead.errors import UserError
from clead.evaluation.correctness import correct_mask, exact_float32, to_float
from clead.evaluation.state import ResumableResults, differences, read_header
from clead.evaluation.transfer import PART, STORED_TEST
from clead.interfaces import Attack, ImageSet, Search, Splits, Threat
from clead.methods.clead_published import attack_of
from clead.models.compute_cost import CostMeter
from clead.models.modes import attack_mode
from clead.models.split import SplitModel, weights
from clead.progress import progress
from clead.results.target import digest
from clead.settings import Ratio
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import per_image
from clead.weights.files import fingerprint

_FORMAT = 1  # of what is stored; a change of the images or of their files makes it 2
_STREAM = 8  # random starts of stored images, apart from the streams of training


class Stored(NamedTuple):
    """One adversarial image per training image, (N, C, H, W) float16 on the CPU, and what they cost per training image."""

    images: Tensor
    forward_equivalents: float
    seconds: float


def store_images(
    config: RunConfig, splits: Splits, model: SplitModel, folder: Path, *, device: torch.device, show: bool = True
) -> Stored:
    """Attack ``model`` over all training images, and over the test images that ``config.eval`` counts, once.

    What ``folder`` holds already is not made again, so that a call that was killed goes on where it was. Half precision keeps more
    images adversarial than 8 bits: of 64 digits under C&W as published 75 % against 52 %, which lie that close to the boundary.

    Args:
        config: with a method that has ``stored_attack``.
        splits: the images.
        model: what is attacked, in eval mode; left bit-identical.
        folder: one safetensors file per part of 256 images, ``x_adv`` and ``wrong`` (which fool the model as they are stored).
        device: where to compute.
        show: show progress.

    Returns:
        The training images; the test images are left in ``folder`` and are no part of the cost. Raises UserError if ``folder``
        holds images of another model, attack or data.
    """
    method = config.method
    attack = attack_of(method.stored_attack)
    test = shuffle_if_sorted(splits.test)
    if config.eval.images is not None:
        test = test.subset(torch.arange(min(config.eval.images, len(test))))
    # Labels that training may not see are not seen here either: see ``_known``.
    train = ImageSet(splits.train.images, splits.train.visible_labels)
    header = {
        "attack": method.stored_attack,
        "clip": method.stored_clip,
        "threat": f"{config.threat.norm} {Ratio(config.threat.eps).text}",
        "model": fingerprint(weights(model)),
        "data": splits.fingerprint,
        "train_images": digest(train),
        STORED_TEST: len(test),
        "seed": config.train.seed,
    }
    earlier = read_header(folder)
    # Version 0.1 wrote its number instead of the format, which was the same.
    header |= {"clead": earlier["clead"]} if earlier is not None and "clead" in earlier else {"format": _FORMAT}
    if earlier is not None and (different := differences(earlier, {"version": earlier.get("version"), **header})):
        raise UserError(
            f"{folder} holds images stored by another training ({'; '.join(different)}); give another --out, or restore what it "
            "began with"
        )
    sets = {"train": train, "test": test}
    jobs = [(name, number) for name, images in sets.items() for number in range(-(-len(images) // PART))]
    store = ResumableResults(
        folder, header, trust=True
    )  # a training goes on where it was moved to; the log says whose it is
    with (
        store.opened(),
        exact_float32(),
        progress(f"attack {config.name}", len(splits.train) + len(test), show=show) as tick,
    ):
        for name, number in jobs:
            key, rows = f"{name}-{number:06d}", slice(number * PART, (number + 1) * PART)
            x, y = to_float(sets[name].images[rows].to(device)), sets[name].labels[rows].to(device)
            if key not in store.parts:
                start = time.monotonic()
                y = _known(model, x, y)
                generator = make_generator(device, config.train.seed, name == "test", number, _STREAM)
                with CostMeter(model) as meter:
                    x_adv = _attacked(attack, model, x, y, config.threat, clip=method.stored_clip, generator=generator)
                x_adv = x_adv.half()
                wrong = ~correct_mask(model, x_adv.float(), y)
                spent = {"forward_equivalents": meter.forward_equivalents, "seconds": time.monotonic() - start}
                store.save(key, {"x_adv": x_adv, "wrong": wrong}, spent)
            tick(len(y), wrong=float(store.parts[key][0]["wrong"].float().mean()))
        made = [store.parts[f"{name}-{number:06d}"] for name, number in jobs if name == "train"]
    return Stored(
        torch.cat([tensors["x_adv"] for tensors, _ in made]),
        sum(data["forward_equivalents"] for _, data in made) / len(splits.train),
        sum(data["seconds"] for _, data in made),
    )


def _known(model: SplitModel, x: Tensor, y: Tensor) -> Tensor:
    """Return the labels, and where there is none (−1) what the model takes the image for: the attack leads away from that."""
    if not (y < 0).any():
        return y
    with attack_mode(model), torch.no_grad():
        return torch.where(y < 0, CLASSIFICATION.predict(model(x)), y)


def _attacked(
    attack: Attack | Search,
    model: SplitModel,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    clip: bool,
    generator: torch.Generator,
) -> Tensor:
    x_adv = _made(attack, model, x, y, threat, clip=clip, generator=generator)
    check_finite(x_adv, type(attack).__name__)
    return torch.where(per_image(finite_images(x_adv), x), x_adv, x)  # nothing better is known than the image itself


def _made(
    attack: Attack | Search,
    model: SplitModel,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    clip: bool,
    generator: torch.Generator,
) -> Tensor:
    able = capabilities(attack)
    if not able.minimum_norm:
        return run_attack(attack, model, x, y, threat, generator=generator, checked=True)
    norm = threat.norm if able.norms is None or threat.norm in able.norms else able.norms[0]
    x_adv = run_attack(attack, model, x, y, norm, generator=generator, checked=True)
    return threat.project(x_adv, x) if clip else x_adv
