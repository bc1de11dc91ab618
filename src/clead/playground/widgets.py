"""The page's groups of widgets: what chooses an image, and what chooses an attack.

gradio checks that a choice is in its list and a number in its range, whatever a visitor sends; the rest is checked here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from torch import Tensor

from clead.errors import UserError
from clead.inference.png import to_array
from clead.playground import pictures
from clead.playground.canvas import SCRIPT, canvas_html, decode_drawing
from clead.playground.choices import (
    ATTACK_OPTIONS,
    MAX_FILE,
    MAX_PIXELS,
    MAX_STEPS,
    NORM_RULES,
    AttackOption,
    AttackSettings,
    checked,
    integer,
)
from clead.playground.comparison import Comparison, read_image
from clead.results.format import norm_of
from clead.settings import Ratio

QUICK: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of events that take no time."""
OWN_ANSWER = "take each model's own answer"
_EXAMPLES = 24


@contextmanager
def errors_on_page() -> Generator[None, None, None]:
    """Show a user's mistake on the page as one sentence."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape("; ".join(error.problems)), duration=None, print_exception=False) from None


@dataclass(frozen=True)
class ChosenImage:
    """The image that a visitor has chosen: (C, H, W) uint8, its number among the test images or None, its class or None."""

    image: Tensor
    index: int | None
    label: int | None
    lines: tuple[str, ...]


class ImageChooser:
    """A test image, an upload or a drawing, and the class that an attack drives the answer away from.

    ``outputs`` are the widgets that ``show`` gives values for.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.count = len(comparison.images)
        first = self.test_image(0)
        self.state = gr.State(first)
        with gr.Tab("Test image"):
            self.gallery, self.index = test_images(comparison)
        with gr.Tab("Upload"):
            limits = f"up to {MAX_FILE // 2**20} MiB and {MAX_PIXELS / 1e6:g} megapixels"
            label = f"An image file: PNG, JPEG, WebP, BMP or PPM, {limits}"
            self.upload = gr.File(file_types=["image"], type="binary", label=label, height=150, elem_id="upload")
        with gr.Tab("Draw"):
            html: dict[str, Any] = {"html_template": canvas_html(comparison), "js_on_load": SCRIPT}
            self.canvas = gr.HTML("", apply_default_css=False, elem_id="canvas", **html)
            with gr.Row():
                self.use = gr.Button("Use this drawing", size="sm", elem_id="use")
        _, shown, truth = self.show(first)
        self.shown = gr.HTML(shown, elem_id="chosen")
        self.truth = gr.Dropdown(
            [OWN_ANSWER, *comparison.classes],
            value=truth,
            label="True class: what the attack drives the answer away from",
            elem_id="truth",
        )
        self.outputs = [self.state, self.shown, self.truth]

    def connect(self) -> None:
        """Say what happens when an image is chosen."""
        self.gallery.select(self.from_example, None, [self.index, *self.outputs], **QUICK)
        self.index.input(self.from_number, self.index, self.outputs, **QUICK)
        uploaded = self.upload.upload(self.from_file, self.upload, self.outputs, **QUICK)
        uploaded.failure(lambda: None, None, self.upload, **QUICK)  # what is refused does not stay in the list
        self.use.click(self.from_drawing, self.canvas, self.outputs, **QUICK)

    def test_image(self, index: int) -> ChosenImage:
        """Return a test image."""
        images = self.comparison.images
        label = int(images.labels[index])
        lines = (f"Test image {index} of {self.count}", f"its class: {self.comparison.classes[label]}")
        return ChosenImage(images.images[index], index, label, lines)

    def show(self, chosen: ChosenImage) -> tuple[ChosenImage, str, str]:
        """Return the values of ``outputs``."""
        truth = OWN_ANSWER if chosen.label is None else self.comparison.classes[chosen.label]
        return chosen, pictures.chosen(chosen.image, chosen.lines), truth

    def label(self, truth: str) -> int | None:
        """Return the index of the class that ``truth`` names, None for each model's own answer."""
        return None if truth == OWN_ANSWER else self.comparison.classes.index(truth)

    @errors_on_page()
    def from_number(self, number: Any) -> tuple[Any, ...]:
        """Choose a test image by its number."""
        return self.show(self.test_image(integer("image", number, 0, self.count - 1)))

    @errors_on_page()
    def from_example(self, event: gr.SelectData) -> tuple[Any, ...]:
        """Choose a test image of the gallery."""
        number = integer("image", event.index, 0, self.count - 1)
        return number, *self.show(self.test_image(number))

    @errors_on_page()
    def from_file(self, content: bytes | None) -> tuple[Any, ...]:
        """Choose an uploaded image."""
        return (gr.skip(),) * 3 if content is None else self.show(self._read(content, "Your file"))

    @errors_on_page()
    def from_drawing(self, data: Any) -> tuple[Any, ...]:
        """Choose what is drawn."""
        chosen = self._read(decode_drawing(data), "Your drawing")
        if int(chosen.image.max()) == int(chosen.image.min()):
            raise UserError("the drawing: nothing is drawn yet; draw in the square first")
        return self.show(chosen)

    def _read(self, content: bytes, title: str) -> ChosenImage:
        """Return a visitor's own image, with what became of it on the way to the model's shape."""
        image, (width, height) = read_image(content, self.comparison)
        channels, h, w = self.comparison.shape
        came = f"{width}×{height} pixels"
        if (width, height) != (w, h):
            how = "squashed" if self.comparison.served.fit.resize == "squash" else "resized and cropped"
            came += f", {how} to {w}×{h} {'grey' if channels == 1 else 'colour'} as for training"
        return ChosenImage(
            image, None, None, (title, came, "It is not part of the link, and is forgotten when you leave.")
        )


