"""A model in the ONNX format, answered by onnxruntime: no gradients, only queries."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clead.errors import UserError, did_you_mean, needs_extra
from clead.models.class_names import names_in
from clead.models.file_kinds import describe_file
from clead.models.model_input import InputLayer, ModelInput

SUFFIXES = (".onnx", ".ort")
_LARGEST = 2**31
_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
}
_REAL = ("tensor(float)", "tensor(double)", "tensor(float16)")
_LOGITS = ("logits", "logit", "scores", "probabilities", "probability")
"""Names of outputs that are taken where several could be meant."""
_LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f])")
"""Where a file names another one that holds its weights, as protocol buffers write it."""


class OnnxModel(nn.Module):
    """An ONNX classifier as a module: x, (B, C, H, W) float in [0, 1] -> logits (B, K), without gradient.

    Args:
        path: the ``.onnx`` or ``.ort`` file; weights in files beside it are found.
        input: how pixels are given; what is left open is read from the file.
        output: name or index of the logits; None: the one output that can be meant.
        sample_shape: (C, H, W) of the images, which the file's own shape is compared with; None: they are not known.
        num_classes: K of the data, which tells one output from another; None: it is not known.

    Attributes:
        classes: names of the classes that the file states, or None.
        notes: what was decided for the user, one sentence each.

    Raises UserError if the file cannot be read, takes other images, or if it is not clear which output is meant.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        input: ModelInput | None = None,
        output: str | int | None = None,
        sample_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.path, self.notes = Path(path), []
        self.session: Any = _session(self.path)
        stated = {key: _value(text) for key, text in self.session.get_modelmeta().custom_metadata_map.items()}
        self.classes = names_in(stated)
        self.input_name, shape, dtype = self._image_input()
        # A batch size fixed at export: images go in so many at a time.
        self.fixed_batch = shape[0] if shape and isinstance(shape[0], int) and shape[0] > 0 else None
        given = self._stated(input or ModelInput(), stated)
        given = self._typed(given, dtype)
        given = self._laid_out(given, shape, sample_shape)
        if given.size is None and sample_shape is not None:
            _check_size(self.path, given, shape, sample_shape)
        self.prepare = InputLayer(given)
        self.notes += self.prepare.notes()
        self.output_name = self._logits_output(output, num_classes)
        if sample_shape is not None:
            self._try(sample_shape)
        self.register_buffer("digest", torch.frombuffer(bytearray(_digest(self.path)), dtype=torch.uint8).clone())
        self.digest: Tensor

    def extra_repr(self) -> str:
        """Return the file's digest and the output: a module without parameters has no other fingerprint."""
        return f"{bytes(self.digest.tolist()).hex()}, output={self.output_name!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, K), on the device of ``x``."""
        prepared = self.prepare(x.detach().float()).cpu()
        size = self.fixed_batch or len(x)
        answers = [self._run(batch, size) for batch in prepared.split(size)]
        return torch.cat(answers).to(x.device)

    def _run(self, batch: Tensor, size: int) -> Tensor:
        short = size - len(batch)
        padded = torch.cat([batch, batch[:1].expand(short, *batch.shape[1:])]) if short else batch
        try:
            (answer,) = self.session.run([self.output_name], {self.input_name: padded.contiguous().numpy()})
        except Exception as error:  # onnxruntime has a dozen kinds
            raise UserError(
                f"{self.path} fails on images {tuple(padded.shape)} {padded.dtype}: {_reason(error)}; "
                'give --data.image_size, or --model.input "size=…", of the size that it takes'
            ) from None
        logits = torch.from_numpy(answer)
        logits = logits.float() if logits.dtype == torch.float16 else logits
        if logits.dim() > 2 and all(side == 1 for side in logits.shape[2:]):
            logits = logits.flatten(1)  # (B, K, 1, 1), of a convolution
        return logits[: len(batch)]

    def _try(self, sample_shape: tuple[int, int, int]) -> None:
        """Run two images at once; files that in truth take one at a time get one at a time from then on."""
        x = torch.rand(2, *sample_shape, generator=torch.Generator().manual_seed(0))
        try:
            if len(self.forward(x)) == 2:
                return
            error = UserError(
                f"{self.path} does not return one row per image, {self.output_name!r} has another shape; "
                "name the logits (B, K): --model.output NAME"
            )
        except UserError as failure:
            error = failure
        if self.fixed_batch is None:
            self.fixed_batch = 1
            try:
                if len(self.forward(x)) == 2:
                    self.notes.append(f"{self.path.name} fails on several images at once: they are given one by one")
                    return
            except UserError:
                pass
        raise error

    # -------------------------------------------------------------------------------------------- what the file says

    def _image_input(self) -> tuple[str, list[Any], str]:
        """Return the name, shape and type of the one input that has to be given."""
        inputs = self.session.get_inputs()  # those with a default are not among them
        if len(inputs) != 1:
            listed = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise UserError(
                f"{self.path} must take one input, the images, got {listed}; make the others constants of the graph, and "
                "export it again"
            )
        if inputs[0].type not in _TYPES:
            raise UserError(
                f"{self.path} takes {inputs[0].type} ({inputs[0].name}), images are numbers such as tensor(float); cast inside the "
                "graph and export it again"
            )
        return inputs[0].name, list(inputs[0].shape or []), _TYPES[inputs[0].type]

    def _stated(self, given: ModelInput, stated: dict[str, Any]) -> ModelInput:
        """Fill in mean, std and range from the file's metadata, where the user gave none of them."""
        nested = next((stated[key] for key in ("normalization", "normalize") if isinstance(stated.get(key), dict)), {})
        known = {
            key: value for key in ("mean", "std", "range") if (value := nested.get(key, stated.get(key))) is not None
        }
        if given.normalizes or given.range is not None:
            return given
        if known and {"mean", "std"} & set(known):
            known.pop("range", None)
        if not known:
            if "clead" not in stated and given == ModelInput() and self.session.get_inputs()[0].type in _REAL:
                self.notes.append(
                    f"{self.path.name} does not say how its pixels are prepared: they are given in [0, 1] as they are; for others: "
                    '--model.input "mean=… std=…" or "range=0..255"'
                )
            return given
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        try:
            filled = ModelInput.parse(fields | known)
        except UserError as error:
            self.notes.append(f"{self.path.name}: its metadata on pixels cannot be read and are left out ({error})")
            return given
        if "clead" not in stated:
            text = " ".join(f"{key}={','.join(map(str, getattr(filled, key)))}" for key in known)
            self.notes.append(
                f'{self.path.name}: its metadata say "{text}", so pixels are given so; --model.input says otherwise'
            )
        return filled

    def _typed(self, given: ModelInput, dtype: str) -> ModelInput:
        if given.dtype not in (None, dtype):
            raise UserError(f"model.input: {self.path} takes {dtype}, got dtype={given.dtype}; leave it out")
        if dtype == "int8" and given.range is None:
            raise UserError(
                f'{self.path} takes int8, and does not say what black and white are; give --model.input "range=-128..127" '
                '(or "range=0..127")'
            )
        if dtype in ("uint8", "int32") and given.dtype is None and given.range is None:
            self.notes.append(f"{self.path.name} takes {dtype}: pixels are given as 0 … 255, rounded")
        elif dtype != "float32" and given.dtype is None:
            self.notes.append(f"{self.path.name} takes {dtype}: pixels are given so")
        return dataclasses.replace(given, dtype=dtype if dtype != "float32" else given.dtype)

    def _laid_out(self, given: ModelInput, shape: list[Any], sample: tuple[int, int, int] | None) -> ModelInput:
        """Recognise channels last, and vectors, where the shape leaves no doubt."""
        if given.layout is not None or not shape:
            return given
        layout = "nchw"
        if len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3):
            layout = "nhwc"
        elif len(shape) == 2 and sample is not None and sample[0] == 1 and shape[1] in (sample[1] * sample[2], None):
            layout = "flat"
        elif len(shape) != 4:
            raise UserError(
                f"{self.path} takes {self.input_name} {shape}, not images (B, C, H, W); where it takes all pixels of an image in a "
                'row, give --model.input "layout=flat"'
            )
        if layout != "nchw":
            what = "channels last (NHWC)" if layout == "nhwc" else "one vector per image"
            self.notes.append(f"{self.path.name} takes {self.input_name} {shape}: images are given {what}")
        return dataclasses.replace(given, layout=layout) if layout != "nchw" else given

    def _logits_output(self, output: str | int | None, num_classes: int | None) -> str:
        """Return the name of the output that holds the logits."""
        outputs = self.session.get_outputs()
        listed = ", ".join(f"{each.name} {each.type} {each.shape}" for each in outputs)
        names = [each.name for each in outputs]
        if output is not None:
            name = str(output)
            if name not in names and name.isdecimal() and int(name) < len(names):
                name = names[int(name)]
            if name not in names:
                raise UserError(f"model.output: {self.path} has no output {name!r}; {did_you_mean(name, names)}")
            chosen = outputs[names.index(name)]
            if chosen.type not in _REAL:
                raise UserError(_no_numbers(self.path, chosen, listed))
            return name
        real = [each for each in outputs if each.type in _REAL and _can_be_logits(each.shape, None)]
        real = [each for each in real if _can_be_logits(each.shape, num_classes)] or real
        if not real:
            maps = next((each for each in outputs if each.type.startswith("seq")), outputs[0])
            raise UserError(_no_numbers(self.path, maps, listed))
        chosen = next((each for name in _LOGITS for each in real if each.name == name), real[0])
        if len(real) > 1 and chosen.name not in _LOGITS:
            several = ", ".join(each.name for each in real)
            raise UserError(
                f"{self.path} has several outputs that can be the logits: {listed}; say which: --model.output {chosen.name} "
                f"(one of {several})"
            )
        if len(outputs) > 1:
            self.notes.append(
                f"of the outputs {listed}, {chosen.name!r} is taken for the logits; another one: --model.output"
            )
        return chosen.name


