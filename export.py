"""Export a checkpoint to other programs' formats, each one proven against it before it is put in place.

    python export.py --model_path checkpoints/best_model.pt --output_dir exported_models --format all

    format        lands in       what it is
    huggingface   huggingface/   model.safetensors, config.json, tokenizer.json: GPT.from_pretrained(folder)
    transformers  transformers/  stock Qwen3ForCausalLM or LlamaForCausalLM, tokenizer, chat template, generation config
    torchscript   model.pt       torch.jit.script, for places without Python; model(input_ids, None) -> (logits, None)
    onnx          model.onnx     opset 20, dynamic batch and length; "input_ids" -> "logits"
    web           web/           transformers.js, in a browser or Node.js: an ONNX graph that keeps keys and values
    gguf          model.gguf     llama.cpp and the programs built on it; tokenizer and chat template inside

config.json and tokenizer.json ride along inside model.pt and model.onnx. A fresh interpreter opens each result the way
a user would and compares logits, greedy tokens and token ids. Unless all agree nothing is replaced and it exits with 1.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

import numpy as np
import torch

from formats import FORMATS, Format, Source, first_line, writing
from model import Checkpoint, InputError
from tokenizer import Tokenizer, render_chat

# ----------------------------------------------------------------------------------------------------- proving

# Differences up to this share of the largest logit are the rounding of float32 in another order of summation.
TOLERANCE = 2e-5
GREEDY_TOKENS = 64
PROOF_FLOATS = 2**23  # logits kept of one prompt; of more, evenly spaced positions are compared
CHINESE = "你好，请问你叫什么名字？我想知道今天的天气怎么样，北京在中国的北方，春天来了，花都开了。"
ENGLISH = "Hello! Could you tell me what the capital of France is? The quick brown fox jumps over the lazy dog. "

# Runs alone: python -I, in a folder that holds nothing but exported_models/ and what is expected of it.
PROBE = """
import json, os, sys, threading, time
start = time.perf_counter()

def end_with_the_export():
    os.read(0, 1)
    os._exit(1)

threading.Thread(target=end_with_the_export, daemon=True).start()
sys.path += {path!r}
{snippet}
import numpy as np
import torch

expected = json.load(open("expected.json", encoding="utf-8"))
problems = []
texts = texts_equal = 0

def compare_ids(found, wanted):
    global texts, texts_equal
    texts += len(wanted)
    texts_equal += sum(a == b for a, b in zip(found, wanted))

def compare_chat(*signs):
    if any(bool(sign) != expected["config"]["chat"] for sign in signs):
        problems.append("chats, but no chat template, or the other way round")

def decode_greedily(prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(compute_logits(np.array([ids]))[0, -1].argmax()))
    return ids[len(prompt):]

{probe}
if config_text is not None and json.loads(config_text) != expected["config"]:
    problems.append("config.json is not the checkpoint's")
if tokenizer_text is not None:
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_text)
    tokenizer.encode_special_tokens = True
    compare_ids([encoding.ids for encoding in tokenizer.encode_batch(expected["texts"])], expected["ids"])
difference = 0.0
with np.load("expected.npz") as arrays:
    for name in arrays.files:
        if name.startswith("ids"):
            logits = compute_logits(arrays[name])
            wanted, step = arrays["logits" + name[3:]], int(arrays["step" + name[3:]])
            if logits.shape != arrays[name].shape + wanted.shape[2:]:
                problems.append(f"logits of the shape {{logits.shape}} for ids of the shape {{arrays[name].shape}}")
                break
            gap = np.abs(logits[:, ::-step] - wanted).max()
            difference = max(difference, float(gap)) if np.isfinite(gap) else float("inf")
greedy = decode_greedily(expected["greedy_prompt"], expected["greedy_count"])
print(json.dumps(dict(difference=difference, greedy=greedy, texts=texts, texts_equal=texts_equal, problems=problems,
                      seconds=time.perf_counter() - start)))
