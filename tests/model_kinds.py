"""A small sample of each kind of model that is evaluated, trained or refused; docs/reference/kinds.md lists them.

A kind is a function that makes of ``Net``, whose figures are known, another module that computes the same.
"""

from __future__ import annotations

import collections
import copy
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGES = (3, 8, 8)


class Net(nn.Module):
    """The model that all kinds are made of: 3 classes, or ``classes``."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten())
            self.fc = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(x))


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Args:
        name: what a user would call it.
        build: makes it.
        reference: computes the same as a plain module: the flags of both must be equal.
        says: a part of what is noted in the record, or of the error.
        refused: whether it is not evaluated.
        trained: whether adversarial training takes it; None: not tried.
        suite: of the evaluation.
        about: what the program does, for the docs.
    """

    name: str
    build: Callable[[], Any]
    reference: Callable[[], nn.Module] = Net
    says: str = ""
    refused: bool = False
    trained: bool | None = None
    suite: str = "pgd"
    about: str = "evaluated as it is"


KINDS: list[Kind] = []


def kind(name: str, about: str = "evaluated as it is", **what: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Return a decorator that adds a builder to ``KINDS``."""

    def decorate(build: Callable[[], Any]) -> Callable[[], Any]:
        KINDS.append(Kind(name, build, about=about, **what))
        return build

    return decorate


def returning(change: Callable[[nn.Module, Tensor], Any], classes: int = 3) -> nn.Module:
    """Return a ``Net`` whose forward is ``change(net, x)``."""

    class Changed(Net):
        def forward(self, x: Tensor) -> Any:
            return change(self, x)

    return Changed(classes)


def plain(net: nn.Module, x: Tensor) -> Tensor:
    """Return what ``Net`` returns."""
    return Net.forward(net, x)


RECOGNISED = "the logits are recognised, and it is said"


@kind("an object with `.logits`, as of transformers", RECOGNISED, says="'logits' is taken", trained=True)
def with_logits() -> nn.Module:
    return returning(lambda net, x: types.SimpleNamespace(loss=None, logits=plain(net, x), hidden=(x, x)))


@kind("a dictionary with `logits` or `out`", RECOGNISED, says="'out' is taken", trained=True)
def dictionary() -> nn.Module:
    return returning(lambda net, x: {"out": plain(net, x), "aux": plain(net, x)})


@kind("a tuple with one tensor (B, K)", RECOGNISED, says="'1' is taken", trained=True)
def pair() -> nn.Module:
    return returning(lambda net, x: (x, plain(net, x)))


@kind("nested outputs", RECOGNISED, says="'1.scores' is taken")
def nested() -> nn.Module:
    return returning(lambda net, x: [x, {"scores": plain(net, x), "mask": x[:, 0]}])


@kind(
    "a tuple with several tensors (B, K)",
    "refused: `--model.output INDEX` names the logits",
    says="several of them can be the logits",
    refused=True,
)
def ambiguous() -> nn.Module:
    return returning(lambda net, x: (plain(net, x), -plain(net, x)))


@kind(
    "auxiliary outputs in train mode, as of GoogLeNet and Inception",
    "the main output is trained, and it is said",
    trained=True,
)
def auxiliary() -> nn.Module:
    outputs = collections.namedtuple("outputs", "logits aux")
    return returning(lambda net, x: outputs(plain(net, x), plain(net, x)) if net.training else plain(net, x))


@kind("auxiliary outputs in a plain tuple", "the first of equal shape is trained, and it is said", trained=True)
def auxiliary_tuple() -> nn.Module:
    return returning(lambda net, x: (plain(net, x), -plain(net, x)) if net.training else plain(net, x))


def two_logits() -> nn.Module:
    """Return a user's own way to make two logits of one."""

    def both(net: nn.Module, x: Tensor) -> Tensor:
        z = plain(net, x)
        return torch.cat([0 * z, z], 1)

    return returning(both, 1)


ONE = "taken as the two logits [0, z], and it is said"


@kind("one logit, (B, 1)", ONE, reference=two_logits, says="one logit z per image", trained=True)
def one_logit() -> nn.Module:
    return Net(1)


@kind("one logit, (B,)", ONE, reference=two_logits, says="one logit z per image", trained=True)
def one_flat_logit() -> nn.Module:
    return returning(lambda net, x: plain(net, x).squeeze(1), 1)


@kind("one logit, squeezed to a number for one image", ONE, reference=two_logits, says="one logit z per image")
def squeezed() -> nn.Module:
    return returning(lambda net, x: plain(net, x).squeeze(), 1)


@kind("logits (B, K, 1, 1)", trained=True)
def spatial() -> nn.Module:
    return returning(lambda net, x: plain(net, x)[:, :, None, None])


@kind("logits per pixel", "refused: average over the pixels", says="z.mean((2, 3))", refused=True)
def segmentation() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


@kind("logits per token", "refused: choose or average", says="z.mean(1)", refused=True)
def tokens() -> nn.Module:
    return returning(lambda net, x: plain(net, x)[:, None].expand(-1, 5, -1))


@kind("class numbers instead of logits", "refused", says="the values before argmax", refused=True)
def decisions() -> nn.Module:
    return returning(lambda net, x: plain(net, x).argmax(1))


@kind("probabilities", "evaluated; a check of gradient masking and a note on training say it", trained=True)
def probabilities() -> nn.Module:
    return returning(lambda net, x: plain(net, x).softmax(1))


KINDS[-1] = Kind(**{**vars(KINDS[-1]), "reference": probabilities})


@kind("log-probabilities, as of the MNIST example", "methods without features train it", trained=True)
def log_probabilities() -> nn.Module:
    return returning(lambda net, x: plain(net, x).log_softmax(1))


KINDS[-1] = Kind(**{**vars(KINDS[-1]), "reference": log_probabilities})


@kind("a forward that writes into its input", "each forward gets a copy", trained=True)
def in_place() -> nn.Module:
    return returning(lambda net, x: plain(net, x.mul_(2).div_(2)))


@kind("a forward that writes into its input where no gradient is asked for", "each forward gets a copy", trained=True)
def in_place_without_gradient() -> nn.Module:
    return returning(lambda net, x: plain(net, x if x.requires_grad else x.sub_(0.5).add_(0.5).clamp_(0, 1)))


@kind("an in-place activation on the input itself", "each forward gets a copy", trained=True)
def in_place_relu() -> nn.Module:
    return returning(lambda net, x: plain(net, nn.functional.relu(x, inplace=True)))


class Cast(nn.Module):
    """A module in another type, cast by hand."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = Net().to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x.to(self.dtype))
        return logits if self.dtype == torch.float64 else logits.float()


for _dtype in (torch.float64, torch.float16, torch.bfloat16):
    _name = str(_dtype).removeprefix("torch.")
    KINDS.append(
        Kind(
            f"weights in {_name}",
            lambda dtype=_dtype: Net().to(dtype),
            reference=lambda dtype=_dtype: Cast(dtype),
            says=f"weights in {_name}",
            trained=None if _dtype == torch.float16 else True,
            about="images are cast to it, and it is said"
            + ("" if _dtype == torch.float64 else "; logits become float32"),
        )
    )


@kind("lazy layers", "a dry run gives them their shapes first", trained=True)
def lazy() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    return net


KINDS[-1] = Kind(**{**vars(KINDS[-1]), "reference": lazy})


@kind("TorchScript, scripted", trained=True)
def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(*Net().body, Net().fc))


@kind("TorchScript, traced")
def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Net().eval(), torch.rand(2, *IMAGES))


@kind("`torch.compile`d", "the module inside is evaluated", trained=True)
def compiled() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(Net())


@kind("`DataParallel`", "the module inside is evaluated", trained=True)
def parallel() -> nn.Module:
    return nn.DataParallel(Net())


@kind("a graph of `torch.fx`", trained=True)
def graph() -> nn.Module:
    return torch.fx.symbolic_trace(Net())


@kind("`torch.export`", "refused: give `program.module()`", says="give program.module()", refused=True)
def exported() -> Any:
    return torch.export.export(Net().eval(), (torch.rand(2, *IMAGES),))


@kind("`program.module()` of `torch.export`")
def exported_module() -> nn.Module:
    batch = torch.export.Dim("batch")
    program = torch.export.export(Net().eval(), (torch.rand(2, *IMAGES),), dynamic_shapes=({0: batch},))
    return program.module()


@kind("quantised", "no gradient: `--eval.suite black_box`", says="use --eval.suite black_box", refused=True)
def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})


KINDS.append(Kind("quantised, by queries", quantised, reference=quantised, suite="black_box", says="no gradient"))


@kind("weights made in inference mode")
def inference() -> nn.Module:
    with torch.inference_mode():
        return Net()


@kind("frozen weights", trained=True)
def frozen() -> nn.Module:
    net = Net()
    net.body.requires_grad_(False)
    return net


class Buffers(nn.Module):
    """A ``Net`` whose weights are buffers."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        for name, value in net.named_parameters():
            self.register_buffer(name.replace(".", "_"), value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.conv2d(x, self.body_0_weight, self.body_0_bias, 2, 1).relu().flatten(1)
        return nn.functional.linear(h, self.fc_weight, self.fc_bias)


@kind("no parameters, buffers only", "evaluated; training refuses it", trained=False)
def buffers() -> nn.Module:
    return Buffers()


@kind("`weight_norm`, which cannot be deep-copied", "trained, with EMA too", trained=True)
def weight_norm() -> nn.Module:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.fc)
    return net


KINDS[-1] = Kind(**{**vars(KINDS[-1]), "reference": weight_norm})


@kind("a `train()` that keeps batch-norm frozen", trained=True)
def frozen_norm() -> nn.Module:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.body.eval()
            return self

    return Frozen()


@kind("a counter among the buffers", trained=True)
def counting() -> nn.Module:
    def count(net: nn.Module, x: Tensor) -> Tensor:
        net.calls += 1
        return plain(net, x)

    net = returning(count)
    net.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    return net


@kind("a cosine head without nn.Linear", "methods without features train it", trained=True)
def cosine() -> nn.Module:
    def head(net: nn.Module, x: Tensor) -> Tensor:
        h = net.body(x)
        return 16 * nn.functional.normalize(h) @ nn.functional.normalize(net.fc.weight).T

    return returning(head)


KINDS[-1] = Kind(**{**vars(KINDS[-1]), "reference": cosine})


@kind(
    "images that are detached",
    "refused: `--eval.suite black_box`",
    says="gives no gradient",
    refused=True,
    trained=False,
)
def detached() -> nn.Module:
    return returning(lambda net, x: plain(net, x.detach()))


@kind(
    "images that are detached, beside a tensor with a gradient",
    "refused: `--eval.suite black_box`",
    says="no gradient",
    refused=True,
)
def detached_scale() -> nn.Module:
    scale = torch.ones(1, requires_grad=True)
    return returning(lambda net, x: plain(net, x.detach()) * scale)


@kind(
    "a forward under `no_grad`",
    "refused: `--eval.suite black_box`",
    says="gives no gradient",
    refused=True,
    trained=False,
)
def without_gradient() -> nn.Module:
    return returning(torch.no_grad()(plain))


KINDS.append(Kind("a forward under `no_grad`, by queries", without_gradient, suite="black_box", says="no gradient"))


@kind("rounding, whose gradient is 0 everywhere", "evaluated, and it is said", says="is 0 everywhere")
def rounding() -> nn.Module:
    return returning(lambda net, x: plain(net, (x * 15).round() / 15))


KINDS[-1] = Kind(**{**vars(KINDS[-1]), "reference": rounding})


def raising(error: BaseException) -> Callable[[], nn.Module]:
    """Return a builder of a module whose forward raises ``error``."""

    def fail(net: nn.Module, x: Tensor) -> Any:
        raise copy.copy(error)

    return lambda: returning(fail)


for _error in (
    SystemExit(0),
    StopIteration(),
    GeneratorExit(),
    RecursionError("deep"),
    AssertionError("no"),
    KeyError("k"),
):
    KINDS.append(
        Kind(
            f"a forward that raises {type(_error).__name__}",
            raising(_error),
            says=f"fails on images of shape (3, 8, 8): {type(_error).__name__}",
            refused=True,
            trained=False,
            about="refused in one line, exit code 2",
        )
    )


@kind("a forward that fails in train mode only", "evaluated; training refuses it", trained=False)
def failing_in_training() -> nn.Module:
    def fail(net: nn.Module, x: Tensor) -> Tensor:
        if net.training:
            raise RuntimeError("only for evaluation")
        return plain(net, x)

    return returning(fail)
