"""Weights that fit in part: what is taken, what is said, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clead.errors import UserError
from clead.models import MODELS
from clead.models.build import build_model
from clead.models.partial_weights import load_matching
from clead.weights.matching import load_into
from clead.weights.reading import Weights


class Tokens(nn.Module):
    """The weights of a small transformer: positions of ``prefixes`` tokens and a square grid, a layer, a head."""

    def __init__(self, side: int, classes: int, prefixes: int = 1, width: int = 6) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, prefixes + side**2, width))
        self.body = nn.Linear(width, 40)
        self.head = nn.Linear(40, classes)


def loaded(target: nn.Module, source: nn.Module | dict[str, Tensor], classes: int) -> tuple[list[str], dict[str, Any]]:
    before = {name: value.clone() for name, value in target.state_dict().items()}
    content = source if isinstance(source, dict) else source.state_dict()
    return load_matching(target, content, "w.pth", classes), before


def test_the_head_stays_and_the_rest_is_taken():
    source, target = Tokens(4, 10), Tokens(4, 3)
    notes, before = loaded(target, source, 3)
    assert torch.equal(target.body.weight, source.body.weight) and torch.equal(target.pos_embed, source.pos_embed)
    assert torch.equal(target.head.weight, before["head.weight"]) and torch.equal(target.head.bias, before["head.bias"])
    assert notes[0].startswith("3 of the 5 tensors of Tokens are from w.pth, 100%")
    assert notes[1:] == ["the head head is new, drawn from the seed: 10 → 3 classes"]


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 3), st.integers(0, 10**6))
def test_positions_are_resized_and_other_tokens_stay(old, new, prefixes, seed):
    if old == new:
        return
    torch.manual_seed(seed)
    source, target = Tokens(old, 3, prefixes), Tokens(new, 3, prefixes)
    rows = torch.arange(float(old)).repeat_interleave(old)
    with torch.no_grad():
        source.pos_embed[0, prefixes:, 0] = 2.5  # constant
        source.pos_embed[0, prefixes:, 1] = rows  # rises from row to row
        source.pos_embed[0, prefixes:, 2] = torch.arange(float(old)).repeat(old)  # from column to column
    loaded(target, source, 3)
    positions = target.pos_embed[0]
    # Some prefixes can be read in two ways (4 tokens: 2 × 2, or 3 + 1 × 1); then the smaller prefix counts.
    if any({old**2 + prefixes - p, new**2 + prefixes - p} <= {k**2 for k in range(1, 12)} for p in range(prefixes)):
        return
    assert torch.equal(positions[:prefixes], source.pos_embed[0, :prefixes])
    grid = positions[prefixes:].reshape(new, new, -1)
    torch.testing.assert_close(grid[..., 0], torch.full((new, new), 2.5))
    assert (grid[:, :1, 1] - grid[..., 1]).abs().max() < 1e-4 and (grid[:1, :, 2] - grid[..., 2]).abs().max() < 1e-4
    assert (grid[1:, 0, 1] > grid[:-1, 0, 1]).all() and (grid[0, 1:, 2] > grid[0, :-1, 2]).all()


def test_weights_of_other_pixels_are_said_so():
    """A run with model.normalize none is the start of one that normalises: the same weights get other numbers."""

    def made(normalize: str) -> nn.Module:
        settings = MODELS.get("resnet10")(width=4, normalize=normalize)
        return build_model(settings, 3, 4, [0.5] * 3, [0.2] * 3, seed=0, sample_shape=(3, 8, 8))

    notes = load_matching(made("data"), made("none").state_dict(), "RUN", 4)
    assert notes[1].startswith("RUN lacks normalize.mean, normalize.std: pixels are normalised as this model does it")
    assert len(load_matching(made("data"), made("data").state_dict(), "RUN", 4)) == 1


def test_all_that_is_not_taken_is_listed():
    source, target = Tokens(4, 10).state_dict(), Tokens(5, 3)
    del source["body.bias"]
    source["extra.weight"] = torch.zeros(3)
    notes, before = loaded(target, source, 3)
    assert "the position embeddings pos_embed were resized from 4 × 4 to 5 × 5 (bicubic)" in notes
    assert "1 are not in w.pth: body.bias" in notes and "1 of w.pth have no place in it: extra.weight" in notes
    assert torch.equal(target.body.bias, before["body.bias"])


@pytest.mark.parametrize("width", [7, 0])
def test_another_network_is_refused_and_nothing_changes(width):
    source = Tokens(4, 10, width=width).state_dict() if width else {"other.weight": torch.zeros(3)}
    target = Tokens(4, 3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(
        UserError, match=r"w.pth is of another architecture: \d of the 5 tensors of Tokens fit.*--model"
    ) as raised:
        load_matching(target, source, "w.pth", 3)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_half_of_the_weights_is_the_limit():
    body = {"a.weight": torch.zeros(10, 10), "b.weight": torch.zeros(10, 10)}
    net = nn.ModuleDict({"a": nn.Linear(10, 10, bias=False), "b": nn.Linear(10, 10, bias=False)})
    loaded(net, {"a.weight": body["a.weight"]}, 3)
    assert not net["a"].weight.any() and net["b"].weight.any()
    net["c"] = nn.Linear(10, 1, bias=False)
    with pytest.raises(UserError, match="1 of the 3 tensors of ModuleDict fit, 48% of its weights"):
        load_matching(net, {"a.weight": body["a.weight"]}, "w.pth", 3)


def test_weights_that_fit_whole_are_loaded_as_before_and_prefixes_come_off():
    source, target, other = Tokens(4, 3), Tokens(4, 3), Tokens(4, 5)
    tensors = {f"module.{name}": value for name, value in source.state_dict().items()}
    notes = load_into(target, Weights(tensors, "w.pth"), num_classes=3)
    assert notes[0] == "all 5 tensors of Tokens are from w.pth"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    notes = load_into(other, Weights(tensors, "w.pth"), num_classes=5)
    assert any("'module.' was taken off" in note for note in notes) and any("3 → 5 classes" in note for note in notes)
    with pytest.raises(UserError, match="of a model with 3 classes"):
        load_into(Tokens(4, 5), Weights(tensors, "w.pth"))
