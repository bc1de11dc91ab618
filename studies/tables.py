"""Print the tables of docs/results/, and the figures in the recipes' headers, from the committed results.

python studies/tables.py                                                       # the tables of docs/results/
python studies/tables.py studies/study_headline/digits.json --against clead       # of a study, with paired differences
"""

import argparse
import json
import statistics
from pathlib import Path

from scipy import stats

HERE = Path(__file__).parent
HEADLINE = {
    "clead": "C-LEAD",
    "clead-free": "C-LEAD on free AT",
    "clead-3": "C-LEAD, 3 inner steps",
    "trades": "TRADES",
    "trades-3": "TRADES, 3 inner steps",
    "free": "free AT",
    "trades-awp": "TRADES-AWP",
    "mart": "MART",
    "pgd-at": "PGD-AT",
    "fgsm-rs": "FGSM-RS",
    "fgsm-rs-gradalign": "FGSM-RS with GradAlign",
    "standard": "standard",
    "clead-published-full": "C-LEAD as published, all fine-tuned",
    "clead-published": "C-LEAD as published, linear head",
}

FORMS = {
    "free contrast 1 cold": "free AT, contrast between adversaries of a class, weight 1, τ 0.2",
    "free contrast 1": "the same, τ 0.5",
    "clead cooling": "TRADES + contrast, τ from 0.5 to 0.1",
    "free contrast 3": "free AT, contrast between adversaries, weight 3",
    "clead free 4": "TRADES + contrast, adversaries kept for 4 steps",
    "free": "**free AT**",
    "clead": "TRADES + contrast, weight 0.3, τ 0.5 (digits-clead)",
    "clead hard": "… hard negatives weighted more",
    "clead logits": "… of the logits",
    "free contrast 0.3": "free AT, contrast between adversaries, weight 0.3",
    "clead others": "… negatives of other classes only",
    "clead up": "… weight growing",
    "trades": "**TRADES**",
    "clead prototype": "… with class prototypes",
    "clead stop": "… no gradient to the clean side",
    "clead adversaries": "… between adversaries only",
    "clead down": "… weight falling",
    "clead asymmetric": "… asymmetric InfoNCE",
    "clead queue": "… momentum encoder and queue of 512",
    "clead layer": "… of an inner layer",
    "clead at adversaries": "PGD-AT + contrast between adversaries",
    "pgd-at": "**PGD-AT**",
    "acl then trades": "ACL for a third of the compute, then TRADES",
    "mart": "**MART**",
    "clead awp": "TRADES-AWP + contrast",
    "trades-awp": "**TRADES-AWP**",
    "acl then trades-awp": "ACL, then TRADES-AWP",
}

UNFORESEEN = {"l2:0.6": "L2 %", "l1:1": "L1 %", "spatial": "rotations, shifts %", "corruptions": "corruptions %"}


