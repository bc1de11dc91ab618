"""Models that this program did not train: made from code with weights, or read from an ONNX file, and ready to be evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from clead.config import RunConfig
from clead.data.classes import align_classes
from clead.devices import device_of
from clead.errors import UserError
from clead.models import is_library
from clead.models.class_names import class_names
from clead.models.library import RANDOM, Library
from clead.models.model_input import InputLayer, ModelInput
from clead.models.onnx import OnnxModel, is_onnx
from clead.models.seeding import fork_rng
from clead.models.split import AdaptedModel, SplitModel, wrapped
from clead.models.user_model import make_module
from clead.output import tell
from clead.results.target import EvaluationTarget
from clead.runs.loading import OpenedModel, chosen_images, data_name, data_notes, image_shape, split_facts
from clead.tasks.retrieval import Retrieval
from clead.weights import Weights, load_into, read_weights


@dataclasses.dataclass(frozen=True)
class ExternalModel:
    """A model to evaluate, the names of its classes in the order of its outputs, if it states them, and notes for the record."""

    model: nn.Module
    classes: Sequence[str] | None
    notes: list[str]


def open_external_model(
    model: str | nn.Module,
    config: RunConfig,
    *,
    weights: str | Path | None = None,
    output: str | int | None = None,
    input: ModelInput | str | None = None,
    classifier: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> OpenedModel:
    """Load a model and the images that ``config`` names; arguments as of ``evaluate_external``."""
    splits = config.data.load(config.train.seed, training=False)
    name = model if isinstance(model, str) else type(model).__name__
    external = load_external_model(
        model,
        weights=weights,
        sample_shape=image_shape(splits),
        num_classes=len(splits.classes),
        output=output,
        input=input,
        classifier=classifier,
        args=args,
    )
    order_given = getattr(config.data, "classes", None) is not None
    stated = (
        None if isinstance(config.task, Retrieval) else external.classes
    )  # the features are compared with other classes
    splits, class_notes = align_classes(splits, stated, source=name, order_given=order_given)
    splits = dataclasses.replace(splits, notes=(*splits.notes, *class_notes))
    target = EvaluationTarget(
        name=Path(name).stem if is_onnx(model) else name.rpartition(":")[2],
        model=Path(name).name,
        weights=Path(weights).name if weights else "given",
        data=data_name(config),
        split=config.eval.split,
        data_fingerprint=splits.fingerprint,
        classes=splits.classes,
        task=config.task,
        **split_facts(splits, config.eval.split),
    )
    notes = [*data_notes(splits), *external.notes]
    if isinstance(model, str) and weights is None and not is_onnx(model) and not is_library(model):
        notes.append(f"no --weights given: those that {Path(name).name} makes")
    if splits.origin == "train" and config.eval.split == "test":
        notes.append(
            f"{target.name} may have been trained on these images: a figure on training images says nothing of new ones; "
            "put images that it has never seen into test/CLASS"
        )
    device, images = device_of(config.train.device), chosen_images(config.eval, splits)
    return OpenedModel(config, external.model.to(device), images, splits, target, device, tuple(notes))


def load_external_model(
    model: str | nn.Module,
    *,
    weights: str | Path | None,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    output: str | int | None = None,
    input: ModelInput | str | None = None,
    classifier: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> ExternalModel:
    """Return the model to evaluate, in eval mode, with what must be said of how it was made.

    Args:
        model: ``module:factory``, a network of a library such as ``timm:resnet18``, a file that ``OnnxModel`` reads, or a module.
        weights: for what the factory makes; None: as it is made.
        sample_shape: (C, H, W) of the images.
        num_classes: K of the data; a factory is called with as many as the weights name, if they name them.
        output: which output the logits are; None: it is recognised.
        input: how pixels are given, see ``ModelInput``; None: as they are.
        classifier: name of the layer whose input are the features; None: it is found.
        args: arguments of the factory or the library.

    Raises UserError if the model cannot be made, or does not take these images.
    """
    given = None if input is None else ModelInput.parse(input)
    if is_onnx(model):
        if weights is not None:
            raise UserError(f"--weights: an ONNX file holds its own, got {weights}; leave it out")
        if classifier is not None:
            raise UserError(
                f"model.classifier: the layers of {model} cannot be looked at, got {classifier!r}; leave it out"
            )
        made = OnnxModel(str(model), input=given, output=output, sample_shape=sample_shape, num_classes=num_classes)
        _say(made.notes)
        return ExternalModel(made.eval(), made.classes, made.notes)
    read = None if weights is None else read_weights(weights)
    if read is not None and read.classes is not None:
        num_classes = len(read.classes)
    if isinstance(model, str) and is_library(model):
        stated = None if read is None or read.classes is None else num_classes
        settings = Library(
            network=model,
            args={"pretrained": read is None, **(args or {})},
            input=given,
            classifier=classifier,
            output=None if output is None else str(output),
        )
        return _of_library(settings, read, sample_shape, stated)
    module = make_module(model, num_classes, args) if isinstance(model, str) else model
    notes: list[str] = []
    if read is not None:
        notes = load_into(module, read, normalized=given is not None and given.normalizes)
        _say(notes)
    built, input_notes = with_input(module, given, sample_shape, output=output, classifier=classifier)
    classes = (read.classes if read is not None else None) or stated_classes(module)
    return ExternalModel(built.eval(), classes, [*notes, *input_notes])


def _of_library(
    settings: Library, read: Weights | None, sample_shape: tuple[int, int, int], num_classes: int | None
) -> ExternalModel:
    """Return a library's network with its published weights, or those ``read``, and as many classes as it has."""
    channels = sample_shape[0]
    with fork_rng(0):
        network = settings.make(channels, sample_shape, num_classes)
    if network.mean is None and settings.input is None:
        raise UserError(
            f'{settings.network} does not state how its pixels are normalised; say it: --model.input "mean=0.5 std=0.5", or '
            '"range=0..1" for as they are'
        )
    layer, notes = settings.first_layer(network, channels, [0.0], [1.0])
    notes = [*network.notes, *notes]
    if read is not None:
        notes = [*load_into(network.module, read, normalized=True), *(note for note in notes if RANDOM not in note)]
    _say(notes)
    adapted = AdaptedModel(
        network.module,
        sample_shape=sample_shape,
        classifier=settings.classifier,
        output=settings.output_name,
        normalize=layer,
    )
    classes = (read.classes if read is not None else None) or stated_classes(network.module)
    return ExternalModel(adapted.eval(), classes, notes)


def with_input(
    module: nn.Module,
    given: ModelInput | None,
    sample_shape: tuple[int, int, int],
    *,
    output: str | int | None = None,
    classifier: str | None = None,
) -> tuple[nn.Module, list[str]]:
    """Return ``module`` with ``given`` before it and, if it has features, as attacks on the embedding need it; and notes."""
    layer = None if given is None else InputLayer(given)
    if isinstance(module, SplitModel) and layer is None:
        return module, []
    notes = [] if layer is None else layer.notes()
    _say(notes)
    adapted = AdaptedModel(module, sample_shape=sample_shape, classifier=classifier, output=output, normalize=layer)
    return adapted if adapted.has_features or layer is not None else wrapped(module, output), notes


def stated_classes(module: nn.Module) -> Sequence[str] | None:
    """Return the class names that a module brings with it: ``classes``, or ``config.id2label`` of transformers; else None."""
    stated: Any = getattr(module, "classes", None)
    if stated is None:
        stated = getattr(getattr(module, "config", None), "id2label", None)
    return class_names(stated)


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        tell(f"model: {note}")
