"""Match weights with a model by name, and say all that was changed, left out or filled in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clead.errors import UserError, first_of
from clead.models.partial_weights import load_matching
from clead.weights.files import type_notes
from clead.weights.reading import Weights

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DataParallel, torch.compile, FSDP and activation checkpointing put into names, wherever they wrap."""
_COUNTED = ("total_ops", "total_params")  # what thop leaves in a model that it has counted
_CONSTANT = ("num_batches_tracked", "position_ids", "relative_position_index", "relative_coords_table", "attn_mask")
"""Buffers that a model makes itself, and that other versions of a library save or leave out."""
_MEAN, _STD = (
    ("mean", "pixel_mean", "_mean", "image_mean", "norm_mean"),
    ("std", "pixel_std", "_std", "image_std", "norm_std"),
)


def load_into(
    module: nn.Module, weights: Weights, *, normalized: bool = False, num_classes: int | None = None
) -> list[str]:
    """Load ``weights`` into ``module``, and return what must be said of it.

    Prefixes that wrappers put before names are taken off, or put before them where the model has a wrapper that the file has
    not. Batch-norm's counters and other constants may be missing, and a projection head or thop's counts too many.

    Args:
        module: of the architecture that was trained; changed in place.
        weights: of ``read_weights``.
        normalized: whether pixels are normalised before ``module``: mean and std among the weights are then not needed.
        num_classes: K of the data, where weights that fit in part are loaded in part (see ``load_matching``); None: all must fit.

    Raises UserError if anything else is missing or too many, or of another shape.
    """
    source = weights.source
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    given, names, notes = _renamed(weights.tensors, expected, source)
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    filled = [name for name in missing if _last(name) in (*_CONSTANT, *_MEAN, *_STD) and _is_buffer(module, name)]
    dropped = [name for name in extra if _last(name) in (*_COUNTED, *_CONSTANT) or name.startswith("projection.")]
    if layers := _normalisation(given, extra):
        if not normalized:
            raise UserError(_normalisation_error(source, module, given, layers))
        dropped += layers
        notes.append(f"{source}: its own normalisation ({first_of(layers)}) is left out, --model.input has one")
    missing = [name for name in missing if name not in filled]
    extra = [name for name in extra if name not in dropped]
    if num_classes is not None and (missing or extra or _of_other_shape(expected, given)):
        fitting = {name: tensor.detach() for name, tensor in given.items() if name not in dropped}
        notes += type_notes(source, expected, {name: each for name, each in fitting.items() if name in expected})
        return [*weights.notes, *notes, *load_matching(module, fitting, source, num_classes)]
    if missing or extra:
        raise UserError(_mismatch(source, module, [names.get(name, name) for name in extra], missing, expected, given))
    content = {name: tensor.detach() for name, tensor in given.items() if name in expected}
    _check_shapes(source, module, expected, content)
    notes += type_notes(source, expected, content)
    if filled:
        notes.append(
            f"{source} lacks {first_of(filled)}: they are as the model makes them ({_values(expected, filled)})"
        )
    if unmatched := [names.get(name, name) for name in dropped if name not in layers]:
        notes.append(
            f"of {source}, {len(unmatched)} tensors that the model has no use for were left out: {first_of(unmatched)}"
        )
    _load(module, content, source)
    count = f"all {len(expected)}" if len(content) == len(expected) else f"{len(content)} of the {len(expected)}"
    loaded = f"{count} tensors of {type(module).__name__} are from {source}"
    return [*weights.notes, loaded, *notes]


def _load(module: nn.Module, content: Mapping[str, Tensor], source: str) -> None:
    try:
        module.load_state_dict(content, strict=False)
    except RuntimeError as error:  # a module's own hook
        reason = " ".join(str(error).split())
        raise UserError(f"{source} cannot be loaded into {type(module).__name__}: {reason[:300]}") from None


# ------------------------------------------------------------------------------------------------ names


