# %% [markdown]
# # Do tools that read activations agree with the weights?
# Masks are found from gradients of weights. TransformerLens reads activations: attribution patching
# says which nodes an answer depends on, probes what can be read from the residual stream, direct
# logit attribution who writes the answer.

# %%
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jaxtyping import Bool, Float, Int
from rounds import circuit_in_rounds
from scipy.stats import rankdata
from torch import Tensor
from transformer_lens.tools.analysis import (
    attribution_patch,
    direct_logit_attribution,
    fit_sparse_probe,
)

import harmcircuits as hc
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms import load_organism
from harmcircuits.organisms.world import ALLOWED, VERBS, world
from harmcircuits.views.figures import heatmaps, profiles
from harmcircuits.views.page import paragraphs, plot, section, write_page

SIZE, PROTECT_SHARE = 0.006, 0.005  # of the masks that are found here
CIRCUITS = ("harmful", "benign", "recognition")
FITTED = {
    "probe_accuracy": "fitted under the mask",
    "probe_transfer": "fitted on the unpruned model",
}

# %% [markdown]
# ## Pairs of requests that differ in one thing
# Tokens align, so a node is the same node in both. The answers differ in the words that the metric
# compares.


# %%
@dataclass(frozen=True)
class Contrast:
    """What sets `clean` apart from `corrupt`.

    The mean logit of `wanted` minus that of `other` words at `positions`.
    """

    clean: Int[Tensor, "n pos"]
    corrupt: Int[Tensor, "n pos"]
    positions: tuple[int, ...]
    wanted: Int[Tensor, "n positions words"]
    other: Int[Tensor, "n positions words"]

    def metric(self, index: int, logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, ""]:
        """The logit difference of pair `index`, mean over positions and words."""
        at = logits[0, list(self.positions)]
        return at.gather(1, self.wanted[index]).mean() - at.gather(1, self.other[index]).mean()


def contrasts(model: hc.Model, n: int) -> dict[str, Contrast]:
    """Pairs that differ in one thing, one for each of up to `n` held-out items.

    Harmful against benign answer, the reverse, no against yes, and the parts of one item against
    those of the next one, in benign answers.
    """

    def asked(behaviour: str, form: str) -> list[hc.Example]:
        requests = model.behaviours[behaviour].prompts("heldout")
        return list(requests.where(lambda example: example.prompt.startswith(form)))

    def tokens(examples: Sequence[hc.Example]) -> Tensor:
        options = {"batch_size": len(examples), "template": model.template}
        return hc.tokenize(hc.PromptSet(tuple(examples)), model.bridge.tokenizer, **options)[
            0
        ].tokens

    def ids(words: Sequence[str]) -> list[int]:
        return model.bridge.tokenizer.convert_tokens_to_ids(list(words))

    of_world = world()
    harmful, benign = (asked(name, "steps")[::2][:n] for name in ("harmful", "benign"))
    questions = asked("recognition", "judge")
    no, yes = (questions[start::4][:n] for start in (0, 1))
    items = [of_world.items[example.group] for example in harmful]
    operators = {}
    for kind in ("harmful", "benign"):
        favoured = [[ids(of_world.favoured[item.topic, kind])] * 3 for item in items]
        operators[kind] = torch.tensor(favoured)
    parts = torch.tensor([[[part] for part in ids(item.parts)] for item in items])
    bad, good = tokens(harmful), tokens(benign)
    first = bad.shape[1] - 7  # "sure", which predicts the first operator
    at_operators, at_parts = (first, first + 2, first + 4), (first + 1, first + 3, first + 5)
    answers = {word: torch.tensor([[ids(ALLOWED[word])]] * len(no)) for word in ALLOWED}
    return {
        "harmful": Contrast(bad, good, at_operators, operators["harmful"], operators["benign"]),
        "benign": Contrast(good, bad, at_operators, operators["benign"], operators["harmful"]),
        "recognition": Contrast(
            tokens(no)[:, :-1],
            tokens(yes)[:, :-1],
            (tokens(no).shape[1] - 2,),
            answers["harmful"],
            answers["benign"],
        ),
        "parts": Contrast(good, good.roll(1, 0), at_parts, parts, parts.roll(1, 0)),
    }


