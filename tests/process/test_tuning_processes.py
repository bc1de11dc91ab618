"""Several processes on one study, one of them killed: no trial is lost, none is run twice."""

import csv
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sql
import torch

from clead.training import trainer
from clead.tuning import tune
from clead.tuning.storage import open_storage
from clead.weights.files import load_weights

SPACE = ["--tune.space", "{optim.lr: {low: 1e-3, high: 1e-2, log: true}}"]
TINY = shlex.split("""--model.width 4 --model.features 8 --data.limit_train 120 --data.batch_size 16 --attack.steps 1
--train.budget null --train.epochs 6 --train.validate_steps 1 --train.device cpu --tune.suite pgd --tune.images 10 --tune.seeds 1
--tune.during {} --train.checkpoint_seconds 0 --tune.trials 3""")


def table(folder):
    return list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))


WORKER = """
import json, os, sys, time
from pathlib import Path

from clead.tuning import tune

log, out, storage, victim = sys.argv[1:5]

def note(what, folder):
    with open(log, "a") as file:
        file.write(f"{what} {folder.name} {os.getpid()}\\n")

def run(search, values, folder, report):
    note("begin", folder)
    hangs = Path(log).with_name("hangs")
    if sum(line.endswith(f" {os.getpid()}") for line in Path(log).read_text().split("\\n")) > 2:
        if victim == "victim":
            hangs.touch()
            time.sleep(1000)  # until it is killed
        while not hangs.exists():  # however late the victim comes, trials are left for it
            time.sleep(0.02)
    time.sleep(0.1)
    note("end", folder)
    return {"clean": 0.9, "robust": values["optim.lr"], "images": 10}

tune("digits-clead", json.loads(sys.argv[5]), out=out, storage=storage or None, silence=4.0, show=False, run=run)
"""


def three_workers(tmp_path, storage):
    """Three processes on one study; one is killed in the middle of a trial. Returns the log of what was begun and ended."""
    log = tmp_path / "log"
    log.touch()
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    given = json.dumps([*SPACE, "--tune.trials", "14"])
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(script), str(log), str(tmp_path / "study"), storage, role, given],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
            for role in ("victim", "worker", "worker")
        ]
        for process in processes:
            stack.callback(process.kill)  # none outlives a test that fails
        victim = processes[0]
        while not (tmp_path / "hangs").exists():
            assert victim.poll() is None, victim.communicate()[0].decode()
            time.sleep(0.02)
        victim.kill()
        said = [process.communicate()[0].decode() for process in processes]
    assert victim.returncode == -signal.SIGKILL and [p.returncode for p in processes[1:]] == [0, 0], said
    events = [line.split() for line in log.read_text().splitlines()]
    begun, ended = ([name for what, name, _ in events if what == kind] for kind in ("begin", "end"))
    names = [f"{number:04}" for number in range(14)]
    assert sorted(ended) == names  # none lost, none run twice
    lost = [name for what, name, pid in events if what == "begin" and int(pid) == victim.pid][-1]
    assert sorted(begun) == sorted([*names, lost])  # what the dead one had begun, once more
    rows = table(tmp_path / "study")
    assert [row["state"] for row in rows] == ["complete"] * 14
    assert [row["number"] for row in rows if row["attempts"] != "1"] == [str(int(lost))]
    assert len({row["optim.lr"] for row in rows}) == 14
    assert len({pid for what, _, pid in events if what == "end"}) >= 2
    return said


def test_three_workers_on_a_journal(tmp_path):
    three_workers(tmp_path, "")


@pytest.fixture
def postgresql():
    """A PostgreSQL server of its own, reached through a socket in a temporary folder; returns its URL."""
    folders = [Path(found).parent if (found := shutil.which("initdb")) else None]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    binaries = next((folder for folder in folders if folder and (folder / "pg_ctl").exists()), None)
    if binaries is None:
        pytest.fail("no PostgreSQL server here to test against; install one (Debian: apt-get install postgresql)")
    # It refuses to run as root, and a socket's path must be short: no folder of pytest's.
    home = Path(tempfile.mkdtemp(prefix="clead-pg-", dir="/tmp"))
    user = {}
    if os.geteuid() == 0:
        name = next(n for n in ("postgres", "nobody") if n in {entry.pw_name for entry in pwd.getpwall()})
        user = {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}
        shutil.chown(home, name)

    def call(program, *arguments):
        done = subprocess.run(
            [binaries / program, "-D", home / "data", *arguments],
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            **user,
        )
        assert done.returncode == 0, done.stdout.decode()

    try:
        call("initdb", "-U", "clead", "-A", "trust", "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync=off"
        call("pg_ctl", "-w", "-l", home / "log", "-o", options, "start")
        try:
            yield f"postgresql://clead@/postgres?host={home}"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.long
def test_three_workers_on_postgresql(tmp_path, postgresql):
    three_workers(tmp_path, postgresql)
    storage, _ = open_storage(tmp_path / "study", postgresql, "digits-clead", 4.0)
    with storage.engine.begin() as connection:
        assert connection.execute(sql.text("select count(*) from clead_leases")).scalar_one() == 0
        assert connection.execute(sql.text("select count(*) from trials")).scalar_one() == 14


@pytest.mark.long
def test_a_killed_worker_continues_from_its_checkpoint(tmp_path):
    """A real process, killed by SIGKILL while it trains its second trial; what the study finds is what it would have found."""
    given, killed = [*SPACE, *TINY], tmp_path / "killed"
    command = [sys.executable, "-m", "clead", "tune", "digits-clead", *given, "--out", str(killed)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    metrics = killed / "trials" / "0001-seed-0" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 20' in metrics.read_text()):
        time.sleep(0.005)
    process.kill()
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()
    assert (killed / "trials" / "0001-seed-0" / "resume.state").exists()
    assert [row["state"] for row in table(killed)] == ["complete"]

    def study(out):
        return tune("digits-clead", given, out=out, show=False, say=str)

    whole = study(tmp_path / "whole")
    batches, batch = [], trainer.Loader.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Loader, "batch", lambda self, *a: batches.append(1) or batch(self, *a))
        again = study(killed)
    for one, two in zip(again.results, whole.results, strict=True):
        assert (one.values, one.state, one.score) == (two.values, two.state, two.score)
    assert [result.attempts for result in again.results] == [1, 2, 1]
    steps = sum(json.loads(p.read_text())["steps"] for p in killed.glob("trials/000[12]-seed-0/outcome.json"))
    assert len(batches) - 2 <= steps - 19  # two looks at a first batch; 19 steps and more were in the checkpoint
    for name in ("0000", "0001", "0002"):
        one, two = (
            load_weights(p / "trials" / f"{name}-seed-0" / "last.safetensors")[0] for p in (killed, tmp_path / "whole")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in two)
