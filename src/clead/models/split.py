"""Models split into features and classifier: the one parent of every trained model, and its two kinds."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clead.errors import UserError, did_you_mean, out_of_memory
from clead.models.external import ExternalModel, ModelError, ModelIO, failure, io_of, materialise, unwrapped
from clead.models.modes import attack_mode
from clead.models.seeding import fork_rng
from clead.tasks.segmentation import upsampled

Observer = Callable[[Tensor, tuple[Tensor, Tensor]], None]
Join = Callable[[Tensor], Tensor]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class SplitModel(nn.Module, ABC):
    """f(x) = g(e(x)): an encoder e and a linear classifier g; in training also a projection p.

    x: (B, C, H, W) float in [0, 1] -> features h = e(x), (B, D), and logits g(h), (B, K). Normalisation is
    part of the model.

    Attributes:
        num_classes: K.
        feature_dim: D.
        projection: p, or None; see ``add_projection``.
        is_sharded: True where processes share the weights out, so that none has all of them outside of a forward.
        has_features: False where no layer is known that maps features to the logits; ``features`` are the logits then.
    """

    projection: nn.Module | None
    has_features = True

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.projection = None
        self.is_sharded = False
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
    def gathering_outputs(self, join: Join | None) -> Generator[None, None, None]:
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
            (float32) even under autocast; (B, D, h, w) -> (B, d, h, w). Raises RuntimeError without a projection.
        """
        if self.projection is None:
            raise RuntimeError(
                "this model has no projection head; call model.add_projection(dim=128) before embedding()"
            )
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(self.projection.parameters()).dtype)
            return functional.normalize(self.projection(features.movedim(1, -1)).movedim(-1, 1), dim=1)

    def add_projection(self, dim: int = 128, hidden: int | None = None, *, seed: int = 0) -> None:
        """Add, or replace, p(h) = W2 · relu(W1 · h), D -> ``hidden`` (None: D) -> ``dim``, drawn from ``seed``."""
        hidden = self.feature_dim if hidden is None else hidden
        with fork_rng(seed):
            layers = {
                "hidden": nn.Linear(self.feature_dim, hidden),
                "activation": nn.ReLU(),
                "output": nn.Linear(hidden, dim),
            }
        head = nn.Sequential(OrderedDict(layers))
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
    """A model of this package: normalisation, an encoder that ends in (B, D), and a linear classifier.

    One with a single output z is of two classes, of logits [0, z].
    """

    def __init__(self, normalize: nn.Module, encoder: nn.Module, classifier: nn.Linear) -> None:
        super().__init__(max(2, classifier.out_features), classifier.in_features)
        self.normalize = normalize
        self.encoder = encoder
        self.classifier = classifier

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(self.normalize(x))
        logits = self.classifier(features)
        return features, functional.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits


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
    """Any user's module, kept intact: the input of the layer that makes its logits are the features.

    Args:
        module: takes x, (B, C, H, W) float in [0, 1], and returns logits, (B, K), or what ``ModelIO`` can pick them out of. Logits
            of each pixel, (B, K, h, w), are upsampled to x; features are then (B, D, h', w'), what the last convolution sees.
        sample_shape: (C, H, W), for one dry run in evaluation mode.
        num_classes: K of the data; 1: one logit z, or the two logits [0, z]; None: as many as the module has.
        classifier: the name of the layer inside ``module`` that maps features (B, D) to logits, such as ``"fc"``; None: the
            ``nn.Linear`` whose output the logits are. If there is none, the model has no features (``has_features``).
        output: which of the module's outputs are the logits, see ``ModelIO``.
        normalize: a layer before the module; None: pixels go in as they are.
        new_head: whether a module of another number of logits than ``num_classes`` gets a new final layer, drawn from the global
            generator, instead of being refused; ``origin`` says so.

    ``AdaptedModel.module.state_dict()`` has the module's own keys. Raises UserError if the module fails on
    that shape, does not return (B, K) logits of the right K, or if ``classifier`` does not get (B, D) features.

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
        output: str | int | None = None,
        normalize: nn.Module | None = None,
        new_head: bool = False,
    ) -> None:
        module = unwrapped(module)
        io = io_of(module, output)
        io.per_pixel = True
        before = normalize or nn.Identity()
        name, feature_dim, logits = _find_classifier(module, io, before, sample_shape, classifier)
        origin = []
        wanted = 2 if num_classes == 1 else num_classes  # ``ModelIO`` makes two logits of one
        if new_head and num_classes is not None and logits.shape[1] != wanted:
            origin = replace_head(module, name, _sample(module, before, sample_shape), logits.shape[1], num_classes)
            name, feature_dim, logits = _find_classifier(module, io, before, sample_shape, classifier)
        if wanted is not None and logits.shape[1] != wanted:
            final = f"its final layer {name!r}" if name else "it"
            raise UserError(
                f"{type(module).__name__} returns {logits.shape[1]} logits per image but the data has "
                f"{num_classes} classes; give {final} {num_classes} outputs"
            )
        super().__init__(logits.shape[1], feature_dim)
        self.classifier_name = name
        self.has_features = name is not None
        self.origin: list[str] = origin
        self.normalize = nn.Identity() if normalize is None else normalize
        self.module = module
        self.io = io
        if name is not None:
            module.get_submodule(name).register_forward_pre_hook(_keep)

    @property
    def notes(self) -> list[str]:
        """What was decided for the user about inputs and outputs."""
        return self.io.notes

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return h = e(x), (B, D), and g(h), (B, K), from one forward pass; raises ModelError if the module fails."""
        try:
            return super().features_and_logits(x)
        except (KeyboardInterrupt, MemoryError, UserError):
            raise
        except BaseException as error:
            if out_of_memory(error):
                raise
            raise failure(self.module, x, error) from error

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nested = _KEPT.wanted  # an adapted model inside an adapted one: the outer reads, and clears, after it
        _KEPT.wanted = True
        try:
            picked = self.io.pick(self.module, self.io.answer(self.module, self.normalize(x)), x.shape[0])
            features = _KEPT.features
        finally:
            if not nested:
                _KEPT.wanted, _KEPT.features = False, None
        logits = self.io.logits(self.module, picked)
        if logits.dim() == 4:
            if logits.shape[2] > x.shape[2] or logits.shape[3] > x.shape[3]:
                raise ModelError(
                    f"{type(self.module).__name__} returns logits of {tuple(logits.shape[2:])} for images of {tuple(x.shape[2:])}; "
                    "let it return the images' size, or a smaller one, which is enlarged"
                )
            logits = upsampled(logits, x.shape[2:])
        if not self.has_features:
            return logits, logits
        if features is None:
            raise ModelError(
                f"the final layer {self.classifier_name!r} did not run in this forward pass; has it been replaced?"
            )
        return features, logits


