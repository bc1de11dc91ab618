"""Networks of timm, torchvision and transformers, by the names that they have there."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from clead.atomic_io import read_json
from clead.errors import UserError, did_you_mean, first_line
from clead.models import MODELS, is_library
from clead.models.external import ModelError
from clead.models.model_input import InputLayer
from clead.models.normalize import Normalize
from clead.models.partial_weights import load_matching
from clead.models.split import AdaptedModel, SplitModel
from clead.models.user_model import ForeignModel
from clead.settings import setting, settings

RANDOM = "its weights are random, drawn from the seed"
"""How the note begins of a network without published weights."""
_PUBLISHED = "; published ones: --model.args.pretrained true"
_NOT_CONFIGURED = ("architectures", "attn_implementation", "auto_map", "dtype", "quantization_config", "torch_dtype")
_FOREIGN_WEIGHTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a network is made for: C, (H, W) of the images that it gets, and K; None: as many classes as it has by itself."""

    channels: int
    size: tuple[int, int]
    num_classes: int | None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and what its library states of it.

    Attributes:
        module: the network.
        mean, std: of its pixels in [0, 1]; None: not stated.
        notes: how it was made, one sentence each.
    """

    module: nn.Module
    mean: Sequence[float] | None
    std: Sequence[float] | None
    notes: list[str]


@MODELS.register("library")
@settings
class Library(ForeignModel):
    """A network of timm, torchvision or transformers: ``--model.name timm:resnet18``, ``torchvision:resnet18``, ``hf:FOLDER``.

    Its last layer has as many outputs as the data has classes. With published weights of another number of classes it is a new
    one, drawn from the seed, and a message says so.
    """

    network: str = setting(
        ...,
        "timm:NAME, torchvision:NAME or hf:NAME, of a model in the Hugging Face hub, a folder of save_pretrained, or a kind such "
        "as vit; for short: --model.name timm:NAME",
    )
    normalize: Literal["model", "data", "none"] = setting(
        "model",
        "model: pixels are standardised by the mean and std that the library states for the network, else as data; data: by the "
        "training set's; none: as they are",
    )
    description: dict[str, Any] | None = setting(
        None, "of hf: what its config.json says; clead train fills this in, so that a run needs no other folder"
    )

    def __post_init__(self) -> None:
        """Refuse two normalisations and other libraries."""
        super().__post_init__()
        if not is_library(self.network):
            raise ValueError(
                f"network must begin with {', '.join(f'{each}:' for each in _LIBRARIES)}, got {self.network!r}"
            )

    def untrained(self) -> Library:
        """Return the settings that make the same network without published weights."""
        return dataclasses.replace(self, args={**self.args, "pretrained": False})

    def described(self) -> Library:
        """Return the settings with all that has to be read to make the network again, but for weights."""
        library, _, name = self.network.partition(":")
        if library != "hf" or self.description is not None or is_kind(name):
            return self
        description = _hf_description(name)
        config = {key: value for key, value in description["config"].items() if key not in ("id2label", "label2id")}
        if labels := description["config"].get("id2label"):
            config["num_labels"] = len(labels)  # a thousand names are of no use to a run, which has its own
        return dataclasses.replace(self, description={**description, "config": config})

    def make(self, channels: int, sample_shape: tuple[int, int, int], num_classes: int | None) -> Network:
        """Return the network for images of ``sample_shape``, its random weights drawn from the global generator.

        Raises UserError if it cannot be made.
        """
        size = sample_shape[1:] if self.input is None or self.input.size is None else self.input.size
        library, _, name = self.network.partition(":")
        wanted = Wanted(channels, size, num_classes)
        if library != "hf":
            return _LIBRARIES[library](name, dict(self.args), wanted)
        description = self.description or (None if is_kind(name) else _hf_description(name))
        return _transformers(name, dict(self.args), wanted, description)

    def build(
        self,
        channels: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        sample_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Make the network, put its normalisation before it, and adapt it; raises UserError if that fails."""
        if sample_shape is None:
            raise ValueError("a library's model is run once to be adapted: sample_shape (C, H, W) is required")
        network = self.make(channels, sample_shape, num_classes)
        layer, notes = self.first_layer(network, channels, mean, std)
        try:
            adapted = AdaptedModel(
                network.module,
                sample_shape=sample_shape,
                num_classes=num_classes,
                classifier=self.classifier,
                output=self.output_name,
                normalize=layer,
                new_head=True,
            )
        except ModelError as error:
            enlarge = "; ".join(note for note in network.notes if "--model.input" in note)
            raise UserError(f"{self.network}: {error}; {enlarge}" if enlarge else str(error)) from error
        adapted.origin = [f"{self.network}: {note}" for note in (*network.notes, *adapted.origin, *notes)]
        return adapted

    @property
    def output_name(self) -> str | None:
        """The name of the logits in what the network returns, where there is one."""
        return self.output or ("logits" if self.network.startswith("hf:") else None)

    def first_layer(
        self, network: Network, channels: int, mean: Sequence[float], std: Sequence[float]
    ) -> tuple[nn.Module, list[str]]:
        """Return what normalises (and resizes) pixels before ``network``, and what must be said of it."""
        stated = self.normalize == "model" and network.mean is not None and network.std is not None
        if stated:
            mean, std = (_per_channel(each, channels) for each in (network.mean, network.std))
        numbers = f"mean={_listed(mean)} std={_listed(std)}"
        source = "the network's own" if stated else "the training set's"
        if self.input is None:
            if self.normalize == "none":
                return nn.Identity(), ["pixels in [0, 1] are not normalised"]
            return Normalize(mean, std), [f"pixels are normalised by {source} {numbers}"]
        given, notes = self.input, []
        free = not given.normalizes and given.range is None and given.dtype in (None, "float32")
        if self.normalize == "model" and free:
            if given.channels == "bgr" and not stated:  # colours are turned round before the mean is subtracted
                mean, std = mean[::-1], std[::-1]
            given = dataclasses.replace(given, mean=tuple(mean), std=tuple(std))
            notes = [f"pixels are normalised by {source} {numbers}"]
        layer = InputLayer(given)
        return layer, [*notes, *layer.notes()]


