"""Broken input of every kind, for a moment; the long run is ``qa/fuzz_readers.json``."""

import json
import os
import subprocess
import sys

import pytest

from clead.errors import UserError
from support import ROOT

QA = ROOT / "qa"
READERS = ("recipes", "records", "checkpoints", "images", "arrays")


@pytest.mark.parametrize("reader", READERS)
def test_a_hundred_broken_inputs_are_read_or_refused(reader):
    arguments = [sys.executable, str(QA / "fuzz_readers.py"), "--one", reader, "--seconds", "0.1"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["findings"] == [] and found["read"] > 0 and found["refused"] > 20


def test_the_committed_record_found_nothing():
    record = json.loads((QA / "fuzz_readers.json").read_text())
    for reader in READERS:
        assert record[reader]["findings"] == [] and record[reader]["seconds"] >= 60


def test_what_a_message_quotes_cannot_command_the_terminal():
    """Found by the fuzzing: a key with a line break in it made two lines of one."""
    error = UserError("unknown key 'a\nb'", "\x1b]0;title\x07 \u202egnp.exe \r ü 日本 –")
    assert error.problems == ("unknown key 'a\\nb'", "\\x1b]0;title\\x07 \\u202egnp.exe \\r ü 日本 –")
    assert str(error) == "\n".join(error.problems)
