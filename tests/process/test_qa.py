"""The committed records of faults that were put in the way and of random harm; the programs in ``qa`` make them."""

import importlib.util
import json

from support import ROOT

QA = ROOT / "qa"


def test_the_committed_record_says_that_all_were_held():
    record = json.loads((QA / "faults.json").read_text())
    assert all(said == "held" for titles in record["faults"].values() for said in titles.values())
    assert sum(group["faults"] for group in record["counts"].values()) >= 200
    for group, titles in record["faults"].items():
        assert record["counts"][group] == {"faults": len(titles), "held": len(titles)}


def test_the_record_has_every_registered_fault(monkeypatch):
    """So that it is made anew when faults are added or taken away."""
    monkeypatch.syspath_prepend(str(QA))
    spec = importlib.util.spec_from_file_location("qa_faults", QA / "faults.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    record = json.loads((QA / "faults.json").read_text())
    titles = [(group, title) for group, title, *_ in program.FAULTS]
    assert len(titles) == len(set(titles))
    assert set(titles) == {(group, title) for group, of_group in record["faults"].items() for title in of_group}


def test_the_committed_fuzz_run_found_nothing():
    record = json.loads((QA / "fuzz.json").read_text())
    assert record["findings"] == [] and record["seconds"] >= 200
    assert min(record["rounds"].values()) >= 1 and len(record["rounds"]) == 10


def test_the_security_page_has_the_counts_of_the_records():
    page = (QA.parent / "docs" / "security.md").read_text()
    record, fuzz, readers, kills = (
        json.loads((QA / f"{name}.json").read_text()) for name in ("faults", "fuzz", "fuzz_readers", "kills")
    )
    for group, count in record["counts"].items():
        assert f"\n| {group} | {count['faults']} | {count['held']} |" in page
    assert f"{sum(count['faults'] for count in record['counts'].values())} faults" in page
    assert f"| {sum(fuzz['rounds'].values())} rounds, {len(fuzz['findings'])} findings |" in page
    inputs = sum(readers[name]["read"] + readers[name]["refused"] for name in readers if name != "versions")
    assert f"| {inputs:,} inputs, 0 findings |" in page
    killed = sum(kills[name]["kills_while_working"] for name in ("train", "evaluate", "tune"))
    assert f"| {killed} kills, 0 differences |" in page
    for name in ("faults", "fuzz", "fuzz_readers", "kills"):
        assert f"`python qa/{name}.py" in page
