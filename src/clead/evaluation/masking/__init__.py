"""Signs of gradient masking: does a model look robust because the attacks on it fail?

The list is that of Athalye et al. 2018, arXiv:1802.00420, section 3.1, and Carlini et al. 2019, arXiv:1902.06705, sections 3 to 5,
with the mistakes of preparation that pass for robustness. A check compares counts of the same few images, so it allows ``few(n)``
of them: a healthy model passes on a hundred.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from clead.attacks.runner import check_inputs, logits_of
from clead.evaluation.masking import answers, attacks
from clead.evaluation.masking.attacks import BOX_STEPS, FEWER_BOX_STEPS, FEWER_QUERIES, QUERIES
from clead.evaluation.masking.probe import GivenMode, Probe, few
from clead.interfaces import Threat
from clead.models.external import ModelError
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.models.split import wrapped
from clead.progress import Tick
from clead.results.record import Check

__all__ = ["CHECKS", "Effort", "Selection", "efforts", "few", "run_checks"]
_PLAIN = ("mode", "deterministic", "batch", "logits", "normalisation", "smooth", "gradients")  # attack nothing
_PLAIN_PASSES = 32

_CHECKS: dict[str, Callable[[Probe], Check | None]] = {
    "mode": answers.mode,
    "deterministic": answers.deterministic,
    "batch": answers.batch,
    "logits": answers.logits,
    "normalisation": answers.normalisation,
    "smooth": answers.smooth,
    "noise": attacks.noise,
    "steps": attacks.steps,
    "agreement": attacks.agreement,
    "black box": attacks.black_box,
    "unbounded": attacks.unbounded,
    "monotone": attacks.monotone,
    "gradients": answers.gradients,  # last: it also counts what the attacks met
}
CHECKS = tuple(_CHECKS)
"""The names of the checks, in the order in which they are made."""


@dataclass(frozen=True)
class Selection:
    """Which checks to make.

    Attributes:
        names: of the checks.
        standing: (n,) bool, which images earlier attacks inside the threat left right. The checks noise and black box then take
            these for what gradients find, instead of attacking themselves, and black box and unbounded are shorter.
    """

    names: Collection[str]
    standing: Tensor | None = None


def run_checks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    seed: int = 0,
    source: nn.Module | None = None,
    tick: Tick | None = None,
    selection: Selection | None = None,
) -> list[Check]:
    """Look for signs that attacks on ``model`` fail for another reason than its robustness.

    Costs at most about 550 gradients and 550 answers per image that is classified right when clean (in passes, some
    14 runs of PGD-50), less the more images break.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); as the user hands it over, also in train mode. Its parameters,
            buffers, modes and gradients, and the global random states, are left bit-identical.
        x: (n, C, H, W) float in [0, 1], about a hundred images, also misclassified ones.
        y: (n,) int64 in [0, K).
        threat: norm and radius that robustness is claimed for.
        seed: of all the randomness.
        source: a second model of the same classes, whose adversarial images are tried on ``model``.
        tick: advanced by 1 after each check, as often as there are checks to make.
        selection: of the checks; None: all.

    Returns:
        The checks in the order of ``CHECKS``, without "black box" where there is neither a black-box attack for this norm nor a
        source. Raises UserError on wrong images, labels or logits.
    """
    check_inputs(x, y)
    selection = selection or Selection(CHECKS)
    model, source = wrapped(model), None if source is None else wrapped(source)
    checks: list[Check] = []
    models = [model] if source is None else [model, source]
    with torch.inference_mode(False), torch.no_grad(), _restored(models), fork_rng(seed):
        x, y = (tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in (x, y))
        logits_of(model, x[:1])  # raises the errors for users
        training = [type(module).__name__ for module in model.modules() if module.training]
        with _restored([model]), fork_rng(seed):  # batch-norm in train mode changes its statistics
            given = GivenMode(training, _in_given_mode(model, x) if training else None)
        with attack_mode(model), attack_mode(source) if source is not None else nullcontext():
            probe = Probe(model, x, y, threat, seed, source, given, selection.standing)
            for name, check in _CHECKS.items():
                if name not in selection.names:
                    continue
                if (result := check(probe)) is not None:
                    checks.append(result)
                if tick:
                    tick(1, check=name)
    return checks


@dataclass(frozen=True)
class Effort:
    """Which checks are made, and what they cost at most.

    ``calls`` of the model, forward and backward, however many images each has; passes per image, ``each``, and ``right`` more
    where it is right when clean. ``short``: with the images that stand after earlier attacks instead of attacks of its own.
    """

    names: tuple[str, ...]
    calls: int
    each: int
    right: int
    short: bool = True


def efforts(*, embedding: bool, source: bool) -> list[Effort]:
    """Return what can be made, from all checks to those that need no attack.

    Args:
        embedding: whether the model has an embedding that is attacked, too.
        source: whether a second model's images are tried.
    """
    more = [50] * (embedding + source)
    runs = [10, 50, 50, 200, BOX_STEPS, BOX_STEPS, 20, 20, 20, 20, *more]
    passes = sum(2 * steps + 3 for steps in runs) + 10 + QUERIES + 2
    whole = Effort(
        CHECKS, _PLAIN_PASSES + passes, _PLAIN_PASSES, passes, short=False
    )  # each of the passes may be a call
    attacking = {
        "noise": 10,
        "unbounded": 2 * (2 * FEWER_BOX_STEPS + 3),
        "black box": FEWER_QUERIES + 2 + 103 * source,
        "monotone": 4 * (2 * 20 + 3),
    }
    names = list(attacking)
    shorter = []
    for count in range(len(names), -1, -1):
        passes = sum(attacking[name] for name in names[:count])
        chosen = tuple(name for name in CHECKS if name in (*_PLAIN, *names[:count]))
        shorter.append(Effort(chosen, _PLAIN_PASSES + passes, _PLAIN_PASSES, passes))
    return [whole, *shorter]


def _in_given_mode(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits in the mode that the model came in, NaN if it fails in that."""
    try:
        return model(torch.cat([x, x]))[: len(x)]  # twice: batch-norm in train mode refuses a single image
    except ModelError:
        return x.new_full((len(x), logits_of(model, x[:1]).shape[1]), torch.nan)


@contextmanager
def _restored(models: list[nn.Module]) -> Generator[None, None, None]:
    """Give back every buffer, and the random states of Python and NumPy, as they were: a model may change them as it runs."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    saved = [
        (module, dict(module._buffers), {name: b.clone() for name, b in module._buffers.items() if b is not None})
        for module in modules
    ]
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, buffers, values in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, value in values.items():
                buffer = cast(Tensor, buffers[name])
                if not torch.equal(buffer, value):  # only then: a buffer may be expanded, and refuse to be written
                    buffer.copy_(value)
