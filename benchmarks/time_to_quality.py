"""How soon does a model of a text reach the loss that nanoGPT's CPU quick start ends with?

    python benchmarks/time_to_quality.py PATH_TO_NANOGPT shakespeare.txt
    python benchmarks/time_to_quality.py PATH_TO_NANOGPT poems.jsonl --records 20000 --bits_per_byte

Both sides run as whole processes on the same cores, start-up counted, in turn: nanoGPT's quick start, ours in a sixth
of its wall time, ours in all of it. The same text, its last tenth held out, one token a character; with
--bits_per_byte ours uses the tokenizer it would train anyway, and losses are compared in bits a byte.
"""

import argparse
import json
import math
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
import torch

ROOT = Path(__file__).resolve().parent.parent
QUICK_START = ("train.py config/train_shakespeare_char.py --device=cpu --compile=False --block_size=64 --batch_size=12 "
               "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()
OURS = ("--n_layer 2 --d_model 128 --d_ff 352 --context_length 128 --learning_rate 0.02 --eval_tokens 65536 "
        "--device cpu").split()  # as wide, and half as deep
# The 256 bytes and three special tokens: for ASCII text, characters. They are learnt soon, thousands of tokens late.
CHARACTERS = "--vocab_size 259 --n_head 4 --n_kv_head 4 --batch_size 16".split()
TOKENS = "--n_head 2 --n_kv_head 2 --batch_size 8 --embedding_lr 0.03".split()
START_UP_SECONDS = 6  # of ours, before train.py looks at the clock and after its last step


def seconds_of(command: list, folder: Path) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, done.stdout


def read_text(path: Path, records: int) -> str:
    """A text file whole, or the "text" of the first lines of JSON, a blank line between them."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join(json.loads(line)["text"] for line in text.splitlines()[:records])


def write_characters(text: str, folder: Path) -> float:
    """The three files nanoGPT trains from; returns the bytes of a character of what it is judged on."""
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = np.array([number[character] for character in text], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(folder / "train.bin")
    ids[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": number}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return len(text[cut:].encode()) / (len(text) - cut)


def theirs(peer: Path, data: Path, scratch: Path) -> tuple[float, float]:
    """Seconds, and the validation loss it says last, in nats a character."""
    wall, said = seconds_of([sys.executable, *QUICK_START, f"--dataset={data}", f"--out_dir={scratch}"], peer)
    return wall, float(re.findall(r"val loss ([\d.]+)", said)[-1])


def ours(text: Path, scratch: Path, seconds: float, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds, and the validation loss in nats a character or bits a byte. Nothing is prepared before."""
    flags = ["--data_path", text, "--out_dir", scratch, "--cache_dir", scratch / "cache", "--eval_interval", "1000000",
             "--max_minutes", (seconds - START_UP_SECONDS) / 60]
    kind = TOKENS if options.bits_per_byte else CHARACTERS
    wall, _ = seconds_of([sys.executable, ROOT / "train.py", *OURS, *kind, *map(str, flags)], ROOT)
    lines = (scratch / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    key = "val_bits_per_byte" if options.bits_per_byte else "val_loss"
    return wall, [line[key] for line in map(json.loads, lines) if key in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("text", type=Path, help="one text file, or .jsonl with a text a line")
    parser.add_argument("--records", type=int, help="lines of a .jsonl to take (default: all)")
    parser.add_argument("--bits_per_byte", action="store_true", help="ours with a tokenizer it trains (not characters)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        (scratch / "characters").mkdir()
        text = read_text(options.text, options.records)
        (scratch / "text.txt").write_text(text, encoding="utf-8")
        bytes_a_character = write_characters(text, scratch / "characters")
        bits = 1 / math.log(2) / bytes_a_character if options.bits_per_byte else 1.0
        for number in range(options.rounds):
            places = [scratch / f"{name}{number}" for name in ("peer", "sixth", "equal")]
            wall, nats = theirs(options.peer.resolve(), scratch / "characters", places[0])
            rows.append((wall, nats * bits, *ours(scratch / "text.txt", places[1], wall / 6, options),
                         *ours(scratch / "text.txt", places[2], wall, options)))
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{options.text.name}, {len(text):,} characters, median of {len(rows)} rounds, {torch.get_num_threads()} "
          f"threads of {os.cpu_count()} cores, torch {torch.__version__}\n")
    print(f"| | seconds | validation loss, {'bits a byte' if options.bits_per_byte else 'nats a character'} |")
    print("|---|---|---|")
    for name, wall, loss in zip(("nanoGPT's quick start", "ours in a sixth of that", "ours in as long"),
                                medians[::2], medians[1::2], strict=True):
        print(f"| {name} | {wall:.1f} | {loss:.3f} |")
    print(f"\nOurs in a sixth: {statistics.median(r[2] / r[0] for r in rows):.3f} of the time, loss lower by "
          f"{statistics.median(r[1] - r[3] for r in rows):.3f}; in as long: "
          f"{statistics.median(r[4] / r[0] for r in rows):.3f}, lower by "
          f"{statistics.median(r[1] - r[5] for r in rows):.3f}.")


if __name__ == "__main__":
    main()
