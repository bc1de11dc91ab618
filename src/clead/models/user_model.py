"""A user's own model, named by where its code is."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from torch import nn

from clead.errors import UserError, did_you_mean
from clead.models import MODELS
from clead.models.build import first_layer
from clead.models.model_input import InputLayer, ModelInput, pairs
from clead.models.split import AdaptedModel, SplitModel
from clead.settings import setting, settings

_ALLOWED: set[str] = set()  # never filled from a file


@settings
class ForeignModel(ABC):
    """What the settings of models from elsewhere have in common."""

    args: dict[str, Any] = setting(
        default_factory=dict,
        doc="arguments of what makes the network, each also as --model.args.KEY, such as --model.args.pretrained true; num_classes "
        "is the data's unless it is given",
    )
    classifier: str | None = setting(
        None,
        "name of the layer that maps features (B, D) to logits, such as fc; none: the final nn.Linear, if there is one",
    )
    output: str | None = setting(
        None, "name or index of the logits in what the model returns, such as logits or 0; none: recognised"
    )
    input: Annotated[ModelInput | None, BeforeValidator(pairs)] = setting(
        None,
        'how the model takes its pixels, such as "layout=nhwc range=0..255 mean=… std=… size=224 channels=bgr" (each also as '
        "--model.input.KEY); none: (B, C, H, W) in [0, 1], RGB",
    )
    normalize: str

    def __post_init__(self) -> None:
        """Refuse two normalisations."""
        if self.input is not None and self.normalize == "data":
            raise ValueError("normalize: data and input are two ways to say the same, got both; leave out normalize")

    @abstractmethod
    def untrained(self) -> ForeignModel:
        """Return the settings that make the same network without published weights, for a run's own."""

    @abstractmethod
    def build(
        self,
        channels: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        sample_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Return the model of (B, ``channels``, H, W) images; as ``clead.models.build.ModelSettings.build``."""


@MODELS.register("custom")
@settings
class Custom(ForeignModel):
    """Any ``nn.Module`` from pixels in [0, 1], (B, C, H, W), to logits, (B, K).

    The factory is a function or a class; it is called with ``args``, and with ``num_classes=`` if it takes that. A network of
    another number of outputs gets a new final layer, drawn from the seed, and a message says so.
    """

    factory: str = setting(..., "what makes the model: 'package.module:factory' or 'path/to/file.py:factory'")
    normalize: Literal["data", "none"] = setting(
        "none", "data: the first layer standardises by the training set's mean and std; none: pixels as they are"
    )

    def untrained(self) -> Custom:
        """Return the settings with the argument ``pretrained`` off, if it is given."""
        args = {key: False if key == "pretrained" else value for key, value in self.args.items()}
        return dataclasses.replace(self, args=args)

    def build(
        self,
        channels: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        sample_shape: tuple[int, int, int] | None = None,
    ) -> SplitModel:
        """Import the factory, call it and adapt what it returns; raises UserError if that fails or is not allowed."""
        if sample_shape is None:
            raise ValueError("a custom model is run once to be adapted: sample_shape (C, H, W) is required")
        if _place(self.factory) not in _ALLOWED:
            raise UserError(
                f"model.name: a file says that the code {self.factory} is to be run, and it runs with all your rights; if you know "
                f"it, add --allow-code {self.factory} (in Python: clead.allow_code({self.factory!r}))"
            )
        module = make_module(self.factory, num_classes, self.args)
        if isinstance(module, SplitModel):
            if module.num_classes != max(2, num_classes):
                raise UserError(
                    f"{self.factory} has {module.num_classes} classes but the data has {num_classes}; "
                    f"return a model with {num_classes} outputs (the factory may take num_classes)"
                )
            return module
        adapted = AdaptedModel(
            module,
            sample_shape=sample_shape,
            num_classes=num_classes,
            classifier=self.classifier,
            output=self.output,
            normalize=first_layer(self.normalize, mean, std) if self.input is None else InputLayer(self.input),
            new_head=True,
        )
        adapted.origin += self._unapplied(module)
        return adapted

    def _unapplied(self, module: nn.Module) -> list[str]:
        """Say so where a network of timm states a normalisation and none is set: it would get pixels that it does not know."""
        stated = getattr(module, "pretrained_cfg", None)
        if self.input is not None or self.normalize != "none" or not isinstance(stated, dict) or not stated.get("mean"):
            return []
        mean, std = (",".join(map(str, stated[key])) for key in ("mean", "std"))
        return [
            f'it states mean={mean} std={std}, which are not applied; to apply them: --model.input "mean={mean} std={std}"'
        ]


def allow_code(*factories: str) -> None:
    """Let this process run code that a configuration names: ``package.module:factory`` or ``path/to/file.py:factory``.

    A recipe or a run's config.yaml can come from anybody, with a model; the file it names may lie beside it. So naming code in a
    file is not enough to run it: the user names it, on the command line or by this function.
    """
    _ALLOWED.update(map(_place, factories))


def _place(factory: str) -> str:
    """Return ``factory`` with the whole path of its file, however that was written."""
    source, separator, name = factory.rpartition(":")
    return f"{Path(source).resolve()}:{name}" if separator and source.endswith(".py") else factory


def make_module(factory: str, num_classes: int, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Return what ``package.module:factory`` or ``path/to/file.py:factory`` makes; raises UserError if it does not.

    factory: its name may have dots, as ``efficientnet_lite_pytorch:EfficientNet.from_name``.
    """
    source, separator, name = factory.rpartition(":")
    if not (source and separator and name):
        raise UserError(
            f"model.name must be 'module:factory' or 'path/to/file.py:factory', got {factory!r}; "
            "give such as --model.name net.py:make"
        )
    with _importable(Path.cwd(), Path(source).resolve().parent):
        code = _load(source)
        make = _attribute(code, source, name)
        if isinstance(make, nn.Module) or not callable(make):
            raise UserError(
                f"model.name: {factory} is a {type(make).__name__}; give a function or class that makes the model"
            )
        chosen = _arguments(factory, make, num_classes, args or {})
        try:
            made = make(**chosen)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"model.name: {factory} raised {_line(error)}; "
                f"mend it; it was called with {', '.join(chosen) or 'no arguments'}"
            ) from error
    if not isinstance(made, nn.Module):
        raise UserError(
            f"model.name: {factory} must return a torch.nn.Module, got {type(made).__name__}; end it with return model"
        )
    return made


