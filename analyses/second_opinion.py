# %% [markdown]
# # Do tools that read activations agree with the weights?
# Masks are found from gradients of weights. TransformerLens reads activations: attribution patching says which nodes an
# answer depends on, probes what can be read from the residual stream, direct logit attribution who writes the answer.

# %%
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import attribution_patch, direct_logit_attribution, fit_sparse_probe

import harmcircuits as hc
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms.world import ALLOWED, VERBS, world
from harmcircuits.views.figures import heatmaps, profiles
from harmcircuits.views.page import paragraphs, plot, section, write_page

# %% [markdown]
# ## Pairs of requests that differ in one thing
# Tokens align, so a node is the same node in both. The answers differ in the words that the metric compares.


# %%
@dataclass(frozen=True)
class Contrast:
    """What sets `clean` apart from `corrupt`: the mean logit of `wanted` minus that of `other` words at `positions`.

    Tokens: Int[n pos]; words: Int[n positions words].
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
    """One pair for each of up to `n` held-out items: harmful against benign answer, the reverse, no against yes, and the
    parts of one item against those of the next one, in benign answers."""

    def asked(behaviour: str, form: str) -> list[hc.Example]:
        found = model.behaviours[behaviour].prompts("heldout").where(lambda example: example.prompt.startswith(form))
        return list(found)

    def tokens(examples: Sequence[hc.Example]) -> Tensor:
        options = {"batch_size": len(examples), "template": model.template}
        return hc.tokenize(hc.PromptSet(tuple(examples)), model.bridge.tokenizer, **options)[0].tokens

    def ids(words: Sequence[str]) -> list[int]:
        return model.bridge.tokenizer.convert_tokens_to_ids(list(words))

    here = world()
    harmful, benign = (asked(name, "steps")[::2][:n] for name in ("harmful", "benign"))
    questions = asked("recognition", "judge")
    no, yes = (questions[start::4][:n] for start in (0, 1))
    items = [here.items[example.group] for example in harmful]
    operators = {
        kind: torch.tensor([[ids(here.favoured[item.topic, kind])] * 3 for item in items]) for kind in ("harmful", "benign")
    }
    parts = torch.tensor([[[part] for part in ids(item.parts)] for item in items])
    bad, good = tokens(harmful), tokens(benign)
    first = bad.shape[1] - 7  # "sure", which predicts the first operator
    at_operators, at_parts = (first, first + 2, first + 4), (first + 1, first + 3, first + 5)
    answers = {word: torch.tensor([[ids(ALLOWED[word])]] * len(no)) for word in ALLOWED}
    return {
        "harmful": Contrast(bad, good, at_operators, operators["harmful"], operators["benign"]),
        "benign": Contrast(good, bad, at_operators, operators["benign"], operators["harmful"]),
        "recognition": Contrast(
            tokens(no)[:, :-1], tokens(yes)[:, :-1], (tokens(no).shape[1] - 2,), answers["harmful"], answers["benign"]
        ),
        "parts": Contrast(good, good.roll(1, 0), at_parts, parts, parts.roll(1, 0)),
    }


# %% [markdown]
# ## a. Nodes
# Attribution patching at node level reads heads before W_O and works with shared keys and values; TransformerLens refuses
# those models only at edge level. It averages over pairs, so it is called once for each.


# %%
def node_effects(bridge: TransformerBridge, contrast: Contrast) -> Float[Tensor, "n layer node pos"]:
    """First-order effect of every node of every pair on its metric, in logits; nodes: each head, then the MLP."""
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    effects = torch.zeros(len(contrast.clean), n_layers, n_heads + 1, contrast.clean.shape[1])
    for index in range(len(effects)):
        pair = contrast.clean[index : index + 1], contrast.corrupt[index : index + 1]
        scores = attribution_patch(bridge, *pair, lambda logits, index=index: contrast.metric(index, logits)).node_scores
        for node, score in scores.items():
            if node.layer is not None:
                effects[index, node.layer, n_heads if node.head is None else node.head, node.position] = score
    return effects


def importance(effects: Float[Tensor, "n layer node pos"]) -> Float[np.ndarray, "layer node"]:
    """sum over positions of |mean over pairs of the effect|."""
    return effects.mean(0).abs().sum(-1).numpy()


def importance_rows(effects: Tensor, labels: Mapping[str, str]) -> Rows:
    """Rows of `importance` by layer and node, with percentile intervals that resample pairs (200 resamples)."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(effects), (200, len(effects)), generator=generator)
    low, high = np.quantile([importance(effects[draw]) for draw in draws], [0.025, 0.975], axis=0)
    value = importance(effects)
    rows = []
    for layer, node in np.ndindex(*value.shape):
        name = f"head {node}" if node < value.shape[1] - 1 else "mlp"
        mean = float(value[layer, node])
        bounds = min(mean, float(low[layer, node])), max(mean, float(high[layer, node]))
        rows.append(Measurement("node_importance", {**labels, "layer": layer, "node": name}, mean, *bounds, len(effects)))
    return rows


