"""The order of the rooms (tests/rooms.py): parsed from the imports, so that it cannot drift."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import clead
from rooms import ROOMS
from support import ROOT

PACKAGE = Path(clead.__file__).parent
ORDER = list(ROOMS)
TORCH_ONLY = "interfaces"
EXEMPT = {"__init__", "__main__"}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room(module: str) -> str:
    return module if module in ORDER else module.split(".")[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (line, module without its 'clead.') of every import of the package, wherever in the file it stands."""
    known = {dotted(other) for other in FILES}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("clead."):
                inside = name.removeprefix("clead.")
                while inside not in known and "." in inside:
                    inside = inside.rpartition(".")[0]
                if inside in known:  # else a name of clead/__init__, such as __version__
                    found.append((getattr(node, "lineno", 0), inside))
    return found


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_rooms_import_only_what_comes_before_them(path):
    module = dotted(path)
    if module in EXEMPT:
        return
    assert room(module) in ORDER, f"{module} is in no room: give it a place in the order"
    for line, target in imports(path):
        before = ORDER[: ORDER.index(room(module)) + 1]
        assert room(target) in before, f"{path.name}:{line}: {module} imports {target}, which comes after it"


def test_serving_and_the_playground_are_siblings():
    for one, other in (("serving", "playground"), ("playground", "serving")):
        for path in sorted((ROOT / one).rglob("*.py")):
            assert [line for line, target in imports(path) if room(target) == other] == [], path


def test_every_room_exists():
    modules = {dotted(path) for path in FILES}
    assert [name for name in ROOMS if name not in modules] == []


def test_contributing_lists_the_rooms():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [f"| `{name}` | {about} |" for name, about in ROOMS.items()]
    assert "\n".join(rows) in text, "the rooms in CONTRIBUTING.md are old; run: python docs/generate.py"


def test_interfaces_need_torch_only():
    tree = ast.parse((PACKAGE / f"{TORCH_ONLY}.py").read_text())
    tops = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    tops |= {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert tops <= {"__future__", "collections", "dataclasses", "typing", "torch"}


def test_no_drawer_for_everything():
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


@pytest.mark.slow
def test_every_file_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_class_is_deeper_than_one_abstract_and_one_other_parent():
    """At most an abstract and one other parent of this package; errors and pydantic records may have bases elsewhere."""
    for path in FILES:
        module = dotted(path)
        if module in EXEMPT:
            continue
        for _, cls in inspect.getmembers(importlib.import_module(f"clead.{module}"), inspect.isclass):
            if cls.__module__ == f"clead.{module}":
                ours = [base for base in cls.__mro__[1:] if base.__module__.startswith("clead.")]
                abstract = [base for base in ours if inspect.isabstract(base)]
                assert len(abstract) <= 1 and len(ours) - len(abstract) <= 1, f"{cls} is built on {ours}"


def test_import_clead_is_light():
    """PyTorch takes over a second: clead itself must not import it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    named = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in tops if isinstance(node, ast.ImportFrom) and node.module}
    assert named <= {"__future__", "importlib", "typing"}
    assert set(clead.__all__) >= set(clead._WHERE)
    for name in clead.__all__:
        assert getattr(clead, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clead.nothing  # noqa: B018


LONGEST, MOST_PARAMETERS = 80, 8


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.walk(ast.parse(path.read_text()))
    return [node for node in tree if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_no_function_is_longer_than_a_screen():
    for path in FILES:
        for node in functions(path):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST, f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name} has {lines} lines"


def test_internal_functions_take_few_parameters():
    """Public is what ``clead``, ``clead.attacks`` and ``clead.tuning`` show; the parameters of commands are options."""
    tuning = importlib.import_module("clead.tuning")
    public = {name for module in (clead, clead.attacks, tuning) for name in module.__all__}
    for path in FILES:
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        constructors = {ast.unparse(method) for each in classes if each.name in public for method in each.body}
        for node in functions(path):
            named = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = len([each for each in named if each.arg not in ("self", "cls")])
            commands = [ast.unparse(each) for each in node.decorator_list if ".command(" in ast.unparse(each)]
            if node.name not in public and not commands and ast.unparse(node) not in constructors:
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.name}"
                assert count <= MOST_PARAMETERS, (
                    f"{where} takes {count} parameters; make what belongs together one value"
                )


VAGUE = set(["found", "here", "kept", "own", "said", "told", "at", "words", "others", "who", "part"])


def test_variables_say_what_they_hold():
    """``nearest.found`` is a key of a JSON file; ``part: Part`` is a part of a resumable state."""
    for path in FILES:
        allowed = {"part"} if path.parent.name == "evaluation" and path.name in ("state.py", "rechecked.py") else set()
        for node in ast.walk(ast.parse(path.read_text())):
            bound = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
            name = node.arg if isinstance(node, ast.arg) else bound
            if name in VAGUE - allowed and not (name == "found" and path.name == "distances.py"):
                raise AssertionError(
                    f"{path.relative_to(PACKAGE)}:{node.lineno}: {name} says nothing; say what it holds"
                )


def test_imports_form_no_circle():
    """Not counted: a package that its own files import, for the registry in which they register."""
    modules = {dotted(path): path for path in FILES}
    arrows = {
        name: {target for _, target in imports(path) if target != name and not name.startswith(f"{target}.")}
        for name, path in modules.items()
    }
    while leaves := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
    assert not arrows, f"these modules import each other in a circle, or what does: {sorted(arrows)}"


def test_a_circle_and_a_train_of_parameters_are_seen(tmp_path, monkeypatch):
    """The tests above can fail."""
    package = tmp_path / "clead"
    package.mkdir()
    (package / "a.py").write_text("import clead.b\n\ndef f(a, b, c, d, e, f, g, h, i):\n" + "    a = 1\n" * 80)
    (package / "b.py").write_text("def g():\n    from clead import a\n")
    monkeypatch.setitem(globals(), "PACKAGE", package)
    monkeypatch.setitem(globals(), "FILES", sorted(package.rglob("*.py")))
    with pytest.raises(AssertionError, match="circle"):
        test_imports_form_no_circle()
    with pytest.raises(AssertionError, match="takes 9 parameters"):
        test_internal_functions_take_few_parameters()
    with pytest.raises(AssertionError, match="f has 81 lines"):
        test_no_function_is_longer_than_a_screen()
