# %% [markdown]
# # The picture of the README
# `python docs/_site/readme_figure.py docs/figures/tradeoff.png` draws the trade-off from the committed
# rows of the study on `sft`.

# %%
from pathlib import Path

import tyro
from study_table import ROWS, terms_of
from tyro.conf import Positional

from harmcircuits.measurements import Rows
from harmcircuits.studies.study_page import tradeoff_figure


# %%
def main(picture: Positional[Path], rows: Path = ROWS) -> None:
    """Draw the trade-off.

    Args:
        picture: file to write: .png, .svg or .pdf.
        rows: the rows.jsonl of a study.
    """
    of_study = Rows.read(rows)
    tradeoff_figure(of_study, terms_of(of_study)).save(picture)


if __name__ == "__main__":
    tyro.cli(main)
