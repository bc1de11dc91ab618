"""Validation under attack in the trainers of Lightning and transformers, with the real libraries."""

from __future__ import annotations

import importlib
import logging
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_jaccard_index

import clead
from clead import cli
from clead.callbacks.validation import Validation
from clead.errors import UserError
from clead.weights.files import load_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # those libraries' own


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def linear(weight):
    """Logits −w·x and w·x around 0.5, of one-channel images of len(w) pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(weight), 2))
    with torch.no_grad():
        rows = torch.tensor([[-w for w in weight], weight])
        net[1].weight.copy_(rows)
        net[1].bias.copy_(-0.5 * rows.sum(1))
    return net


def loader(images=64, batch_size=16):
    x = 0.3 + 0.4 * torch.rand(images, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, torch.arange(images) % 2), batch_size=batch_size)


WEIGHT = [1.0, -2.0, 0.5, 1.5]


def test_a_linear_model_in_closed_form():
    """An image withstands L∞ eps iff its margin is above eps times the weights' L1 norm; and so with the dual norm of L2."""
    x, y = loader().dataset.tensors
    net = linear(WEIGHT).train()
    margin = (2 * y - 1) * ((x.flatten(1) - 0.5) @ torch.tensor(WEIGHT))
    for norm, dual in (("linf", 5.0), ("l2", torch.tensor(WEIGHT).norm().item())):
        found = Validation(eps=0.05, norm=norm).measure(net, loader())
        assert found["clean_accuracy"] == (margin > 0).double().mean()
        assert found["robust_accuracy"] == (margin > 0.05 * dual).double().mean()
    assert net.training and net[1].weight.grad is None
    with torch.inference_mode():  # as Lightning validates
        assert Validation(eps=0.05, norm="l2").measure(net, loader()) == found
    assert Validation(eps=0.05, images=20).measure(net, loader())["clean_accuracy"] == (margin[:20] > 0).double().mean()


def test_masks_are_measured_pixel_by_pixel():
    """Of a model that looks at each pixel alone: one is robust iff its margin is above eps times the weights' L1 norm."""
    x, side = loader().dataset.tensors[0], torch.rand(64, 2, 2, generator=torch.Generator().manual_seed(1)) < 0.7
    net = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([-2.0, 2.0])[:, None, None, None])
        net.bias.copy_(torch.tensor([1.0, -1.0]))
    y = torch.where(side, x[:, 0] > 0.5, x[:, 0] < 0.5).long()
    margin = (2 * y - 1) * (x[:, 0] - 0.5)
    measured = Validation(eps=0.05, task="segmentation").measure(net, [(x, y)])
    assert measured["clean_accuracy"] == pytest.approx((margin > 0).double().mean().item())
    assert measured["robust_accuracy"] == pytest.approx((margin > 0.05).double().mean().item())
    for name, robust in (
        ("clean_miou", margin > 0),
        ("robust_miou", margin > 0.05),
    ):  # every lost pixel lowers both classes
        expected = multiclass_jaccard_index(torch.where(robust, y, 1 - y), y, num_classes=2)
        assert measured[name] == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(UserError, match='for masks give task="segmentation"'):
        Validation(eps=0.05).measure(net, [(x, y)])
    with pytest.raises(UserError, match="each pixel has a class, give --task segmentation"):
        Validation(eps=0.05).measure(net, loader())


def test_the_best_weights_are_kept_and_of_equals_the_later(tmp_path):
    validation, net = Validation(eps="8/255", best="runs/best.safetensors"), linear(WEIGHT)
    accuracies = validation.measure(net, loader())
    kept = []
    for bias, robust in ((1, 0.5), (2, 0.4), (3, 0.5), (4, 0.6)):
        nn.init.constant_(net[1].bias, bias)
        validation.keep(net, {**accuracies, "robust_accuracy": robust}, write=bias != 4)
        kept.append(load_weights(tmp_path / "runs/best.safetensors")[0]["1.bias"][0].item())
    assert kept == [1, 1, 3, 3] and validation.best == 0.6
    about = load_weights(tmp_path / "runs/best.safetensors")[1]
    assert about["eps"] == "8/255" and about["images"] == 64 and about["robust_accuracy"] == 0.5
    assert about["attack"].startswith("PGD-10")


@pytest.mark.parametrize("images", [0, -3])
def test_images_are_one_or_more(images):
    """-3 was all but the last three of a batch."""
    with pytest.raises(UserError, match=f"images must be at least 1, got {images}"):
        Validation(eps=0.05, images=images)


