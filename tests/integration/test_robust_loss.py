"""The step in somebody's own loop: the bits of ``clead train``, what is kept, and what is refused."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import clead
from clead import cli
from clead.attacks.pgd import PGD
from clead.data.loaders import Loader, ViewSettings, make_generator
from clead.errors import UserError
from clead.methods.trades import TRADES
from clead.models.seeding import fork_rng
from clead.runs.loading import build
from support import same, saved_weights

COMMON = [
    *("--data.limit_train", "80", "--data.limit_test", "20", "--data.batch_size", "16", "--data.val_fraction", "0.1"),
    *("--train.epochs", "2", "--train.seed", "5", "--train.validate_steps", "1", "--train.device", "cpu"),
    *("--optim.name", "sgd", "--optim.lr", "0.05", "--optim.schedule", "constant", "--optim.warmup", "0"),
    *("--optim.weight_decay", "5e-4", "--optim.clip_norm", "null", "--threat.eps", "0.1"),
]
OPTIM = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "fused": True}
PGD2 = ["--attack.name", "pgd", "--attack.steps", "2"]
FGSM = ["--attack.name", "fgsm", "--attack.random_start", "true", "--attack.step_size", "1.25"]


def config_of(method, *more):
    return clead.load_recipe("digits-standard", [*COMMON, "--method.name", method, *more])


def make_net():
    """A user's network, with all that has a mode."""
    with fork_rng(1):
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )


def batches(config, views=None):
    """The batches that a training of ``config`` sees, one after another."""
    splits = config.data.load(config.train.seed)
    loader = Loader(splits.train, config.data.batch_size, seed=config.train.seed, drop_last=True, views=views)
    for number in range(math.ceil(config.train.epochs * loader.steps_per_epoch / config.method.replays)):
        batch = loader.batch(*divmod(number, loader.steps_per_epoch))
        for _ in range(config.method.replays):
            yield batch


def trained(config, tmp_path, net=None):
    """The weights and the logged losses of ``clead train``."""
    run = clead.train(config, model=net, out=tmp_path / "run", show=False)
    return saved_weights(run.path)


def of_net(weights):
    return {name.removeprefix("module."): value for name, value in weights.items()}


MEMORYLESS = {
    "standard": ([], {}),
    "pgd_at": (PGD2, {"steps": 2}),
    "trades": ([*PGD2, "--method.kl_weight", "3"], {"steps": 2, "kl_weight": 3}),
    "mart": ([*PGD2, "--attack.step_size", "0.05"], {"attack": PGD(steps=2), "step_size": 0.05}),
    "fgsm_rs": (FGSM, {"attack": {"name": "fgsm", "random_start": True}, "step_size": 1.25}),
}


