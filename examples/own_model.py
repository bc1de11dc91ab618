"""Harden your own ``nn.Module`` on your own images, beside the same network trained without attacks.

python examples/own_model.py                        # on scikit-learn's digits
python examples/own_model.py photos --size 32       # on a folder with train/CLASS/*.jpg (and test/CLASS/*.jpg), or a .npz
"""

import argparse
from pathlib import Path

from torch import nn

import clead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", nargs="?", help="your images; scikit-learn's digits if left out")
parser.add_argument("--size", type=int, default=32, help="side to which your images are resized, in pixels")
parser.add_argument("--eps", default=None, help="radius in L∞; 0.15 for digits, 8/255 for your images")
parser.add_argument("--budget", default="120", help="compute, in forward-equivalents per training image")
parser.add_argument("--out", type=Path, default=Path("runs"))
arguments = parser.parse_args()


def make_net(channels, classes):
    """Any network from pixels in [0, 1] to one logit per class; its last layer is linear."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, classes)),
    )


common = ["--train.budget", arguments.budget, "--eval.suite", "quick", "--eval.images", "200"]
if arguments.data:
    common += ["--data.name", "auto", "--data.path", arguments.data, "--data.image_size", str(arguments.size)]
common += ["--threat.eps", arguments.eps or ("8/255" if arguments.data else "0.15")]
for recipe in ("digits-standard", "digits-clead"):
    config = clead.load_recipe(recipe, common)
    splits = config.data.load(config.train.seed)  # training, validation and test images, and the names of the classes
    net = make_net(splits.train.images.shape[1], len(splits.classes))
    run = clead.train(config, model=net, data=splits, out=arguments.out / f"own-{recipe.removeprefix('digits-')}")
    record = clead.evaluate_run(run.path, model=net, data=splits).record
    low, high, n = record.worst.low, record.worst.high, record.data.n
    print(
        f"{recipe}: clean {record.clean_accuracy:.1%}, withstand the quick suite {record.robust_accuracy:.1%}", end=" "
    )
    print(f"(95 % interval {low:.1%} – {high:.1%}, n = {n})")
