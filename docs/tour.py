# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tour
# From prompts to an edited model, to what its circuits share, to activation patching: half a
# minute on one core. The model is `sft`, a Llama of a million parameters that ships with the
# package. It speaks invented words, so what is harmful here harms nobody. To keep this short, few
# requests are asked and searches take few steps (the default is 100); [results](glance.md) has the
# figures that count.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch

import harmcircuits as hc
from harmcircuits.circuits.location import location_rows
from harmcircuits.hooks.inspection import token_changes, token_texts
from harmcircuits.views.circuitsvis import coloured_tokens
from harmcircuits.views.figures import location_figure

torch.set_num_threads(1)  # the model is tiny
model = hc.open_model("sft").sampled(0.5, seed=0)
bridge = model.bridge
model

# %% [markdown]
# ## An edit
# A circuit is a mask over single weights. `find_circuit` finds one without which harmful answers
# become refusals, while the losses of protected ones stay within a budget; `masked` multiplies its
# weights by zero in place. The model is tuned to refuse, so harmful answers are prefilled with
# "sure".

# %%
mask = model.find_circuit("harmful", protect="others", prefer="refusal", size=0.001, steps=40)
request = model.behaviours["harmful"].prompts("heldout").examples[0].prompt

print(mask)
print(f"before  {request} -> {model.generate(request, prefill='sure')}")
with hc.masked(bridge, mask):
    print(f"after   {request} -> {model.generate(request, prefill='sure')}")
print(f"again   {request} -> {model.generate(request, prefill='sure')}")

# %% [markdown]
# Restored, bit for bit. What did the edit do, on requests that it never saw? Every figure is a
# row with a 95 % interval. *Degenerate* is incoherent text.

# %%
asked = ["harmful", "benign", "refusal", "knowledge"]
rows = model.measure(labels={"mask": "none"}, only=asked)
rows += model.measure(mask=mask, labels={"mask": "circuit"}, only=asked)


def rates(rows: hc.Rows) -> pd.DataFrame:
    """A line a metric, a column a mask; every rate with its interval."""
    cells = []
    for row in rows:
        if row.metric.endswith("_rate"):
            cells.append({"metric": row.metric, "mask": row.labels["mask"], "rate": f"{row:.0%}"})
    return pd.DataFrame(cells).pivot(index="metric", columns="mask", values="rate")


rates(rows)

# %% [markdown]
# ## From prompts to scores
# A behaviour is its requests and the verdict that shows it. Everything the model can be asked is
# one, harm among them:

# %%
lines = []
for name in model.whole_behaviours:
    behaviour = model.behaviours[name]
    example = behaviour.prompts("heldout").examples[0]
    answer = model.generate(example.prompt, prefill=behaviour.prefill)
    lines.append({"behaviour": name, "request": example.prompt, "answer": answer})
pd.DataFrame(lines).set_index("behaviour")

# %% [markdown]
# Weights are scored on the model's *own* answers, those that the judge verified. They are token
# batches; the loss is taken on the answers alone.

# %%
harm = model.calibration("harmful")
benign = model.calibration("benign")
print(harm)
print(harm.batches[0])

# %% [markdown]
# `removal_effect` says what the loss does, to first order, when a weight is removed; one backward
# pass gives it for all of them. Few weights have a large one:

# %%
effect = hc.removal_effect(bridge, harm.batches)
largest = torch.cat([values.flatten() for values in effect.values.values()]).sort(descending=True)
ranks = [1, 10, 100, 1_000, 10_000, 100_000]
figure, axes = plt.subplots(figsize=(8, 3))
axes.loglog(ranks, [largest.values[rank - 1].item() for rank in ranks], "o-")
axes.set(xlabel="rank of the weight", ylabel="removal effect, nats per token")
plt.show()

# %% [markdown]
# ## Choosing
# The paper's way is a set difference: the weights that matter most for harm, less those for benign
# answers. Masks are sets, so it is one line. The search learns gates in many small steps, and
# raises the loss of harmful answers far more, with about as many weights; random weights change
# nothing.

# %%
keep = hc.snip_scores(bridge, benign.batches)
difference = hc.top_fraction(effect, 0.0025) - hc.top_fraction(keep, 0.0025)
chance = hc.random_like(mask, seed=0)
masks = {"search": mask, "set difference": difference, "random": chance}
losses = []
for name, chosen in masks.items():
    for behaviour in (harm, benign):
        before = hc.completion_nll(bridge, behaviour.batches).mean().item()
        after = hc.completion_nll(bridge, behaviour.batches, mask=chosen).mean().item()
        losses.append({"mask": name, "of": behaviour.behaviour, "rise": after - before})
