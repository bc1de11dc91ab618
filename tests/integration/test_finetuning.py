"""How a model that exists already is trained on: modes, a radius that rises, rates by layer, layers that wait, statistics."""

import dataclasses
import math
import shlex

import pytest
import torch
from torch import nn

import clead
from clead.api import training as api_training
from clead.config import Optim, load_recipe
from clead.errors import UserError
from clead.interfaces import ImageSet
from clead.methods.pgd_at import PGDAT
from clead.models.modes import attack_mode, set_forward_mode
from clead.models.split import AdaptedModel
from clead.runs.directory import RunDir
from clead.runs.resume import Checkpoints
from clead.threats.linf import Linf
from clead.training import freezing, trainer
from clead.training.batch_statistics import measure_statistics
from clead.training.optim import make_optimizer, make_schedule, parameter_groups
from support import Killed, same, saved_weights

TINY = shlex.split("""--data.limit_train 60 --data.batch_size 20 --attack.steps 2 --train.validate_steps 1 --train.device cpu
--optim.name adamw --optim.lr 0.01 --optim.clip_norm null""")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6, 10),
    )


def fit(out, *overrides, model=None, **keys):
    length = [] if "--train.minutes" in overrides else ["--train.epochs", "2"]
    config = load_recipe("digits-pgd-at", [*TINY, *length, *overrides])
    return clead.train(config, out=out, model=network() if model is None else model, show=False, **keys)


def statistics_of(module):
    return {name: value for name, value in module.state_dict().items() if "running" in name}


# --------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("mode", "norm", "dropout"),
    [("train", True, True), ("frozen_batch_norm", False, True), ("eval", False, False)],
)
def test_each_mode_of_the_forward_switches_what_it_names(mode, norm, dropout):
    net = network()
    set_forward_mode(net, mode)
    assert (net[1].training, net[5].training) == (norm, dropout)


