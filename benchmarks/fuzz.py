"""Can any file make the readers or the openers crash, hang, lose good records or take too much memory?

    python benchmarks/fuzz.py --cases 10000                          # some minutes; exit code 1 if anything fails
    python benchmarks/fuzz.py --only checkpoint --case 17 --seed 0   # one case again, with its traceback

Each case is a file made from (seed, kind, number). It must be read, or refused by an InputError of one line; records of
it that are whole must all be kept; `prepare` must come to the verdict of the readers. Cases run one after the other in
a process of their own, so that one that crashes it or outlasts its limit is a failure like any other.
"""

import argparse
import copy
import csv
import gc
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, List, Optional

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import chat  # noqa: E402 - found through the line above
import train  # noqa: E402
from data import prepare  # noqa: E402
from model import Checkpoint, InputError  # noqa: E402
from readers import ReadReport, Record, read_records  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

LIMIT = 60  # seconds a case may take, far above what any needs, for a machine that has other work too
LIMIT_LARGE = 600
MEMORY = 200  # MB a case may add; a large one also 20 bytes for each of its longest record
LINE_MB, RECORDS = 50, 1_000_000  # sizes of the kinds "one long line" and "tiny records"


@dataclass
class Case:
    """A file to be read or opened; the whole records in it, each to be found; bytes of its longest record."""

    path: Path
    good: Counter = field(default_factory=Counter)
    longest: int = 0


@dataclass
class Outcome:
    refused: bool
    kept: int
    seconds: float
    megabytes: float
    failure: str = ""


# ---------------------------------------------------------------------------------------------------- raw material

WORDS = ["春天", "来了", "好", "hello", "world", "naïve", "😀", "1984", "，", "\n", "\t", "<|im_end|>", "'s", "\\", '"']
ODD: List[Any] = [None, True, False, 0, -1, 7, 1e308, math.nan, math.inf, -math.inf, 10**40, 2**63, "", " ", "\ud800",
                  "\0", "x" * 5000, "💥", [], {}, [[]], {"": None}, [None], ["user"], b"bytes".hex()]
ODD_IN_PICKLES: List[Any] = [*ODD, torch.ones(9, 9), b"\xff", (1, 2), {5: 5}]
TENSOR_CHANGES: List[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.double(), lambda t: t.half(), lambda t: t.to(torch.int32), lambda t: t.to(torch.complex64),
    lambda t: t.bool(), lambda t: t[:0], lambda t: t.flatten(), lambda t: t.reshape(-1)[:1].expand(t.shape),
    lambda t: t.mT if t.dim() > 1 else t, lambda t: t * math.nan, lambda t: t * math.inf, lambda t: t.to_sparse(),
    lambda t: t.to("meta"), torch._neg_view]
ENDINGS = ["a.txt", "a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.txt.gz", "a.jsonl.gz", "a", "a.md"]
STARTS = [b"", b"[", b"{", b'[{"text":', b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\xef\xbb\xbf", b"\x1f\x8b",
          b"\x1f\x8b\x08", b"PAR1", b"PK\x03\x04", b"id,text\n1,", b"question\tanswer\n"]


def good_record(rng: random.Random, number: int) -> dict:
    def words() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 8)))

    if rng.random() < 0.5:
        return {"text": f"good {number} {words()}"}
    return {"messages": [{"role": "user", "content": f"q{number} {words()}"},
                         {"role": "assistant", "content": f"good {number} {words()}"}]}


def key(record: Record) -> str:
    return record.text if record.messages is None else "\n".join(m["content"] for m in record.messages)


def key_of(value: dict) -> str:
    return value["text"] if "text" in value else "\n".join(m["content"] for m in value["messages"])


def dump(rng: random.Random, value: Any) -> str:
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def mutate(rng: random.Random, content: bytes, most: int = 8) -> bytes:
    """Some bytes flipped, cut, doubled, overwritten, moved or put in."""
    data = bytearray(content)
    for _ in range(rng.randint(1, most)):
        at, length = rng.randrange(len(data) + 1), int(2 ** rng.uniform(0, 10))
        change = rng.randrange(7)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at:at + length] = b""
        elif change == 2:
            data[at:at] = data[at:at + length]
        elif change == 3:
            data[at:at + length] = rng.choice((b"\0", b"\xff")) * min(length, len(data) - at)
        elif change == 4:
            data[at:at + 8] = rng.choice((2**63, 2**31, 2**40, 0, 255)).to_bytes(8, "little")
        elif change == 5:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other:other + length]
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 20))
    return bytes(data)


