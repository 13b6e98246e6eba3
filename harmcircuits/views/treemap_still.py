"""A treemap as a still: boxes within boxes, down to the last level, since it cannot be opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from harmcircuits.views.stills import LEAST_TEXT, ink, text_size

HEAD = 0.17  # inches, of the name of a box that holds others
EDGE = 0.02  # inches, around what a box holds


@dataclass(frozen=True)
class Box:
    """A part of the picture, in inches from its top left corner."""

    x: float
    y: float
    width: float
    height: float

    def cut(self, share: float) -> tuple["Box", "Box"]:
        """Two boxes, the first with this share of the area, cut across the longer side."""
        if self.width >= self.height:
            first = self.width * share
            return (
                Box(self.x, self.y, first, self.height),
                Box(self.x + first, self.y, self.width - first, self.height),
            )
        first = self.height * share
        return (
            Box(self.x, self.y, self.width, first),
            Box(self.x, self.y + first, self.width, self.height - first),
        )

    def within(self, head: float) -> "Box":
        """What is left inside it, below a head of this height."""
        edge = min(EDGE, self.width / 10, self.height / 10)
        height = self.height - head - edge
        return Box(self.x + edge, self.y + head, self.width - 2 * edge, height)


def draw_treemap(axes: Axes, trace: Any, colours: np.ndarray) -> None:
    """Draw plotly's treemap."""
    extent = axes.get_window_extent()
    size = (extent.width / axes.figure.dpi, extent.height / axes.figure.dpi)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axes.axis("off")
    children: dict[str, list[int]] = {}
    for number in sorted(range(len(trace.ids)), key=lambda number: -trace.values[number]):
        children.setdefault(trace.parents[number], []).append(number)

    (root,) = children[""]
    waiting = [(root, Box(0.0, 0.0, *size))]
    while waiting:
        number, box = waiting.pop()
        inner = children.get(trace.ids[number], [])
        corner = (box.x, box.y)
        style = {"facecolor": colours[number], "edgecolor": "white", "linewidth": 0.6}
        axes.add_patch(Rectangle(corner, box.width, box.height, **style))
        if not inner:
            text = f"{trace.labels[number]}\n{trace.values[number]:,.0f}"
            _write(axes, box, text, colours[number])
            continue
        head = HEAD if number != root and box.height > 3 * HEAD else 0.0
        if head:
            name = Box(box.x, box.y, box.width, head)
            _write(axes, name, str(trace.labels[number]), colours[number])
        sizes = [float(trace.values[child]) for child in inner]
        waiting += zip(inner, parts(sizes, box.within(head)), strict=True)


def parts(sizes: Sequence[float], box: Box) -> list[Box]:
    """A box cut into parts of these areas: nearly halved, again and again."""
    if len(sizes) == 1:
        return [box]
    sums = list(accumulate(sizes))
    middle = min(range(1, len(sizes)), key=lambda n: abs(sums[n - 1] - sums[-1] / 2))
    first, second = box.cut(sums[middle - 1] / sums[-1])
    return parts(sizes[:middle], first) + parts(sizes[middle:], second)


def _write(axes: Axes, box: Box, text: str, colour: Any) -> None:
    """A text in the middle of a box, where it can be read."""
    size = text_size((box.width, box.height), text)
    if size < LEAST_TEXT:
        return
    middle = (box.x + box.width / 2, box.y + box.height / 2)
    axes.text(*middle, text, ha="center", va="center", size=size, color=ink(colour))
