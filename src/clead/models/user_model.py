"""A user's own model, named by where its code is."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator, Sequence
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


@MODELS.register("custom")
@settings
class Custom:
    """Any ``nn.Module`` from pixels in [0, 1], (B, C, H, W), to logits, (B, K).

    The factory is a function or a class; it is called with ``num_classes=`` if it takes that, else with no
    arguments.
    """

    factory: str = setting(..., "what makes the model: 'package.module:factory' or 'path/to/file.py:factory'")
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
    normalize: Literal["data", "none"] = setting(
        "none", "data: the first layer standardises by the training set's mean and std; none: pixels as they are"
    )

    def __post_init__(self) -> None:
        """Refuse two normalisations."""
        if self.input is not None and self.normalize == "data":
            raise ValueError("normalize: data and input are two ways to say the same, got both; leave out normalize")

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
        module = make_module(self.factory, num_classes)
        if isinstance(module, SplitModel):
            if module.num_classes != num_classes:
                raise UserError(
                    f"{self.factory} has {module.num_classes} classes but the data has {num_classes}; "
                    f"return a model with {num_classes} outputs (the factory may take num_classes)"
                )
            return module
        return AdaptedModel(
            module,
            sample_shape=sample_shape,
            num_classes=num_classes,
            classifier=self.classifier,
            output=self.output,
            normalize=first_layer(self.normalize, mean, std) if self.input is None else InputLayer(self.input),
        )


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


def make_module(factory: str, num_classes: int) -> nn.Module:
    """Return what ``package.module:factory`` or ``path/to/file.py:factory`` makes; raises UserError if it does not."""
    source, separator, name = factory.rpartition(":")
    if not (source and separator and name):
        raise UserError(
            f"model.name must be 'module:factory' or 'path/to/file.py:factory', got {factory!r}; "
            "give such as --model.name net.py:make"
        )
    with _importable(Path.cwd(), Path(source).resolve().parent):
        code = _load(source)
        if not hasattr(code, name):
            known = [key for key, value in vars(code).items() if callable(value) and not key.startswith("_")]
            raise UserError(f"model.name: {source} has no {name!r}; {did_you_mean(name, known)}")
        make = getattr(code, name)
        if isinstance(make, nn.Module) or not callable(make):
            raise UserError(
                f"model.name: {factory} is a {type(make).__name__}; give a function or class that makes the model"
            )
        try:
            made = make(num_classes=num_classes) if _takes_num_classes(make) else make()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"model.name: {factory} raised {_line(error)}; "
                "mend it; the factory is called without arguments, or with num_classes"
            ) from error
    if not isinstance(made, nn.Module):
        raise UserError(
            f"model.name: {factory} must return a torch.nn.Module, got {type(made).__name__}; end it with return model"
        )
    return made


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


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _not_imported(source: str, error: BaseException) -> UserError:
    line = f"python {source}" if source.endswith(".py") else f"python -c 'import {source}'"
    return UserError(f"model.name: importing {source} raised {_line(error)}; mend it until this runs: {line}")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