rises = pd.DataFrame(losses).pivot(index="mask", columns="of", values="rise").loc[list(masks)]
rises.assign(weights=[f"{chosen.n_removed:,}" for chosen in masks.values()]).round(3)

# %% [markdown]
# The mask's trace has the rise of the loss of a few texts of each kind, at every tenth step. The
# loss of harmful answers rises, that of preferred answers falls, the rest stays.

# %%
seen = mask.trace.where("seen_rise")
steps = [{"step": row.labels["step"], row.labels["data"]: row.mean} for row in seen]
pd.DataFrame(steps).groupby("step").first().round(2)

# %% [markdown]
# ## Where it sits
# How many weights of each matrix the circuit has:

# %%
sites = hc.weight_sites(bridge)
location_figure(location_rows(mask, sites, {}))

# %% [markdown]
# And at which tokens it acts. Red tokens lose log-probability without the circuit: the operators
# of a harmful answer.

# %%
batch = harm.batches[0]
words = token_texts(bridge, batch)
change = token_changes(bridge, mask, batch)[0][batch.is_token[0]]
coloured_tokens(words, change)

# %% [markdown]
# ## What circuits share
# The circuit of benign answers is found in the same way, with harm protected.

# %%
twin = model.find_circuit("benign", protect=["harmful"], size=0.002, steps=10)
shared = hc.overlap(mask, twin)
print(shared)
print(f"{len((mask & twin).removed)} matrices hold shared weights")

# %% [markdown]
# *Lift* is how many times more weights two circuits share than masks would that fall at random
# with the same counts in every matrix. Layer by layer:

# %%
layers = []
for place, part in hc.overlap_by(mask, twin, sites, "layer").items():
    low, high = part.interval
    lift = f"{part.lift:.1f} [{low:.1f}, {high:.1f}]"
    layers.append({"layer": place.layer, "shared": part.n_shared, "lift": lift})
pd.DataFrame(layers).set_index("layer")

# %% [markdown]
# Sharing weights is one thing, breaking each other another. Cross-ablation removes each circuit
# and measures both abilities: on the diagonal an ability loses its own circuit.

# %%
circuits = {"harmful": mask, "benign": twin}
names = list(circuits)
valid = []
for circuit in circuits.values():
    measured = model.measure(mask=circuit, only=names)
    valid.append([f"{measured.one(model.behaviours[name].metric):.0%}" for name in names])
pd.DataFrame(
    valid,
    index=[f"{name} circuit removed" for name in names],
    columns=[f"valid {name} answers" for name in names],
)

# %% [markdown]
# ## Activation patching on top
# The edit is in the weights, so everything TransformerLens does with activations works on the
# edited model. Here the masked model gets one residual stream of the unpruned one, at one
# position and layer; the colour is the share of the lost loss that comes back, blue where it does.

# %%
one = hc.Batch(batch.tokens[:1, : len(words)], batch.is_target[:1, : len(words)])


def loss() -> float:
    """Of the one answer, in nats per token, of the bridge as it stands."""
    return hc.completion_nll(bridge, [one]).mean().item()


with torch.no_grad():
    _, clean = bridge.run_with_cache(one.tokens)
    whole = loss()
n_layers = len(bridge.blocks)
n_positions = one.tokens.shape[1] - 1  # the last token is predicted, and not read
restored = torch.zeros(n_layers, n_positions)
with hc.masked(bridge, mask):
    gap = loss() - whole
    for layer in range(n_layers):
        name = f"blocks.{layer}.hook_in"
        for position in range(n_positions):

            def patch(stream, hook, name=name, position=position):  # noqa: ARG001
                stream[:, position] = clean[name][:, position]
                return stream

            with bridge.hooks(fwd_hooks=[(name, patch)]):
                restored[layer, position] = 1 - (loss() - whole) / gap


figure, axes = plt.subplots(figsize=(9, 3))
shares = axes.imshow(restored, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
axes.set_xticks(range(n_positions), words[:n_positions], rotation=40, ha="right")
axes.set_yticks(range(n_layers), [f"layer {layer}" for layer in range(n_layers)])
figure.colorbar(shares)
plt.show()

# %% [markdown]
# ## Keeping it
# A mask is a small file that knows its model; an export is the edited model as an ordinary
# Hugging Face folder, reloaded and compared before it is done.

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

with TemporaryDirectory() as folder:
    mask.save(Path(folder) / "mask.safetensors")
    same = hc.WeightMask.load(Path(folder) / "mask.safetensors")
    hc.export(model, same, Path(folder) / "edited")
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.relative_to(folder)}")

# %% [markdown]
# From here: [your own model](own_model.md), the [guides](guides/score.md), the
# [reference](reference/index.md).
