"""Does a run that is killed again and again end as one that never was?

    python benchmarks/crash.py --kills 50

Trains a small model once straight through, and once with SIGKILL at random moments, resumed each time. All the while
each checkpoint on disk is opened again and again, and must open; at the end the weights must be equal bit for bit, and
nothing may lie there that a run without kills would not leave. Exit code 1 if not.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Checkpoint  # noqa: E402 - found through the line above

FLAGS = ("--n_layer 2 --n_head 2 --n_kv_head 2 --d_model 64 --d_ff 128 --context_length 64 --batch_size 4 "
         "--vocab_size 400 --eval_interval 5 --eval_tokens 512 --epochs 40 --device cpu").split()


def write_chats(path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for n in range(400):
            messages = [{"role": "user", "content": f"{n} 加 {n * 3 % 50} 是多少？"},
                        {"role": "assistant", "content": f"{n + n * 3 % 50}。"}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, ROOT / "train.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def open_all(folder: Path) -> int:
    """Opens every checkpoint there is; how many there are."""
    paths = list(folder.glob("*.pt"))
    for path in paths:
        Checkpoint.load(path).build_model()
    return len(paths)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_chats(folder / "chats.jsonl")
        data = ["--data_path", folder / "chats.jsonl", "--cache_dir", folder / "cache"]
        assert start(*data, *FLAGS, "--out_dir", folder / "straight").wait() == 0
        out, kills, opened = folder / "killed", 0, 0
        bar = tqdm(total=options.kills, unit=" kills")
        while True:
            last = out / "last.pt"
            before = last.stat().st_mtime_ns if last.exists() else None
            process = start("--resume", "--out_dir", out) if before else start(*data, *FLAGS, "--out_dir", out)
            if kills < options.kills:
                while process.poll() is None and (last.stat().st_mtime_ns if last.exists() else None) == before:
                    opened += open_all(out)
                    time.sleep(0.01)  # each start gets at least one checkpoint further, or there would be no end
                end = time.monotonic() + moments.random() * 0.3
                while time.monotonic() < end:
                    opened += open_all(out)
                if process.poll() is None:
                    process.kill()
                    kills += 1
                    bar.update()
            process.wait()
            opened += open_all(out)
            if process.returncode == 0:
                break
        bar.close()
        straight, killed = (Checkpoint.load(folder / run / "last.pt").weights for run in ("straight", "killed"))
        equal = all(torch.equal(straight[key], killed[key]) for key in straight)
        litter = {path.name for path in out.iterdir()} ^ {path.name for path in (folder / "straight").iterdir()}
    print(f"{kills} kills, checkpoints opened {opened:,} times, none damaged; final weights "
          + ("equal bit for bit" if equal else "DIFFER") + (f"; litter: {litter}" if litter else ", no litter"))
    return 0 if equal and kills == options.kills and not litter else 1


if __name__ == "__main__":
    sys.exit(main())
