"""Read weights from safetensors, from PyTorch's own files, and from folders of them; no code of theirs is run."""

from __future__ import annotations

import dataclasses
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from clead.atomic_io import open_regular, read_json
from clead.errors import UserError, did_you_mean, first_line, first_of
from clead.models.class_names import names_in
from clead.models.file_kinds import describe_file, is_pickle
from clead.weights.files import load_weights, read_safetensors

_LARGEST_JSON = 16_000_000
_LARGEST_PICKLE = 32_000_000
"""Bytes of what describes the tensors; those of a network with 10,000 tensors are one million."""
_NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "model_state", "module")
_AVERAGED = re.compile(r"(^|_|\.)(ema|swa|averaged?|teacher)(_|\.|$)")
_NOT_A_MODEL = re.compile(r"(optim|opt$|sched|scaler|amp|rng|random|lr_|loss|criterion)", re.IGNORECASE)
# What torch.load(weights_only=True) accepts is more: some of it takes memory without end (bytearray of a number, for one).
_GLOBALS = re.compile(
    r"collections OrderedDict|collections Counter|collections defaultdict|builtins set|__builtin__ set|_codecs encode"
    r"|torch Size|torch device|torch\.device|torch (cuda\.)?\w+Storage|torch\.cuda \w+Storage|torch\.storage \w+Storage"
    r"|torch (float|bfloat|int|uint|complex|bool)\d*\w*|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)|torch\._tensor _rebuild_from_type_v2"
    r"|torch Tensor"
)
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors by their names, where they are from, and what the file says of the classes.

    Attributes:
        tensors: by name, as they are in the file (types, prefixes).
        source: the file, and the key inside it, for messages.
        classes: names of the classes, in the model's order; None: the file does not say.
        notes: what was chosen or left out while reading.
    """

    tensors: dict[str, Tensor]
    source: str
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path) -> Weights:
    """Read a ``.safetensors`` file, a file of ``torch.save``, or a folder as transformers writes it.

    Args:
        path: the file or folder; ``FILE:KEY`` takes the weights under ``KEY`` of a checkpoint that holds several, such as
            ``ckpt.pth:ema``, or those whose names begin with ``KEY.``.

    Raises UserError if there are none, if the file is damaged, or holds more than tensors, numbers and texts.
    """
    path, key = _split_key(path)
    try:
        if path.is_dir():
            return _from_folder(path, key)
        if not path.is_file():
            raise UserError(
                f"no weights at {path}; give a file such as net.safetensors or net.pth, or a folder of them"
            )
        return _from_file(path, key)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); mend its permissions") from None


def _split_key(path: str | Path) -> tuple[Path, str | None]:
    whole = Path(path)
    before, _, key = str(path).rpartition(":")
    if not whole.exists() and before and key and Path(before).exists():
        return Path(before), key
    return whole, None


def _from_file(path: Path, key: str | None) -> Weights:
    with open_regular(path) as file:
        head = file.read(16)
    if is_pickle(head):
        content = _torch_content(path, zipped=head.startswith(b"PK"))
        metadata = content if isinstance(content, Mapping) else {}
        meta = metadata.get("meta")
        classes = names_in(metadata) or names_in(
            {str(k).lower(): v for k, v in meta.items()} if isinstance(meta, Mapping) else {}
        )
        chosen, source, notes = _choose(content, key, str(path))
        tensors, left_out = _tensors(chosen)
        if left_out:
            notes = (*notes, f"left out of {source}, which are no tensors: {first_of(left_out)}")
        _check_expanded(tensors, source)
        return Weights(tensors, source, classes, notes)
    if path.suffix != ".safetensors" and (kind := describe_file(path)) is not None:
        raise UserError(f"{path} is {kind}" + ("" if ";" in kind else "; give weights as safetensors or .pth"))
    if path.suffix == ".json":
        raise UserError(f"{path} is a JSON text; give the folder that holds it and the weights")
    try:
        content, texts = read_safetensors(path)
    except UserError:
        if (kind := describe_file(path)) is not None:
            raise UserError(
                f"{path} is {kind}" + ("" if ";" in kind else "; give weights as safetensors or .pth")
            ) from None
        raise
    if "checksum" in texts:
        load_weights(path)  # ours: checks it
    chosen, source, notes = _choose(content, key, str(path))
    return Weights(dict(chosen), source, names_in(texts), notes)


def _from_folder(folder: Path, key: str | None) -> Weights:
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is a run: give it to clead evaluate {folder}, or its weights: {folder}/best.safetensors"
        )
    present = [name for name in _FOLDER_FILES if (folder / name).is_file()]
    if not present:
        present = sorted(each.name for each in folder.iterdir() if each.name.endswith(_SUFFIXES) and each.is_file())
        if len(present) != 1:
            what = f"{len(present)} files of weights ({first_of(present)})" if present else "no file of weights"
            raise UserError(f"{folder} holds {what}; give one file, such as {folder / (present or ['net.pth'])[0]}")
    name = present[0]
    weights = _from_shards(folder, name) if name.endswith(".json") else _from_file(folder / name, key)
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    notes = [*weights.notes, f"of {folder}, {name} was read"] if len(present) > 1 else [*weights.notes]
    notes += _preparation(folder, config)
    return dataclasses.replace(weights, classes=names_in(config) or weights.classes, notes=tuple(notes))


def _from_shards(folder: Path, index: str) -> Weights:
    """Read the files that an index lists, each with a part of the tensors."""
    places = _json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / index} has no weight_map, which says which file holds which tensor; copy it again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{folder / index} names {file!r}, which is outside of {folder}; files must lie beside it")
        if not (folder / file).is_file():
            raise UserError(f"{folder} lacks {file}, which {index} names; copy it there")
        tensors.update(_from_file(folder / file, None).tensors)
    if missing := sorted(set(places) - set(tensors)):
        raise UserError(f"{folder}: {len(missing)} tensors that {index} names are in no file: {first_of(missing)}")
    return Weights(tensors, f"{folder}/{index}")


def _preparation(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Say what the folder's own files say about pixels, which no weights can hold."""
    stated = config.get("pretrained_cfg")
    place = "config.json"
    mean, std = (stated.get("mean"), stated.get("std")) if isinstance(stated, dict) else (None, None)
    if mean is None and (folder / "preprocessor_config.json").is_file():
        place = "preprocessor_config.json"
        prepared = _json(folder / place)
        mean, std = prepared.get("image_mean"), prepared.get("image_std")
        if prepared.get("do_normalize") is False:
            return
    if isinstance(mean, list) and isinstance(std, list) and mean and len(mean) == len(std):
        text = f"mean={','.join(map(str, mean))} std={','.join(map(str, std))}"
        yield f'{place} says that pixels are normalised; unless the model does so itself, give --model.input "{text}"'


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path, _LARGEST_JSON)
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------------------ files of torch.save