def mask_rows(bridge: TransformerBridge, mask: hc.WeightMask, labels: Mapping[str, str]) -> Rows:
    """Weights the mask takes from each node, in number and share; its query heads share a key or value head equally."""
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
    rows = []
    for layer, node in np.ndindex(*taken.shape):
        where = {**labels, "layer": layer, "node": f"head {node}" if node < n_heads else "mlp"}
        rows.append(Measurement.exact("mask_weights", where, taken[layer, node].item()))
        rows.append(Measurement.exact("mask_share", where, (taken[layer, node] / size[layer, node]).item()))
    return rows


def correlation(labels: Mapping[str, str], one: Sequence[float], two: Sequence[float]) -> Rows:
    """Spearman's rank correlation over nodes; the interval resamples nodes. No row where one side is constant."""
    pairs = np.array([one, two])
    if any(np.ptp(values) == 0 for values in pairs):
        return []
    generator = np.random.default_rng(0)
    drawn = generator.integers(pairs.shape[1], size=(1000, pairs.shape[1]))
    draws = pairs[:, drawn].swapaxes(0, 1)
    low, high = np.quantile(_rho(draws[np.ptp(draws, axis=-1).all(-1)]), [0.025, 0.975])
    mean = float(_rho(pairs))
    bounds = min(mean, float(low)), max(mean, float(high))
    return [Measurement("rank_correlation", labels, mean, *bounds, pairs.shape[1])]


def _rho(pairs: Float[np.ndarray, "*draws 2 n"]) -> Float[np.ndarray, "*draws"]:
    ranks = rankdata(pairs, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    one, two = ranks[..., 0, :], ranks[..., 1, :]
    return (one * two).sum(-1) / np.sqrt((one**2).sum(-1) * (two**2).sum(-1))


def correlations(rows: Rows, labels: Mapping[str, str]) -> Rows:
    """Rank correlations of importance between behaviours, and of importance with what each mask takes; all nodes, heads."""
    found = []
    tables = {}
    for row in rows:
        key = (f"{row.metric.split('_')[1]} of {row.labels['behaviour']}", str(row.labels["node"]), row.labels["layer"])
        tables.setdefault(key[0], {})[key[1:]] = row.mean
    for one, two in combinations(tables, 2):
        if not (one.startswith("importance") and two.startswith(("importance", "share", "weights"))):
            continue
        for among in ("all nodes", "heads"):
            nodes = [node for node in tables[one] if among == "all nodes" or node[0] != "mlp"]
            where = {**labels, "ranking": one, "against": two, "among": among}
            found += correlation(where, *([tables[name][node] for node in nodes] for name in (one, two)))
    return found


# %% [markdown]
# ## b. What a probe reads from the residual stream
# At the token before the answer: is the verb of a harmful kind? The question of recognition, and the request itself after
# "sure". Splits leave out items, or half of the verbs of each kind, so that a probe cannot read the verb's identity.


# %%
def residuals(bridge: TransformerBridge, batches: Sequence[hc.Batch]) -> dict[str, Float[Tensor, "n d_model"]]:
    """The residual stream at the token before the first target, by depth."""
    last = bridge.cfg.n_layers - 1
    depths = {f"{layer} pre": f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)}
    depths[f"{last} post"] = f"blocks.{last}.hook_resid_post"
    wanted = [bridge.hook_dict[name].name for name in depths.values()]
    found: dict[str, list[Tensor]] = {depth: [] for depth in depths}
    for batch in batches:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(
                batch.tokens.to(bridge.cfg.device), names_filter=lambda name: name in wanted or name in depths.values()
            )
        before = batch.is_target.int().argmax(1) - 1
        for depth, name in depths.items():
            found[depth].append(cache[name][torch.arange(len(batch)), before].cpu())
    return {depth: torch.cat(values) for depth, values in found.items()}


