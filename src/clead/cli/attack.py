"""``clead attack``: one attack on runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clead.cli.app import OPEN, Fresh, Json, ResultsOut, TrustState, app, echo, interruptible, write_json
from clead.cli.arguments import changed, one_folder, only, out_of, runs_and_overrides, without
from clead.cli.printing import print_record
from clead.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from clead.config import RunConfig

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
            help="Aim at this class, by name or number: success is that it is predicted; its own images are left out. Of a run of "
            "several labels: hide this label on the images that have it."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write x, x_adv, labels and flags (of masks: answers) to this .npz file.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="No attack: score the images that clead evaluate --save-adversarial wrote.")
    ] = None,
    fresh: Fresh = False,
    trust_state: TrustState = False,
    out: ResultsOut = None,
    json_file: Json = None,
) -> None:
    """Run one attack, PGD-50 if nothing else is given: clead attack RUN ... [--attack.steps 100] [--target CLASS]."""
    from clead.attacks import ATTACKS, OBJECTIVES, UNRESTRICTED
    from clead.cli.measure import measure_runs
    from clead.config import parse_overrides
    from clead.measurements.unrestricted import UnrestrictedAttack
    from clead.settings import validated
    from clead.tasks import task_name

    if objective is not None:
        OBJECTIVES.get(objective)
    runs, overrides = runs_and_overrides(context.args)
    options = {"--save": save, "--objective": objective, "--target": target}
    if verify:
        if fresh:
            raise UserError("--fresh: with --verify nothing is attacked, so nothing is left of it; leave it out")
        _verify(runs, overrides, verify, [key for key, value in options.items() if value is not None], json_file)
        return
    settings = parse_overrides(overrides)
    given = {path[1]: value for path, value in settings if path[0] == "attack" and len(path) == 2}
    name = str(given.get("name", "pgd"))
    results: dict[str, Any] = {"fresh": fresh, "trust_state": trust_state, "out": out}
    if name in UNRESTRICTED.names():
        _check_unrestricted(name, options)
        del given["name"]
        measurement = UnrestrictedAttack(attack=validated(UNRESTRICTED.get(name), given, "attack"))
        measure_runs(measurement, runs, overrides, json_file=json_file, **results)
        return
    if ":" not in name and name not in (known := [*ATTACKS.names(), *UNRESTRICTED.names()]):
        raise UserError(f"attack.name: unknown attack {name!r}; {did_you_mean(name, known)}")
    only(overrides, ("data", "task", "threat", "attack", "eval"), "use --attack.steps and the like, and --objective")
    if save and len(runs) > 1:
        raise UserError(f"--save keeps the images of one run, got {len(runs)} runs; attack them one by one")
    fixed = ["--eval.curve_points", "0", "--eval.check_images", "0"]
    fixed += ["--eval.gallery", "1000000000"] if save else []
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
    if save and target is None and any(task_name(config.task) == "multilabel" for config in configs):
        raise UserError(
            "--save: an image has an adversarial one for each label; name one with --target LABEL, or leave it out"
        )
    contents = []
    for run, config in zip(runs, configs, strict=True):
        evaluation = _attack_run(run, config, foreign or config.attack, objective, target, results)
        contents.append(json.loads(evaluation.record.model_dump_json()))
        if save:
            _save_images(save, evaluation)
    if json_file:
        write_json(json_file, contents[0] if len(contents) == 1 else contents)


def _check_unrestricted(name: str, options: dict[str, Any]) -> None:
    """Raise UserError for an option that does not go with an attack outside all norm balls."""
    if options["--target"] is not None:
        raise UserError(f"--target: the {name} attack cannot aim at a class; leave it out, or give --attack.name pgd")
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option}: changes nothing for the {name} attack, which is in no norm ball; leave it out")


def _verify(runs: list[str], overrides: list[str], file: Path, useless: list[str], json_file: Path | None) -> None:
    """Score saved adversarial images on the runs; ``useless`` are the options that were given and change nothing."""
    from clead import api
    from clead.config import parse_overrides

    keys = ("eval.split", "eval.weights", "train.device")
    paths = [".".join(path) for path, _ in parse_overrides(overrides)]
    useless = useless + [f"--{path}" for path in paths if not path.startswith("data.") and path not in keys]
    if useless:
        raise UserError(
            *(f"{name}: changes nothing with --verify, nothing is attacked; leave it out" for name in useless)
        )
    results = [api.verify(run, file, config=changed(run, overrides)) for run in runs]
    for result in results:
        _print_verified(result)
    if json_file:
        write_json(json_file, results[0] if len(results) == 1 else results)


def _attack_run(
    run: str, config: RunConfig, attack: Any, objective: str | None, target: str | None, results: dict[str, Any]
) -> Any:
    """Attack one run, print its record, and return the evaluation; ``results`` are the options of where results go."""
    from clead import api
    from clead.attacks.capabilities import attack_name, capabilities
    from clead.attacks.runner import check_applicable
    from clead.evaluation.suites import NamedAttack
    from clead.tasks.classification import TOWARDS_CLASS, Classification

    if objective is not None and capabilities(attack).searches:
        raise UserError(
            f"--objective: {attack_name(attack)} searches by itself and maximises none, got {objective}; leave it out"
        )
    if target is not None and isinstance(config.task, Classification):
        check_applicable(attack, config.threat, TOWARDS_CLASS, objective or "cross_entropy")
    name = attack_name(attack, objective or "cross_entropy")
    aim = "" if target is None else f"-towards-{target}"
    result = "attack-" + re.sub(r"[^a-z0-9]+", "-", f"{name}{aim}".lower().replace("×", "x"))
    attacks = [NamedAttack(name, attack, objective or "cross_entropy")]
    results = results | {"out": out_of(run, results["out"])}
    with interruptible():
        evaluation = api.evaluate_run(run, config=config, attacks=attacks, target=target, result=result, **results)
    print_record(evaluation.record)
    if ":" in str(getattr(attack, "name", "")):
        settings = (f"{key} {value}" for key, value in attack.description.items() if key != "name")
        echo(f"{name} ran with {', '.join(settings)}; what --attack.* does not say is that library's default")
    echo(f"record: {results['out'] or Path(run) / 'results'}/{result}.json")
    return evaluation


def _print_verified(result: dict[str, Any]) -> None:
    made = f"the images were made for another model, {result['made_for']}, so what is right here is no robustness; "
    whose = "" if result["same_model"] else made
    echo(
        f"{result['run']}: {whose}of {result['n']} images {result['num_successes']} are stated as broken, {result['wrong']} of "
        f"these are classified wrong; largest perturbation {result['max_distance']:.6g} of eps {result['eps']:.6g}, "
        f"{result['outside']} outside; accuracy {result['accuracy']:.2%}, after rounding to 8 bits {result['accuracy_8_bits']:.2%}"
    )


def _save_images(path: Path, evaluation: Any) -> None:
    import io

    import numpy as np

    from clead.atomic_io import write_output

    parts = {key: value.numpy() for key, value in evaluation.artifacts.items()}
    keys = ["x", "x_adv", "labels"]
    if evaluation.record.masks is not None:  # worst image first, and no flag for each: the answers instead
        parts = {key: value[parts["index"].argsort()] for key, value in parts.items()}
        keys += ["predicted", "predicted_adv"]
    else:
        parts["robust"] = np.array(evaluation.record.robust_flags)
        keys.append("robust")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{key: parts[key] for key in keys})
    write_output(path, buffer.getvalue())
    echo(f"images: {path}")
