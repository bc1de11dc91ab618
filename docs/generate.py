"""Write the pages of docs/reference/, and the list of rooms in CONTRIBUTING.md, from the program itself, so that they cannot drift.

python docs/generate.py            # after a change; tests/docs/test_docs.py fails while the pages are not what this would write
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer import Context
from typer.main import get_command

from clead import config
from clead.attacks import ATTACKS, OBJECTIVES, UNRESTRICTED
from clead.attacks.capabilities import capabilities
from clead.attacks.functions import functions
from clead.cli.app import app
from clead.data.datasets import DATASETS
from clead.measurements import MEASUREMENTS
from clead.methods import METHODS
from clead.models import MODELS
from clead.tasks import TASKS
from clead.threats import THREATS

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from layouts import LAYOUTS  # noqa: E402  the samples that tests/integration/test_layouts.py reads
from model_kinds import KINDS  # noqa: E402  the samples that tests/integration/test_external_models.py tries
from onnx_kinds import ONNX_KINDS  # noqa: E402  tried by tests/integration/test_onnx_wild.py
from rooms import ROOMS, TASK_FILES  # noqa: E402  the order that tests/contract/test_architecture.py holds

REFERENCE = Path(__file__).parent / "reference"
STUBS = Path(__file__).parent.parent / "src/clead/attacks"
CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"
_NOTICE = "<!-- Written by docs/generate.py from the program itself: change the docstring or setting there, not this page. -->"
_REGISTRIES = {"data": DATASETS, "task": TASKS, "model": MODELS, "threat": THREATS}
_GROUPS = {
    "data": "What is read, and how images are changed on their way into training.",
    "task": 'What "right" means. `--task NAME` is short for `--task.name NAME`.',
    "model": "The network. Any `nn.Module` goes as `--model.name FILE.py:FACTORY`, or as an object in Python.",
    "threat": "What an attacker may change: a ball of radius `eps` around the image, intersected with the pixel range [0, 1].",
    "optim": "The optimiser.",
    "train": "How long, at which precision, from which weights.",
    "eval": "What `clead evaluate` attacks, and with what.",
}


def pages() -> dict[str, str]:
    """Return file name -> text of every generated page."""
    return {
        "attacks.md": _attacks(),
        "measurements.md": _measurements(),
        "methods.md": _methods(),
        "settings.md": _settings(),
        "recipes.md": _recipes(),
        "commands.md": _commands(),
        "layouts.md": _layouts(),
        "kinds.md": _kinds(),
    }


def contributing() -> str:
    """Return the text of CONTRIBUTING.md with its lists of rooms and of what tasks touch, between markers, written anew."""
    text = CONTRIBUTING.read_text()
    rooms = [f"| `{name}` | {_cell(about)} |" for name, about in ROOMS.items()]
    tasks = []
    for name, files in TASK_FILES.items():
        cells = (", ".join(f"`{file}`" for file in each) for each in (files, touched(name, files)))
        tasks.append(f"| `{name}` | {' | '.join(cells)} |")
    heads = {
        "rooms": "| room | what it does |\n|---|---|",
        "tasks": "| task | files of its own | others that know it |\n|---|---|---|",
    }
    for kind, rows in (("rooms", rooms), ("tasks", tasks)):
        begin, end = f"<!-- {kind}: written by docs/generate.py from tests/rooms.py -->", f"<!-- end of {kind} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        if not after:
            raise SystemExit(f"{CONTRIBUTING} lacks the line {begin!r} or {end!r}")
        table = "\n".join([heads[kind], *rows])
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return text


def touched(task: str, files: list[str]) -> list[str]:
    """Return the other files of the program that import a task or a file of its own, or compare a task's name with it."""
    source = CONTRIBUTING.parent / "src" / "clead"
    modules = "|".join(re.escape(f"clead.{file.replace('/', '.')}") for file in (f"tasks/{task}", *files))
    known = re.compile(rf"(?:from|import) (?:{modules})\b|(?i:task).*\"{task}\"|\"{task}\".*(?i:task)")
    paths = ((path, path.relative_to(source).with_suffix("").as_posix()) for path in sorted(source.rglob("*.py")))
    kept_apart = ("tasks/", "evaluation/tasks/", *files)
    return [
        name.removesuffix("/__init__")
        for path, name in paths
        if not name.startswith(kept_apart) and known.search(path.read_text())
    ]


