# %% [markdown]
# # The picture of the README
# `python analyses/readme_figure.py RUN PICTURE.png` draws the trade-off from the rows of a finished
# study.

# %%
from pathlib import Path
from typing import Annotated

import typer

from harmcircuits.measurements import Rows
from harmcircuits.studies.study_page import tradeoff_figure
from harmcircuits.studies.terms import Terms


# %%
def main(
    run: Annotated[Path, typer.Argument(help="Folder of a study.")],
    picture: Annotated[Path, typer.Argument(help="File to write: .png, .svg or .html.")],
) -> None:
    rows = Rows.read(run / "rows.jsonl")
    # The first is the operating point; the circuit that protects benign answers alone follows.
    chosen = rows.where("harm_valid_rate", mask="circuit", split="heldout", selection="search")[0]
    protected = str(chosen.labels["protected"]).split(", ")
    tradeoff_figure(rows, Terms.standard(protected)).save(picture)


if __name__ == "__main__":
    typer.run(main)
