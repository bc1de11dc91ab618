"""Commands whose options are the settings of a class."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.main import get_command

from clead.cli.arguments import split_commas


class SettingsCommand(TyperCommand, ABC):
    """A command with one option for each setting. They are read when it is called, or its help is: that takes imports.

    The values that were given, or are the defaults, are in ``context.meta["settings"]`` when the command's function runs.
    """

    left_out: tuple[str, ...] = ()
    """Settings that are no options."""
    _complete = False

    @abstractmethod
    def settings_class(self) -> Any:
        """Return the class."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of the settings, then those of the command's function."""
        if not self._complete:
            self.params[:0] = _options(self.settings_class(), self.left_out)
            self._complete = True
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Run the command's function."""
        values = {}
        for key, setting in self.settings_class().__pydantic_fields__.items():
            value = ctx.params.pop(key, None)
            if value is not None and _is_list(setting.annotation):
                values[key] = split_commas(value)
            elif value is not None:
                values[key] = None if value == "none" and type(None) in get_args(setting.annotation) else value
        ctx.meta["settings"] = values
        return super().invoke(ctx)


def _options(cls: Any, left_out: tuple[str, ...]) -> list[Any]:
    """Return one option for each setting. Several values stand in one text, with commas; ``none`` is None where that may be."""
    parameters = []
    for key, setting in cls.__pydantic_fields__.items():
        if key in left_out:
            continue
        default, kind = setting.default, setting.annotation
        if setting.default_factory is not None:
            default, kind = None, kind | None
        elif _is_list(kind):
            default, kind = ",".join(map(str, default)) if default else None, str | None
        elif any(get_origin(each) is Literal for each in (kind, *get_args(kind))):
            kind = str | None  # the settings say what is allowed
        name = f"--{key.replace('_', '-')}"
        option = typer.Option(f"{name}/--no{name[1:]}" if kind is bool else name, help=setting.description)
        parameters.append(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )

    def command(**values: Any) -> None: ...

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    program = typer.Typer(add_completion=False)
    program.command()(command)
    return list(get_command(program).params)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (annotation, *get_args(annotation)))
