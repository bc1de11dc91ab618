"""``clead attack``: one attack on runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clead.cli.app import OPEN, Fresh, Json, ResultsOut, TrustState, app, echo, interruptible, write_json
from clead.cli.arguments import changed, one_folder, only, runs_and_overrides, without
from clead.cli.printing import print_record
from clead.errors import UserError, did_you_mean

if TYPE_CHECKING:
    pass

_STRONG_PGD = (
    *("--attack.name", "pgd", "--attack.steps", "50", "--attack.step_size", "null", "--attack.restarts", "1"),
    *("--attack.random_start", "true", "--attack.keep", "best"),
)


@app.command(context_settings=OPEN)
def attack(
    context: typer.Context,
    objective: Annotated[str | None, typer.Option(help="What the attack maximises; cross_entropy by default.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Aim at this class, by name or number: success is that it is predicted; its own images are left out."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write x, x_adv, labels and flags to this .npz file.")] = None,
    verify: Annotated[
        Path | None, typer.Option(help="No attack: score the images that clead evaluate --save-adversarial wrote.")
    ] = None,
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    """Run one attack, PGD-50 if nothing else is given: clead attack RUN ... [--attack.steps 100] [--target CLASS]."""
    from clead import api
    from clead.attacks import ATTACKS, OBJECTIVES, UNRESTRICTED
    from clead.attacks.capabilities import capabilities
    from clead.attacks.runner import check_applicable
    from clead.cli.measure import measure_runs
    from clead.config import parse_overrides
    from clead.evaluation.suites import NamedAttack, attack_name
    from clead.measurements.unrestricted import UnrestrictedAttack
    from clead.settings import validated
    from clead.tasks.classification import TOWARDS_CLASS

    if objective is not None:
        OBJECTIVES.get(objective)
    runs, overrides = runs_and_overrides(context.args)
    if verify:
        if fresh:
            raise UserError("--fresh: with --verify nothing is attacked, so nothing is left of it; leave it out")
        useless = [
            f"--{key}"
            for key, given in (("save", save), ("objective", objective), ("target", target))
            if given is not None
        ]
        keys = ("eval.split", "eval.weights", "train.device")
        paths = [".".join(path) for path, _ in parse_overrides(overrides)]
        useless += [f"--{path}" for path in paths if not path.startswith("data.") and path not in keys]
        if useless:
            raise UserError(
                *(f"{name}: changes nothing with --verify, nothing is attacked; leave it out" for name in useless)
            )
        found = [api.verify(run, verify, config=changed(run, overrides)) for run in runs]
        for result in found:
            _print_verified(result)
        if json_file:
            write_json(json_file, found[0] if len(found) == 1 else found)
        return
    settings = parse_overrides(overrides)
    given = {path[1]: value for path, value in settings if path[0] == "attack" and len(path) == 2}
    name = str(given.get("name", "pgd"))
    if name in UNRESTRICTED.names():
        for option, useless in (("--objective", objective is not None), ("--save", save is not None)):
            if useless:
                raise UserError(
                    f"{option}: changes nothing for the {name} attack, which is in no norm ball; leave it out"
                )
        if target is not None:
            raise UserError(
                f"--target: the {name} attack cannot aim at a class; leave it out, or give --attack.name pgd"
            )
        del given["name"]
        unrestricted = validated(UNRESTRICTED.get(name), given, "attack")
        measurement = UnrestrictedAttack(attack=unrestricted)
        measure_runs(measurement, runs, overrides, fresh=fresh, trust_state=trust_state, out=out, json_file=json_file)
        return
    if ":" not in name and name not in (known := [*ATTACKS.names(), *UNRESTRICTED.names()]):
        raise UserError(f"attack.name: unknown attack {name!r}; {did_you_mean(name, known)}")
    only(overrides, ("data", "threat", "attack", "eval"), "use --attack.steps and the like, and --objective")
    if save and len(runs) > 1:
        raise UserError(f"--save keeps the images of one run, got {len(runs)} runs; attack them one by one")
    fixed = [
        "--eval.curve_points",
        "0",
        "--eval.check_images",
        "0",
        *(["--eval.gallery", "1000000000"] if save else []),
    ]
    foreign = None
    if ":" in name:  # torchattacks:NAME or foolbox:NAME, with the settings of that class
        from clead.attacks.external import external

        foreign = external(given.pop("name"), **given)
        overrides = without(overrides, "--attack.")
        given = {"name": None}
    # Not the run's training attack, whose short steps and last point are weak: PGD as evaluation runs it, then what was given.
    if given.get("name", "pgd") == "pgd":
        overrides = [*_STRONG_PGD, *overrides]
    one_folder(out, runs)
    configs = [changed(run, [*overrides, *fixed]) for run in runs]
    contents = []
    for run, config in zip(runs, configs, strict=True):
        used = foreign or config.attack
        if objective is not None and capabilities(used).searches:
            raise UserError(
                f"--objective: {attack_name(used)} searches by itself and maximises none, got {objective}; leave it out"
            )
        if target is not None:
            check_applicable(used, config.threat, TOWARDS_CLASS, objective or "cross_entropy")
        name = attack_name(used, objective or "cross_entropy")
        aim = "" if target is None else f"-towards-{target}"
        result = "attack-" + re.sub(r"[^a-z0-9]+", "-", f"{name}{aim}".lower().replace("×", "x"))
        with interruptible():
            evaluation = api.evaluate_run(
                run,
                config=config,
                attacks=[NamedAttack(name, used, objective or "cross_entropy")],
                target=target,
                result=result,
                fresh=fresh,
                trust_state=trust_state,
                out=out,
            )
        print_record(evaluation.record)
        if foreign is not None:
            settings = (f"{key} {value}" for key, value in foreign.description.items() if key != "name")
            echo(f"{name} ran with {', '.join(settings)}; what --attack.* does not say is that library's default")
        echo(f"record: {out or Path(run) / 'results'}/{result}.json")
        contents.append(json.loads(evaluation.record.model_dump_json()))
        if save:
            _save_images(save, evaluation)
    if json_file:
        write_json(json_file, contents[0] if len(contents) == 1 else contents)


def _print_verified(result: dict[str, Any]) -> None:
    made = f"the images were made for another model, {result['made_for']}, so what is right here is no robustness; "
    whose = "" if result["same_model"] else made
    echo(
        f"{result['run']}: {whose}of {result['n']} images {result['broken']} are stated as broken, {result['wrong']} of these are "
        f"classified wrong; largest perturbation {result['largest']:.6g} of eps {result['eps']:.6g}, {result['outside']} "
        f"outside; accuracy {result['accuracy']:.2%}, after rounding to 8 bits {result['accuracy_8_bits']:.2%}"
    )


def _save_images(path: Path, evaluation: Any) -> None:
    import io

    import numpy as np

    from clead.atomic_io import write_output

    parts = evaluation.artifacts
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        x=parts["x"].numpy(),
        x_adv=parts["x_adv"].numpy(),
        labels=parts["labels"].numpy(),
        robust=np.array(evaluation.record.robust_flags),
    )
    write_output(path, buffer.getvalue())
    echo(f"images: {path}")
