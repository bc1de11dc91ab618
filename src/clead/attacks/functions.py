"""The attacks as Python functions, ``clead.attacks.pgd(model, x, y, eps="8/255")``, derived from their settings classes.

``docs/generate.py`` writes their signatures and docstrings into ``functions.pyi``, which editors read.
"""

from __future__ import annotations

import inspect
import logging
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clead.attacks import ATTACKS, UNRESTRICTED
from clead.attacks.capabilities import capabilities
from clead.attacks.runner import check_inputs, logits_of, run_attack
from clead.errors import UserError, did_you_mean
from clead.models.seeding import fork_rng
from clead.models.split import wrapped
from clead.settings import Ratio, validated
from clead.tasks.classification import CLASSIFICATION, TOWARDS_CLASS
from clead.threats import THREATS

_log = logging.getLogger("clead")

PYTHON_DEFAULTS: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 50, "keep": "best"},
    "eot_pgd": {"steps": 50, "keep": "best"},
    "fgsm": {"step_size": None},
    "deepfool": {"norm": "l2"},
    "fab": {"eps": ...},
}
"""Defaults of a function that are not those of the settings, which serve inside training too; ``...`` is required."""

_DOCS = {
    "model": "takes pixels in [0, 1], returns logits (B, K); left bit-identical.",
    "x": "(B, C, H, W) float in [0, 1].",
    "y": "(B,) int64 in [0, K).",
    "eps": 'radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.',
    "norm": "{norms}.",
    "objective": "what is maximised: a name of ``clead.attacks.OBJECTIVES``, such as cross_entropy, margin or dlr.",
    "target": "class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts it. Images "
    "whose ``y`` is the target come back as they are, with a warning.",
    "seed": "of all randomness, a model's own draws included; the global generators are restored.",
}
_NEAREST = (
    "None: return the nearest found, however far; else only what lies within this radius, in pixel units of [0, 1]."
)
_FGSM_STEP = "multiples of eps; None: 1, or 1.25 with a random start (Wong et al. 2020, arXiv:2001.03994)."
_REQUIRED = inspect.Parameter.empty


def attack_function(name: str, kind: Any) -> Callable[..., Tensor]:
    """Return the function of an attack: ``(model, x, y, *, …) -> x_adv``, with its signature and docstring.

    Args:
        name: the registered name.
        kind: the settings class.
    """
    able, defaults = capabilities(kind), PYTHON_DEFAULTS.get(name, {})
    fields = {key: field.default for key, field in kind.__pydantic_fields__.items()}
    hints = {key: _hint(value) for key, value in typing.get_type_hints(kind, include_extras=True).items()}
    options: dict[str, tuple[Any, Any]] = {}
    if not able.unrestricted:
        options["eps"] = (float | str | None, None) if able.minimum_norm else (float | str, _REQUIRED)
        options["norm"] = (str, (able.norms or ("linf",))[0])
    options |= {key: (hints[key], _plain(default)) for key, default in fields.items()}
    if not able.searches and not able.unrestricted:
        options["objective"] = (str, "cross_entropy")
    if able.targeted:
        options["target"] = (int | Tensor | None, None)
    if not able.deterministic:
        options["seed"] = (int, 0)
    for key, default in defaults.items():
        hint = options[key][0] if default is not None else options[key][0] | None
        options[key] = (float | str, _REQUIRED) if default is ... else (hint, default)

    def attack(model: nn.Module, x: Tensor, y: Tensor, **given: Any) -> Tensor:
        for key in given.keys() - options.keys():
            raise TypeError(f"{name}() has no argument {key!r}; {did_you_mean(key, options)}")
        missing = [key for key, (_, default) in options.items() if default is _REQUIRED and key not in given]
        if missing:
            raise TypeError(f"{name}() needs a value for {', '.join(missing)}, such as {missing[0]}='8/255'")
        values = {key: default for key, (_, default) in options.items()} | given
        settings = {key: values[key] for key in fields}
        if name == "fgsm" and settings["step_size"] is None:
            settings["step_size"] = 1.25 if settings["random_start"] else 1.0
        threat: Any = None
        if not able.unrestricted:
            norm, eps = values["norm"], values["eps"]
            threat = norm if eps is None else validated(THREATS.get(norm), {"eps": eps})
        how = {key: values[key] for key in ("objective", "seed", "target") if key in values}
        return _run(validated(kind, settings), model, x, y, threat, **how)

    empty = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(key, empty, annotation=Tensor) for key in ("x", "y")]
    parameters.insert(0, inspect.Parameter("model", empty, annotation=nn.Module))
    for key, (hint, default) in options.items():
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default))
    function: Any = attack
    function.__name__ = function.__qualname__ = name
    function.__module__ = "clead.attacks"
    function.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)
    function.__doc__ = _docstring(name, kind, options)
    return function