# ------------------------------------------------------------------------------------------------ the three libraries


def _timm(name: str, args: dict[str, Any], wanted: Wanted) -> Network:
    timm = _imported("timm", f"timm:{name}")
    _refuse(args, _FOREIGN_WEIGHTS, "weights come from --train.start_from FILE")
    if not timm.is_model(name):
        raise UserError(
            f"model.name: timm {timm.__version__} has no {name!r}; {did_you_mean(name, timm.list_models())}"
        )
    pretrained = bool(args.pop("pretrained", False))
    if pretrained and not timm.models.is_model_pretrained(name):
        raise UserError(
            f"model.args.pretrained: timm has no weights for {name}; leave it out, or give --train.start_from FILE"
        )
    given = {"in_chans": wanted.channels, **({} if wanted.num_classes is None else {"num_classes": wanted.num_classes})}
    made_for = _attempt(f"timm:{name}", lambda: timm.get_pretrained_cfg(name))
    size = tuple(made_for.input_size[1:])
    if made_for.fixed_input_size and size != wanted.size:
        given["img_size"] = wanted.size
    module = _attempt(
        f"timm:{name}",
        lambda: timm.create_model(name, pretrained=pretrained, **{**given, **args}),
        timm.model_entrypoint(name).__module__,
    )
    stated = module.pretrained_cfg
    notes = [RANDOM + _PUBLISHED]
    if pretrained:
        notes = [
            f"its weights are those that timm publishes as {stated['architecture']}.{stated['tag'] or ''}".rstrip(".")
        ]
        count = {**given, **args}.get("num_classes", stated["num_classes"])
        if count != stated["num_classes"]:
            notes.append(
                f"the head {stated['classifier']} is new, drawn from the seed: {stated['num_classes']} → {count} classes"
            )
    notes += _size_notes(size, wanted.size, "img_size" in given)
    return Network(module, stated["mean"], stated["std"], notes)


