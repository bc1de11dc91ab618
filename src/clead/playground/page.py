"""The page, in the server's application: gradio's widgets around ``comparison`` and ``pictures``."""

from __future__ import annotations

import threading
from collections.abc import Generator
from html import escape
from typing import Any

import gradio as gr
from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from clead.errors import UserError
from clead.inference.settings import ServeSettings
from clead.playground import masks, pictures
from clead.playground.choices import ATTACK_SECONDS, MAX_FILE, MAX_IMAGES, MAX_SEED, integer, query, read_query
from clead.playground.comparison import (
    Comparison,
    Report,
    attack_image,
    attack_leaderboard,
    epsilon_curves,
    open_comparison,
    recorded_leaderboard,
)
from clead.playground.gradio_path_filter import GradioPathFilter
from clead.playground.widgets import (
    OWN_ANSWER,
    QUICK,
    AttackControls,
    ChosenImage,
    ImageChooser,
    errors_on_page,
    test_images,
)
from clead.tasks.segmentation import SEGMENTATION

PATH = "/playground"
MAX_WAITING = 16
"""Visitors' requests that wait while one is computed; others are told to come back."""
_PROGRESS_STEPS = 50
_PROGRESS = gr.Progress()
_WORK: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "attack", "api_visibility": "private"}

_INVITATION = (
    '<div class="clead"><p class="verdict">Choose an image and an attack, and see which model gives way.</p>'
    '<p class="muted">An attack changes the pixels by no more than ε, in the direction that misleads the model most.</p></div>'
)
_ABOUT_BOARD = (
    '<div class="clead"><p>One attack, chosen by you, on the first test images and on every model. Each model is attacked by '
    f"itself, with full access to it; at most {MAX_IMAGES} images and {ATTACK_SECONDS:.0f} seconds for each model.</p></div>"
)
# The page's own words come first for a screen reader; gradio leaves the language out where it is not the browser's.
_ON_START = "() => { document.documentElement.lang = 'en'; }"
_TO_ADDRESS = """(query) => {
    const text = query.slice(query.indexOf('?'));
    history.replaceState(null, '', location.pathname + text);
    return location.href;
}"""


def add_playground(app: FastAPI, settings: ServeSettings | None = None) -> None:
    """Add the playground of the runs that ``app`` serves under ``/playground``, where ``/`` leads.

    Args:
        app: an application of ``clead.serving.create_app`` for one to eight runs of the same data; the first two meet side by side.
        settings: of the server.

    Raises UserError if the runs do not go together.
    """
    comparison = open_comparison(app.state.models)
    blocks = (MaskPage if comparison.served.task == SEGMENTATION else Page)(comparison).blocks
    # Else gradio leaves out its own check of the files that an event names; the filter checks them too.
    blocks.has_launched = True
    gr.mount_gradio_app(
        app,
        blocks,
        path=PATH,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=True,
        max_file_size=MAX_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=pictures.css(),
        js=_ON_START,
        head=pictures.HEAD,
    )
    # Innermost: what comes here has passed the server's name and the log.
    limits: dict[str, Any] = {"max_upload": MAX_FILE, "settings": settings or ServeSettings()}
    app.user_middleware.append(Middleware(GradioPathFilter, path=PATH, files=get_upload_folder(), **limits))

    @app.get("/", include_in_schema=False)
    async def first() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


