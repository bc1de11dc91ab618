"""The evaluation on a model whose breaking points are known exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clead
from clead.attacks.pgd import PGD
from clead.config import Eval
from clead.errors import UserError
from clead.evaluation.correctness import accuracy_under_attack
from clead.evaluation.evaluator import evaluate_model
from clead.evaluation.plan import EvaluationOptions
from clead.evaluation.suites import NamedAttack, suite
from clead.interfaces import ImageSet
from clead.models.compute_cost import CostMeter
from clead.results.record import Record
from clead.results.target import EvaluationTarget
from clead.settings import Ratio
from clead.threats.l1 import L1
from clead.threats.l2 import L2
from clead.threats.linf import Linf
from support import Returns

EPS = 20 / 255
NO_EXTRAS: dict[str, Any] = {"curve_points": 0, "check_images": 0}
CLASSES = ("dark", "bright", "never")
SUBJECT = EvaluationTarget(
    name="run", model="Threshold", weights="best", data="made", split="test", data_fingerprint="d", classes=CLASSES
)
QUICK = Eval(suite="pgd", steps=5, batch_size=7, curve_points=0, check_images=0)


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


def evaluate(
    images: ImageSet,
    threat: Any = None,
    settings: Eval = QUICK,
    model: nn.Module | None = None,
    attacks=None,
    **options: Any,
):
    how = EvaluationOptions(**{"show": False, **options})
    return evaluate_model(
        model or Threshold(), images, threat or Linf(eps="20/255"), settings, SUBJECT, attacks=attacks, options=how
    )


@pytest.mark.slow
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
        assert EPS * 0.99 < part.max_distance <= EPS * (1 + 1e-5) + 1e-6
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


@pytest.mark.slow
def test_model_is_left_untouched():
    model = Threshold()
    model.norm.eval()
    model.slope.grad = torch.tensor(7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    random = torch.get_rng_state()
    evaluate(made()[0], model=model, settings=replace(QUICK, curve_points=2, curve_steps=2))
    for name in ("pgd", "standard", "rand"):
        clead.evaluate(model, made()[0].images, made()[0].labels, suite=name, eps="20/255", steps=2, **NO_EXTRAS)
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


@pytest.mark.slow
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
    with pytest.raises(UserError, match=r"Shift left the threat set on 6 of 6 images: image 0 is 0.0792157 from"):
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
    figures = accuracy_under_attack(
        Brittle(), images, Linf(eps="20/255"), Shift(1, 0.99), "margin", seed=0, device=torch.device("cpu")
    )
    assert figures == {"clean_accuracy": 1, "robust_accuracy": 0}


def test_accuracy_under_attack_is_the_same_verdict():
    images, right, robust = made()
    figures = accuracy_under_attack(
        Threshold(), images, Linf(eps="20/255"), PGD(steps=3), "margin", seed=0, device=torch.device("cpu")
    )
    assert figures == {
        "clean_accuracy": right.double().mean().item(),
        "robust_accuracy": robust.double().mean().item(),
    }


@pytest.mark.parametrize("points", [1, 6])
@pytest.mark.parametrize("eps", ["8/255", "1/3", 0.9])
def test_the_curve_has_known_accuracies(points, eps):
    images, right, _ = made()
    settings = replace(QUICK, batch_size=256, steps=1, curve_points=points, curve_steps=3, curve_images=256)
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


def test_the_suites_have_the_constants_of_their_protocol():
    """Croce & Hein 2020 (arXiv:2003.01690), section 6 and table 2; for L1 Croce & Hein 2021 (arXiv:2103.01208), section 5."""
    (ce, targeted, fab, square), notes = suite("standard", "linf", 10)
    assert [part.name for part in (ce, targeted, fab, square)] == ["APGD-CE", "APGD-T", "FAB-T", "Square"] and not notes
    assert (ce.attack.steps, ce.attack.restarts, ce.attack.loss) == (100, 1, "cross_entropy")
    assert (targeted.attack.steps, targeted.attack.targets, targeted.attack.loss) == (100, 9, "dlr")
    assert (fab.attack.steps, fab.attack.targets, square.attack.queries, square.attack.p_init) == (100, 9, 5000, 0.8)
    (ce, targeted, fab, _), _ = suite("standard", "l1", 10)
    assert (ce.attack.restarts, targeted.attack.targets, fab.attack.targets) == (5, 5, 9)
    plus, _ = suite("plus", "l2", 10)
    assert [part.name for part in plus] == ["APGD-CE×5", "APGD-DLR×5", "FAB×5", "Square", "APGD-T", "FAB-T"]
    rand, _ = suite("rand", "linf", 10)
    assert [(part.name, part.attack.eot) for part in rand] == [("APGD-CE EoT-20", 20), ("APGD-DLR EoT-20", 20)]
    assert [part.name for part in suite("pgd", "l0", 10)[0]] == ["FGSM", "PGD-50 CE", "PGD-50 margin"]
    with pytest.raises(UserError, match="suite standard is defined for linf, l2 and l1, got l0"):
        suite("standard", "l0", 10)
    adaptive = [part.name for part in suite("adaptive", "linf", 10)[0]]
    assert adaptive[:4] == ["APGD-CE", "APGD-T", "FAB-T", "Square"] and "PGD-100 embedding" in adaptive
    shorter, notes = suite("standard", "linf", 10, steps=7)
    assert [part.attack.steps for part in shorter[:3]] == [7, 7, 7] and shorter[3].attack.queries == 350
    assert notes == ["7 steps instead of the suite's own"]
    (own, notes), (same, also) = suite("quick", "linf", 10), suite("quick", "linf", 10, steps=50)
    assert own == same and notes == also and "the quick suite left" in notes[0]


def test_the_suite_of_queries_has_labels_only_in_linf_and_says_so_elsewhere():
    attacks, notes = suite("black_box", "linf", 10)
    assert [(part.name, part.attack.queries, part.cost) for part in attacks] == [
        ("Square", 5000, 5000),
        ("RayS", 5000, 5000),
    ]
    assert not notes
    assert [part.attack.queries for part in suite("black_box", "linf", 10, steps=7)[0]] == [350, 350]
    for norm in ("l2", "l1"):
        attacks, notes = suite("black_box", norm, 10)
        assert [part.name for part in attacks] == ["Square"]
        assert notes == [
            f"suite black_box in {norm} is Square alone: RayS, which uses labels only, is an attack for linf"
        ]
        assert not suite("standard", norm, 10)[1]


@pytest.mark.parametrize(
    ("classes", "loss", "targets", "says"),
    [
        (2, "margin", 1, "2 classes: the DLR loss is not"),
        (3, "margin", 2, "3 classes: the targeted DLR"),
        (4, "dlr", 3, ""),
    ],
)
def test_few_classes_are_attacked_and_said(classes, loss, targets, says):
    attacks, notes = suite("standard", "linf", classes)
    assert (attacks[1].attack.loss, attacks[1].attack.targets, attacks[2].attack.targets) == (loss, targets, targets)
    assert any(note.startswith(f"{classes} classes: {targets} target") for note in notes)
    assert not says or any(note.startswith(says) for note in notes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    x, y = torch.rand(6, 1, 2, 2), torch.arange(6) % classes
    for name in ("standard", "plus", "quick"):
        record = clead.evaluate(net, x, y, suite=name, eps=0.2, steps=2, **NO_EXTRAS)
        assert record.suite == name and record.robust_accuracy <= record.clean_accuracy
        assert not says or any(note.startswith(says) for note in record.notes)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(eps="20/255"), L2(eps="20/255"), L1(eps="20/255")])
@pytest.mark.parametrize("name", ["standard", "quick", "rand", "black_box"])
def test_every_suite_breaks_exactly_the_images_within_eps(name, threat):
    images, right, robust = made()
    record = evaluate(images, threat, replace(QUICK, suite=name, steps=10, batch_size=200)).record
    assert record.clean_flags == right.tolist() and record.robust_flags == robust.tolist() == record.robust
    left = right.clone()
    for part in record.attacks:  # each meets the survivors of those before it
        assert part.attacked == int(left.sum())
        after = torch.tensor(part.flags)
        assert part.num_successes == int((left & ~after).sum()) and not (after & ~left).any()
        left = after
    assert record.attacks[-1].flags == record.robust_flags
    assert record.attacks[-1].attacked < len(images.labels) or len(record.attacks) == 1


def test_the_adaptive_suite_is_never_above_standard():
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = clead.adapt(
            nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)), sample_shape=(1, 4, 4)
        )
    labels = net(images).argmax(1)
    standard, adaptive = (
        clead.evaluate(net, images, labels, suite=name, eps=0.05, steps=5, **NO_EXTRAS)
        for name in ("standard", "adaptive")
    )
    assert all(a <= s for a, s in zip(adaptive.robust, standard.robust, strict=True))
    assert [part.name for part in adaptive.attacks[:4]] == [part.name for part in standard.attacks]


class Noisy(Threshold):
    """Right on average, by the toss of a coin near the boundary."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x + 0.05 * torch.randn_like(x)).clamp(0, 1))