@pytest.mark.parametrize("method", MEMORYLESS)
def test_a_plain_loop_has_the_bits_of_a_training(method, tmp_path):
    overrides, options = MEMORYLESS[method]
    config = config_of(method, *overrides)
    expected = trained(config, tmp_path, make_net())

    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), **OPTIM)
    torch.manual_seed(5)  # of the dropout
    for number, batch in enumerate(batches(config)):
        generator = make_generator("cpu", 5, number, 7)
        loss, metrics = clead.robust_loss(
            net, batch.images, batch.labels, method, eps=0.1, generator=generator, **options
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert number == 7
    assert same(net.state_dict(), of_net(expected))
    assert not any(value.requires_grad for value in metrics.values())


KEEPING = {
    "trades": (PGD2, {"steps": 2}),
    "free": (["--method.replays", "4"], {"replays": 4}),
    "clead": ([*PGD2, "--method.contrastive_weight", "0.5"], {"steps": 2, "contrastive_weight": 0.5}),
    "acl": ([*PGD2, "--method.reweight", "2/3", "--method.reweight_step", "0.25"], None),
    "pgd_at": ([*PGD2, "--train.eps_ramp", "[0.1,0.7]", "--train.forward_mode", "frozen_batch_norm"], None),
    "mart": ([*PGD2, "--train.attack_mode", "forward", "--train.forward_mode", "eval"], None),
}


@pytest.mark.parametrize("method", KEEPING)
def test_an_object_that_keeps_has_the_bits_of_a_training(method, tmp_path):
    """With a head, a δ or batch-norms of its own; and resumed in the middle."""
    overrides, options = KEEPING[method]
    config = config_of(method, "--train.epochs", "1" if method in ("clead", "acl") else "2", *overrides)
    views = ViewSettings()
    if config.method.uses_second_view:  # drawn by the step where the epoch is the first and the batch is plain
        crop = ["--data.view.crop", "2"]
        config = config_of(method, "--train.epochs", "1", *overrides, *crop)
        views = ViewSettings(second=config.data.view) if method == "acl" else views
    expected = trained(config, tmp_path, make_net())

    def make_step():
        if options is None:
            return clead.RobustLoss(make_net(), (1, 8, 8), config=config, total_steps=4 if method == "acl" else 8)
        view = {"view": {"crop": 2}} if config.method.uses_second_view else {}
        return clead.RobustLoss(make_net(), (1, 8, 8), method, eps=0.1, seed=5, **view, **options)

    step = make_step()
    optimizer = torch.optim.SGD(step.parameters(), **OPTIM)
    torch.manual_seed(5)
    for number, batch in enumerate(batches(config, views)):
        if number == 2:  # stopped, and begun anew from what was saved
            saved = copy.deepcopy((step.state_dict(), optimizer.state_dict()))
            step = make_step()
            step.load_state_dict(saved[0])
            optimizer = torch.optim.SGD(step.parameters(), **OPTIM)
            optimizer.load_state_dict(saved[1])
        given = {} if batch.second_view is None else {"second_view": batch.second_view}
        loss, _ = step(batch.images, batch.labels, **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert number >= 3 and step.steps == number + 1
    assert same(step.model.module.state_dict(), of_net(expected))


def test_a_model_of_this_program_a_recipe_and_half_precision(tmp_path, monkeypatch):
    overrides = [*PGD2, "--method.augmented_view", "false", "--train.epochs", "1", "--train.precision", "bfloat16"]
    command = ["clead", "train", "digits-standard", *COMMON, "--method.name", "clead", *overrides]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="0"):
        cli.main()

    config = config_of("clead", *overrides)
    net = build(config, config.data.load(5))
    step = clead.RobustLoss(net, (1, 8, 8), config=config)
    assert step.model is net and step.seed == 5
    optimizer = torch.optim.SGD(step.parameters(), **OPTIM)
    for batch in batches(config):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = step(batch.images, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.drop_projection()
    assert same(net.state_dict(), saved_weights(tmp_path / "run"))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 10


def test_nothing_of_the_model_changes_before_backward(images):
    net = make_net().train()
    net[0].weight.requires_grad_(False)
    before, hooks = copy.deepcopy(net.state_dict()), [len(m._forward_pre_hooks) for m in net.modules()]
    attributes = [set(vars(m)) for m in net.modules()]
    loss, _ = clead.robust_loss(net, *images, "pgd_at", eps="8/255", steps=1, generator=3)
    after = net.state_dict()
    assert all(
        torch.equal(before[name], after[name]) for name in before if "running" not in name and "num_" not in name
    )
    assert net.training and not net[0].weight.requires_grad
    assert hooks == [len(m._forward_pre_hooks) for m in net.modules()] and attributes == [
        set(vars(m)) for m in net.modules()
    ]
    loss.backward()
    assert net[0].weight.grad is None and net[6].weight.grad.abs().sum() > 0


def test_seeds_and_settings_objects(images):
    net = make_net().eval()

    def loss(*arguments, **options):
        return clead.robust_loss(net, *images, *arguments, eps=0.1, **options).loss.item()

    named = loss("trades", kl_weight=2, steps=1, generator=3)
    assert named == loss(TRADES(kl_weight=2), attack=PGD(steps=1), generator=3)
    assert named == loss("trades", kl_weight=2, steps=1, generator=torch.Generator().manual_seed(3))
    assert named != loss("trades", kl_weight=2, steps=1, generator=4)
    torch.manual_seed(9)
    drawn = [loss("pgd_at", steps=1) for _ in range(2)]
    torch.manual_seed(9)
    assert drawn == [loss("pgd_at", steps=1) for _ in range(2)] and drawn[0] != drawn[1]
    steps = [clead.RobustLoss(make_net().eval(), (1, 8, 8), "pgd_at", eps=0.1, seed=seed) for seed in (0, 0, 1)]
    a, b, c = [[step(*images).loss.item() for _ in range(2)] for step in steps]
    assert a == b and a[0] != a[1] and a[0] != c[0]


def test_soft_labels(images):
    x, y = images
    net = make_net().eval()
    soft = F.one_hot(y, 10).float() * 0.8 + 0.02
    loss, metrics = clead.robust_loss(net, x, soft, "standard")
    assert torch.allclose(loss, F.cross_entropy(net(x), soft))
    assert metrics["clean_accuracy"] == (net(x).argmax(1) == y).float().mean()
    step = clead.RobustLoss(net, (1, 8, 8), "pgd_at", eps=0.1)
    assert torch.equal(step(x, soft).loss, clead.RobustLoss(net, (1, 8, 8), "pgd_at", eps=0.1)(x, soft).loss)


def test_what_a_dictionary_of_outputs_holds(images):
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            return {"logits": self.net(x), "features": x.flatten(1)}

    model = Dictionary().eval()
    plain = clead.robust_loss(model.net, *images, "trades", eps=0.1, generator=0).loss
    assert torch.equal(clead.robust_loss(model, *images, "trades", eps=0.1, generator=0).loss, plain)


@pytest.mark.parametrize(
    ("arguments", "options", "line"),
    [
        (["clead"], {"eps": 0.1}, r"^method clead trains a projection head: .*clead.RobustLoss\(model, \(1, 8, 8\), \"clead\""),
        (["free"], {"eps": 0.1}, "^method free remembers something from step to step: .*RobustLoss"),
        (["trades"], {"eps": 0.1, "inner": "embedding"}, "^method trades looks at the features: .*RobustLoss"),
        (["trades"], {}, r"^eps: is required, .* eps=\"8/255\"$"),
        (["trades"], {"eps": 8}, "^threat.eps: linf eps must be in .*8/255"),
        (["trades"], {"eps": 0.1, "kl_weigth": 3}, "^method.kl_weigth: unknown key; did you mean 'kl_weight'"),
        ([5], {"eps": 0.1}, r"^method: must be the settings of a registered method \(.*\), got 5; give one, or a name"),
        (["trade"], {"eps": 0.1}, "^method.name: unknown method 'trade'; did you mean 'trades'"),
        (["trades"], {"eps": 0.1, "attack": "fgsm", "steps": 3}, "^attack.steps: unknown key"),
        (["trades"], {"eps": 0.1, "second_view": torch.zeros(12, 1, 8, 8)}, "^second_view: method trades looks at none"),
    ],
)  # fmt: skip
def test_mistakes_of_the_function(images, arguments, options, line):
    with pytest.raises(UserError, match=line):
        clead.robust_loss(make_net(), *images, *arguments, **options)


def test_wrong_pixels_labels_and_wrappers(images):
    x, y = images
    for bad, line in (((x * 255, y), "divide by 255"), ((x - 0.5, y), r"\[0, 1\]"), ((x, y[:3]), "label")):
        with pytest.raises(UserError, match=line):
            clead.robust_loss(make_net(), *bad, "pgd_at", eps=0.1)
    with pytest.raises(UserError, match="rows of sum 1"):
        clead.robust_loss(make_net(), x, torch.rand(12, 10), "pgd_at", eps=0.1)
    with pytest.raises(UserError, match=r"DataParallel\(clead.RobustLoss\(net"):
        clead.robust_loss(nn.DataParallel(make_net()), x, y, "pgd_at", eps=0.1)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8)), "; give either a method"),
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8), config=config_of("trades"), eps=0.1), "; give either a method"),
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8), config=config_of("trades", "--train.awp", "0.01")), "^train.awp"),
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8), config=config_of("mart", "--train.eps_ramp", "[0,1]")), "^total_steps"),
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8), "acl", eps=0.1, reweight="2/3"), "^total_steps"),
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8), "clead_published"), "^method clead_published attacks the whole"),
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8), "trades", eps=0.1, view={"crop": 1}), "^view: method trades"),
        (lambda: clead.RobustLoss(make_net(), (3, 8, 8), "trades", eps=0.1), "fails on images of shape"),
        (lambda: clead.RobustLoss(make_net(), (1, 8, 8), "trades", eps=0.1)(torch.rand(4, 1, 8, 8)), "needs labels"),
    ],
)  # fmt: skip
def test_mistakes_of_the_object(given, line):
    with pytest.raises(UserError, match=line):
        given()