def test_mistakes_and_order(caplog):
    x, y = loader().dataset.tensors
    with pytest.raises(UserError, match=r"pixels must be in \[0, 1\].*let the model normalise"):
        Validation(eps=0.1).measure(linear(WEIGHT), [((x - 0.5) / 0.2, y)])
    with pytest.raises(UserError, match="^PGD.steps: "):
        Validation(eps=0.1, steps=0)
    with pytest.raises(UserError, match="8/255"):
        Validation(eps=8)
    by_class = y.argsort(stable=True)
    with caplog.at_level(logging.WARNING, "clead"):
        Validation(eps=0.1, images=30).measure(linear(WEIGHT), [(x[by_class], y[by_class])])
        assert "class by class, and the first 30 hold the classes 0 to 0; give a shuffled loader" in caplog.text
        caplog.clear()
        Validation(eps=0.1, images=30).measure(linear(WEIGHT), loader())
    assert not caplog.text


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def evaluated(tmp_path, monkeypatch, weights):
    """The record of ``clead evaluate`` of these weights in the network of ``make_net``, on the validation images."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef make_net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    x, y = loader().dataset.tensors
    np.savez("test.npz", x_test=(x.permute(0, 2, 3, 1) * 255).round().byte().numpy(), y_test=y.numpy())
    command = ["clead", "evaluate", "--model", "nets.py:make_net", "--weights", weights, "--data.path", "test.npz"]
    short = ["--suite", "quick", "--eval.steps", "2", "--eval.check_images", "0", "--eval.curve_points", "0"]
    monkeypatch.setattr(sys, "argv", [*command, *short, "--out", "evaluated"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    return clead.api.read_record("evaluated/evaluation.json")


@pytest.mark.slow
def test_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    from clead.callbacks.lightning import RobustValidation

    seen = []

    class Robust(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch):
            loss, metrics = clead.robust_loss(self.net, *batch, "pgd_at", eps=0.02, steps=2)
            self.log_dict(metrics)
            return loss

        def validation_step(self, batch):
            assert not torch.is_grad_enabled()

        def on_validation_epoch_end(self):
            seen.append({name: value.clone() for name, value in self.net.state_dict().items()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.5)

    def fit(epochs, **options):
        callback = RobustValidation(module="net", eps=0.02, **options)
        checkpoint = lightning.pytorch.callbacks.ModelCheckpoint("kept", monitor="val_robust_accuracy", mode="max")
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[callback, checkpoint], **settings)
        last = "last.ckpt" if (tmp_path / "last.ckpt").exists() else None
        trainer.fit(Robust(), loader(), loader(), ckpt_path=last)
        trainer.save_checkpoint("last.ckpt")
        return trainer, callback, checkpoint

    trainer, callback, checkpoint = fit(3)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert 0 <= logged["val_robust_accuracy"] <= logged["val_clean_accuracy"] <= 1 and "robust_accuracy" in logged
    best = callback.validation.best
    assert checkpoint.best_model_score.item() == pytest.approx(best)
    content, about = load_weights(tmp_path / "best.safetensors")
    assert about["robust_accuracy"] == best >= logged["val_robust_accuracy"]
    assert any(all(torch.equal(content[name], state[name]) for name in content) for state in seen[1:])
    (measured,) = trainer.validate(Robust(), loader(), verbose=False)  # in inference mode
    assert 0 <= measured["val_robust_accuracy"] <= measured["val_clean_accuracy"] <= 1
    record = evaluated(tmp_path, monkeypatch, "best.safetensors")
    assert abs(record.clean_accuracy - about["clean_accuracy"]) <= 0.05  # those images are rounded to 8 bits

    _, resumed, _ = fit(3)
    assert resumed.validation.best == best  # from the checkpoint: nothing was left to train
    with pytest.raises(UserError, match="module: the LightningModule has no 'nets'; give one of net"):
        RobustValidation(module="nets", eps=0.02)._classifier(Robust())


@pytest.mark.slow
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from clead.callbacks.transformers import RobustValidation

    x, y = loader().dataset.tensors
    samples = [{"pixel_values": image, "labels": int(label)} for image, label in zip(x, y, strict=True)]
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(image_size=2, patch_size=1, num_channels=1, num_labels=2, **size)

    class RobustTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **given):
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs)
            return clead.robust_loss(model, inputs["pixel_values"], inputs["labels"], "trades", eps=0.02, steps=1).loss

    def make_trainer(epochs):
        arguments = transformers.TrainingArguments(
            output_dir="hf", num_train_epochs=epochs, per_device_train_batch_size=16, use_cpu=True, report_to="none",
            eval_strategy="epoch", save_strategy="epoch", disable_tqdm=True, learning_rate=1e-2,
            load_best_model_at_end=True, metric_for_best_model="robust_accuracy", greater_is_better=True,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config)
        trainer = RobustTrainer(model, arguments, train_dataset=samples, eval_dataset=samples)
        callback = RobustValidation(trainer, eps=0.02, steps=3)
        trainer.add_callback(callback)
        return trainer, callback

    trainer, callback = make_trainer(2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_robust_accuracy" in line]
    assert [line["epoch"] for line in lines] == [1, 2]
    best = max(line["eval_robust_accuracy"] for line in lines)
    assert callback.validation.best == best == trainer.state.best_metric
    content, about = load_weights(tmp_path / "best.safetensors")
    assert about["robust_accuracy"] == best
    assert content.keys() == trainer.model.state_dict().keys()
    trainer.model.load_state_dict(content)  # load_best_model_at_end takes the first of equals, the file the last
    found = Validation(eps=0.02, steps=3).measure(trainer.model, samples)
    assert found["robust_accuracy"] == best

    resumed, again = make_trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert again.validation.best == best


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_a_missing_library_is_one_line(library, monkeypatch):
    for name in (library, f"{library}.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"clead.callbacks.{library}", raising=False)
    with pytest.raises(
        UserError, match=rf"^clead.callbacks.{library} needs {library}.*pip install 'clead\[{library}\]'$"
    ):
        importlib.import_module(f"clead.callbacks.{library}")