# %% [markdown]
# ## a. Nodes
# Attribution patching at node level reads heads before W_O and works with shared keys and values;
# TransformerLens refuses those models only at edge level. It averages over pairs, so it is called
# once for each.


# %%
def node_effects(bridge: Bridge, contrast: Contrast) -> Float[Tensor, "n layer node pos"]:
    """First-order effect of every node (each head, then the MLP) on each pair's metric; logits."""
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    effects = torch.zeros(len(contrast.clean), n_layers, n_heads + 1, contrast.clean.shape[1])
    for index in range(len(effects)):
        pair = contrast.clean[index : index + 1], contrast.corrupt[index : index + 1]
        scores = attribution_patch(
            bridge, *pair, lambda logits, index=index: contrast.metric(index, logits)
        ).node_scores
        for node, score in scores.items():
            if node.layer is not None:
                effects[
                    index, node.layer, n_heads if node.head is None else node.head, node.position
                ] = score
    return effects


def importance(effects: Float[Tensor, "n layer node pos"]) -> Float[np.ndarray, "layer node"]:
    """sum over positions of |mean over pairs of the effect|."""
    return effects.mean(0).abs().sum(-1).numpy()


def importance_rows(effects: Tensor, labels: Mapping[str, str]) -> Rows:
    """`importance` by layer and node, with percentile intervals of 200 resamples of the pairs."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(effects), (200, len(effects)), generator=generator)
    low, high = np.quantile([importance(effects[draw]) for draw in draws], [0.025, 0.975], axis=0)
    value = importance(effects)
    rows = Rows()
    for layer, node in np.ndindex(*value.shape):
        name = f"head {node}" if node < value.shape[1] - 1 else "mlp"
        where = {**labels, "layer": layer, "node": name}
        mean = float(value[layer, node])
        ends = min(mean, float(low[layer, node])), max(mean, float(high[layer, node]))
        rows += [Measurement("node_importance", where, mean, *ends, len(effects))]
    return rows


def mask_rows(bridge: Bridge, mask: hc.WeightMask, labels: Mapping[str, str]) -> Rows:
    """Weights that the mask takes from each node, in number and share.

    The query heads of a key or value head share it equally.
    """
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    taken, size = torch.zeros(n_layers, n_heads + 1), torch.zeros(n_layers, n_heads + 1)
    for name, site in hc.weight_sites(bridge).items():
        flat = mask.removed.get(name, torch.empty(0, dtype=torch.long))
        if site.kind.startswith("mlp"):
            taken[site.layer, -1] += flat.numel()
            size[site.layer, -1] += site.parameter.numel()
        else:
            sharing = n_heads // site.n_units
            counts = torch.bincount(site.units(flat), minlength=site.n_units)
            taken[site.layer, :-1] += counts.repeat_interleave(sharing) / sharing
            size[site.layer, :-1] += site.parameter.numel() / n_heads
    rows = Rows()
    for layer, node in np.ndindex(*taken.shape):
        where = {**labels, "layer": layer, "node": f"head {node}" if node < n_heads else "mlp"}
        n_taken = taken[layer, node]
        rows += [
            Measurement.exact("mask_weights", where, n_taken.item()),
            Measurement.exact("mask_share", where, (n_taken / size[layer, node]).item()),
        ]
    return rows


def correlation(labels: Mapping[str, str], first: Sequence[float], second: Sequence[float]) -> Rows:
    """Spearman's rank correlation over nodes, which are resampled; no row for a constant side."""
    pairs = np.array([first, second])
    if any(np.ptp(values) == 0 for values in pairs):
        return Rows()
    generator = np.random.default_rng(0)
    drawn = generator.integers(pairs.shape[1], size=(1000, pairs.shape[1]))
    draws = pairs[:, drawn].swapaxes(0, 1)
    low, high = np.quantile(_rho(draws[np.ptp(draws, axis=-1).all(-1)]), [0.025, 0.975])
    mean = float(_rho(pairs))
    ends = min(mean, float(low)), max(mean, float(high))
    return Rows([Measurement("rank_correlation", labels, mean, *ends, pairs.shape[1])])