def replace_head(module: nn.Module, name: str | None, x: Tensor, old: int, new: int) -> list[str]:
    """Give ``module`` a final layer of ``new`` outputs, drawn from the global generator, and return what must be said of it.

    timm's ``reset_classifier`` is called where there is one. Else it is the layer ``name``, or the last of its ``nn.Linear`` and
    ``nn.Conv2d`` of ``old`` outputs that runs on images ``x``. Without any, nothing changes and the list is empty.
    """
    if callable(reset := getattr(module, "reset_classifier", None)):
        reset(new)
        return [f"the head {name or 'of the network'} is new, drawn from the seed: {old} → {new} classes"]
    last: list[str] = [] if name is None else [name]

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        if getattr(layer, "out_features", getattr(layer, "out_channels", None)) == old:
            last.extend(path for path, each in names.items() if each is layer)

    names = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    handles = [layer.register_forward_hook(note) for layer in names.values()] if name is None else []
    try:
        if name is None:
            with fork_rng(0), attack_mode(module), torch.no_grad():
                module(x)
    finally:
        for handle in handles:
            handle.remove()
    layer = module.get_submodule(last[-1]) if last and last[-1] else None
    like = {"bias": getattr(layer, "bias", None) is not None}
    if isinstance(layer, nn.Linear):
        head: nn.Module = nn.Linear(layer.in_features, new, **like)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
        shape: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        head = nn.Conv2d(layer.in_channels, new, layer.kernel_size, **shape, **like)  # ty: ignore[invalid-argument-type]
    else:
        return []
    module.set_submodule(last[-1], head.to(layer.weight).train(layer.training))
    return [f"the head {last[-1]} is new, drawn from the seed: {old} → {new} classes"]