def percent(values):
    """Return mean ± standard deviation over seeds, in percent."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def by_variant(rows):
    """Return what a study measured, by variant and seed."""
    by = {}
    for row in rows:
        robust = {name: part["robust_accuracy"] for name, part in row.get("suites", {}).items()}
        robust = robust or {"robust": row["robust_accuracy"]}
        found = {"clean": row["clean_accuracy"], "stored": row.get("transferred_accuracy"), **robust}
        flags = {"flags": [int(flag) for flag in row["robust_flags"]]} if "robust_flags" in row else {}
        by.setdefault(row["variant"], {})[row["seed"]] = {**found, "compute": row["forward_equivalents"], **flags}
    return by


def committed(name):
    return json.loads((HERE / name).read_text())


def headline(name, ours="clead"):
    """Every method, ``ours`` minus it with 95 % intervals, and what is kept of stored images."""
    rows = committed(f"study_headline/{name}.json")
    by, seeds = by_variant(rows), {row["seed"] for row in rows}
    print("| method | clean % | AutoAttack % | C-LEAD − it | PGD suite % | stored images % | compute |")
    print("|---|---|---|---|---|---|---|")
    for key in sorted(by, key=lambda key: -statistics.mean(found["standard"] for found in by[key].values())):
        mine = by[key].values()
        clean, standard, pgd = (spread(found[part] for found in mine) for part in ("clean", "standard", "pgd"))
        stored = spread(found["stored"] for found in mine if found["stored"] is not None)
        title = HEADLINE[key] + (f" ({len(mine)} of {len(seeds)} seeds)" if len(mine) < len(seeds) else "")
        gain = "" if key == ours else both_intervals(by[ours], by[key])
        compute = statistics.mean(found["compute"] for found in mine)
        print("| " + " | ".join([title, clean, standard, gain, pgd, stored, f"{compute:.0f}"]) + " |")
    print(f"\nn = {rows[0]['n']} test images, {len(seeds)} seeds")


def forms():
    """Every form of contrast that was screened, and it minus TRADES, paired over seeds."""
    by = by_variant(committed("screen_digits.json"))
    assert set(by) == set(FORMS)
    print("| form | robust % | against TRADES |\n|---|---|---|")
    for key, title in FORMS.items():
        gain = "" if key == "trades" else difference(by[key], by["trades"], "robust")
        print(f"| {title} | {percent([found['robust'] for found in by[key].values()])} | {gain} |")


def unforeseen():
    """Every method under threats that it was not trained against."""
    by = by_variant(committed("unforeseen_digits.json"))
    print("| method | " + " | ".join(UNFORESEEN.values()) + " |" + "\n|---" + "|---" * len(UNFORESEEN) + "|")
    for key, title in HEADLINE.items():
        if key in by:
            cells = [percent([found[threat] for found in by[key].values()]) for threat in UNFORESEEN]
            print(f"| {title} | " + " | ".join(cells) + " |")


def transfer():
    """What a linear probe on shrunk MNIST keeps, at each C, and C-LEAD minus it."""
    by = by_variant(committed("transfer_digits.json"))
    suites = ("C = 0.1", "C = 1", "C = 10")
    print("| method | clean % | " + " | ".join(f"{name}: PGD-50 % | C-LEAD − it" for name in suites) + " |")
    print("|---|---" + "|---|---" * len(suites) + "|")
    for key in sorted(by, key=lambda key: -statistics.mean(found["C = 1"] for found in by[key].values())):
        cells = [HEADLINE[key], percent([found["clean"] for found in by[key].values()])]
        for name in suites:
            gain = "" if key == "clead" else difference(by["clead"], by[key], name)
            cells += [percent([found[name] for found in by[key].values()]), gain]
        print("| " + " | ".join(cells) + " |")


def stored():
    """What C-LEAD as published, and models that never saw such images, have right of the images that it stored."""
    rows = committed("stored_images.json")
    print(
        "| data | as published % | plain training % | C-LEAD % | median size in L∞ | within ε % |\n|---|---|---|---|---|---|"
    )
    for data in sorted({row["data"] for row in rows}, reverse=True):
        here = [row for row in rows if row["data"] == data]
        own = [row for row in here if row["model"] == row["stored_by"]]
        cells = [f"{data} ({len(own)} seeds)", spread(row["right"] for row in own)]
        cells += [
            spread(row["right"] for row in here if row["model"].rpartition("-s")[0] == name)
            for name in ("standard", "clead")
        ]
        cells += [f"{statistics.mean(row['median_linf'] for row in own):.3f} (ε {own[0]['eps']:.3f})"]
        cells += [f"{100 * statistics.mean(row['within_eps'] for row in own):.0f}"]
        print("| " + " | ".join(cells) + " |")


FEW_LABELS = {
    "clead": "C-LEAD, pseudo-labels",
    "rst": "the same without contrast",
    "pgd-at": "PGD-AT, the labels alone",
    "pgd-at half": "PGD-AT with half the compute",
    "trades": "TRADES, the labels alone",
    "fgsm-rs": "FGSM-RS, the labels alone",
}

FEW_DIGITS = {
    "clead": "C-LEAD, labelled and unlabelled images",
    "clead without contrast": "the same without contrast",
    "clead rst": "C-LEAD, pseudo-labels",
    "trades rst": "TRADES, pseudo-labels",
    "pgd-at rst": "PGD-AT, pseudo-labels",
    "trades": "TRADES, the labels alone",
    "pgd-at": "PGD-AT, the labels alone",
    "teacher": "the teacher",
}

NOISE = {
    "clead": "C-LEAD",
    "clead nt_xent": "C-LEAD, NT-Xent (contrast without labels)",
    "free contrast": "C-LEAD on free AT",
    "trades": "TRADES",
    "free": "free AT",
    "mart": "MART",
    "pgd-at": "PGD-AT",
}


def by_share(name, suite, titles, shares):
    """Every method with each share of the labels, given or wrong, and C-LEAD minus it, paired over seeds."""
    rows = committed(f"{name}.json")
    by, seeds = by_variant(rows), {row["seed"] for row in rows}
    said = "AutoAttack" if suite == "standard" else f"{suite} suite"
    heads = [f"{share} %: clean % | {said} % | C-LEAD − it" for share in shares]
    print("| method | " + " | ".join(heads) + " |\n|---" + "|---|---|---" * len(shares) + "|")
    for key, title in titles.items():
        every = [by[f"{key} {share} %"] for share in shares if f"{key} {share} %" in by]
        if not every:
            continue
        least = min(len(mine) for mine in every)
        cells = [title + (f" ({least} of {len(seeds)} seeds)" if least < len(seeds) else "")]
        for share in shares:
            mine, ours = by.get(f"{key} {share} %", {}), by[f"clead {share} %"]
            robust = [found[suite] for found in mine.values() if suite in found]
            gain = "" if key == "clead" else both_intervals(ours, mine, suite)
            cells += [spread(found["clean"] for found in mine.values()), spread(robust), gain]
        print("| " + " | ".join(cells) + " |")
    print(f"\nn = {rows[0]['n']} {rows[0]['split']} images, {len(seeds)} seeds")


SEARCH = {
    "trades": "TRADES",
    "trades shifted": "TRADES, shifted images",
    "trades wider": "TRADES, shifted, trained at ε 0.15",
    "trades supcon": "with SupCon",
    "trades supcon shifted": "with SupCon, shifted images",
    "trades supcon wider": "with SupCon, shifted, trained at ε 0.125",
    "trades supcon 0.3 wider": "with SupCon of weight 0.3, shifted, trained at ε 0.2",
}

SEARCH_CIFAR10 = {
    "fgsm-rs": "FGSM-RS",
    "pgd-at": "PGD-AT",
    "trades": "TRADES",
    "fgsm-rs supcon": "FGSM-RS with SupCon",
    "trades supcon": "TRADES, κ = 12, with SupCon",
}

MASKS = {"plain": "plain training", "pgd-at": "PGD-AT", "trades": "TRADES", "clead": "C-LEAD of pixels"}


def search(name, titles, against):
    """Every method's recall@1 and mAP among classes that it never saw, and it minus ``against``, the best without contrast."""
    by = {}
    for row in committed(f"{name}.json"):
        metrics = {metric: values[1] for metric, values in row["metrics"].items()}
        by.setdefault(row["variant"], {})[row["seed"]] = {
            "recall@1": row["clean_accuracy"],
            "query attacked": row["robust_accuracy"],
            "item attacked": metrics["recall@1 with an attacked item"],
            "mAP, query attacked": metrics["mean average precision"],
        }
    columns = list(by[against][0])
    print("| method | " + " | ".join(f"{column} % | − best without" for column in columns) + " |")
    print("|---" + "|---|---" * len(columns) + "|")
    for key, title in titles.items():
        cells = [title + (f" ({len(by[key])} seeds)" if len(by[key]) != len(by[against]) else "")]
        for column in columns:
            gain = "" if key == against else difference(by[key], by[against], column)
            cells += [percent([one[column] for one in by[key].values()]), gain]
        print("| " + " | ".join(cells) + " |")
    print(f"\nn = {row['n']} queries, {len(by[against])} seeds")