def stubs() -> dict[str, str]:
    """Return file name -> text of the stubs of clead.attacks: what editors know of functions that are made when imported."""
    notice = "# Written by docs/generate.py from the settings classes: change those, not this file."
    sources = [("eot", ["expectation"]), ("external", ["external"]), ("functions", list(functions()))]
    imports = [f"from clead.attacks.{module} import {name} as {name}" for module, names in sources for name in names]
    imports.append("from clead.registry import Registry\n")
    registries = [f"{name}: Registry[Any]" for name in ("ATTACKS", "OBJECTIVES", "UNRESTRICTED")]
    package = [notice, "from typing import Any\n", *imports, *registries]
    return {"__init__.pyi": "\n".join(package) + "\n", "functions.pyi": f"{notice}\n{_function_stub()}"}


def _function_stub() -> str:
    parts = [
        "from collections.abc import Callable\nfrom typing import Any, Literal\n\nfrom torch import Tensor, nn\n",
        "PYTHON_DEFAULTS: dict[str, dict[str, Any]]",
    ]
    for name, function in functions().items():
        lines = []
        for parameter in inspect.signature(function).parameters.values():
            default = "" if parameter.default is parameter.empty else f" = {_written(parameter.default)}"
            lines.append(f"    {parameter.name}: {_type_text(parameter.annotation)}{default},")
        body = ["", f"def {name}(", *lines[:3], "    *,", *lines[3:], ") -> Tensor:"]
        doc = ('r"""' if "\\" in (function.__doc__ or "") else '"""') + (function.__doc__ or "")
        first, *rest = f'{doc}\n"""'.splitlines()
        parts += [*body, f"    {first}", *(f"    {line}" if line else "" for line in rest)]
    parts += ["", "def attack_function(name: str, kind: Any) -> Callable[..., Tensor]: ..."]
    parts += ["def functions() -> dict[str, Callable[..., Tensor]]: ..."]
    return "\n".join(parts) + "\n"


def _written(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"Literal[{', '.join(map(_written, typing.get_args(hint)))}]"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_text, typing.get_args(hint)))
    names = {"Module": "nn.Module", "NoneType": "None"}
    return names.get(hint.__name__, hint.__name__)


def _attacks() -> str:
    parts = [
        "# Attacks",
        "Each attack with its source, where it departs from it, and its settings. `clead attack RUN --attack.name NAME` runs one, "
        '`--attack.KEY VALUE` changes a setting; in Python they are functions: `clead.attacks.NAME(model, x, y, eps="8/255")`. '
        "Which of them a suite runs: [Can I trust the number?](../evaluation.md#suites)",
        "## In a norm ball",
        "Those marked *in training, too* maximise any [objective](#objectives) and can be the inner attack of a "
        "[method](methods.md). The others search by themselves.",
    ]
    for name, cls in ATTACKS.items():
        able = capabilities(cls)
        facts = ["Searches by itself." if able.searches else "In training, too."]
        facts += [f"Made for {', '.join(able.norms)}."] if able.norms else []
        facts += ["Needs no gradient."] if not able.needs_gradient else []
        facts += ["Finds the smallest perturbation, too."] if able.minimum_norm else []
        facts += ["Can aim at a class: `--target`."] if able.targeted else []
        parts += [f"### {name}", *_docstring(cls), f"*{' '.join(facts)}*", _table(_keys("attack", name))]
    parts += [
        "### Attacks of other libraries",
        "`--attack.name foolbox:NAME` and `torchattacks:NAME` run any attack of these libraries on the same images; what they "
        "return counts only if it lies in the threat set, measured here.",
        "## In no norm ball",
        "These change many pixels a lot, each within a set of its own that its settings describe.",
    ]
    for name, cls in UNRESTRICTED.items():
        parts += [f"### {name}", *_docstring(cls), _table(config.rows_of(cls))]
    parts += ["## Objectives", "What a gradient attack maximises: `clead attack RUN --objective NAME`."]
    for name, function in OBJECTIVES.items():
        parts += [f"### {name}", *_docstring(function)]
    return _page(parts)


def _measurements() -> str:
    parts = [
        "# Measurements",
        'What is measured besides robust accuracy. Each is a command, `clead NAME RUN`, and a call, `clead.measure(run, "NAME")`; '
        "each leaves `RUN/results/NAME.json`, goes on where a stopped call was, and adds a section to the report. Which to choose "
        "is told in [What else can I measure?](../measurements.md)",
    ]
    for name, cls in MEASUREMENTS.items():
        parts += [f"## {name}", *_docstring(cls, formula=False)]
        if name == "attack":  # its one setting is an attack, which has a page of its own
            parts.append("The attacks: [In no norm ball](attacks.md#in-no-norm-ball).")
            continue
        keys = ", ".join(f"`--{key}`" for key in cls.keys)
        parts += [
            _table(config.rows_of(cls)),
            f"Besides data, images and weights, these keys of the settings matter: {keys}.",
        ]
    return _page(parts)


