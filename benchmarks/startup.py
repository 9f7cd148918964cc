"""How long after the start of the process do train.py and chat.py reach their first own line?

    python benchmarks/startup.py

Against a bare `import torch`, in turn; the difference is the median of the differences of the rounds. A script's first
own line is the first of its `main`, when all that it imports at its top is loaded.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STARTS = {"import torch": "import torch", "train.py": "import train", "chat.py": "import chat"}


def seconds_until_ready(code: str) -> float:
    """From before the process exists until it says that the code is done; its end is not counted."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code + "; print(flush=True)"], cwd=ROOT,
                          stdout=subprocess.PIPE) as process:
        if not process.stdout.readline():
            sys.exit(f"{code} failed")
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for code in STARTS.values():  # fills the file cache and writes the .pyc files
        seconds_until_ready(code)
    rounds = [[seconds_until_ready(code) for code in STARTS.values()] for _ in range(options.rounds)]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.rounds} rounds{'seconds':>12}{'more':>8}")
    for name, column in zip(STARTS, zip(*rounds, strict=True), strict=True):
        more = statistics.median(a - b[0] for a, b in zip(column, rounds, strict=True))
        print(f"{name:40}{statistics.median(column):8.2f}{more:8.2f}")


if __name__ == "__main__":
    main()
