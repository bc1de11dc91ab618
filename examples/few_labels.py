"""Train where only a tenth of the images have a label: C-LEAD on all images beside TRADES on the labelled ones.

python examples/few_labels.py                                # on scikit-learn's digits, most labels hidden
python examples/few_labels.py photos --size 32               # on your images
"""

import argparse
from pathlib import Path

import clead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", nargs="?", help="your images (train/CLASS/*.jpg, a .npz …); digits if left out")
parser.add_argument("--size", type=int, default=32, help="side to which your images are resized, in pixels")
parser.add_argument("--labelled", default="0.1", help="part of the training images whose label is used")
parser.add_argument("--budget", default="120", help="compute, in forward-equivalents per training image")
parser.add_argument("--out", type=Path, default=Path("runs"))
arguments = parser.parse_args()

common = ["--train.budget", arguments.budget, "--eval.suite", "quick", "--eval.images", "200"]
common += ["--data.labelled", arguments.labelled]
if arguments.data:
    common += ["--data.name", "auto", "--data.path", arguments.data, "--data.image_size", str(arguments.size)]
    common += ["--threat.eps", "8/255"]
# Half of every batch has labels; from the other half the model learns to answer the same under attack. TRADES has no use for
# images without a label here, and so sees the labelled ones more often: both compute as much.
methods = {"trades": ["--method.name", "trades"], "clead": ["--data.labelled_share", "0.5"]}

for name, own in methods.items():
    config = clead.load_recipe("digits-clead", [*common, *own])
    run = clead.train(config, out=arguments.out / f"few-{name}")
    record = clead.evaluate_run(run.path).record
    low, high, n = record.worst.low, record.worst.high, record.data.n
    print(f"{name}: clean {record.clean_accuracy:.1%}, withstand the quick suite {record.robust_accuracy:.1%}", end=" ")
    print(f"(95 % interval {low:.1%} – {high:.1%}, n = {n})")

print(f"then: clead compare {arguments.out}/few-trades {arguments.out}/few-clead")
