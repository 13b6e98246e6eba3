"""The table `docs/architectures.md`: scored matrices, exact exports, refused models.

Its rows are the models that the tests of scores and of export are parametrised by;
`PYTHONPATH=tests:analyses python tests/hooks/test_architectures.py` writes it anew. Would catch: a table
that promises an architecture that no test covers, a refusal that no longer happens.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, COARSE, opener, random_batch

from harmcircuits.hooks.weights import weight_sites
from harmcircuits.search.attribution import wanda_scores

FILE = Path(__file__).parents[2] / "docs" / "architectures.md"
TABLE = re.compile(r"(?:^\|.*\n)+", flags=re.M)


def altered(how: str) -> Callable:
    """The weights of a Llama that was altered."""

    def make(open_: Callable) -> Any:
        bridge = open_("Llama")
        layer = bridge.blocks[1].mlp.out.original_component
        if how == "processed":
            bridge.enable_compatibility_mode(disable_warnings=True)
        elif how == "offloaded":
            layer.to("meta")
        else:  # GPTQ and AWQ keep integers in buffers and have no weight parameter at all.
            del layer.weight
            layer.register_buffer("qweight", torch.zeros(3, 40, dtype=torch.int32))
        return weight_sites(bridge)

    return make


def sites_of(name: str, **changes: Any) -> Callable:
    return lambda open_: weight_sites(open_(name, **changes))


# Words of the error, and of the table where those of the error are no sentence.
UNKNOWN_MATRIX = (
    "so scores and masks would silently leave it out",
    "a matrix of no known kind, which scores and masks would silently leave out",
)
QUANTISED = "quantised weights have no gradient and cannot be zeroed one by one"
# Case -> a function that meets it, words of the error, words of the table.
REFUSALS: dict[str, tuple[Callable, str, str]] = {
    "shared experts (Qwen2-MoE)": (sites_of("Qwen2Moe"), *UNKNOWN_MATRIX),
    "dense layers among sparse ones (Qwen3-MoE with `decoder_sparse_step=2`)": (
        sites_of("Qwen3Moe", decoder_sparse_step=2),
        *UNKNOWN_MATRIX,
    ),
    "routers of another name (GPT-OSS)": (sites_of("GptOss"), *UNKNOWN_MATRIX),
    "latent attention (DeepSeek-V3)": (sites_of("DeepseekV3"), *UNKNOWN_MATRIX),
    "state space models (Mamba)": (sites_of("Mamba"), *UNKNOWN_MATRIX),
    "quantised weights": (altered("quantised"), QUANTISED, QUANTISED),
    "processed weights": (
        altered("processed"),
        "so scores and masks would not fit the model as stored",
        "norms are folded into the weights, so a mask would not fit the model as stored",
    ),
    "weights that `device_map` keeps on disk": (
        altered("offloaded"),
        "so it can be neither scored nor masked",
        "a weight that is not in memory cannot be masked",
    ),
    "`wanda_scores` of mixtures of experts": (
        lambda open_: wanda_scores(open_("Mixtral"), [random_batch()]),
        "pass no hook points; score this model by removal_effect, snip_scores or magnitude_scores",
        "the inputs of stacked experts pass no hook points; use another score",
    ),
}


def page(open_: Callable) -> str:
    """The page's own words around its two tables, which are made anew."""
    before, between, after = TABLE.split(FILE.read_text(encoding="utf-8"))
    return before + matrices_table(open_) + between + refusals_table() + after


def matrices_table(open_: Callable) -> str:
    head = ["scored matrices", "export reloads equal in", "classes of transformers"]
    classes: dict[tuple[str, str], list[str]] = {}
    for name in ARCHITECTURES:
        bridge = open_(name)
        sites = [site for site in weight_sites(bridge).values() if site.layer == 0]
        parts: dict[str, list[str]] = {}
        for site in sites:
            owner, part = site.kind.split(".", 1)
            parts.setdefault(owner, []).append(part.removeprefix("experts."))
        matrices = f"`{' '.join(parts['attn'])}`, mlp `{' '.join(parts['mlp'])}`"
        exported = "float32, bfloat16" if name in COARSE else "float32"
        classes.setdefault((matrices, exported), []).append(type(bridge.original_model).__name__)
    rows = [[*line, ", ".join(names)] for line, names in classes.items()]
    return markdown_table(head, rows)


def refusals_table() -> str:
    cases: dict[str, list[str]] = {}
    for case, (_, _, reason) in REFUSALS.items():
        cases.setdefault(reason, []).append(case)
    rows = [["; ".join(names), reason] for reason, names in cases.items()]
    return markdown_table(["what", "why"], rows)


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = []
    for cells in (head, ["---"] * len(head), *body):
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def test_the_table_is_up_to_date(open_model):
    assert FILE.read_text(encoding="utf-8") == page(open_model), (
        "run PYTHONPATH=tests:analyses python tests/hooks/test_architectures.py"
    )


@pytest.mark.parametrize("case", REFUSALS)
def test_every_refusal_of_the_table_is_raised(open_model, case):
    make, words, _ = REFUSALS[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        make(open_model)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        open_ = opener(lambda name: Path(tempfile.mkdtemp(prefix=name, dir=folder)))
        FILE.write_text(page(open_), encoding="utf-8")
