"""The additions of docs/extending.md: new files only, whole on the page, and enough for tests, commands and Python."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

ADDITIONS = ROOT / "examples" / "additions"
FILES = sorted(path.relative_to(ADDITIONS) for path in ADDITIONS.rglob("*.py"))
TINY = "--model.width 4 --model.features 8 --train.budget 6 --train.validate_steps 1 --train.device cpu --data.name stripes"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the additions laid over it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ADDITIONS, folder, dirs_exist_ok=True)
    return folder


def python(copy: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copy, env=environment, timeout=300)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_each_addition_is_one_new_file_and_one_new_test():
    assert not [path for path in FILES if (ROOT / path).exists()]
    names = {path.stem for path in FILES if path.parts[0] == "src"}
    assert len(FILES) == 8 and {path.stem for path in FILES if path.parts[0] == "tests"} == {f"test_{n}" for n in names}
    shown = re.findall(r'^--8<-- "examples/additions/(.*)"$', (ROOT / "docs" / "extending.md").read_text(), re.M)
    assert sorted(shown) == [str(path) for path in FILES]


def test_their_tests_and_the_contract_pass(copy):
    unit = [str(path) for path in FILES if path.parts[0] == "tests"]
    contract = [f"tests/contract/test_{kind}.py" for kind in ("architecture", "attacks", "measurements", "datasets")]
    names = "ni_fgsm or brightness or stripes or ordinal"
    out = python(copy, "pytest", "-p", "no:cacheprovider", "-rp", *unit, *contract, "-k", names)
    passed = re.findall(r"^PASSED tests/(\w+)/(test_\w+)\.py", out, re.M)
    assert {Path(path).stem for path in unit} < {file for _, file in passed}
    assert sum(kind == "contract" and file != "test_architecture" for kind, file in passed) > 40, out[-500:]


COMMANDS = (
    f"train digits-pgd-at {TINY} --data.images 120 --out run",
    "attack run --eval.images 12 --attack.name ni_fgsm --attack.steps 2 --json attack.json",
    "brightness run --factor 0.5 --eval.images 12",
    "list",
)


def test_commands_and_python_know_them(copy):
    (copy / "call.py").write_text(
        f"""
import sys
from clead import cli
for command in {COMMANDS!r}:
    sys.argv = ["clead", *command.split()]
    try:
        cli.main()
    except SystemExit as stopped:
        assert not stopped.code, command
    print("done:", command.split()[0])
"""
        + """
import clead
from clead.data.datasets.stripes import Stripes

images = Stripes(images=120).load(0).test
x, y = images.images[:8].float() / 255, images.labels[:8]
x_adv = clead.attacks.ni_fgsm(clead.load("run"), x, y, eps="8/255", decay=0.9)
assert 0 < (x_adv - x).abs().max() < 8.001 / 255
print(clead.measure("run", "brightness", factor=0.5, fresh=True).result.accuracy.n)
"""
    )
    out = python(copy, "call")
    assert out.strip().splitlines()[-1] == "24"
    record = json.loads((copy / "attack.json").read_text())
    assert record["attacks"][0]["name"] == "NIFGSM CE" and record["attacks"][0]["backwards"] > 0
    assert (copy / "run" / "results" / "brightness.json").exists()
    measured, listed = (out.split(f"done: {before}\n")[1] for before in ("attack", "brightness"))
    assert "brightness" in measured.split("done: ")[0]
    assert all(name in listed for name in ("ni_fgsm", "brightness", "ordinal", "stripes"))
