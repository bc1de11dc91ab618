"""timm and torchvision for the tests, which lie beside the environment's packages, in ``.venv/networks``.

An index may have torchvision for CUDA alone, whose import beside a PyTorch without CUDA stops at the operator
``torchvision::nms``. So it is not among the environment's packages, where transformers would import it too. Here the operators are
declared first, which is enough for networks: nothing of torchvision's compiled code is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(sys.prefix) / "networks"
_declared: list[Any] = []


def need(name: str) -> Any:
    """Import timm, torchvision or transformers; skip the test where it is not installed."""
    if importlib.util.find_spec(name) is None and (FOLDER / name).is_dir():
        sys.path.append(str(FOLDER))
    for each in {name, *(("torchvision",) if name == "timm" else ())}:
        if importlib.util.find_spec(each) is None:
            pytest.skip(f"{each} is not installed; make test installs it")
    if name != "transformers" and "torchvision" not in sys.modules and not _declared and _for_cuda():
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor a) -> Tensor")
        library.define("qnms(Tensor a) -> Tensor")
        _declared.append(library)
    return importlib.import_module(name)


def _for_cuda() -> bool:
    """Whether torchvision was built for CUDA and PyTorch was not."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    built = (Path(spec.origin).parent / "version.py").read_text()
    return torch.version.cuda is None and "+cu" in built
