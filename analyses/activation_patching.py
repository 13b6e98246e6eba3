# %% [markdown]
# # Which activations carry the effect of a mask?
# A mask is an edit in place, so activation patching runs on top of it. The unpruned model and the
# masked model both read the same request with the same answer, and one activation of one run replaces
# that of the other run. **Restore**: the masked model gets an activation of the unpruned model.
# **Destroy**: the unpruned model gets an activation of the masked model. Either way
#
# $$\text{share} = \frac{\text{loss, patched} - \text{loss, start}}
#                      {\text{loss, end} - \text{loss, start}}$$
#
# on the reference answer is 0 for the model that gets the activation and 1 for the model that gives it.
#
# A model of your own, with a mask that you saved, on a few layers: `python
# analyses/activation_patching.py --model FOLDER --harmful FILE --benign FILE --mask FILE --layers 10
# --layers 11 --out DIR`.
#
# Positions are counted from the start of the text, so they mean the same only in requests of equal
# length. The largest group of such requests, with the same first word, is patched together; with a
# chat template it may be a single request, whose words are then not shown.

# %%
from support.claims import Claim
from support.figures import heatmaps, profiles
from support.patching import attention_rows, attention_view, patching_rows, token_view

import harmcircuits as hc
from harmcircuits.search.circuit import STEPS

claim = Claim(
    "patching",
    "which activations carry what a circuit removed",
    models=("sft",),
    small={"steps": 2, "n": 2, "layers": (0, 3)},
)
NEARLY_ALL = 0.9

# %% [markdown]
# ## The experiment
# The mask is the circuit of harm, which protects all other abilities. Two controls: the benign twins of
# the harmful requests under the same circuit, and a random mask of as many weights. If a mask does not
# change the loss, there is nothing to restore, and changes are given in nats only.


# %%
@claim.job
def patched(
    model: hc.Model,
    seed: int,
    *,
    mask: str = "",
    size: float = 0.002,
    steps: int = STEPS,
    n: int = 32,
    layers: tuple[int, ...] = (),
) -> hc.Rows:
    """The shares that patches restore and destroy, and where the heads that restore most attend.

    Args:
        mask: a saved mask of the model, in place of a search.
        size: share of the weights in the circuit that is searched for.
        steps: steps of the search.
        n: requests, at most.
        layers: numbers of the blocks; all by default.
    """
    saved = hc.WeightMask.load(mask) if mask else None
    circuit = saved or model.find_circuit("harmful", size=size, steps=steps)
    random = hc.random_like(circuit, seed=seed)
    options = {"n": n, "layers": layers or None}

    labels = {"mask": "circuit", "behaviour": "harmful"}
    rows = patching_rows(model, circuit, "harmful", labels, **options)
    rows += attention_rows(model, circuit, "harmful", rows, labels, n=n)
    for name, edit, behaviour in (("circuit", circuit, "benign"), ("random", random, "harmful")):
        labels = {"mask": name, "behaviour": behaviour}
        rows += patching_rows(model, edit, behaviour, labels, is_whole=True, **options)
    return rows


rows = claim.rows()
rows.where("nll_gap").frame(index=["model", "behaviour"], columns="mask")

# %% [markdown]
# ## Where in the stream
# Before a layer (pre), between attention and MLP (mid), after the last (post); one position at a
# time, and all of them at once. At the last depth a patch restores everything by construction: only the
# final norm and the unembedding follow, which no mask edits.

# %%
case = {name: rows[0].labels[name] for name in ("ladder", "model", "seed")}
circuit = rows.where(mask="circuit", behaviour="harmful", **case)
METRIC = "patch_share" if circuit.where("patch_share") else "patch_change"
patches = circuit.where(METRIC).by("component", "direction")
stream = {way: patches["residual", way] for way in ("restore", "destroy")}
claim.figure("The residual stream", heatmaps(stream, x="position", y="layer"))

# %%
# Each token by the share that it restores at its best depth.
claim.figure("What each token restores", token_view(stream["restore"]))

# %% [markdown]
# ## Which sublayers, which heads
# Heads are patched before their output weights, at all positions at once.

# %%
sublayers, heads = {}, {}
for (component, direction), cells in patches.items():
    if component in ("attention", "mlp"):
        sublayers[f"{component}, {direction}"] = cells
    if component == "head":
        heads[direction] = cells
claim.figure("Attention and MLP", heatmaps(sublayers, x="position", y="layer"))

# %%
claim.figure("Heads", heatmaps(heads, x="head", y="layer"))

# %%
# Where the heads that restore most attend, in one request: without the mask, and with it.
claim.figure("Attention of the strongest heads", attention_view(circuit.where("attention")))

# %% [markdown]
# ## The controls
# The whole stream patched at each depth, in nats, beside the circuit on harmful requests.

# %%
changes = rows.where("patch_change", component="residual", position="all", **case)
depths = {"restore": {}, "destroy": {}}
for (way, behaviour, mask), cells in changes.by("direction", "behaviour", "mask").items():
    depths[way][f"{behaviour} requests, {mask} mask"] = cells
claim.figure("Controls", profiles(depths, x="layer", title="nats a token"))


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    numbers = {}
    for row in rows.where("nll_gap"):
        title = "nats a token: {behaviour} requests, {mask} mask".format(**row.labels)
        numbers[title] = f"{row:.2f}"
    restored = rows.where("patch_share", direction="restore", mask="circuit", behaviour="harmful")
    if not restored:  # too little to restore
        return numbers
    depths = restored.where(component="residual", position="all")
    depth = next(
        (row for row in depths if row.mean >= NEARLY_ALL), depths[-1]
    )  # else the last measured
    best = hc.Rows(row for row in restored if row.labels["position"] != "all").largest()
    where = "{component} {layer} at {position}".format(**best.labels)
    title = f"whole stream, first depth from {NEARLY_ALL:.0%} on or last"
    return numbers | {
        "requests": f"{depth.n}",
        title: f"{depth.labels['layer']}: {depth:.0%}",
        "strongest patch of one position": f"{where}: {best:.0%}",
    }


claim.result(rows)

# %% [markdown]
# ## What it does not say
# A patch replaces a whole activation. If it restores a share, the effect of the mask passes through that
# place, but the removed weights need not sit there (`put_back.py` puts weights back instead). Shares of
# single places do not add up, since two places may restore the same effect. And they are shares of the
# loss on the reference answer; the model's own answers may differ.

# %%
claim.main()
