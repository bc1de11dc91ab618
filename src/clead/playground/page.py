"""The page: gradio's widgets around ``contest`` and ``pictures``. What a widget sends is checked again before it is used."""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import numpy as np
from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware
from torch import Tensor

from clead.errors import UserError
from clead.inference.png import to_array
from clead.inference.settings import ServeSettings
from clead.playground import comparison as computing
from clead.playground import pictures
from clead.playground.choices import (
    ATTACK_SECONDS,
    MAX_FILE,
    MAX_IMAGES,
    MAX_PIXELS,
    MAX_STEPS,
    NORM_WORDS,
    OFFERS,
    AttackSettings,
    chosen,
    query,
    read_query,
    whole,
)
from clead.playground.comparison import Comparison
from clead.playground.gradio_path_filter import Fence
from clead.settings import Ratio

PATH = "/playground"
WAITING = 16
"""Visitors' requests that wait while one is computed; others are told to come back."""
_EXAMPLES = 24
_OWN = "take each model's own answer"
_CANVAS = 224
_LARGEST_DRAWING = 200_000  # characters
_PROGRESS_STEPS = 50


@dataclass(frozen=True)
class Picked:
    """The image that a visitor has chosen: (C, H, W) uint8, its number among the test images or None, its class or None."""

    image: Tensor
    index: int | None
    label: int | None
    lines: tuple[str, ...]


