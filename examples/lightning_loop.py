"""Adversarial training in a LightningModule: python examples/lightning_loop.py [EPOCHS]"""

import sys

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clead
from clead.callbacks.lightning import RobustValidation

lightning.seed_everything(0)
digits = load_digits()
x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True, drop_last=True)
validation = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=64)


class Robust(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))

    def training_step(self, batch):
        loss, metrics = clead.robust_loss(self.net, *batch, "trades", eps=0.15, steps=5)
        self.log_dict(metrics)
        return loss

    def validation_step(self, batch):
        pass  # the callback measures

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


epochs, callback = int(sys.argv[1]) if sys.argv[1:] else 10, RobustValidation(module="net", eps=0.15)
lightning.Trainer(max_epochs=epochs, callbacks=[callback], accelerator="cpu").fit(Robust(), train, validation)
