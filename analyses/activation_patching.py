# %% [markdown]
# # Which activations carry what a mask removed?
# A mask is an edit in place, so activation patching runs on top of it. The same request with the
# same answer is read twice, by the unpruned model and by the masked one, and one activation is
# carried over from one run into the other. **Restore**: the masked model gets an activation of the
# unpruned one. **Destroy**: the unpruned model gets one of the masked. Either way
#
# $$\text{share} = \frac{\text{loss, patched} - \text{loss, start}}
#                      {\text{loss, end} - \text{loss, start}}$$
#
# on the reference answer is 0 for the model patched into and 1 for the model patched from.
#
# A model of your own, with a mask that you saved, on a few layers: `python
# analyses/activation_patching.py --model FOLDER --harmful FILE --benign FILE --mask FILE --layers 10
# --layers 11 --out DIR`.
#
# Positions are counted from the start of the text, so they mean the same only in requests that are
# equally long. The largest group of such requests, with the same first word, is patched together;
# of a chat template it may be a single request, whose words are then not shown.

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
MOST = 0.9

# %% [markdown]
# ## The experiment
# The mask is the circuit of harm, all else protected. Two controls: the benign twins of the harmful
# requests under the same circuit, and a random mask of as many weights. Where a mask leaves the loss
# as it was there is nothing to restore, and changes are given in nats only.


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
    """What patches restore and destroy, and where the heads that restore most attend.

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
    rows += attention_rows(model, circuit, "harmful", rows, labels, n=n, n_heads=4)
    for name, edit, behaviour in (("circuit", circuit, "benign"), ("random", random, "harmful")):
        labels = {"mask": name, "behaviour": behaviour}
        rows += patching_rows(model, edit, behaviour, labels, is_whole=True, **options)
    return rows


rows = claim.rows()
rows.where("nll_gap").frame(index=["model", "behaviour"], columns="mask")

# %% [markdown]
# ## Where in the stream
# Before a layer (pre), between attention and MLP (mid), after the last (post); one position at a
# time, and all of them at once. At the last depth all is restored by construction: only the final
# norm and the unembedding follow, which no mask touches.

# %%
first = {name: rows[0].labels[name] for name in ("ladder", "model", "seed")}  # is shown
circuit = rows.where(mask="circuit", behaviour="harmful", **first)
METRIC = "patch_share" if circuit.where("patch_share") else "patch_change"
patches = circuit.where(METRIC).by("component", "direction")
stream = {way: patches["residual", way] for way in ("restore", "destroy")}
claim.figure("The residual stream", heatmaps(stream, x="position", y="layer"))

# %%
# Each token by what it restores at the depth where it restores most.
claim.figure("What each token restores", token_view(stream["restore"]))

# %% [markdown]
# ## Which sublayers, which heads
# Heads are patched before their output weights, at all positions at once.

# %%
added = {", ".join(of): cells for of, cells in patches.items() if of[0] in ("attention", "mlp")}
claim.figure("Attention and MLP", heatmaps(added, x="position", y="layer"))

# %%
heads = {of[1]: cells for of, cells in patches.items() if of[0] == "head"}
claim.figure("Heads", heatmaps(heads, x="head", y="layer"))

# %%
# Where the heads that restore most attend, in one request: without the mask, and with it.
claim.figure("Attention of the strongest heads", attention_view(circuit.where("attention")))

# %% [markdown]
# ## The controls
# The whole stream patched at each depth, in nats, beside the circuit on harmful requests.

# %%
changes = rows.where("patch_change", component="residual", position="all", **first)
depths = {"restore": {}, "destroy": {}}
for (way, behaviour, mask), cells in changes.by("direction", "behaviour", "mask").items():
    depths[way][f"{behaviour} requests, {mask} mask"] = cells
claim.figure("Controls", profiles(depths, x="layer", title="nats a token"))


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    numbers = {}
    for row in rows.where("nll_gap"):
        of = f"{row.labels['behaviour']} requests, {row.labels['mask']} mask"
        numbers[f"nats a token: {of}"] = f"{row:.2f}"
    restored = rows.where("patch_share", direction="restore", mask="circuit", behaviour="harmful")
    if not restored:  # too little to restore
        return numbers
    depths = restored.where(component="residual", position="all")
    depth = next((row for row in depths if row.mean >= MOST), depths[-1])  # else the last measured
    best = hc.Rows(row for row in restored if row.labels["position"] != "all").largest()
    where = "{component} {layer} at {position}".format(**best.labels)
    return numbers | {
        "requests": f"{depth.n}",
        f"whole stream, first depth from {MOST:.0%} on or last": f"{depth.labels['layer']}: {depth:.0%}",
        "strongest patch of one position": f"{where}: {best:.0%}",
    }


claim.result(rows)

# %% [markdown]
# ## What it does not say
# A patch replaces an activation whole, with all that it holds: one that restores a share is where
# the effect of the mask passes through, which need not be where the removed weights sit
# (`put_back.py` puts weights back instead). Shares of single places do not add up, since what one
# place restores others may restore as well. And they are of the loss on the reference answer, not of
# the answers that the model gives.

# %%
claim.main()
