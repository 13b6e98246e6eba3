"""circuitsvis views of arrays: tokens coloured by a value, attention, neurons, tokens gained."""

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from circuitsvis.utils.convert_props import convert_prop_type
from jaxtyping import Float, Shaped
from jinja2.utils import htmlsafe_json_dumps
from torch import Tensor
from torch.nn import functional

from harmcircuits.display import listed
from harmcircuits.views.figures import BLUE, RED
from harmcircuits.views.page import visual, write_page

PATTERN_WIDTH = 320  # pixels: minimum width of an attention pattern
GAP = 12  # pixels between panels
TOKEN_WIDTH = 15  # pixels that a token's name needs on an axis


@dataclass(frozen=True, repr=False)
class Visual:
    """A circuitsvis element; a notebook shows it."""

    element: str
    props: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Visual({self.element})"

    def html(self) -> str:
        """The element alone, for a page that contains `circuitsvis_script()` once."""
        name = f"circuits-vis-{uuid.uuid4().hex[:12]}"  # one page holds several elements
        props = {}
        for key, value in self.props.items():
            if value is not None:
                props[key] = _finite(convert_prop_type(value))
        # Escaped, because "<" could end the script element.
        text = htmlsafe_json_dumps(props, allow_nan=False)
        call = f'CircuitsVis.render("{name}", CircuitsVis.{self.element}, {text})'
        return f'<div id="{name}"></div><script>{call}</script>'

    def save(self, path: str | Path, title: str = "") -> None:
        """Write one HTML page that needs no network."""
        _save(path, title or self.element, self.html())

    def _repr_html_(self) -> str:
        return circuitsvis_script() + self.html()


@dataclass(frozen=True, repr=False)
class Panels:
    """Views side by side, each under its title; a notebook shows them."""

    views: Mapping[str, Visual]
    columns: int = 2
    width: int = PATTERN_WIDTH

    def __repr__(self) -> str:
        return f"Panels({listed(self.views)})"

    def html(self) -> str:
        """The elements alone, for a page that contains `circuitsvis_script()` once."""
        panels = []
        for title, view in self.views.items():
            heading = f'<div style="font-weight:600">{escape(title)}</div>'
            # White, because circuitsvis writes axes in a dark grey.
            style = "background:#fff;color:#222;border-radius:6px;padding:8px 12px;min-width:0"
            # The rows of circuitsvis are 15 pixels wider than their container, on both sides.
            body = f'<div style="padding:0 15px">{view.html()}</div>'
            panels.append(f'<div style="{style}">{heading}{body}</div>')
        # At most `columns` columns, and fewer on a narrow page.
        min_width = f"max({self.width}px,{100 / self.columns:g}% - {GAP}px)"
        columns = f"repeat(auto-fit,minmax({min_width},1fr))"
        max_width = f"max-width:{2 * self.columns * self.width}px"
        grid = f"display:grid;gap:{GAP}px;grid-template-columns:{columns};{max_width}"
        inner = f'<div style="{grid}">{"".join(panels)}</div>'
        # The keyboard can reach and scroll it.
        label = escape(listed(self.views))
        attributes = f'tabindex="0" role="region" aria-label="{label}" style="overflow-x:auto"'
        return f"<div {attributes}>{inner}</div>"

    def save(self, path: str | Path, title: str = "") -> None:
        """Write one HTML page that needs no network."""
        _save(path, title or listed(self.views), self.html())

    def _repr_html_(self) -> str:
        return circuitsvis_script() + self.html()


def circuitsvis_script() -> str:
    """The JavaScript of circuitsvis as one inline script, which needs no network."""
    bundle = files("circuitsvis").joinpath("dist", "cdn", "iife.js")
    source = bundle.read_text(encoding="utf-8")
    return "<script>" + source.replace("</script>", "<\\/script>") + "</script>"


def coloured_tokens(
    tokens: Sequence[str], values: Float[Tensor, " pos"], *, largest: float | None = None
) -> Visual:
    """The tokens of a text coloured by a value: red below zero, blue above."""
    # The range is symmetric, so that white is zero, and not empty if all values are zero.
    if largest is None:
        largest = max(values.abs().max().item(), 1e-6)
    props = {
        "tokens": _words(tokens),
        "values": values,
        "negativeColor": RED,
        "positiveColor": BLUE,
        "minValue": -largest,
        "maxValue": largest,
    }
    return Visual("ColoredTokens", props)


