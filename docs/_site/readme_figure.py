# %% [markdown]
# # The picture of the README
# `python docs/_site/readme_figure.py docs/figures/ends.png` draws what harmful answers become from the
# committed rows of the study on `sft`.

# %%
from pathlib import Path

import tyro
from answer_bars import answer_bars
from study_table import ROWS
from tyro.conf import Positional

from harmcircuits.measurements import Rows

KINDS = {
    "harmful": "harm_valid_rate",
    "refused": "harm_refusal_rate",
    "harmless": "harm_benign_rate",
    "broken": "harm_degenerate_rate",
}
BARS = {
    "as it is": {"mask": "none"},
    "random weights": {"mask": "random", "seed": 0},
    "opposite sign": {"mask": "opposite_sign"},
    "published method": {"selection": "published"},
    "one shot": {"selection": "one shot"},
    "the search": {"selection": "search", "at": "operating point"},
}


# %%
def main(picture: Positional[Path], rows: Path = ROWS) -> None:
    """Draw the bars.

    Args:
        picture: file to write: .png, .svg or .pdf.
        rows: the rows.jsonl of a study.
    """
    held_out = Rows.read(rows).where(split="heldout")
    bars = {}
    for title, labels in BARS.items():
        bars[title] = {k: held_out.one(metric, **labels).mean for k, metric in KINDS.items()}
    n = held_out.one("harm_valid_rate", mask="none").n
    answer_bars(bars, f"of {n} held-out answers to harmful requests").save(picture)


if __name__ == "__main__":
    tyro.cli(main)
