"""Models split into features and classifier: the one parent of every trained model, and its two kinds."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clead.errors import UserError, did_you_mean
from clead.models.heads import ProjectionHead
from clead.models.modes import attack_mode
from clead.models.seeding import seeded

Observer = Callable[[Tensor, tuple[Tensor, Tensor]], None]
Join = Callable[[Tensor], Tensor]


class SplitModel(nn.Module, ABC):
    """f(x) = g(e(x)): an encoder e and a linear classifier g; in training also a projection p.

    x: (B, C, H, W) float in [0, 1] -> features h = e(x), (B, D), and logits g(h), (B, K). Normalisation is
    part of the model.

    Attributes:
        num_classes: K.
        feature_dim: D.
        projection: p, or None; see ``add_projection``.
        whole: False where processes share the weights out, so that none has all of them outside of a forward.
    """

    projection: nn.Module | None

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.projection = None
        self.whole = True
        self._observers: list[Observer] = []
        self._compiled: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self._join: Join | None = None

    @abstractmethod
    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and logits (B, K)."""

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return h = e(x), (B, D), and g(h), (B, K), from one forward pass."""
        outputs = (self._compiled or self._split)(x)
        for observer in self._observers:
            observer(x, outputs)
        return outputs if self._join is None else (self._join(outputs[0]), self._join(outputs[1]))

    @contextmanager
    def joined(self, join: Join | None) -> Generator[None, None, None]:
        """Let outputs go through ``join``, which adds those of other processes (``clead.distributed``); None: leave them."""
        before, self._join = self._join, join
        try:
            yield
        finally:
            self._join = before

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, K)."""
        return self.features_and_logits(x)[1]

    def features(self, x: Tensor) -> Tensor:
        """Return the features h = e(x), (B, D)."""
        return self.features_and_logits(x)[0]

    def embedding(self, features: Tensor) -> Tensor:
        """Return z = p(h) / ‖p(h)‖₂ (Chen et al. 2020, arXiv:2002.05709, sec. 2.1).

        features: (B, D) of any float type -> (B, d) of unit length, in the projection's own precision
            (float32) even under autocast. Raises RuntimeError without a projection.
        """
        if self.projection is None:
            raise RuntimeError(
                "this model has no projection head; call model.add_projection(dim=128) before embedding()"
            )
        with torch.autocast(features.device.type, enabled=False):
            projected = self.projection(features.to(next(self.projection.parameters()).dtype))
            return functional.normalize(projected, dim=1)

    def add_projection(self, dim: int = 128, hidden: int | None = None, *, seed: int = 0) -> None:
        """Add, or replace, the projection head D -> ``hidden`` (None: D) -> ``dim``, drawn from ``seed``."""
        with seeded(seed):
            head = ProjectionHead(self.feature_dim, dim, hidden)
        self.projection = head.to(next(self.parameters()).device).train(self.training)

    def drop_projection(self) -> None:
        """Remove the projection head; the classifier stays as it is."""
        self.projection = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward in place by ``torch.compile``, ``features_and_logits`` included."""
        self._compiled = torch.compile(self._split, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy (of weights for averaging, say) must neither run the original's compiled forward nor report
        # to its observers.
        return {**super().__getstate__(), "_observers": [], "_compiled": None, "_join": None}


class Classifier(SplitModel):
    """A model of this package: normalisation, an encoder that ends in (B, D), and a linear classifier."""

    def __init__(self, normalize: nn.Module, encoder: nn.Module, classifier: nn.Linear) -> None:
        super().__init__(classifier.out_features, classifier.in_features)
        self.normalize = normalize
        self.encoder = encoder
        self.classifier = classifier

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(self.normalize(x))
        return features, self.classifier(features)


class _Kept(threading.local):
    """Where the final layer of a running adapted model leaves its input: one place per thread."""

    def __init__(self) -> None:
        # Not class attributes: torch.compile guards on what each thread's own dictionary holds.
        self.features: Tensor | None = None
        self.wanted = False


_KEPT = _Kept()


def _keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if _KEPT.wanted and inputs:
        _KEPT.features = inputs[0]


class AdaptedModel(SplitModel):
    """Any user's module, kept intact: its final ``nn.Linear`` maps the features to the logits.

    Args:
        module: takes x, (B, C, H, W) float in [0, 1], and returns logits, (B, K).
        sample_shape: (C, H, W), for one dry run in evaluation mode.
        num_classes: K of the data; None: as many as the module has.
        classifier: the name of the final linear layer inside ``module``, such as ``"fc"``; None: found by the
            dry run.
        normalize: a layer before the module; None: pixels go in as they are.

    ``AdaptedModel.module.state_dict()`` has the module's own keys. Raises UserError if the module fails on
    that shape, does not return (B, K) logits of the right K, or if no linear layer makes them.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> adapted = AdaptedModel(net, sample_shape=(1, 2, 2))
    >>> adapted.classifier_name, adapted.feature_dim, adapted.num_classes
    ('3', 8, 3)
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        sample_shape: tuple[int, int, int],
        num_classes: int | None = None,
        classifier: str | None = None,
        normalize: nn.Module | None = None,
    ) -> None:
        name, linear, logits = _find_classifier(module, sample_shape, classifier)
        if num_classes is not None and logits.shape[1] != num_classes:
            raise UserError(
                f"{type(module).__name__} returns {logits.shape[1]} logits per image but the data has "
                f"{num_classes} classes; give its final layer {name!r} {num_classes} outputs"
            )
        super().__init__(logits.shape[1], linear.in_features)
        self.classifier_name = name
        self.normalize = nn.Identity() if normalize is None else normalize
        self.module = module
        linear.register_forward_pre_hook(_keep)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nested = _KEPT.wanted  # an adapted model inside an adapted one: the outer reads, and clears, after it
        _KEPT.wanted = True
        try:
            logits = self.module(self.normalize(x))
            features = _KEPT.features
        finally:
            if not nested:
                _KEPT.wanted, _KEPT.features = False, None
        if features is None:
            raise RuntimeError(
                f"the final layer {self.classifier_name!r} did not run in this forward pass; has it been replaced?"
            )
        return features, logits