def masks():
    """Right pixels and mIoU of every method, from random weights and from a robust encoder, clean and under sea."""
    rows = committed("segmentation.json")
    print(
        "| method | encoder | right pixels % | under attack % | mIoU % | under attack % | of small objects % |\n"
        + "|---" * 7
        + "|"
    )
    for key, title in MASKS.items():
        for start, encoder in (("", "random"), (", robust start", "robust")):
            mine = [row for row in rows if row["variant"] == key + start]
            ious = [row["metrics"]["mIoU"] for row in mine]
            small = [row["metrics"]["IoU of small objects"][1] for row in mine]
            columns = [[row["clean_accuracy"] for row in mine], [row["robust_accuracy"] for row in mine]]
            columns += [[clean for clean, _ in ious], [robust for _, robust in ious], small]
            print("| " + " | ".join([title, encoder, *(spread(column) for column in columns)]) + " |")
    print(f"\nn = {rows[0]['n']} images, {len({row['seed'] for row in rows})} seeds")


def study(rows, against):
    """Every variant under every suite, and ``against`` minus it, paired over seeds, with a 95 % t-interval."""
    names = sorted({suite for row in rows for suite in row.get("suites", {})}) or ["robust"]
    by = by_variant(rows)
    columns = [*names, *(["stored"] if any("transferred_accuracy" in row for row in rows) else [])]
    titles = [f"{name} % | {against} − it" if name in names else f"{name} %" for name in columns]
    print(f"n = {rows[0]['n']} {rows[0]['split']} images; mean ± standard deviation over seeds\n")
    print("| variant | seeds | clean % | " + " | ".join(titles) + " | compute |")
    print("|---" * (4 + sum(1 + (name in names) for name in columns)) + "|")
    for variant in sorted(by, key=lambda v: -statistics.mean(found.get(names[-1], 0) for found in by[v].values())):
        mine = by[variant]
        cells = [variant, str(len(mine)), spread(found["clean"] for found in mine.values())]
        for name in columns:
            cells.append(spread(found[name] for found in mine.values() if found.get(name) is not None))
            if name in names:
                cells.append("" if variant == against else difference(by.get(against, {}), mine, name))
        print("| " + " | ".join([*cells, f"{statistics.mean(found['compute'] for found in mine.values()):.0f}"]) + " |")


