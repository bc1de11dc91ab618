"""Models as people have them: the kinds of ``model_kinds.py``, what goes in and comes out, and what an attack may return."""

from __future__ import annotations

import json
import logging
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import clead
from clead import api
from clead.attacks.runner import AttackError, image_gradient, run_attack
from clead.config import load_recipe
from clead.errors import UserError
from clead.interfaces import ImageSet, Splits
from clead.models.external import ExternalModel
from clead.models.split import adapt, copied, weights
from clead.threats.linf import Linf
from clead.weights.files import fingerprint
from model_kinds import (
    IMAGES,
    KINDS,
    Kind,
    Net,
    ambiguous,
    compiled,
    cosine,
    log_probabilities,
    one_logit,
    plain,
    returning,
    two_logits,
)

QUICK: dict[str, Any] = {"check_images": 0, "curve_points": 0, "steps": 3, "gallery": 0}


def images(n: int = 12) -> Tensor:
    return torch.rand(n, *IMAGES, generator=torch.Generator().manual_seed(0))


def labels(model: nn.Module, x: Tensor) -> Tensor:
    """Return what ``model`` takes images for, one of them made wrong."""
    with torch.no_grad():
        logits = ExternalModel(model)(x)
    y = logits.argmax(1)
    y[0] = (y[0] + 1) % logits.shape[1]
    return y


def evaluate(model: Any, x: Tensor, y: Tensor, **how: Any) -> Any:
    return clead.evaluate(model, x, y, eps="2/255", **{"suite": "pgd", **QUICK, **how})


@pytest.mark.slow
@pytest.mark.parametrize("sample", KINDS, ids=[sample.name for sample in KINDS])
def test_each_kind_is_evaluated_right_or_refused_in_one_line(sample: Kind):
    x = images()
    torch.manual_seed(0)
    reference = sample.reference()
    if "lazy" in sample.name:  # the same weights for both
        reference(x)
        model = copied(reference)
    else:
        model = sample.build()
    y = torch.zeros(len(x), dtype=torch.long) if sample.refused else labels(reference.eval(), x)
    given = x.clone()
    if sample.refused:
        with pytest.raises(UserError) as caught:
            evaluate(model, x, y)
        assert sample.says in str(caught.value) and "\n" not in str(caught.value)
        return
    record = evaluate(model, x, y, suite=sample.suite)
    expected = evaluate(reference, x, y, suite=sample.suite)
    assert (record.clean_flags, record.robust_flags) == (expected.clean_flags, expected.robust_flags)
    assert record.clean_accuracy == (len(x) - 1) / len(x) and 0 <= record.robust_accuracy < 1
    assert torch.equal(x, given)
    assert not sample.says or any(sample.says in note for note in record.notes), record.notes


def splits(classes: int) -> Splits:
    def part(n: int, seed: int) -> ImageSet:
        generator = torch.Generator().manual_seed(seed)
        return ImageSet(
            torch.randint(0, 256, (n, *IMAGES), generator=generator, dtype=torch.uint8), torch.arange(n) % classes
        )

    return Splits(part(24, 0), part(6, 1), part(6, 2), tuple("abc"[:classes]), "fingerprint")


def train(model: nn.Module, out: Any, method: str = "pgd-at", *extra: str, classes: int = 3) -> Any:
    config = load_recipe(
        f"cifar10-small-{method}",
        ["--data.batch_size", "8", "--train.budget", "4", "--train.validate_images", "6", *extra],
    )
    return api.train(config, model=model, data=splits(classes), out=out, show=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sample", [s for s in KINDS if s.trained is not None], ids=[s.name for s in KINDS if s.trained is not None]
)
def test_each_kind_is_trained_or_refused_before_anything_is_written(sample: Kind, tmp_path):
    model, out = sample.build(), tmp_path / "run"
    classes = 2 if "one logit" in sample.name else 3
    if not sample.trained:
        with pytest.raises(UserError) as caught:
            train(model, out, classes=classes)
        assert "\n" not in str(caught.value) and not out.exists()
        return
    run = train(model, out, classes=classes)
    assert run.outcome.steps >= 1
    x = images(4)
    with torch.no_grad():
        logits = run.model(x)
    assert logits.shape == (4, classes) and torch.isfinite(logits).all()
    if "compile" not in sample.name and "lazy" not in sample.name:
        again = clead.load(out, model=sample.build())
        with torch.no_grad():
            torch.testing.assert_close(again(x), logits)


