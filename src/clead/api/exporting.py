"""Runs as folders that can be given away: the model, its configuration, and a card of what was measured."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clead.atomic_io import JSON_LIMIT, read_regular, remove_tree_inside
from clead.errors import UserError
from clead.evaluation.correctness import to_float
from clead.interfaces import Splits
from clead.models.onnx import OnnxModel
from clead.models.split import weights as model_weights
from clead.results.provenance import environment
from clead.results.record import Record
from clead.runs.loading import OpenedRun, data_name, open_run
from clead.tasks import task_name
from clead.tasks.classification import Classification
from clead.weights.files import fingerprint, load_weights, save_weights

if TYPE_CHECKING:
    from clead.export.remeasured import Remeasured

PRECISIONS = {"onnx": ("float32", "int8"), "safetensors": ("float32", "bfloat16")}
"""onnxruntime's CPU has no bfloat16 convolutions; PyTorch reads 8-bit weights only with another library's help."""
CALIBRATION = 512
"""Training images from which int8 takes the ranges of activations."""
_CHECKED = 64


def export_run(
    path: str | Path,
    *,
    out: str | Path,
    format: str = "onnx",
    precision: str = "float32",
    weights: str | None = None,
    images: int = 200,
    licence: str = "unknown",
    model: nn.Module | None = None,
    data: Splits | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
    show: bool = True,
) -> dict[str, Any]:
    """Write a run's model into a folder: weights, configuration, ``export.json`` and ``README.md``, the model card.

    Args:
        path: a run directory.
        out: a new or empty folder; nothing is left of it if anything fails.
        format: ``onnx``, checked against PyTorch's logits on test images, or ``safetensors``, which ``clead.load`` opens.
        precision: float32; int8 (ONNX: static quantisation, calibrated on 512 training images); bfloat16 (safetensors: half the
            size, computed in float32). Where numbers are rounded, clean and robust accuracy are measured again.
        weights: best or last; those that the run's evaluations are of (``eval.weights``) if None.
        images: so many test images are attacked after rounding.
        licence: for the card, an identifier such as ``mit``.
        model: your own module, if it was given as an object in Python.
        data: loaded images instead of the configuration's.
        push_to_hub: ``USER/NAME`` on the Hugging Face hub, when everything else is done.
        private: whether that repository is made private, if it is new.
        show: show progress on stderr.

    Returns:
        What ``export.json`` holds: ``file``, ``size`` in bytes, ``difference`` (largest, of logits; ONNX), ``remeasured``.
        Raises UserError if ``out`` is not empty, an operation has no place in ONNX, or logits differ by more than 1e-4.
    """
    out = Path(os.path.realpath(out))  # what a link leads to, which stays
    _check(out, format, precision, images)
    hub = _hub(push_to_hub) if push_to_hub else None
    opened = open_run(path, None, model, data)
    if weights is not None and weights != opened.config.eval.weights:
        chosen = dataclasses.replace(opened.config, eval=dataclasses.replace(opened.config.eval, weights=weights))
        opened = open_run(path, chosen, model, data)
    task = opened.config.task
    if precision != "float32" and not isinstance(task, Classification):
        raise UserError(
            f"--precision {precision}: what rounding costs is measured of one class per image, and {path} is of the task "
            f"{task_name(task)}; give --precision float32"
        )
    export = _Export(opened, format, precision, images, given=model is not None)
    staged = out.with_name(f".clead-export.{os.getpid()}.tmp")
    try:
        staged.mkdir(parents=True)
        if format == "onnx":
            converted = export.write_onnx(staged)
        else:
            converted = export.write_safetensors(staged, open_run(path, opened.config, model, data).model.cpu())
        if precision != "float32":
            export.measure_again(converted, show=show)
        result = export.write_rest(staged, licence)
        if out.is_dir():
            out.rmdir()  # it is empty
        os.replace(staged, out)
    except OSError as error:
        if error.filename is not None and staged.name not in str(error.filename):
            raise  # a file that was read
        raise UserError(
            f"cannot write {out}: {error.strerror or error}; free some space or choose another --out"
        ) from error
    finally:
        remove_tree_inside(staged)
    if hub is not None:
        result["hub"] = _push(hub, out, push_to_hub or "", private)
    return result


class _Export:
    """What is written into the folder of an export, file by file."""

    def __init__(self, opened: OpenedRun, format: str, precision: str, images: int, *, given: bool) -> None:
        self.opened, self.config = opened, opened.config
        self.format, self.precision, self.images, self.given = format, precision, images, given
        self.model = opened.model.cpu()
        self.metadata = _metadata(opened, opened.config.eval.weights)
        self.fingerprint = fingerprint(model_weights(self.model))
        self.file = "model.onnx" if format == "onnx" else "model.safetensors"
        self.difference: float | None = None
        self.remeasured: Remeasured | None = None

    def write_onnx(self, folder: Path) -> nn.Module:
        """Write the ONNX file and return what rounding left of the model; raises UserError if its logits are not PyTorch's."""
        from clead.export.onnx import AGREE, difference, to_int8, to_onnx

        metadata, x = self.metadata, to_float(self.opened.images.images[:_CHECKED])
        about = {"clead": metadata["clead"], "run": self.opened.run.name}
        about |= {key: metadata[key] for key in ("classes", "shape")}
        about |= {"fingerprint": self.fingerprint, "precision": self.precision, "range": [0, 1]}
        about |= {"task": self.config.to_dict()["task"]}
        content = to_onnx(self.model, metadata["shape"], metadata=about)
        self.difference = difference(content, self.model, x)
        with torch.inference_mode():
            largest = self.model(x).abs().max().item()
        if not self.difference <= AGREE * max(1.0, largest):
            raise UserError(
                f"the exported model's logits differ from PyTorch's by {self.difference:.2g}, at most {AGREE:g} is allowed; "
                "take --format safetensors"
            )
        if self.precision == "int8":
            content = to_int8(content, to_float(self.opened.splits.train.images[:CALIBRATION]).split(64))
        (folder / self.file).write_bytes(content)
        return self.model if self.precision == "float32" else OnnxModel(folder / self.file)

    def write_safetensors(self, folder: Path, twin: nn.Module) -> nn.Module:
        """Write the weights and return ``twin``, another copy of the model, with the weights that were written."""
        tensors = model_weights(self.model)
        if self.precision == "bfloat16":
            tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
        about = {key: value for key, value in self.metadata.items() if key != "clead"}
        save_weights(folder / self.file, tensors, about)
        twin.load_state_dict(load_weights(folder / self.file)[0])
        return twin

    def measure_again(self, converted: nn.Module, *, show: bool) -> None:
        """Measure the rounded model beside the original one."""
        from clead.export.remeasured import remeasure

        opened = self.opened
        chosen = opened.images.subset(torch.arange(min(self.images, len(opened.images))))
        self.remeasured = remeasure(
            self.model,
            converted.eval(),
            chosen,
            self.config,
            opened.target,
            precision=self.precision,
            gradients=self.format == "safetensors",
            show=show,
        )

    def write_rest(self, folder: Path, licence: str) -> dict[str, Any]:
        """Write configuration, record, ``export.json`` and the card; return what ``export.json`` holds."""
        from clead.export.card import card

        tree = self.config.to_dict()
        _without_places(tree)
        text = type(self.config).from_dict(tree).to_yaml()
        (folder / "config.yaml").write_text(text)
        record, notes = _record(self.opened)
        if record is not None:
            (folder / "evaluation.json").write_text(record.model_dump_json(indent=1))
        result = {
            "file": self.file,
            "format": self.format,
            "precision": self.precision,
            "size": (folder / self.file).stat().st_size,
            "difference": self.difference,
            "remeasured": self.remeasured.model_dump() if self.remeasured else None,
        }
        (folder / "export.json").write_text(json.dumps(result, indent=1))
        facts = {**self._facts(tree, text, result["size"]), "licence": licence}
        written = card(facts, record=record, remeasured=self.remeasured, notes=notes)
        (folder / "README.md").write_text(written)
        return result

    def _facts(self, tree: dict[str, Any], text: str, size: int) -> dict[str, Any]:
        """Return what the card says of the model."""
        return {
            "name": self.opened.run.name,
            "format": self.format,
            "file": self.file,
            "precision": self.precision,
            "classes": list(self.metadata["classes"]),
            "shape": list(self.metadata["shape"]),
            "threat": {"norm": self.config.threat.norm, "text": tree["threat"]["eps"]},
            "method": tree["method"]["name"],
            "task": tree["task"]["name"],
            "right": self.config.task.describe(),
            "config": text,
            "parameters": f"{sum(p.numel() for p in self.model.parameters()):,}",
            "fingerprint": self.fingerprint,
            "data_fingerprint": self.opened.splits.fingerprint,
            "data": data_name(self.config),
            "factory": tree["model"].get("factory"),
            "given": self.given,
            "versions": ", ".join(f"{name} {environment()[name]}" for name in ("clead", "torch", "numpy", "python")),
            "size": f"{size:,}",
            "difference": self.difference or 0.0,
            "checked": len(self.opened.images.images[:_CHECKED]),
        }


