"""Evaluate a model that somebody else trained, and read the checks of gradient masking.

python examples/somebody_elses_model.py                                        # a flawed one, made here
python examples/somebody_elses_model.py nets.py:make_net photos net.safetensors   # yours: factory, images, weights
"""

import argparse

import torch
from safetensors.torch import load_file
from torch import nn

import clead
from clead.config import evaluation_config
from clead.models.user_model import make_module

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="FILE.py:FUNCTION that makes the network")
parser.add_argument("data", nargs="?", help="a folder with test/CLASS/*.png, a .npz with x_test and y_test …")
parser.add_argument("weights", nargs="?", help="a .safetensors file")
parser.add_argument("--eps", default="8/255", help="radius in L∞")
parser.add_argument("--images", type=int, default=128)
arguments = parser.parse_args()

if arguments.model:
    splits = evaluation_config("theirs", ["--data.path", arguments.data]).data.load(0, training=False)
    net = make_module(arguments.model, len(splits.classes))
    net.load_state_dict(load_file(arguments.weights))
else:  # trained as in many a tutorial, with a softmax as its last layer
    splits = clead.load_recipe("digits-standard").data.load(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    x, y = splits.train.images / 255, splits.train.labels
    optimiser = torch.optim.Adam(body.parameters(), lr=0.01)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(body(x), y).backward()
        optimiser.step()
    net = nn.Sequential(body, nn.Softmax(dim=1))

images, labels = splits.test.images[: arguments.images], splits.test.labels[: arguments.images]
record = clead.evaluate(net.eval(), images, labels, suite="quick", eps=arguments.eps, classes=splits.classes)
print(f"clean {record.clean_accuracy:.1%}, withstand L∞ {record.threat.eps_text} {record.robust_accuracy:.1%}", end=" ")
print(f"(95 % interval {record.worst.low:.1%} – {record.worst.high:.1%}, n = {record.data.n}, quick suite)")
for check in record.checks:
    print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.explanation}")
