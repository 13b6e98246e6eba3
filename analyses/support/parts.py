"""A mask in the parts that lie in one layer, matrix, head or neuron."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from harmcircuits.circuits.location import Place
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.sites import Site


def parts_of(
    mask: WeightMask, sites: Mapping[str, Site], by: Literal["layer", "matrix", "unit"]
) -> dict[Place, WeightMask]:
    """The mask cut by the place of its weights; together the parts are the mask."""
    removed: dict[Place, dict[str, Tensor]] = {}
    for name, index in mask.removed.items():
        site = sites[name]
        if by == "layer":
            removed.setdefault(Place(site.layer), {})[name] = index
        elif by == "matrix":
            removed.setdefault(Place(site.layer, site.kind), {})[name] = index
        else:
            unit = site.units(index)
            for number in unit.unique().tolist():
                place = Place(site.layer, site.unit, number)
                removed.setdefault(place, {})[name] = index[unit == number]

    parts = {}
    for place, indices in removed.items():
        settings = {"by": by, "place": list(place)}
        source = Source(mask.source.model, "part", settings, (mask.source,))
        parts[place] = WeightMask(indices, mask.shapes, source)
    return parts