def _attribute(code: ModuleType, source: str, name: str) -> Any:
    value: Any = code
    for step in name.split("."):
        if not hasattr(value, step):
            known = [key for key in dir(value) if not key.startswith("_") and callable(getattr(value, key))]
            raise UserError(f"model.name: {source} has no {name!r}; {did_you_mean(step, known)}")
        value = getattr(value, step)
    return value


def _arguments(factory: str, make: Callable[..., Any], num_classes: int, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the factory is called with; raises UserError for an argument that it does not take."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return dict(args)
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return {"num_classes": num_classes, **args}
    if unknown := [key for key in args if key not in parameters]:
        raise UserError(
            f"model.args.{unknown[0]}: {factory} takes no {unknown[0]!r}; {did_you_mean(unknown[0], parameters)}"
        )
    return {**({"num_classes": num_classes} if "num_classes" in parameters else {}), **args}


def _load(source: str) -> ModuleType:
    """Import a dotted module, or a file by its path."""
    path = Path(source)
    if path.suffix != ".py":
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            # Only if the named module itself is missing, not one that it imports.
            if error.name is not None and f"{source}.".startswith(f"{error.name}."):
                raise UserError(
                    f"model.name: no module {source!r} here or installed; "
                    "give a file with its .py, such as 'nets/mine.py:Net'"
                ) from error
            raise _not_imported(source, error) from error
        except (Exception, SystemExit) as error:
            raise _not_imported(source, error) from error
    if not path.is_file():
        near = [str(other) for other in path.parent.glob("*.py")]
        remedy = did_you_mean(source, near) if near else f"give its path from {Path.cwd()}"
        raise UserError(f"model.name: no file {source!r}; {remedy}")
    # A name of its own: files of other folders, and installed modules, may have the same.
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of the file are found again by pickle and deepcopy
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _not_imported(source, error) from error
    return module


@contextmanager
def _importable(*folders: Path) -> Generator[None, None, None]:
    """Let the code in ``folders`` be imported inside the block."""
    before = sys.path.copy()
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = before


def _not_imported(source: str, error: BaseException) -> UserError:
    line = f"python {source}" if source.endswith(".py") else f"python -c 'import {source}'"
    return UserError(f"model.name: importing {source} raised {_line(error)}; mend it until this runs: {line}")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