def add_playground(app: FastAPI, settings: ServeSettings | None = None) -> None:
    """Add the playground of the runs that ``app`` serves under ``/playground``, where ``/`` leads.

    Args:
        app: an application of ``clead.serving.create_app`` for one to eight runs of the same data; the first two meet side by side.
        settings: of the server.

    Raises UserError if the runs do not go together.
    """
    contest = computing.open_contest(app.state.models)
    blocks = page(contest)
    # Else gradio leaves out its own check of the files that an event names; ``Fence`` checks them too.
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
    app.user_middleware.append(
        Middleware(
            Fence, path=PATH, files=get_upload_folder(), largest_upload=MAX_FILE, settings=settings or ServeSettings()
        )
    )

    @app.get("/", include_in_schema=False)
    async def first() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def page(contest: Comparison) -> gr.Blocks:
    """Return the page of ``contest``; one computation runs at a time, and sixteen wait at most."""
    # An attack changes its model's mode while it runs, and seeds the global generators.
    one_at_a_time = threading.Lock()
    names = " and ".join(entrant.name for entrant in contest.pair)
    start, allowed = contest.start, contest.radii
    first = _test_image(contest, 0)
    work: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "attack", "api_visibility": "private"}
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    with gr.Blocks(title="clead playground", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(_head(contest))
        picked = gr.State(first)
        follow = gr.State(False)
        with gr.Tab("Attack an image"), gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=330):
                with gr.Tab("Test image"):
                    gallery = gr.Gallery(
                        [_enlarged(contest.images.images[i]) for i in range(min(_EXAMPLES, len(contest.images)))],
                        format="png",
                        columns=8,
                        allow_preview=False,
                        object_fit="contain",
                        buttons=[],
                        label=f"The first {min(_EXAMPLES, len(contest.images))} of {len(contest.images)} test images",
                        interactive=False,
                        elem_id="gallery",
                    )
                    index = gr.Number(
                        0,
                        precision=0,
                        minimum=0,
                        maximum=len(contest.images) - 1,
                        label=f"Number of the test image, 0 to {len(contest.images) - 1}",
                        elem_id="index",
                    )
                with gr.Tab("Upload"):
                    upload = gr.File(
                        file_types=["image"],
                        type="binary",
                        label=f"An image file: PNG, JPEG, WebP, BMP or PPM, up to {MAX_FILE // 2**20} MiB and {MAX_PIXELS / 1e6:g} "
                        "megapixels",
                        height=150,
                        elem_id="upload",
                    )
                with gr.Tab("Draw"):
                    canvas = gr.HTML(
                        "",
                        html_template=_canvas(contest),
                        js_on_load=_DRAW,
                        apply_default_css=False,
                        elem_id="canvas",
                    )
                    with gr.Row():
                        use = gr.Button("Use this drawing", size="sm", elem_id="use")
                shown = gr.HTML(pictures.chosen(first.image, first.lines), elem_id="chosen")
                truth = gr.Dropdown(
                    [_OWN, *contest.classes],
                    value=contest.classes[first.label] if first.label is not None else _OWN,
                    label="True class: what the attack drives the answer away from",
                    elem_id="truth",
                )
                attack = gr.Dropdown(
                    [(offer.label, name) for name, offer in OFFERS.items()],
                    value=start.attack,
                    label="Attack",
                    elem_id="attack",
                )
                about = gr.HTML(pictures.note(OFFERS[start.attack].words))
                norm = gr.Radio(
                    [(words, name) for name, (words, _) in NORM_WORDS.items()],
                    value=start.norm,
                    label="Norm: how a change is measured",
                    elem_id="norm",
                )
                eps = gr.Slider(**_slider(contest, start.norm, float(start.eps)), elem_id="eps")
                steps = gr.Slider(1, MAX_STEPS, start.steps, step=1, label=_steps_label(start.attack), elem_id="steps")
                with gr.Accordion("More", open=False):
                    seed = gr.Number(
                        start.seed, precision=0, minimum=0, maximum=2**31 - 1, label="Seed of what is random"
                    )
                run = gr.Button(f"Attack {names}", variant="primary", elem_id="run")
            with gr.Column(scale=7, min_width=330):
                verdict = gr.HTML(_INVITATION, elem_id="verdict")
                results = gr.HTML("", elem_id="results")
                plot = gr.HTML("", elem_id="plot")
                link = gr.Textbox(
                    "",
                    label="Link to these settings",
                    buttons=["copy"],
                    interactive=False,
                    visible=False,
                    elem_id="link",
                )
        with gr.Tab("Attack the leaderboard"):
            gr.HTML(_ABOUT_BOARD)
            with gr.Row():
                board_attack = gr.Dropdown(
                    [(offer.label, name) for name, offer in OFFERS.items()],
                    value=start.attack,
                    label="Attack",
                    elem_id="board-attack",
                )
                board_norm = gr.Radio(
                    [(words, name) for name, (words, _) in NORM_WORDS.items()], value=start.norm, label="Norm"
                )
                board_eps = gr.Slider(**_slider(contest, start.norm, float(start.eps)), elem_id="board-eps")
                board_steps = gr.Slider(1, MAX_STEPS, 20, step=1, label=_steps_label(start.attack))
                most = min(MAX_IMAGES, len(contest.images))
                count = gr.Slider(1, most, min(32, most), step=1, label="Test images", elem_id="count")
            go = gr.Button(f"Attack all {len(contest.entrants)} models", variant="primary", elem_id="go")
            board = gr.HTML(
                pictures.leaderboard(computing.standings(contest)), apply_default_css=False, elem_id="board"
            )

        settings_of = [attack, norm, eps, steps, seed]

        def read(attack: Any, norm: Any, eps: Any, steps: Any, seed: Any) -> AttackSettings:
            unit = norm if norm in allowed else "linf"
            values = {"attack": attack, "norm": norm, "eps": _typed(contest, unit, eps)}
            counts = {"steps": whole("steps", steps, 1, MAX_STEPS), "seed": whole("seed", seed, 0, 2**31 - 1)}
            return chosen(values | counts, allowed)

        def pick(found: Picked) -> tuple[Any, ...]:
            value = _OWN if found.label is None else contest.classes[found.label]
            return found, pictures.chosen(found.image, found.lines), value

        def by_number(number: Any) -> tuple[Any, ...]:
            with _said():
                return pick(_test_image(contest, whole("image", number, 0, len(contest.images) - 1)))

        def by_example(event: gr.SelectData) -> tuple[Any, ...]:
            with _said():
                number = whole("image", event.index, 0, len(contest.images) - 1)
                return number, *pick(_test_image(contest, number))

        def by_file(content: bytes | None) -> tuple[Any, ...]:
            if content is None:
                return (gr.skip(),) * 3
            with _said():
                return pick(_given(contest, content, "your file"))

        def without_refused(content: bytes | None) -> Any:
            """Take a file that is refused from the list again."""
            try:
                _given(contest, content or b"", "your file")
            except UserError:
                return None
            return gr.skip()

        def by_drawing(data: Any) -> tuple[Any, ...]:
            with _said():
                found = _given(contest, _drawn(data), "your drawing")
                if int(found.image.max()) == int(found.image.min()):
                    raise UserError("the drawing: nothing is drawn yet; draw in the square first")
                return pick(found)

        def attacked(
            found: Picked, truth: Any, *values: Any, progress: gr.Progress = _PROGRESS
        ) -> Generator[tuple[Any, ...], None, None]:
            with _said():
                settings = read(*values)
                label = _label(contest, truth)
                with one_at_a_time:
                    tell = _told(progress, 0.0, 0.5)
                    outcomes = computing.attack_image(contest.pair, found.image, label, settings, tell)
                other = None if label == found.label else "" if label is None else contest.classes[label]
                yield (
                    pictures.verdict(outcomes, contest.classes, settings),
                    pictures.outcomes(outcomes, contest, found.image, settings),
                    "",
                    query(settings, found.index, other),
                )
                with one_at_a_time:
                    found_declines = computing.declines(
                        contest.pair,
                        found.image,
                        outcomes,
                        settings,
                        allowed[settings.norm].largest,
                        _told(progress, 0.5, 1.0),
                    )
                yield gr.skip(), gr.skip(), pictures.curve(found_declines, contest.pair, settings), gr.skip()

        def board_attacked(
            attack: Any, norm: Any, eps: Any, steps: Any, count: Any, progress: gr.Progress = _PROGRESS
        ) -> str:
            with _said():
                settings = read(attack, norm, eps, steps, 0)
                with one_at_a_time:
                    rows = computing.attack_leaderboard(contest, settings, count, _told(progress, 0.0, 1.0))
                return pictures.leaderboard(rows, settings)

        def restored(request: gr.Request) -> tuple[Any, ...]:
            try:
                given = {str(k): str(v) for k, v in dict(request.query_params).items()}
                linked = read_query(given, allowed, len(contest.images), contest.classes, start)
            except UserError as error:
                gr.Warning(f"The link was not followed – {escape('; '.join(error.problems))}", duration=None)
                linked = None
            if linked is None:
                return (gr.skip(),) * 11
            settings = linked.settings
            image = _test_image(contest, linked.image or 0)
            state, html, value = pick(image)
            if linked.truth is not None:
                value = linked.truth or _OWN
            slider = gr.Slider(**_slider(contest, settings.norm, float(settings.eps)))
            return (
                *(image.index, state, html, value, settings.attack, settings.norm, slider),
                *(gr.Slider(value=settings.steps, label=_steps_label(settings.attack)), settings.seed),
                *(pictures.note(OFFERS[settings.attack].words), linked.image is not None),
            )

        def if_linked(follow: bool, found: Picked, truth: Any, *values: Any) -> Generator[tuple[Any, ...], None, None]:
            if follow:
                yield from attacked(found, truth, *values)
            else:
                yield (gr.skip(),) * 4

        def explained(attack: Any) -> tuple[Any, ...]:
            with _said():
                offer = OFFERS.get(str(attack))
                if offer is None:
                    raise UserError(
                        f"attack: there is no such attack, got {str(attack)[:40]!r}; choose one from the list"
                    )
                return pictures.note(offer.words), gr.Slider(label=_steps_label(str(attack)))

        def other_norm(norm: Any) -> Any:
            with _said():
                if norm not in allowed:
                    raise UserError(
                        f"norm: there is no such norm, got {str(norm)[:40]!r}; choose one of {', '.join(allowed)}"
                    )
                return gr.Slider(**_slider(contest, str(norm), float(allowed[str(norm)].default)))

        chosen_image = [picked, shown, truth]
        gallery.select(by_example, None, [index, *chosen_image], **quick)
        index.input(by_number, index, chosen_image, **quick)
        given = upload.upload(by_file, upload, chosen_image, **quick)
        given.failure(without_refused, upload, upload, **quick)
        use.click(by_drawing, canvas, chosen_image, **quick)
        attack.input(explained, attack, [about, steps], **quick)
        board_attack.input(lambda name: gr.Slider(label=_steps_label(str(name))), board_attack, board_steps, **quick)
        norm.input(other_norm, norm, eps, **quick)
        board_norm.input(other_norm, board_norm, board_eps, **quick)
        state = gr.State("")
        outputs = [verdict, results, plot, state]
        shows: dict[str, Any] = {"show_progress_on": [verdict], **work}
        run.click(attacked, [picked, truth, *settings_of], outputs, **shows)
        loaded = blocks.load(restored, None, [index, *chosen_image, *settings_of, about, follow], **quick)
        loaded.then(if_linked, [follow, picked, truth, *settings_of], outputs, **shows)
        state.change(lambda text: gr.Textbox(text, visible=True, label=_link_label(text)), state, link, **quick).then(
            None, link, link, js=_TO_ADDRESS, api_visibility="private"
        )
        go.click(
            board_attacked,
            [board_attack, board_norm, board_eps, board_steps, count],
            board,
            show_progress_on=[board],
            **work,
        )
    blocks.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)
    return blocks