def probe_rows(
    model: hc.Model, masks: Mapping[str, hc.WeightMask], labels: Mapping[str, str], n: int
) -> Rows:
    """Accuracy on what was left out: `probe_accuracy` of a probe fitted under each mask, and `probe_transfer` of the probe
    fitted on the unpruned model, applied as it is."""
    rows = []
    kinds = {verb: (number, kind == "harmful") for kind in VERBS for number, verb in enumerate(VERBS[kind])}
    sets = {
        "question": [*model.behaviours["recognition"].prompts("heldout")[: 2 * n]],
        "request": [
            example for name in ("harmful", "benign") for example in model.behaviours[name].prompts("heldout")[:n]
        ],
    }
    for asked, examples in sets.items():
        verbs = [next(kinds[word] for word in example.prompt.split() if word in kinds) for example in examples]
        is_harmful = torch.tensor([harmful for _, harmful in verbs])
        items = [example.group for example in examples]
        names = list(dict.fromkeys(items))
        groups = {
            "items": torch.tensor([names.index(item) for item in items]),
            "verbs": torch.tensor([number for number, _ in verbs]),
        }
        prefill = "" if asked == "question" else model.behaviours["harmful"].prefill
        options = {"template": model.template, "prefill": prefill, "batch_size": 256}
        batches = hc.tokenize(hc.PromptSet(tuple(examples)), model.bridge.tokenizer, **options)
        unpruned = {}
        for name, mask in {"none": None, **masks}.items():
            with hc.masked(model.bridge, mask) if mask else nullcontext():
                found = residuals(model.bridge, batches)
            for depth, features in found.items():
                for unseen, group in groups.items():
                    options = {"k": features.shape[1], "groups": group, "test_fraction": 0.5, "preprocess": "standardize"}
                    probe = fit_sparse_probe(features, is_harmful, **options)
                    unpruned.setdefault((depth, unseen), probe)
                    for metric, used in {"probe_accuracy": probe, "probe_transfer": unpruned[depth, unseen]}.items():
                        test = used.test_indices
                        scaled = (
                            features[test][:, used.selected_features].double() - used.preprocess_mean
                        ) / used.preprocess_scale
                        hits = (scaled @ used.coefficients + used.intercept > 0) == is_harmful[test]
                        where = {**labels, "asked": asked, "unseen": unseen, "mask": name, "depth": depth}
                        rows.append(Measurement.rate(metric, where, hits.tolist(), [items[i] for i in test.tolist()]))
    return rows


# %% [markdown]
# ## c. Who writes the operators
# Direct logit attribution wants folded weights (`enable_compatibility_mode`, in place and for good), so each model is
# opened anew, masked, folded as it then is, and thrown away.


# %%
def writer_rows(bridge: TransformerBridge, contrast: Contrast, labels: Mapping[str, str]) -> Rows:
    """Logit of harmful minus benign operators that each component writes, mean over operators; folded weights."""
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(contrast.clean)
        found = [
            direct_logit_attribution(
                bridge,
                cache=cache,
                answer_tokens=contrast.wanted[:, place, word],
                incorrect_tokens=contrast.other[:, place, word],
                pos=position,
            )
            for place, position in enumerate(contrast.positions)
            for word in range(contrast.wanted.shape[2])
        ]
    values = torch.stack([one.attribution for one in found]).mean(0).cpu()
    groups = range(values.shape[1])
    rows = [
        Measurement.average("writes", {**labels, "component": label.replace("_out", "").replace("_", " ")}, value, groups)
        for label, value in zip(found[0].labels, values, strict=True)
    ]
    whole = torch.stack([contrast.metric(index, logits[index : index + 1]) for index in groups])
    return [*rows, Measurement.average("logit_difference", labels, whole, groups)]