class Page:
    """The page of a comparison, ``blocks``; one computation runs at a time, and sixteen wait at most."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        # An attack changes its model's mode while it runs, and seeds the global generators.
        self.one_at_a_time = threading.Lock()
        with gr.Blocks(title="clead playground", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            gr.HTML(_head(comparison))
            self._add_tabs()
        self.blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=4, api_open=False)

    def _add_tabs(self) -> None:
        with gr.Tab("Attack an image"), gr.Row(equal_height=False):
            self._add_image_tab()
        with gr.Tab("Attack the leaderboard"):
            self._add_leaderboard_tab()

    def _add_image_tab(self) -> None:
        start = self.comparison.start
        with gr.Column(scale=4, min_width=330):
            self.chooser = chooser = ImageChooser(self.comparison)
            self.controls = controls = AttackControls(self.comparison, start.steps)
            with gr.Accordion("More", open=False):
                about = "Seed of what is random"
                seed = gr.Number(start.seed, precision=0, minimum=0, maximum=MAX_SEED, label=about)
            names = " and ".join(model.name for model in self.comparison.pair)
            run = gr.Button(f"Attack {names}", variant="primary", elem_id="run")
        with gr.Column(scale=7, min_width=330):
            verdict = gr.HTML(_INVITATION, elem_id="verdict")
            results, plot = gr.HTML("", elem_id="results"), gr.HTML("", elem_id="plot")
            label = "Link to these settings"
            link = gr.Textbox("", label=label, buttons=["copy"], interactive=False, visible=False, elem_id="link")
        chooser.connect()
        controls.connect()
        settings = [controls.attack, controls.norm, controls.eps, controls.steps, seed]
        inputs, text, follow = [chooser.state, chooser.truth, *settings], gr.State(""), gr.State(False)
        outputs = [verdict, results, plot, text]
        shown: dict[str, Any] = {"show_progress_on": [verdict], **_WORK}
        run.click(self.attack, inputs, outputs, **shown)
        restored = [chooser.index, *chooser.outputs, *settings, controls.about, follow]
        loaded = self.blocks.load(self.restore, None, restored, **QUICK)
        loaded.then(self.attack_if_linked, [follow, *inputs], outputs, **shown)
        changed = text.change(_link, text, link, **QUICK)
        changed.then(None, link, link, js=_TO_ADDRESS, api_visibility="private")

    def _add_leaderboard_tab(self) -> None:
        gr.HTML(_ABOUT_BOARD)
        with gr.Row():
            controls = AttackControls(self.comparison, 20, "board-")
            most = min(MAX_IMAGES, len(self.comparison.images))
            count = gr.Slider(1, most, min(32, most), step=1, label="Test images", elem_id="count")
        go = gr.Button(f"Attack all {len(self.comparison.models)} models", variant="primary", elem_id="go")
        recorded = pictures.leaderboard(recorded_leaderboard(self.comparison))
        board = gr.HTML(recorded, apply_default_css=False, elem_id="board")
        controls.connect()
        inputs = [controls.attack, controls.norm, controls.eps, controls.steps, count]
        go.click(self.attack_all, inputs, board, show_progress_on=[board], **_WORK)

    def attack(
        self, chosen: ChosenImage, truth: Any, *values: Any, progress: gr.Progress = _PROGRESS
    ) -> Generator[tuple[Any, ...], None, None]:
        """Attack the chosen image on the first two models; show what came of it, then how far each model holds."""
        pair, classes = self.comparison.pair, self.comparison.classes
        with errors_on_page():
            settings = self.controls.read(*values)
            label = self.chooser.label(truth)
            with self.one_at_a_time:
                outcomes = attack_image(pair, chosen.image, label, settings, _reporter(progress, 0.0, 0.5))
            other = None if label == chosen.label else "" if label is None else classes[label]
            yield (
                pictures.verdict(outcomes, classes, settings),
                pictures.cards(outcomes, classes, chosen.image, settings),
                "",
                query(settings, chosen.index, other),
            )
            max_eps = self.comparison.radii[settings.norm].largest
            with self.one_at_a_time:
                report = _reporter(progress, 0.5, 1.0)
                curves = epsilon_curves(chosen.image, outcomes, settings, max_eps, report)
            yield gr.skip(), gr.skip(), pictures.epsilon_plot(curves, settings), gr.skip()

    def attack_if_linked(
        self, follow: bool, chosen: ChosenImage, truth: Any, *values: Any
    ) -> Generator[tuple[Any, ...], None, None]:
        """Attack as a link says, where the page was opened by one."""
        if follow:
            yield from self.attack(chosen, truth, *values)
        else:
            yield (gr.skip(),) * 4

    @errors_on_page()
    def attack_all(
        self, attack: Any, norm: Any, eps: Any, steps: Any, count: Any, progress: gr.Progress = _PROGRESS
    ) -> str:
        """Attack every model on some test images, and rank them."""
        settings = self.controls.read(attack, norm, eps, steps, 0)
        with self.one_at_a_time:
            rows = attack_leaderboard(self.comparison, settings, count, _reporter(progress, 0.0, 1.0))
        return pictures.leaderboard(rows, settings)

    def restore(self, request: gr.Request) -> tuple[Any, ...]:
        """Set the widgets as a link says."""
        allowed, classes, start = self.comparison.radii, self.comparison.classes, self.comparison.start
        try:
            given = {str(k): str(v) for k, v in dict(request.query_params).items()}
            linked = read_query(given, allowed, len(self.comparison.images), classes, start)
        except UserError as error:
            gr.Warning(f"The link was not followed – {escape('; '.join(error.problems))}", duration=None)
            linked = None
        if linked is None:
            return (gr.skip(),) * 11
        settings, option = linked.settings, linked.settings.option
        image = self.chooser.test_image(linked.image or 0)
        state, html, truth = self.chooser.show(image)
        if linked.truth is not None:
            truth = linked.truth or OWN_ANSWER
        eps = gr.Slider(**self.controls.eps_slider(settings.norm, float(settings.eps)))
        steps = gr.Slider(value=settings.steps, label=option.steps_label)
        values = (settings.attack, settings.norm, eps, steps, settings.seed)
        return image.index, state, html, truth, *values, pictures.note(option.about), linked.image is not None


class MaskPage(Page):
    """The page of models of masks: a test image, an attack, and the masks painted before and after it."""

    def _add_tabs(self) -> None:
        start = self.comparison.start
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=330):
                gallery, index = test_images(self.comparison)
                self.controls = controls = AttackControls(self.comparison, start.steps, options=masks.MASK_OPTIONS)
                seed = gr.Number(
                    start.seed, precision=0, minimum=0, maximum=MAX_SEED, label="Seed of what is random", elem_id="seed"
                )
                names = " and ".join(model.name for model in self.comparison.pair)
                run = gr.Button(f"Attack {names}", variant="primary", elem_id="run")
            with gr.Column(scale=7, min_width=330):
                shown = [gr.HTML(_INVITATION, elem_id="verdict"), gr.HTML("", elem_id="results")]
        gallery.select(self.chosen, None, index, **QUICK)
        controls.connect()
        inputs = [index, controls.attack, controls.norm, controls.eps, controls.steps, seed]
        run.click(self.attack_mask, inputs, shown, show_progress_on=[shown[0]], **_WORK)

    @errors_on_page()
    def chosen(self, event: gr.SelectData) -> int:
        """Return the number of a test image of the gallery."""
        return integer("image", event.index, 0, len(self.comparison.images) - 1)

    @errors_on_page()
    def attack_mask(self, index: Any, *values: Any, progress: gr.Progress = _PROGRESS) -> tuple[str, str]:
        """Attack a test image on the first two models and show what they answer."""
        images, pair = self.comparison.images, self.comparison.pair
        settings = self.controls.read(*values)
        number = integer("image", index, 0, len(images) - 1)
        image, mask = images.images[number], images.labels[number]
        with self.one_at_a_time:
            outcomes = masks.attack_mask(pair, image, mask, settings, _reporter(progress, 0.0, 1.0))
        return masks.verdict(outcomes, settings), masks.cards(outcomes, image, mask, self.comparison.classes)


def _link(text: str) -> gr.Textbox:
    label = "Link to this attack" if "image=" in text else "Link to these settings, without your own image"
    return gr.Textbox(text, visible=True, label=label)


def _reporter(progress: gr.Progress, begin: float, end: float) -> Report:
    """Return what moves the page's progress bar from ``begin`` to ``end``; not at every pass, for there are thousands."""
    shown = -1

    def report(done: float, text: str) -> None:
        nonlocal shown
        now = int(_PROGRESS_STEPS * done)
        if now != shown:
            shown = now
            progress(begin + (end - begin) * done, desc=text)

    return report


def _theme() -> gr.themes.Base:
    """Return gradio's plain theme with the system's fonts: nothing to fetch."""
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", spacing_size="sm", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    # Text on these is white: gradio's own shade is too light for it (contrast 2.5; 4.5 is what WCAG asks).
    dark = {"button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800"}
    labels = {"block_label_text_color": "*neutral_600", "block_title_text_color": "*neutral_600"}
    return theme.set(**dark, **labels, button_primary_background_fill_dark="*primary_700")


def _head(comparison: Comparison) -> str:
    pair = "; ".join(f"<b>{escape(model.name)}</b> – {escape(pictures.trained(model))}" for model in comparison.pair)
    rest = len(comparison.models) - len(comparison.pair)
    more = f" {rest} more on the leaderboard." if rest else ""
    return (
        '<div class="clead"><h1 style="font-size:24px;font-weight:700;margin:6px 0 2px">clead playground</h1>'
        f'<p style="margin:0">{pair}.{more}</p></div>'
    )