@pytest.mark.parametrize("extra", [("--train.ema", "0.9"), ("--train.awp", "0.005")])
@pytest.mark.parametrize("name", ["`weight_norm`, which cannot be deep-copied", "weights in bfloat16", "lazy layers"])
def test_odd_models_are_averaged_and_perturbed(name, extra, tmp_path):
    sample = next(sample for sample in KINDS if sample.name == name)
    assert train(sample.build(), tmp_path / "run", "pgd-at", *extra).outcome.steps >= 1


def test_methods_of_features_name_the_layers_to_choose_from(tmp_path):
    for model, says in (
        (log_probabilities(), "one of: fc (D = 128)"),
        (cosine(), "put what does into a module of its own"),
    ):
        with pytest.raises(UserError, match="method clead needs the features") as caught:
            train(model, tmp_path / "run", "clead")
        assert says in str(caught.value) and not (tmp_path / "run").exists()
    named = adapt(log_probabilities(), sample_shape=IMAGES, classifier="fc")
    assert named.has_features and named.feature_dim == 128
    assert train(named, tmp_path / "named", "clead").outcome.steps >= 1
    adapted = adapt(cosine(), sample_shape=IMAGES)
    assert not adapted.has_features and adapted.num_classes == 3


class Norm(nn.Module):
    """A network with batch-norm, which needs two images in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_batch_norm_and_one_image_per_batch_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="in train mode: ValueError.*set --data.batch_size to 2 or more"):
        train(Norm(), tmp_path / "run", "pgd-at", "--data.batch_size", "1")
    assert not (tmp_path / "run").exists()


def test_the_output_is_named_where_it_is_not_clear():
    x = images()
    y = labels(Net(), x)
    expected = evaluate(Net(), x, y)
    assert evaluate(ambiguous(), x, y, output=0).robust_flags == expected.robust_flags
    negative = evaluate(ambiguous(), x, (-Net()(x)).argmax(1), output="1")
    assert negative.clean_accuracy == 1
    assert evaluate(ambiguous(), x, y, output=0).model.fingerprint == expected.model.fingerprint
    with pytest.raises(UserError, match="returns no 'aux', but 0 .*, 1 .*; give one of these names"):
        evaluate(ambiguous(), x, y, output="aux")


def test_a_wrapped_model_has_the_fingerprint_and_print_of_the_module():
    net = Net()
    wrapped = ExternalModel(net)
    assert fingerprint(weights(wrapped)) == fingerprint(weights(net)) and repr(wrapped) == repr(net)
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert fingerprint(weights(ExternalModel(compiled()))) == fingerprint(weights(net))
    assert fingerprint(weights(ExternalModel(nn.DataParallel(net)))) == fingerprint(weights(net))


def test_notes_are_said_once(caplog):
    x, model = images(), one_logit()
    y = labels(model, x)
    caplog.clear()
    fresh = one_logit()
    with caplog.at_level(logging.WARNING, "clead"):
        for _ in range(2):
            clead.attacks.pgd(fresh, x, y, eps="2/255", steps=2)
            evaluate(fresh, x, y)
    assert caplog.text.count("one logit z per image") == 1


VIEWS = {
    "requires a gradient": lambda x: x.clone().requires_grad_(),
    "not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "name", ["pgd", "fgsm", "apgd", "square", "fab", "fmn", "deepfool", "cw", "mi_fgsm", "eot_pgd"]
)
def test_no_attack_changes_the_images_and_all_stay_in_the_ball(name, view):
    """The model divides its input in place: without a copy, images come back that are hundreds of grey values away."""
    model = returning(lambda net, x: plain(net, x.sub_(0.5).div_(0.25)))
    reference = returning(lambda net, x: plain(net, (x - 0.5) / 0.25))
    x, few = VIEWS[view](images(4)), {"square": {"queries": 20}, "eot_pgd": {"draws": 2, "steps": 3}, "fgsm": {}}
    with torch.no_grad():
        y = reference(x).argmax(1)
    given, truth = x.detach().clone(), y.clone()
    norm = "l2" if name in ("deepfool", "cw") else "linf"
    how = few.get(name, {"steps": 3})
    x_adv = getattr(clead.attacks, name)(model, x, y, eps=0.05, norm=norm, **how)
    assert torch.equal(x.detach(), given) and torch.equal(y, truth)
    size = (x_adv - given).flatten(1).norm(dim=1, p=2 if norm == "l2" else torch.inf)
    assert size.max() <= 0.05 + 1e-5 and x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad
    torch.testing.assert_close(x_adv, getattr(clead.attacks, name)(reference, x, y, eps=0.05, norm=norm, **how))


def test_inference_tensors_are_attacked():
    with torch.inference_mode():
        x, y = images(3), torch.tensor([0, 1, 2])
        x_adv = clead.attacks.pgd(Net(), x, y, eps=0.05, steps=2)
    assert (x_adv - x).abs().max() <= 0.05 + 1e-6


class Shift:
    """Moves all pixels by ``size`` times eps."""

    norms = ("linf",)

    def __init__(self, size: float) -> None:
        self.size = size

    def __call__(self, objective: Any, x: Tensor, threat: Any, *, generator: Any = None) -> Tensor:
        return x.add_(self.size * threat.eps)  # in place, too


def test_an_attack_outside_the_ball_or_the_box_is_an_error_that_names_it():
    x, y, threat = torch.full((2, *IMAGES), 0.5), torch.tensor([0, 1]), Linf(eps=0.1)
    inside = run_attack(Shift(1.0), Net(), x, y, threat)
    torch.testing.assert_close(inside, torch.full_like(x, 0.6))
    assert (x == 0.5).all()
    with pytest.raises(AttackError, match=r"Shift left the threat set on 2 of 2 images: image 0 is 0.1001.*eps 0.1"):
        run_attack(Shift(1.001), Net(), x, y, threat)
    with pytest.raises(AttackError, match=r"pixels in \[1.05, 1.05\]"):
        run_attack(Shift(1.0), Net(), torch.full_like(x, 0.95), y, threat)
    with pytest.raises(AttackError, match="must return images of shape"):
        run_attack(lambda objective, x, threat, generator: x[:1], Net(), x, y, threat)


def test_a_nan_gradient_at_one_image_costs_that_image_only(caplog):
    def root(net: nn.Module, x: Tensor) -> Tensor:
        """Add 0: the root's slope at 0 is infinite, and 0·∞ is NaN, at dark images only."""
        mean = x.mean((1, 2, 3))[:, None]
        return plain(net, x) + 0 * torch.where(mean < 0.08, 0 * mean, mean).sqrt()

    x, model = images(10).clamp(0.1, 1), returning(root)
    x[3] = 0.05
    y = Net()(x).argmax(1)
    record = evaluate(model, x, y)
    expected = evaluate(Net(), x, y)
    assert record.clean_accuracy == 1 and not record.robust_flags[3] and record.attacks[0].lost == [3]
    assert [flag for i, flag in enumerate(record.robust_flags) if i != 3] == [
        flag for i, flag in enumerate(expected.robust_flags) if i != 3
    ]
    assert any("NaN or infinite at images [3], which count as not robust" in note for note in record.notes)
    assert json.loads(record.model_dump_json())["attacks"][0]["lost"] == [3]
    caplog.clear()
    x_adv = clead.attacks.pgd(model, x, y, eps="2/255", steps=3)
    assert x_adv.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [3]
    assert "to the images [3] is NaN or infinite" in caplog.text
    with pytest.raises(UserError, match="so the attack says nothing"):
        evaluate(model, x[3:4].expand(4, -1, -1, -1), y[3:4].expand(4))


