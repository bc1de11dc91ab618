"""The record on disk: flags are a text of 0 and 1, and a record of an earlier version is read as it was."""

import json

import pytest
from pydantic import ValidationError

import clead
from clead.cli.printing import print_comparison, print_record, verdict
from clead.errors import printable
from clead.results.format import balanced_sentence
from clead.results.record import Record
from clead.results.statistics import unbalanced
from support import ROOT

FILE = ROOT / "tests" / "data" / "records" / "cifar10-small-trades-s0-standard.json"


def as_version_2(value):
    """Return the content of a record as version 2 wrote it: a list of true and false for each text of flags."""
    if isinstance(value, dict):
        return {
            key: [flag == "1" for flag in each] if key.endswith("flags") else as_version_2(each)
            for key, each in value.items()
        } | ({"schema_version": 2} if "schema_version" in value else {})
    return [as_version_2(each) for each in value] if isinstance(value, list) else value


def test_a_record_of_version_2_says_the_same():
    new = json.loads(FILE.read_text())
    old = as_version_2(new)
    a, b = (Record.model_validate_json(json.dumps(content)) for content in (new, old))
    assert (a.schema_version, b.schema_version) == (3, 2)
    assert a.model_dump(exclude={"schema_version"}) == b.model_dump(exclude={"schema_version"})
    assert a.robust_flags == old["robust_flags"] and sum(a.robust_flags) == round(a.worst.accuracy * a.worst.n)


def test_a_record_with_the_old_names_of_fields_says_the_same():
    """The committed record has them; what is written of it has the new ones."""
    old = json.loads(FILE.read_text())
    assert all({"broken", "largest"} < attack.keys() for attack in old["attacks"])
    record = Record.model_validate_json(FILE.read_text())
    attack, first = record.attacks[0], old["attacks"][0]
    assert (attack.num_successes, attack.max_distance) == (first["broken"], first["largest"])
    new = json.loads(record.model_dump_json())
    names = {"broken": "num_successes", "largest": "max_distance"}
    assert new["attacks"][0].keys() == {names.get(name, name) for name in first} | {"lost"}
    assert [check["numbers"] for check in new["checks"]] == [check["numbers"] for check in old["checks"]]
    assert any("largest" in check["numbers"] for check in new["checks"]), "a figure of a check is called as before"


def test_a_record_with_both_names_of_a_field_is_refused():
    content = json.loads(FILE.read_text())
    content["attacks"][0]["num_successes"] = 0
    with pytest.raises(ValidationError, match=r"attacks.0.broken\n  Extra inputs"):
        Record.model_validate_json(json.dumps(content))


def test_what_is_written_is_read_again():
    record = Record.model_validate_json(FILE.read_text())
    text = record.model_dump_json(indent=1)
    assert Record.model_validate_json(text) == record
    written = json.loads(text)
    assert all(set(flags) == {"0", "1"} for flags in (written["clean_flags"], written["attacks"][-1]["flags"]))


@pytest.mark.parametrize("flags", ["012", "0 1", "yes"])
def test_flags_of_other_characters_are_refused(flags):
    content = json.loads(FILE.read_text()) | {"robust_flags": flags}
    with pytest.raises(ValidationError, match="robust_flags\n.*flags are a text of 0 and 1"):
        Record.model_validate_json(json.dumps(content))


def with_classes(*classes):
    """The committed record with other classes: (images, right when clean, robust) each."""
    content = json.loads(FILE.read_text())
    content["per_class"] = [
        {"name": f"c{k}", "n": n, "clean_accuracy": clean / n, "robust_accuracy": robust / n}
        for k, (n, clean, robust) in enumerate(classes)
    ]
    return Record.model_validate_json(json.dumps(content))


def test_balanced_accuracy_is_stated_where_classes_differ_and_of_old_records_too(capsys):
    record = with_classes((90, 81, 45), (10, 2, 1))
    assert record.balanced is None, "as an earlier version wrote it"
    mean = unbalanced(record)
    assert (mean.clean.accuracy, mean.robust.accuracy) == (pytest.approx(0.55), pytest.approx(0.3))
    sentence = balanced_sentence(record)
    assert sentence.startswith(
        "classes have 10 to 90 images; where every class counts alike, 30.0\N{NO-BREAK SPACE}% are robust"
    )
    assert "55.0\N{NO-BREAK SPACE}% right when clean" in sentence
    assert f"{sentence[0].upper()}{sentence[1:]}." in verdict(record)
    assert "alike, 30.0 % are robust" in printable(verdict(record)), "as the terminal shows it"
    print_record(record)
    printed = capsys.readouterr().out
    assert "mean over classes (worst case)" in printed and "30.00%" in printed and "55.00%" in printed
    comparison = clead.compare([record, with_classes((50, 40, 30), (50, 30, 20))])
    assert [row["balanced_robust"] for row in comparison["rows"]] == [pytest.approx(0.3), pytest.approx(0.5)]
    assert [row["unbalanced"] for row in comparison["rows"]] == [True, False]
    print_comparison(comparison)
    assert "unequal numbers of images: clean 55.0%, worst case 30.0%" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(30, 20), (4, 2, 3, 1), (150, 101), (70,), ()])
def test_classes_that_hardly_differ_or_by_chance_are_not_stated(sizes, capsys):
    record = with_classes(*((n, n, 0) for n in sizes))
    assert unbalanced(record) is None and not balanced_sentence(record)
    print_record(record)
    print_comparison(clead.compare([record]))
    assert "mean over classes" not in capsys.readouterr().out