def _torchvision(name: str, args: dict[str, Any], wanted: Wanted) -> Network:
    _imported("torchvision", f"torchvision:{name}")
    models = importlib.import_module("torchvision.models")
    if name not in (known := models.list_models(module=models)):
        raise UserError(f"model.name: torchvision has no classifier {name!r}; {did_you_mean(name, known)}")
    _check_channels(f"torchvision:{name}", wanted.channels)
    published = models.get_model_weights(name)
    pretrained = bool(args.pop("pretrained", args.get("weights")))
    which = str(args.pop("weights", None) or "DEFAULT").rpartition(".")[2]
    if which not in published.__members__ and which != "DEFAULT":
        raise UserError(f"model.args.weights: {name} has no {which!r}; {did_you_mean(which, published.__members__)}")
    entry = published[which]
    preset, builder = entry.transforms(), models.get_model_builder(name)
    given: dict[str, Any] = {} if wanted.num_classes is None else {"num_classes": wanted.num_classes}
    size = (preset.crop_size[0], preset.crop_size[0])
    fixed = builder.__module__.endswith("vision_transformer")
    if fixed and wanted.size != size:
        given["image_size"] = wanted.size[0]
    if name in ("googlenet", "inception_v3"):
        given["transform_input"] = True  # as their weights want it, with the mean and std of the others
    module = _attempt(f"torchvision:{name}", lambda: builder(weights=None, **{**given, **args}), builder.__module__)
    notes = [RANDOM + _PUBLISHED]
    if pretrained:
        safe = {"progress": False, "check_hash": True, "weights_only": True}
        state = _attempt(f"torchvision:{name}", partial(entry.get_state_dict, **safe))
        # Files of DenseNet are older than its code.
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", key): each for key, each in state.items()}
        notes = load_matching(
            module, state, f"torchvision's {entry}", wanted.num_classes or len(entry.meta["categories"])
        )
    notes += _size_notes(size, wanted.size, fixed)
    return Network(module, preset.mean, preset.std, notes)


def _transformers(name: str, args: dict[str, Any], wanted: Wanted, description: dict[str, Any] | None) -> Network:
    transformers = _imported("transformers", f"hf:{name}")
    if description is None and name not in (kinds := _kinds(transformers)):
        raise UserError(f"model.name: hf:{name}: no such folder, and no kind of network; {did_you_mean(name, kinds)}")
    pretrained = bool(args.pop("pretrained", description is not None))
    if description is None and pretrained:
        raise UserError(
            f"model.args.pretrained: hf:{name} is a kind of network, without weights; name a folder or a model of the hub"
        )
    stated = description or {"config": {"model_type": name}, "mean": None, "std": None}
    config = _hf_config(transformers, name, stated["config"])
    published_size = _pair(getattr(config, "image_size", None)) if description is not None else None
    known = {"num_classes", *_harmless(config.to_dict())}
    if unknown := [key for key in args if key not in known]:
        raise UserError(
            f"model.args.{unknown[0]}: hf:{name} takes no {unknown[0]!r}; {did_you_mean(unknown[0], known)}"
        )
    num_classes = args.pop("num_classes", wanted.num_classes)
    given: dict[str, Any] = {} if num_classes is None else {"num_labels": num_classes}
    if hasattr(config, "image_size"):
        given["image_size"] = wanted.size[0] if wanted.size[0] == wanted.size[1] else list(wanted.size)
    if hasattr(config, "num_channels"):
        if pretrained:
            _check_channels(f"hf:{name}", wanted.channels, config.num_channels)
        given["num_channels"] = wanted.channels
    given |= args
    labels = ("id2label", "label2id") if "num_labels" in given else ()
    wished = {key: value for key, value in stated["config"].items() if key not in labels} | given
    changed = _hf_config(transformers, name, wished)
    auto = transformers.AutoModelForImageClassification
    module = _attempt(f"hf:{name}", lambda: auto.from_config(changed, dtype="float32", trust_remote_code=False))
    notes = [RANDOM + ("" if description is None else _PUBLISHED)]
    if pretrained:
        options = {"config": config, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        source, report = _attempt(f"hf:{name}", lambda: auto.from_pretrained(name, **options))
        state = {key: each for key, each in source.state_dict().items() if key not in report["missing_keys"]}
        notes = load_matching(module, state, f"hf:{name}", changed.num_labels)
    notes += _size_notes(published_size, wanted.size, True)
    return Network(module, stated["mean"], stated["std"], notes)


_LIBRARIES: dict[str, Callable[..., Network]] = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}


