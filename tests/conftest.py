"""One thread per test process: on two cores it is faster than sharing them, and sums do not depend on the machine.

A test that takes more than about two seconds is marked ``slow``, and so are all of the folders of ``SLOW``: ``make quick-test``
leaves them out.
"""

import atexit
import os
import shutil
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

SLOW = ("process", "browser", "docs")


def pytest_collection_modifyitems(items):
    """Mark what lies in the folders of ``SLOW``."""
    for item in items:
        if item.path.parent.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_foreign_state(tmp_path_factory, monkeypatch):
    """Keep caches and data paths of the developer's machine out of the tests."""
    monkeypatch.setenv("CLEAD_CACHE", str(tmp_path_factory.getbasetemp() / "clead-cache"))
    monkeypatch.delenv("CLEAD_DATA", raising=False)