def _find_classifier(
    module: nn.Module, io: ModelIO, normalize: nn.Module, sample_shape: tuple[int, int, int], classifier: str | None
) -> tuple[str | None, int, Tensor]:
    """Run ``module`` once on two images; return the name of the layer that makes the logits, D, and the logits.

    Without such a layer the name is None, and D is the number of logits.
    """
    kind, layers = type(module).__name__, dict(module.named_modules())
    if classifier is not None and classifier not in layers:
        linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        raise UserError(f"{kind} has no layer {classifier!r} (classifier); {did_you_mean(classifier, linears)}")
    x = _sample(module, normalize, sample_shape)
    materialise(module, x)
    if classifier is not None and isinstance(module, torch.jit.ScriptModule):
        raise UserError(
            f"classifier: the layers of {kind} cannot be looked at, got {classifier!r}; leave it out, or give the Python module"
        )
    calls: list[tuple[str, nn.Module, Tensor, Any]] = []
    names = {layer: name for name, layer in layers.items()}

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            calls.append((names[layer], layer, inputs[0], output))

    def run(kind: type[nn.Module]) -> tuple[Tensor, Tensor]:
        calls.clear()
        looked_at = [layer for name, layer in layers.items() if isinstance(layer, kind) or name == classifier]
        handles = [layer.register_forward_hook(note) for layer in looked_at]
        try:
            with fork_rng(0), attack_mode(module), torch.no_grad():
                picked = io.run(module, x)
                return picked, io.logits(module, picked)
        finally:
            for handle in handles:
                handle.remove()

    picked, logits = run(nn.Linear)
    if picked.dim() == 4:
        picked, logits = run(nn.Conv2d)
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all():
        io.note(
            f"{kind} returns probabilities, as after a softmax, where logits belong: let it return the values before that"
        )
    if classifier is not None:
        seen = [(features, output) for _, layer, features, output in calls if layer is layers[classifier]]
        if len(seen) == 1 and seen[0][0].dim() == picked.dim() and _same_logits(seen[0][1], picked):
            return classifier, seen[0][0].shape[1], logits
        got = [f"{tuple(features.shape)} -> {tuple(getattr(output, 'shape', ()))}" for features, output in seen]
        raise UserError(
            f"layer {classifier!r} of {kind} (classifier) must map features (B, D) to logits, {tuple(picked.shape)}, once in a "
            f"forward of 2 images, got {', '.join(got) or 'no call'}; {_candidates(module, io, normalize, sample_shape)}"
        )
    for name, _, features, output in reversed(calls):
        if isinstance(output, Tensor) and picked.dim() == output.dim() == 4:
            output = upsampled(output, picked.shape[2:])
        same = isinstance(output, Tensor) and output.shape == picked.shape and torch.equal(output, picked)
        if same and features.dim() == picked.dim():
            return name, features.shape[1], logits
    return None, logits.shape[1], logits


def _same_logits(output: Any, picked: Tensor) -> bool:
    """Say whether a layer's output can be the logits ``picked``, (B, K), or, at another resolution, (B, K, h, w)."""
    shape = getattr(output, "shape", ())
    return shape == picked.shape or (len(shape) == picked.dim() == 4 and shape[:2] == picked.shape[:2])


