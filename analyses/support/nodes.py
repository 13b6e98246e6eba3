"""Nodes of a model, by what depends on them and by what a mask takes from them; as rows."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import rankdata
from support.contrasts import Contrast, written_logits
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.measurements import ENDS, Labels, Measurement, Rows, student_widening

N_RESAMPLES = 200  # of the pairs, for the importance of nodes
N_NODE_RESAMPLES = 1000  # of the nodes, for a rank correlation


def importance_rows(effects: Float[Tensor, "n layer node pos"], labels: Labels) -> Rows:
    """`node_importance`: sum over positions of |mean over pairs of the effect|, in logits."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(effects), (N_RESAMPLES, len(effects)), generator=generator)
    resampled = np.stack([_importance(effects[draw]) for draw in draws])
    value = _importance(effects)
    n = len(effects)
    noise = effects - effects.mean(0)
    of_noise = np.stack([_importance(noise[draw]) for draw in draws])
    by_chance = student_widening(n) * np.quantile(of_noise, ENDS[1], axis=0)

    rows = Rows()
    for layer, node in np.ndindex(*value.shape):
        where = {**labels, **_place(layer, node, value.shape[1])}
        mean = float(value[layer, node])
        of_node = resampled[:, layer, node]
        row = Measurement.from_draws("node_importance", where, of_node, mean=mean, n=n, n_groups=n)
        row = replace(row, low=max(0.0, row.low))
        if mean <= by_chance[layer, node]:
            row = replace(row, low=0.0)
        rows += [row]
    return rows


def _importance(effects: Float[Tensor, "n layer node pos"]) -> Float[ndarray, "layer node"]:
    return effects.mean(0).abs().sum(-1).numpy()


def node_share_rows(
    mask: WeightMask, sites: Mapping[str, Site], n_heads: int, labels: Labels
) -> Rows:
    """`mask_weights` and `mask_percent`: what a mask takes from each node, in number and per cent."""
    n_layers = 1 + max(site.layer for site in sites.values())
    taken = torch.zeros(n_layers, n_heads + 1)
    size = torch.zeros(n_layers, n_heads + 1)
    none = torch.empty(0, dtype=torch.long)
    for name, site in sites.items():
        index = mask.removed.get(name, none)
        if site.kind.startswith("mlp"):
            taken[site.layer, -1] += index.numel()
            size[site.layer, -1] += site.parameter.numel()
        else:
            n_sharing = n_heads // site.n_units
            counts = torch.bincount(site.units(index), minlength=site.n_units)
            taken[site.layer, :-1] += counts.repeat_interleave(n_sharing) / n_sharing
            size[site.layer, :-1] += site.parameter.numel() / n_heads

    rows = Rows()
    for layer, node in np.ndindex(*taken.shape):
        where = {**labels, **_place(layer, node, n_heads + 1)}
        n_taken = taken[layer, node].item()
        percent = 100 * n_taken / size[layer, node].item()
        rows += [
            Measurement.exact("mask_weights", where, n_taken),
            Measurement.exact("mask_percent", where, percent),
        ]
    return rows


def writer_rows(
    bridge: Bridge, contrast: Contrast, mask: WeightMask | None, labels: Labels
) -> Rows:
    """`writes`: what each component writes of the contrast's metric, in logits, by `component`."""
    components, written = written_logits(bridge, contrast, mask)
    rows = Rows()
    for component, values in zip(components, written, strict=True):
        where = {**labels, "component": component}
        rows += [Measurement.average("writes", where, values, range(len(values)))]
    return rows


def _place(layer: int, node: int, n_nodes: int) -> Labels:
    return {"layer": layer, "node": "mlp" if node == n_nodes - 1 else f"head {node}"}


def rank_correlations(rankings: Mapping[str, Rows], labels: Labels) -> Rows:
    """`rank_correlation` of every two rankings of the same nodes: all of them, and heads alone."""
    rows = Rows()
    for (name, ranking), (other, against) in combinations(rankings.items(), 2):
        heads = Rows(row for row in ranking if row.labels["node"] != "mlp")
        for among, nodes in {"all nodes": ranking, "heads": heads}.items():
            where = {**labels, "ranking": name, "against": other, "among": among}
            rows += _correlation(_paired(nodes, against), where)
    return rows


def _paired(nodes: Rows, against: Rows) -> Float[ndarray, "2 n"]:
    """Each node's figure in both rankings."""
    others = {(row.labels["layer"], row.labels["node"]): row.mean for row in against}
    pairs = [(row.mean, others[row.labels["layer"], row.labels["node"]]) for row in nodes]
    return np.array(pairs, dtype=float).T


def _correlation(pairs: Float[ndarray, "2 n"], labels: Labels) -> Rows:
    if (np.ptp(pairs, axis=-1) == 0).any():
        return Rows()
    generator = np.random.default_rng(0)
    n = pairs.shape[1]
    drawn = generator.integers(n, size=(N_NODE_RESAMPLES, n))
    draws = pairs[:, drawn].swapaxes(0, 1)
    varied = draws[np.ptp(draws, axis=-1).all(-1)]  # a resample may be one node many times
    mean = float(_rho(pairs[None])[0])
    return Rows([Measurement.from_draws("rank_correlation", labels, _rho(varied), mean=mean, n=n)])


def _rho(pairs: Float[ndarray, "draws 2 n"]) -> Float[ndarray, " draws"]:
    """Spearman's: the Pearson correlation of ranks."""
    ranks = rankdata(pairs, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    first, second = ranks[..., 0, :], ranks[..., 1, :]
    return (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