def functions() -> dict[str, Callable[..., Tensor]]:
    """Return name -> function of every registered attack."""
    return {name: attack_function(name, kind) for name, kind in sorted([*ATTACKS.items(), *UNRESTRICTED.items()])}


def _run(
    attack: Any,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Any,
    *,
    objective: str = "cross_entropy",
    seed: int = 0,
    target: int | Tensor | None = None,
) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed) if isinstance(x, Tensor) else None
    if target is None:
        return run_attack(attack, model, x, y, threat, objective=objective, generator=generator)
    check_inputs(x, y)
    target = torch.full_like(y, target) if isinstance(target, int) else target
    model = wrapped(model)
    with fork_rng(seed):  # a randomised model would draw from the caller's stream
        classes = logits_of(model, x[:1]).shape[1]
    CLASSIFICATION.check_target(y, len(x), classes)
    _check_target(target, len(x), classes)
    target = target.to(y.device)
    aimed = target != y
    if not aimed.any():
        raise UserError("target is the label of every image, so there is nothing to aim at; give another class")
    if not aimed.all():
        _log.warning(
            "%d of %d images are of the target class: they are left out, and come back as they are",
            *(int((~aimed).sum()), len(x)),
        )
    x_adv = x.detach().clone()
    x_adv[aimed] = run_attack(
        *(attack, model, x[aimed], target[aimed], threat), objective=objective, task=TOWARDS_CLASS, generator=generator
    )
    return x_adv


def _check_target(target: Any, images: int, classes: int) -> None:
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (images,):
        what = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else repr(target)
        raise UserError(
            f"target must be a class number or int64 of shape ({images},), got {what}; "
            "give such as target=3, or torch.tensor([...]) with one class per image"
        )
    wrong = target[(target < 0) | (target >= classes)]
    if len(wrong):
        raise UserError(f"target must be in [0, {classes}), got {int(wrong[0])}; give a class from 0 to {classes - 1}")


def _hint(annotation: Any) -> Any:
    """Return what a caller may give for a setting: a ``Ratio`` is a number or text."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        result = None
        for each in typing.get_args(annotation):
            result = _hint(each) if result is None else result | _hint(each)
        return result
    if typing.get_origin(annotation) is typing.Annotated:
        return _hint(typing.get_args(annotation)[0])
    return float | str if annotation is Ratio else annotation


def _plain(default: Any) -> Any:
    """Return a default as a caller would write it."""
    if not isinstance(default, Ratio):
        return default
    return default.text if "/" in default.text else float(default)


def _docstring(name: str, kind: Any, options: dict[str, tuple[Any, Any]]) -> str:
    able = capabilities(kind)
    docs = dict(_DOCS)
    norms = able.norms or tuple(THREATS.names())
    docs["norm"] = f"{', '.join(norms[:-1])} or {norms[-1]}." if len(norms) > 1 else f"{norms[0]}, the only one."
    if options.get("eps", (None, _REQUIRED))[1] is None:
        docs["eps"] = _NEAREST
    for key, field in kind.__pydantic_fields__.items():
        unit = (field.json_schema_extra or {}).get("unit", "")
        docs[key] = f"{field.description}{f' ({unit})' if unit else ''}."
    if name == "fgsm":
        docs["step_size"] = _FGSM_STEP
    lines = [_wrapped(f"{key}: {docs[key]}", 4) for key in ("model", "x", "y", *options)]
    keeps = able.returns_clean or able.minimum_norm
    returned = "x itself where nothing was found" if keeps else "misclassified where the attack succeeded"
    result = (
        f"x_adv, (B, C, H, W) in [0, 1]; {returned}. Raises UserError on pixels outside [0, 1], NaN, wrong labels, or settings "
        "out of their range."
    )
    about = inspect.cleandoc(kind.__doc__ or f"Attack ``model`` by {name}.")
    return "\n".join([about, "", "Args:", *lines, "", "Returns:", textwrap.indent(_wrapped(result, 0), "    ")])


def _wrapped(text: str, indent: int) -> str:
    """Return ``text`` in lines of 120 characters at most inside a docstring, the later ones indented further."""
    lead = " " * indent
    return "\n".join(textwrap.wrap(text, 112, initial_indent=lead, subsequent_indent=2 * lead, break_long_words=False))


_FUNCTIONS = functions()  # imports every file of attacks
globals().update(_FUNCTIONS)
__all__ = ["PYTHON_DEFAULTS", "attack_function", "functions"]
__all__ += list(_FUNCTIONS)
