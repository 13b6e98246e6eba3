# %% [markdown]
# # The six findings of arXiv 2604.09544, and what a pruned model withstands
# `python analyses/six_findings.py --out DIR` runs every analysis below: three seeds, held-out
# requests, each with its controls and an outcome by the rule at its top. Jobs run side by side; run
# again, the command goes on where it stopped. Each analysis is also a command of its own.

# %%
import attacks
import compact
import compressed
import dissociated
import distinct
import emergent_misalignment
import general
import typer

from harmcircuits.studies.claims import command

ANALYSES = (compact, general, distinct, compressed, emergent_misalignment, dissociated, attacks)

if __name__ == "__main__":
    typer.run(command(*ANALYSES))