def twist(rng: random.Random, value: Any, odd: List[Any] = ODD) -> Any:
    """The value with one of its parts, however deep, replaced, left out, renamed or doubled."""
    value = copy.deepcopy(value)
    path, inner = [], value
    while isinstance(inner, (dict, list)) and inner and (not path or rng.random() < 0.8):
        step = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        path.append((inner, step))
        inner = inner[step]
    if not path:
        return rng.choice(odd)
    owner, step = path[-1]
    change = rng.randrange(5)
    if change == 0:
        del owner[step]
    elif change < 4 and isinstance(inner, torch.Tensor):
        owner[step] = rng.choice(TENSOR_CHANGES)(inner)
    elif change == 1 and isinstance(owner, dict):
        owner[rng.choice(["", "x", "\0", "role", "ranks", "a\n\x1b[2J", 5])] = owner.pop(step)
    elif change == 2 and isinstance(owner, list):
        owner.append(owner[step])
    else:
        owner[step] = copy.deepcopy(rng.choice(odd))
    return value


# ------------------------------------------------------------------------------------------------ files of records


def lines_with(rng: random.Random, folder: Path, junk: Callable[[], bytes], name: str = "a.jsonl") -> Case:
    """A .jsonl of good records with lines of junk in between."""
    records = [good_record(rng, number) for number in range(rng.randint(1, 6))]
    lines = [dump(rng, record).encode() for record in records]
    for _ in range(rng.randint(1, 4)):
        lines.insert(rng.randint(0, len(lines)), junk().replace(b"\n", b" "))
    content = rng.choice((b"\n", b"\r\n")).join(lines)
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PAR1")):  # would be a file of another kind
        content = b"\n" + content
    return Case(write(folder, name, content), Counter(map(key_of, records)))


def random_bytes(rng: random.Random, folder: Path) -> Case:
    content = rng.choice(STARTS) + rng.randbytes(int(2 ** rng.uniform(0, 14)))
    return Case(write(folder, rng.choice(ENDINGS), content))


def random_text(rng: random.Random, folder: Path) -> Case:
    top = rng.choice((0x80, 0x800, 0x10000, 0x110000))
    text = "".join(map(chr, (rng.randrange(top) for _ in range(rng.randrange(400)))))
    encoding = rng.choice(("utf-8", "utf-16", "utf-16-le", "utf-32"))
    return Case(write(folder, rng.choice(ENDINGS), rng.choice(STARTS) + text.encode(encoding, "surrogatepass")))


def cut_off_json(rng: random.Random, folder: Path) -> Case:
    records = [good_record(rng, number) for number in range(rng.randint(1, 8))]
    form = rng.choice(("lines", "array", "printed", "gz"))
    if form in ("lines", "gz"):
        parts, opening, between = [dump(rng, record) for record in records], "", "\n"
    else:
        indent = 1 if form == "printed" else None
        parts, opening, between = [json.dumps(record, indent=indent) for record in records], "[", ",\n"
    content = (opening + between.join(parts)).encode()
    if form == "gz":
        packed = gzip.compress(content)
        return Case(write(folder, "a.jsonl.gz", packed[:rng.randrange(len(packed))]))
    cut = rng.randrange(len(content))
    good, end = Counter(), len(opening)
    for part, record in zip(parts, records, strict=True):
        end += len(part.encode())
        if end <= cut:
            good[key_of(record)] += 1
        end += len(between)
    return Case(write(folder, "a.jsonl" if form == "lines" else "a.json", content[:cut]), good)