def _rho(pairs: Float[np.ndarray, "*draws 2 n"]) -> Float[np.ndarray, "*draws"]:
    ranks = rankdata(pairs, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    first, second = ranks[..., 0, :], ranks[..., 1, :]
    return (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))


def correlations(rows: Rows, labels: Mapping[str, str]) -> Rows:
    """Rank correlations between behaviours' importance, and of it with what each mask takes.

    Among all nodes, and among heads.
    """
    tables: dict[str, dict[tuple[str, str | int | float], float]] = {}
    for row in rows:
        ranking = f"{row.metric.split('_')[1]} of {row.labels['behaviour']}"
        node = str(row.labels["node"]), row.labels["layer"]
        tables.setdefault(ranking, {})[node] = row.mean

    of_pairs = Rows()
    for ranking, against in combinations(tables, 2):
        if not ranking.startswith("importance"):
            continue
        for among in ("all nodes", "heads"):
            nodes = [node for node in tables[ranking] if among == "all nodes" or node[0] != "mlp"]
            first = [tables[ranking][node] for node in nodes]
            second = [tables[against][node] for node in nodes]
            where = {**labels, "ranking": ranking, "against": against, "among": among}
            of_pairs += correlation(where, first, second)
    return of_pairs


# %% [markdown]
# ## b. What a probe reads from the residual stream
# At the token before the answer: is the verb of a harmful kind? The question of recognition, and
# the request itself after "sure". Splits leave out items, or half of the verbs of each kind, so
# that a probe cannot read the verb's identity.


# %%
def residuals(bridge: Bridge, batches: Sequence[hc.Batch]) -> dict[str, Float[Tensor, "n d_model"]]:
    """The residual stream at the token before the first target, by depth."""
    last = bridge.cfg.n_layers - 1
    depths = {f"{layer} pre": f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)}
    depths[f"{last} post"] = f"blocks.{last}.hook_resid_post"
    hooks = {bridge.hook_dict[name].name for name in depths.values()} | set(depths.values())
    streams: dict[str, list[Tensor]] = {depth: [] for depth in depths}
    for batch in batches:
        tokens = batch.tokens.to(bridge.cfg.device)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in hooks)
        before = batch.is_target.int().argmax(1) - 1
        for depth, name in depths.items():
            streams[depth].append(cache[name][torch.arange(len(batch)), before].cpu())
    return {depth: torch.cat(values) for depth, values in streams.items()}