def test_an_attack_in_the_mode_of_the_forward_sees_the_function_that_learns_and_leaves_its_statistics():
    net = network().train()
    net[5].p = 0.0
    x = torch.rand(8, 1, 8, 8)
    expected = copy_of(net)(x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with attack_mode(net, "forward"):
        seen = net(x)
        assert not any(p.requires_grad for p in net.parameters())
    assert torch.equal(seen, expected) and same(before, net.state_dict())
    assert net[1].track_running_stats and net.training and all(p.requires_grad for p in net.parameters())
    with attack_mode(net):
        assert not torch.allclose(net(x), expected)


def copy_of(net):
    copied = network().train()
    copied.load_state_dict(net.state_dict())
    copied[5].p = net[5].p
    return copied


def test_a_training_in_evaluation_mode_keeps_the_statistics_and_draws_nothing(tmp_path):
    frozen = fit(tmp_path / "frozen", "--train.forward_mode", "eval")
    assert same(statistics_of(frozen.model.module), statistics_of(network()))
    net = network()
    net[5].p = 0.0
    assert same(
        saved_weights(tmp_path / "frozen"),
        saved_weights(fit(tmp_path / "no_dropout", "--train.forward_mode", "eval", model=net).path),
    )
    norm_only = fit(tmp_path / "norm", "--train.forward_mode", "frozen_batch_norm")
    assert same(statistics_of(norm_only.model.module), statistics_of(network()))
    assert not same(saved_weights(tmp_path / "frozen"), saved_weights(norm_only.path))
    usual = fit(tmp_path / "usual")
    assert not same(statistics_of(usual.model.module), statistics_of(network()))


def test_the_attack_is_made_in_the_mode_that_is_asked_for(tmp_path, monkeypatch):
    seen = []
    original = PGDAT.adversaries

    def spy(self, model, batch, y, step):
        def attack(objective, images, threat, *, generator=None):
            seen.append((model.module[1].training, model.module[5].training))
            return images

        return original(self, model, batch, y, step._replace(attack=attack))

    monkeypatch.setattr(PGDAT, "adversaries", spy)
    fit(tmp_path / "eval")
    assert set(seen) == {(False, False)}
    seen.clear()
    fit(tmp_path / "forward", "--train.attack_mode", "forward")
    assert set(seen) == {(True, True)}
    seen.clear()
    fit(tmp_path / "frozen", "--train.attack_mode", "forward", "--train.forward_mode", "frozen_batch_norm")
    assert set(seen) == {(False, True)}


# ---------------------------------------------------------------------------------------------- the radius


def test_the_radius_rises_as_the_ramp_says_and_validation_is_at_the_full_one(tmp_path, monkeypatch):
    radii, validated = [], []
    original = PGDAT.views

    def spy(self, model, batch, step):
        radii.append(float(step.threat.eps))
        views = original(self, model, batch, step)
        if not step.threat.eps:
            assert torch.equal(views.images["adversarial"], batch.images)
        return views

    under_attack = trainer.accuracy_under_attack

    def validation(model, images, threat, *args, **keys):
        validated.append(float(threat.eps))
        return under_attack(model, images, threat, *args, **keys)

    monkeypatch.setattr(PGDAT, "views", spy)
    monkeypatch.setattr(trainer, "accuracy_under_attack", validation)
    fit(tmp_path / "run", "--train.epochs", "4", "--train.eps_ramp", "[0.25,0.75]", "--threat.eps", "0.3")
    probe, *steps = radii  # the first call measures what a step costs, at the full radius
    assert probe == pytest.approx(0.3)
    total = len(steps)
    assert total == 8
    assert steps == pytest.approx([0.3 * min(1, max(0, (n / total - 0.25) / 0.5)) for n in range(total)])
    assert set(validated) == {0.3}


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ("--train.eps_ramp [0.7,0.2]", "train: eps_ramp must rise, got [0.7, 0.2]"),
        ("--train.unfreeze 0.5 --train.trainable classifier", "trainable classifier holds the encoder frozen"),
        ("--train.shard true --train.unfreeze 0.5", "shard goes with neither"),
        ("--method.fold_batch_norm true --train.attack_mode forward", "statistics of the batch cannot be folded"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, rule):
    with pytest.raises(UserError) as refused:
        load_recipe("digits-pgd-at", [*TINY, *overrides.split()])
    assert rule in str(refused.value)


# ------------------------------------------------------------------------------------------- by the clock


class Clock:
    """Time that goes on by one second with every look at it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(trainer.time, "monotonic", self)

    def __call__(self):
        self.now += 1.0
        return self.now


def test_a_training_by_the_clock_ends_in_time_and_its_rates_follow_the_time(tmp_path, monkeypatch):
    rates, radii, original = [], [], PGDAT.views

    def spy(self, model, batch, step):
        radii.append(float(step.threat.eps))
        return original(self, model, batch, step)

    monkeypatch.setattr(PGDAT, "views", spy)
    step = trainer.Trainer.train_step

    def train_step(self, interrupted):
        rates.append((self.progress, self.schedule.get_last_lr()[0]))
        return step(self, interrupted)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    Clock(monkeypatch)
    overrides = (
        "--train.minutes",
        "0.5",
        "--optim.schedule",
        "cosine",
        "--optim.warmup",
        "0",
        "--train.validate_every",
    )
    run = fit(tmp_path / "run", *overrides, "99", "--train.eps_ramp", "[0,0.5]", "--threat.eps", "0.2")
    seconds, steps = run.outcome.seconds, run.outcome.steps
    assert 30 <= seconds <= 33 and steps == len(rates) > 5
    assert all(lr == pytest.approx(0.005 * (1 + math.cos(math.pi * p)), abs=1e-5) for p, lr in rates)
    assert radii[1:] == pytest.approx([0.2 * min(1, 2 * p) for p, _ in rates])
    assert [line["kind"] for line in RunDir(run.path).history()][-1] == "validation"


def count_cpu_time(monkeypatch, *, step, validation):
    """Let steps and validations take so many seconds of CPU time; return the time, which what came before has begun."""
    cpu = [1000.0]
    monkeypatch.setattr(trainer.time, "process_time", lambda: cpu[0])

    def timed(call, seconds):
        def counting(self, *arguments):
            cpu[0] += seconds
            return call(self, *arguments)

        return counting

    monkeypatch.setattr(trainer.Trainer, "train_step", timed(trainer.Trainer.train_step, step))
    monkeypatch.setattr(trainer.Trainer, "validate", timed(trainer.Trainer.validate, validation))
    return cpu


def test_validations_take_a_twentieth_of_the_minutes_at_most(tmp_path, monkeypatch):
    count_cpu_time(monkeypatch, step=1, validation=2)
    overrides = shlex.split("--train.minutes 2 --train.clock cpu --train.validate_every 0.001")
    run = fit(tmp_path / "run", *overrides)
    steps = [line["step"] for line in RunDir(run.path).history() if line["kind"] == "validation"]
    # After the first step, then every 40 s of training, the last at the end: 120 s = 112 steps and 4 validations of 2 s.
    assert steps == [1, 41, 81, 112]


def test_a_training_by_the_clock_goes_on_where_it_stopped(tmp_path, monkeypatch):
    Clock(monkeypatch)
    save, saves = Checkpoints.save, []

    def killed(self, state):
        save(self, state)
        saves.append(state["position"]["clock"])
        if len(saves) == 2:
            raise Killed

    overrides = ("--train.minutes", "0.5", "--train.checkpoint_seconds", "5")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(Killed):
            fit(tmp_path / "run", *overrides)
    assert 5 < saves[-1] < 25
    run = fit(tmp_path / "run", *overrides, resume=True)
    assert 29 <= run.outcome.seconds <= 33
    clock = [line["seconds"] for line in RunDir(run.path).history()]
    assert clock == sorted(clock)


def test_a_training_by_cpu_time_ends_in_time_whatever_the_wall_says_and_over_two_sittings(tmp_path, monkeypatch):
    Clock(monkeypatch)  # the wall: a second at each look
    cpu = count_cpu_time(monkeypatch, step=0.25, validation=2)
    step, rates = trainer.Trainer.train_step, []

    def train_step(self, interrupted):
        rates.append((self.progress, self.schedule.get_last_lr()[0]))
        if len(rates) == 40:
            self.save_checkpoint()
            raise Killed
        return step(self, interrupted)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    overrides = shlex.split("--train.minutes 0.5 --train.clock cpu --train.validate_every 20 --optim.schedule cosine")
    with pytest.raises(Killed):
        fit(tmp_path / "run", *overrides, "--optim.warmup", "0")
    cpu[0] += 500  # between the sittings
    run = fit(tmp_path / "run", *overrides, "--optim.warmup", "0", resume=True)
    assert run.outcome.cpu_seconds == pytest.approx(30, rel=0.02)
    assert run.outcome.steps + 1 == len(rates) > 70 and run.outcome.seconds > 50
    rising = [p for p, _ in rates]
    assert rising == sorted(rising) and rising[-1] > 0.98
    assert all(lr == pytest.approx(0.005 * (1 + math.cos(math.pi * p)), abs=1e-5) for p, lr in rates)


def test_the_mean_of_the_weights_has_the_last_ones_of_a_training_by_the_clock(tmp_path, monkeypatch):
    Clock(monkeypatch)
    steps, update = [], trainer.AveragedModel.update_parameters
    step = trainer.Trainer.train_step
    monkeypatch.setattr(trainer.Trainer, "train_step", lambda self, stop: (steps.append("step"), step(self, stop))[1])
    monkeypatch.setattr(
        trainer.AveragedModel, "update_parameters", lambda self, model: (steps.append("taken"), update(self, model))
    )
    overrides = shlex.split("--train.minutes 0.5 --train.swa_start 0.95 --train.validate_every 99")
    run = fit(tmp_path / "run", *overrides)
    per_epoch = round(run.outcome.steps / run.outcome.epochs)
    assert run.outcome.steps % per_epoch  # and none of the epochs ends after the start
    assert steps.count("taken") == 1 and steps[-2:] == ["step", "taken"]


def test_cpu_time_is_refused_where_it_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(api_training, "device_of", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match="CPU time says little where cuda computes, got cpu; set --train.clock wall"):
        api_training._check_start(load_recipe("digits-pgd-at", ["--train.minutes", "1", "--train.clock", "cpu"]))
    with pytest.raises(UserError, match="clock cpu is how minutes are counted, and there are none; give minutes, or"):
        load_recipe("digits-pgd-at", ["--train.clock", "cpu"])


@pytest.mark.parametrize("given", ["--train.epochs 1 --train.minutes 2", "--train.budget 3 --train.epochs 1"])
def test_two_lengths_are_refused(given):
    with pytest.raises(UserError, match="give exactly one of epochs, budget, minutes, got"):
        load_recipe("digits-pgd-at", given.split())


# ------------------------------------------------------------------------------------------- rates by layer


def adapted():
    return AdaptedModel(network(), sample_shape=(1, 8, 8))


def test_rates_fall_from_the_classifier_to_the_first_layer():
    model = adapted()
    model.add_projection(4)
    net = model.module
    settings = Optim(lr=0.8, encoder_lr=0.5, first_layer_lr=0.25)
    groups = parameter_groups([*model.parameters()], freezing.depths(model), settings)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    # Three layers of the encoder have parameters: depth 0, 1/2, 1, so 0.25^1, 0.25^(1/2), 0.25^0 of 0.8 · 0.5.
    expected = {net[0]: 0.1, net[1]: 0.2, net[3]: 0.4, net[7]: 0.8, model.projection: 0.8}
    for layer, lr in expected.items():
        assert [rate[id(p)] for p in layer.parameters()] == pytest.approx([lr] * len([*layer.parameters()]))
    assert [group["lr"] for group in groups] == sorted({*expected.values()}, reverse=True)
    optimizer = make_optimizer(groups, settings)
    for schedule in ("one_cycle", "cosine", "step", "constant"):
        scheduler = make_schedule(
            make_optimizer(groups, settings), dataclasses.replace(settings, schedule=schedule), 10
        )
        for _ in range(10):
            rates = scheduler.get_last_lr()
            assert [lr / rates[0] for lr in rates] == pytest.approx([1, 0.5, 0.25, 0.125]), schedule
            scheduler.optimizer.step()
            scheduler.step()
    assert len(optimizer.param_groups) == 4


def test_rates_by_layer_need_a_known_classifier(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"optim.encoder_lr.*ends in no nn.Linear; name its layer: --model.classifier"):
        fit(tmp_path / "run", "--optim.encoder_lr", "0.1", model=net)


def test_layers_begin_to_learn_from_the_classifier_down(tmp_path):
    model = adapted()
    depth_of = freezing.depths(model)
    learns = {}
    for tenth in range(10):
        freezing.unfreeze(depth_of, tenth / 10, 0.5)
        for number in (0, 1, 3, 7):
            learns.setdefault(number, []).append(model.module[number].weight.requires_grad)
    first = {number: flags.index(True) for number, flags in learns.items()}
    assert first == {7: 0, 3: 1, 1: 3, 0: 5}  # depths 1, 1/2, 0: from 0, 0.25 and 0.5 on
    start = network().state_dict()
    short = saved_weights(fit(tmp_path / "run", "--train.unfreeze", "0.9", "--train.epochs", "0.4").path)
    assert torch.equal(short["module.0.weight"], start["0.weight"])
    assert not torch.equal(short["module.7.weight"], start["7.weight"])


# ---------------------------------------------------------------------------------------------- statistics


def test_statistics_are_the_means_over_batches_of_clean_and_adversarial_images():
    torch.manual_seed(1)
    net = network()
    data = ImageSet(torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8), torch.arange(12) % 10)
    weights = {name: value.clone() for name, value in net.named_parameters()}
    measure_statistics(net, data, Linf(eps=0), batch_size=5, seed=0, device=torch.device("cpu"))
    with torch.no_grad():  # at eps 0 an adversarial image is the image: each batch holds it twice
        before = [net[0](torch.cat([x, x])).transpose(0, 1).flatten(1) for x in (data.images[:10] / 255).split(5)]
    assert torch.allclose(net[1].running_mean, sum(b.mean(1) for b in before) / 2, atol=1e-6)
    assert torch.allclose(net[1].running_var, sum(b.var(1) for b in before) / 2, atol=1e-6)
    assert net[1].momentum == 0.1 and all(torch.equal(weights[n], p) for n, p in net.named_parameters())
    clean = net[1].running_mean.clone()
    measure_statistics(net, data, Linf(eps=0.3), batch_size=5, seed=0, device=torch.device("cpu"))
    assert not torch.allclose(net[1].running_mean, clean, atol=1e-4)


def test_kept_weights_have_the_statistics_that_were_measured(tmp_path):
    run = fit(tmp_path / "run", "--train.batch_norm_images", "40", "--train.forward_mode", "frozen_batch_norm")
    assert not same(statistics_of(run.model.module), statistics_of(network()))