@pytest.mark.slow
def test_a_randomised_model_is_scored_over_many_draws_and_reproducibly():
    images, right, _ = made()
    settings = replace(QUICK, suite="rand", steps=10, batch_size=100)
    before = torch.get_rng_state()
    first = evaluate(images, settings=settings, model=Noisy()).record
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluate(images, settings=settings, model=Noisy()).record.robust_flags == first.robust_flags
    far = (images.images.flatten().double() / 255 - 0.5).abs() > 0.15  # three standard deviations of one draw
    clean = torch.tensor(first.clean_flags)
    assert torch.equal(clean[far], right[far])
    assert torch.equal(torch.tensor(first.robust_flags)[far & right], (far & right)[far & right])


class NoGradient(Threshold):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()).detach()


def test_a_model_without_gradients_is_attacked_by_queries_only():
    images, right, robust = made()
    with pytest.raises(UserError) as caught:
        evaluate(images, settings=replace(QUICK, suite="standard"), model=NoGradient())
    assert "gives no gradient" in str(caught.value) and "--eval.suite black_box" in str(caught.value)
    record = evaluate(
        images, settings=replace(QUICK, suite="black_box", steps=4, batch_size=200, curve_points=4), model=NoGradient()
    ).record
    assert record.robust_flags == robust.tolist() and record.curve == [] and record.checks == []
    assert any("no gradient" in note for note in record.notes)


