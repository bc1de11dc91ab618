"""A model in the ONNX format, normalisation inside, for any number of images at once."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clead.errors import UserError, needs_extra
from clead.evaluation.correctness import exact_float32
from clead.models.split import SplitModel

AGREE = 1e-4
"""How far logits may be from PyTorch's, in units of the largest logit or of 1, if that is more."""


class _Outputs(nn.Module):
    def __init__(self, model: SplitModel, features: bool) -> None:
        super().__init__()
        self.model, self.with_features = model, features

    def forward(self, images: Tensor) -> Any:
        features, logits = self.model.features_and_logits(images)
        return (logits, features) if self.with_features else logits


def to_onnx(
    model: SplitModel, shape: tuple[int, int, int], *, features: bool = False, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """Return ``model`` in the ONNX format: images (B, C, H, W) float32 in [0, 1] -> logits (B, K) or (B, K, H, W), any B ≥ 1.

    Args:
        model: in eval mode.
        shape: (C, H, W) of its images.
        features: whether the features (B, D) are a second output.
        metadata: kept inside the file, each value as JSON.

    Raises UserError naming the operation that ONNX has no counterpart of.
    """
    with needs_extra("export", "the ONNX format"):
        import onnx
        import onnxscript  # noqa: F401  (what torch.onnx exports with)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it speaks of torchvision, which is not needed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecated calls
            program = torch.onnx.export(
                _Outputs(model, features).eval(),
                (torch.zeros(2, *shape, device=next(model.parameters()).device),),
                dynamo=True,
                external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits", "features"] if features else ["logits"],
                verbose=False,
            )
    except Exception as error:  # torch.export has a dozen kinds
        raise UserError(f"the model cannot be written as ONNX: {_culprit(error)}; take --format safetensors") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError(
            "the model cannot be written as ONNX for any number of images: its forward makes a Python number of the batch size, "
            "as len(x) does; write x.shape[0], or take --format safetensors"
        )
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in (metadata or {}).items()})
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _culprit(error: BaseException) -> str:
    """Return what of a model has no place in ONNX, as torch's own words name it."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(chain)
    if match := re.search(r"OpOverload\(op='([\w.]+)'", text) or re.search(
        r"\b((?:aten|prims|torchvision)[.:]+\w+)", text
    ):
        return f"the operation {match[1].replace('::', '.')} has no counterpart there"
    if re.search(r"data-dependent|GuardOnDataDependent|Dynamic control flow", text):
        where = re.search(r'File "(?!.*site-packages)([^"]+)", line (\d+)', text)
        place = f" ({Path(where[1]).name} line {where[2]})" if where else ""
        return f"its forward decides by the values of an image{place}, and ONNX has one graph for all images"
    lines = [line.strip() for block in reversed(chain) for line in block.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def session(content: bytes, *, spin: bool = True) -> Any:
    """Return an onnxruntime session on the CPU for an ONNX file's ``content``; ``spin``: whether its threads wait actively."""
    with needs_extra("export", "the ONNX format"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def difference(content: bytes, model: SplitModel, images: Tensor) -> float:
    """Return the largest difference between the file's logits and PyTorch's: all images, and again 1, 2 and 7 at once.

    images: (n, C, H, W) float32 in [0, 1].
    """
    answer = session(content)
    device = next(model.parameters()).device
    worst = 0.0
    for count in (1, 2, 7, len(images)):
        x = images[:count]
        with exact_float32(), torch.inference_mode():
            expected = model(x.to(device)).cpu().numpy()
        logits = answer.run(["logits"], {"images": x.numpy()})[0]
        worst = max(worst, float(np.abs(logits - expected).max()))
    return worst


def to_int8(content: bytes, batches: Iterable[Tensor]) -> bytes:
    """Return the file's model with weights (per channel) and activations in 8 bits, by onnxruntime's static quantisation.

    Args:
        content: a float32 file of ``to_onnx``.
        batches: training images, (b, C, H, W) float32 in [0, 1], from which the ranges of the activations are taken.
    """
    import tempfile

    with needs_extra("export", "int8"):
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:  # ty: ignore[incompatible-method-override]
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    logger = logging.getLogger()
    level = logger.level
    with tempfile.TemporaryDirectory() as folder:
        given, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "made"))
        given.write_bytes(content)
        try:
            logger.setLevel(logging.ERROR)  # it recommends what is done here
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                made,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            logger.setLevel(level)
        return made.read_bytes()


class StraightThrough(nn.Module):
    """The answers of a converted model, with the gradients of the one it was made of.

    Rounding has no useful gradient of its own; the identity in its place is a white-box attack on it (BPDA, Athalye et al. 2018,
    arXiv:1802.00420, section 4.1).

    Args:
        original: a model x, (B, C, H, W) float in [0, 1] -> logits (B, K).
        converted: the same, without gradients.
    """

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        super().__init__()
        self.original, self.converted = original, converted

    def forward(self, x: Tensor) -> Tensor:
        """Return the converted model's logits, (B, K), differentiable."""
        with torch.no_grad():
            answers = self.converted(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return answers
        logits = self.original(x)
        return logits + (answers.to(logits) - logits.detach())