def deep_nesting(rng: random.Random, folder: Path) -> Case:
    def junk() -> bytes:
        depth = rng.choice((3, 500, 990, 1100, 5000, 100_000))
        open_, close = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"messages":', b"}]"), (b'{"text":[', b"]}")))
        whole = open_ * depth + rng.choice((b"", b"1", b'"x"')) + close * rng.choice((depth, depth, 0, 3))
        around = rng.choice((b"%s", b'{"messages":%s}', b'{"text":"x","tools":%s}', b'{"instruction":"q","output":%s}',
                             b'{"messages":[{"role":"user","content":"q","tool_calls":%s}]}'))
        return around.replace(b"%s", whole)

    return lines_with(rng, folder, junk)


def wrong_types(rng: random.Random, folder: Path) -> Case:
    forms = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [{}]},
             {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
             {"instruction": "i", "input": "", "output": "o", "history": [["q", "a"]]},
             {"prompt": "q", "completion": "a"}, {"query": "q", "response": "a", "history": [["q", "a"]]},
             {"question": "q", "answer": "a"}, {"text": "t"}, [{"role": "user", "content": [{"text": "q"}]}]]
    return lines_with(rng, folder, lambda: json.dumps(twist(rng, rng.choice(forms))).encode())


def lone_surrogates(rng: random.Random, folder: Path) -> Case:
    def junk() -> bytes:
        half = rng.choice(("\ud800", "\udfff", "\udc80\ud83d", "a\udcff", "\udcff" * 99))
        turns = [{"role": "user", "content": half}, {"role": "assistant", "content": "a" + half}]
        record = rng.choice(({"text": half}, {"messages": turns}, {half: half}))
        return json.dumps(record, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")

    return lines_with(rng, folder, junk)


def nul_characters(rng: random.Random, folder: Path) -> Case:
    if rng.random() < 0.3:
        text = "".join(rng.choices(["\0", "春天", "a", "\n", " "], k=rng.randint(1, 300)))
        return Case(write(folder, "a.txt", text.encode()))

    def junk() -> bytes:
        record = dump(rng, good_record(rng, 999))
        at = rng.randrange(len(record))
        return (record[:at] + rng.choice(("\0", "\\u0000", "\0" * 3000)) + record[at:]).encode()

    return lines_with(rng, folder, junk)


def mixed_encodings(rng: random.Random, folder: Path) -> Case:
    def junk() -> bytes:
        encoding = rng.choice(("gb18030", "latin-1", "utf-16-le", "utf-16-be", "shift_jis", "cp1252", "utf-7", "cp037"))
        return json.dumps({"text": "other 春天 é " * rng.randint(1, 5)}, ensure_ascii=False).encode(encoding, "ignore")

    return lines_with(rng, folder, junk)


# Each leaves the brackets and quotes of the array around it in doubt; none holds a record of its own.
BROKEN = ['{"text": "x" "y"}', '{"text": x}', '{"text": "line\nbreak"}', '{"text": "a\\q"}', "{,}", "nonsense", "{}",
          '{"text": 5}', '{"messages": [{"role": "user" "content": "q"}, {"role": "assistant", "content": "a"}]}',
          "[" * 5000, '{"a":' * 5000, "null", "1e999", '"text"', "\ud800", "\0"]


def broken_array(rng: random.Random, folder: Path) -> Case:
    records = [{"text": f"good {number}"} for number in range(rng.randint(0, 6))]
    parts = list(map(json.dumps, records))
    for _ in range(rng.randint(1, 4)):
        parts.insert(rng.randint(0, len(parts)), rng.choice(BROKEN))
    content = "[" + rng.choice((",", ",\n", " ,\n  ")).join(parts) + rng.choice(("]", "", ',{"text": "cut o', "]]"))
    return Case(write(folder, "a.json", content.encode("utf-8", "surrogatepass")), Counter(map(key_of, records)))


def tables(rng: random.Random, folder: Path) -> Case:
    delimiter = rng.choice(",\t")
    names = rng.choice((["id", "text"], ["question", "answer"], ["messages", "text"],
                        ["instruction", "input", "output"]))
    content = io.StringIO()
    rows = csv.writer(content, delimiter=delimiter)
    rows.writerow(names)
    good: Counter = Counter()
    if names == ["id", "text"]:
        for number in range(rng.randint(0, 5)):
            text = f"good {number} " + "".join(rng.choices(WORDS, k=3))
            rows.writerow([number, text])
            good[text] += 1
    pieces = ['"', '""', delimiter, "\n", "\r", "春天", "x", '{"a":' * 2000, "[[", "9" * 300]
    pieces += [] if good else ["\0"]  # many would make it a binary file
    content.write("".join(rng.choices(pieces, k=rng.randrange(40))))
    encoding = "utf-8" if good else rng.choice(("utf-8", "utf-16", "gb18030", "latin-1"))
    return Case(write(folder, rng.choice(("a.csv", "a.tsv")), content.getvalue().encode(encoding, "ignore")), good)


def empty_things(rng: random.Random, folder: Path) -> Case:
    content = rng.choice((b"", b" ", b"\n" * 99, b"\xef\xbb\xbf", b"\xff\xfe", b"[]", b"{}", b"null", b'""', b"[{}]",
                          b"[[]]", b'{"text": ""}', b'{"messages": []}', b"text\n", b"question,answer\n,\n", b"\r\n",
                          gzip.compress(b""), gzip.compress(b"")[:9], b"PAR1", b'{"text": " \\n"}\n{}\n[]\n', b"\0"))
    path = write(folder, rng.choice(ENDINGS), content)
    if rng.random() < 0.2:
        (folder / "more").mkdir()
        write(folder / "more", "b.txt", b"")
        return Case(folder)
    return Case(path)


def damaged_data(rng: random.Random, folder: Path) -> Case:
    """A good file of any form with some bytes changed; of a .jsonl, the lines left alone must all be kept."""
    records = [good_record(rng, number) for number in range(rng.randint(2, 12))]
    lines = [dump(rng, record).encode() for record in records]
    form = rng.choice(("jsonl", "jsonl", "json", "csv", "txt", "gz", "utf-16", "gb18030", "parquet"))
    if form == "jsonl":
        good: Counter = Counter()
        for i, record in enumerate(records):
            if i and rng.random() < 0.4:
                lines[i] = mutate(rng, lines[i], 3)
            else:
                good[key_of(record)] += 1
        return Case(write(folder, "a.jsonl", b"\n".join(lines)), good)
    texts = "\n".join(key_of(record) for record in records)
    content = {
        "json": lambda: json.dumps(records, indent=2).encode(), "gz": lambda: gzip.compress(b"\n".join(lines)),
        "csv": lambda: b"text,id\n" + b"\n".join(b'"%d",1' % i for i in range(20)),
        "txt": lambda: texts.encode(), "utf-16": lambda: b"\n".join(lines).decode().encode("utf-16"),
        "gb18030": lambda: texts.encode("gb18030"), "parquet": lambda: b"PAR1" + texts.encode() + b"PAR1",
    }[form]()
    ending = {"gz": "jsonl.gz", "utf-16": "jsonl", "gb18030": "txt"}.get(form, form)
    return Case(write(folder, f"a.{ending}", mutate(rng, content)))


# -------------------------------------------------------------------------------------- large ones, one case a form


def long_line(number: int, folder: Path) -> Optional[Case]:
    """A good record, a line of LINE_MB megabytes of some kind, a good record."""
    size = int(LINE_MB * 10**6)
    before, after = '{"text": "good before"}', '{"text": "good after"}'
    text = "春天来了，花开了。Spring is here. " * (size // 53)
    turns = [{"role": role, "content": f"turn {i}"} for i in range(size // 80) for role in ("user", "assistant")]
    forms: List[Callable[[], tuple]] = [
        lambda: ("a.jsonl", json.dumps({"text": text}, ensure_ascii=False), [text]),
        lambda: ("a.jsonl", json.dumps({"messages": turns}), ["\n".join(turn["content"] for turn in turns)]),
        lambda: ("a.jsonl", " " * size, []), lambda: ("a.jsonl", "[" * size, []), lambda: ("a.jsonl", "x" * size, []),
        lambda: ("a.jsonl", '{"a":' * (size // 5), []), lambda: ("a.jsonl", '{"text": "' + "y" * size, []),
        lambda: ("a.jsonl", "[" + "{}," * (size // 3) + "{}]", []), lambda: ("a.jsonl", "\0" * size, []),
        lambda: ("a.jsonl", json.dumps({f"k{i}": 0 for i in range(size // 12)}), []),
        lambda: ("a.jsonl", '{"text": [' + "1," * (size // 2) + "1]}", []),
        lambda: ("a.json", json.dumps({"text": text}, ensure_ascii=False), [text]),
        lambda: ("a.json", "{" * size, []), lambda: ("a.json", '{"text": "' + "y" * size, []),
        lambda: ("a.json", "[" * size, []), lambda: ("a.json", "{,}" * (size // 3), []),
        lambda: ("a.csv", "x" * size, []), lambda: ("a.csv", '"' + "x" * size, []), lambda: ("a.csv", "," * size, []),
        lambda: ("a.txt", "春" * (size // 3), []), lambda: ("a.txt", " " * size, []), lambda: ("a.txt", "a" * size, []),
    ]
    if number >= len(forms):
        return None
    name, line, good = forms[number]()
    if name == "a.txt":
        return Case(write(folder, name, line.encode()), Counter(), size)
    if name == "a.csv":
        return Case(write(folder, name, f"id,text\n0,good\n1,{line}\n".encode()), Counter(["good"]), size)
    # Of a broken array's rest nothing can be promised: the text of a string without its end may hold anything.
    kept = [] if name == "a.json" and not good else ["good after"]
    content = f"{before}\n{line}\n{after}\n" if name == "a.jsonl" else f"[{before},\n{line},\n{after}]"
    return Case(write(folder, name, content.encode()), Counter(["good before", *kept, *good]), size)


def tiny_records(number: int, folder: Path) -> Optional[Case]:
    """RECORDS of the smallest records, good or bad."""
    chat_ = '{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}\n'
    forms = [("a.jsonl", '{"text":"a"}\n', "", Counter(a=RECORDS)), ("a.jsonl", "{}\n", '{"text":"a"}', Counter("a")),
             ("a.jsonl", chat_, "", Counter({"q\na": RECORDS})), ("a.jsonl", "\n", '{"text":"a"}', Counter("a")),
             ("a.jsonl", "[\n", '{"text":"a"}', Counter("a")), ("a.jsonl", "0\n", '{"text":"a"}', Counter("a")),
             ("a.json", '{"text":"a"},', '{"text":"b"}]', Counter(a=RECORDS, b=1)),
             ("a.json", "1,", '{"text":"b"}]', Counter("b")), ("a.json", "{,},\n", '{"text":"b"}]', Counter("b")),
             ("a.csv", "1,a\n", "", Counter(a=RECORDS)), ("a.csv", '"\n', "", Counter()),
             ("a.txt", "a\n", "", Counter())]
    if number >= len(forms):
        return None
    name, record, end, good = forms[number]
    start = {"a.json": "[", "a.csv": "id,text\n"}.get(name, "")
    path = folder / name
    with open(path, "w", encoding="utf-8") as file:
        file.write(start)
        for _ in range(0, RECORDS, 1000):
            file.write(record * 1000)
        file.write(end)
    return Case(path, good, path.stat().st_size if name == "a.csv" and not good else 0)


# ------------------------------------------------------------------------------------------------------- artifacts


class Artifacts:
    """Good files of every kind that is opened, made once from a small untrained model."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
        (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 2, encoding="utf-8")
        tokenizer = Tokenizer.train([], 259)
        config = train.TrainConfig(
            data_path=[str(folder / "chats.jsonl")], out_dir=str(folder), cache_dir=str(folder / "cache"), device="cpu",
            n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=24, context_length=32, batch_size=2, epochs=1.0)
        config = train.settle(config, torch.device("cpu"))
        prepared = prepare(config.data_path, tokenizer, None, config.cache_dir)
        trainer = train.Trainer(config, train.World(torch.device("cpu")), prepared, None)
        trainer.gradients(trainer.train_rows.batch(0, [0]), 1)
        trainer.update(1.0)
        training = trainer.state(train.Progress(step=1, epoch=1), {"chat": True})
        model = trainer.model.config
        Checkpoint(model, trainer.model.state_dict(), tokenizer.to_dict(), training).save(folder / "last.pt")
        self.checkpoint = torch.load(folder / "last.pt", weights_only=True)

    def exported(self, name: str) -> Path:
        """The checkpoint in one of export.py's formats."""
        import export
        target = self.folder / export.FORMATS[name].target
        if not target.exists():
            export.FORMATS[name].write(export.open_source(str(self.folder / "last.pt"), None), target)
        return target


def damaged_checkpoint(rng: random.Random, folder: Path, good: Artifacts) -> Case:
    if rng.random() < 0.5:
        return Case(write(folder, "best_model.pt", mutate(rng, (good.folder / "last.pt").read_bytes())))
    content = {**good.checkpoint, "training": None}
    part = rng.choice(["", "config", "weights", "weights", "tokenizer"])
    twisted = twist(rng, content[part] if part else content, ODD_IN_PICKLES)
    content = {**content, part: twisted} if part else twisted
    torch.save(content, folder / "best_model.pt")
    return Case(folder / "best_model.pt")


def damaged_training_state(rng: random.Random, folder: Path, good: Artifacts) -> Case:
    content = {**good.checkpoint, "training": twist(rng, good.checkpoint["training"], ODD_IN_PICKLES)}
    torch.save(content, folder / "last.pt")
    return Case(folder / "last.pt")


def damaged_tokenizer(rng: random.Random, folder: Path, good: Artifacts) -> Case:
    return damaged_folder(rng, folder, good.exported("huggingface"), "tokenizer.json")


def damaged_safetensors(rng: random.Random, folder: Path, good: Artifacts) -> Case:
    return damaged_folder(rng, folder, good.exported("huggingface"), rng.choice(("model.safetensors", "config.json")))


def damaged_transformers(rng: random.Random, folder: Path, good: Artifacts) -> Case:
    return damaged_folder(rng, folder, good.exported("transformers"), rng.choice(
        ("config.json", "config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json")))


def damaged_folder(rng: random.Random, folder: Path, source: Path, name: str) -> Case:
    target = folder / "model"
    shutil.copytree(source, target)
    content = (target / name).read_bytes()
    if name.endswith(".json") and rng.random() < 0.6:
        content = json.dumps(twist(rng, json.loads(content))).encode()
    elif name.endswith(".safetensors") and rng.random() < 0.6:
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(twist(rng, json.loads(content[8:8 + size]))).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + size:]
    else:
        content = mutate(rng, content)
    (target / name).write_bytes(content)
    return Case(target)


def damaged_torchscript(rng: random.Random, folder: Path, good: Artifacts) -> Case:
    return Case(write(folder, "model.pt", mutate(rng, good.exported("torchscript").read_bytes())))


def damaged_onnx(rng: random.Random, folder: Path, good: Artifacts) -> Case:
    return Case(write(folder, "model.onnx", mutate(rng, good.exported("onnx").read_bytes(), 4)))


# ------------------------------------------------------------------------------------------------------- what is run


class Violation(Exception):
    """What no file may bring about."""


def demand(holds: bool, words: str) -> None:
    if not holds:
        raise Violation(words)


def one_line(error: InputError) -> str:
    said = str(error)
    demand("\n" not in said and 5 < len(said) < 1000, f"a refusal that is not one line: {said!r:.300}")
    return said


def read_case(case: Case, tokenizer: Tokenizer, cache: Path) -> bool:
    """Reads the file twice, as records and through `prepare`; whether it was refused."""
    missing, report, refusal = case.good.copy(), ReadReport(), ""
    try:
        for record in read_records(case.path, report):
            found = key(record)
            if missing[found] > 0:
                missing[found] -= 1
    except InputError as error:
        refusal = one_line(error)
    lost = list(+missing)
    demand(not lost, f"{len(lost)} good records lost, the first {lost[:1]!r:.60}; {report}")
    demand(not any("\n" in line for line in report.reasons + report.notes), f"not one line: {report}")
    try:
        prepared = prepare(case.path, tokenizer, None, cache)
        verdict, documents = "", len(prepared.kinds)
    except InputError as error:
        verdict, documents = one_line(error), 0
    demand(verdict == refusal, f"the readers say {refusal!r}, prepare says {verdict!r}")
    demand(documents == report.records, f"{documents} documents, {report.records} records")
    return bool(refusal)


def open_case(case: Case) -> bool:
    """Opens a model and lets it compute a few tokens; whether it was refused."""
    try:
        runtime = chat.open_model(case.path, "cpu")
        for ids in ([5], [5, 6, 7]):
            runtime.start(ids)
        runtime.step(8)
    except InputError as error:
        return bool(one_line(error))
    return False


def take_one_step(trainer: train.Trainer, progress: train.Progress, batches: train.Batches) -> None:
    """In place of the loop of a resumed run."""
    trainer.try_gradients(batches.take()[0], progress)
    trainer.update(1.0)


def resume_case(case: Case, cache: Path) -> bool:
    """Resumes a run for one step; whether it was refused."""
    config = train.TrainConfig(resume=True, out_dir=str(case.path.parent), device="cpu", cache_dir=str(cache))
    try:
        train.train(config)
    except InputError as error:
        return bool(one_line(error))
    return False


@dataclass(frozen=True)
class Kind:
    """One row of the table: how cases are made, their share, what else the maker is given, the time a case may take."""

    make: Callable[..., Optional[Case]]
    share: float  # of all cases; 0: as many as there are forms
    action: str  # read, open or resume
    limit: float = LIMIT


KINDS = {
    "random bytes": Kind(random_bytes, 8, "read"), "random text": Kind(random_text, 8, "read"),
    "cut-off JSON": Kind(cut_off_json, 9, "read"), "deep nesting": Kind(deep_nesting, 7, "read"),
    "wrong types": Kind(wrong_types, 10, "read"), "lone surrogates": Kind(lone_surrogates, 5, "read"),
    "NULs": Kind(nul_characters, 5, "read"), "mixed encodings": Kind(mixed_encodings, 6, "read"),
    "broken array": Kind(broken_array, 9, "read"), "tables": Kind(tables, 6, "read"),
    "empty everything": Kind(empty_things, 3, "read"), "damaged data": Kind(damaged_data, 9, "read"),
    "checkpoint": Kind(damaged_checkpoint, 6, "open"), "training state": Kind(damaged_training_state, 2, "resume"),
    "tokenizer.json": Kind(damaged_tokenizer, 3, "open"), "safetensors": Kind(damaged_safetensors, 3, "open"),
    "transformers": Kind(damaged_transformers, 1, "open"), "TorchScript": Kind(damaged_torchscript, 1, "open"),
    "ONNX": Kind(damaged_onnx, 2, "open"), "one long line": Kind(long_line, 0, "read", LIMIT_LARGE),
    "tiny records": Kind(tiny_records, 0, "read", LIMIT_LARGE),
}


class Runner:
    """Makes and runs cases below one folder."""

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder = seed, folder
        self.tokenizer = Tokenizer.train([], 259)
        self.artifacts: Optional[Artifacts] = None
        self.warm: set = set()

    def make(self, name: str, number: int, folder: Path) -> Optional[Case]:
        kind = KINDS[name]
        if kind.share == 0:
            return kind.make(number, folder)
        rng = random.Random(f"{self.seed}/{name}/{number}")
        if kind.action == "read":
            return kind.make(rng, folder)
        if self.artifacts is None:
            self.artifacts = Artifacts(self.folder / "good")
        return kind.make(rng, folder, self.artifacts)

    def run(self, name: str, number: int) -> Optional[Outcome]:
        """One case, or None where the kind has no more forms."""
        folder = self.folder / "case"
        folder.mkdir()
        try:
            case = self.make(name, number, folder)
            if case is None:
                return None
            if name not in self.warm and KINDS[name].action != "read":
                self.warm.add(name)  # libraries loaded at the first opening are no memory of the case
                with suppress(Exception):
                    self.act(name, case)
            before, began = reset_peak(), time.perf_counter()
            refused = self.act(name, case)
            seconds, grown = time.perf_counter() - began, peak() - before
            bound = MEMORY + 20 * case.longest / 1e6
            demand(grown <= bound, f"{grown:.0f} MB of memory, more than {bound:.0f}")
            return Outcome(refused, case.good.total(), seconds, grown)
        except Exception:
            return Outcome(False, 0, 0, 0, traceback.format_exc())
        finally:
            shutil.rmtree(folder)

    def act(self, name: str, case: Case) -> bool:
        action = KINDS[name].action
        if action == "read":
            return read_case(case, self.tokenizer, self.folder / "case" / ".cache")
        return open_case(case) if action == "open" else resume_case(case, self.artifacts.folder / "cache")


def reset_peak() -> float:
    """Megabytes held now; from here on `peak` counts anew where the system can."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: the peak of the process so far
        pass
    return peak()


def peak() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def work(connection, jobs: list, seed: int, folder: str, sizes: tuple) -> None:
    """The worker process: an Outcome for each job, in order."""
    global LINE_MB, RECORDS
    LINE_MB, RECORDS = sizes
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    train.run = take_one_step
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say about damaged files
    runner = Runner(seed, Path(folder))
    gc.freeze()  # collecting before each case is to look at what cases left alone
    for name, number in jobs:
        connection.send(runner.run(name, number))


def run_cases(jobs: list, seed: int, sizes: tuple = (LINE_MB, RECORDS), quiet: bool = False) -> dict:
    """Name -> outcomes of its jobs (name, number); a worker that hangs or dies is replaced."""
    outcomes: dict = {name: [] for name, _ in jobs}
    context, done = multiprocessing.get_context("spawn"), 0
    bar = tqdm(total=len(jobs), unit=" cases", disable=quiet)
    while done < len(jobs):
        ours, theirs = context.Pipe()
        with tempfile.TemporaryDirectory() as folder:
            worker = context.Process(target=work, args=(theirs, jobs[done:], seed, folder, sizes))
            worker.start()
            theirs.close()
            first, alive = True, True
            while alive and done < len(jobs):
                name, number = jobs[done]
                limit = KINDS[name].limit
                try:
                    if ours.poll(limit + 120 * first):
                        outcome = ours.recv()
                    else:
                        outcome, alive = Outcome(False, 0, limit, 0, f"no end within {limit} seconds\n"), False
                except EOFError:
                    worker.join()
                    outcome, alive = Outcome(False, 0, 0, 0, f"the process died ({worker.exitcode})\n"), False
                if outcome is not None:
                    outcomes[name].append((number, outcome))
                first, done = False, done + 1
                bar.update()
            worker.kill()
            worker.join()
    bar.close()
    return outcomes


def plan(cases: int, only: List[str]) -> list:
    """(kind, number) of every case to run, at least one a kind."""
    total = sum(KINDS[name].share for name in only) or 1
    counts = {name: math.ceil(cases * KINDS[name].share / total) if KINDS[name].share else 30 for name in only}
    return [(name, number) for name, count in counts.items() for number in range(count)]


def table(outcomes: dict) -> str:
    row = "{:18}{:>8}{:>9}{:>8}{:>14}{:>15}{:>12}{:>8}"
    lines = [row.format("kind", "cases", "refused", "read", "records kept", "worst seconds", "peak MB", "failed")]
    everything = [outcome for found in outcomes.values() for _, outcome in found]
    for name, found in [*((name, [o for _, o in found]) for name, found in outcomes.items()), ("all", everything)]:
        failed, refused = sum(bool(o.failure) for o in found), sum(o.refused for o in found)
        lines.append(row.format(name, len(found), refused, len(found) - refused - failed, sum(o.kept for o in found),
                                f"{max((o.seconds for o in found), default=0):.2f}",
                                f"{max((o.megabytes for o in found), default=0):.0f}", failed))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="beside the large ones (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--case", type=int, help="this one alone, in this process")
    parser.add_argument("--line_mb", type=float, default=LINE_MB, help="megabytes of one long line")
    parser.add_argument("--records", type=int, default=RECORDS, help="number of tiny records")
    options = parser.parse_args()
    sizes = options.line_mb, options.records
    if options.case is not None:
        globals().update(LINE_MB=sizes[0], RECORDS=sizes[1])
        train.run = take_one_step
        with tempfile.TemporaryDirectory() as folder:
            outcome = Runner(options.seed, Path(folder)).run(options.only[0], options.case)
        print(outcome.failure or outcome)
        return bool(outcome.failure)
    outcomes = run_cases(plan(options.cases, options.only), options.seed, sizes)
    print(table(outcomes))
    failures = [(name, number, outcome) for name, found in outcomes.items() for number, outcome in found
                if outcome.failure]
    for name, number, outcome in failures[:20]:
        print(f"\n{outcome.failure.strip()}\nagain: python benchmarks/fuzz.py --only '{name}' --case {number} "
              f"--seed {options.seed}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
