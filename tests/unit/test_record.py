"""The record on disk: flags are a text of 0 and 1, and a record of an earlier version is read as it was."""

import json

import pytest
from pydantic import ValidationError

from clead.results.record import Record
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
