"""The methods against straightforward implementations of their formulas, to the last bit of the loss and of every gradient."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clead.attacks.pgd import PGD
from clead.errors import UserError
from clead.interfaces import Batch
from clead.losses.contrastive import neighbours, nt_xent, published, supcon
from clead.methods.clead import CLead
from clead.methods.pgd_at import PGDAT
from clead.methods.standard import Standard
from clead.methods.trades import TRADES
from clead.models.build import build_model
from clead.models.compute_cost import CostMeter
from clead.models.small_cnn import SmallCNN
from clead.models.split import SplitModel
from clead.settings import validated
from clead.threats.linf import Linf
from support import generator

EPS, STEPS, STEP = 0.1, 3, 0.05
THREAT, ATTACK = Linf(eps=EPS), PGD(steps=STEPS, step_size=STEP)


def make_model(embedding_dim: int = 6) -> SplitModel:
    model = build_model(SmallCNN(width=4, features=8), 1, 4, (0.4,), (0.3,), seed=0, sample_shape=(1, 8, 8))
    model.add_projection(embedding_dim, seed=1)
    return model.train()


def make_batch(count: int = 6) -> Batch:
    x = torch.rand(count, 1, 8, 8, generator=generator(1))
    second = (x + 0.1 * torch.randn(x.shape, generator=generator(2))).clamp(0, 1)
    return Batch(x, torch.arange(count) % 4, second)


def memory_of(method: Any, model: SplitModel) -> nn.Module | None:
    return method.state(model, (1, 8, 8))


def run(
    method: Any,
    model: SplitModel | None = None,
    batch: Batch | None = None,
    seed: int = 5,
    attack: Any = ATTACK,
    progress: float = 0.0,
    memory: nn.Module | None = None,
):
    """Return (loss, metrics, gradients and buffers by name)."""
    model = copy.deepcopy(model) if model is not None else make_model()
    where = {"generator": generator(seed), "progress": progress, "state": memory}
    output = method(model, batch or make_batch(), threat=THREAT, attack=attack, **where)
    output.loss.backward()
    return output.loss.detach(), output.metrics, state_after(model)


def state_after(model: SplitModel) -> dict[str, Tensor | None]:
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {**gradients, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def assert_same_bits(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> None:
    assert a.keys() == b.keys()
    for name, left in a.items():
        right = b[name]
        assert (left is None) == (right is None), name
        assert left is None or torch.equal(left, right), name


# --- The textbook, written again: no objective registry, no attack_mode, no method class -------------------------------------


def textbook_pgd(model: SplitModel, x: Tensor, loss: Any, seed: int = 5, of: Any = None) -> Tensor:
    """Madry et al. 2018 with the model in eval mode; ``loss`` maps logits, or what ``of`` returns, to a sum."""
    model.eval()
    x_adv = torch.empty_like(x).uniform_(-EPS, EPS, generator=generator(seed)).add_(x).clamp_(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss((of or model)(x_adv)), x_adv)
        x_adv = x_adv.detach() + STEP * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return x_adv


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(p_logits, 1), F.log_softmax(q_logits, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def textbook(name: str, model: SplitModel, x: Tensor, y: Tensor, separate: bool) -> Tensor:
    if name == "standard":
        return F.cross_entropy(model(x), y)
    if name == "pgd_at":
        x_adv = textbook_pgd(model, x, lambda logits: F.cross_entropy(logits, y, reduction="sum"))
        return F.cross_entropy(model(x_adv), y)
    with torch.no_grad():
        target = model.eval()(x)
    x_adv = textbook_pgd(model, x, lambda logits: kl(target, logits).sum())
    if separate:
        clean, adversarial = model(x), model(x_adv)
    else:
        clean, adversarial = model(torch.cat([x, x_adv])).split(len(x))
    return F.cross_entropy(clean, y) + 6.0 * kl(clean, adversarial).mean()


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("name", "method"), [("standard", Standard), ("pgd_at", PGDAT), ("trades", TRADES)])
def test_equals_the_textbook_to_the_last_bit(name, method, separate):
    loss, _, state = run(method(separate_forwards=separate))
    model, batch = make_model(), make_batch()
    expected = textbook(name, model, batch.images, batch.labels, separate)
    expected.backward()
    assert torch.equal(loss, expected.detach())
    assert_same_bits(state, state_after(model))


def test_trades_equals_kl_div_as_its_authors_wrote_it():
    """The same up to rounding with F.kl_div(log_softmax, softmax, batchmean)."""
    loss, _, state = run(TRADES(separate_forwards=True))
    model, (x, y, *_) = make_model(), make_batch()
    with torch.no_grad():
        target = model.eval()(x).softmax(1)
    x_adv = textbook_pgd(model, x, lambda z: F.kl_div(F.log_softmax(z, 1), target, reduction="sum"))
    clean, adversarial = model(x), model(x_adv)
    robust = F.kl_div(F.log_softmax(adversarial, 1), clean.softmax(1), reduction="batchmean")
    (F.cross_entropy(clean, y) + 6 * robust).backward()
    for name, value in state_after(model).items():
        if value is not None:
            torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("form", ["published", "nt_xent", "supcon", "neighbours"])
@pytest.mark.parametrize("two_views", [True, False])
def test_every_term_with_its_weight_equals_the_formula(separate, form, two_views):
    method = CLead(
        adversarial_weight=0.5,
        clean_weight=0.7,
        kl_weight=2.0,
        contrastive_weight=0.3,
        contrastive_loss=form,
        temperature=0.2,
        augmented_view=two_views,
        separate_forwards=separate,
    )
    loss, metrics, state = run(method)
    model, (x, y, x_aug, *_) = make_model(), make_batch()
    with torch.no_grad():
        target = model.eval()(x)
    x_adv = textbook_pgd(model, x, lambda logits: kl(target, logits).sum())
    views = [x, x_adv, x_aug] if two_views else [x, x_adv]
    if separate:
        outputs = [model.features_and_logits(view) for view in views]
    else:
        outputs = list(zip(*(part.split(len(x)) for part in model.features_and_logits(torch.cat(views))), strict=True))
    (h, clean), (h_adv, adversarial) = outputs[:2]
    z = [model.embedding(part) for part in (h, *([outputs[2][0]] if two_views else []), h_adv)]
    forms = {"published": published(z, 0.2), "nt_xent": nt_xent(z, 0.2), "supcon": supcon(z, y, 0.2)}
    contrast = (forms | {"neighbours": neighbours(z, y, 0.2)})[form].mean()
    terms = {
        "adversarial_cross_entropy": F.cross_entropy(adversarial, y),
        "clean_cross_entropy": F.cross_entropy(clean, y),
        "kl": kl(clean, adversarial).mean(),
        "contrastive": contrast,
    }
    expected = sum(w * term for w, term in zip((0.5, 0.7, 2.0, 0.3), terms.values(), strict=True))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for name, value in terms.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-6, atol=1e-7)
    assert metrics["clean_accuracy"] == (clean.argmax(1) == y).float().mean()
    assert metrics["robust_accuracy"] == (adversarial.argmax(1) == y).float().mean()
    for name, value in state_after(model).items():
        torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-4)


def test_adversarial_supcon_equals_the_formula():
    """SupCon alone, of clean images and of adversaries that maximise it (Khosla et al. 2020, eq. 2), each image in turn."""

    def slow(z: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros(())
        for i in range(len(z)):
            others = [a for a in range(len(z)) if a != i]
            below = torch.stack([torch.exp(z[i] @ z[a] / 0.2) for a in others]).sum()
            same = [torch.log(torch.exp(z[i] @ z[p] / 0.2) / below) for p in others if labels[p] == labels[i]]
            total = total - torch.stack(same).mean()
        return total

    only = {"adversarial_weight": 0.0, "clean_weight": 0.0, "kl_weight": 0.0, "contrastive_weight": 1.0}
    method = CLead(**only, inner="supcon", temperature=0.2, augmented_view=False)
    loss, _, state = run(method)
    model, (x, y, *_) = make_model(), make_batch()

    def embed(images: Tensor) -> Tensor:
        return model.embedding(model.features(images))

    with torch.no_grad():
        clean = model.eval() and embed(x)
    labels = torch.cat([y, y])
    x_adv = textbook_pgd(model, x, lambda z: slow(torch.cat([clean, z]), labels), of=embed)
    expected = slow(embed(torch.cat([x, x_adv])), labels) / (2 * len(x))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    for name, value in state_after(model).items():
        if value is not None:
            torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-3)


REDUCTIONS = {
    "standard": (Standard(), {"kl_weight": 0, "clean_weight": 1, "inner": "cross_entropy"}),
    "pgd_at": (PGDAT(), {"kl_weight": 0, "clean_weight": 0, "adversarial_weight": 1, "inner": "cross_entropy"}),
    "trades": (TRADES(), {}),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_without_the_contrastive_term_it_reduces_to_the_last_bit(name):
    method, changes = REDUCTIONS[name]
    loss, metrics, state = run(method)
    reduced_loss, reduced_metrics, reduced_state = run(CLead(contrastive_weight=0, **changes))
    assert torch.equal(loss, reduced_loss)
    assert metrics.keys() == reduced_metrics.keys()
    assert_same_bits(state, reduced_state)
    assert state["projection.output.weight.grad"] is None


BASE: dict[str, Any] = {
    "adversarial_weight": 0.5,
    "clean_weight": 0.7,
    "kl_weight": 2.0,
    "contrastive_weight": 0.3,
    "contrastive_loss": "supcon",
    "temperature": 0.2,
    "augmented_view": True,
    "embedding_dim": 6,
    "inner": "kl",
    "inner_contrastive_weight": 0.5,
    "separate_forwards": False,
    "label_smoothing": 0.0,
    "clean_view": True,
    "contrastive_level": "embedding",
    "replays": 1,
}
CHANGES: list[tuple[str, Any]] = [
    ("adversarial_weight", 0.0),
    ("clean_weight", 0.0),
    ("kl_weight", 0.0),
    ("contrastive_weight", 0.0),
    ("contrastive_loss", "published"),
    ("contrastive_loss", "nt_xent"),
    ("contrastive_loss", "neighbours"),
    ("temperature", 0.5),
    ("augmented_view", False),
    ("embedding_dim", 7),
    ("inner", "cross_entropy"),
    ("inner", "embedding"),
    ("inner", "contrastive"),
    ("inner", "supcon"),
    ("inner", "neighbours"),
    ("inner_contrastive_weight", 0.0),
    ("separate_forwards", True),
    ("label_smoothing", 0.2),
    ("clean_view", False),
    ("contrastive_level", "features"),
    ("contrastive_level", "logits"),
    ("replays", 2),
]


def test_every_option_is_tested():
    """fold_batch_norm is about speed alone: its own test says that it changes no more than rounding."""
    assert set(BASE) == {key for key, _ in CHANGES} == {field.name for field in fields(CLead)} - {"fold_batch_norm"}


@pytest.mark.parametrize("method", [PGDAT, TRADES, CLead])
def test_folding_batch_norm_changes_no_more_than_rounding(method):
    loss, _, state = run(method())
    folded_loss, _, folded_state = run(method(fold_batch_norm=True))
    torch.testing.assert_close(folded_loss, loss, rtol=1e-4, atol=0)
    for name, value in state.items():
        if value is not None:
            torch.testing.assert_close(folded_state[name], value, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_every_option_changes_the_result(key, value):
    results = []
    for values in (BASE, {**BASE, key: value}):
        method = CLead(**values)
        model = make_model(method.embedding_dim)
        _, _, state = run(method, model, memory=memory_of(method, model))
        gradient = state["encoder.linear.weight.grad"]
        assert gradient is not None and torch.isfinite(gradient).all()
        results.append(gradient)
    assert not torch.equal(*results)


def test_label_smoothing_is_a_share_of_the_uniform_cross_entropy():
    """(1 − s)·CE(y) + s·mean over the classes of CE(k) (Szegedy et al. 2016, arXiv:1512.00567, section 7); not in the attack."""
    _, metrics, _ = run(PGDAT(label_smoothing=0.2))
    model, (x, y, *_) = make_model(), make_batch()
    x_adv = textbook_pgd(model, x, lambda logits: F.cross_entropy(logits, y, reduction="sum"))
    log_p = F.log_softmax(model(x_adv), 1)
    expected = -(0.8 * log_p.gather(1, y[:, None])[:, 0] + 0.2 * log_p.mean(1)).mean()
    torch.testing.assert_close(metrics["adversarial_cross_entropy"], expected.detach())


def test_soft_labels_are_minimised_and_attacked():
    """Of mixed images: Σ_k t_k·CE(k), in the loss and inside the attack (Yun et al. 2019, arXiv:1905.04899, eq. 1)."""
    batch = make_batch()
    soft = 0.7 * F.one_hot(batch.labels, 4) + 0.3 * F.one_hot(batch.labels.flip(0), 4).float()
    _, metrics, _ = run(PGDAT(), batch=batch._replace(soft_labels=soft))
    model = make_model()

    def cross_entropy(logits):
        return -(soft * F.log_softmax(logits, 1)).sum()

    expected = cross_entropy(model(textbook_pgd(model, batch.images, cross_entropy))) / len(soft)
    torch.testing.assert_close(metrics["adversarial_cross_entropy"], expected.detach())


def test_the_seed_changes_the_result_and_repeats_it():
    (first, _, a), (again, _, b), (other, _, _) = (run(CLead(), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert_same_bits(a, b)


@pytest.mark.parametrize("form", ["published", "nt_xent", "supcon", "neighbours"])
def test_the_contrastive_gradient_reaches_encoder_and_projection_only(form):
    only = {"adversarial_weight": 0, "clean_weight": 0, "kl_weight": 0, "contrastive_weight": 1}
    _, metrics, state = run(CLead(**only, contrastive_loss=form))
    for name, value in state.items():
        if name.startswith("classifier."):
            assert value is None or not value.any(), name
        elif name.endswith(".grad"):
            assert value is not None and value.any(), name
    assert "contrastive" in metrics


def test_the_inner_attack_leaves_batch_norm_alone():
    """Running statistics move by exactly the one training forward, however long the attack is."""
    _, _, short = run(PGDAT(), attack=PGD(steps=1, step_size=1e-9, random_start=False))
    model, batch = make_model(), make_batch()
    model(batch.images)
    name = "encoder.convolutions.1.running_mean"
    torch.testing.assert_close(short[name], dict(model.named_buffers())[name])
    for method in (Standard(), PGDAT(), TRADES(), CLead()):
        _, _, state = run(method)
        assert state["encoder.convolutions.1.num_batches_tracked"] == 1
    for method, views in ((Standard(separate_forwards=True), 1), (CLead(separate_forwards=True), 3)):
        _, _, state = run(method)
        assert state["encoder.convolutions.1.num_batches_tracked"] == views


@pytest.mark.parametrize("k", [1, 4])
def test_cost_in_forward_equivalents(k):
    n = 6
    expected = [
        (Standard(), 3),
        (PGDAT(), 2 * k + 3),
        (TRADES(), 2 * k + 1 + 6),
        (TRADES(separate_forwards=True), 2 * k + 1 + 6),
        (CLead(), 2 * k + 1 + 9),
        (CLead(augmented_view=False), 2 * k + 1 + 6),
        (CLead(inner="cross_entropy", augmented_view=False), 2 * k + 6),
        (CLead(inner_contrastive_weight=1), 4 * k + 2 + 9),
    ]
    for method, per_image in expected:
        model = make_model()
        with CostMeter(model) as meter:
            run_on = method(model, make_batch(n), threat=THREAT, attack=PGD(steps=k), generator=generator(5))
            run_on.loss.backward()
        assert meter.forward_equivalents == per_image * n, method


def test_what_a_method_needs():
    assert not Standard().uses_attack and not Standard().uses_embedding and not Standard().uses_second_view
    assert PGDAT().uses_attack and TRADES().uses_attack and not TRADES().uses_embedding
    assert CLead().uses_attack and CLead().uses_embedding and CLead().uses_second_view
    assert not CLead(augmented_view=False).uses_second_view
    assert not CLead(contrastive_weight=0).uses_second_view
    # A batch with no second view is enough where none is used.
    batch = make_batch()._replace(second_view=None)
    assert torch.isfinite(run(CLead(augmented_view=False), batch=batch)[0])


def test_the_model_is_left_in_training_mode_with_its_frozen_parts():
    model = make_model()
    model.encoder.get_submodule("convolutions.1").eval()
    model.classifier.requires_grad_(False)
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    output = CLead()(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5))
    output.loss.backward()
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(p.grad is None for p in model.classifier.parameters())


def test_under_bfloat16_autocast_the_loss_is_float32_and_close():
    full, _, _ = run(CLead())
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = CLead()(model, make_batch(), threat=THREAT, attack=ATTACK, generator=generator(5))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.detach(), full, rtol=0.1, atol=0)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kl_weight": -1}, "method.kl_weight: input should be greater than or equal to 0, got -1"),
        ({"temperature": 0}, "method.temperature: input should be greater than 0, got 0"),
        (
            {"contrastive_loss": "sup_con"},
            "method.contrastive_loss: input should be 'published', 'nt_xent', 'supcon' or 'neighbours'",
        ),
        (
            {"clean_view": False, "contrastive_loss": "published"},
            "published anchors on the clean image, got clean_view false; set it true",
        ),
        (
            {"clean_view": False, "augmented_view": False, "contrastive_loss": "nt_xent"},
            "contrastive_loss nt_xent needs a view beside x_adv, got clean_view false and augmented_view false",
        ),
        ({"lambda": 1}, "method.lambda: unknown key"),
        ({"kl_weigth": 1}, "method.kl_weigth: unknown key; did you mean 'kl_weight'"),
        (
            {"clean_weight": 0, "kl_weight": 0, "contrastive_weight": 0},
            "at least one weight must be above 0, got all four 0",
        ),
    ],
)
def test_bad_settings_are_one_line(values, says):
    with pytest.raises(UserError) as caught:
        validated(CLead, values, "method")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_training_on_one_batch_lowers_the_loss():
    model, batch = make_model(), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(12):
        output = CLead()(model, batch, threat=THREAT, attack=ATTACK, generator=generator(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(model, nn.Module) and model.training


def test_what_is_not_used_is_not_checked():
    assert PGDAT(clean_view=False, augmented_view=False, contrastive_loss="nt_xent").contrastive_weight == 0


# --- Which views, how strongly, and at which level ---------------------------------------------------------------------------

ALONE: dict[str, Any] = {"clean_view": False, "augmented_view": False, "clean_weight": 0, "kl_weight": 0}
ONLY: dict[str, Any] = {"adversarial_weight": 0, "clean_weight": 0, "kl_weight": 0, "contrastive_weight": 1}


def test_adversaries_alone_cost_what_pgd_at_costs_and_equal_supcon_over_one_view():
    method = CLead(**ALONE, adversarial_weight=1, inner="cross_entropy", contrastive_weight=0.4, temperature=0.2)
    model, batch = make_model(), make_batch()
    with CostMeter(model) as meter:
        output = method(model, batch, threat=THREAT, attack=ATTACK, generator=generator(5))
        output.loss.backward()
    reference = make_model()
    with CostMeter(reference) as pgd_at:
        PGDAT()(reference, batch, threat=THREAT, attack=ATTACK, generator=generator(5)).loss.backward()
    assert meter.forward_equivalents == pgd_at.forward_equivalents == 6 * (2 * STEPS + 3)
    assert "clean_accuracy" not in output.metrics and "robust_accuracy" in output.metrics

    twin = make_model()
    x_adv = textbook_pgd(twin, batch.images, lambda logits: F.cross_entropy(logits, batch.labels, reduction="sum"))
    features, logits = twin.features_and_logits(x_adv)
    z = twin.embedding(features)
    terms = []
    for i, y in enumerate([0, 1, 2, 3, 0, 1]):  # 2 and 3 have nobody of their class
        others = [j for j in range(6) if j != i]
        below = torch.stack([(z[i] @ z[j] / 0.2).exp() for j in others]).sum().log()
        terms += [below - z[i] @ z[j] / 0.2 for j in others if batch.labels[j] == y]
    assert len(terms) == 4
    expected = F.cross_entropy(logits, batch.labels) + 0.4 * torch.stack(terms).mean()
    expected.backward()
    torch.testing.assert_close(output.loss.detach(), expected.detach())
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_adversaries_of_different_classes_contrast_to_nothing():
    batch = make_batch(4)
    loss, metrics, state = run(CLead(**{**ONLY, **ALONE}), batch=batch)
    assert loss == 0 and metrics["contrastive"] == 0
    assert all(not value.any() for name, value in state.items() if name.endswith(".grad") and value is not None)


@pytest.mark.parametrize("clean_weight", [0.0, 0.7])
def test_without_the_clean_view_the_contrast_is_of_the_others(clean_weight):
    """Also where the clean image is forwarded for another term."""
    method = CLead(clean_view=False, clean_weight=clean_weight, kl_weight=0, temperature=0.2, separate_forwards=True)
    _, metrics, _ = run(method)
    model, (x, y, x_aug, *_) = make_model(), make_batch()
    with torch.no_grad():
        target = model.eval()(x)
    x_adv = textbook_pgd(model, x, lambda logits: kl(target, logits).sum())
    z = [model.embedding(model.features(view)) for view in (x_aug, x_adv)]
    torch.testing.assert_close(metrics["contrastive"], supcon(z, y, 0.2).mean().detach())


def forwarded(model: SplitModel, views: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(len(views[0])) for part in model.features_and_logits(torch.cat(views))), strict=True))


def contrasted(method: CLead, vectors: Any, loss: Any) -> tuple[Tensor, dict, Tensor, dict]:
    """Return loss and state of ``method`` (contrast alone), and of ``loss`` of the ``vectors`` of clean, augmented, adversarial."""
    found, _, state = run(method)
    model, (x, _, x_aug, *_) = make_model(), make_batch()
    with torch.no_grad():
        target = model.eval()(x)
    x_adv = textbook_pgd(model, x, lambda logits: kl(target, logits).sum())
    clean, adversarial, augmented = vectors(model, [x, x_adv, x_aug])
    expected = loss([clean, augmented, adversarial])
    expected.backward()
    return found, state, expected.detach(), state_after(model)


def assert_contrasted(method: CLead, vectors: Any, loss: Any) -> None:
    found, state, expected, other = contrasted(method, vectors, loss)
    torch.testing.assert_close(found, expected)
    for name, value in other.items():
        if value is None:
            assert state[name] is None or not state[name].any(), name
        else:
            torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-4, msg=name)


def embedded(model: SplitModel, views: list[Tensor]) -> list[Tensor]:
    return [model.embedding(features) for features, _ in forwarded(model, views)]


@pytest.mark.parametrize("level", ["features", "logits"])
def test_features_and_logits_are_contrasted_without_a_head(level):
    method = CLead(**ONLY, contrastive_level=level)
    assert not method.uses_embedding and method.uses_attack

    def vectors(model, views):
        chosen = [pair[level == "logits"] for pair in forwarded(model, views)]
        return [part / part.norm(dim=1, keepdim=True) for part in chosen]

    assert_contrasted(method, vectors, lambda z: supcon(z, make_batch().labels, 0.5).mean())
    model = make_model()
    model.drop_projection()
    assert torch.isfinite(run(method, model)[0])


# --- What is remembered ------------------------------------------------------------------------------------------------------


def test_no_memory_without_need():
    for method in (Standard(), PGDAT(), CLead(), CLead(contrastive_loss="nt_xent")):
        assert memory_of(method, make_model()) is None


# --- Images without a label --------------------------------------------------------------------------------------------------

SOME = torch.tensor([True, False, True, True, False, True])


def partly(labelled: Tensor = SOME) -> Batch:
    """Labels that nobody may look at are wrong, and out of range for whoever does."""
    batch = make_batch()
    return batch._replace(labels=torch.where(labelled, batch.labels, 99), labelled=labelled)


def textbook_partly(labelled: Tensor, known: Tensor, attacked: Tensor) -> dict[str, Tensor]:
    """α, β, κ and SupCon of images of which some have a label, in separate forwards."""
    model, (x, _, x_aug, *_) = make_model(), make_batch()
    x_adv = textbook_pgd(model, x, lambda logits: F.cross_entropy(logits, attacked, reduction="sum"))
    (h, clean), (h_adv, adversarial), (h_aug, _) = (model.features_and_logits(view) for view in (x, x_adv, x_aug))
    rows = [i for i in range(6) if known[i] >= 0]
    own = torch.tensor([known[i].item() if known[i] >= 0 else 50 + i for i in range(6)])
    right = [i for i in range(6) if labelled[i]]
    y = make_batch().labels
    return {
        "clean_cross_entropy": F.cross_entropy(clean[rows], known[rows]) if rows else torch.zeros(()),
        "adversarial_cross_entropy": F.cross_entropy(adversarial[rows], known[rows]) if rows else torch.zeros(()),
        "kl": kl(clean, adversarial).mean(),
        "contrastive": supcon([model.embedding(part) for part in (h, h_aug, h_adv)], own, 0.5).mean(),
        "clean_accuracy": (clean[right].argmax(1) == y[right]).float().sum() / max(1, len(right)),
        "robust_accuracy": (adversarial[right].argmax(1) == y[right]).float().sum() / max(1, len(right)),
    }


@pytest.mark.parametrize("labelled", [SOME, torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)])
def test_images_without_a_label(labelled):
    with torch.no_grad():
        predicted = make_model().eval()(make_batch().images).argmax(1)
    y = make_batch().labels
    known = torch.where(labelled, y, -1)
    method = CLead(adversarial_weight=0.5, inner="cross_entropy", separate_forwards=True)
    loss, metrics, state = run(method, batch=partly(labelled))
    expected = textbook_partly(labelled, known, torch.where(labelled, y, predicted))
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    terms = ("adversarial_cross_entropy", "clean_cross_entropy", "kl", "contrastive")
    total = sum(w * metrics[name] for w, name in zip((0.5, 1, 6, 0.3), terms, strict=True))
    torch.testing.assert_close(loss, total)
    assert all(torch.isfinite(value).all() for value in state.values() if value is not None)


def test_all_labelled_is_the_same_as_not_saying_so():
    everywhere = make_batch()._replace(labelled=torch.ones(6, dtype=torch.bool))
    for method in (PGDAT(), TRADES(label_smoothing=0.1), CLead()):
        (loss, _, state), (expected, _, other) = run(method, batch=everywhere), run(method)
        torch.testing.assert_close(loss, expected)
        for name, value in other.items():
            if value is not None:
                torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-4)


def test_no_label_that_must_not_be_seen_is_seen():
    """By any objective, form of the contrast, or kind of label."""
    hidden, soft = partly(), F.one_hot(make_batch().labels, 4).float()
    other = torch.where(SOME, hidden.labels, -5)
    for changes in (
        {"inner": "cross_entropy"},
        {"inner": "contrastive", "contrastive_loss": "nt_xent"},
        {"inner": "supcon"},
        {"inner": "neighbours", "contrastive_loss": "neighbours"},
    ):
        method = CLead(adversarial_weight=0.5, **changes)
        results = []
        for labels, shares in ((hidden.labels, soft), (other, torch.where(SOME[:, None], soft, 0.25))):
            for batch in (hidden._replace(labels=labels), hidden._replace(labels=labels, soft_labels=shares)):
                memory = memory_of(method, make_model())
                first = run(method, batch=batch, memory=memory)
                results.append((first[0], run(method, batch=batch, memory=memory)[0]))
        hard, mixed, hard_again, mixed_again = results
        assert hard == hard_again and mixed == mixed_again, changes
        torch.testing.assert_close(torch.stack(hard), torch.stack(mixed))


@pytest.mark.parametrize("inner", ["kl", "cross_entropy"])
def test_the_prediction_for_images_without_a_label_is_counted(inner):
    """The KL needs a clean forward, which the cross-entropy does not; its labels do."""
    model = make_model()
    with CostMeter(model) as meter:
        method = CLead(inner=inner)
        method(model, partly(), threat=THREAT, attack=ATTACK, generator=generator(5)).loss.backward()
    assert meter.forward_equivalents == 6 * (1 + 2 * STEPS + 9)