def _without_places(tree: dict[str, Any]) -> None:
    """Leave of paths, in place, the last part only: the rest is of this machine."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _without_places(value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    _without_places(item)
        elif isinstance(value, str | Path) and (key == "path" or Path(str(value)).is_absolute()):
            tree[key] = Path(value).name
        elif key == "network" and Path(str(value).partition(":")[2]).is_absolute():
            tree[key] = f"hf:{Path(value).name}"


def _check(out: Path, format: str, precision: str, images: int) -> None:
    if format not in PRECISIONS:
        raise UserError(f"--format must be {' or '.join(PRECISIONS)}, got {format!r}; give --format onnx")
    if precision not in PRECISIONS[format]:
        choices = [f"{name}: {', '.join(values)}" for name, values in PRECISIONS.items()]
        raise UserError(f"--precision {precision} is not one of --format {format}; give one of {'; '.join(choices)}")
    if images < 1:
        raise UserError(f"--images must be at least 1, got {images}; leave it out for 200")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"--out {out} is not empty; give an empty or new directory")


def _metadata(opened: OpenedRun, which: str) -> dict[str, Any]:
    from clead import __version__

    _, metadata = load_weights(opened.run.weights(which))
    copied = {key: metadata[key] for key in ("shape", "classes", "mean_std")}
    return {**copied, "shape": tuple(copied["shape"]), "clead": __version__}


def _record(opened: OpenedRun) -> tuple[Record | None, list[str]]:
    """Return the evaluation of the very weights, and what must be known of it."""
    path = opened.run.path / "results" / "evaluation.json"
    try:
        record = Record.model_validate_json(read_regular(path, JSON_LIMIT))
    except (OSError, ValueError):
        return None, []
    if record.model.fingerprint != fingerprint(model_weights(opened.model)):
        return None, ["The run's evaluation is of other weights than these, and is left out."]
    notes = [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in record.notes]
    if failed := [check.name for check in record.checks if not check.passed]:
        notes.append(f"Do not trust the robust accuracy: checks of gradient masking failed: {', '.join(failed)}.")
    elif not record.checks:
        notes.append("The checks of gradient masking were not run.")
    return record, notes


def _hub(name: str) -> Any:
    """Return the hub's client; raises UserError before anything is computed if it cannot be used."""
    from clead.errors import MissingExtra

    try:
        from huggingface_hub import HfApi, get_token
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "--push-to-hub") from None
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--push-to-hub must be USER/NAME, got {name!r}; give such as --push-to-hub me/my-model")
    if not get_token():
        raise UserError("--push-to-hub needs a token of the hub; run: hf auth login, or set HF_TOKEN")
    return HfApi()


def _push(hub: Any, out: Path, name: str, private: bool) -> str:
    try:
        url = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=str(out), commit_message="Exported by clead")
    except Exception as error:  # of the network, of rights, of names
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{out} is written, but the hub did not take it: {reason}; try again, or upload the folder"
        ) from error
    return str(url)
