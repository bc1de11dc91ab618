"""What every registered threat must do; a new file in threats/ is picked up by itself."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import kstest
from torch import Tensor

from clead.errors import UserError
from clead.interfaces import Threat
from clead.settings import Ratio, validated
from clead.threats import THREATS
from support import generator

SHAPE = (2, 1, 2, 3)
RADII = {
    "linf": [0.0, 1e-3, 0.1, 0.7, 1.0],
    "l2": [0.0, 1e-3, 0.3, 1.0, 3.0],
    "l1": [0.0, 1e-3, 0.4, 2.0, 7.0],
    "l0": [0, 1, 2, 4, 5],
}
WHOLE = {"linf": 1.0, "l2": 32.0, "l1": 255.0, "l0": 6}
NAMES = THREATS.names()


def make(name: str, eps: Any) -> Any:
    return THREATS.get(name)(eps=eps)


# Corners of the box, repeated values and plain numbers.
pixels = arrays.arrays(np.float64, SHAPE, elements=st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1)))
anywhere = arrays.arrays(np.float64, SHAPE, elements=st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(-3, 4)))


def feasible(threat: Threat, point: Tensor, x: Tensor, slack: float) -> bool:
    inside = bool((threat.distance(point - x) <= threat.eps + slack).all())
    return inside and bool(point.min() >= 0) and bool(point.max() <= 1)


@pytest.mark.parametrize("name", NAMES)
def test_is_a_threat_with_its_registered_name(name):
    threat = THREATS.get(name)()
    assert isinstance(threat, Threat)
    assert threat.norm == name
    assert threat.eps > 0
    assert name in RADII, "give the new threat radii in this file"
    assert pickle.loads(pickle.dumps(threat)) == threat


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), x=pixels, z=anywhere, q=anywhere)
def test_projection_is_exact(name, data, x, z, q):
    """Feasible, idempotent, and nearest: no feasible q makes an acute angle with z − p (the variational inequality)."""
    threat = make(name, data.draw(st.sampled_from(RADII[name])))
    x, z, q = map(torch.from_numpy, (x, z, q))
    p = threat.project(z, x)
    assert p.shape == x.shape and p.dtype == x.dtype
    assert feasible(threat, p, x, 1e-12)
    torch.testing.assert_close(threat.project(p, x), p, atol=1e-9, rtol=0)
    # Any feasible point, made without the projection: towards q until the ball or the box ends.
    direction = q - x
    if name == "l0":  # a part of a sparse change is as little sparse: drop pixels, a random choice of them
        order = data.draw(st.permutations(range(6)))
        kept = torch.isin(torch.arange(6), torch.tensor(order[: int(threat.eps)], dtype=torch.long)).view(1, 2, 3)
        feasible_q = (x + direction * kept).clamp(0, 1)
    else:
        length = threat.distance(direction).clamp_min(1e-12)
        feasible_q = (x + direction * (threat.eps / length).clamp(max=1)[:, None, None, None]).clamp(0, 1)
    assert feasible(threat, feasible_q, x, 1e-12)
    if name != "l0":  # the angle is a property of convex sets
        angle = ((z - p) * (feasible_q - p)).flatten(1).sum(1)
        assert (angle <= 1e-8).all()
    before = (feasible_q - z).flatten(1).norm(dim=1)
    assert ((p - z).flatten(1).norm(dim=1) <= before + 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(x=pixels, z=anywhere)
def test_projection_edge_cases(name, x, z):
    x, z = torch.from_numpy(x), torch.from_numpy(z)
    assert torch.equal(make(name, 0).project(z, x), x)  # a ball of radius 0
    torch.testing.assert_close(make(name, WHOLE[name]).project(z, x), z.clamp(0, 1), atol=1e-12, rtol=0)
    assert torch.equal(make(name, RADII[name][2]).project(x, x), x)  # no perturbation
    inside = x + (z.clamp(0, 1) - x) * 1e-4
    if name == "l0":  # a small change is not a sparse one
        inside[:, :, :, 1:] = x[:, :, :, 1:]
    torch.testing.assert_close(make(name, RADII[name][2]).project(inside, x), inside, atol=1e-15, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-6, 0.05, 3.0])
def test_projection_in_float32_of_3072_pixels(name, scale):
    x = torch.rand(8, 3, 32, 32, generator=generator())
    x[0], x[1], x[2, :, ::2] = 0, 1, 1
    z = x + scale * torch.randn(x.shape, generator=generator(1))
    for eps in {"linf": [8 / 255, 1e-4], "l2": [0.5, 3.0], "l1": [12.0, 0.01], "l0": [10, 300]}[name]:
        threat = make(name, eps)
        p = threat.project(z, x)
        assert feasible(threat, p, x, eps * 1e-5 + 1e-6)  # what the evaluation grants for rounding
        exact = threat.project(z.double(), x.double())
        torch.testing.assert_close(p.double(), exact, atol=2e-6, rtol=0)
        torch.testing.assert_close(threat.project(p, x), p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_memory_format_does_not_matter(name):
    threat = make(name, RADII[name][2])
    x = torch.rand(3, 2, 4, 4, generator=generator())
    z = x + torch.randn(x.shape, generator=generator(1))
    last = {"memory_format": torch.channels_last}
    assert torch.equal(threat.project(z.contiguous(**last), x.contiguous(**last)), threat.project(z, x))
    assert torch.equal(threat.ascend(x.contiguous(**last), z.contiguous(**last), 0.1), threat.ascend(x, z, 0.1))
    torch.testing.assert_close(threat.distance((z - x).contiguous(**last)), threat.distance(z - x))


@pytest.mark.parametrize("name", NAMES)
def test_random_start_is_uniform_in_the_ball(name):
    """In d dimensions the norm of a uniform point of any norm's ball of radius eps is eps · u^(1/d)."""
    if name == "l0":
        pytest.skip("l0 is no norm: its ball has no volume of that law; tests/unit/test_l0.py has its own")
    eps, d = 0.3, 5
    threat = make(name, eps)
    x = torch.full((4000, 1, 1, d), 0.5, dtype=torch.float64)
    delta = threat.random_start(x, generator=generator()) - x
    assert kstest((threat.distance(delta) / eps).pow(d).numpy(), "uniform").pvalue > 1e-3
    assert delta.mean(0).abs().max() < 0.01
    orthants = (delta.flatten(1) > 0).long() @ (2 ** torch.arange(d))
    counts = orthants.bincount(minlength=2**d)
    assert counts.min() > 4000 / 2**d * 0.6  # every sign pattern


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_start_feasible_reproducible_private(name, dtype):
    threat = make(name, RADII[name][3])
    x = torch.rand(16, 3, 8, 8, generator=generator(), dtype=dtype)
    x[0], x[1] = 0, 1
    kept, state = x.clone(), torch.get_rng_state()
    start = threat.random_start(x, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(x, kept) and start.data_ptr() != x.data_ptr()
    assert start.dtype == dtype and feasible(threat, start, x, 1e-5)
    assert torch.equal(start, threat.random_start(x, generator=generator(3)))
    assert not torch.equal(start, threat.random_start(x, generator=generator(4)))
    assert len({tuple(image.flatten().tolist()) for image in start - x}) == len(x)  # each image its own
    assert torch.equal(make(name, 0).random_start(x, generator=generator()), x)


def length(threat: Threat, step: Tensor) -> Tensor:
    """How far ``ascend`` went, (B,). A number of pixels is no length: for l0 and eps = 1 the largest change of a pixel."""
    return step.abs().mean(1).flatten(1).amax(1) if threat.norm == "l0" else threat.distance(step)


@pytest.mark.parametrize("name", NAMES)
def test_ascend_goes_up_by_a_step_of_that_norm(name):
    threat = make(name, 1)
    x = torch.full((6, 2, 3, 3), 0.5, dtype=torch.float64)
    gradient = torch.randn(x.shape, generator=generator(), dtype=torch.float64)
    moved = threat.ascend(x, gradient, 0.25)
    torch.testing.assert_close(length(threat, moved - x), torch.full((6,), 0.25, dtype=torch.float64))
    assert (((moved - x) * gradient).flatten(1).sum(1) > 0).all()
    torch.testing.assert_close(threat.ascend(x, 1e5 * gradient, 0.25), moved)  # the gradient's length is of no account
    assert torch.equal(threat.ascend(x, torch.zeros_like(x), 0.25), x)
    assert torch.equal(x, torch.full_like(x, 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_saturated_gradients_still_move(name):
    threat = make(name, 1)
    x = torch.full((1, 1, 2, 2), 0.5)
    gradient = torch.tensor([[[[1e-30, -2e-30], [3e-30, 0.5e-30]]]])
    moved = threat.ascend(x, gradient, 0.1)
    torch.testing.assert_close(length(threat, moved - x), torch.tensor([0.1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_gradient_is_not_taken_for_a_flat_one(name):
    """torch.sign(NaN) is 0: an image whose gradient is broken would stay where it is and look robust."""
    x = torch.rand(3, 1, 4, 4, generator=generator())
    x[1] = 0
    gradient = torch.randn(x.shape, generator=generator(1))
    gradient[1], gradient[2, 0, 1, 1] = torch.nan, torch.nan
    threat = make(name, RADII[name][3])
    moved = threat.project(threat.ascend(x, gradient, 0.1), x)
    assert moved[0].isfinite().all() and moved[1].isnan().any() and moved[2].isnan().any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [-0.1, 1000.5, float("nan"), float("inf"), "8/0", "eight", True, None])
def test_wrong_eps_is_one_line_with_the_value(name, bad):
    with pytest.raises(UserError) as caught:
        validated(THREATS.get(name), {"eps": bad})
    message = str(caught.value)
    assert "\n" not in message and "eps" in message
    assert str(bad) in message


@pytest.mark.parametrize("name", NAMES)
def test_eps_keeps_how_it_was_written(name):
    text = "510/255" if name == "l0" else "0.5/255"  # a whole number
    threat = validated(THREATS.get(name), {"eps": text})
    assert threat.eps == (2 if name == "l0" else 0.5 / 255) and threat.eps.text == text
    assert isinstance(threat.eps, Ratio)
    with pytest.raises(UserError, match="radius: unknown key"):
        validated(THREATS.get(name), {"radius": 1})
