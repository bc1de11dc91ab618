"""Attacks of other libraries, torchattacks and foolbox, inside this package's verification: for a second opinion.

``external("torchattacks:PGD", steps=20)`` is a search like the package's own: the library sees the images that are still right,
and what it returns counts only where it lies in the threat set.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import math
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks.capabilities import check_norm
from clead.errors import UserError, did_you_mean, out_of_memory
from clead.interfaces import Model, Threat
from clead.models.seeding import fork_rng
from clead.tasks.classification import CLASSIFICATION
from clead.threats.geometry import contains, per_image

_INSTALL = {"torchattacks": "pip install --no-deps torchattacks", "foolbox": "pip install foolbox"}
"""torchattacks pins an old version of requests, which it does not need."""

_TORCHATTACKS_NORMS = {
    "l2": {"CW", "PGDL2", "PGDRSL2", "DeepFool"},
    "l1": {"EADL1"},
    "l0": {"SparseFool", "OnePixel", "Pixle", "JSMA"},
}
"""As that library's own list of attacks says. EADEN (L1 and L2 weighed) and GN (noise) are of no one norm; an attack with a
setting ``norm`` is made for several; the rest are made for linf."""

_NO_SEARCH = {
    "torchattacks": {
        "VANILA": "it changes nothing",
        "MultiAttack": "it only joins attacks; evaluate them one by one",
        "LGV": "it trains a model of its own",
    },
    "foolbox": {
        "SpatialAttack": "its images are in no norm ball; use clead.attacks.spatial",
        "DatasetAttack": "it must be fed other images first",
        "BinarizationRefinementAttack": "it refines images of another attack",
        "GenAttack": "it needs a target class per image",
    },
}

_EXAMPLE = {"torchattacks": "torchattacks:PGD", "foolbox": "foolbox:LinfDeepFoolAttack"}

_OURS = {
    "torchattacks": {"model", "eps", "max_epsilon", "norm", "seed", "n_classes"},
    "foolbox": {"distance", "constraint", "tensorboard"},
}
"""Settings that follow from the threat, the images and the seed; a user cannot give them."""


@dataclass(frozen=True)
class External:
    """An attack of foolbox (Rauber et al. 2020, doi:10.21105/joss.02607) or torchattacks (Kim 2020, arXiv:2010.01950).

    Made by ``external``. What differs from calling the library: only images that are classified right are handed over; it
    computes in float32; the global generators of Python, NumPy and torch are seeded from ``generator`` and restored; what it
    prints or warns of is silenced. An attack for a radius gets the threat's eps; one that looks for the smallest perturbation
    gets no limit, and its image counts where that perturbation is inside.

    Args:
        name: ``"torchattacks:NAME"`` or ``"foolbox:NAME"``, with the library's name of the class.
        options: keyword settings of that class.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UserError for an unknown library, attack or setting, and if the library is not installed."""
        library, cls = _find(self.name)
        parameters = _parameters(cls)
        for key in self.options:
            if key in _OURS[library]:
                raise UserError(f"{self.name}: {key} follows from the threat, the images and the seed; leave it out")
            if key not in parameters:
                known = parameters.keys() - _OURS[library]
                raise UserError(f"{self.name}: unknown setting {key!r}; {did_you_mean(key, known)}")
        absent = [key for key, p in parameters.items() if p.default is p.empty and key not in self.options]
        if absent:
            raise UserError(
                f"{self.name} needs a value for {', '.join(absent)}; "
                f"give external({self.name!r}, {', '.join(f'{key}=…' for key in absent)})"
            )

    @property
    def norms(self) -> tuple[str, ...] | None:
        """The norms that the attack is made for; None where any will do."""
        library, cls = _find(self.name)
        parameters = _parameters(cls)
        if library == "torchattacks":
            if "norm" in parameters:
                return ("linf", "l2")  # FAB's L1 is announced there but fails
            for norm, names in _TORCHATTACKS_NORMS.items():
                if cls.__name__ in names:
                    return (norm,)
            return None if cls.__name__ in ("EADEN", "GN") else ("linf",)
        if "constraint" in parameters:
            return ("linf", "l2")
        if "distance" in parameters:
            return None
        try:
            p = _made(self, cls).distance.p
        except AttributeError:  # foolbox knows of no distance for this attack
            return None
        return ("linf",) if p == float("inf") else (f"l{p}",)

    @property
    def description(self) -> dict[str, Any]:
        """Every setting that the attack runs with, its library's own defaults among them, as plain data."""
        library, cls = _find(self.name)
        used = {key: p.default for key, p in _parameters(cls).items() if key not in _OURS[library]} | self.options
        plain = {
            key: value if isinstance(value, str | int | float | None) else repr(value) for key, value in used.items()
        }
        return {"name": self.name, **plain}

    def weakness_warning(self, threat: Threat) -> str | None:
        """Return why the attack is weak against ``threat`` by its settings alone, if it is: its steps end before the edge.

        In torchattacks the step is ``alpha``; in foolbox ``abs_stepsize``, or else ``rel_stepsize`` of the radius.
        """
        used, eps = self.description, float(threat.eps)
        steps = used.get("steps")
        size = used.get("alpha") if self.name.startswith("torchattacks:") else used.get("abs_stepsize")
        if size is None and isinstance(relative := used.get("rel_stepsize"), float):
            size = relative * eps
        if not isinstance(steps, int) or not isinstance(size, float) or steps * size >= eps:
            return None
        return (
            f"{self.name} takes {steps} steps of {size:.4g}, which cannot cross eps {eps:.4g}: a weak attack; "
            f"give more or longer ones, such as --attack.steps {math.ceil(2.5 * eps / size)}"
        )

    def perturb(
        self, model: Model, x: Tensor, y: Tensor, threat: Threat, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return what the library returned where it is in the threat set around ``x``, and ``x`` elsewhere.

        Raises UserError if the attack is made for another norm, or fails.
        """
        check_norm(self, threat.norm)
        x_adv = x.clone()
        logits = model(x)
        attacked = CLASSIFICATION.correct(logits, y).nonzero()[:, 0]
        if not len(attacked) or not threat.eps:  # synchronises the device
            return x_adv
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        run = _torchattacks if self.name.startswith("torchattacks:") else _foolbox
        with _quiet(seed):
            try:
                candidate = run(
                    self, _Answer(model, x), x[attacked].float(), y[attacked], threat, seed, logits.shape[1]
                )
            except UserError:
                raise
            except Exception as error:
                if out_of_memory(error):
                    raise
                reason = (str(error).splitlines() or [""])[0]
                if "does not require grad" in reason:
                    reason = "the model gives no gradient; take one that needs none, such as foolbox:HopSkipJumpAttack"
                raise UserError(
                    f"{self.name} fails: {type(error).__name__}: {reason}; change its settings, or choose another attack"
                ) from error
        candidate = candidate.detach().to(x)
        # Rounding may carry a pixel a hair out of the box; anything farther is not ours to mend.
        inside = ((candidate >= -1e-6) & (candidate <= 1 + 1e-6)).flatten(1).all(1)
        candidate = candidate.clamp(0, 1)
        inside &= contains(threat, candidate, x[attacked])
        x_adv[attacked] = torch.where(per_image(inside, candidate), candidate, x[attacked])
        return x_adv


def external(name: str, **options: Any) -> External:
    """Return an attack of another library as a search, to be given to ``run_attack`` or an evaluation.

    Args:
        name: ``"torchattacks:PGD"``, ``"foolbox:L2DeepFoolAttack"`` …: the library and its name of the class.
        **options: keyword settings of that class (``steps=20``); eps, norm and seed follow from the threat and the generator.

    Raises UserError for an unknown library, attack or setting, and if the library is not installed.
    """
    return External(name, options)


class _Answer(nn.Module):
    """The model as a module in evaluation mode; the libraries cannot reach the model itself, and neither move nor switch it."""

    def __init__(self, model: Model, x: Tensor) -> None:
        super().__init__()
        # Both libraries ask a parameter for the device.
        self.whereabouts = nn.Parameter(torch.empty(0, device=x.device), requires_grad=False)
        self._hidden = (model,)
        self._dtype = x.dtype
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        given = x.to(self._dtype).clone()
        if given.requires_grad:  # the model may lay images out channels_last, and some attacks view the gradient
            given.register_hook(torch.Tensor.contiguous)
        return self._hidden[0](given).float()


def _find(name: str) -> tuple[str, Any]:
    """Return the library's name and the class of the attack called ``name``."""
    library, colon, attack = str(name).partition(":")
    if not colon or library not in _INSTALL:
        raise UserError(
            f"an external attack is named torchattacks:NAME or foolbox:NAME, got {name!r}; "
            "give such as torchattacks:PGD or foolbox:LinfDeepFoolAttack"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package: Any = importlib.import_module("torchattacks" if library == "torchattacks" else "foolbox.attacks")
            base = (
                importlib.import_module("torchattacks.attack").Attack if library == "torchattacks" else package.Attack
            )
    except ImportError as error:
        raise UserError(f"{name} needs {library}, which is not installed; run: {_INSTALL[library]}") from error
    if attack in _NO_SEARCH[library]:
        raise UserError(
            f"{name} cannot be run here: {_NO_SEARCH[library][attack]}; choose another attack, such as {_EXAMPLE[library]}"
        )
    known = {
        key: cls
        for key, cls in vars(package).items()
        if inspect.isclass(cls) and issubclass(cls, base) and not inspect.isabstract(cls) and key != "Attack"
    }
    known = {key: cls for key, cls in known.items() if key not in _NO_SEARCH[library]}
    if attack not in known:
        raise UserError(f"unknown attack of {library} {attack!r}; {did_you_mean(attack, known)}")
    return library, known[attack]


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """Return the keyword settings of a library's class; ``model`` is none."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p for p in parameters if p.kind in named and p.name != "model"}


def _made(attack: External, cls: Any, *arguments: Any, **ours: Any) -> Any:
    """Construct a library's attack; raises UserError if it refuses its settings."""
    taken = {key: value for key, value in ours.items() if key in _parameters(cls)}
    try:
        return cls(*arguments, **attack.options, **taken)
    except ImportError as error:
        raise UserError(
            f"{attack.name} needs {error.name}, which is not installed; run: pip install {error.name}"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{attack.name} refuses its settings {attack.options} ({error}); change or leave out that setting"
        ) from error


def _torchattacks(
    attack: External, answer: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, classes: int
) -> Tensor:
    eps = float(threat.eps)
    norm = threat.norm.capitalize()  # Linf, L2, L1
    cls = _find(attack.name)[1]
    made = _made(attack, cls, answer, eps=eps, max_epsilon=eps, norm=norm, seed=seed, n_classes=classes)
    return made(x, y)


def _foolbox(
    attack: External, answer: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, classes: int
) -> Tensor:
    import foolbox

    p = float("inf") if threat.norm == "linf" else int(threat.norm[1:])
    cls = _find(attack.name)[1]
    made = _made(attack, cls, distance=foolbox.distances.LpDistance(p), constraint=threat.norm)
    smallest = isinstance(made, foolbox.attacks.base.MinimizationAttack)
    model = foolbox.PyTorchModel(answer, bounds=(0, 1), device=x.device)
    epsilon = None if smallest else float(threat.eps)

    def attacked(x: Tensor, y: Tensor) -> Tensor:
        try:
            return made(model, x, y, epsilons=epsilon)[1]
        except ValueError as error:
            # One image without a starting point fails the whole batch: halve it until that image is alone, and holds.
            if "init_attack failed" not in str(error):
                raise
            if len(x) == 1:
                return x
            half = len(x) // 2
            return torch.cat([attacked(x[:half], y[:half]), attacked(x[half:], y[half:])])

    return attacked(x, y)


@contextlib.contextmanager
def _quiet(seed: int) -> Generator[None, None, None]:
    """Let a library draw, print, warn and differentiate inside the block, and leave no trace of it."""
    with fork_rng(seed), torch.enable_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
