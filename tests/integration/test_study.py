"""The queue of a study (studies/study.py): rows are kept, failures do not stop it, changed settings are refused."""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from support import ROOT

STUDY = ROOT / "studies" / "study.py"
WRONG = "  wrong: {recipe: digits-pgd-at, set: --attack.steps -1}\n"
QUEUE = """
common: --train.budget 3 --data.limit_train 60 --eval.images 10 --eval.check_images 0 --eval.curve_points 0 --eval.gallery 0
suites: [pgd]
seeds: [3]
variants:
  wrong: {recipe: digits-pgd-at, set: --attack.steps -1}
  teacher: {recipe: digits-standard, set: --data.labelled 0.5}
  student: {recipe: digits-pgd-at, needs: teacher, set: --data.labelled 0.5 --data.pseudo_labels_from NEEDED}
"""


def study(folder):
    """Run the queue in ``folder`` and return the finished process."""
    command = [sys.executable, STUDY, folder / "queue.yaml", "--work", folder / "runs", "--workers", "1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "queue.yaml").write_text(QUEUE)
    return folder, study(folder)


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_go_on(queue):
    folder, done = queue
    assert done.returncode == 1 and "failed: wrong seed 3" in done.stderr and "attack.steps" in done.stdout
    rows = {row["variant"]: row for row in json.loads((folder / "queue.json").read_text())}
    assert set(rows) == {"teacher", "student"}
    assert all(row["n"] == 10 and 0 <= row["suites"]["pgd"]["robust_accuracy"] <= 1 for row in rows.values())
    assert all(row["robust_flags"].count("1") / 10 == row["robust_accuracy"] for row in rows.values())
    assert all(len(row["robust_flags"]) == 10 for row in rows.values())


def test_committed_results_name_no_path_of_a_machine():
    """They are for readers elsewhere."""
    for path in [each for folder in ("studies", "benchmarks", "qa") for each in (ROOT / folder).rglob("*.json")]:
        found = re.findall(r"(?:^|[\s\"(])(/(?!proc/|dev/)(?:[\w.-]+/){2,}[\w.-]*)", path.read_text())
        assert not found, f"{path.relative_to(ROOT)} names {found[0]}"


def test_what_no_variant_takes_is_refused(tmp_path):
    """In braces YAML ends a text at its comma: the rest would be a key of its own, and left out without a word."""
    classes = "{recipe: digits-standard, evaluate: --data.keep_classes 1,2 --eval.images 5}"
    (tmp_path / "queue.yaml").write_text(f"seeds: [0]\nvariants: {{unquoted: {classes}}}\n")
    done = study(tmp_path)
    assert done.returncode == 1 and "variant 'unquoted' has 2 --eval.images 5; a variant takes evaluate" in done.stderr
    assert not (tmp_path / "queue.json").exists()


def test_what_a_run_needs_counts_in_its_compute(queue):
    rows = {row["variant"]: row for row in json.loads((queue[0] / "queue.json").read_text())}
    # 3 forward-equivalents each; the length is rounded to whole steps.
    assert rows["teacher"]["forward_equivalents"] == pytest.approx(3, rel=0.5)
    outcome = json.loads((queue[0] / "runs" / "student-s3" / "outcome.json").read_text())
    both = rows["teacher"]["forward_equivalents"] + outcome["forward_equivalents"]
    assert rows["student"]["forward_equivalents"] == pytest.approx(both)


@pytest.mark.slow
def test_rows_are_not_run_again_and_changed_settings_are_refused(queue):
    folder, _ = queue
    before = (folder / "queue.json").read_bytes()
    (folder / "queue.yaml").write_text(QUEUE.replace(WRONG, ""))
    again = study(folder)
    assert again.returncode == 0 and again.stdout == ""
    (folder / "queue.yaml").write_text(QUEUE.replace("budget 3", "budget 4"))
    refused = study(folder)
    assert refused.returncode == 1 and "student seed 3, teacher seed 3; delete these rows" in refused.stderr
    assert (folder / "queue.json").read_bytes() == before


@pytest.mark.slow
def test_a_stopped_queue_leaves_no_worker_behind(tmp_path):
    """What is read from the pipe ends only when nobody holds it: neither the queue nor a worker."""
    (tmp_path / "queue.yaml").write_text(QUEUE.replace("budget 3", "budget 3000 --train.checkpoint_seconds 0"))
    command = [sys.executable, STUDY, tmp_path / "queue.yaml", "--work", tmp_path / "runs", "--only", "teacher"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "runs" / "teacher-s3" / "resume.state").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 1 and "the same command goes on from here" in said
    assert not (tmp_path / "queue.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("pgrep") is None or multiprocessing.get_start_method() != "fork",
    reason="pgrep names the workers, forked ones",
)
def test_a_killed_worker_ends_the_queue_in_one_line(tmp_path):
    (tmp_path / "queue.yaml").write_text(
        QUEUE.replace(WRONG, "")
        .replace("needs: teacher, ", "")
        .replace(" --data.pseudo_labels_from NEEDED", "")
        .replace("budget 3", "budget 3000 --train.checkpoint_seconds 0")
    )
    command = [sys.executable, STUDY, tmp_path / "queue.yaml", "--work", tmp_path / "runs"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (tmp_path / "runs" / "teacher-s3" / "resume.state").exists():
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            workers = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
            os.kill(int(workers[0]), signal.SIGKILL)
            said = process.communicate(timeout=100)[1]
        finally:
            process.kill()
    assert process.returncode == 1 and "was killed, or lacked memory" in said and "Traceback" not in said


def test_the_interval_over_images_is_that_of_their_mean_differences():
    spec = importlib.util.spec_from_file_location("tables", STUDY.with_name("tables.py"))
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    ours = {seed: {"robust": 0.75, "flags": [1, 1, 1, 0]} for seed in range(3)}
    other = {seed: {"robust": 0.25, "flags": [1, 0, 0, 0]} for seed in range(3)}
    # Differences 0, 1, 1, 0: standard deviation 0.5774, of the mean of four 0.2887, times 1.96.
    assert tables.both_intervals(ours, other, "robust") == "+50.0 ± 0.0 (± 56.6)"
    assert tables.both_intervals(ours, {0: other[0]}, "robust") == ""
    del other[1]["flags"]
    assert tables.both_intervals(ours, other, "robust") == "+50.0 ± 0.0"
