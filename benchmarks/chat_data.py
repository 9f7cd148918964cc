"""How many conversations a second does fine-tuning take in, against minimind's own loop at equal model shape?

    python benchmarks/chat_data.py PATH_TO_MINIMIND CHATS.json

Both sides run as whole processes on the same cores, in turn, on the same conversations, with as many slots a step:
minimind pads each conversation to --max_seq_len, ours lays as many into a row as fit. Timed from the second step to the
end of the time, data loading and optimizer included; a ratio is the median of the ratios of the rounds. What is useful
is counted in tokens of one tokenizer, ours: all of a conversation, and of that the assistant's. The peer needs
`pip install datasets`.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Prepared, prepare  # noqa: E402 - found through the line above
from readers import ReadReport, read_records  # noqa: E402 - found through the line above

VOCABULARY, HEADS, KV_HEADS = 6400, 8, 4  # minimind's, which no flag of it changes


def write_chats(source: Path, target: Path) -> None:
    """The conversations in minimind's form; our reader opens it too."""
    empty = {"reasoning_content": "", "tools": "", "tool_calls": ""}
    with open(target, "w", encoding="utf-8") as file:
        for record in read_records(source, ReadReport()):
            turns = [{**message, **empty} for message in record.messages]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def dtype(options: argparse.Namespace) -> str:
    return "float32" if options.device == "cpu" else "bfloat16"


def theirs(peer: Path, chats: Path, scratch: Path, options: argparse.Namespace) -> float:
    """Conversations a second. The loop logs each step; it is stopped when its time is over."""
    scratch.mkdir()
    (scratch / "model").symlink_to(peer / "model")  # where it looks for its tokenizer, seen from its folder
    (scratch / "trainer").mkdir()
    command = [sys.executable, "-u", peer / "trainer" / "train_full_sft.py", "--data_path", chats, "--save_dir",
               scratch / "out", "--from_weight", "none", "--log_interval", "1", "--num_workers", "1", "--dtype",
               dtype(options), "--device", options.device, "--hidden_size", str(options.width), "--num_hidden_layers",
               str(options.layers), "--max_seq_len", str(options.max_seq_len), "--batch_size", str(options.batch_size)]
    settings = {**os.environ, "HF_DATASETS_CACHE": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    marks: list[float] = []
    with (open(scratch / "errors", "w+", encoding="utf-8") as errors,
          subprocess.Popen(command, cwd=scratch / "trainer", env=settings, stdout=subprocess.PIPE, stderr=errors,
                           text=True, encoding="utf-8") as process):
        for line in process.stdout:
            if line.startswith("Epoch:["):
                marks.append(time.perf_counter())
            if len(marks) > 2 and marks[-1] - marks[0] > options.seconds:
                break
        process.terminate()
        errors.seek(0)
        if len(marks) < 3:
            sys.exit(f"minimind did not train:\n{errors.read()[-2000:]}")
    return (len(marks) - 1) * options.batch_size / (marks[-1] - marks[0])


def ours(chats: Path, scratch: Path, cache: Path, options: argparse.Namespace) -> float:
    """Rows a second, by the clock of metrics.jsonl."""
    command = [sys.executable, ROOT / "train.py", "--data_path", chats, "--out_dir", scratch, "--cache_dir", cache,
               "--vocab_size", VOCABULARY, "--n_layer", options.layers, "--n_head", HEADS, "--n_kv_head", KV_HEADS,
               "--d_model", options.width, "--d_ff", math.ceil(options.width * math.pi / 64) * 64, "--context_length",
               options.max_seq_len, "--batch_size", options.batch_size, "--device", options.device,
               "--dtype", dtype(options), "--eval_tokens", "1", "--eval_interval", "1000000",
               "--max_minutes", (options.seconds + 10) / 60]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"train.py failed:\n{done.stderr[-2000:]}")
    lines = (scratch / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [line["seconds"] for line in map(json.loads, lines) if "train_loss" in line]
    return (len(seconds) - 1) * options.batch_size / (seconds[-1] - seconds[0])


def packing(prepared: Prepared, context: int) -> tuple[float, float]:
    """Conversations in a row of ours, and the share of its slots that hold something."""
    packed = prepared.split("train", context)
    rows = packed.rows(0)
    filled = conversations = 0
    for row in range(rows):
        documents = packed.batch(0, [row]).documents
        filled += context if documents is None else int((documents >= 0).sum())
        conversations += 1 if documents is None else int(documents.max()) + 1
    return conversations / rows, filled / (rows * context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="a checkout of minimind")
    parser.add_argument("chats", type=Path, help="conversations in any form that train.py reads")
    parser.add_argument("--max_seq_len", type=int, default=768, help="slots a row (default: minimind's 768)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows a step (default: minimind's 16)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=30, help="of training a side and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        chats = scratch / "chats.jsonl"
        write_chats(options.chats, chats)
        prepared = prepare(chats, None, VOCABULARY, scratch / "cache")
        a_row, filled = packing(prepared, options.max_seq_len)
        for number in range(options.rounds):
            a = theirs(options.peer.resolve(), chats, scratch / f"theirs{number}", options)
            found.append((a, ours(chats, scratch / f"ours{number}", scratch / "cache", options) * a_row))
        count = len(prepared.kinds)
        tokens, learnt = len(prepared.tokens) / count, int(prepared.supervised.sum()) / count
    print(f"{options.chats.name}, {count:,} conversations of {tokens:.0f} tokens, {learnt:.0f} of them the assistant's;"
          f" {options.layers} x {options.width}, steps of {options.batch_size} x {options.max_seq_len}, "
          f"{options.rounds} rounds of {options.seconds:.0f} s, {options.device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}\n")
    print("| | slots in use | conversations/s | useful tokens/s | the assistant's/s | ours is |\n" + "|---" * 6 + "|")
    in_use = min(tokens, options.max_seq_len) / options.max_seq_len, filled
    for i, side in enumerate(("minimind", "ours")):
        speed = statistics.median(pair[i] for pair in found)
        ratio = statistics.median(pair[1] / pair[i] for pair in found)
        print(f"| {side} | {in_use[i]:.0%} | {speed:.1f} | {speed * tokens:,.0f} | {speed * learnt:,.0f} "
              f"| {ratio:.2f} x |")


if __name__ == "__main__":
    main()