def attention_pairs(
    tokens: Sequence[str],
    original: Float[Tensor, "head pos pos"],
    masked: Float[Tensor, "head pos pos"],
    heads: Sequence[tuple[int, int]],
) -> Panels:
    """Attention of heads on a text: to the left unpruned, to the right under a mask."""
    views = {}
    for number, (layer, head) in enumerate(heads):
        for state, patterns in {"unpruned": original, "masked": masked}.items():
            props = {
                "tokens": list(tokens),
                "attention": patterns[number],
                "minValue": 0.0,
                "maxValue": 1.0,
                "positiveColor": BLUE,
                "showAxisLabels": True,
                "maskUpperTri": True,
            }
            views[f"L{layer} H{head} {state}"] = Visual("AttentionPattern", props)
    return Panels(views, width=max(PATTERN_WIDTH, TOKEN_WIDTH * len(tokens)))


def activated_tokens(
    tokens: Sequence[str],
    original: Float[Tensor, "neuron pos"],
    masked: Float[Tensor, "neuron pos"],
    neurons: Sequence[tuple[int, int]],
) -> Visual:
    """A text coloured by a neuron's activations: unpruned, and below it under a mask."""
    largest = torch.cat([original, masked], dim=1).abs().amax(dim=1)
    labels = []
    for number, (layer, neuron) in enumerate(neurons):
        labels.append(f"L{layer} N{neuron} (largest {largest[number]:.3g})")

    texts = []
    activations = []
    for state, values in {"unpruned": original, "masked": masked}.items():
        texts.append([f"{state}:", *_words(tokens)])
        shares = values / largest[:, None].clamp_min(1e-12)
        shares = functional.pad(shares, (1, 0))  # 0 for the title before the tokens
        # circuitsvis' axes are [token, layer, neuron]. Neurons take the place of layers, because
        # the layers contribute unequal numbers of neurons.
        activations.append(shares.T.unsqueeze(2).tolist())
    props = {
        "tokens": texts,
        "activations": activations,
        "firstDimensionName": "Neuron",
        "firstDimensionLabels": labels,
        "secondDimensionName": "Activation",
        "secondDimensionLabels": ["share of its largest"],
    }
    return Visual("TextNeuronActivations", props)


def gained_tokens(
    tokens: Sequence[str],
    changes: Float[Tensor, "pos vocab"],
    vocabulary: Sequence[str],
    *,
    k: int = 5,
) -> Visual:
    """A table of the tokens whose probability rises or falls most at each position."""
    distance = changes.abs().sum(dim=1) / 2
    positions = distance.argsort(descending=True, stable=True)
    k = min(k, len(vocabulary))
    rise, rise_ids = changes[positions].topk(k, dim=1)
    fall, fall_ids = changes[positions].topk(k, dim=1, largest=False)
    fall, fall_ids = fall.flip(1), fall_ids.flip(1)

    # circuitsvis does not colour losses and shows figures only under the mouse. So each cell is a
    # token of its own, whose text includes the figure, and its index is the number of the cell.
    values = torch.stack([rise, fall])
    ids = torch.stack([rise_ids, fall_ids])
    cells = []
    for value, number in zip(values.flatten().tolist(), ids.flatten().tolist(), strict=True):
        cells.append(f"{vocabulary[number]} {value:+.3f}")
    rise_index, fall_index = torch.arange(len(cells)).view(values.shape)

    labels = []
    following = [*tokens[1:], "…"]
    for position in positions.tolist():
        context = f"{position} {tokens[position]} → {following[position]}"
        labels.append(f"{context} ({distance[position]:.2f})")
    props = {
        "tokens": [_words(cells)],
        "topkVals": _columns(rise.abs()),
        "topkIdxs": _columns(rise_index),
        "bottomkVals": _columns(fall.abs()),
        "bottomkIdxs": _columns(fall_index),
        "firstDimensionName": "Position",
        "firstDimensionLabels": labels,
        "thirdDimensionName": "Mask",
        "sampleLabels": ["change of probability"],
    }
    return Visual("TopkTokens", props)


def _save(path: str | Path, title: str, html: str) -> None:
    if Path(path).suffix != ".html":
        raise ValueError(f"{path}: circuitsvis draws only in a browser; the name must end in .html")
    write_page(path, title, [visual(html)], script=circuitsvis_script())


def _words(tokens: Sequence[str]) -> list[str]:
    """Tokens for an element that reads them as HTML, in which <bos> would vanish."""
    return [f" {escape(token)}" for token in tokens]


def _columns(values: Shaped[Tensor, "pos k"]) -> list:
    """Values on circuitsvis' axes [sample, position, k, column], with one sample and one column."""
    return values[None, :, :, None].tolist()


def _finite(value: Any) -> Any:
    """A value with None in place of NaN and infinity, which JSON cannot express."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
