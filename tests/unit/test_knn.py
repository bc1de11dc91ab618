"""The nearest neighbours' vote, against a loop over queries."""

import math

import pytest
import torch

from clead.config import load_recipe
from clead.errors import UserError
from clead.evaluation.knn import knn_accuracy, neighbours_accuracy
from clead.interfaces import ImageSet
from clead.models.build import build_model
from clead.models.small_cnn import SmallCNN


def slow(features, labels, queries, truth, k):
    """One query at a time, in plain Python: sort by cosine, count, and break ties by the sum of cosines."""
    right = 0
    for q, t in zip(queries.tolist(), truth.tolist(), strict=True):
        found = []
        for f, y in zip(features.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(q, f, strict=True))
            found.append((dot / math.sqrt(sum(a * a for a in q)) / math.sqrt(sum(b * b for b in f)), y))
        votes = {}
        for cosine, y in sorted(found, reverse=True)[:k]:
            count, total = votes.get(y, (0, 0.0))
            votes[y] = (count + 1, total + cosine)
        right += max(votes, key=lambda y: votes[y]) == t
    return right / len(truth)


@pytest.mark.parametrize("k", [1, 2, 3, 20, 60, 99])
def test_the_vote_is_that_of_a_loop(k):
    draw = torch.Generator().manual_seed(k)
    labels, truth = torch.randint(4, (60,), generator=draw), torch.randint(4, (700,), generator=draw)  # two chunks
    centres = torch.randn(4, 5, generator=draw)
    features = centres[labels] + 1.5 * torch.randn(60, 5, generator=draw)
    queries = 7 * (centres[truth] + 1.5 * torch.randn(700, 5, generator=draw))
    accuracy = knn_accuracy(features, labels, queries, truth, k)
    assert accuracy == slow(features, labels, queries, truth, k) and 0.2 < accuracy < 1
    assert (knn_accuracy(features, labels, queries, truth) == accuracy) == (k == 20)  # the default


def test_it_is_the_cosine_that_counts():
    features = torch.tensor([[0.01, 0.0], [5.0, 5.0]])
    query = torch.tensor([[3.0, 0.5]])  # nearer to the second by distance, to the first by angle
    assert knn_accuracy(features, torch.tensor([0, 1]), query, torch.tensor([0]), k=1) == 1


def test_a_tie_goes_to_the_nearer():
    features = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    for labels in ([0, 1], [1, 0]):
        query = torch.tensor([[1.0, 0.2]])
        assert knn_accuracy(features, torch.tensor(labels), query, torch.tensor(labels[:1]), k=2) == 1


def test_mistakes_are_one_line():
    x, y = torch.ones(3, 2), torch.zeros(3, dtype=torch.long)
    for arguments, said in (
        ((x, y, x, y, 0), "at least 1"),
        ((x, y, torch.ones(3, 4), y), r"\(N, D\)"),
        ((x, y[:2], x, y), "features must have one label each"),
        ((x, y, x[:0], y[:0]), "queries must have one label each"),
        ((x, y, x * math.nan, y), "queries must be finite"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            knn_accuracy(*arguments)
        assert "\n" not in str(caught.value)


def test_of_a_model_by_its_features_and_visible_labels():
    splits = load_recipe("digits-standard", ["--data.limit_train", "200"]).data.load(0)
    model = build_model(SmallCNN(width=4, features=8), 1, 10, (0.3,), (0.3,), seed=0, sample_shape=(1, 8, 8)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu = torch.device("cpu")
    found = neighbours_accuracy(model, splits.train, splits.val, device=cpu)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        near, asked = (model.features(part.images.float() / 255) for part in (splits.train, splits.val))
    assert found == slow(near, splits.train.labels, asked, splits.val.labels, 20)
    # Labels that training may not see do not vote.
    seen = torch.arange(len(splits.train)) % 3 > 0
    hidden = ImageSet(splits.train.images, splits.train.labels, seen)
    expected = slow(near[seen], splits.train.labels[seen], asked, splits.val.labels, 20)
    assert neighbours_accuracy(model, hidden, splits.val, device=cpu) == expected != found