def _methods() -> str:
    parts = [
        "# Methods",
        "Each training method with its source, where it departs from it, and its settings: `--method.name NAME`, "
        "`--method.KEY VALUE`. Most are settings of one [objective](../method.md); a key that several have means the same in each.",
    ]
    for name, cls in METHODS.items():
        parts += [f"## {name}", *_docstring(cls), _table(_keys("method", name))]
    return _page(parts)


def _settings() -> str:
    parts = [
        "# Settings",
        "Every key of a recipe or run: `--group.key VALUE` on the command line, `group: {key: VALUE}` in YAML. "
        "`clead train --help` prints the same. Keys of attacks and methods are with the [attacks](attacks.md) and "
        "[methods](methods.md).",
    ]
    choices = config.choice_keys()
    for group, about in _GROUPS.items():
        parts += [f"## {group}", about]
        if group not in choices:
            parts.append(_table(_keys(group, "")))
            continue
        key, default, names = choices[group]
        said = f"default `{default}`" if default else "required"
        parts.append(f"`{group}.{key}` ({said}) is one of {', '.join(f'`{name}`' for name in names)}.")
        rows = {name: _keys(group, name) for name in names}
        shared = [row for row in rows[names[0]] if all(row in other for other in rows.values())]
        if shared:
            parts += ["All of them have:", _table(shared)]
        for name, cls in _REGISTRIES[group].items():
            own = [row for row in rows[name] if row not in shared]
            parts += [f"### {group} {name}", *_docstring(cls, formula=group == "threat"), _table(own) if own else ""]
    return _page(parts)


def _recipes() -> str:
    sections: list[str] = []
    rows = []
    for name in config.recipe_names():
        lines = config.recipe_text(name)[1].splitlines()
        header = [line.removeprefix("# ") for line in lines if line.startswith("# ")][1:]
        fields: list[list[str]] = []
        for line in header:
            if re.match(r"\w+: ", line):
                key, text = line.split(":", 1)
                fields.append([key, text.strip()])
            else:
                fields[-1][1] += f" {line.strip()}"
        sections += [f"## {name}", "\n".join(f"- **{key}**: {_prose(text)}" for key, text in fields)]
        hardware = dict(fields)["hardware"].split(" (")[0]
        measured = re.split(r"(?<=%) \(|(?<=run)[:;]", dict(fields)["measured"])[0].rstrip(".:;")
        rows.append(f"| [{name}](#{name}) | {_cell(_prose(hardware))} | {_cell(_prose(measured))} |")
    parts = [
        "# Recipes",
        "The shipped recipes, as their headers describe them: what was measured, with n and seeds, or that it was not. "
        "`clead train NAME` runs one, `clead train NAME --show` prints every key of it. "
        "[Results](../results/headline.md) compares them.",
        "In brief; threat, n and seeds of each number are below:",
        "\n".join(["| recipe | hardware and time | measured |", "|---|---|---|", *rows]),
    ]
    return _page([*parts, *sections])


def _commands() -> str:
    parts = [
        "# Commands",
        "`clead COMMAND --help` prints the same. Commands that take a run also take keys of its [settings](settings.md), such as "
        "`--data.path` or `--eval.images 100`. Exit codes: 0 done; 1 training became non-finite or memory ran out; 2 a mistake in "
        "what was given, told in one line; 130 interrupted.",
    ]
    program: Any = get_command(app)
    for name, command in program.commands.items():
        parts += [f"## clead {name}", *(_prose(" ".join(part.split())) for part in (command.help or "").split("\n\n"))]
        rows = []
        for option in command.get_params(Context(command)):
            options = [*option.opts, *option.secondary_opts]
            if option.param_type_name == "argument":
                options = [option.name.upper()]
            if "--help" not in options:
                default = (
                    ""
                    if option.default is None or isinstance(option.default, bool)
                    else f" Default: `{option.default}`."
                )
                about = _prose(getattr(option, "help", "") or "") + default
                rows.append((", ".join(f"`{word}`" for word in options), about.strip()))
        if rows:
            parts.append("| option | what it does |\n|---|---|\n" + "\n".join(f"| {a} | {_cell(b)} |" for a, b in rows))
    return _page(parts)


