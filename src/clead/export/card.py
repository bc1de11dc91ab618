"""The model card: what the model is for, what was measured, and what was not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clead.errors import needs_extra, printable
from clead.evaluation.suites import in_words
from clead.export.remeasured import Remeasured
from clead.results.record import Estimate, Record


def card(facts: Mapping[str, Any], *, record: Record | None, remeasured: Remeasured | None, notes: list[str]) -> str:
    """Return the card as Markdown with the YAML header of Hugging Face's model cards.

    Args:
        facts: name of the model, file of the weights and its format, precision, licence (an identifier such as ``mit``;
            ``unknown`` where nobody has said), classes, shape, threat, method, config (YAML), versions, fingerprint, data, size …
        record: the evaluation of the very weights, if there is one.
        remeasured: accuracy after the conversion, if numbers were rounded.
        notes: what a reader must know before trusting the numbers.
    """
    with needs_extra("export", "the model card"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["shown"] = _shown
    environment.filters["json"] = _json
    environment.filters["inert"] = _inert
    environment.filters["fence"] = lambda text: "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    masks = facts["task"] == "segmentation"
    return environment.get_template("card.md.jinja").render(
        record=record,
        masks=masks,
        pipeline="image-segmentation" if masks else "image-classification",
        miou=record.metrics[0] if record is not None and masks else None,
        remeasured=remeasured,
        notes=notes,
        suite=in_words(record) if record else "",
        **facts,
    )


def _shown(estimate: Estimate) -> str:
    return f"{estimate.accuracy:.1%} ({estimate.low:.1%} – {estimate.high:.1%})"


def _json(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")  # which would end a block of code


def _inert(text: object) -> str:
    r"""Return text that comes from elsewhere as Markdown that shows it.

    >>> print(_inert("<b> [x](y) a|b"))
    &lt;b> \[x](y) a\|b
    """
    shown = printable(str(text)).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([`\[|*])", r"\\\1", shown)