@pytest.mark.slow
def test_a_search_in_bfloat16_has_float32_verdicts():
    """Within a bfloat16 rounding of the boundary the search is wrong about the image, and must be told."""

    class Scaled(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ torch.eye(3)  # a matrix product: rounded to bfloat16 under autocast

    images, right, robust = made()
    record = evaluate(
        images, settings=replace(QUICK, suite="quick", steps=20, precision="bfloat16"), model=Scaled()
    ).record
    assert record.clean_flags == right.tolist() and record.robust_flags == robust.tolist()


def test_out_of_memory_halves_the_batch_and_says_so():
    class Small(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 20 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(x)

    images, _, robust = made()
    settings = replace(QUICK, batch_size=100)
    with pytest.warns(UserWarning, match=r"attacking \d+ images at a time"):
        record = evaluate(images, settings=settings, model=Small()).record
    assert record.robust_flags == robust.tolist()


def test_batches_of_a_loader_are_evaluated():
    images, _, _ = made()
    loader = [(images.images[i : i + 50], images.labels[i : i + 50]) for i in range(0, 256, 50)]
    whole = clead.evaluate(Threshold(), images.images, images.labels, suite="pgd", eps="20/255", steps=3, **NO_EXTRAS)
    parts = clead.evaluate(Threshold(), loader, suite="pgd", eps="20/255", steps=3, **NO_EXTRAS)
    assert parts.robust_flags == whole.robust_flags and parts.data.images == whole.data.images
    for wrong in (images.images, [images.images], []):
        with pytest.raises(UserError, match="labels are missing|must be pairs"):
            clead.evaluate(Threshold(), wrong)


def nan_at_bright(h: Tensor) -> Tensor:
    return torch.cat([h, -h, h * 0], 1).masked_fill(h * 255 > 249.5, torch.nan)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda h: h[:, 0], "the model gives one logit for two classes, the data has 3 classes"),
        (lambda h: torch.cat([h, h, h], 1)[:, None], "floating point, got float32 (1, 1, 3); choose the token"),
        (lambda h: torch.cat([h, h], 1), "the model returns 2 logits, the data has 3 classes"),
        (
            lambda h: torch.cat([h, h, h], 1) * torch.nan,
            "logits must be finite, got NaN or infinity for images [0, 1, 2",
        ),
        (lambda h: h @ torch.ones(2, 3), "fails on images of shape (1, 1, 1): RuntimeError"),
    ],
)
def test_bad_logits_are_one_line(what, says):
    with pytest.raises(UserError) as caught:
        evaluate(made()[0], model=Returns(what))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_logits_that_are_nan_at_few_images_count_as_wrong_and_are_named():
    images, _, _ = made()
    record = evaluate(images, model=Returns(nan_at_bright)).record
    assert not any(record.clean_flags[250:]) and not any(record.robust_flags[250:]) and any(record.clean_flags[:250])
    assert any(
        "NaN or infinity for images [250, 251, 252, 253, 254, 255], which count as wrong" in n for n in record.notes
    )
    assert record.predictions is not None
    assert all(a != b for a, b in zip(record.predictions.clean[250:], record.predictions.labels[250:], strict=True))


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
    common: dict[str, Any] = {"suite": "pgd", "eps": "20/255", "steps": 3, "curve_points": 2, "curve_steps": 2}
    common |= {"check_images": 0, "name": "mine"}
    record = clead.evaluate(Threshold(), images.images, images.labels, **common)
    assert record.clean_flags == right.tolist() and record.robust_flags == robust.tolist()
    assert record.run == "mine" and record.data.classes == ["0", "1", "2"] and record.threat.eps_text == "20/255"
    floats = clead.evaluate(Threshold(), images.images / 255, images.labels, classes=CLASSES, **common)
    assert floats.robust_flags == record.robust_flags and floats.data.classes == list(CLASSES)
    default = clead.evaluate(Threshold(), images.images, images.labels, steps=1, curve_images=8, curve_steps=1)
    assert default.threat.eps_text == "8/255" and len(default.curve) == 6 and default.suite == "standard"
    assert default.checks and default.seed == 0


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
        (
            {"labels": torch.zeros(256)},
            "labels must be integers of shape (256,), got torch.float32 (256,); give labels.long()",
        ),
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


