"""Losses against slow NumPy loops written from the formulas, against a peer's code, and by gradcheck in float64."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch.autograd import gradcheck

from clead.errors import UserError
from clead.losses.contrastive import directed_nt_xent, neighbours, nt_xent, published, supcon
from clead.losses.divergence import cosine_distance, kl_divergence
from clead.losses.margin import cross_entropy, dlr, margin

LABELS = torch.tensor([0, 1, 0, 2, 1])


def unit(views: int = 3, batch: int = 5, dim: int = 4, seed: int = 0) -> list[torch.Tensor]:
    z = torch.randn(views, batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(torch.nn.functional.normalize(z, dim=2))


def logits(rows: int = 6, classes: int = 5, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_directed(a: np.ndarray, b: np.ndarray, tau: float) -> np.ndarray:
    losses = []
    for i in range(len(a)):
        below = 0.0
        for j in range(len(a)):
            if j != i:
                below += math.exp(a[i] @ a[j] / tau)
            below += math.exp(a[i] @ b[j] / tau)
        losses.append(-math.log(math.exp(a[i] @ b[i] / tau) / below))
    return np.array(losses)


def slow_supcon(views: list[np.ndarray], labels: list[int], tau: float) -> np.ndarray:
    z, y = np.concatenate(views), labels * len(views)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        below = sum(math.exp(z[i] @ z[a] / tau) for a in others)
        positives = [p for p in others if y[p] == y[i]]
        losses.append(-sum(math.log(math.exp(z[i] @ z[p] / tau) / below) for p in positives) / len(positives))
    return np.mean(np.split(np.array(losses), len(views)), axis=0)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_directed_nt_xent_equals_the_formula(tau):
    a, b, _ = unit()
    np.testing.assert_allclose(directed_nt_xent(a, b, tau), slow_directed(a.numpy(), b.numpy(), tau), rtol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_published_form_anchors_on_the_clean_view_only(tau, count):
    views = unit(count)
    clean, *others = [view.numpy() for view in views]
    expected = np.mean([slow_directed(clean, other, tau) for other in others], axis=0)
    np.testing.assert_allclose(published(views, tau), expected, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("count", [2, 3])
def test_symmetric_nt_xent_is_the_mean_over_ordered_pairs(tau, count):
    views = unit(count)
    z = [view.numpy() for view in views]
    expected = np.mean([slow_directed(a, b, tau) for a in z for b in z if a is not b], axis=0)
    np.testing.assert_allclose(nt_xent(views, tau), expected, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1], [0, 0, 0, 0, 0], [4, 3, 2, 1, 0]])
def test_supcon_equals_the_formula(tau, labels):
    views = unit()
    expected = slow_supcon([view.numpy() for view in views], labels, tau)
    np.testing.assert_allclose(supcon(views, torch.tensor(labels), tau), expected, rtol=1e-12)


def test_agree_with_pytorch_metric_learning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

        views = unit()
        two, all_three = torch.cat(views[:2]), torch.cat(views)
        own = NTXentLoss(temperature=0.2)(two, torch.arange(5).repeat(2))
        supervised = SupConLoss(temperature=0.2)(all_three, LABELS.repeat(3))
    torch.testing.assert_close(nt_xent(views[:2], 0.2).mean(), own)
    torch.testing.assert_close(supcon(views, LABELS, 0.2).mean(), supervised)


CONTRASTIVE = {
    "published": lambda *views: published(views, 0.3),
    "nt_xent": lambda *views: nt_xent(views, 0.3),
    "supcon": lambda *views: supcon(views, LABELS, 0.3),
    "neighbours": lambda *views: neighbours(views, LABELS, 0.3),
}


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_gradients(name):
    views = tuple(view.requires_grad_() for view in unit())
    assert CONTRASTIVE[name](*views).dtype == torch.float64
    assert gradcheck(CONTRASTIVE[name], views)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_properties(name):
    views = unit()
    value = CONTRASTIVE[name](*views)
    assert value.shape == (5,) and (value > 0).all()
    # The order of the images is of no account, nor is a rotation of the sphere.
    order = torch.tensor([2, 4, 0, 3, 1])  # images of the same label change places, so the labels stay as they are
    assert torch.equal(LABELS[order], LABELS)
    torch.testing.assert_close(CONTRASTIVE[name](*[view[order] for view in views]), value[order])
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))
    torch.testing.assert_close(CONTRASTIVE[name](*[view @ rotation for view in views]), value)
    if name not in ("published", "neighbours"):
        torch.testing.assert_close(CONTRASTIVE[name](*views[::-1]), value)
    # Views that agree cost less than views that do not.
    assert CONTRASTIVE[name](views[0], views[0], views[0]).mean() < value.mean()


def test_neighbours_are_the_other_clean_images_written_out():
    views, labels = unit(), LABELS
    expected = []
    for i in range(5):
        same = [j for j in range(5) if j != i and labels[j] == labels[i]] or [i]
        asked = [j for j in range(5) if j != i or same == [i]]
        weights = [[math.exp(float(view[i] @ views[0][j]) / 0.3) for j in range(5)] for view in views]
        losses = [-math.log(sum(w[j] for j in same) / sum(w[j] for j in asked)) for w in weights]
        expected.append(sum(losses) / len(losses))
    assert neighbours(views, labels, 0.3).tolist() == pytest.approx(expected)
    assert sorted(labels.bincount().tolist())[:1] == [1], "an image whose label no other has is among them"


def test_supcon_without_shared_labels_equals_each_positive_by_itself():
    """With all labels different and two views the only positive is the other view: the symmetric NT-Xent."""
    views = unit(2)
    torch.testing.assert_close(supcon(views, torch.arange(5), 0.2), nt_xent(views, 0.2))


def test_perfect_alignment_in_closed_form():
    z = torch.eye(4, dtype=torch.float64)
    expected = math.log(math.e + 2 * 3) - 1  # e^1 to itself, e^0 to three negatives of each view
    torch.testing.assert_close(directed_nt_xent(z, z, 1.0), torch.full((4,), expected, dtype=torch.float64))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_small_temperatures_and_collapsed_embeddings_stay_finite(name):
    same = [torch.ones(5, 4) / 2 for _ in range(3)]
    views = [view.float().requires_grad_() for view in same]
    value = CONTRASTIVE[name](*views)
    value.sum().backward()
    assert torch.isfinite(value).all() and all(
        torch.isfinite(view.grad).all() for view in views if view.grad is not None
    )
    assert torch.isfinite(nt_xent([view.float() for view in unit()], 1e-3)).all()


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contrastive_in_float32_under_autocast_and_for_half_types(name, dtype):
    views = [view.float() for view in unit()]
    with torch.autocast("cpu", dtype=dtype):
        under = CONTRASTIVE[name](*views)
    assert under.dtype == torch.float32
    assert torch.equal(under, CONTRASTIVE[name](*views))
    halves = [view.to(dtype) for view in views]
    assert torch.equal(CONTRASTIVE[name](*halves), CONTRASTIVE[name](*[half.float() for half in halves]))


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
@pytest.mark.parametrize("form", [published, nt_xent, lambda views, tau: supcon(views, LABELS, tau)])
def test_a_temperature_must_be_positive(form, temperature):
    with pytest.raises(UserError, match=f"temperature must be above 0, got {temperature}"):
        form(unit(), temperature)


@pytest.mark.parametrize("form", [published, nt_xent])
def test_one_image_or_one_view_is_refused(form):
    with pytest.raises(UserError, match="at least 2 images.*got 1"):
        form(unit(batch=1), 0.1)
    with pytest.raises(UserError, match="at least 2 views, got 1"):
        form(unit(1), 0.1)


def test_supcon_takes_one_view_but_not_none_and_not_one_image():
    with pytest.raises(UserError, match="at least 2 images.*got 1"):
        supcon(unit(batch=1), LABELS[:1], 0.1)
    assert supcon(unit(1), LABELS, 0.1).shape == (5,)
    with pytest.raises(UserError, match="at least 1 views, got 0"):
        supcon([], LABELS, 0.1)


def test_supcon_of_one_view_skips_images_whose_class_nobody_shares():
    z = unit(1)[0].numpy()
    value = supcon(unit(1), LABELS, 0.4).numpy()
    assert value[3] == 0  # class 2 has one image
    for i, j in ((0, 2), (1, 4)):
        below = sum(math.exp(z[i] @ z[a] / 0.4) for a in range(5) if a != i)
        assert value[i] == pytest.approx(-math.log(math.exp(z[i] @ z[j] / 0.4) / below), rel=1e-12)


def test_without_positives_values_and_gradients_are_finite():
    views = [view.requires_grad_() for view in unit(1)]
    nobody = supcon(views, torch.arange(5), 0.1)
    assert not nobody.any()
    one_class = supcon(views, torch.zeros(5, dtype=torch.long), 0.1)
    (nobody.sum() + one_class.sum()).backward()
    assert views[0].grad is not None and torch.isfinite(views[0].grad).all()


def test_kl_equals_closed_form_and_scipy():
    p, q = logits(), logits(seed=1)
    expected = rel_entr(softmax(p.numpy(), 1), softmax(q.numpy(), 1)).sum(1)
    np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=1e-10)
    # Two classes with logits (0, a) and (0, b): Bernoulli.
    a, b = 0.7, -1.2
    s, t = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    closed = s * math.log(s / t) + (1 - s) * math.log((1 - s) / (1 - t))
    value = kl_divergence(torch.tensor([[0.0, a]]).double(), torch.tensor([[0.0, b]]).double())
    assert value.item() == pytest.approx(closed, rel=1e-6)


def test_kl_properties_and_gradients():
    p, q = logits().requires_grad_(), logits(seed=1).requires_grad_()
    assert (kl_divergence(p, q) > 0).all()
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(6, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(kl_divergence(p + 5, q - 3), kl_divergence(p, q))
    assert gradcheck(kl_divergence, (p, q))


def test_kl_of_confident_predictions_has_finite_gradients():
    """Beyond a gap of about 104 a float32 probability is 0, where the gradient of p·log p by p does not exist."""
    p = torch.tensor([[0.0, 300.0, -300.0]], requires_grad=True)
    q = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    value = kl_divergence(p, q)
    value.sum().backward()
    assert value.item() == pytest.approx(300, rel=1e-6)
    for part in (p, q):
        assert part.grad is not None and torch.isfinite(part.grad).all()


def test_cosine_distance():
    a, b = logits(), logits(seed=1)
    an, bn = a.numpy(), b.numpy()
    expected = 1 - (an * bn).sum(1) / np.linalg.norm(an, axis=1) / np.linalg.norm(bn, axis=1)
    np.testing.assert_allclose(cosine_distance(a, b), expected, rtol=1e-10)
    torch.testing.assert_close(cosine_distance(a, 3 * a), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(cosine_distance(a, -a), torch.full((6,), 2.0, dtype=torch.float64))
    assert gradcheck(cosine_distance, (a.requires_grad_(), b.requires_grad_()))


def slow_margin(z: np.ndarray, y: int) -> float:
    return max(z[k] for k in range(len(z)) if k != y) - z[y]


def slow_dlr(z: np.ndarray, y: int) -> float:
    ordered = sorted(z, reverse=True)
    return -(z[y] - max(z[k] for k in range(len(z)) if k != y)) / (ordered[0] - ordered[2])


def test_cross_entropy_margin_and_dlr_equal_slow_numpy():
    z, y = logits(30), torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(2))
    rows = list(zip(z.numpy(), y.tolist(), strict=True))
    np.testing.assert_allclose(cross_entropy(z, y), [-math.log(softmax(row)[k]) for row, k in rows], rtol=1e-10)
    np.testing.assert_allclose(margin(z, y), [slow_margin(row, k) for row, k in rows], rtol=1e-12)
    np.testing.assert_allclose(dlr(z, y), [slow_dlr(row, k) for row, k in rows], rtol=1e-9)
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)
    assert torch.equal(dlr(z, y) > 0, z.argmax(1) != y)
    for loss in (cross_entropy, margin, dlr):
        assert gradcheck(lambda part, loss=loss: loss(part, y), (z.clone().requires_grad_(),))


def test_dlr_is_invariant_to_shift_and_scale():
    z, y = logits(30), torch.arange(30) % 5
    torch.testing.assert_close(dlr(7 * z - 3, y), dlr(z, y))
    torch.testing.assert_close(margin(7 * z - 3, y), 7 * margin(z, y))
    right = z.argmax(1)
    assert (dlr(z, right) >= -1).all() and (dlr(z, right) <= 0).all()
    assert torch.isfinite(dlr(torch.zeros(2, 4), torch.tensor([0, 1]))).all()


def test_dlr_needs_three_classes():
    with pytest.raises(UserError, match="at least 3 classes, got 2; use the margin"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_logits_are_float32(dtype):
    z, q, y = logits().to(dtype), logits(seed=1).to(dtype), torch.arange(6) % 5
    for loss in (cross_entropy, margin, dlr):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(z, y)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(z.float(), y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kl_divergence(z, q), kl_divergence(z.float(), q.float()))
        assert cosine_distance(z, q).dtype == torch.float32