def test_a_gradient_is_asked_of_autograd():
    x = images(2)
    assert image_gradient(returning(lambda net, x: plain(net, x.detach())), x) is None
    rounded = image_gradient(returning(lambda net, x: plain(net, x.round())), x)
    assert rounded is not None and not rounded.any()
    gradient = image_gradient(Net().requires_grad_(False), x)
    assert gradient is not None and gradient.any()


def test_a_model_that_fails_in_one_batch_names_its_images():
    x = images(12)
    x[9] = 1.0

    def fail(net: nn.Module, x: Tensor) -> Tensor:
        if (x == 1).flatten(1).all(1).any():
            raise SystemExit(0)
        return plain(net, x)

    with pytest.raises(UserError, match=r"SystemExit: 0 \(images 8 to 11\)"):
        evaluate(returning(fail), x, labels(Net(), x), batch_size=4)


PAIRS = [(images()[i], int(i % 3)) for i in range(12)]
LOADERS = {
    "pairs": lambda: DataLoader(PAIRS, 5),
    "triples": lambda: DataLoader([(a, b, i) for i, (a, b) in enumerate(PAIRS)], 5),
    "pixel_values": lambda: DataLoader([{"pixel_values": a, "labels": b} for a, b in PAIRS], 5),
    "image and label": lambda: DataLoader([{"image": a, "label": b} for a, b in PAIRS], 5),
    "arrays": lambda: [(a.numpy()[None], np.array([b])) for a, b in PAIRS],
    "samples": lambda: PAIRS,
    "a generator": lambda: (pair for pair in PAIRS),
    "labels of one column": lambda: DataLoader([(a, torch.tensor([b])) for a, b in PAIRS], 5),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_of_all_sorts(loader):
    x, y = torch.stack([a for a, _ in PAIRS]), torch.tensor([b for _, b in PAIRS])
    expected = evaluate(Net(), x, y)
    record = clead.evaluate(Net(), LOADERS[loader](), eps="2/255", suite="pgd", **QUICK)
    assert (record.clean_flags, record.robust_flags) == (expected.clean_flags, expected.robust_flags)


def test_pictures_are_read_as_bytes():
    x = (images(4) * 255).byte()
    pictures = [(Image.fromarray(each.permute(1, 2, 0).numpy()), k % 3) for k, each in enumerate(x)]
    expected = evaluate(Net(), x, torch.arange(4) % 3)
    assert clead.evaluate(Net(), pictures, eps="2/255", suite="pgd", **QUICK).robust_flags == expected.robust_flags


Y = torch.arange(12) % 3


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (images(), torch.eye(3)[Y], "give labels.argmax(1)"),
        (images(), torch.eye(3)[Y].long(), "give labels.argmax(1)"),
        (images(), Y.float(), "give labels.long()"),
        (images(), Y[:, None].float(), "give labels.long().squeeze(1)"),
        (images(), ["cat"] * 12, "names.index(name)"),
        (images(), Y + 1, "they count from 1: give labels - 1"),
        (images(), Y - 1, "leave out images without a label"),
        (images().permute(0, 2, 3, 1), Y, "give images.permute(0, 3, 1, 2)"),
        (images()[:, 0], Y, "x[:, None] for grey images"),
        (images().mul(255).int(), Y, "give images.float() / 255"),
        (images() * 255, Y, "divide by 255"),
        ([{"picture": images()[0], "labels": 0}], None, "got a dict with the keys picture, labels"),
        ([images()[0]], None, "batches must be pairs of images and labels, got a Tensor"),
        ([(images()[0], 0), (images()[0, :, :4], 1)], None, "images must be of one shape"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_line_to_write(x, y, says):
    with pytest.raises(UserError) as caught:
        clead.evaluate(Net(), x, y, eps="2/255", suite="pgd", **QUICK)
    assert says in str(caught.value) and "\n" not in str(caught.value)


IN_PLACE = {
    "tensor": lambda net, x: plain(net, x.sub_(0.5).div_(0.25)),
    "dictionary": lambda net, x: {"logits": plain(net, x.sub_(0.5).div_(0.25))},
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_every_measurement_gives_the_module_a_copy_and_picks_the_logits(how):
    """The same figures as the module that does neither: certification, corruptions, distances, transformations, checks."""
    from clead.attacks.spatial import Spatial
    from clead.evaluation.correctness import correct_mask
    from clead.evaluation.masking import run_checks
    from clead.measurements.certification import Certification, certify
    from clead.measurements.corruptions import evaluate_corruptions
    from clead.measurements.distances import evaluate_minimum_norm
    from clead.measurements.unrestricted import evaluate_unrestricted

    odd, usual = returning(IN_PLACE[how]), returning(lambda net, x: plain(net, (x - 0.5) / 0.25))
    data = splits(3).test

    def timeless(result: Any) -> str:
        return re.sub(r"seconds=[^ ,)]+", "", repr(result))

    measurements = [
        lambda model: timeless(certify(model, data.subset(torch.arange(2)), Certification(sigma=0.1, n=20, n0=10))),
        lambda model: timeless(evaluate_corruptions(model, data, names=("brightness",), severities=(1,))),
        lambda model: evaluate_minimum_norm(model, data, "linf", steps=5).distances,
        lambda model: timeless(evaluate_unrestricted(model, data, Spatial())),
        lambda model: [check.numbers for check in run_checks(model, images(6), torch.arange(6) % 3, Linf(eps=0.05))],
        lambda model: correct_mask(model, images(6), torch.arange(6) % 3).tolist(),
    ]
    for measure in measurements:
        assert str(measure(odd)) == str(measure(usual))


def test_a_model_that_works_in_eval_mode_only_is_checked_all_the_same():
    def fail(net: nn.Module, x: Tensor) -> Tensor:
        if net.training:
            raise RuntimeError("not in train mode")
        return plain(net, x)

    x = images(8)
    record = evaluate(returning(fail), x, labels(Net(), x), check_images=8)
    assert next(check for check in record.checks if check.name == "mode").passed is False


@pytest.mark.slow
@pytest.mark.parametrize("build", [one_logit, cosine, compiled], ids=["one logit", "cosine", "compiled"])
def test_odd_models_are_exported(build):
    from clead.export.onnx import difference, to_onnx

    model = adapt(build(), sample_shape=IMAGES).eval()
    assert difference(to_onnx(model, IMAGES), model, images(8)) < 1e-4


@dataclass(slots=True)
class Slotted:
    hidden: Tensor
    scores: Tensor


class Bare:
    __slots__ = ("scores",)

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


ANSWERS: dict[str, Any] = {
    "dataclass with slots": lambda z, x: Slotted(x, z),
    "object with slots": lambda z, x: Bare(z),
    "logits of a convolution in a dictionary": lambda z, x: {"logits": z[:, :, None, None]},
    "logits of a convolution in a tuple": lambda z, x: (z[:, :, None, None], x),
    "sparse": lambda z, x: z.to_sparse(),
}
SINGLE: dict[str, Any] = {
    "(B,) in a dictionary": lambda z, x: {"logits": z[:, 0]},
    "(B,) in an object": lambda z, x: SimpleNamespace(out=z[:, 0]),
    "(B,) in a tuple": lambda z, x: (z[:, 0], x),
    "(B, 1, 1, 1)": lambda z, x: z[:, :, None, None],
}


@pytest.mark.parametrize("how", [*ANSWERS, *SINGLE])
def test_logits_are_found_in_whatever_holds_them(how):
    single = how in SINGLE
    model = returning(lambda net, x: {**ANSWERS, **SINGLE}[how](plain(net, x), x), 1 if single else 3)
    reference = two_logits() if single else Net()
    x = images()
    y = labels(reference, x)
    record, expected = evaluate(model, x, y), evaluate(reference, x, y)
    assert (record.clean_flags, record.robust_flags) == (expected.clean_flags, expected.robust_flags)


def test_labels_of_more_classes_than_the_model_has_name_the_remedy():
    with pytest.raises(UserError, match="got 2; the model has 2 classes: give one of 3 or more"):
        evaluate(one_logit(), images(), Y)


def test_one_output_after_a_sigmoid_is_said():
    model = returning(lambda net, x: plain(net, x).sigmoid(), 1)
    record = evaluate(model, images(), Y % 2)
    assert any("as after a sigmoid" in note for note in record.notes)
    plain_logit = evaluate(one_logit(), images(), Y % 2)
    assert not any("sigmoid" in note for note in plain_logit.notes)


class Broken(torch.autograd.Function):
    """The identity, whose gradient cannot be taken."""

    error: BaseException = ValueError("no way back")

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise Broken.error


BACKWARD: dict[str, tuple[Any, BaseException | None, str]] = {
    "written in place": (
        lambda net, x: net.fc(net.body[1:](torch.sigmoid(net.body[0](x)).mul_(2))),
        None,
        "changed in place; write h = h.relu()",
    ),
    "raises": (lambda net, x: plain(net, Broken.apply(x)), ValueError("no way back"), "ValueError: no way back"),
    "exits": (lambda net, x: plain(net, Broken.apply(x)), SystemExit(0), "SystemExit: 0"),
}


@pytest.mark.parametrize("how", BACKWARD)
def test_a_gradient_that_fails_is_one_line_everywhere(how, monkeypatch, tmp_path):
    forward, error, says = BACKWARD[how]
    monkeypatch.setattr(Broken, "error", error)
    x, y, out = images(4), torch.tensor([0, 1, 2, 0]), tmp_path / "run"
    for attempt in (
        lambda: evaluate(returning(forward), x, y),
        lambda: clead.attacks.pgd(returning(forward), x, y, eps=0.1, steps=1),
        lambda: clead.attacks.fab(returning(forward), x, y, eps=0.1, steps=1),
        lambda: clead.attacks.patch(returning(forward), x, y, steps=1),
        lambda: train(returning(forward), out),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        assert f"the gradient of Changed fails: {says}" in re.sub(
            r"RuntimeError: a tensor.* is ", "", str(caught.value)
        )
        assert not out.exists()
    if how == "written in place":
        with pytest.raises(UserError, match="changed in place"):
            train(returning(forward), out, "standard")
        assert not out.exists()


def test_an_error_of_torchscript_is_its_last_line():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        model = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(5, 3)))
    with pytest.raises(UserError, match="shapes cannot be multiplied"):
        evaluate(model, images(4), Y[:4])


class Root(nn.Module):
    """The root of the pixels, whose slope at 0 is infinite, before a linear or a deep network."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            layers = [nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 3)] if deep else [nn.Linear(192, 3)]
        self.body = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sqrt())


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("name", ["fab", "mi_fgsm"])
def test_no_image_without_a_gradient_counts_as_robust_by_argmax(name, label, deep):
    """The argmax of NaN logits is class 0, which may be the label."""
    x, model = images(6) * 0.9 + 0.05, Root(deep).eval()
    x[2, 0, 0, 0] = 0
    with torch.no_grad():
        for layer in (model.body[-1],):
            layer.bias.copy_(torch.nn.functional.one_hot(torch.tensor(label), 3) - layer(model.body[:-1](x.sqrt()))[2])
    with torch.no_grad():
        y = model(x).argmax(1)
        assert y[2] == label
        x_adv = getattr(clead.attacks, name)(model, x, y, eps=0.01, steps=3)
        assert model(x_adv)[2].argmax() != label
    others = torch.arange(6) != 2
    assert (x_adv[others] - x[others]).abs().max() <= 0.01 + 1e-6


def test_a_model_that_takes_all_that_is_no_image_for_the_label_is_refused():
    model = returning(
        lambda net, x: torch.where((x.amax((1, 2, 3)) <= 1)[:, None], plain(net, x) + 0 * x[:, :1, 0, 0].sqrt(), -1.0)
    )
    x = images(6) * 0.9 + 0.05
    x[2, 0, 0, 0] = 0
    y = Net()(x).argmax(1)
    y[2] = 0
    with pytest.raises(
        AttackError, match=r"at image 2 is NaN or infinite.*leave it out: x\[torch.arange\(len\(x\)\) != 2\]"
    ):
        clead.attacks.mi_fgsm(model, x, y, eps=0.01, steps=2)


def test_evaluate_takes_how_the_model_wants_its_pixels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(9, 3, 2, 2)
    with torch.no_grad():
        y = net((255 * x.permute(0, 2, 3, 1) - 100) / 50).argmax(1)
    options: dict[str, Any] = {"suite": "pgd", "steps": 1, "check_images": 0, "curve_points": 0, "eps": 1e-6}
    record = clead.evaluate(net, x, y, input="layout=nhwc range=0..255 mean=100 std=50", **options)
    assert record.clean_accuracy == 1 and record.model.name == "Sequential"
    assert clead.evaluate(net, x, y, **options).clean_accuracy < 1
    with pytest.raises(UserError, match="layout"):
        clead.evaluate(net, x, y, input="layout=nchw2", **options)