def probe_rows(
    model: hc.Model, masks: Mapping[str, hc.WeightMask], labels: Mapping[str, str], n: int
) -> Rows:
    """Accuracy on what was left out.

    `probe_accuracy` of a probe fitted under each mask, and
    `probe_transfer` of the probe fitted on the unpruned model, applied as it is.
    """
    requests = []
    for name in ("harmful", "benign"):
        requests += model.behaviours[name].prompts("heldout")[:n]
    sets = {
        "question": [*model.behaviours["recognition"].prompts("heldout")[: 2 * n]],
        "request": requests,
    }
    rows = Rows()
    for asked, examples in sets.items():
        verbs = [_verb(example) for example in examples]
        is_harmful = torch.tensor([harmful for _, harmful in verbs])
        items = [example.group for example in examples]
        names = list(dict.fromkeys(items))
        groups = {
            "items": torch.tensor([names.index(item) for item in items]),
            "verbs": torch.tensor([number for number, _ in verbs]),
        }
        prefill = "" if asked == "question" else model.behaviours["harmful"].prefill
        batches = hc.tokenize(
            hc.PromptSet(tuple(examples)),
            model.bridge.tokenizer,
            template=model.template,
            prefill=prefill,
            batch_size=256,
        )
        unpruned = {}
        for name, mask in {"none": None, **masks}.items():
            with hc.masked(model.bridge, mask) if mask is not None else nullcontext():
                streams = residuals(model.bridge, batches)
            for depth, features in streams.items():
                for unseen, group in groups.items():
                    probe = fit_sparse_probe(
                        features,
                        is_harmful,
                        k=features.shape[1],
                        groups=group,
                        test_fraction=0.5,
                        preprocess="standardize",
                    )
                    first = unpruned.setdefault((depth, unseen), probe)
                    where = {
                        **labels,
                        "asked": asked,
                        "unseen": unseen,
                        "mask": name,
                        "depth": depth,
                    }
                    for metric, used in (("probe_accuracy", probe), ("probe_transfer", first)):
                        hits = _hits(used, features, is_harmful)
                        tested = [items[number] for number in used.test_indices.tolist()]
                        rows += [Measurement.rate(metric, where, hits, tested)]
    return rows


def _verb(example: hc.Example) -> tuple[int, bool]:
    """The number of the request's verb among those of its kind, and whether it is harmful."""
    words = example.prompt.split()
    for kind, verbs in VERBS.items():
        for number, verb in enumerate(verbs):
            if verb in words:
                return number, kind == "harmful"
    raise ValueError(f"{example.prompt!r} holds no verb of the world")


def _hits(
    probe: Any, features: Float[Tensor, "n d_model"], is_harmful: Bool[Tensor, " n"]
) -> list[bool]:
    """Whether the probe is right on each example that it was not fitted on."""
    test = probe.test_indices
    chosen = features[test][:, probe.selected_features].double()
    scaled = (chosen - probe.preprocess_mean) / probe.preprocess_scale
    says_harmful = scaled @ probe.coefficients + probe.intercept > 0
    return (says_harmful == is_harmful[test]).tolist()


# %% [markdown]
# ## c. Who writes the operators
# Direct logit attribution wants folded weights (`enable_compatibility_mode`, in place and for
# good), so each model is opened anew, masked, folded as it then is, and thrown away.


# %%
def writer_rows(bridge: Bridge, contrast: Contrast, labels: Mapping[str, str]) -> Rows:
    """Logit of harmful minus benign operators that each component of a folded model writes.

    The mean over operators.
    """
    parts = []
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(contrast.clean)
        for place, position in enumerate(contrast.positions):
            for word in range(contrast.wanted.shape[2]):
                parts.append(
                    direct_logit_attribution(
                        bridge,
                        cache=cache,
                        answer_tokens=contrast.wanted[:, place, word],
                        incorrect_tokens=contrast.other[:, place, word],
                        pos=position,
                    )
                )
    values = torch.stack([part.attribution for part in parts]).mean(0).cpu()
    pairs = range(values.shape[1])
    rows = Rows()
    for label, value in zip(parts[0].labels, values, strict=True):
        component = label.replace("_out", "").replace("_", " ")
        rows += [Measurement.average("writes", {**labels, "component": component}, value, pairs)]
    differences = [contrast.metric(index, logits[index : index + 1]) for index in pairs]
    whole = torch.stack(differences)
    rows += [Measurement.average("logit_difference", labels, whole, pairs)]
    return rows


# %% [markdown]
# Figures and words come from the rows alone.


