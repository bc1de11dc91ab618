"""Weights, gradients and optimiser state shared out over the processes: PyTorch's FSDP2 (Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from clead.config import RunConfig
from clead.errors import UserError
from clead.models.split import SplitModel, copied

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LARGE = 1_000_000
_CALLED = ("features_and_logits", "features", "embedding")


def check(config: RunConfig, memory: nn.Module | None) -> None:
    """Raise UserError if the training needs whole weights beside those that are shared out."""
    settings = config.train
    given = {
        "train.ema": settings.ema,
        "train.swa_start": settings.swa_start is not None,
        "train.awp": settings.awp,
        "train.compile": settings.compile,
        "train.precision float16": settings.precision == "float16",
        "train.trainable classifier": settings.trainable == "classifier",
        "method.grad_align_weight": getattr(
            config.method, "grad_align_weight", 0
        ),  # FSDP2 has no gradients of gradients
        "a method that has weights of its own": memory is not None and any(True for _ in memory.parameters()),
    }
    if wrong := [name for name, value in given.items() if value]:
        raise UserError(
            f"train.shard: does not go with {', '.join(wrong)}; leave that out, or train without train.shard"
        )


def sharded(model: SplitModel, processes: int, device: torch.device) -> SplitModel:
    """Return a copy of ``model`` whose weights the processes share out; they are gathered block by block where they are used."""
    mesh = init_device_mesh(device.type, (processes,))
    with torch.no_grad():
        shared = copied(model)
        shared.to(memory_format=torch.contiguous_format)  # ty: ignore[no-matching-overload]
    for block in _blocks(shared):
        fully_shard(block, mesh=mesh)
    fully_shard(cast(Any, shared), mesh=mesh)
    for name in _CALLED:
        register_fsdp_forward_method(shared, name)
    shared.is_sharded = True
    # What a model returns as a view is not changed in place here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return shared


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are gathered together, the inner ones first: children, and what in them has a million weights."""
    blocks = []
    for child in model.children():
        size = sum(parameter.numel() for parameter in child.parameters())
        if size > _LARGE:
            blocks += [block for block in _blocks(child) if sum(p.numel() for p in block.parameters()) > _LARGE]
        if size and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            blocks.append(child)
    return blocks


def gather(model: nn.Module, into: nn.Module) -> None:
    """Copy the weights of all processes into a whole model; on process 0 alone, but all have to call it."""
    state = get_model_state_dict(model, options=_WHOLE)
    if state:
        into.load_state_dict(state)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the whole state of model and optimiser, on process 0; all have to call it."""
    return get_model_state_dict(model, options=_WHOLE), get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, of_model: Any, of_optimizer: Any) -> None:
    """Take up what ``states`` returned, whatever the number of processes was."""
    set_model_state_dict(model, of_model, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(model, optimizer, of_optimizer, options=StateDictOptions(full_state_dict=True))