def _renamed(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return the tensors by the model's names, the names they had, and notes of what was changed."""
    if set(tensors) == set(expected):
        return dict(tensors), {}, []
    notes: list[str] = []
    plain = {_unwrapped(name): name for name in expected}
    if len(plain) < len(expected):  # without its wrappers two names are one
        plain = {name: name for name in expected}
    given = {_unwrapped(name): name for name in tensors}
    if len(given) < len(tensors):
        given = {name: name for name in tensors}
    if unwrapped := [name for bare, name in given.items() if name != bare and plain.get(bare) != name]:
        taken = sorted(
            {f"'{component}.'" for name in unwrapped for component in name.split(".")[:-1] if component in _WRAPPERS}
        )
        notes.append(f"{source}: {' and '.join(taken)} was taken off {len(unwrapped)} names, such as {unwrapped[0]}")
    matched = sum(name in plain for name in given)
    off, strip = _common_prefix(given, plain)
    on, add = _common_prefix(plain, given)
    prefix = ""
    if max(off, on) > matched:
        if len(best := strip if off >= on else add) > 1 and off >= on:
            choices = [f"{source}:{each.rstrip('.')}" for each in best]
            raise UserError(f"{source} holds several networks that fit: say which: --weights {first_of(choices)}")
        prefix = best[0] if len(best) == 1 else ""
        if prefix and off >= on:
            given = {name.removeprefix(prefix) if name.startswith(prefix) else name: old for name, old in given.items()}
            notes.append(f"{source}: the prefix {prefix!r} was taken off {off} names")
        elif prefix:
            given = {f"{prefix}{name}" if f"{prefix}{name}" in plain else name: old for name, old in given.items()}
            notes.append(f"{source}: the prefix {prefix!r} was put before {on} names, as the model has them")
    renamed = {plain.get(name, name): old for name, old in given.items()}
    return {name: tensors[old] for name, old in renamed.items()}, renamed, notes


def _unwrapped(name: str) -> str:
    return ".".join(component for component in name.split(".") if component not in _WRAPPERS)


def _common_prefix(names: Iterable[str], known: Mapping[str, str]) -> tuple[int, list[str]]:
    """Return how many ``names`` are a prefix and one of ``known``, for the prefix of most; and that prefix, or several."""
    votes: Counter[str] = Counter()
    for name in names:
        start = name.find(".") + 1
        while start:
            if name[start:] in known:
                votes[name[:start]] += 1
            start = name.find(".", start) + 1
    most = max(votes.values(), default=0)
    return most, sorted(prefix for prefix, count in votes.items() if count == most)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_buffer(module: nn.Module, name: str) -> bool:
    return name in {each for each, _ in module.named_buffers(remove_duplicate=False)}


# ------------------------------------------------------------------------------------------------ what does not fit


def _normalisation(given: Mapping[str, Tensor], extra: Iterable[str]) -> list[str]:
    """Return the names of a layer that subtracts a mean and divides by a standard deviation, one number per channel."""
    layers = [name for name in extra if _last(name) in (*_MEAN, *_STD) and given[name].numel() in (1, 3)]
    return layers if {_last(name) in _MEAN for name in layers} == {True, False} else []


def _normalisation_error(source: str, module: nn.Module, given: Mapping[str, Tensor], layers: list[str]) -> str:
    def numbers(known: tuple[str, ...]) -> str:
        name = next(name for name in layers if _last(name) in known)
        return ",".join(f"{value:.6g}" for value in given[name].flatten().tolist())

    text = f"mean={numbers(_MEAN)} std={numbers(_STD)}"
    return (
        f"{source} holds a normalisation layer ({first_of(layers)}) that {type(module).__name__} lacks, so pixels would be others "
        f'than in its training; give --model.input "{text}", or make the model with that layer'
    )


def _mismatch(
    source: str,
    module: nn.Module,
    extra: list[str],
    missing: list[str],
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> str:
    kind = type(module).__name__
    common = sum(name in expected for name in given)
    if not common:
        return (
            f"{source} is of another architecture: none of its {len(given)} names ({first_of(extra)}) is one of the "
            f"{len(expected)} of {kind} ({first_of(list(expected))}); make the model that was trained"
        )
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} that {kind} has ({first_of(missing)})")
    if extra:
        parts.append(f"it has {len(extra)} that {kind} lacks ({first_of(extra)})")
    remedy = "make the model that was trained, with the same settings"
    if hasattr(module, "from_pretrained"):  # transformers writes other names than its models have
        remedy = f"let the factory read them: return {kind}.from_pretrained(FOLDER), without --weights"
    return f"{source} is of another architecture: {' and '.join(parts)}; {common} names fit; {remedy}"


def _of_other_shape(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in given.items()
        if name in expected and not is_lazy(expected[name]) and tensor.shape != expected[name].shape
    ]


def _check_shapes(source: str, module: nn.Module, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    other = _of_other_shape(expected, given)
    if not other:
        return
    name = other[0]
    have, want = tuple(given[name].shape), tuple(expected[name].shape)
    where = f"{name} should be {want}, found {have}"
    heads = {(given[each].shape[:1], expected[each].shape[:1]) for each in other}
    same_inside = all(given[each].shape[1:] == expected[each].shape[1:] for each in other)
    one_layer = len({each.rpartition(".")[0] for each in other}) == 1
    if one_layer and len(heads) == 1 and same_inside and have and want:
        raise UserError(
            f"{source} is of a model with {have[0]} classes, {type(module).__name__} was made for {want[0]} ({where}); evaluate it "
            f"on images of its {have[0]} classes, or make the model with {have[0]} outputs"
        )
    more = f", and {len(other) - 1} more" if len(other) > 1 else ""
    raise UserError(
        f"{source} is of another architecture: {where}{more}; make the model that was trained, with the same settings"
    )


def _values(expected: Mapping[str, Tensor], names: list[str]) -> str:
    values = sorted({f"{expected[name].flatten()[0].item():g}" for name in names if expected[name].numel()})
    return "starting with " + ", ".join(values[:6]) if values else "empty"
