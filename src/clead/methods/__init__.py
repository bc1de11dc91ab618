"""The methods, one file each; ``METHODS`` finds them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clead.errors import UserError
from clead.registry import Registry

if TYPE_CHECKING:
    from clead.tasks import Task

METHODS: Registry[Any] = Registry("method", "clead.methods", {"memory": "state"})


def check_task(
    method: Any, task: Task, typed: Callable[[str, Any], str] = lambda key, value: f"--method.{key} {value}"
) -> None:
    """Raise UserError if ``method`` cannot train for ``task``, with the setting at fault and the methods that can.

    typed: key and value of a setting of the method -> how the user gives it.
    """
    if not (problem := method.task_problem(task)):
        return
    able = [typed("name", name) for name, kind in METHODS.items() if kind().task_problem(task) is None]
    key = problem.partition(":")[0].removeprefix("method.")
    if key != "name":
        able.insert(0, typed(key, "cross_entropy" if key == "inner" else 0))
    raise UserError(f"{problem}; give {' or '.join(able)}")
