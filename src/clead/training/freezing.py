"""Which weights learn, and when; and the weights that a training begins with."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from clead.errors import UserError
from clead.models.partial_weights import load_matching
from clead.models.split import AdaptedModel, SplitModel, weights
from clead.output import tell
from clead.runs.directory import PROJECTION, RunDir
from clead.runs.zoo import located
from clead.weights import load_into, read_weights
from clead.weights.files import check_weights, load_weights


def classifier_of(model: SplitModel) -> nn.Module:
    """Return the linear layer that maps the features to the logits."""
    if isinstance(model, AdaptedModel):
        if model.classifier_name is None:
            kind = type(model.module).__name__
            raise UserError(
                f"a training that treats the classifier apart (train.trainable, train.unfreeze, optim.encoder_lr, "
                f"optim.first_layer_lr) must know it, and {kind} ends in no nn.Linear; name its layer: --model.classifier NAME"
            )
        return model.module.get_submodule(model.classifier_name)
    return model.get_submodule("classifier")


def train_classifier_only(model: SplitModel) -> None:
    """Freeze all but the final linear layer, and hold the rest in evaluation mode: batch-norm keeps its statistics."""
    final = classifier_of(model)
    model.eval().requires_grad_(False)
    final.train().requires_grad_(True)


def depths(model: SplitModel) -> dict[nn.Parameter, float | None]:
    """Return for each parameter where its layer lies: 0 for the encoder's first, 1 for its last; None for classifier and heads.

    Layers are counted in the order in which they were registered, those alone that have parameters of their own.
    """
    heads = [classifier_of(model), *([] if model.projection is None else [model.projection])]
    of_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    layers = [
        [parameter for parameter in layer.parameters(recurse=False) if id(parameter) not in of_heads]
        for layer in model.modules()
    ]
    layers = [layer for layer in layers if layer]
    count = max(1, len(layers) - 1)
    encoder = {parameter: number / count for number, layer in enumerate(layers) for parameter in layer}
    return {parameter: encoder.get(parameter) for parameter in model.parameters()}


def unfreeze(depth_of: Mapping[nn.Parameter, float | None], progress: float, duration: float) -> None:
    """Let learn what may at ``progress`` of the training, in [0, 1): the classifier first, the first layer from ``duration`` on."""
    lowest = max(0.0, 1 - progress / duration)
    for parameter, depth in depth_of.items():
        parameter.requires_grad_(depth is None or progress > 0 and depth >= lowest)


@contextmanager
def unfrozen_afterwards(model: nn.Module) -> Generator[None, None, None]:
    """Give every parameter its own ``requires_grad`` again on exit."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def start_from(
    model: SplitModel,
    path: Path,
    *,
    which: str | None = None,
    dim: int | None = None,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Load the weights of ``path`` into ``model``, in place, say what fits in part only, and return what was said.

    Args:
        model: of the architecture that was trained; its number of classes and size of images may be others.
        path: a run directory, ``zoo:NAME``, or weights that ``clead.weights.read_weights`` reads.
        which: ``best`` or ``last`` weights of a run directory; None: those that its ``eval.weights`` names.
        dim: d of the projection head that training will need, or None; the last one of a run directory is taken up if it has
            this size.
        classes: the data's class names; None: they are those that were trained.

    Raises UserError if there are no weights, or of another architecture (less than half of them fit).
    """
    try:
        stated, path = path, located(path)
        is_run = (path / "config.yaml").is_file()
        if is_run:
            run = RunDir.open(path)
            file = run.weights(which or run.config().eval.weights)
            content, metadata = load_weights(file)
            source = str(file if path == stated else stated)  # zoo:NAME, not where it is installed
            notes = [*_load_own(model, content, source), *_other_classes(metadata.get("classes"), classes, source)]
        else:
            given = read_weights(path)
            model.drop_projection()
            notes = load_into(model, given, num_classes=model.num_classes)
    except UserError as error:
        raise UserError(*(f"train.start_from: {problem}" for problem in error.problems)) from None
    notes = [f"train.start_from: {note}" for note in notes]
    for note in notes:
        tell(note)
    if dim is not None and is_run and (path / PROJECTION).exists():
        head, _ = load_weights(path / PROJECTION)
        model.add_projection(dim)
        assert model.projection is not None
        shapes = {name: tensor.shape for name, tensor in model.projection.state_dict().items()}
        if shapes == {name: tensor.shape for name, tensor in head.items()}:
            model.projection.load_state_dict(head)
        else:
            model.drop_projection()  # another size: the training draws a new one
    return notes


def _other_classes(trained: Sequence[str] | None, classes: Sequence[str] | None, source: str) -> list[str]:
    """Say so where the head is taken, because it has as many outputs, and each stands for another class."""
    if trained is None or classes is None or len(trained) != len(classes) or list(trained) == list(classes):
        return []
    k = next(k for k, (one, other) in enumerate(zip(trained, classes, strict=True)) if one != other)
    return [
        f"the head of {source} is taken, although its outputs stood for other classes, or in another order: output {k} for "
        f"{trained[k]!r}, here for {classes[k]!r}"
    ]


def _load_own(model: SplitModel, content: dict[str, Tensor], source: str) -> list[str]:
    """Load the weights of a run: all, or of a run with other classes or another size of images, what fits."""
    model.drop_projection()
    expected = weights(model)
    if {name: each.shape for name, each in expected.items()} != {name: each.shape for name, each in content.items()}:
        return load_matching(model, content, source, model.num_classes)
    notes = check_weights(expected, content, source)
    model.load_state_dict(content)
    return notes