_PROGRESS = gr.Progress()

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
_DRAW = """
const canvas = element.querySelector('canvas'), cursor = element.querySelector('.cursor');
const pen = canvas.getContext('2d'), color = element.querySelector('input[type=color]');
const paper = canvas.dataset.paper, ink = canvas.dataset.ink, side = canvas.width;
const cells = Number(canvas.dataset.cells), cell = side / cells;
let last = null, x = Math.floor(cells / 2), y = x;
const say = () => { props.value = canvas.toDataURL('image/png'); };
const clear = () => { pen.fillStyle = paper; pen.fillRect(0, 0, side, side); say(); };
const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * side / box.width, (event.clientY - box.top) * side / box.height];
};
const hue = () => color ? color.value : ink;
canvas.addEventListener('pointerdown', (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = at(event);
    pen.fillStyle = hue();
    pen.beginPath(); pen.arc(last[0], last[1], side / 16, 0, 7); pen.fill();
});
canvas.addEventListener('pointermove', (event) => {
    if (!last) return;
    const next = at(event);
    pen.strokeStyle = hue(); pen.lineWidth = side / 8; pen.lineCap = 'round';
    pen.beginPath(); pen.moveTo(...last); pen.lineTo(...next); pen.stroke();
    last = next;
});
const end = () => { if (last) { last = null; say(); } };
canvas.addEventListener('pointerup', end);
canvas.addEventListener('pointercancel', end);
const show = () => {
    cursor.style.left = 100 * x / cells + '%'; cursor.style.top = 100 * y / cells + '%';
    cursor.style.width = cursor.style.height = 100 / cells + '%';
};
canvas.addEventListener('keydown', (event) => {
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (event.key in moves) {
        x = Math.min(cells - 1, Math.max(0, x + moves[event.key][0]));
        y = Math.min(cells - 1, Math.max(0, y + moves[event.key][1]));
    } else if (event.key === ' ') {
        pen.fillStyle = hue(); pen.fillRect(x * cell, y * cell, cell, cell); say();
    } else return;
    event.preventDefault(); show();
});
element.querySelector('.wipe').addEventListener('click', clear);
show(); clear();
"""


