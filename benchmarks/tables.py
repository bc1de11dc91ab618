"""Print the README's tables from the committed results.

python benchmarks/tables.py
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
NAMES = {"standard": "standard", "pgd-at": "PGD-AT", "trades": "TRADES", "clead": "C-LEAD"}


def percent(values):
    """Return mean ± standard deviation over seeds, in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def digits():
    rows = json.loads((HERE / "results_digits.json").read_text())
    print("| method | clean % | worst case % | compute |\n|---|---|---|---|")
    for key, name in NAMES.items():
        mine = [row for row in rows if row["variant"] == key]
        clean, robust = ([row[k] for row in mine] for k in ("clean_accuracy", "robust_accuracy"))
        compute = statistics.mean(row["forward_equivalents"] for row in mine)
        print(f"| {name} | {percent(clean)} | {percent(robust)} | {compute:.0f} |")
    print(f"\nn = {rows[0]['n']} test images, {len(mine)} seeds")
    by = {key: {row["seed"]: row["robust_accuracy"] for row in rows if row["variant"] == key} for key in NAMES}
    for other in ("pgd-at", "trades"):
        print(f"C-LEAD - {other}, paired over seeds: {percent([by['clead'][s] - by[other][s] for s in by['clead']])}")


def cifar():
    print(
        "| recipe | clean % | FGSM % | PGD-50 CE % | PGD-50 margin % | worst case % | compute |\n|---|---|---|---|---|---|---|"
    )
    for key, name in NAMES.items():
        record = json.loads((HERE / "records" / f"cifar10-small-{key}.json").read_text())
        attacks = " | ".join(f"{100 * part['robust']['accuracy']:.1f}" for part in record["attacks"])
        worst = record["worst"]
        shown = f"{100 * worst['accuracy']:.1f} ({100 * worst['low']:.1f}–{100 * worst['high']:.1f})"
        print(
            f"| {name} | {100 * record['clean']['accuracy']:.1f} | {attacks} | {shown} | "
            f"{record['training']['forward_equivalents']:.0f} |"
        )


if __name__ == "__main__":
    digits()
    print()
    cifar()