class Cnn(nn.Module):
    """A small convolutional network, flattened by ``view`` as many are, with batch-norm."""

    def __init__(self, wrap: Any = lambda layer: layer) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = wrap(nn.Conv2d(3, 4, 3, padding=1))
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(64, 3)
            self.norm.running_mean.uniform_(-0.2, 0.2)
            self.norm.running_var.uniform_(0.5, 2)
        self.eval()
        self.sign = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.sign * self.fc(nn.functional.avg_pool2d(h, 2)[:, :, :4, :4].contiguous().view(len(x), -1))


class Viewed(Cnn):
    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.fc(h.view(h.size(0), -1))


def colour(count: int = 40) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "wrap", [lambda c: c, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_models_whose_layout_or_weights_are_their_own_affair(wrap):
    """A ``view`` refuses channels_last activations; weight and spectral normalisation compute the weight at every use."""
    model, x = Viewed(wrap), colour()
    y = model(x).argmax(1)
    record = clead.evaluate(model, x, y, suite="quick", eps=0.02, steps=5, **NO_EXTRAS)
    assert record.clean_accuracy == 1 and record.robust_accuracy < 1
    assert clead.attacks.pgd(model, x, y, eps=0.02, steps=2).shape == x.shape


def test_a_layer_replaced_between_two_evaluations_is_noticed():
    """Its batch-norm must not be folded into a convolution that is gone."""
    used, fresh, x = Cnn(), Cnn(), colour(60)
    clead.evaluate(used, x, used(x).argmax(1), suite="quick", eps=0.05, steps=3, **NO_EXTRAS)
    other = Cnn(lambda c: nn.Conv2d(3, 4, 3, padding=1)).conv
    used.conv, fresh.conv = other, other
    y = used(x).argmax(1)
    a, b = (clead.evaluate(m, x, y, suite="quick", eps=0.03, steps=10, **NO_EXTRAS) for m in (used, fresh))
    assert a.robust == b.robust and a.robust_accuracy < 1


def test_verdicts_are_float32_whatever_the_caller_computes_in():
    model, x = Cnn(), colour()
    y = model(x).argmax(1)
    expected = clead.evaluate(model, x, y, suite="quick", eps=0.02, steps=5, **NO_EXTRAS)
    precision = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        record = clead.evaluate(model, x, y, suite="quick", eps=0.02, steps=5, **NO_EXTRAS)
        assert torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
    assert record.robust == expected.robust and torch.get_float32_matmul_precision() == precision


def test_plausible_inputs_are_taken_or_refused_in_one_line():
    model, x = Cnn(), colour(6)
    y = model(x).argmax(1)
    expected = clead.evaluate(model, x, y, suite="pgd", eps=0.02, steps=2, **NO_EXTRAS).robust
    for images, labels in [
        (x.double(), y),
        (x.clone().requires_grad_(), y),
        (x, y.to(torch.uint8)),
        (x, y.int()),
        (x.transpose(2, 3).contiguous().transpose(2, 3), y),
    ]:
        assert clead.evaluate(model, images, labels, suite="pgd", eps=0.02, steps=2, **NO_EXTRAS).robust == expected

    class InPlace(Cnn):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            x += 0.5
            return super().forward(x)

    before = x.clone()
    clead.evaluate(InPlace(), x, y, suite="pgd", eps=0.02, steps=2, **NO_EXTRAS)
    assert torch.equal(x, before)
    one = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    for arguments, says in [
        ((model, x.tolist(), y), "images must be a torch.Tensor, got a list"),
        ((lambda x: x, x, y), "model must be a torch.nn.Module, got a function"),
        ((one, x, y * 0 + 2), r"labels must be in \[0, 2\), got 2"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            clead.evaluate(*arguments)
        assert "\n" not in str(caught.value)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    record = clead.evaluate(bare, x, y, suite="adaptive", eps=0.02, steps=2, **NO_EXTRAS)
    assert record.attacks and not any("embedding" in attack.name for attack in record.attacks)
    assert any("the attacks on them are left out" in note and "clead.adapt" in note for note in record.notes)


# ------------------------------------------------------------------------------------------------ what the quick suite costs


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("n", [40, 256])
def test_curve_and_checks_of_the_quick_suite_cost_at_most_half_of_its_attacks(eps, n):
    images = made()[0].subset(torch.arange(n))
    model = Threshold()
    settings = Eval(suite="quick", steps=40, gallery=0)
    record, passes, calls = metered(model, images, settings, eps)
    _, *attacks = metered(model, images, replace(settings, check_images=0, curve_points=0), eps)
    assert passes <= 1.5 * attacks[0] and calls <= 1.5 * attacks[1]
    assert any(note.startswith("suite quick: the curve is of the first ") for note in record.notes)
    assert any("--eval.check_images 100" in note for note in record.notes)
    same = metered(model, images, settings, eps)[0]
    assert same.robust_flags == record.robust_flags and same.curve == record.curve and same.checks == record.checks


def metered(model: nn.Module, images: ImageSet, settings: Eval, eps: float) -> tuple[Record, int, int]:
    """Return the record, and the passes and calls that it took, forward and backward."""
    with CostMeter(model) as meter:
        record = evaluate(images, model=model, settings=settings, threat=Linf(eps=eps)).record
    return record, meter.forwards + meter.backwards, meter.calls


def test_the_flags_of_the_quick_suite_do_not_depend_on_what_follows_and_what_is_asked_for_is_done():
    images = made()[0]
    settings = Eval(suite="quick", steps=40, gallery=0)
    bare = evaluate(images, settings=replace(settings, check_images=0, curve_points=0)).record
    limited = evaluate(images, settings=settings).record
    asked = evaluate(images, settings=replace(settings, check_images=50, curve_images=70, curve_steps=3)).record
    assert bare.robust_flags == limited.robust_flags == asked.robust_flags
    assert bare.attacks[0].flags == limited.attacks[0].flags
    assert {point.robust.n for point in asked.curve} == {70} and asked.curve[0].attack == "PGD-3 margin"
    assert not any("suite quick: the c" in note for note in asked.notes)
    assert limited.curve and {point.attack for point in limited.curve} <= {"PGD-10 margin", "PGD-5 margin"}
    # A configuration of an earlier version names the defaults of its time: they count as not given, in suite quick only.
    usual = evaluate(images, settings=replace(settings, check_images=128, curve_images=256, curve_steps=20)).record
    assert (usual.curve, usual.checks, usual.notes) == (limited.curve, limited.checks, limited.notes)


def test_attacks_that_end_at_once_leave_no_time_for_a_curve_and_the_record_says_so():
    settings = Eval(suite="quick", steps=1, gallery=0)
    record = evaluate(made()[0], settings=settings).record
    assert not record.curve and not record.checks
    assert sum("the attacks were too short for" in note and "--eval.c" in note for note in record.notes) == 2


@pytest.mark.parametrize("n", [30, 300])
def test_a_quick_evaluation_of_a_linear_model_is_limited_by_calls(n):
    """There the time goes into calls, however many images each has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    x = torch.rand(n, 3, 4, 4)
    calls = []
    for settings in ({}, NO_EXTRAS):
        with CostMeter(model) as meter:
            record = clead.evaluate(model, x, model(x).argmax(1), suite="quick", eps=0.02, gallery=0, **settings)
        calls.append(meter.calls)
        checks = [check.name for check in record.checks]
        assert "steps" not in checks and ("smooth" in checks) == (not settings)
    assert calls[0] <= 1.5 * calls[1]


def test_other_suites_keep_the_curve_and_the_checks_that_they_had():
    record = evaluate(made()[0], settings=Eval(suite="pgd", steps=2, curve_points=1, check_images=0)).record
    assert {point.robust.n for point in record.curve} == {min(256, len(made()[0]))}
    assert record.curve[0].attack == "PGD-20 margin" and not any("suite quick" in note for note in record.notes)