def _layouts() -> str:
    rows = []
    for layout in LAYOUTS:
        splits = [name for name, size in zip(("train", "val", "test"), layout.sizes, strict=True) if size]
        read = f"refused: “…{layout.refused}…”" if layout.refused else ", ".join(splits)
        if splits == ["test"]:
            read = "test: to evaluate on, not to train"
        rows.append(f"| {_cell(layout.data)} | {_cell(f'`{layout.tree}`')} | {_cell(read)} | {_cell(layout.about)} |")
    parts = [
        "# Layouts of data",
        "What `--data.path` reads (with `--data.name auto` or the name of the data set), and what it refuses. A small sample "
        "of each is read by `tests/integration/test_layouts.py`; this table is written from them (`tests/layouts.py`).",
        "\n".join(["| data | files | read as | what else to know |", "|---|---|---|---|", *rows]),
    ]
    return _page(parts)


def _kinds() -> str:
    trained = {True: "yes", False: "refused, before anything is written", None: ""}
    rows = []
    for kind in KINDS:
        evaluated = "refused" if kind.refused else "yes"
        said = f" It says: “…{_cell(kind.says)}…”" if kind.says else ""
        about = kind.about[0].upper() + kind.about[1:]
        rows.append(f"| {_cell(kind.name)} | {evaluated} | {trained[kind.trained]} | {_cell(about)}.{said} |")
    parts = [
        "# Kinds of models",
        "What `clead evaluate --model`, `clead train --model.name FILE.py:FACTORY` and `clead.evaluate` do with modules that are "
        "not of this package. Each forward gets a copy of its images, so a module may write into them; the logits are picked out "
        "of what it returns (`--model.output NAME|INDEX` where more than one tensor can be meant). What was decided is said on "
        "stderr and in the record's notes. Every row is tried by `tests/integration/test_external_models.py` and written from "
        "`tests/model_kinds.py`: where a kind is evaluated, the flags are those of the plain module.",
        "\n".join(["| model | evaluated | trained by PGD-AT | what the program does |", "|---|---|---|---|", *rows]),
        "ONNX files, which answer queries only (`--suite black_box`); tried by `tests/integration/test_onnx_wild.py` and "
        "written from `tests/onnx_kinds.py`:",
        _onnx_kinds(),
        "Methods that look at features (`clead`, `acl` …) need the layer that maps them to the logits: the final `nn.Linear` is "
        "found, any other is named by `--model.classifier NAME`. The others train a model without.",
        "An image at which the gradient of an attack is NaN or infinite counts as not robust, is named in the notes and listed as "
        "`lost` in the record's attack; all other images go on. In Python, `clead.attacks.NAME` returns NaN for it, and warns.",
    ]
    return _page(parts)


def _onnx_kinds() -> str:
    rows = [
        f"| {_cell(kind.name)} | {'refused' if kind.refused else 'yes'} | {_cell(kind.about[0].upper() + kind.about[1:])}. |"
        for kind in ONNX_KINDS
    ]
    return "\n".join(["| file | evaluated | what the program does |", "|---|---|---|", *rows])


def _keys(group: str, name: str) -> list[tuple[str, str, str, str]]:
    return [row[2:] for row in config.documented_keys() if row[:2] == (group, name)]


def _table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    lines = [
        f"| `{key}` | `{default}` | {_cell(_prose(allowed))} | {_cell(_prose(doc))} |"
        for key, default, allowed, doc in rows
    ]
    if not lines:
        return "It has no settings."
    return "\n".join(["| key | default | range, unit | what it does |", "|---|---|---|---|", *lines])


def _docstring(entry: Any, *, formula: bool = True) -> list[str]:
    """Return the first line, as a block if it is a formula, and the paragraphs after it."""
    first, *rest = re.split(r"\n\s*\n", inspect.cleandoc(entry.__doc__))
    rest = [part for part in rest if not part.startswith((">>>", "Args:", "Returns:"))]
    first = " ".join(first.split())
    return [f"```text\n{first}\n```" if formula else _prose(first), *(_prose(" ".join(part.split())) for part in rest)]


def _prose(text: str) -> str:
    """Return plain text as Markdown: sources become links, and nothing in it is taken for markup."""
    text = text.replace("``", "`")
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else _linked(_escaped(piece)) for piece in pieces)


def _escaped(text: str) -> str:
    return re.sub(r"([*_\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _page(parts: Iterable[str]) -> str:
    title, *rest = [part for part in parts if part]
    return "\n\n".join([title, _NOTICE, *rest]) + "\n"


if __name__ == "__main__":
    for page, text in pages().items():
        (REFERENCE / page).write_text(text)
        print(f"{REFERENCE / page}: {len(text.splitlines())} lines")
    CONTRIBUTING.write_text(contributing())
    for name, text in stubs().items():
        (STUBS / name).write_text(text)
