# %% [markdown]
# # The picture of the README
# `python docs/_site/readme_figure.py docs/figures/tradeoff.png` draws the trade-off from the committed
# rows of the study on `sft`.

# %%
from pathlib import Path
from typing import Annotated

import typer
from study_table import ROWS, terms_of

from harmcircuits.measurements import Rows
from harmcircuits.studies.study_page import tradeoff_figure


# %%
def main(
    picture: Annotated[Path, typer.Argument(help="File to write: .png, .svg or .pdf.")],
    rows_of_study: Annotated[
        Path, typer.Option("--rows", help="The rows.jsonl of a study.")
    ] = ROWS,
) -> None:
    rows = Rows.read(rows_of_study)
    tradeoff_figure(rows, terms_of(rows)).save(picture)


if __name__ == "__main__":
    typer.run(main)
