"""How long a session waits: `python .ci/startup.py` times imports and --help beside `import torch`.

Each command runs in a process of its own, in turns; figures are medians. Exits 1 where the package
takes more than 1.5 times, or --help more than twice, what torch alone does.
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": "import torch",
    "import harmcircuits": "import harmcircuits",
    "harmcircuits study --help": "import sys; sys.argv = ['harmcircuits', 'study', '--help']; "
    "from harmcircuits.cli import main; main()",
}
MOST = {"import harmcircuits": 1.5, "harmcircuits study --help": 2.0}
TURNS = 7


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    for code in COMMANDS.values():
        seconds(code)  # files are read from disk once before anything counts
    taken = {name: [] for name in COMMANDS}
    for _ in range(TURNS):
        for name, code in COMMANDS.items():
            taken[name].append(seconds(code))

    medians = {name: statistics.median(values) for name, values in taken.items()}
    torch_alone = medians["import torch"]
    too_slow = False
    for name, median in medians.items():
        ratio = median / torch_alone
        allowed = f", at most {MOST[name]}" if name in MOST else ""
        print(f"{name:22} {median:.2f} s  {ratio:.2f} x{allowed}")
        too_slow |= ratio > MOST.get(name, ratio)
    sys.exit(too_slow)


if __name__ == "__main__":
    main()