def _find_classifier(
    module: nn.Module, sample_shape: tuple[int, int, int], classifier: str | None
) -> tuple[str, nn.Linear, Tensor]:
    """Run ``module`` once on two images; return its final layer's name, that layer, and the logits."""
    kind = type(module).__name__
    layers = dict(module.named_modules())
    if classifier is not None and classifier not in layers:
        linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        raise UserError(f"{kind} has no layer {classifier!r} (classifier); {did_you_mean(classifier, linears)}")
    if classifier is not None and not isinstance(layers[classifier], nn.Linear):
        raise UserError(
            f"layer {classifier!r} of {kind} (classifier) must be an nn.Linear, got {type(layers[classifier]).__name__}"
        )

    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(output, Tensor):
            calls.append((layer, inputs[0], output))

    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    handles = [layer.register_forward_hook(note) for layer in layers.values() if isinstance(layer, nn.Linear)]
    try:
        with seeded(0), attack_mode(module), torch.no_grad():
            logits = module(torch.rand(2, *sample_shape).to(weight))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{kind} fails on images of shape {tuple(sample_shape)}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    if not isinstance(logits, Tensor):
        raise UserError(
            f"{kind} must return a tensor of logits (B, K), got a {type(logits).__name__}; "
            "wrap it to return logits only"
        )
    if logits.ndim != 2 or len(logits) != 2:
        raise UserError(f"{kind} must return logits (B, K), got shape {tuple(logits.shape)} for 2 images")
    names = {layer: name for name, layer in layers.items()}
    for layer, features, output in reversed(calls):
        chosen = classifier is None or layer is layers[classifier]
        if chosen and features.ndim == 2 and output.shape == logits.shape and torch.equal(output, logits):
            assert isinstance(layer, nn.Linear)
            return classifier or names[layer], layer, logits
    if classifier is not None:
        raise UserError(
            f"the output of layer {classifier!r} (classifier) is not what {kind} returns; "
            "it must return that layer's raw output, without softmax or scaling"
        )
    raise UserError(
        f"found no nn.Linear in {kind} whose output is the logits it returns; "
        "name it (--model.classifier, in Python classifier=...), and return its raw output, without softmax"
    )


def adapt(
    module: nn.Module,
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int | None = None,
    classifier: str | None = None,
) -> SplitModel:
    """Return ``module`` as a SplitModel: unchanged if it is one, else as an ``AdaptedModel`` (see there)."""
    if not isinstance(module, SplitModel):
        return AdaptedModel(module, sample_shape=sample_shape, num_classes=num_classes, classifier=classifier)
    if num_classes is not None and module.num_classes != num_classes:
        raise UserError(f"the model has {module.num_classes} classes but the data has {num_classes}")
    return module


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what is deployed: a contiguous CPU copy of the state dict without the projection head."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith("projection.")
    }