"""


def fuzz_texts(count: int) -> List[str]:
    """Strings that tell tokenizers apart: scripts, joined emoji, combining marks, controls, line ends, blanks."""
    rng = random.Random(0)
    pieces = [
        "你好", "，请问", "。\n", "春天", "龍", "𠮷", "ひらがな", "한국어", "Hello", " world", "'s", "'LL", "don't",
        "naïve", "e\u0301", "ü", "Ａ", "ß", "ſ", "İ", "ǅ", "\u2126", "שלום", "مرحبا", "हिन्दी", "ไทย", "0", "12",
        "3456789", "٣", "½", "Ⅷ", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308",
        "\U0001f44d\U0001f3fd", "\U0001f1e8\U0001f1f3", "\u200d", "\ufe0f", " ", "  ", "     ", "\t", "\n", "\r\n",
        "\r", "\n\n\n", "\u00a0", "\u3000", "\u2028", "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\ufeff", "\ufffd",
        "...", "!?", "——", "“", "//", "_", "\\n", "{}", "#include <a.h>", "<|im_end|>", "<|im_start|>user",
        "<|endoftext|>", "<|", "|>",
    ]

    def piece() -> str:
        if rng.random() < 0.8:
            return rng.choice(pieces)
        return chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))

    texts = ["", *pieces, CHINESE, ENGLISH]
    return texts + ["".join(piece() for _ in range(rng.randrange(1, 16))) for _ in range(count - len(texts))]


def vocabulary_texts(tokenizer: Tokenizer, count: int) -> List[str]:
    """Tokens that are text by themselves, evenly over the ranks: a merge that is lost or moved shows in its token."""
    step = math.ceil(len(tokenizer.ranks) / count)
    texts = (token.decode("utf-8", "replace") for token in list(tokenizer.ranks)[::step])
    return [text for text in texts if "\ufffd" not in text]


CONVERSATIONS = [
    [{"role": "user", "content": "你好，请问你是谁？"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "  2 + 2?\n"},
     {"role": "assistant", "content": "4"}, {"role": "user", "content": "谢谢 👍🏽"}],
    [{"role": "user", "content": "line one\r\nline two\n\n\tindented"}, {"role": "assistant", "content": "好的。\n"}],
    [{"role": "user", "content": "weather?"}, {"role": "tool", "content": '{"sky": "clear"}'},
     {"role": "assistant", "content": "It is clear."}],
]


@dataclass
class Expectation:
    """What the probes are held to; `margins` are those between the two best logits at each greedy step."""

    tolerance: float
    greedy: List[int]
    margins: List[float]


@torch.inference_mode()
def write_expectation(source: Source, folder: Path) -> Expectation:
    """Writes expected.npz (prompts, logits) and expected.json (token ids, greedy tokens) into the folder."""
    model, tokenizer, context = source.model, source.tokenizer, source.config.context_length
    rng = np.random.default_rng(0)
    arrays: Dict[str, np.ndarray] = {}
    largest = 0.0
    for length in sorted({1, 2, source.seq_len, context}):
        kinds = [np.resize(tokenizer.encode(CHINESE), length), np.resize(tokenizer.encode(ENGLISH), length),
                 rng.integers(0, source.config.vocab_size, length)]
        for ids in [kind[None] for kind in kinds] + [np.stack(kinds)]:
            number = len(arrays) // 3
            logits = model(torch.from_numpy(ids))[0].numpy()
            step = math.ceil(logits.size / PROOF_FLOATS)
            largest = max(largest, float(np.abs(logits).max()))
            arrays |= {f"ids{number}": ids, f"logits{number}": logits[:, ::-step], f"step{number}": np.array(step)}
    prompt = tokenizer.encode(CHINESE)[:max(1, context // 4)]
    greedy, margins, cache = [], [], model.new_cache()
    ids = prompt
    for _ in range(min(GREEDY_TOKENS, context - len(prompt))):
        best = model(torch.tensor([ids]), None, cache)[0][0, -1].topk(2)
        ids = [int(best.indices[0])]
        greedy += ids
        margins.append(float(best.values[0] - best.values[1]))
    texts = fuzz_texts(400) + vocabulary_texts(tokenizer, 4096)
    document = {
        "config": json.loads(source.config_text), "greedy_prompt": prompt, "greedy_count": len(greedy),
        "texts": texts, "ids": tokenizer.encode_batch(texts),
        "chats": [[messages, prompted, render_chat(tokenizer, messages, prompted)[0]]
                  for messages in CONVERSATIONS for prompted in (False, True) if source.is_chat],
    }
    with writing(folder):
        np.savez(folder / "expected.npz", **arrays)
        folder.joinpath("expected.json").write_text(json.dumps(document), encoding="utf-8")
    return Expectation(TOLERANCE * max(1.0, largest), greedy, margins)


def start_probe(format: Format, folder: Path) -> subprocess.Popen:
    """Runs the format's probe in a fresh interpreter, in the folder that write_expectation wrote to.

    It ends when its standard input does: with this process, however that ends.
    """
    path = [str(Path(__file__).resolve().parent)] if format.uses_project else []
    code = PROBE.format(path=path, snippet=format.snippet, probe=format.probe)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(folder / f"{format.name}.out", "wb") as out, open(folder / f"{format.name}.err", "wb") as err:
        return subprocess.Popen([sys.executable, "-I", "-X", "utf8", "-c", code], cwd=folder, env=environment,
                                stdin=subprocess.PIPE, stdout=out, stderr=err)


def judge(format: Format, probe: subprocess.Popen, folder: Path, expectation: Expectation) -> dict:
    """Waits for the probe; the row of the report, with `problems` empty if all agrees."""
    status = probe.wait()
    row = {"format": format.name, "largest_logit_difference": None, "tolerance": expectation.tolerance,
           "greedy_equal": 0, "greedy_count": len(expectation.greedy), "texts_equal": 0, "texts": 0, "seconds": 0.0}
    out, err = (folder.joinpath(f"{format.name}.{end}").read_text("utf-8", "replace") for end in ("out", "err"))
    if status:
        last = (err.strip().splitlines() or [f"its interpreter ended with {status}"])[-1]
        return {**row, "problems": [f"the snippet or the comparison does not run: {last:.300}"]}
    found = json.loads(out.splitlines()[-1])
    problems = list(found["problems"])
    if not found["difference"] <= expectation.tolerance:
        problems.append(f"logits differ by {found['difference']:.2g}, more than {expectation.tolerance:.2g}")
    same = next((i for i, (a, b) in enumerate(zip(found["greedy"], expectation.greedy, strict=True)) if a != b),
                len(expectation.greedy))
    # Two logits nearer than the tolerance may change places by rounding, as they do on untrained weights; what follows
    # such a tie is another text and proves nothing.
    if same < len(expectation.greedy) and expectation.margins[same] > 2 * expectation.tolerance:
        problems.append(f"greedy decoding parts at token {same + 1}")
    if found["texts_equal"] != found["texts"]:
        problems.append(f"{found['texts'] - found['texts_equal']} of {found['texts']} texts get other token ids")
    return {**row, "largest_logit_difference": found["difference"], "greedy_equal": same, "texts": found["texts"],
            "texts_equal": found["texts_equal"], "seconds": found["seconds"], "problems": problems}


def table(rows: List[dict]) -> str:
    lines = ["{:14}{:>26}{:>14}{:>14}{:>9}{:>11}".format("format", "largest logit difference", "greedy equal",
                                                         "texts equal", "seconds", "size")]
    for row in rows:
        difference = row["largest_logit_difference"]
        shown = "-" if difference is None else f"{difference:.1e}"
        greedy, texts = (f"{row[what + '_equal']}/{row[count]}" for what, count in (("greedy", "greedy_count"),
                                                                                   ("texts", "texts")))
        lines.append(f"{row['format']:14}{shown:>26}{greedy:>14}{texts:>14}{row['seconds']:>9.1f}"
                     f"{row['bytes'] / 1e6:>8.1f} MB" + ("  FAILED" if row["problems"] else ""))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- putting into place


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def lock(file) -> None:
    """Takes the file for this process alone until it ends; OSError if another one has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Staging:
    """A hidden folder in output_dir where an export is made and proven, and from which it replaces the previous one.

    The lock tells a living export from the rests of a dead one, which are undone and cleared here.
    """

    def __init__(self, output_dir: Path):
        self.output_dir, self.folder = output_dir, output_dir / ".exporting"
        self.made, self.previous = self.folder / "exported_models", self.folder / "previous"
        self.journal = self.folder / "moving.json"

    def __enter__(self) -> "Staging":
        self.new_folders = [path for path in (self.output_dir, *self.output_dir.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")
            try:
                lock(self.lock)
            except OSError:
                self.lock.close()
                raise InputError(f"{self.output_dir}: another export is writing there") from None
            if self.journal.exists():
                self.undo()
            for path in self.folder.iterdir():
                if path.name != "lock":
                    remove(path)
            self.made.mkdir()
            self.previous.mkdir()
        except OSError as error:
            raise InputError(f"cannot write to {self.output_dir}: {error.strerror}") from error
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self.new_folders:  # innermost first; what holds a result stays
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def put_in_place(self, targets: List[str]) -> None:
        """Replaces all targets, or none: an error or a kill between two renames is undone, at once or at next start."""
        old = [name for name in targets if os.path.lexists(self.output_dir / name)]
        new = [name for name in targets if (self.made / name).exists()]
        try:
            aside = self.journal.with_suffix(".tmp")
            aside.write_text(json.dumps({"old": old, "new": new}), encoding="utf-8")
            os.replace(aside, self.journal)
            for name in old:
                os.replace(self.output_dir / name, self.previous / name)
            for name in new:
                os.replace(self.made / name, self.output_dir / name)
            self.journal.unlink()
        except BaseException as error:
            if self.journal.exists():
                self.undo()
            if isinstance(error, OSError):
                raise InputError(f"cannot replace the results in {self.output_dir}: {error.strerror}") from error
            raise

    def undo(self) -> None:
        moving = json.loads(self.journal.read_text(encoding="utf-8"))
        for name in moving["new"]:
            if not (self.made / name).exists():
                remove(self.output_dir / name)
        for name in moving["old"]:
            if os.path.lexists(self.previous / name):
                os.replace(self.previous / name, self.output_dir / name)
        self.journal.unlink()


# -------------------------------------------------------------------------------------------------- the driver


def open_source(model_path: str, seq_len: Optional[int]) -> Source:
    checkpoint = Checkpoint.load(model_path)
    config, tokenizer = checkpoint.config, Tokenizer.from_dict(checkpoint.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{model_path}: its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}")
    if config.context_length < 16:
        raise InputError(f"{model_path}: a context of {config.context_length} is too short, an export needs 16 tokens")
    seq_len = min(128, config.context_length) if seq_len is None else seq_len
    if not 1 <= seq_len <= config.context_length:
        raise InputError(f"--seq_len must be from 1 to the model's context of {config.context_length}, not {seq_len}")
    model = checkpoint.build_model().float().requires_grad_(False)
    return Source(checkpoint, model, tokenizer, seq_len)


def choose_formats(name: str, source: Source) -> List[Format]:
    """The formats that `name` stands for; `all` leaves out, with a word, those that cannot be had here."""
    chosen = []
    for format in FORMATS.values() if name == "all" else [FORMATS[name]]:
        missing = [package for package in format.packages if importlib.util.find_spec(package) is None]
        reason = f"needs {', '.join(missing)}: pip install {' '.join(missing)}" if missing else format.refuses(source)
        if not reason:
            chosen.append(format)
        elif name != "all":
            raise InputError(f"{format.name} {reason}")
        else:
            print(f"left out: {format.name} {reason}", file=sys.stderr)
    if not chosen:
        raise InputError("nothing to export: no format can be had here")
    return chosen


def export(source: Source, formats: List[Format], output_dir: Path) -> List[dict]:
    """Writes and proves the formats, and puts them into place if all pass. Returns the rows of export_report.json."""
    weights = sum(tensor.nbytes for tensor in source.model.state_dict().values())
    with Staging(output_dir) as staging:
        needed, free = len(formats) * weights * 1.1 + 2**26, shutil.disk_usage(output_dir).free
        if free < needed:
            raise InputError(f"{output_dir}: {free / 1e6:.0f} MB are free, the export needs {needed / 1e6:.0f} MB")
        expectation = write_expectation(source, staging.folder)
        rows: List[dict] = []
        running = None
        try:
            for format in [*formats, None]:  # one format is proven while the next is written
                if format:
                    print(f"{format.name}: writing", file=sys.stderr, flush=True)
                    start = time.perf_counter()
                    format.write(source, staging.made / format.target)
                    seconds = time.perf_counter() - start
                if running:
                    previous, probe, seconds_written = running
                    row = judge(previous, probe, staging.folder, expectation)
                    parts = (staging.made / name for name in previous.targets)
                    rows.append({**row, "seconds": round(seconds_written + row["seconds"], 2),
                                 "bytes": sum(size_of(part) for part in parts)})
                    print(f"{previous.name}: {'FAILED' if row['problems'] else 'proven'}", file=sys.stderr, flush=True)
                running = (format, start_probe(format, staging.folder), seconds) if format else None
        finally:
            if running:
                running[1].kill()
                running[1].wait()
        passed = not any(row["problems"] for row in rows)
        report = {"torch": torch.__version__, "passed": passed, "formats": rows}
        report_path = staging.made / "export_report.json"
        with writing(report_path):
            report_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        results = [name for format in formats for name in format.targets] if passed else []
        staging.put_in_place([*results, report_path.name])  # together, so that the report tells of what is there
    return rows


def push(folder: Path, name: str) -> str:
    """Uploads a folder to the Hugging Face Hub repository `name`, made if it is not there; returns its address."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise InputError("--push_to_hub needs huggingface_hub: pip install huggingface_hub") from None
    try:
        api = HfApi()
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder)
    except Exception as error:  # whatever the network, the name or the login makes it raise
        raise InputError(f"--push_to_hub {name}: {first_line(error)} "
                         "(`hf auth login` logs in; the export itself is in place)") from error
    return str(repository)


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_path", default="checkpoints/best_model.pt", help="the checkpoint (default: %(default)s)")
    add("--output_dir", default="exported_models", help="where the results go (default: %(default)s)")
    add("--format", default="all", choices=[*FORMATS, "all"], help="what to write (default: %(default)s)")
    add("--seq_len", type=int, help="length of the example sequence (default: 128, or the context if that is shorter)")
    add("--push_to_hub", metavar="NAME", help="afterwards upload the first folder exported to this repository of the "
        "Hugging Face Hub; nothing else here uses the network")
    add("--traceback", action="store_true", help="show where an error came from")
    options = parser.parse_args(arguments)
    try:
        source, output_dir = open_source(options.model_path, options.seq_len), Path(options.output_dir)
        formats = choose_formats(options.format, source)
        folders = [output_dir / format.target for format in formats if format.is_folder]
        if options.push_to_hub and not folders:
            raise InputError(f"--push_to_hub uploads a folder, and --format {options.format} writes a file")
        rows = export(source, formats, output_dir)
        print(table(rows))
        for row in rows:
            for problem in row["problems"]:
                print(f"export.py: {row['format']}: {problem}", file=sys.stderr)
        if any(row["problems"] for row in rows):
            print(f"export.py: nothing in {output_dir} was replaced", file=sys.stderr)
            return 1
        if options.push_to_hub:
            print(push(folders[0], options.push_to_hub))
    except InputError as error:
        if options.traceback:
            traceback.print_exc()
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves by way of the clearing up, as Ctrl-C does
    sys.exit(main())
