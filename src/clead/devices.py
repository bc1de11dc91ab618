"""Which device is meant by its name."""

from __future__ import annotations

import torch

from clead.errors import UserError


def device_of(name: str) -> torch.device:
    """Return the device that ``train.device`` means; raises UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"train.device: no device {name!r} here ({reason}); use auto, cpu, cuda or cuda:N") from None
    return device
