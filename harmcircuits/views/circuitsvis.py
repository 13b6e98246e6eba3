"""circuitsvis views of arrays: tokens coloured by a value, attention of heads.

Importing circuitsvis is enough for its JavaScript; its own renderer is not used, because it probes
the network at each display, inlines 1.3 MB a figure, and escapes neither `</script>` nor NaN.
"""

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from circuitsvis.utils.convert_props import convert_prop_type
from jaxtyping import Float
from torch import Tensor

from harmcircuits.views.figures import BLUE, RED


@dataclass(frozen=True, repr=False)
class Visual:
    """A circuitsvis element; shows itself in a notebook.

    Attributes:
        element: the name of the component.
        props: its properties.
    """

    element: str
    props: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Visual({self.element})"

    def html(self) -> str:
        """The element alone, for a page that holds `circuitsvis_script()` once."""
        name = f"circuits-vis-{uuid.uuid4().hex[:12]}"  # one page holds several
        plain = {}
        for key, value in self.props.items():
            if value is not None:
                plain[key] = _finite(convert_prop_type(value))
        # Inside a script element, "<" could end it.
        props = json.dumps(plain, allow_nan=False)
        for character in "<>&":
            props = props.replace(character, f"\\u{ord(character):04x}")
        call = f'CircuitsVis.render("{name}", CircuitsVis.{self.element}, {props})'
        return f'<div id="{name}"></div><script>{call}</script>'

    def _repr_html_(self) -> str:
        return circuitsvis_script() + self.html()


def circuitsvis_script() -> str:
    """circuitsvis' own JavaScript as one inline script: no network."""
    bundle = files("circuitsvis").joinpath("dist", "cdn", "iife.js")
    source = bundle.read_text(encoding="utf-8")
    return "<script>" + source.replace("</script>", "<\\/script>") + "</script>"


def coloured_tokens(
    tokens: Sequence[str], values: Float[Tensor, " pos"], *, largest: float | None = None
) -> Visual:
    """The tokens of a text coloured by a value: red below zero, blue above.

    Args:
        tokens: as the tokenizer writes them.
        values: the value of each token, such as `token_changes`.
        largest: the magnitude of full colour; that of the values by default.
    """
    # The element takes tokens as HTML, in which <bos> would vanish.
    words = [f" {escape(token)}" for token in tokens]
    # The same for both signs, so that white is zero; and above zero, where nothing changes.
    if largest is None:
        largest = max(values.abs().max().item(), 1e-6)
    props = {
        "tokens": words,
        "values": values,
        "negativeColor": RED,
        "positiveColor": BLUE,
        "minValue": -largest,
        "maxValue": largest,
    }
    return Visual("ColoredTokens", props)


def attention_heads(
    tokens: Sequence[str],
    patterns: Float[Tensor, "head pos pos"],
    heads: Sequence[tuple[int, int]],
) -> Visual:
    """Attention of some heads on a text.

    Args:
        tokens: of the text.
        patterns: from `attention_patterns`.
        heads: (layer, head) of each.
    """
    props = {
        "tokens": list(tokens),
        "attention": patterns,
        "attentionHeadNames": [f"L{layer} H{head}" for layer, head in heads],
        "minValue": 0.0,
        "maxValue": 1.0,
        "maskUpperTri": True,
    }
    return Visual("AttentionHeads", props)


def _finite(value: Any) -> Any:
    """Lists with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
