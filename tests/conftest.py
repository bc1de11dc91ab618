"""One thread per test process: on two cores it is faster than sharing them, and sums do not depend on the machine.

A test that takes more than about two seconds is marked ``slow``, and so are all of the folders and of the files of ``SLOW``, which
take more than about five together: ``make quick-test`` leaves them out.
"""

import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# The key that signs states: one for the tests and the processes that they start, and not the developer's.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="clead-tests-")

import pytest
import torch
from hypothesis import HealthCheck, settings

atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

torch.set_num_threads(1)
# Whether a test passes does not depend on how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

SLOW = {
    *(
        "process",
        "browser",
        "docs",
        "test_acl",
        "test_bad_input",
        "test_clead_published",
        "test_evaluation",
        "test_export",
    ),
    *(
        "test_external_models",
        "test_extra",
        "test_foreign",
        "test_harden",
        "test_libraries",
        "test_mask_run",
        "test_masking",
    ),
    *(
        "test_measure",
        "test_minimum_norm",
        "test_playground",
        "test_report",
        "test_security",
        "test_serving",
        "test_stages",
    ),
    *("test_study", "test_training", "test_tuning", "test_universal", "test_zoo"),
}


def pytest_collection_modifyitems(items):
    """Mark what lies in the folders and files of ``SLOW``."""
    for item in items:
        if {item.path.parent.name, item.path.stem} & SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_foreign_state(tmp_path_factory, monkeypatch):
    """Keep caches, data paths and what chance left in PyTorch's generator out of the tests."""
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path_factory.getbasetemp() / "clead-cache"))
    monkeypatch.delenv("CLEAD_DATA", raising=False)
    if torch := sys.modules.get("torch"):  # a network that a test builds without a seed is the same every time
        torch.manual_seed(0)
