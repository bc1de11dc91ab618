"""The evaluation on a model whose breaking points are known exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clead
from clead.attacks.fgsm import FGSM
from clead.attacks.pgd import PGD
from clead.config import Eval
from clead.errors import UserError
from clead.evaluation.robust import NamedAttack, Subject, accuracy_under_attack, evaluate_model, suite
from clead.interfaces import ImageSet
from clead.report.record import Record
from clead.settings import Ratio
from clead.threats.l1 import L1
from clead.threats.l2 import L2
from clead.threats.linf import Linf

EPS = 20 / 255
CLASSES = ("dark", "bright", "never")
SUBJECT = Subject(
    name="run", model="Threshold", weights="best", data="made", split="test", data_fingerprint="d", classes=CLASSES
)
QUICK = Eval(steps=5, batch_size=7, curve_points=0)


class Threshold(nn.Module):
    """Dark below 0.5, bright above: with one pixel, every norm's distance to the boundary is |x − 0.5|."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))
        self.drop = nn.Dropout(0.9)
        self.norm = nn.BatchNorm1d(1, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.slope * (self.norm(self.drop(x.flatten(1))) - 0.5)
        return torch.cat([-z, z, torch.full_like(z, -50.0)], 1)


def made() -> tuple[ImageSet, Tensor, Tensor]:
    """All 256 grey values, every tenth with a wrong label; and which are right when clean, and within EPS."""
    values = torch.arange(256, dtype=torch.uint8)
    labels = (values > 127).long()
    labels[::10] = 1 - labels[::10]
    right = torch.ones(256, dtype=torch.bool)
    right[::10] = False
    robust = right & ((values.double() / 255 - 0.5).abs() > EPS)
    return ImageSet(values.reshape(-1, 1, 1, 1), labels), right, robust


def evaluate(images: ImageSet, threat: Any = None, settings: Eval = QUICK, model: nn.Module | None = None, **kw: Any):
    return evaluate_model(
        model or Threshold(), images, threat or Linf(eps="20/255"), settings, SUBJECT, show=False, **kw
    )


@pytest.mark.parametrize("threat", [Linf(eps="20/255"), L2(eps="20/255"), L1(eps="20/255")])
def test_exactly_the_images_within_eps_of_the_boundary_break(threat):
    images, right, robust = made()
    record = evaluate(images, threat).record
    assert record.clean_flags == right.tolist()
    assert record.robust_flags == robust.tolist()
    assert record.clean_accuracy == right.double().mean().item()
    assert record.robust_accuracy == robust.double().mean().item()
    assert [part.name for part in record.attacks] == ["FGSM", "PGD-5 CE", "PGD-5 margin"]
    for part in record.attacks:
        assert part.flags == robust.tolist()
        assert EPS * 0.99 < part.largest <= EPS * (1 + 1e-5) + 1e-6
    for k, part in enumerate(record.per_class):
        chosen = images.labels == k
        assert (part.name, part.n) == (CLASSES[k], int(chosen.sum()))
        assert part.clean_accuracy == pytest.approx(right[chosen].double().mean().item())
        assert part.robust_accuracy == pytest.approx(robust[chosen].double().mean().item())
    assert len(record.per_class) == 2  # no image of the third class


def test_cost_counts_only_the_images_attacked():
    images, right, _ = made()
    record = evaluate(images).record
    share = right.double().mean().item()
    fgsm, pgd, _ = record.attacks
    assert fgsm.forwards == pytest.approx(2 * share) and fgsm.backwards == pytest.approx(share)
    assert pgd.forwards == pytest.approx((5 + 2) * share) and pgd.backwards == pytest.approx(5 * share)


def test_model_is_left_untouched():
    model = Threshold()
    model.norm.eval()
    model.slope.grad = torch.tensor(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    evaluate(made()[0], model=model, settings=replace(QUICK, curve_points=2, curve_steps=2))
    clead.evaluate(model, made()[0].images, made()[0].labels, eps="20/255", steps=2, curve_points=0)
    assert flags == [(m.training, len(m._forward_hooks)) for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.slope.requires_grad and model.slope.grad == 7
    assert torch.equal(torch.get_rng_state(), random)


def test_the_record_round_trips_through_json():
    record = evaluate(made()[0], settings=replace(QUICK, curve_points=2, curve_steps=2)).record
    assert Record.model_validate_json(record.model_dump_json()) == record
    assert record.threat.eps_text == "20/255" and record.threat.eps == EPS
    assert [part.settings["objective"] for part in record.attacks] == ["cross_entropy", "cross_entropy", "margin"]
    assert record.attacks[1].settings["steps"] == 5 and record.seed == 0


def test_bytes_and_floats_give_the_same():
    images, _, _ = made()
    floats = ImageSet(images.images.float() / 255, images.labels)
    a, b = evaluate(images), evaluate(floats)
    for part in ("clean_flags", "robust_flags", "per_class", "clean", "worst"):
        assert getattr(a.record, part) == getattr(b.record, part)
    assert all(torch.equal(a.artifacts[name], b.artifacts[name]) for name in a.artifacts)


def test_batch_size_and_order_of_the_process_do_not_change_the_verdict():
    images, _, _ = made()
    flags = [evaluate(images, settings=replace(QUICK, batch_size=n)).record.robust_flags for n in (30, 100, 1000)]
    assert flags[0] == flags[1] == flags[2]


@dataclass(frozen=True)
class Shift:
    """Not an attack on anything: brightens (or darkens) every image by eps."""

    sign: int
    times: float = 1.0

    def __call__(self, objective: Any, x: Tensor, threat: Any, *, generator: Any = None) -> Tensor:
        return (x + self.sign * self.times * threat.eps).clamp(0, 1)


class Lighten:
    """The same as settings-less callable."""

    def __call__(self, objective: Any, x: Tensor, threat: Any, *, generator: Any = None) -> Tensor:
        return (x + float(threat.eps)).clamp(0, 1)


def test_the_worst_case_is_the_and_of_the_attacks():
    images, right, robust = made()
    up, down = NamedAttack("up", Shift(1)), NamedAttack("down", Shift(-1))
    evaluation = evaluate(images, attacks=[up, down])
    record = evaluation.record
    by_up, by_down = (torch.tensor(part.flags) for part in record.attacks)
    values = images.images.flatten().double() / 255
    assert torch.equal(by_up, right & ~((values < 0.5) & (values + EPS > 0.5)))
    assert torch.equal(by_down, right & ~((values > 0.5) & (values - EPS < 0.5)))
    assert record.robust_flags == (by_up & by_down).tolist() == robust.tolist()
    assert record.robust_accuracy < min(part.robust.accuracy for part in record.attacks)
    # The pictures show the attack that broke the image, else the last one tried, and the image itself if wrong when clean.
    g = evaluate(images, attacks=[up, down], settings=replace(QUICK, gallery=256)).artifacts
    change = (g["x_adv"] - g["x"]).flatten()
    assert (change[~right] == 0).all()
    assert (change[right & ~by_up] > 0).all() and (change[right & ~by_down] < 0).all()
    assert (change[robust & (values > 0.1)] < 0).all()
    assert set(evaluation.artifacts) >= {"x", "x_adv", "labels", "probabilities", "probabilities_adv"}
    assert len(evaluation.artifacts["x"]) == QUICK.gallery
    torch.testing.assert_close(g["probabilities"].sum(1), torch.ones(256))


def test_any_callable_is_an_attack():
    record = evaluate(made()[0], attacks=[NamedAttack("lighten", Lighten())]).record
    assert record.attacks[0].settings["attack"] == "Lighten"
    assert Record.model_validate_json(record.model_dump_json()) == record


def test_an_attack_that_leaves_the_threat_set_is_caught():
    with pytest.raises(AssertionError, match="up left the threat set"):
        evaluate(made()[0], attacks=[NamedAttack("up", Shift(1, 1.01))])


def test_no_attack_is_the_clean_accuracy():
    record = evaluate(made()[0], attacks=[]).record
    assert record.robust_flags == record.clean_flags and record.attacks == []


def test_a_perturbation_that_makes_the_logits_nan_breaks_the_image():
    """argmax takes NaN for the largest: class 0 would count as robust."""

    class Brittle(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).where(x.flatten(1) * 255 % 1 < 1e-3, torch.nan)

    values = torch.arange(20, 40, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    images = ImageSet(values, torch.zeros(20, dtype=torch.long))
    record = evaluate(images, model=Brittle(), attacks=[NamedAttack("up", Shift(1, 0.99))]).record
    assert record.clean_accuracy == 1 and record.robust_accuracy == 0
    pair = accuracy_under_attack(
        Brittle(), images, Linf(eps="20/255"), Shift(1, 0.99), "margin", seed=0, device=torch.device("cpu")
    )
    assert pair == (1, 0)


def test_accuracy_under_attack_is_the_same_verdict():
    images, right, robust = made()
    pair = accuracy_under_attack(
        Threshold(), images, Linf(eps="20/255"), PGD(steps=3), "margin", seed=0, device=torch.device("cpu")
    )
    assert pair == (right.double().mean().item(), robust.double().mean().item())


@pytest.mark.parametrize("points", [1, 6])
@pytest.mark.parametrize("eps", ["8/255", "1/3", 0.9])
def test_the_curve_has_known_accuracies(points, eps):
    images, right, _ = made()
    settings = replace(QUICK, batch_size=256, fgsm=False, objectives=("margin",))
    settings = replace(settings, curve_points=points, curve_steps=3, curve_images=256)
    record = evaluate(images, Linf(eps=eps), settings).record
    radii = [point.eps for point in record.curve]
    expected = [r for k in range(1, points + 1) if (r := 2 * k / points * float(Ratio(eps))) <= 1]
    assert radii == pytest.approx(expected, rel=1e-3) and radii == sorted(radii)
    for point in record.curve:
        distance = (images.images.flatten().double() / 255 - 0.5).abs()
        clear = ((distance - point.eps).abs() > 1e-4).all()
        held = (right & (distance > point.eps)).double().mean().item()
        assert not clear or point.robust.accuracy == pytest.approx(held)
        assert Ratio(point.eps_text) == point.eps
        assert eps != "8/255" or point.eps_text.endswith("/255")


def test_the_suite_is_what_the_settings_say():
    attacks = suite(Eval(steps=7, restarts=3, objectives=("dlr",), fgsm=False))
    assert [part.name for part in attacks] == ["PGD-7×3 dlr"]
    assert attacks[0].attack == PGD(steps=7, restarts=3, keep="best") and attacks[0].objective == "dlr"
    assert suite(Eval())[0].attack == FGSM()


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x.flatten(1))


def nan_at_bright(h: Tensor) -> Tensor:
    return torch.cat([h, -h, h * 0], 1).masked_fill(h * 255 > 249.5, torch.nan)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda h: h[:, 0], "must return logits (B, K) for 7 images, got (7,)"),
        (lambda h: (h, h), "must return logits (B, K) for 7 images, got a tuple"),
        (lambda h: torch.cat([h, h], 1), "the model returns 2 logits, the data has 3 classes"),
        (nan_at_bright, "logits must be finite, got NaN or infinity for images [250, 251]"),
        (lambda h: h @ torch.ones(2, 3), "fails on images torch.float32 (7, 1, 1, 1): RuntimeError"),
    ],
)
def test_bad_logits_are_one_line(what, says):
    with pytest.raises(UserError) as caught:
        evaluate(made()[0], model=Returns(what))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_bad_images_are_one_line():
    images, _, _ = made()
    bad = [
        (ImageSet(images.images.float(), images.labels), "pixels must be in [0, 1]"),
        (ImageSet(images.images[:, 0], images.labels), "must be a float tensor (B, C, H, W)"),
        (ImageSet(images.images, images.labels + 2), "labels must be in [0, 3), got 3"),
        (ImageSet(images.images[:0], images.labels[:0]), "no image to evaluate, got 0"),
    ]
    for wrong, says in bad:
        with pytest.raises(UserError) as caught:
            evaluate(wrong)
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_evaluate_of_the_python_api():
    images, right, robust = made()
    common: dict[str, Any] = {"eps": "20/255", "steps": 3, "curve_points": 2, "curve_steps": 2, "name": "mine"}
    record = clead.evaluate(Threshold(), images.images, images.labels, **common)
    assert record.clean_flags == right.tolist() and record.robust_flags == robust.tolist()
    assert record.run == "mine" and record.data.classes == ["0", "1", "2"] and record.threat.eps_text == "20/255"
    floats = clead.evaluate(Threshold(), images.images / 255, images.labels, classes=CLASSES, **common)
    assert floats.robust_flags == record.robust_flags and floats.data.classes == list(CLASSES)
    default = clead.evaluate(Threshold(), images.images, images.labels, steps=1, curve_images=8, curve_steps=1)
    assert default.threat.eps_text == "8/255" and len(default.curve) == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eps": 8}, "did you mean 8/255?"),
        ({"norm": "Linf"}, "did you mean 'linf'?"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        ({"stepz": 5}, "stepz: unknown key; did you mean 'steps'"),
        ({"images_": "scaled"}, "divide by 255"),
        ({"images_": "normalised"}, "give raw pixels and let the model normalise"),
        ({"images_": "three"}, "(B, C, H, W)"),
        ({"images_": "NaN"}, "images must be finite"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels"),
        ({"labels": torch.full((256,), 3)}, "labels must be in [0, 3), got 3"),
        ({"labels": torch.zeros(256)}, "labels must be int64"),
    ],
)
def test_evaluate_says_what_is_wrong(changes, says):
    images, _, _ = made()
    kinds = {
        "scaled": images.images.float(),
        "normalised": images.images / 255 - 0.5,
        "three": images.images[:, 0],
        "NaN": images.images / 255 * torch.nan,
    }
    arguments = {"images": images.images, "labels": images.labels, "eps": 0.1, **changes}
    x = kinds.get(arguments.pop("images_", ""), arguments.pop("images"))
    with pytest.raises(UserError) as caught:
        clead.evaluate(Threshold(), x, arguments.pop("labels"), **arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)