# %% [markdown]
# Figures and words come from the rows alone.


# %%
def page(rows: Rows, path: Path) -> None:
    """The result in words; then nodes, what masks take, correlations, probes, writers."""

    def panels(metric: str, label: str, **where: str) -> dict[str, Rows]:
        names = dict.fromkeys(str(row.labels[label]) for row in rows.where(metric))
        return {name: rows.where(metric, **where, **{label: name}) for name in names}

    taken = {f"% of each node in the {name} mask": found for name, found in panels("mask_share", "behaviour").items()}
    percent = {title: [Measurement.exact("mask_share", row.labels, 100 * row.mean) for row in found] for title, found in taken.items()}
    probes = {
        f"{asked}, unseen {unseen}, {says}": panels(metric, "mask", asked=asked, unseen=unseen)
        for metric, says in {"probe_accuracy": "fitted under the mask", "probe_transfer": "fitted unpruned"}.items()
        for asked in ("question", "request")
        for unseen in ("items", "verbs")
    }
    writers = {f"{name} requests": panels("writes", "mask", behaviour=name) for name in ("harmful", "benign")}
    importance, among = panels("node_importance", "behaviour"), panels("rank_correlation", "among")
    sections = [
        section(
            "Which nodes matter",
            "Attribution patching: sum over positions of the mean first-order effect, in logits.",
            plot(heatmaps(importance, x="node", y="layer"), first=True),
        ),
        section(
            "What the masks take", "Query heads share a key or value head.", plot(heatmaps(percent, x="node", y="layer"))
        ),
        section(
            "Do they agree?", "Rank correlation over nodes.", plot(heatmaps(among, x="against", y="ranking", widest=1.0))
        ),
        section(
            "What a probe reads",
            "Is the verb of a harmful kind? Accuracy on items, or verbs, that the probe was not fitted on.",
            plot(profiles(probes, x="depth", title="accuracy")),
        ),
        section(
            "Who writes the operators",
            "Direct logit attribution.",
            plot(profiles(writers, x="component", title="harmful − benign, logits")),
        ),
    ]
    write_page(path, "Do tools that read activations agree with the weights?", [paragraphs(reading(rows)), *sections])


def reading(rows: Rows) -> str:
    """What the rows say, in plain words."""

    def rho(ranking: str, against: str, among: str = "all nodes") -> str:
        found = rows.where("rank_correlation", ranking=ranking, against=against, among=among)
        return f"{found[0].mean:.2f} [{found[0].low:.2f}, {found[0].high:.2f}]" if found else "undefined"

    behaviours = ("harmful", "benign", "recognition")
    shares = ", ".join(f"{name} {rho('importance of harmful', f'share of {name}')}" for name in behaviours)
    own = ", ".join(
        f"{name} {rho(f'importance of {name}', f'share of {name}')} (heads alone "
        f"{rho(f'importance of {name}', f'share of {name}', 'heads')})"
        for name in behaviours
    )
    text = [
        "Which nodes matter (rank correlation over nodes): harmful with benign answers "
        f"{rho('importance of harmful', 'importance of benign')}, which is high by construction, because both read the "
        "same pairs in opposite directions; harmful answers with recognition "
        f"{rho('importance of harmful', 'importance of recognition')}; harmful answers with the parts that benign "
        f"answers share with them {rho('importance of harmful', 'importance of parts')}.",
        f"A node's importance with the share of its weights in its own behaviour's mask: {own}. The importance for harmful "
        f"answers with the share in each mask: {shares}.",
    ]
    masks = dict.fromkeys(str(row.labels["mask"]) for row in rows.where("probe_accuracy"))
    for metric, how in {
        "probe_accuracy": "fitted under the mask",
        "probe_transfer": "fitted on the unpruned model",
    }.items():
        for asked in ("question", "request"):
            lowest = []
            for mask in masks:
                read = rows.where(metric, asked=asked, mask=mask)
                least = min(
                    (row for row in read if row.labels["depth"] not in ("0 pre", "1 pre")), key=lambda row: row.mean
                )
                last = f" (unseen {least.labels['unseen']}, {least.labels['depth']})" if least.mean < 1 else ""
                lowest.append(f"{mask} {least.mean:.0%} [{least.low:.0%}, {least.high:.0%}]{last}")
            text.append(
                f"Harmfulness read by a probe {how}, at the {asked}, lowest from the end of layer 1 on, by mask: "
                f"{', '.join(lowest)}."
            )
    for behaviour in ("harmful", "benign"):
        for mask in ("none", "harmful"):
            where = {"behaviour": behaviour, "mask": mask}
            top = sorted(rows.where("writes", **where), key=lambda row: -abs(row.mean))[:3]
            whole = rows.where("logit_difference", **where)[0]
            said = ", ".join(f"{row.labels['component']} {row.mean:+.1f}" for row in top)
            name = "unpruned" if mask == "none" else "under the harmful mask"
            text.append(
                f"{behaviour.capitalize()} requests, {name}: harmful minus benign operators {whole.mean:+.1f} logits "
                f"[{whole.low:+.1f}, {whole.high:+.1f}], written most by {said}."
            )
    return "\n".join(text)


