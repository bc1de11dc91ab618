"""A real browser, and ``clead playground`` on two small runs: one trained without attacks, one against them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, expect, sync_playwright

import clead
from clead.inference.models import open_models
from clead.inference.settings import ServeSettings
from clead.playground.choices import AttackSettings
from clead.playground.comparison import Comparison, attack_image, open_comparison

expect.set_options(timeout=60_000)  # a busy machine takes more than the usual 5 seconds
SETTINGS = AttackSettings(attack="pgd", norm="linf", eps=0.15, steps=50, seed=0)


def executable() -> str:
    """Return the browser's path: ``$CLEAD_BROWSER``, else the first on the PATH; fails the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = os.environ.get("CLEAD_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if found is None or shutil.which(found) is None:
        pytest.fail(
            f"no browser ({found or 'none on the PATH'}): run make browser, or set CLEAD_BROWSER", pytrace=False
        )
    return found


# Of the module, not the session: until it ends, an event loop of playwright's runs in this thread, and asyncio.run fails.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = executable()
    # Chromium's sandbox does not work for root, whom containers are often run as.
    arguments = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@dataclass(frozen=True)
class Duel:
    """A running playground, and a test image that the attack of ``SETTINGS`` breaks for one model only."""

    address: str
    comparison: Comparison
    index: int
    label: str
    fooled: str
    files: Path


@pytest.fixture(scope="module")
def duel(tmp_path_factory) -> Iterator[Duel]:
    folder = tmp_path_factory.mktemp("duel")
    runs = [folder / "standard", folder / "hardened"]
    tiny = ("--train.validate_every", "100", "--train.device", "cpu", "--data.limit_test", "120", "--train.budget")
    for recipe, budget, run in (("digits-standard", "10", runs[0]), ("digits-pgd-at", "50", runs[1])):
        clead.train(clead.load_recipe(recipe, [*tiny, budget]), out=run, show=False)
    comparison = open_comparison(open_models(runs, ServeSettings(threads=1)))
    index, label, fooled = clearest(comparison)
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "True", "TMPDIR": str(folder)}  # the command turns it off
    command = [sys.executable, "-m", "clead", "playground", *map(str, runs), "--port", "0"]
    log = (folder / "log").open("w")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder)
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        said = [next(lines, ""), next(lines, "")]
        assert said[1].startswith("playground: http://127.0.0.1:"), (said, (folder / "log").read_text()[-2000:])
        yield Duel(said[1].split()[1], comparison, index, label, fooled, folder)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
        assert not list(folder.glob("clead-playground-*")), "uploaded files are left behind"
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
        log.close()


def clearest(comparison: Comparison) -> tuple[int, str, str]:
    """Return the image on which the first model fails and the second holds by most, its class, and the wrong answer."""
    x, y = comparison.images.images.float() / 255, comparison.images.labels
    after = []
    for entrant in comparison.pair:
        x_adv = clead.attacks.pgd(entrant.model, x, y, eps=SETTINGS.eps, steps=SETTINGS.steps, seed=SETTINGS.seed)
        right = entrant.model(x).argmax(1) == y
        after.append(torch.where(right, entrant.model(x_adv).softmax(1)[range(len(y)), y], -1.0))
    # Of the first the label's probability is small where it was right, of the second it is large.
    clear = torch.where(after[0] >= 0, torch.minimum(1 - after[0], after[1]), -1)
    index = int(clear.argmax())
    label = int(y[index])
    first, second = attack_image(comparison.pair, comparison.images.images[index], label, SETTINGS)
    assert clear[index] > 0.5 and first.broken and second.attacked and not second.broken, (
        "no image tells the models apart"
    )
    return index, comparison.classes[label], comparison.classes[first.adversarial.answer]
