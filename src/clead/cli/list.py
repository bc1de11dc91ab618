"""``clead list``: what there is to choose from."""

from __future__ import annotations

from clead.cli.app import app


@app.command("list")
def list_() -> None:
    """List recipes, datasets, models, threats, attacks, objectives, methods, measurements and tasks."""
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
