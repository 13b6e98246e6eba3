# %% [markdown]
# # The six findings of arXiv 2604.09544, and what a pruned model withstands
# `python analyses/six_findings.py --out DIR` runs the analyses below, one after the other, each in a
# folder of its own, and prints what came out. Other options go to all of them (`--seeds 1`,
# `--organisms LADDER`, `--small`, `--workers`); run again, it goes on where it stopped. Each is also
# a script and a notebook of its own.

# %%
import argparse
import subprocess
import sys
from pathlib import Path

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
def main() -> None:
    parser = argparse.ArgumentParser(description="Run every finding; other options go to each.")
    parser.add_argument("--out", type=Path, default=Path("runs/findings"), help="folder of all")
    options, passed_on = parser.parse_known_args()
    lines = ["| | claim | outcome |", "|---|---|---|"]
    for name, analysis in FINDINGS.items():
        folder = options.out / name
        command = [sys.executable, str(ANALYSES / f"{analysis}.py"), "--out", str(folder)]
        subprocess.run([*command, *passed_on], check=True)
        lines.append((folder / "summary.md").read_text(encoding="utf-8").strip())
    table = "\n".join(lines)
    (options.out / "summary.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
