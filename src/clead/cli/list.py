"""``clead list``: what there is to choose from."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from clead.cli.app import app


@app.command("list")
def list_(
    what: Annotated[
        Literal["all", "zoo"], typer.Argument(help="zoo: the trained models of this package, and what they reach.")
    ] = "all",
) -> None:
    """List recipes, datasets, models, threats, attacks, objectives, methods, measurements and tasks; or the zoo."""
    from clead.runs.zoo import zoo_names

    if what == "zoo":
        for name in zoo_names():
            _print_zoo(name)
        return
    from clead import config
    from clead.attacks import OBJECTIVES, UNRESTRICTED
    from clead.measurements import catalogue
    from clead.tasks import TASKS

    print(f"recipes: {', '.join(config.recipe_names())}")
    for group, (_, _, names) in config.choice_keys().items():
        print(f"{group}: {', '.join(names)}")
    print(f"unrestricted attacks: {', '.join(UNRESTRICTED.names())}")
    print(f"objectives: {', '.join(OBJECTIVES.names())}")
    print(f"measurements: {', '.join(catalogue())}")
    for name, kind in TASKS.items():
        print(f"task: {name} ({kind().describe()})")
    print(f"zoo: {', '.join(f'zoo:{name}' for name in zoo_names())} (clead list zoo)")


def _print_zoo(name: str) -> None:
    """Print a model of the zoo with what its record says."""
    from clead import api
    from clead.evaluation.suites import in_words
    from clead.runs.zoo import located

    record, path = api.read_record(f"zoo:{name}"), located(f"zoo:{name}")
    print(
        f"zoo:{name}: {record.model.name}, {record.model.parameters:,} parameters; of {record.data.which} "
        f"{record.clean.accuracy:.1%} are right when clean, {record.worst.accuracy:.1%} withstand {record.threat.norm} "
        f"{record.threat.eps_text} under {in_words(record)}; card: {path / 'README.md'}"
    )