def _sample(module: nn.Module, normalize: nn.Module, sample_shape: tuple[int, int, int]) -> Tensor:
    """Return two random images, the same each time, as ``module`` gets them."""
    before = next((buffer.device for buffer in normalize.buffers()), None)
    with fork_rng(0):
        x = torch.rand(2, *sample_shape)
    with torch.no_grad():
        return normalize(x.to(before)).to(next((p.device for p in module.parameters()), None))


def _candidates(module: nn.Module, io: ModelIO, normalize: nn.Module, sample_shape: tuple[int, int, int]) -> str:
    """Return the end of an error that names the layers of ``module`` that could be the classifier."""
    seen: dict[str, int] = {}
    shape: Any = None
    names = {layer: name for name, layer in module.named_modules() if name}

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = inputs[0] if inputs else None
        if isinstance(x, Tensor) and x.dim() == 2 and len(x) == 2 and getattr(output, "shape", None) == shape:
            seen[names[layer]] = x.shape[1]

    handles = []
    try:
        with fork_rng(0), attack_mode(module), torch.no_grad():
            x = _sample(module, normalize, sample_shape)
            shape = io.run(module, x).shape
            if not isinstance(module, torch.jit.ScriptModule):
                handles = [layer.register_forward_hook(note) for layer in names]
                io.run(module, x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        return "no layer maps features (B, D) to as many outputs: put what does into a module of its own, and name that"
    choice = ", ".join(f"{name} (D = {size})" for name, size in list(seen.items())[-5:])
    return f"name the layer that makes them of features (B, D), --model.classifier NAME, one of: {choice}"


def require_features(model: SplitModel, sample_shape: tuple[int, int, int], purpose: str) -> None:
    """Raise UserError if no features of ``model`` are known, naming the layers to choose from; ``purpose`` needs them."""
    if isinstance(model, AdaptedModel) and not model.has_features:
        raise UserError(
            f"{purpose} needs the features, and the logits of {type(model.module).__name__} come from no final nn.Linear; "
            f"{_candidates(model.module, model.io, model.normalize, sample_shape)}"
        )


def adapt(
    module: nn.Module,
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int | None = None,
    classifier: str | None = None,
    output: str | int | None = None,
) -> SplitModel:
    """Return ``module`` as a SplitModel: unchanged if it is one, else as an ``AdaptedModel`` (see there)."""
    if not isinstance(module, SplitModel):
        return AdaptedModel(
            module, sample_shape=sample_shape, num_classes=num_classes, classifier=classifier, output=output
        )
    if num_classes is not None and module.num_classes != num_classes:
        raise UserError(
            f"the model has {module.num_classes} classes but the data has {num_classes}; give its last layer {num_classes} outputs"
        )
    return module


def has_features(model: nn.Module) -> bool:
    """Say whether ``model`` gives features beside its logits."""
    return isinstance(model, SplitModel) and model.has_features


def wrapped(model: nn.Module, output: str | int | None = None) -> nn.Module:
    """Return ``model`` as something that can be called safely: one of this package as it is, any other as an ``ExternalModel``."""
    return model if isinstance(model, SplitModel | ExternalModel) else ExternalModel(model, output)


def copied(model: AnyModule) -> AnyModule:
    """Return a deep copy, also of a module that keeps computed tensors as attributes, as ``torch.nn.utils.weight_norm`` does.

    Raises UserError for a model that cannot be copied.
    """
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        with torch.no_grad():  # the weights of TorchScript would be computed from those of the original
            twin = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.requires_grad_(mine.requires_grad)
        return twin
    except Exception as error:
        kind, reason = type(getattr(model, "module", model)).__name__, (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{kind} cannot be copied, which training needs to measure its cost: {type(error).__name__}: {reason}; keep only "
            "parameters, buffers and plain values as its attributes"
        ) from error


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what is deployed: a contiguous CPU copy of the state dict without the projection head."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith("projection.")
    }