def is_onnx(model: Any) -> bool:
    """Say whether ``model`` is the path of a file that ``OnnxModel`` reads."""
    return isinstance(model, str) and model.lower().endswith(SUFFIXES)


def _session(path: Path) -> Any:
    """Return onnxruntime's session; raises UserError that says what the file is, if it is something else."""
    with needs_extra("onnx", "evaluating an ONNX model"):
        import onnxruntime
    if not path.is_file():
        raise UserError(f"no ONNX file at {path}; give the path of a file that torch.onnx.export or another tool wrote")
    if path.suffix == ".onnx" and path.stat().st_size >= _LARGEST:
        raise UserError(
            f"{path} has {path.stat().st_size / 2**30:.1f} GiB, an ONNX file holds 2 at most; save it with its weights in a file "
            "beside it: onnx.save(model, path, save_as_external_data=True)"
        )
    for name in _external(path):
        if not (path.parent / name).is_file():
            raise UserError(
                f"{path} has its weights in {name!r}, which is not in {path.parent}; copy that file there too"
            )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a dozen kinds
        kind = None if path.suffix == ".ort" else describe_file(path)
        raise UserError(
            f"{path} is not an ONNX model: {kind or _reason(error)}; export it again with torch.onnx.export"
        ) from None


def _reason(error: Exception) -> str:
    """Return onnxruntime's message on one line, whole but for the C++ signatures in it."""
    text = re.sub(r"/onnxruntime_src/\S+:\d+ .*?\) (?=[A-Z])", " ", " ".join(str(error).split()))
    return text if len(text) <= 600 else f"{text[:600]}…"