def _kinds(transformers: Any) -> list[str]:
    return list(transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def _hf_config(transformers: Any, name: str, values: dict[str, Any]) -> Any:
    """Return the configuration of these values; raises UserError if there is no such kind of network."""
    kinds, kind = transformers.CONFIG_MAPPING, values.get("model_type")
    if kind not in kinds:
        raise UserError(
            f"model.name: transformers has no kind of network {kind!r} (hf:{name}); {did_you_mean(str(kind), kinds)}"
        )
    return _attempt(f"hf:{name}", lambda: kinds[kind].from_dict(_harmless(values)))


def _harmless(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what could make transformers load code or change the type of weights."""
    return {key: each for key, each in values.items() if key not in _NOT_CONFIGURED and not key.startswith("_")}


def is_kind(name: str) -> bool:
    """Say whether ``hf:name`` is a kind of network, such as vit, not a folder or a name of the hub."""
    return "/" not in name and not Path(name).is_dir()


def _hf_description(name: str) -> dict[str, Any]:
    """Return what the files of a folder or a model of the hub say: the configuration, and mean and std of pixels."""
    transformers = _imported("transformers", f"hf:{name}")
    read = transformers.AutoConfig.from_pretrained
    config = _attempt(f"hf:{name}", lambda: read(name, trust_remote_code=False))
    facts = _harmless(config.to_diff_dict()) | {"model_type": config.model_type}
    hub = importlib.import_module("transformers.utils.hub")
    missing_is_fine = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    file = _attempt(f"hf:{name}", lambda: hub.cached_file(name, "preprocessor_config.json", **missing_is_fine))
    pixels = read_json(Path(file)) if file else {}
    normalised = (
        pixels.get("do_normalize", bool(pixels)) and abs(pixels.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3
    )
    mean, std = (pixels.get(key) if normalised else None for key in ("image_mean", "image_std"))
    return {"config": facts, "mean": mean, "std": std}


# ------------------------------------------------------------------------------------------------ errors and words


def _imported(library: str, network: str) -> Any:
    """Import a library; raises UserError with the install command if it is not there."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        lacking = str(error.name).partition(".")[0]
        raise UserError(
            f"model.name: {network} needs {lacking}, which is not installed; run: pip install {lacking}"
        ) from None
    except Exception as error:
        raise UserError(
            f"model.name: {network} needs {library}, whose import raised {type(error).__name__}: {first_line(error)}; mend it "
            f"until this runs: python -c 'import {library}'"
        ) from error


def _attempt(network: str, make: Callable[[], Any], module: str = "") -> Any:
    """Return what ``make`` returns; raises UserError of one line if it fails, with the arguments that there are.

    module: where the network's class is defined.
    """
    try:
        with _quiet():
            return make()
    except (MemoryError, UserError):
        raise
    except (Exception, SystemExit) as error:
        unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if unknown is not None:
            kind, key = unknown.groups()
            takes = inspect.signature(getattr(sys.modules.get(module), kind, lambda: None)).parameters
            remedy = did_you_mean(key, takes)
            if key in ("img_size", "image_size"):
                remedy = "give the size that it was made for, such as --model.input size=224"
            raise UserError(f"model.args.{key}: {network} takes no {key!r}; {remedy}") from None
        raise UserError(
            f"model.name: {network} cannot be made: {type(error).__name__}: {' '.join(str(error).split())[:200]}; change "
            "--model.args, or give weights as a file: --train.start_from FILE"
        ) from error


def _refuse(args: dict[str, Any], keys: Sequence[str], remedy: str) -> None:
    if refused := [key for key in args if key in keys]:
        raise UserError(f"model.args.{refused[0]}: is not taken, got {args[refused[0]]!r}; {remedy}")


def _check_channels(network: str, channels: int, takes: int = 3) -> None:
    if channels != takes:
        raise UserError(
            f"model.name: {network} takes images of {takes} channels, got {channels}; give --data.channels {takes}"
        )


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Let the libraries say nothing by their loggers and progress bars: notes and errors say it."""
    loggers = {name: logging.getLogger(name) for name in ("timm", "transformers", "huggingface_hub")}
    levels = {name: logger.level for name, logger in loggers.items()}
    bars = getattr(getattr(sys.modules.get("transformers"), "utils", None), "logging", None)
    shown = bars is not None and bars.is_progress_bar_enabled()
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    if shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
        if shown:
            bars.enable_progress_bar()


def _size_notes(made_for: tuple[int, int] | None, wanted: tuple[int, int], rebuilt: bool) -> list[str]:
    """Say what was done about images of another size than a network was made for."""
    if made_for in (None, wanted):
        return []
    done = f"it is built for them, and was made for {_by(made_for)}" if rebuilt else f"it was made for {_by(made_for)}"
    return [
        f'images go in as {_by(wanted)}, and {done}; to enlarge them inside the model: --model.input "size={made_for[0]}"'
    ]


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{float(value):.6g}" for value in values)


def _per_channel(values: Any, channels: int) -> list[float]:
    """Return a number per channel: those stated, or where one or another number of them is, their mean for each."""
    numbers = [float(value) for value in (values if isinstance(values, Sequence) else [values])]
    return numbers if len(numbers) == channels else [sum(numbers) / len(numbers)] * channels