def spread(values):
    values = list(values)
    return percent(values) if len(values) > 1 else "".join(f"{100 * value:.1f}" for value in values)


def difference(one, other, name):
    pairs = [100 * (one[seed][name] - other[seed][name]) for seed in one if seed in other and name in other[seed]]
    if len(pairs) < 3:  # of two seeds the interval is thirteen standard errors wide
        return ""
    half = stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs)
    return f"{statistics.mean(pairs):+.1f} ± {half:.1f}"


def both_intervals(one, other, name="standard"):
    """The difference with its interval over trainings and, in brackets, the one over images where their flags were kept."""
    pairs = [(one[seed], other[seed]) for seed in one if seed in other]
    said = difference(one, other, name)
    if not said or not all("flags" in found for pair in pairs for found in pair):
        return said
    each = [[a - b for a, b in zip(mine["flags"], its["flags"], strict=True)] for mine, its in pairs]
    means = [statistics.mean(image) for image in zip(*each, strict=True)]
    return f"{said} (± {100 * stats.norm.ppf(0.975) * stats.sem(means):.1f})"


TABLES = {
    "digits": lambda: headline("digits"),
    "cifar10": lambda: headline("cifar10"),
    "mnist": lambda: headline("mnist"),
    "forms": forms,
    "unforeseen": unforeseen,
    "transfer": transfer,
    "stored images": stored,
    "few labels": lambda: by_share("few_labels_cifar10", "standard", FEW_LABELS, (10, 5)),
    "few labels, digits": lambda: by_share("few_labels_digits", "quick", FEW_DIGITS, (10, 5, 2)),
    "search": lambda: search("retrieval_omniglot", SEARCH, "trades wider"),
    "search, cifar10": lambda: search("retrieval_cifar10", SEARCH_CIFAR10, "fgsm-rs"),
    "masks": masks,
    "wrong labels": lambda: by_share("label_noise_digits", "quick", NOISE, (20, 40)),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", nargs="?", type=Path, help="the JSON file of a study; the tables of docs/results/ if left out"
    )
    parser.add_argument("--against", default="clead", help="the variant whose differences to the others are shown")
    arguments = parser.parse_args()
    if arguments.study is not None:
        study(json.loads(arguments.study.read_text()), arguments.against)
        raise SystemExit
    for name, table in TABLES.items():
        print(f"## {name}\n")
        table()
        print()