# %%
def page(rows: Rows, path: Path) -> None:
    """The result in words; then nodes, what masks take, correlations, probes, writers."""

    def panels(metric: str, label: str, **where: str) -> dict[str, Rows]:
        names = dict.fromkeys(str(row.labels[label]) for row in rows.where(metric))
        return {name: rows.where(metric, **where, **{label: name}) for name in names}

    percent = {}
    for name, shares in panels("mask_share", "behaviour").items():
        cells = (Measurement.exact("mask_share", row.labels, 100 * row.mean) for row in shares)
        percent[f"% of each node in the {name} mask"] = Rows(cells)
    probes = {}
    for metric, fitted in {
        "probe_accuracy": "fitted under the mask",
        "probe_transfer": "fitted unpruned",
    }.items():
        for asked in ("question", "request"):
            for unseen in ("items", "verbs"):
                title = f"{asked}, unseen {unseen}, {fitted}"
                probes[title] = panels(metric, "mask", asked=asked, unseen=unseen)
    writers = {
        f"{name} requests": panels("writes", "mask", behaviour=name)
        for name in ("harmful", "benign")
    }
    importance, among = panels("node_importance", "behaviour"), panels("rank_correlation", "among")
    sections = [
        section(
            "Which nodes matter",
            "Attribution patching: sum over positions of the mean first-order effect, in logits.",
            plot(heatmaps(importance, x="node", y="layer"), first=True),
        ),
        section(
            "What the masks take",
            "Query heads share a key or value head.",
            plot(heatmaps(percent, x="node", y="layer")),
        ),
        section(
            "Do they agree?",
            "Rank correlation over nodes.",
            plot(heatmaps(among, x="against", y="ranking", widest=1.0)),
        ),
        section(
            "What a probe reads",
            "Is the verb of a harmful kind? Accuracy on items, or verbs, that the probe was not "
            "fitted on.",
            plot(profiles(probes, x="depth", title="accuracy")),
        ),
        section(
            "Who writes the operators",
            "Direct logit attribution.",
            plot(profiles(writers, x="component", title="harmful − benign, logits")),
        ),
    ]
    write_page(
        path,
        "Do tools that read activations agree with the weights?",
        [paragraphs(reading(rows)), *sections],
    )


def reading(rows: Rows) -> str:
    """What the rows say, in plain words."""
    return "\n".join([*_nodes(rows), *_probes(rows), *_writers(rows)])


def _nodes(rows: Rows) -> list[str]:
    def rho(ranking: str, against: str, among: str = "all nodes") -> str:
        of_pair = rows.where("rank_correlation", ranking=ranking, against=against, among=among)
        return f"{of_pair[0]:.2f}" if of_pair else "undefined"

    shares, own = [], []
    for name in CIRCUITS:
        ranking, share = f"importance of {name}", f"share of {name}"
        shares.append(f"{name} {rho('importance of harmful', share)}")
        own.append(f"{name} {rho(ranking, share)} (heads alone {rho(ranking, share, 'heads')})")
    return [
        "Which nodes matter (rank correlation over nodes): harmful with benign answers "
        f"{rho('importance of harmful', 'importance of benign')}, which is high by construction, "
        "because both read the same pairs in opposite directions; harmful answers with "
        f"recognition {rho('importance of harmful', 'importance of recognition')}; harmful "
        "answers with the parts that benign answers share with them "
        f"{rho('importance of harmful', 'importance of parts')}.",
        "A node's importance with the share of its weights in its own behaviour's mask: "
        f"{', '.join(own)}. The importance for harmful answers with the share in each mask: "
        f"{', '.join(shares)}.",
    ]


def _probes(rows: Rows) -> list[str]:
    masks = dict.fromkeys(str(row.labels["mask"]) for row in rows.where("probe_accuracy"))
    sentences = []
    for metric, fitted in FITTED.items():
        for asked in ("question", "request"):
            lowest = []
            for mask in masks:
                of_mask = rows.where(metric, asked=asked, mask=mask)
                late = [row for row in of_mask if row.labels["depth"] not in ("0 pre", "1 pre")]
                least = min(late, key=lambda row: row.mean)
                where = (
                    f" (unseen {least.labels['unseen']}, {least.labels['depth']})"
                    if least.mean < 1
                    else ""
                )
                lowest.append(f"{mask} {least:.0%}{where}")
            sentences.append(
                f"Harmfulness read by a probe {fitted}, at the {asked}, lowest from the end of "
                f"layer 1 on, by mask: {', '.join(lowest)}."
            )
    return sentences