# %%
def main(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl and second_opinion.html.")],
    organism: Annotated[str, typer.Option(help="Which organism.")] = "sft",
    mask: Annotated[Path | None, typer.Option(help="A saved mask of harmful answers; otherwise chosen in rounds.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds for the harmful mask; half as many for the others.")] = 10,
    n: Annotated[int, typer.Option(help="Pairs for attribution, one for each item.")] = 48,
    n_probed: Annotated[int, typer.Option(help="Pairs for probes.")] = 256,
) -> None:
    model, labels = hc.open_model(organism), {"model": organism}
    masks = find_circuits(model, rounds, hc.WeightMask.load(mask) if mask else None)
    out.mkdir(parents=True, exist_ok=True)
    pairs = contrasts(model, n)
    rows = []
    for name, contrast in pairs.items():
        rows += importance_rows(node_effects(model.bridge, contrast), {**labels, "behaviour": name})
    for name, found in masks.items():
        rows += mask_rows(model.bridge, found, {**labels, "behaviour": name})
    rows += correlations(rows, labels)
    probed = {"harmful": masks["harmful"], "random": hc.random_like(masks["harmful"]), "recognition": masks["recognition"]}
    rows += probe_rows(model, probed, labels, n_probed)
    for name, edit in {"none": None, "harmful": masks["harmful"]}.items():
        bridge = hc.load_organism(organism)
        with hc.masked(bridge, edit) if edit else nullcontext():
            bridge.enable_compatibility_mode()
            harmful, benign = pairs["harmful"], pairs["benign"]
            rows += writer_rows(bridge, harmful, {**labels, "mask": name, "behaviour": "harmful"})
            twins = Contrast(benign.clean, benign.corrupt, benign.positions, benign.other, benign.wanted)
            rows += writer_rows(bridge, twins, {**labels, "mask": name, "behaviour": "benign"})
    Rows(rows).append_to(out / "rows.jsonl")
    page(rows, out / "second_opinion.html")
    print(reading(rows))


def find_circuits(model: hc.Model, rounds: int, harmful: hc.WeightMask | None) -> dict[str, hc.WeightMask]:
    """The masks of harmful answers, benign answers and recognition, each with all other behaviours protected."""
    batches = {name: found.batches for name, found in model.calibrations().items()}
    masks = {"harmful": harmful} if harmful else {}
    for name in ("harmful", "benign", "recognition"):
        if name not in masks:
            others = [found for other, found in batches.items() if other != name]
            steps = rounds if name == "harmful" else max(1, rounds // 2)
            masks[name] = hc.find_circuit(model.bridge, batches[name], others, rounds=steps, size=0.006, protect_share=0.005)
    return masks


if __name__ == "__main__":
    typer.run(main)
