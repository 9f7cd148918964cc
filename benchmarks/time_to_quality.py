"""How soon does a character model of tiny shakespeare reach the loss nanoGPT's CPU quick start ends with?

    python benchmarks/time_to_quality.py PATH_TO_NANOGPT shakespeare.txt

Both sides run as whole processes on the same cores, start-up counted, in turn: nanoGPT's quick start, ours in a sixth
of its wall time, ours in all of it. The same text, its last tenth held out, one token a character.
"""

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
QUICK_START = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --block_size=64 --batch_size=12 "
               "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()
# 259 tokens are the 256 bytes and three special ones: for this text, characters.
OURS = ("--vocab_size 259 --n_layer 4 --n_head 4 --n_kv_head 4 --d_model 128 --d_ff 352 --context_length 128 "
        "--batch_size 16 --eval_tokens 200000 --device cpu").split()
START_UP_SECONDS = 4  # of ours, before train.py looks at the clock and after its last step


def seconds_of(command: list, folder: Path) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, done.stdout


def write_characters(text: str, folder: Path) -> None:
    """The three files nanoGPT trains from."""
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = np.array([number[character] for character in text], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": number}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def theirs(peer: Path, data: Path, scratch: Path) -> tuple[float, float]:
    wall, said = seconds_of([sys.executable, *QUICK_START, f"--dataset={data}", f"--out_dir={scratch}"], peer)
    return wall, float(re.findall(r"val loss ([\d.]+)", said)[-1])


def ours(text: Path, scratch: Path, seconds: float) -> tuple[float, float]:
    flags = ["--data_path", text, "--out_dir", scratch, "--cache_dir", scratch / "cache", "--eval_interval", "1000000",
             "--max_minutes", (seconds - START_UP_SECONDS) / 60]
    wall, _ = seconds_of([sys.executable, ROOT / "train.py", *OURS, *map(str, flags)], ROOT)
    lines = (scratch / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return wall, [line["val_loss"] for line in map(json.loads, lines) if "val_loss" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("text", type=Path, help="tiny shakespeare, one text file")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        (scratch / "characters").mkdir()
        write_characters(options.text.read_text(encoding="utf-8"), scratch / "characters")
        for number in range(options.rounds):
            places = [scratch / f"{name}{number}" for name in ("peer", "sixth", "equal")]
            wall, loss = theirs(options.peer.resolve(), scratch / "characters", places[0])
            rows.append((wall, loss, *ours(options.text.resolve(), places[1], wall / 6),
                         *ours(options.text.resolve(), places[2], wall)))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"median of {len(rows)} rounds, {os.cpu_count()} cores     seconds   validation loss (nats a character)")
    for name, (wall, loss) in zip(("nanoGPT's quick start", "ours in a sixth of that", "ours in as long"),
                                  zip(medians[::2], medians[1::2], strict=True), strict=True):
        print(f"{name:36}{wall:10.1f}{loss:12.3f}")
    print(f"time ratio {statistics.median(r[2] / r[0] for r in rows):.3f}, "
          f"loss at equal time lower by {statistics.median(r[1] - r[5] for r in rows):.3f}")


if __name__ == "__main__":
    main()