def _theme() -> gr.themes.Base:
    """Return gradio's plain theme with the system's fonts: nothing to fetch."""
    fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", spacing_size="sm", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    # Text on these is white: gradio's own shade is too light for it (contrast 2.5; 4.5 is what WCAG asks).
    dark = {"button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800"}
    labels = {"block_label_text_color": "*neutral_600", "block_title_text_color": "*neutral_600"}
    return theme.set(**dark, **labels, **{f"{name}_dark": "*primary_700" for name in list(dark)[:1]})


def _head(contest: Comparison) -> str:
    meet = "; ".join(f"<b>{escape(entrant.name)}</b> – {escape(pictures.trained(entrant))}" for entrant in contest.pair)
    rest = len(contest.entrants) - len(contest.pair)
    more = f" {rest} more on the leaderboard." if rest else ""
    return (
        '<div class="clead"><h1 style="font-size:24px;font-weight:700;margin:6px 0 2px">clead playground</h1>'
        f'<p style="margin:0">{meet}.{more}</p></div>'
    )


def _canvas(contest: Comparison) -> str:
    channels, height, width = contest.shape
    images = contest.images.images
    edge = float(np.median(images[:256, :, (0, -1), :].numpy()))
    paper, ink = ("#000000", "#ffffff") if channels == 1 and edge < 128 else ("#ffffff", "#000000")
    color = '<label>colour <input type="color" value="#c0392b"></label>' if channels == 3 else ""
    return (
        f'<div class="clead"><div style="position:relative;width:{_CANVAS}px;max-width:100%">'
        f'<canvas width="{_CANVAS}" height="{_CANVAS}" tabindex="0" data-paper="{paper}" data-ink="{ink}" '
        f'data-cells="{max(height, width)}" role="img" aria-label="Drawing area: draw with mouse or finger; or move with the arrow '
        'keys and fill a square with the space bar" style="display:block;width:100%;touch-action:none;cursor:crosshair;'
        'border:1px solid var(--line);border-radius:6px"></canvas><div class="cursor" style="position:absolute;pointer-events:none;'
        'outline:1px dashed #d55e00"></div></div><p><button class="wipe" type="button" style="text-decoration:underline">'
        f"start again</button> {color}</p></div>"
    )


