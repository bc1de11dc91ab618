"""A model in the ONNX format, answered by onnxruntime: no gradients, only queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clead.errors import MissingExtra, UserError


class OnnxModel(nn.Module):
    """An ONNX classifier as a module: x, (B, C, H, W) float in [0, 1] -> logits (B, K), without gradient.

    Args:
        path: the ``.onnx`` file: one image input, and the logits as its first output.

    Raises UserError if the file cannot be read, or takes more than one input.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtra("onnxruntime", "onnx", "evaluating an ONNX model") from None
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"no ONNX file at {path}; give the path of a file that torch.onnx.export or another tool wrote"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        providers = [
            name
            for name in ("CUDAExecutionProvider", "CPUExecutionProvider")
            if name in onnxruntime.get_available_providers()
        ]
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime has a dozen kinds
            raise UserError(f"{path} is not an ONNX model: {str(error).splitlines()[0]}") from None
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            raise UserError(f"{path} must take one input, the images, got {', '.join(part.name for part in inputs)}")
        self.input_name, shape = inputs[0].name, inputs[0].shape
        # A batch size fixed at export: images go in so many at a time.
        self.fixed_batch = shape[0] if shape and isinstance(shape[0], int) else None

    def extra_repr(self) -> str:
        """Return the file's digest: a module without parameters has no other fingerprint."""
        import hashlib

        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:32]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, K), on the device of ``x``."""
        size = self.fixed_batch or len(x)
        answers = []
        for part in x.detach().float().cpu().split(size):
            short = size - len(part)
            padded = torch.cat([part, part[:1].expand(short, *part.shape[1:])]) if short else part
            logits = self.session.run(None, {self.input_name: padded.contiguous().numpy()})[0]
            answers.append(torch.from_numpy(logits)[: len(part)])
        return torch.cat(answers).to(x.device)