def test_images(comparison: Comparison) -> tuple[gr.Gallery, gr.Number]:
    """Return the widgets that choose a test image: the first ones to click at, and the number."""
    count = len(comparison.images)
    examples = min(_EXAMPLES, count)
    gallery = gr.Gallery(
        [_enlarged(image) for image in comparison.images.images[:examples]],
        format="png",
        columns=8,
        allow_preview=False,
        object_fit="contain",
        buttons=[],
        label=f"The first {examples} of {count} test images",
        interactive=False,
        elem_id="gallery",
    )
    label = f"Number of the test image, 0 to {count - 1}"
    return gallery, gr.Number(0, precision=0, minimum=0, maximum=count - 1, label=label, elem_id="index")


class AttackControls:
    """Which attack, in which norm, how far, in how many steps.

    ``prefix`` begins the names of the widgets in the page, ``options`` are the attacks to choose from.
    """

    def __init__(
        self,
        comparison: Comparison,
        steps: int,
        prefix: str = "",
        options: Mapping[str, AttackOption] = ATTACK_OPTIONS,
    ) -> None:
        self.comparison, self.options = comparison, options
        start = comparison.start
        option = options[start.attack]
        attacks = [(option.label, name) for name, option in options.items()]
        norms = [(norm_of(norm), norm) for norm in NORM_RULES]
        label = "Norm: how a change is measured"
        self.attack = gr.Dropdown(attacks, value=start.attack, label="Attack", elem_id=f"{prefix}attack")
        self.about = gr.HTML(pictures.note(option.about), visible=not prefix)
        self.norm = gr.Radio(norms, value=start.norm, label=label, elem_id=f"{prefix}norm")
        self.eps = gr.Slider(**self.eps_slider(start.norm, float(start.eps)), elem_id=f"{prefix}eps")
        self.steps = gr.Slider(1, MAX_STEPS, steps, step=1, label=option.steps_label, elem_id=f"{prefix}steps")

    def connect(self) -> None:
        """Say what happens when an attack or a norm is chosen."""
        self.attack.input(self.for_attack, self.attack, [self.about, self.steps], **QUICK)
        self.norm.input(self.for_norm, self.norm, self.eps, **QUICK)

    def for_attack(self, attack: str) -> tuple[Any, ...]:
        """Say what the attack does, and what its steps are."""
        option = self.options[attack]
        return pictures.note(option.about), gr.Slider(label=option.steps_label)

    def for_norm(self, norm: str) -> gr.Slider:
        """Give the slider for ε the range of the norm."""
        return gr.Slider(**self.eps_slider(norm, float(self.comparison.radii[norm].default)))

    def read(self, attack: Any, norm: Any, eps: Any, steps: Any, seed: Any) -> AttackSettings:
        """Return what the widgets say as settings; raises UserError."""
        try:
            ratio = Ratio(f"{eps:g}/255") if self._in_255ths(norm) else Ratio(float(f"{eps:.6g}"))
        except (TypeError, ValueError):
            raise UserError(f"eps: must be a finite number, got {str(eps)[:40]!r}; type one") from None
        if attack not in self.options:
            raise UserError(f"attack: must be one of {', '.join(self.options)}, got {str(attack)[:40]!r}; change it")
        values = {"attack": attack, "norm": norm, "eps": ratio, "steps": steps, "seed": seed}
        return checked(values, self.comparison.radii)

    def eps_slider(self, norm: str, eps: float) -> dict[str, Any]:
        """Return range, value and label of the slider for ε: L∞ of colour images in 255ths, all else as it is."""
        largest, rule = self.comparison.radii[norm].largest, NORM_RULES[norm]
        if self._in_255ths(norm):
            largest, eps, label = round(255 * largest * 2) / 2, round(255 * eps, 4), f"ε in 255ths: {rule}"
            return {"minimum": 0.5, "maximum": largest, "value": eps, "step": 0.5, "label": label}
        step = 10.0 ** np.floor(np.log10(largest / 50))
        return {"minimum": step, "maximum": largest, "value": round(eps, 6), "step": step, "label": f"ε: {rule}"}

    def _in_255ths(self, norm: Any) -> bool:
        return self.comparison.shape[0] == 3 and norm == "linf"


def _enlarged(image: Tensor) -> np.ndarray:
    """Return (H, W, 3) of at least 64 pixels' height, each pixel a square: a browser would blur a small image."""
    array = to_array(image)
    array = array if array.ndim == 3 else np.repeat(array[..., None], 3, 2)
    times = max(1, -(-64 // array.shape[0]))
    return array.repeat(times, 0).repeat(times, 1)
