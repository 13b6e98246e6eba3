# %% [markdown]
# # The six findings of arXiv 2604.09544, and what a pruned model withstands
# `python analyses/six_findings.py` prints the results of the committed rows, as `docs/claims.md` quotes them.
#
# `python analyses/six_findings.py --out DIR` runs the analyses below, one after the other, each in a
# folder of its own. Other options go to all of them (`--seeds 1`, `--organisms LADDER`, `--small`,
# `--workers 2`); run again, it goes on where it stopped. Each is also a script and a notebook.

# %%
import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console
from support.claims import ClaimResult

ANALYSES = Path(__file__).parent
FINDINGS = {
    "F1": "compact",
    "F2": "general",
    "F3": "distinct",
    "F4": "compressed",
    "F5": "emergent_misalignment",
    "F6": "dissociated",
    "attacks": "attacks",
}


# %%
def result_of(analysis: str) -> ClaimResult:
    """The result of an analysis, from its committed rows."""
    module = import_module(analysis)  # which reads them
    return module.claim.result(module.rows)


def run(out: Path, options: list[str]) -> None:
    """Run the missing jobs of every finding; prints the table of their results."""
    lines = ["| | claim | training runs with the effect | with controls |", "|---|---|---|---|"]
    for name, analysis in FINDINGS.items():
        command = [sys.executable, str(ANALYSES / f"{analysis}.py"), "--out", str(out / name)]
        subprocess.run([*command, *options], check=True)
        lines.append((out / name / "summary.md").read_text(encoding="utf-8").strip())
    table = "\n".join(lines)
    (out / "summary.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def main() -> None:
    """Run the analyses, or print their committed results."""
    parser = argparse.ArgumentParser(description="Other options go to every analysis.")
    parser.add_argument("--out", type=Path, help="folder of all runs; without it nothing is run")
    options, other_options = parser.parse_known_args()
    if options.out:
        run(options.out, other_options)
        return
    for analysis in FINDINGS.values():
        Console().print(result_of(analysis))


if __name__ == "__main__":
    main()
