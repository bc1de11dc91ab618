"""Every error for users says what to do: the value, the rule, and the remedy with the line to type."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from support import ROOT

SOURCE = ROOT / "src" / "clead"
ROOMS = ("evaluation", "attacks", "api", "methods", "training", "models", "threats", "config", "tuning", "export")
VERBS = (
    "add|call|cast|change|choose|copy|discard|do|end|evaluate|export|free|give|install|keep|leave|look|lower|make|mend|move|name|raise|"
    "remove|repeat|resize|restore|return|run|save|say|search|see|set|start|swap|take|train|try|upload|use|wait|wrap|write"
)
# After the rule, a remedy or what makes one: ``; give …``, ``, or set …``, ``; did you mean …``, a variable that holds it.
REMEDY = re.compile(
    rf"[;:,(] ?(?:(?:or|and|then) )?(?:nothing is lost, )?(?:{VERBS})\b|; [^;]*--\w|did_you_mean|known: |pip install"
    r"|\{(?:hint|remedy|OVERFLOW|_candidates\()"
)
PASSED_ON = {
    # Problems of several keys, each a message of its own.
    "*problems",
    "--{'.'.join([*path[:-2], ''])}{problem}",
    "*retired",
    "*retired *error.problems",
    "data.pseudo_labels_from: {problem}",
    "train.start_from: {problem}",
    "train.teacher: {problem}",
    # Of a model that fails on these images: its own line, with what its library states of sizes, if it does.
    "f'{self.network}: {error}; {enlarge}' if enlarge else str(error)",
    "*notes",
    # Messages of another error, or of a function that is tried below.
    "model.input: {error}",
    "{group}.{key}: {error}",
    "{error} (training stopped at step {self.state.step}; {earlier})",
    "_no_numbers(self.path, maps, listed)",
    "_no_numbers(self.path, chosen, listed)",
}


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each UserError that is made, ``{…}`` where a value goes."""
    for node in ast.walk(tree):
        name = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and "UserError" in (getattr(name, "id", ""), getattr(name, "attr", "")):
            yield node.lineno, " ".join(map(text, node.args))


def text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.Starred) and isinstance(node.value, ast.GeneratorExp):
        return text(node.value.elt)
    return ast.unparse(node)


def without_remedy(code: str) -> list[tuple[int, str]]:
    return [(line, said) for line, said in texts(ast.parse(code)) if said not in PASSED_ON and not REMEDY.search(said)]


@pytest.mark.parametrize("room", ROOMS)
def test_every_error_names_a_remedy(room):
    bad = []
    for path in sorted((SOURCE / room).rglob("*.py")):
        bad += [f"{path.relative_to(SOURCE)}:{line}: {said}" for line, said in without_remedy(path.read_text())]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ('"k must be at least 1, got 0"', False),
        ('"k must be at least 1, got 0; give k=10"', True),
        ('f"suite {name} is for linf, got {norm}; use --eval.suite pgd"', True),
        ('f"{name} must be finite, got NaN"', False),
        ('f"images must be float, got {x.dtype}{hint}"', True),
        ('"unknown attack; " f"{did_you_mean(name, known)}"', True),
        ('"it is used; given by others"', False),
        ('"--shard must be i/n, got 3"', False),
    ],
)
def test_the_test_tells_a_remedy_from_none(said, good):
    assert (not without_remedy(f"raise UserError({said})")) == good
    assert (not without_remedy(f"error = errors.UserError({said})")) == good


def test_the_exceptions_are_still_there():
    every = {
        said
        for room in ROOMS
        for path in (SOURCE / room).rglob("*.py")
        for _, said in texts(ast.parse(path.read_text()))
    }
    assert every >= PASSED_ON
    assert not [said for said in every if "\n" in said]