def _drawn(data: Any) -> bytes:
    """Return the PNG in a data URI."""
    if not isinstance(data, str) or not data.startswith("data:image/png;base64,"):
        raise UserError("the drawing: nothing is drawn yet; draw in the square first")
    if len(data) > _LARGEST_DRAWING:
        raise UserError(f"the drawing: at most {_LARGEST_DRAWING} characters are read, got {len(data)}; start again")
    try:
        return base64.b64decode(data.partition(",")[2], validate=True)
    except binascii.Error:
        raise UserError("the drawing: broken data; start again") from None


def _test_image(contest: Comparison, index: int) -> Picked:
    label = int(contest.images.labels[index])
    lines = (f"Test image {index} of {len(contest.images)}", f"its class: {contest.classes[label]}")
    return Picked(contest.images.images[index], index, label, lines)


def _given(contest: Comparison, content: bytes, what: str) -> Picked:
    """Return a visitor's own image, and what became of it on the way to the model's shape."""
    image, (width, height) = computing.read_image(content, contest)
    channels, h, w = contest.shape
    color = "grey" if channels == 1 else "colour"
    fit = contest.served.fit
    how = "squashed" if fit.resize == "squash" else "resized and cropped"
    came = f"{width}×{height} pixels" + (
        "" if (width, height) == (w, h) else f", {how} to {w}×{h} {color} as for training"
    )
    lines = (what[0].upper() + what[1:], came, "It is not part of the link, and is forgotten when you leave.")
    return Picked(image, None, None, lines)


def _enlarged(image: Tensor) -> np.ndarray:
    """Return (H, W, 3) of at least 64 pixels' height, each pixel a square: a browser would blur a small image."""
    array = to_array(image)
    array = array if array.ndim == 3 else np.repeat(array[..., None], 3, 2)
    times = max(1, -(-64 // array.shape[0]))
    return array.repeat(times, 0).repeat(times, 1)


def _in_255ths(contest: Comparison, norm: str) -> bool:
    return contest.shape[0] == 3 and norm == "linf"


def _slider(contest: Comparison, norm: str, eps: float) -> dict[str, Any]:
    """Return range, value and label of the slider for ε: L∞ of colour images in 255ths, all else as it is."""
    largest, words = contest.radii[norm].largest, NORM_WORDS[norm][1]
    if _in_255ths(contest, norm):
        return {
            "minimum": 0.5,
            "maximum": round(255 * largest * 2) / 2,
            "value": round(255 * eps, 4),
            "step": 0.5,
            "label": f"ε in 255ths: {words}",
        }
    step = 10.0 ** np.floor(np.log10(largest / 50))
    return {"minimum": step, "maximum": largest, "value": round(eps, 6), "step": step, "label": f"ε: {words}"}


def _typed(contest: Comparison, norm: str, value: Any) -> Ratio:
    """Return the slider's value as a radius."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"eps: must be a number, got {str(value)[:40]!r}; type one") from None
    try:
        return Ratio(f"{number:g}/255") if _in_255ths(contest, norm) else Ratio(float(f"{number:.6g}"))
    except ValueError:
        raise UserError(f"eps: must be a finite number, got {number}; type one") from None


def _label(contest: Comparison, truth: Any) -> int | None:
    if truth == _OWN:
        return None
    if truth not in contest.classes:
        raise UserError(f"true class: the models know no such class, got {str(truth)[:40]!r}; choose one from the list")
    return contest.classes.index(truth)


def _steps_label(attack: str) -> str:
    offer = OFFERS.get(attack)
    return f"Steps: {offer.steps}" if offer and offer.steps else "Steps: this attack has none"


def _link_label(text: str) -> str:
    return "Link to this attack" if "image=" in text else "Link to these settings, without your own image"


def _told(progress: gr.Progress, begin: float, end: float) -> Callable[[float, str], None]:
    """Return what tells the page's progress bar; not every pass, for there are thousands."""
    last = [-1]

    def tell(done: float, words: str) -> None:
        now = int(_PROGRESS_STEPS * done)
        if now != last[0]:
            last[0] = now
            progress(begin + (end - begin) * done, desc=words)

    return tell


@contextmanager
def _said() -> Generator[None, None, None]:
    """Show a user's mistake on the page as one sentence."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape("; ".join(error.problems)), duration=None, print_exception=False) from None
