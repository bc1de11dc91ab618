"""Where a result comes from: the command, and the versions of what computed it."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from pathlib import Path

import torch


def command() -> str:
    """Return the command line that is running, without the folder that the program lies in and without passwords of URLs."""
    name = Path(sys.argv[0]).name.replace("__main__.py", "clead")
    return re.sub(r"(://[^:/@\s]*:)[^@\s]+@", r"\1***@", shlex.join([name, *sys.argv[1:]]))


def environment() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    import numpy

    from clead import __version__

    return {
        "clead": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