def _torch_content(path: Path, *, zipped: bool) -> Any:
    """Return what ``torch.save`` wrote, of tensors, numbers, texts and containers alone."""
    if zipped:
        _check_archive(path)
    else:
        _check_legacy(path)
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file ends in any
        raise UserError(
            f"{path} is damaged or not a file of torch.save ({first_line(error)[:120]}); copy it again"
        ) from None


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = [each.filename for each in members if each.compress_type != zipfile.ZIP_STORED]
            size = path.stat().st_size
            too_large = [each.filename for each in members if each.file_size > size]
            (described,) = [e for e in members if e.filename.rpartition("/")[2] == "data.pkl"] or [None]
            names = {each.filename.partition("/")[2] for each in members}
            if described is None:
                inside = first_of(sorted(each.filename for each in members))
                raise UserError(
                    f"{path} is a zip archive, but not of torch.save (in it: {inside}); unpack it, or give weights"
                )
            if "constants.pkl" in names or any(name.startswith("code/") for name in names):
                load = f"torch.jit.load({path.name!r})"
                raise UserError(
                    f"{path} is a TorchScript program; write a function that returns {load} and give it as --model "
                    f"file.py:function, or save its weights: torch.save({load}.state_dict(), 'w.pth')"
                )
            if packed or too_large:
                raise UserError(
                    f"{path}: {(packed or too_large)[0]} is compressed, which torch.save never does; refused"
                )
            if described.file_size > _LARGEST_PICKLE:
                raise UserError(
                    f"{path}: its description has {described.file_size} bytes, at most {_LARGEST_PICKLE} are read"
                )
            with archive.open(described) as stream:
                _check_globals(stream, path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: not a whole zip archive ({error}); download or copy it again") from None


def _check_legacy(path: Path) -> None:
    """Look through the pickles that files of PyTorch before 1.6 begin with; other pickles are refused."""
    with path.open("rb") as stream:
        try:
            magic = next(
                iter(
                    argument
                    for _, argument, _ in pickletools.genops(stream)
                    if isinstance(argument, int) and argument > 9
                ),
                0,
            )
            if magic != 0x1950A86A20F9469CFC6C:
                stream.seek(0)
                _check_globals(stream, path)
                raise UserError(
                    f"{path} is a pickle, which can run code when loaded, not a file of torch.save; save the weights with "
                    f"torch.save(model.state_dict(), 'weights.pth')"
                )
            stream.seek(0)
            for _ in range(5):  # magic number, version, machine, the content, the storages' keys
                _check_globals(stream, path)
        except (ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged: not a whole file of torch.save; download or copy it again") from None


def _check_globals(stream: IO[bytes], path: Path) -> None:
    """Raise UserError naming the first thing of a pickle that is no tensor, number, text or container."""
    whole = True  # until a dictionary begins
    end = stream.tell() + _LARGEST_PICKLE
    for code, argument, position in pickletools.genops(stream):
        if position is not None and position > end:
            raise UserError(
                f"{path}: its description is longer than {_LARGEST_PICKLE} bytes; it is damaged or was made to harm"
            )
        if code.name in ("GLOBAL", "INST") and not _GLOBALS.fullmatch(str(argument)):
            raise UserError(_refusal(path, str(argument).replace(" ", "."), whole))
        if code.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise UserError(_refusal(path, "an object", False))
        whole = whole and code.name not in ("EMPTY_DICT", "DICT") and str(argument) != "collections OrderedDict"


def _refusal(path: Path, name: str, whole: bool) -> str:
    load = f"torch.load({path.name!r}, weights_only=False)"
    if whole:
        return (
            f"{path} holds a whole pickled model ({name}), which can run code when loaded; where you trust it, save its weights "
            f"alone: torch.save({load}.state_dict(), 'weights.pth')"
        )
    return (
        f"{path} holds {name} beside its tensors, which can run code when loaded; where you trust it, save its weights alone: "
        f"torch.save({load}['state_dict'], 'weights.pth'), with the key that they have there"
    )


def _check_expanded(tensors: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            what = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
            raise UserError(f"{source}: {name} is {what}; save plain tensors: model.float().state_dict()")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{source}: {name} {tuple(tensor.shape)} repeats its values, which could fill the memory; save it "
                "with .clone()"
            )


# ------------------------------------------------------------------------------------------------ which of several


def _is_state(content: Any) -> bool:
    """Say whether this maps names to tensors, for the most part."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return False
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    return 2 * tensors >= len(content) and tensors > 0 and not any(isinstance(v, Mapping) for v in content.values())


def _states(content: Any, path: str = "", depth: int = 0) -> dict[str, Mapping[str, Any]]:
    """Return all maps from names to tensors inside a checkpoint, by their keys, but for those of optimisers and the like."""
    if _is_state(content):
        return {path: content}
    if not isinstance(content, Mapping) or depth > 3 or not all(isinstance(name, str) for name in content):
        return {}
    states: dict[str, Mapping[str, Any]] = {}
    for name, value in content.items():
        if not _NOT_A_MODEL.match(name):
            states.update(_states(value, f"{path}.{name}" if path else name, depth + 1))
    return states


def _choose(content: Any, key: str | None, source: str) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """Return the weights that are meant, their name for messages, and what is to be said of the choice."""
    states = _states(content)
    if not states:
        kind = (
            f"with {first_of(list(map(str, content)))}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise UserError(
            f"{source} holds no weights ({kind}); save them with torch.save(model.state_dict(), 'weights.pth')"
        )
    if key is not None:
        if key in states:
            return states[key], f"{source}:{key}", ()
        for state in states.values():
            if begun := {name: value for name, value in state.items() if name.startswith(f"{key}.")}:
                return begun, f"{source}:{key}", ()
        raise UserError(f"{source} has nothing under {key!r}; {did_you_mean(key, states)}")
    if len(states) == 1:
        ((name, state),) = states.items()
        return state, f"{source}:{name}" if name else source, (f"of {source}, {name!r} was read",) if name else ()
    plain = [name for name in states if not _AVERAGED.search(name)]
    preferred = [name for known in _NESTED for name in plain if name.rpartition(".")[2] == known] or plain
    if not preferred or (len(preferred) > 1 and preferred[0].rpartition(".")[2] not in _NESTED):
        raise UserError(
            f"{source} holds several networks: {first_of(sorted(states))}; say which: --weights {source}:{sorted(states)[0]}"
        )
    name = preferred[0]
    unused = sorted(set(states) - {name})
    note = (
        f"of {source}, {name!r} was read; it also holds {first_of(unused)}, which --weights {source}:{unused[0]} takes"
    )
    return states[name], f"{source}:{name}", (note,)


def _tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, [name for name in state if name not in tensors]
