"""Print the README's tables, and the figures in the recipes' headers, from the committed results.

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


def interval(part):
    return f"{100 * part['accuracy']:.1f} ({100 * part['low']:.1f}–{100 * part['high']:.1f})"


def records(recipe, suite):
    """Return the committed records of a recipe under a suite, by seed."""
    found = [json.loads(path.read_text()) for path in sorted((HERE / "records").glob(f"{recipe}-s?-{suite}.json"))]
    return {record["training"]["seed"]: record for record in found}


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


def small(recipes):
    """AutoAttack of seed 0 with its interval over images; clean and quick suite over all seeds."""
    print("| recipe | clean % | AutoAttack % (seed 0, 95 % interval) | quick suite % | compute |")
    print("|---|---|---|---|---|")
    for recipe, name in recipes.items():
        quick, standard = records(recipe, "quick"), records(recipe, "standard")
        clean, robust = ([record[key]["accuracy"] for record in quick.values()] for key in ("clean", "worst"))
        whole = interval(standard[0]["worst"]) if 0 in standard else "–"
        compute = statistics.mean(record["training"]["forward_equivalents"] for record in quick.values())
        print(f"| {name} | {percent(clean)} | {whole} | {percent(robust)} | {compute:.0f} |")
        if 0 in standard:
            gap = 100 * (quick[0]["worst"]["accuracy"] - standard[0]["worst"]["accuracy"])
            stages = ", ".join(f"{p['name']} {100 * p['robust']['accuracy']:.1f}" for p in standard[0]["attacks"])
            print(
                f"    notes {standard[0]['notes']}; seeds {sorted(quick)}; quick − standard {gap:.1f} points; seed 0 after {stages}"
            )


if __name__ == "__main__":
    digits()
    print()
    small({f"cifar10-small-{key}": name for key, name in NAMES.items()})
    print()
    small({"mnist-clead": "mnist-clead"})
