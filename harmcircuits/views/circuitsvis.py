"""circuitsvis views of arrays: tokens coloured by a value, attention, neurons, tokens gained."""

import json
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
from torch import Tensor
from torch.nn import functional

from harmcircuits.display import listed
from harmcircuits.views.figures import BLUE, RED
from harmcircuits.views.page import drawn, write_page

PATTERN_WIDTH = 320  # least, of an attention pattern, in pixels
GAP = 12  # between panels, in pixels
TOKEN_WIDTH = 15  # of each token in it: what its name needs on an axis


@dataclass(frozen=True, repr=False)
class Visual:
    """A circuitsvis element; shows itself in a notebook."""

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

    def save(self, path: str | Path, title: str = "") -> None:
        """Write it as one page that needs no network."""
        _save(path, title or self.element, self.html())

    def _repr_html_(self) -> str:
        return circuitsvis_script() + self.html()


@dataclass(frozen=True, repr=False)
class Panels:
    """Views side by side, each under its title; shows itself in a notebook."""

    views: Mapping[str, Visual]
    columns: int = 2
    width: int = PATTERN_WIDTH

    def __repr__(self) -> str:
        return f"Panels({listed(self.views)})"

    def html(self) -> str:
        """The elements alone, for a page that holds `circuitsvis_script()` once."""
        panels = []
        for title, view in self.views.items():
            heading = f'<div style="font-weight:600">{escape(title)}</div>'
            # circuitsvis writes axes in dark grey, which a dark page would swallow.
            card = "background:#fff;color:#222;border-radius:6px;padding:8px 12px;min-width:0"
            # Its rows reach 15 pixels beyond what they stand in.
            body = f'<div style="padding:0 15px">{view.html()}</div>'
            panels.append(f'<div style="{card}">{heading}{body}</div>')
        # As many columns as there is room for, and no more than asked for.
        least = f"max({self.width}px,{100 / self.columns:g}% - {GAP}px)"
        columns = f"repeat(auto-fit,minmax({least},1fr))"
        widest = f"max-width:{2 * self.columns * self.width}px"
        grid = f"display:grid;gap:{GAP}px;grid-template-columns:{columns};{widest}"
        inner = f'<div style="{grid}">{"".join(panels)}</div>'
        # It can be reached and scrolled by keyboard.
        label = escape(listed(self.views))
        outer = f'tabindex="0" role="region" aria-label="{label}" style="overflow-x:auto"'
        return f"<div {outer}>{inner}</div>"

    def save(self, path: str | Path, title: str = "") -> None:
        """Write them as one page that needs no network."""
        _save(path, title or listed(self.views), self.html())

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
    """The tokens of a text coloured by a value: red below zero, blue above."""
    # The same for both signs, so that white is zero; and above zero, where nothing changes.
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
    unpruned: Float[Tensor, "head pos pos"],
    masked: Float[Tensor, "head pos pos"],
    heads: Sequence[tuple[int, int]],
) -> Panels:
    """Attention of some heads on a text, unpruned to the left and under a mask to the right."""
    views = {}
    for (layer, head), before, after in zip(heads, unpruned, masked, strict=True):
        for state, pattern in {"unpruned": before, "masked": after}.items():
            props = {
                "tokens": list(tokens),
                "attention": pattern,
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
    unpruned: Float[Tensor, "neuron pos"],
    masked: Float[Tensor, "neuron pos"],
    neurons: Sequence[tuple[int, int]],
) -> Visual:
    """A text coloured by a neuron's activations, unpruned and, below it, under a mask."""
    both = torch.cat([unpruned, masked], dim=1)
    largest = both.abs().amax(dim=1)
    labels = []
    for (layer, neuron), most in zip(neurons, largest.tolist(), strict=True):
        labels.append(f"L{layer} N{neuron} (largest {most:.3g})")

    texts, activations = [], []
    for state, values in {"unpruned": unpruned, "masked": masked}.items():
        texts.append([f"{state}:", *_words(tokens)])
        shares = values / largest[:, None].clamp_min(1e-12)
        with_title = functional.pad(shares, (1, 0))  # a token before the first, of 0
        # circuitsvis' axes are [token, layer, neuron]; neurons stand where layers do, because those
        # of a mask are of many layers, and not as many of each.
        activations.append(with_title.T.unsqueeze(2).tolist())
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
    """The tokens that become likelier and unlikelier at each position, as a table."""
    moved = changes.abs().sum(dim=1) / 2
    positions = moved.argsort(descending=True, stable=True)
    k = min(k, len(vocabulary))
    gained, gained_ids = changes[positions].topk(k, dim=1)
    lost, lost_ids = changes[positions].topk(k, dim=1, largest=False)
    lost, lost_ids = lost.flip(1), lost_ids.flip(1)

    # circuitsvis leaves losses white and figures to the mouse, so a cell has its figure in its
    # text: every cell is a token of its own, and its index the number of the cell.
    cells = []
    for values, ids in ((gained, gained_ids), (lost, lost_ids)):
        for value, number in zip(values.flatten().tolist(), ids.flatten().tolist(), strict=True):
            cells.append(f"{vocabulary[number]} {value:+.3f}")
    index = torch.arange(len(cells)).view(2, *gained.shape)

    labels = []
    following = [*tokens[1:], "…"]
    for position in positions.tolist():
        context = f"{position} {tokens[position]} → {following[position]}"
        labels.append(f"{context} ({moved[position]:.2f})")
    props = {
        "tokens": [_words(cells)],
        "topkVals": _columns(gained.abs()),
        "topkIdxs": _columns(index[0]),
        "bottomkVals": _columns(lost.abs()),
        "bottomkIdxs": _columns(index[1]),
        "firstDimensionName": "Position",
        "firstDimensionLabels": labels,
        "thirdDimensionName": "Mask",
        "sampleLabels": ["change of probability"],
    }
    return Visual("TopkTokens", props)


def _save(path: str | Path, title: str, html: str) -> None:
    if Path(path).suffix != ".html":
        raise ValueError(f"{path}: circuitsvis draws in a browser only; end the name in .html")
    write_page(path, title, [drawn(html)], script=circuitsvis_script())


def _words(tokens: Sequence[str]) -> list[str]:
    """Tokens for an element that takes them as HTML, in which <bos> would vanish."""
    return [f" {escape(token)}" for token in tokens]


def _columns(values: Shaped[Tensor, "pos k"]) -> list:
    """As circuitsvis' [sample, position, k, column], of one sample and one column."""
    return values[None, :, :, None].tolist()


def _finite(value: Any) -> Any:
    """Lists with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    is_number = isinstance(value, float)
    return None if is_number and not math.isfinite(value) else value