def test_labels_may_be_missing_where_none_is_looked_at(images):
    step = clead.RobustLoss(make_net(), (1, 8, 8), "acl", eps=0.1, steps=1)
    assert torch.isfinite(step(images[0]).loss)


def test_under_data_parallelism_the_step_is_wrapped(images, tmp_path):
    """One process is enough to see that the gradients pass through the reducer."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        losses = []
        for wrap in (lambda step: step, DistributedDataParallel):
            step = clead.RobustLoss(make_net(), (1, 8, 8), "pgd_at", eps=0.1, steps=2)
            optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
            wrapped = wrap(step)
            torch.manual_seed(0)
            for _ in range(3):
                optimizer.zero_grad()
                loss, _ = wrapped(*images)
                loss.backward()
                optimizer.step()
            losses.append(loss.item())
    finally:
        torch.distributed.destroy_process_group()
    assert losses[0] == losses[1]


def pixel_net():
    """Logits −w·x and w·x of each pixel by itself around 0.5, a class more that is never the answer, as a dictionary."""
    net = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        net.weight[:, :, 0, 0] = torch.tensor([[-1.0, 2.0, -0.5], [1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
        net.bias.copy_(torch.tensor([-0.25, 0.25, -9.0]))

    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return {"out": self.net(x)}

    return Masks()


def test_a_step_on_masks_is_the_loss_at_the_known_worst_perturbation():
    """The worst of L∞ eps moves each pixel against its own class's weights; void pixels count for nothing."""
    x = 0.3 + 0.4 * torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    y = torch.randint(2, (4, 5, 5), generator=torch.Generator().manual_seed(1))
    y[0, :2] = 255
    net, w = pixel_net(), torch.tensor([1.0, -2.0, 0.5])
    step = clead.RobustLoss(net, (3, 5, 5), "pgd_at", eps=0.05, attack="fgsm", task="segmentation")
    side = (1 - 2 * y.clamp_max(1)).float()[:, None]
    logits = net(x + 0.05 * side * w.sign()[:, None, None])["out"]
    expected = F.cross_entropy(logits, y, ignore_index=255)
    for loss, _ in (step(x, y), clead.robust_loss(net, x, y, "pgd_at", eps=0.05, attack="fgsm", task="segmentation")):
        torch.testing.assert_close(loss, expected)
    loss = clead.RobustLoss(net, (3, 5, 5), "clead_pixels", eps=0.05, steps=1, task="segmentation")(x, y).loss
    assert torch.isfinite(loss) and loss.requires_grad
    several = nn.Sequential(nn.Flatten(), nn.Linear(75, 3))
    wanted = torch.tensor([[1, 0, -1], [0, 1, 1], [1, 1, 0], [0, -1, 0]])
    known = wanted >= 0
    loss, _ = clead.robust_loss(several, x, wanted, "standard", task="multilabel")
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(several(x)[known], wanted[known].float()))


