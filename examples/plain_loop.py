"""Adversarial training in your own loop: python examples/plain_loop.py [EPOCHS]"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clead

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True, drop_last=True)
net = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1)),
    *(nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)),
)

step = clead.RobustLoss(net, shape=(1, 8, 8), method="clead", eps=0.15, steps=5, augmented_view=False)
optimizer = torch.optim.AdamW(step.parameters(), lr=2e-3)  # of the network and of the projection head
for epoch in range(int(sys.argv[1]) if sys.argv[1:] else 10):
    net.train()
    for batch in loader:
        loss, metrics = step(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))

record = clead.evaluate(net.eval(), x[1400:], y[1400:], suite="quick", eps=0.15)
print(f"clean {record.clean_accuracy:.1%}, withstand the quick suite {record.robust_accuracy:.1%} of {record.data.n}")