def _external(path: Path) -> list[str]:
    """Return the names of the files that hold the weights of this one, if any do."""
    if path.suffix != ".onnx":
        return []
    content = path.read_bytes()
    places = [(match.end(), match[1][0]) for match in _LOCATION.finditer(content)]
    return sorted({content[start : start + length].decode(errors="replace") for start, length in places})


def _digest(path: Path) -> bytes:
    """Return a digest of the file and of those that hold its weights."""
    digest = hashlib.sha256()
    for each in (path, *(path.parent / name for name in _external(path))):
        with each.open("rb") as file:
            digest.update(
                hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else file.read()
            )
    return digest.digest()[:16]


def _value(text: str) -> Any:
    """Return a value of the metadata: JSON, where it is that."""
    if len(text) < 1_000_000:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text


def _can_be_logits(shape: list[Any] | None, num_classes: int | None) -> bool:
    """Say whether an output of this shape can be (B, K), or one logit per image; what is not known can be anything."""
    if not shape:
        return True
    if any(isinstance(side, int) and side != 1 for side in shape[2:]):
        return False
    classes = shape[1] if len(shape) > 1 else 1  # one logit per image stands for two classes
    expected = {num_classes} | ({1} if num_classes == 2 else set())
    return not isinstance(classes, int) or num_classes is None or classes in expected


def _no_numbers(path: Path, output: Any, listed: str) -> str:
    if output.type.startswith("seq"):
        return (
            f"{path}: the output {output.name!r} is {output.type}, as scikit-learn's converter makes it; convert the model "
            "again with options={'zipmap': False}, so that it is a tensor of probabilities"
        )
    if output.type in _REAL and len(output.shape or ()) == 4:
        return (
            f"{path} answers for each pixel: {listed}; an ONNX file has no gradient, which every attack on masks needs: give "
            "the run that it was exported from, or the network in PyTorch: --model net.py:Net"
        )
    return (
        f"{path} has no output that can be logits, floating point (B, K): {listed}; export "
        "the values before argmax, or name the output: --model.output NAME"
    )


def _check_size(path: Path, given: ModelInput, shape: list[Any], sample: tuple[int, int, int]) -> None:
    """Raise UserError unless the file takes images of this shape."""
    if given.layout == "flat" or len(shape) != 4:
        if len(shape) == 2 and isinstance(shape[1], int) and shape[1] != sample[0] * sample[1] * sample[2]:
            raise UserError(
                f"{path} takes vectors of {shape[1]} numbers, images {sample} have others; give --data.image_size"
            )
        return
    order = (3, 1, 2) if given.layout == "nhwc" else (1, 2, 3)
    channels, high, wide = (shape[axis] for axis in order)
    if isinstance(channels, int) and channels != sample[0]:
        raise UserError(
            f"{path} takes images of {channels} channels ({shape}), the data has {sample[0]}; give data of that kind, or say how "
            'axes lie: --model.input "layout=nhwc"'
        )
    for side, actual in ((high, sample[1]), (wide, sample[2])):
        if isinstance(side, int) and side != actual:
            size = high if high == wide else f"{high}x{wide}"
            raise UserError(
                f"{path} takes images of {high} × {wide} pixels ({shape}), the data has {sample[1]} × {sample[2]}; give "
                f"--data.image_size {side}, which attacks images of that size, or resize inside the model: "
                f'--model.input "size={size}"'
            )