def test_what_does_not_go_with_masks_is_one_line():
    x, y = torch.rand(4, 3, 5, 5), torch.zeros(4, dtype=torch.int64)
    masks, more = torch.zeros(4, 5, 5, dtype=torch.int64), {"eps": 0.05, "task": "segmentation"}
    for model, target, method, options, line in (
        (pixel_net().net, y, "pgd_at", {"eps": 0.05}, "for a class per pixel give --task segmentation"),
        (pixel_net(), y, "pgd_at", more, "masks must be class numbers.*got torch.int64"),
        (pixel_net(), masks + 3, "pgd_at", more, r"masks must be in \[0, 3\)"),
        (pixel_net(), masks, "mart", more, "knows no segmentation; give method='clead_pixels' or .*method='pgd_at'"),
        (pixel_net(), masks, "clead", more, "method.contrastive_weight: .*; give contrastive_weight=0 or method="),
        (
            pixel_net(),
            masks,
            "pgd_at",
            {**more, "inner": "supcon"},
            "got supcon; give inner='cross_entropy' or method=",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(75, 3)), masks, "pgd_at", more, "give --task classification"),
    ):
        with pytest.raises(UserError, match=line):
            clead.RobustLoss(model, (3, 5, 5), method, **options)(x, target)
        with pytest.raises(UserError):
            clead.robust_loss(model, x, target, method, **options)
    config = clead.load_recipe("digits-clead", ["--task", "segmentation"])
    with pytest.raises(UserError, match="method.contrastive_weight: .*; give --method.contrastive_weight 0 or"):
        clead.RobustLoss(pixel_net(), (3, 5, 5), config=config)