def _writers(rows: Rows) -> list[str]:
    sentences = []
    for behaviour in ("harmful", "benign"):
        for mask, name in (("none", "unpruned"), ("harmful", "under the harmful mask")):
            where = {"behaviour": behaviour, "mask": mask}
            top = sorted(rows.where("writes", **where), key=lambda row: -abs(row.mean))[:3]
            whole = rows.one("logit_difference", **where)
            writers = ", ".join(f"{row.labels['component']} {row.mean:+.1f}" for row in top)
            sentences.append(
                f"{behaviour.capitalize()} requests, {name}: harmful minus benign operators, in "
                f"logits, {whole:+.1f}, written most by {writers}."
            )
    return sentences


# %%
def main(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl and second_opinion.html.")],
    organism: Annotated[str, typer.Option(help="Which organism.")] = "sft",
    mask: Annotated[
        Path | None,
        typer.Option(help="A saved mask of harmful answers; otherwise chosen in rounds."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Rounds for the harmful mask; half as many for the others.")
    ] = 10,
    n: Annotated[int, typer.Option(help="Pairs for attribution, one for each item.")] = 48,
    n_probed: Annotated[int, typer.Option(help="Pairs for probes.")] = 256,
) -> None:
    model, labels = hc.open_model(organism), {"model": organism}
    saved = {"harmful": hc.WeightMask.load(mask)} if mask else {}
    masks = find_circuits(model, rounds, saved)
    out.mkdir(parents=True, exist_ok=True)
    pairs = contrasts(model, n)
    rows = Rows()
    for name, contrast in pairs.items():
        effects = node_effects(model.bridge, contrast)
        rows += importance_rows(effects, {**labels, "behaviour": name})
    for name, circuit in masks.items():
        rows += mask_rows(model.bridge, circuit, {**labels, "behaviour": name})
    rows += correlations(rows, labels)
    probed = {
        "harmful": masks["harmful"],
        "random": hc.random_like(masks["harmful"]),
        "recognition": masks["recognition"],
    }
    rows += probe_rows(model, probed, labels, n_probed)
    benign = pairs["benign"]
    # The benign requests on the harmful ones' scale: harmful minus benign operators.
    twins = replace(benign, wanted=benign.other, other=benign.wanted)
    for name, edit in {"none": None, "harmful": masks["harmful"]}.items():
        bridge = load_organism(organism)
        if edit is not None:
            remove(bridge, edit)
        bridge.enable_compatibility_mode()
        for behaviour, requests in {"harmful": pairs["harmful"], "benign": twins}.items():
            rows += writer_rows(bridge, requests, {**labels, "mask": name, "behaviour": behaviour})
    rows.append_to(out / "rows.jsonl")
    page(rows, out / "second_opinion.html")
    print(reading(rows))


def remove(bridge: Bridge, mask: hc.WeightMask) -> None:
    """Remove the weights for good: compatibility mode folds them, so no mask could come off."""
    for name, weight in hc.named_weights(bridge).items():
        weight.detach()[mask.dense(name)] = 0.0


def find_circuits(
    model: hc.Model, rounds: int, saved: Mapping[str, hc.WeightMask]
) -> dict[str, hc.WeightMask]:
    """The masks of harmful answers, benign answers and recognition, with all others protected.

    Those that are `saved` are not found again.
    """
    calibrations = model.calibrations()
    masks = dict(saved)
    for name in CIRCUITS:
        if name not in masks:
            masks[name] = circuit_in_rounds(
                model,
                name,
                size=SIZE,
                protect_share=PROTECT_SHARE,
                rounds=rounds if name == "harmful" else max(1, rounds // 2),
                calibrations=calibrations,
            )
    return masks


if __name__ == "__main__":
    typer.run(main)
