"""Validation under attack for Lightning."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from clead.callbacks.validation import Validation
from clead.errors import MissingExtra, UserError

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _library() -> Any:
    """Return the package of Lightning that the caller has imported, else the one that is installed."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise MissingExtra("lightning", "lightning", "clead.callbacks.lightning")


_Callback: Any = _library().Callback


class RobustValidation(_Callback):
    """Measure clean and robust accuracy after each validation of a Lightning ``Trainer``, and keep the best weights.

    They are logged as ``val_clean_accuracy`` and ``val_robust_accuracy``, of masks also ``val_clean_miou`` and ``val_robust_miou``,
    so that ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them. The best robust accuracy so far is part of checkpoints.

    Args:
        data: batches of images in [0, 1] and labels; None: the trainer's (first) validation loader.
        module: name of the classifier inside the LightningModule, such as ``"net"``; None: the LightningModule itself.
        **options: of ``clead.callbacks.validation.Validation``: eps, norm, steps, images, seed, best.
    """

    def __init__(self, data: Any = None, *, module: str | None = None, **options: Any) -> None:
        super().__init__()
        self.data, self.module = data, module
        self.validation = Validation(**options)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, log and keep; not in Lightning's sanity check."""
        if trainer.sanity_checking:
            return
        data = self.data
        if data is None:
            loaders = trainer.val_dataloaders
            data = loaders[0] if isinstance(loaders, list | tuple) else loaders
        model = self._classifier(pl_module)
        accuracies = self.validation.measure(model, data)
        logged = {f"val_{name}": value for name, value in accuracies.items()}
        pl_module.log_dict(logged, prog_bar=True, sync_dist=True)  # each process has measured the same images
        self.validation.keep(model, accuracies, write=trainer.is_global_zero)

    def _classifier(self, pl_module: nn.Module) -> nn.Module:
        if self.module is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            known = ", ".join(name for name, _ in pl_module.named_children())
            raise UserError(f"module: the LightningModule has no {self.module!r}; give one of {known}") from None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"best": self.validation.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self.validation.best = state_dict["best"]
