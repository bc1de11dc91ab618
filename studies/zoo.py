"""Make an entry of the zoo from an evaluated run: weights, configuration, record and card; or check that its record comes again.

python studies/zoo.py make digits RUN             # into src/clead/zoo/digits
python studies/zoo.py check digits runs/zoo-digits  # after the card's command
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import clead
from clead import api

ZOO = Path(__file__).parent.parent / "src" / "clead" / "zoo"
ABOUT = {
    "digits": {
        "trained": "clead train digits-clead",
        "evaluated": "clead evaluate zoo:digits",
        "chosen": "The recipe has the best mean under AutoAttack of studies/study_headline/digits (84.1 ± 0.8 %, 5 seeds; TRADES "
        "is as good within its interval). This is seed 0, not the best of the seeds.",
        "limits": "It knows 8×8 pixels of scanned digits, centred and without noise. It reads no photographs and no larger images.",
    },
    "mnist": {
        "trained": "clead train mnist-clead --train.budget 42",
        "evaluated": "clead evaluate zoo:mnist --eval.images 500",
        "chosen": "The recipe has the best mean under AutoAttack of studies/study_headline/mnist (90.6 ± 0.6 %, 3 seeds; TRADES is "
        "as good within its interval). This model, seed 0, had a third of that compute: the full recipe makes a better one.",
        "limits": "It knows white digits on black, centred, of 28×28 pixels. It reads no photographs and no letters.",
    },
    "cifar10-small": {
        "trained": "clead train cifar10-small-fgsm-rs",
        "evaluated": "clead evaluate zoo:cifar10-small --eval.images 500",
        "chosen": "The recipe has the best mean under AutoAttack of studies/study_headline/cifar10 (26.1 ± 1.7 %, 3 seeds; C-LEAD, "
        "25.9 ± 2.3 %, is as good within its interval). This is seed 0, not the best of the seeds.",
        "limits": "It is a first look, not a robust classifier of photographs: more than four images in ten are wrong when clean, "
        "and networks that are a hundred times larger and trained for days keep 70 % under the same attack. Its images were "
        "JPEG-coded copies of CIFAR-10.",
    },
}


def make(name: str, run: Path) -> None:
    """Write the entry, in place of an older one."""
    about, folder = ABOUT[name], ZOO / name
    shutil.rmtree(folder, ignore_errors=True)
    clead.export_run(run, out=folder, format="safetensors", licence="mit", show=False)
    (folder / "evaluation.json").unlink(missing_ok=True)  # a run has it in results
    (folder / "results").mkdir()
    shutil.copy(run / "results" / "evaluation.json", folder / "results")
    shutil.copy(run / "outcome.json", folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    text = (
        f'## In the zoo\n\nThis is `zoo:{name}` of clead: `clead.load("zoo:{name}")`, `clead playground zoo:{name}`.\n\n'
        f"- Trained by `{about['trained']}`. {about['chosen']}\n"
        f"- The figures above come again, image by image, by `{about['evaluated']}`.\n"
        f"- {about['limits']}\n\n"
    )
    (folder / "README.md").write_text(card.replace("## Use\n", f"{text}## Use\n", 1), encoding="utf-8")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()):,} bytes")


def check(name: str, results: Path) -> None:
    """Compare a new record with that of the entry; exit with 1 if an image's flag differs."""
    records = [api.read_record(source) for source in (f"zoo:{name}", results)]
    flags = [[attack.flags for attack in record.attacks] for record in records]
    counts = [{attack.name: sum(attack.flags) for attack in record.attacks} for record in records]
    print(json.dumps({"zoo": counts[0], "again": counts[1], "same images": flags[0] == flags[1]}))
    sys.exit(flags[0] != flags[1] or records[0].data.images != records[1].data.images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "check"))
    parser.add_argument("name", choices=ABOUT)
    parser.add_argument("folder", type=Path, help="the run, or the folder of the new record")
    arguments = parser.parse_args()
    {"make": make, "check": check}[arguments.action](arguments.name, arguments.folder)
