"""Text in, batches out: the tokenizer, the chat format, readers for what users have, the prepared cache, packing.

    prepared = prepare(["my.jsonl"], tokenizer=None, vocab_size=None, cache_dir="cache")
    packed = prepared.split("train", context_length=256)
    batch = packed.batch(epoch=0, row_indices=range(16))

Shapes: B rows of a batch, T context length.
"""

import base64
import binascii
import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import time
import uuid
import zlib
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional, Sequence, Union

import numpy as np
import tiktoken
import torch

from model import InputError

Progress = Optional[Callable[[int, int, str], None]]  # done bytes, total bytes, what is being done
Paths = Union[str, Path, Sequence[Union[str, Path]]]
Message = dict[str, str]

# --------------------------------------------------------------------------------------------------- tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS
NAMED_ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")
# Qwen2's split pattern, which every runtime knows.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SEGMENT = 1 << 16  # characters; the pattern's engine overflows its stack on runs of blanks some ten times as long
GROUP = 1 << 18  # characters that go into one call of tiktoken; a call costs as much as some 2,000 of them
# Places where every split pattern in use ends one piece and starts the next whatever stands around, so that cutting
# there leaves the tokens as they are: before a blank, after a newline, before Chinese punctuation.
SAFE_CUT = re.compile(r"(?<=\S)(?=[ \t\u3000])|(?<=\S\n)(?=[^\s/])|(?<=[一-龥])(?=[，。！？；：、])")
TRAINING_SAMPLE = 1 << 25  # bytes of text that a tokenizer is trained on at most
UNBROKEN_RUN = re.compile(r"\w{257,}|[^\w\s]{257,}|\s{257,}")


def clean_text(text: str) -> str:
    """The text with lone surrogates, which no encoder can write, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_text(text: str, limit: int = SEGMENT) -> Iterator[str]:
    """Segments of at most `limit` characters whose tokens, put together, are those of the whole text.

    Only a run with no blank, newline or punctuation in `limit` characters is cut in its middle.
    """
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        for reach in (1024, limit):  # the nearest cut is wanted, and searching costs time
            cuts = [match.start() for match in SAFE_CUT.finditer(text, max(start + 1, stop - reach), stop)]
            if cuts:
                stop = cuts[-1]
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _cut_runs(text: str) -> Iterator[str]:
    start = 0
    for run in UNBROKEN_RUN.finditer(text):
        for cut in range(run.start() + 256, run.end(), 256):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text) + len(END_OF_TEXT)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _alphabet(texts: list[str], room: int) -> list[str]:
    """The commonest characters beyond ASCII that occur twice or more and whose bytes' merges fit `room` tokens."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    chosen, tokens = [], set()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        spelt = character.encode()
        if len(spelt) > 1:
            tokens |= {spelt[:end] for end in range(2, len(spelt) + 1)}
            if count < 2 or len(tokens) > room:
                break
            chosen.append(character)
    return chosen


class Tokenizer:
    """A byte-level BPE with three special tokens, held in a tiktoken.Encoding. Text never becomes a special token."""

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special_ids: dict[str, int]):
        self.name, self.pattern, self.ranks, self.special_ids = name, pattern, ranks, special_ids
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ids)
        self.end_of_text_id, self.im_start_id, self.im_end_id = (special_ids[token] for token in SPECIAL_TOKENS)
        self.vocab_size = max(special_ids.values()) + 1
        # Named encodings have a few ids without a token; they decode to nothing.
        self._bytes = [b""] * self.vocab_size
        for token, rank in ranks.items():
            self._bytes[rank] = token
        self.token_byte_lengths = np.array([len(token) for token in self._bytes], dtype=np.int32)
        for token, rank in special_ids.items():
            self._bytes[rank] = token.encode()
        self._headers = {role: np.array([self.im_start_id, *self.encode(role + "\n")], np.uint32) for role in ROLES}
        self._turn_end = np.array([self.im_end_id, *self.encode("\n")], np.uint32)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A new vocabulary of at most `vocab_size` tokens, the three special ones included, learnt from texts."""
        try:
            from tokenizers import Regex, models, pre_tokenizers, trainers
            from tokenizers import Tokenizer as Trainable
        except ImportError:
            raise InputError("training a tokenizer needs the package tokenizers: pip install tokenizers") from None
        smallest = 256 + len(SPECIAL_TOKENS)
        if not smallest <= vocab_size <= 1 << 20:
            raise InputError(f"vocab_size must be from {smallest} to {1 << 20}, not {vocab_size}")
        # Merging inside one word costs its length each time: a word of megabytes would never end.
        parts = [part for text in texts for segment in cut_text(clean_text(text)) for part in _cut_runs(segment)]
        # Characters first, then what they make up. Left to itself, BPE spends a small vocabulary on the phrases of its
        # corpus and leaves most Chinese characters in pieces: a name or a sentence unseen is then hard to read or copy.
        alphabet = _alphabet(parts, (vocab_size - smallest) // 2)
        ranks = {bytes([byte]): byte for byte in range(256)}
        for character in alphabet:
            spelt = character.encode()
            for end in range(2, len(spelt) + 1):
                ranks.setdefault(spelt[:end], len(ranks))
        uncovered = re.compile(rf"[^\x00-\x7f{re.escape(''.join(alphabet))}]+")
        symbols = [*map(chr, range(128)), *alphabet]
        trainable = Trainable(models.BPE())
        trainable.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=len(symbols) + vocab_size - len(SPECIAL_TOKENS) - len(ranks), min_frequency=2,
            show_progress=False, initial_alphabet=symbols, limit_alphabet=len(symbols))
        trainable.train_from_iterator((piece for part in parts for piece in uncovered.split(part)), trainer)
        for token, _ in sorted(trainable.get_vocab().items(), key=lambda item: item[1]):
            ranks.setdefault(token.encode(), len(ranks))
        return cls("trained", PATTERN, ranks, {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """One of tiktoken's own encodings, with our special tokens after its highest id where it lacks them."""
        if name not in NAMED_ENCODINGS:
            raise InputError(f"unknown tokenizer {name!r:.60}; known are {', '.join(NAMED_ENCODINGS)}")
        try:
            encoding = tiktoken.get_encoding(name)
        except Exception as error:  # whatever the network layer raises
            raise InputError(f"cannot load the tokenizer {name} ({type(error).__name__}): it is downloaded at first "
                             "use; offline, set TIKTOKEN_CACHE_DIR to a folder that holds it") from error
        special_ids, free = {END_OF_TEXT: encoding.eot_token}, encoding.max_token_value + 1
        special_ids |= {IM_START: free, IM_END: free + 1}
        return cls(name, encoding._pat_str, encoding._mergeable_ranks, special_ids)

    def to_dict(self) -> dict:
        """Plain strings and integers, fit for JSON and for a checkpoint. `ranks` is one base64 line a token."""
        lines = (binascii.b2a_base64(token, newline=False).decode() for token in self.ranks)
        return {"name": self.name, "pattern": self.pattern, "ranks": "\n".join(lines), "special_ids": self.special_ids}

    @classmethod
    def from_dict(cls, values: dict) -> "Tokenizer":
        """The inverse of to_dict. Anything to_dict could not have written is an InputError."""
        kinds = {"name": str, "pattern": str, "ranks": str, "special_ids": dict}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise InputError(f"tokenizer: expected the keys {', '.join(kinds)}")
        for key, kind in kinds.items():
            if type(values[key]) is not kind:
                raise InputError(f"tokenizer: {key} must be a {kind.__name__}, not {values[key]!r:.40}")
        try:
            tokens = [base64.b64decode(line, validate=True) for line in values["ranks"].split("\n")]
        except ValueError:
            raise InputError("tokenizer: ranks must be one base64 line a token") from None
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(tokens) > 1 << 20:
            raise InputError("tokenizer: more than a million tokens")
        if len(ranks) != len(tokens) or not all(tokens):
            raise InputError("tokenizer: a token is empty or stands twice in ranks")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise InputError("tokenizer: ranks must hold all 256 single bytes")
        special_ids = values["special_ids"]
        ids = list(special_ids.values())
        if set(special_ids) != set(SPECIAL_TOKENS) or not all(type(i) is int for i in ids) or len(set(ids)) != len(ids):
            raise InputError(f"tokenizer: special_ids must give {', '.join(SPECIAL_TOKENS)} an integer each")
        if min(ids) < len(ranks) or max(ids) >= len(ranks) + 1024:  # a far id would ask for an absurd vocabulary
            raise InputError("tokenizer: special_ids must follow the ranks")
        if len(values["pattern"]) > 4096:
            raise InputError("tokenizer: pattern is longer than 4096 characters")
        probe = "Ab, c'd 12\n\n  你好！\t\r\n"
        try:
            tokenizer = cls(values["name"], values["pattern"], ranks, special_ids)
            sound = tokenizer.decode(tokenizer.encode(probe)) == probe
        except BaseException as error:  # a panic inside tiktoken is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            sound = False
        if not sound:
            raise InputError("tokenizer: its pattern does not split text")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; special tokens typed in it are plain text."""
        ids: list[int] = []
        for segment in cut_text(clean_text(text)):
            ids += self.encoding.encode_ordinary(segment)
        return ids

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """encode of each text as uint32 arrays; far fewer calls into tiktoken than texts."""
        segments = [list(cut_text(clean_text(text))) if len(text) > SEGMENT else [text] for text in texts]
        arrays = iter(list(chain.from_iterable(map(self._encode_joined, _groups(chain.from_iterable(segments))))))
        return [np.concatenate([next(arrays) for _ in parts]) if len(parts) > 1 else next(arrays)
                for parts in segments]

    def _encode_joined(self, texts: list[str]) -> list[np.ndarray]:
        # The special token between two texts keeps them apart exactly; where a text has it typed, each goes alone.
        joined = clean_text(END_OF_TEXT.join(texts))
        if joined.count(END_OF_TEXT) != len(texts) - 1:
            return [np.array(self.encode(text), dtype=np.uint32) for text in texts]
        ids = self.encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        ends = np.flatnonzero(ids == self.end_of_text_id).tolist()
        return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)], strict=True)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """encode of each text, on all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [ids.tolist() for arrays in pool.map(self.encode_arrays, _groups(texts)) for ids in arrays]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; an id without a token (a model's vocabulary may be padded) gives none."""
        return b"".join(self._bytes[i] if 0 <= i < self.vocab_size else b"" for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens, with U+FFFD where the bytes are no whole character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes as characters: printable Latin-1 as itself, the others as U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class StreamDecoder:
    """Text of tokens as they come, whole characters only: half of one waits for its other half."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self.tokenizer.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is left, U+FFFD for half a character; the decoder is then ready for another text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


# Control characters as pictures, so that nothing a model or a file says can steer the terminal or hide text.
HARMLESS = {code: 0x2400 + code for code in range(32)} | {code: 0xFFFD for code in range(0x80, 0xA0)}
HARMLESS |= {code: 0xFFFD for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # right-to-left overrides
HARMLESS |= {code: 0xFFFD for code in range(0xD800, 0xE000)}  # in names of files that are not UTF-8
HARMLESS |= {0x7F: 0x2421, ord("\r"): None, ord("\n"): "\n", ord("\t"): "\t"}


def harmless(text: str) -> str:
    """Text without control characters other than newline and tab: escape sequences become visible and do nothing."""
    return text.translate(HARMLESS)


# ------------------------------------------------------------------------------------------------- chat format

ROLES = ("system", "user", "assistant", "tool")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim) + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + '\n' }}{% endif %}"
)


def render_chat(tokenizer: Tokenizer, messages: list[Message],
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """ChatML token ids of a conversation, and a mask: 1 on what the assistant says and the token that ends it.

    The ids are those of CHAT_TEMPLATE's text, save that special tokens typed in a message stay text.
    """
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise InputError(f"a message needs a role ({', '.join(ROLES)}) and a text as content, not {message!r:.80}")
    contents = tokenizer.encode_arrays([message["content"].strip() for message in messages])
    pieces, lengths, learnt = _chat_pieces(tokenizer, messages, contents)
    if add_generation_prompt:
        pieces.append(tokenizer._headers["assistant"])
        lengths.append(len(pieces[-1]))
        learnt.append(0)
    ids = np.concatenate(pieces).tolist() if pieces else []
    return ids, np.repeat(np.array(learnt, np.uint8), lengths).tolist()


def _chat_pieces(tokenizer: Tokenizer, messages: list[Message],
                 contents: list[np.ndarray]) -> tuple[list[np.ndarray], list[int], list[int]]:
    """The ids in pieces, then the lengths of the mask's runs and what each run is.

    A header ends in a newline after a letter and a content starts without a blank: a safe cut, so that header and
    content can be encoded apart.
    """
    pieces, lengths, learnt = [], [], []
    for message, content in zip(messages, contents, strict=True):
        header = tokenizer._headers[message["role"]]
        pieces += [header, content, tokenizer._turn_end]
        lengths += [len(header), len(content) + 1, len(tokenizer._turn_end) - 1]
        learnt += [0, int(message["role"] == "assistant"), 0]
    return pieces, lengths, learnt


# ----------------------------------------------------------------------------------------------------- records


@dataclass
class Record:
    """One training record: the messages of a chat, or text. Of a long text's parts the first opens, the last closes."""

    text: str = ""
    messages: Optional[list[Message]] = None
    opens: bool = True
    closes: bool = True


@dataclass
class ReadReport:
    """What reading found; reasons and notes are one line each, ready to be shown."""

    records: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)  # of the first five skipped
    notes: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def skip(self, where: str, reason: str) -> None:
        self.skipped += 1
        if len(self.reasons) < 5:
            self.reasons.append(f"{where}: {reason}")


class BadRecord(Exception):
    """Why a record cannot be used."""


SPEAKERS = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool",
}


def _text(value: object, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"{what} is {_kind(value)}, not a text")
    if UNDECODABLE in value:
        raise BadRecord(f"{what} has bytes that are not text in the file's encoding")
    return clean_text(value.replace("\r\n", "\n"))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _content(message: dict) -> str:
    value = message.get("content", message.get("value"))
    if isinstance(value, list):  # OpenAI's list of parts
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            raise BadRecord("a message has parts that are not text")
        value = "".join(part["text"] for part in value)
    text = _text(value, "a message's content")
    if not text.strip() and message.get("tool_calls"):
        return clean_text(json.dumps(message["tool_calls"], ensure_ascii=False))
    return text


def _chat(messages: list[Message], record: dict) -> Record:
    """Checks a conversation and puts the record's system text and tools into its system message."""
    extra = [_text(record.get("system"), "system")]
    if tools := record.get("tools"):
        tools = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        extra.append("" if tools.strip() in ("[]", "{}", "null") else "Tools:\n" + clean_text(tools.strip()))
    system = "\n\n".join(part.strip() for part in extra if part.strip())
    if system and messages and messages[0]["role"] == "system":
        system = f"{messages[0]['content']}\n\n{system}"
        messages = messages[1:]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRecord("no answer of an assistant")
    for message in messages:
        if not message["content"].strip():
            raise BadRecord("empty answer" if message["role"] == "assistant" else f"empty {message['role']} message")
    return Record(messages=messages)


def _from_messages(turns: object, record: dict) -> Record:
    if not isinstance(turns, list):
        raise BadRecord(f"the conversation is {_kind(turns)}, not an array")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecord(f"a message is {_kind(turn)}, not an object")
        speaker = turn.get("role", turn.get("from"))
        if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
            raise BadRecord(f"unknown role {speaker!r:.40}")
        turns[i] = {"role": SPEAKERS[speaker.lower()], "content": _content(turn)}  # never two copies of a million
    return _chat(turns, record)


def _from_pair(question: str, answer: str, record: dict) -> Record:
    messages, history = [], record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRecord("history must hold pairs of question and answer")
    for turn in history:
        messages += [{"role": "user", "content": _text(turn[0], "a question in history")},
                     {"role": "assistant", "content": _text(turn[1], "an answer in history")}]
    return _chat([*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], record)


def _from_alpaca(record: dict) -> Record:
    parts = [_text(record["instruction"], "instruction"), _text(record.get("input"), "input")]
    question = "\n".join(part.strip() for part in parts if part.strip())
    return _from_pair(question, _text(record["output"], "output"), record)


def _from_columns(question: str, answer: str) -> Callable[[dict], Record]:
    return lambda record: _from_pair(_text(record[question], question), _text(record[answer], answer), record)


def _from_text(record: dict) -> Record:
    text = _text(record["text"], "text")
    if not text.strip():
        raise BadRecord("empty text")
    return Record(text)


# The keys that tell a form of record, and its reader. The first row whose keys are all there is taken.
FORMS: tuple[tuple[tuple[str, ...], Callable[[dict], Record]], ...] = (
    (("messages",), lambda record: _from_messages(record["messages"], record)),
    (("conversations",), lambda record: _from_messages(record["conversations"], record)),
    (("instruction", "output"), _from_alpaca),
    (("prompt", "completion"), _from_columns("prompt", "completion")),
    (("query", "response"), _from_columns("query", "response")),
    (("question", "answer"), _from_columns("question", "answer")),
    (("text",), _from_text),
)


def to_record(value: object) -> Record:
    """The record of one parsed JSON value or table row. BadRecord says why there is none."""
    if isinstance(value, list):
        return _from_messages(value, {})
    if not isinstance(value, dict):
        raise BadRecord(f"it is {_kind(value)}, not an object")
    for keys, read in FORMS:
        if all(value.get(key) is not None for key in keys):
            try:
                return read(value)
            except RecursionError:
                raise BadRecord(TOO_DEEP) from None
    keys = ", ".join([key for key, item in value.items() if item is not None][:5])
    keys = " ".join(keys.split())  # a reason is one line
    raise BadRecord(f"no known form of record; its keys are: {keys:.80}" if keys else "an empty object")


# ------------------------------------------------------------------------------------------------------- files

JSON = json.JSONDecoder()
TOO_DEEP = "nested too deeply"
TOO_MANY_BRACKETS = "more than two million brackets"
RECORD_LIMIT = 1 << 26  # characters of one JSON record; a longer one is skipped
BRACKET_LIMIT = 1 << 21  # of a JSON record, for the same reason: as an object in memory each takes up to 200 bytes
BLOCK = 1 << 20  # bytes or characters read at once
UNDECODABLE = "\udcff"  # stands for a byte that is not text in the file's encoding; no decoder gives it otherwise
codecs.register_error("mark-undecodable", lambda error: (UNDECODABLE, error.end))


class UnusableFile(Exception):
    """Why a file cannot be read at all."""


class ByteSource(io.RawIOBase):
    """The bytes of a file, inflated where it is gzip. Damage ends the file there, with the reason in `damage`."""

    def __init__(self, path: Path, report: ReadReport):
        self.raw, self.report, self.before = open(path, "rb"), report, report.bytes_read
        self.zipped = self.raw.read(2) == b"\x1f\x8b"
        self.raw.seek(0)
        self.inflated = gzip.GzipFile(fileobj=self.raw) if self.zipped else self.raw
        self.damage = ""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        return self.inflated.seek(position, whence)

    def tell(self) -> int:
        return self.inflated.tell()

    def readinto(self, buffer) -> int:
        try:
            read = self.inflated.read1 if self.zipped else self.inflated.read  # read drops what came before damage
            data = read(min(len(buffer), BLOCK))
        except (OSError, EOFError, zlib.error) as error:
            self.damage = "its gzip data is cut off or damaged" if self.zipped else f"reading fails ({error.strerror})"
            return 0
        packed, inflated = self.raw.tell(), self.inflated.tell()
        if self.zipped and inflated > 1 << 26 and inflated > 250 * packed:  # text shrinks some 3 to 20 times
            raise UnusableFile("its gzip data grows more than 250 times: a zip bomb?")
        self.report.bytes_read = self.before + packed
        buffer[:len(data)] = data
        return len(data)

    def close(self) -> None:
        self.inflated.close()
        self.raw.close()
        super().close()


def _encoding_of(stream: io.BufferedReader, is_json: bool) -> str:
    """utf-8, utf-16, utf-32 or gb18030, judged by the first stretch that is more than ASCII."""
    block = stream.read(BLOCK)
    for mark, name in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                       (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if block.startswith(mark):
            return name
    head = block[:1 << 16]
    if not is_json and len(re.findall(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", head)) * 50 > len(head):
        raise UnusableFile("looks like a binary file")
    while block.isascii() and (following := stream.read(BLOCK)):
        block = following
    foreign = sum(len(run) for run in re.findall(rb"[\x80-\xff]+", block))
    for name in ("utf-8", "gb18030"):
        decoder = codecs.getincrementaldecoder(name)("mark-undecodable")
        if decoder.decode(block).count(UNDECODABLE) * 50 <= foreign:
            return name
    if is_json:
        return "utf-8"  # each line is judged alone
    raise UnusableFile("neither UTF-8, UTF-16 nor GB18030 text, or a binary file")


def _read_json_lines(stream: io.BufferedReader, encoding: str) -> Iterator[tuple[int, object]]:
    """(line number, parsed value or BadRecord) of each line that is not blank."""
    lines: Iterable = stream
    if encoding in ("utf-16", "utf-32"):
        lines = io.TextIOWrapper(stream, encoding, "mark-undecodable")
    number = 0
    while line := lines.readline(RECORD_LIMIT):
        number += 1
        if len(line) == RECORD_LIMIT and line[-1:] not in (b"\n", "\n"):
            while (rest := lines.readline(BLOCK)) and rest[-1:] not in (b"\n", "\n"):
                pass
            yield number, BadRecord(f"longer than {RECORD_LIMIT >> 20} MB")
            continue
        if not line.strip():
            continue
        if _has_too_many_brackets(line):
            yield number, BadRecord(TOO_MANY_BRACKETS)
            continue
        try:
            if isinstance(line, bytes):
                line = _decode_line(line, encoding)
            yield number, json.loads(line)
        except UnicodeDecodeError:
            yield number, BadRecord("not valid UTF-8 text")
        except RecursionError:
            yield number, BadRecord(TOO_DEEP)
        except ValueError as error:
            yield number, BadRecord(f"broken JSON ({getattr(error, 'msg', error)})")


def _has_too_many_brackets(text: Union[bytes, str]) -> bool:
    brackets = (b"{", b"[") if isinstance(text, bytes) else ("{", "[")
    return len(text) > BRACKET_LIMIT and sum(map(text.count, brackets)) > BRACKET_LIMIT


def _decode_line(line: bytes, encoding: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        if encoding != "gb18030":
            raise
        return line.decode(encoding)


def _parse_value(text: str, at: int) -> tuple[object, int, str]:
    """The JSON value that starts there and where it ends, or why there is none and how far it could be one."""
    # Making the error counts all lines before it: cheap only in a short part, and junk makes many errors.
    for size in (1 << 12, 1 << 16, 1 << 20, len(text)):
        part = text[at:at + size]
        if _has_too_many_brackets(part):
            return None, at, TOO_MANY_BRACKETS
        try:
            value, end = JSON.raw_decode(part)
            return value, at + end, ""
        except RecursionError:
            return None, at, TOO_DEEP
        except ValueError as error:
            reason, reached = str(getattr(error, "msg", error)), getattr(error, "pos", 0)
        if reached < len(part) - 64 and not reason.startswith("Unterminated"):
            return None, at + reached, f"broken JSON ({reason})"
        if at + size >= len(text):
            break
    return None, len(text), f"broken JSON ({reason})"


def _read_json_values(stream: io.BufferedReader, encoding: str) -> Iterator[tuple[int, object]]:
    """(line number, value or BadRecord) of a JSON array's elements, or of objects one after the other.

    Parsed over a sliding buffer. After a broken element reading goes on at the next object that is a record.
    """
    text = io.TextIOWrapper(stream, encoding, "mark-undecodable")
    between = re.compile(r"[\s,\]]*")
    # Megabytes of junk without line ends would hold millions of candidates: after a while only line starts are tried.
    candidate, at_line_start = re.compile(r"[,\n][ \t\r]*(?:(?={)|\Z)"), re.compile(r"\n[ \t\r]*(?:(?={)|\Z)")
    buffer, line, counted, ended, lost, misses = text.read(BLOCK), 1, 0, False, False, 0
    at = re.compile(r"\s*\[?").match(buffer).end()
    while True:
        if lost:
            found = (candidate if misses < 10_000 else at_line_start).search(buffer, at)
            keep, at = found.span() if found else (len(buffer), len(buffer))  # what marks a candidate stays with it
        else:
            keep = at = between.match(buffer, at).end()
        more = at == len(buffer)
        if not more:
            value, end, reason = _parse_value(buffer, at)
            if reason and end == len(buffer):
                more = not ended and len(buffer) - at < RECORD_LIMIT
                reason = "cut off" if ended else f"longer than {RECORD_LIMIT >> 20} MB"
            misses += 100 if reason == TOO_DEEP else 1
        if more:
            if ended:
                return
            line += buffer.count("\n", counted, keep)
            following = text.read(max(BLOCK, len(buffer) - keep))
            buffer, at, counted, ended = buffer[keep:] + following, 0, 0, not following
            continue
        line, counted = line + buffer.count("\n", counted, at), at
        if not reason:
            try:
                record = to_record(value)
            except BadRecord as error:
                record = error
            if not lost or isinstance(record, Record):
                yield line, record
                lost, at, misses = False, end, 0
                continue
        elif not lost:
            yield line, BadRecord(reason)
            lost = True


def _read_table(stream: io.BufferedReader, encoding: str) -> Iterator[tuple[int, object]]:
    """(line number, row or BadRecord) of a table with a line of column names, divided by commas or tabs."""
    text = io.TextIOWrapper(stream, encoding, "mark-undecodable", newline="")
    header = text.readline(BLOCK)
    csv.field_size_limit(RECORD_LIMIT)
    names = next(csv.reader([header], delimiter="\t" if "\t" in header else ","), [])
    rows = csv.reader(text, delimiter="\t" if "\t" in header else ",")
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num + 1, BadRecord(f"broken table ({error})")
            continue
        if row:
            yield rows.line_num + 1, {name.strip(): _cell(name, cell) for name, cell in zip(names, row, strict=False)}


def _cell(name: str, cell: str) -> object:
    if name.strip() not in ("messages", "conversations", "history") or _has_too_many_brackets(cell):
        return cell
    try:
        return json.loads(cell or "null")
    except (ValueError, RecursionError):
        return cell


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UnusableFile("reading .parquet needs the package pyarrow: pip install pyarrow") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        raise UnusableFile(f"damaged parquet ({str(error).splitlines()[0]:.80})") from None


def _read_text(stream: io.BufferedReader, encoding: str, report: ReadReport, name: str) -> Iterator[Record]:
    """One document in parts of about a million characters, cut where the tokens stay as they are."""
    text = io.TextIOWrapper(stream, encoding, "mark-undecodable")
    rest, opens, undecodable, empty = "", True, 0, True
    while block := text.read(BLOCK):
        if UNDECODABLE in block:
            undecodable += block.count(UNDECODABLE)
            block = block.replace(UNDECODABLE, "")
        empty = empty and not block.strip()
        rest += block
        if len(rest) > BLOCK and not empty:
            *parts, rest = cut_text(rest)
            yield Record("".join(parts), opens=opens, closes=False)
            opens = False
    if empty:
        raise UnusableFile("empty file")
    yield Record(rest, opens=opens)
    if undecodable:
        report.notes.append(f"{name}: {undecodable} bytes that are not {encoding} text were left out")


def _is_json(sample: str, suffix: str) -> bool:
    return suffix in (".json", ".jsonl", ".ndjson") or bool(re.match(r'\s*(\{\s*"|\[\s*[\[{])', sample))


def _is_json_lines(sample: str, suffix: str) -> bool:
    """Whether each line is a record, rather than an array or objects printed over several lines."""
    first, _, rest = sample.lstrip().partition("\n")
    if not _is_json(sample, suffix):
        return False
    if not rest:
        return first.startswith("{")
    try:
        return not isinstance(json.loads(first), list) or bool(rest.strip())
    except RecursionError:
        return first.startswith("{")
    except ValueError:
        return first.rstrip().endswith("}") or not first.startswith(("{", "["))


def _is_table(sample: str, suffix: str) -> bool:
    names = {name.strip(' "\r') for name in re.split("[,\t]", sample.partition("\n")[0])}
    return (suffix in (".csv", ".tsv") or len(names) > 1) and any(names.issuperset(keys) for keys, _ in FORMS)


# How a file is read: the first row whose test holds for the start of its text. What fits none is one text document.
READERS = ((_is_json_lines, _read_json_lines), (_is_json, _read_json_values), (_is_table, _read_table))


def _read_file(path: Path, report: ReadReport) -> Iterator[Record]:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    try:
        with open(path, "rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        if is_parquet:
            yield from _checked(_read_parquet(path), str(path), report)
            report.bytes_read += path.stat().st_size
            return
        source = ByteSource(path, report)
        with io.BufferedReader(source, BLOCK) as stream:
            start, head = 0, stream.read(1 << 16)
            while not head.strip(b" \t\r\n\xef\xbb\xbf"):  # a file may begin with megabytes of blank lines
                start += len(head)
                head = stream.read(1 << 16)
                if not head:
                    raise UnusableFile(source.damage or "empty file")
            stream.seek(start)
            encoding = _encoding_of(stream, _is_json(head.decode("utf-8-sig", "replace"), suffix))
            sample = codecs.getincrementaldecoder(encoding)("replace").decode(head)
            stream.seek(start)
            for test, read in READERS:
                if test(sample, suffix):
                    yield from _checked(read(stream, encoding), str(path), report)
                    break
            else:
                for record in _read_text(stream, encoding, report, str(path)):
                    report.records += record.closes
                    yield record
            if source.damage:
                report.skip(str(path), source.damage)
    except UnusableFile as error:
        report.skip(str(path), str(error))
    except OSError as error:
        report.skip(str(path), f"cannot be read ({error.strerror})")


def _checked(values: Iterator[tuple[int, object]], name: str, report: ReadReport) -> Iterator[Record]:
    for line, value in values:
        try:
            if isinstance(value, BadRecord):
                raise value
            record = value if isinstance(value, Record) else to_record(value)
        except BadRecord as error:
            report.skip(f"{name}:{line}", str(error))
        else:
            report.records += 1
            yield record


def find_files(paths: Paths) -> list[Path]:
    """The files that paths name, in order: a file, a folder with all below it save hidden ones, a glob."""
    files: list[Path] = []
    for name in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(name).expanduser()
        try:
            if path.is_dir():
                found = [p for p in sorted(path.rglob("*")) if p.is_file()
                         and not any(part.startswith(".") for part in p.relative_to(path).parts)]
                missing = "the folder holds no files"
            elif path.exists():
                found, missing = [path] if path.is_file() else [], "neither a file nor a folder"
            else:
                found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
                missing = "no such file or folder"
        except OSError as error:
            found, missing = [], f"cannot be read ({error.strerror})"
        if not found:
            raise InputError(f"{name}: {missing}")
        files += found
    if not files:
        raise InputError("no training data given")
    return list(dict.fromkeys(files))


def read_records(paths: Paths, report: ReadReport) -> Iterator[Record]:
    """All usable records of the files, in order. What is skipped goes into the report; nothing usable: InputError."""
    files = find_files(paths)
    for path in files:
        yield from _read_file(path, report)
    if not report.records:
        if report.skipped == 1:
            raise InputError(report.reasons[0])
        raise InputError(f"no usable record among {report.skipped}; the first: {report.reasons[0]}" if report.reasons
                         else f"{files[0]}: no records in it")


# ---------------------------------------------------------------------------------------------- prepared cache

CACHE_VERSION = 2  # a change of what lies in the cache makes old ones unknown instead of wrong
TEXT, CHAT = 0, 1
ARRAYS = {"tokens.bin": None, "supervised.bin": np.uint8, "documents.bin": np.int64, "kinds.bin": np.uint8,
          "checksums.bin": np.uint32}


@dataclass
class Prepared:
    """A corpus as tokens on disk: documents one after the other, opened as memory maps.

    tokens (N,) uint16 or uint32; supervised (N,) uint8, 1 where a token is to be learnt as a target; documents
    (documents + 1,) int64 offsets; kinds (documents,) TEXT or CHAT; checksums (documents,) crc32 of their tokens.
    `bytes` counts the UTF-8 bytes of all tokens.
    """

    tokenizer: Tokenizer
    report: ReadReport
    bytes: int
    tokens: np.ndarray
    supervised: np.ndarray
    documents: np.ndarray
    kinds: np.ndarray
    checksums: np.ndarray

    @property
    def is_chat(self) -> bool:
        """Whether there is any chat in the corpus."""
        return bool((self.kinds == CHAT).any())

    def split(self, name: str, context_length: int, seed: int = 0, vary_copies: bool = False) -> "Packed":
        """The rows of "train" or "val" at a context length; see _split for who goes where."""
        starts, stops, kinds = _split(self)[name]
        return Packed(self, starts, stops, kinds, context_length, seed, vary_copies and self.is_chat)


def _split(prepared: Prepared) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ranges and kinds of each split, the same whenever the corpus is the same.

    Of 20 documents and more, those whose checksum is a multiple of 20 are for validation; of fewer, the last tenth
    of each text and the last of several chats.
    """
    starts, stops, kinds = prepared.documents[:-1], prepared.documents[1:], prepared.kinds
    if len(kinds) >= 20:
        held = prepared.checksums % 20 == 0
        if held.all() or not held.any():  # never so for a real corpus, but both sides must have something
            held = prepared.checksums == prepared.checksums.min()
            if held.all():
                held = np.arange(len(kinds)) == len(kinds) - 1
        return {"train": (starts[~held], stops[~held], kinds[~held]), "val": (starts[held], stops[held], kinds[held])}
    chats, texts = np.flatnonzero(kinds == CHAT), kinds == TEXT
    cuts = np.where(texts, stops - np.maximum(1, (stops - starts) // 10), stops)
    # A validation part starts with the last token of the training part, which it does not have to predict.
    train, val = [starts, cuts, kinds], [np.where(texts, cuts - 1, starts), stops, kinds]
    held, trained = texts.copy(), np.ones(len(kinds), dtype=bool)
    if len(chats) > 1:
        held[chats[-1]], trained[chats[-1]] = True, False
    elif not texts.any():
        held[:] = True  # the one chat there is; prepare notes it
    return {"train": tuple(a[trained] for a in train), "val": tuple(a[held] for a in val)}


def prepare(paths: Paths, tokenizer: Union[Tokenizer, str, None], vocab_size: Optional[int],
            cache_dir: Union[str, Path], progress: Progress = None) -> Prepared:
    """The corpus as tokens, from cache_dir where it lies there already for the same content and tokenizer.

    tokenizer: one at hand, the name of a tiktoken encoding, or None: one is trained on this corpus, of vocab_size
    tokens or a size chosen from the corpus. InputError where nothing is usable or the cache cannot be written.
    """
    if tokenizer is not None and vocab_size is not None:
        raise InputError("vocab_size is for a tokenizer trained on the corpus; this one has a size of its own")
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer.named(tokenizer)
    files, cache_dir = find_files(paths), Path(cache_dir)
    total = sum(path.stat().st_size for path in files)
    content = _fingerprint(files, total, progress)
    if tokenizer is None:
        vocab_size = vocab_size or min(max(2 ** round(1 + math.log2(max(total, 1)) / 2), 512), 32768)  # 2 sqrt(bytes)
        trained = cache_dir / f"{_key(content, PATTERN, vocab_size)}.json"
        tokenizer = _open_tokenizer(trained)
        if tokenizer is None:
            tokenizer = Tokenizer.train(_sample_texts(files, total, progress), vocab_size)
            with _aside(cache_dir) as aside:
                (aside / trained.name).write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
                (aside / trained.name).replace(trained)
    folder = cache_dir / _key(content, tokenizer.to_dict())
    prepared = _open_cache(folder, tokenizer)
    if prepared is None:
        with _aside(cache_dir) as aside:
            (aside / "arrays").mkdir()
            _tokenise(files, total, tokenizer, aside / "arrays", progress)
            try:
                (aside / "arrays").rename(folder)
            except OSError:
                if _open_cache(folder, tokenizer) is None:  # else another process was first
                    folder.rename(aside / "damaged")
                    (aside / "arrays").rename(folder)
        prepared = _open_cache(folder, tokenizer)
    if prepared is None:
        raise InputError(f"{folder}: the prepared data is damaged as soon as written; is the disk sound?")
    if prepared.kinds.tolist() == [CHAT]:
        prepared.report.notes.append("there is only one conversation: validation repeats what is trained on")
    return prepared


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([CACHE_VERSION, *parts]).encode(), digest_size=12).hexdigest()


@contextmanager
def _aside(cache_dir: Path) -> Iterator[Path]:
    """A folder to write in, gone at the end; what cannot be written is an InputError."""
    folder = cache_dir / f"tmp-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache_dir)
        folder.mkdir()
        yield folder
    except OSError as error:
        raise InputError(f"{cache_dir}: cannot write the prepared data ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(files: list[Path], total: int, progress: Progress) -> list:
    entries, done = [], 0
    for path in files:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    done += len(block)
                    if progress:
                        progress(done, total, "checking")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        entries.append([digest.hexdigest(), "".join(path.suffixes[-2:])])
    return entries


def _sample_texts(files: list[Path], total: int, progress: Progress) -> Iterator[str]:
    """Texts for training a tokenizer: all of a small corpus, an even part of a large one."""
    report, due = ReadReport(), 0.0
    share = min(1.0, TRAINING_SAMPLE / max(1, total))
    for record in read_records(files, report):
        if progress:
            progress(report.bytes_read, total, "training the tokenizer")
        # A role is a word of every turn: each should be one token.
        messages = record.messages or [{"content": record.text}]
        for text in (text for message in messages for text in message.values()):
            for segment in cut_text(text):
                due += share * len(segment)
                if due >= len(segment) * 0.999:
                    due -= len(segment)
                    yield segment


def _tokenise(files: list[Path], total: int, tokenizer: Tokenizer, folder: Path, progress: Progress) -> None:
    """Writes the arrays and meta.json of a cache. Reading goes on while other threads encode."""
    report = ReadReport()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    lengths, kinds, checksums = array("q", [0]), array("B"), array("I")
    checks, length, checksum, corpus_bytes = [0, 0], 0, 0, 0
    workers = min(os.cpu_count() or 1, 16)  # each holds some 10 MB
    with (open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "supervised.bin", "wb") as supervised_file,
          ThreadPoolExecutor(workers) as pool):
        waiting: deque = deque()
        groups = _record_groups(read_records(files, report))
        while True:
            group = next(groups, None)
            if group:
                waiting.append(pool.submit(_encode_records, tokenizer, group, dtype))
            elif not waiting:
                break
            if group and len(waiting) <= 2 * workers:
                continue
            ids, supervised, parts, size = waiting.popleft().result()
            for i, (file, values) in enumerate(((tokens_file, ids), (supervised_file, supervised))):
                file.write(values)
                checks[i] = zlib.crc32(values, checks[i])
            corpus_bytes += size
            start = 0
            for count, kind, closes in parts:
                checksum = zlib.crc32(ids[start:start + count], checksum)
                start, length = start + count, length + count
                if closes:
                    lengths.append(length)
                    kinds.append(kind)
                    checksums.append(checksum)
                    length = checksum = 0
            if progress:
                progress(min(report.bytes_read, total), total, "tokenising")
    small = {"documents.bin": np.cumsum(lengths, dtype=np.int64), "kinds.bin": kinds, "checksums.bin": checksums}
    for name, values in small.items():
        (folder / name).write_bytes(values.tobytes())
        checks.append(zlib.crc32(values))
    meta = {"version": CACHE_VERSION, "dtype": dtype.name, "bytes": corpus_bytes, "report": asdict(report),
            "crc32": dict(zip(ARRAYS, checks, strict=True))}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _record_groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group, size = [], 0
    for record in records:
        group.append(record)
        size += 64 + (len(record.text) if record.messages is None else sum(len(m["content"]) for m in record.messages))
        if size >= BLOCK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_records(tokenizer: Tokenizer, records: list[Record], dtype: np.dtype) -> tuple:
    """(ids, supervised, [(tokens, kind, whether the document ends there)], UTF-8 bytes) of a group of records."""
    texts: list[str] = []
    for record in records:
        texts += [record.text] if record.messages is None else [m["content"].strip() for m in record.messages]
    encoded, end = iter(tokenizer.encode_arrays(texts)), np.array([tokenizer.end_of_text_id], np.uint32)
    pieces, lengths, learnt, parts = [], [], [], []
    for record in records:
        first = len(lengths)
        if record.messages is None:
            body = next(encoded)
            pieces += [end] * record.opens + [body] + [end] * record.closes
            lengths += [int(record.opens), len(body) + record.closes]
            learnt += [0, 1]
        else:
            chat = _chat_pieces(tokenizer, record.messages, [next(encoded) for _ in record.messages])
            for whole, part in zip((pieces, lengths, learnt), chat, strict=True):
                whole += part
        parts.append((sum(lengths[first:]), TEXT if record.messages is None else CHAT, record.closes))
    ids = np.concatenate(pieces)
    supervised = np.repeat(np.array(learnt, np.uint8), lengths)
    sizes = (tokenizer.token_byte_lengths[ids[at:at + BLOCK]] for at in range(0, len(ids), BLOCK))  # 12 bytes each
    return ids.astype(dtype), supervised, parts, sum(int(part.sum()) for part in sizes)


def _open_tokenizer(path: Path) -> Optional[Tokenizer]:
    try:
        return Tokenizer.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, InputError):
        return None


def _open_cache(folder: Path, tokenizer: Tokenizer) -> Optional[Prepared]:
    """The prepared data in a folder, or None where any of it is missing or not as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["version"] != CACHE_VERSION:
            return None
        arrays = {}
        for name, dtype in ARRAYS.items():
            check = 0
            with open(folder / name, "rb") as file:  # through the map, each page would count as memory in use
                while block := file.read(BLOCK):
                    check = zlib.crc32(block, check)
            if check != meta["crc32"][name]:
                return None
            arrays[name.removesuffix(".bin")] = np.memmap(folder / name, dtype=dtype or meta["dtype"], mode="r")
        return Prepared(tokenizer=tokenizer, report=ReadReport(**meta["report"]), bytes=meta["bytes"], **arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_leftovers(cache_dir: Path) -> None:
    """Removes what processes that died have left: those of this machine at once, others after a day."""
    for path in cache_dir.glob("tmp-*"):
        host, _, pid = path.name.removeprefix("tmp-").rpartition("-")[0].rpartition("-")
        try:
            alive = time.time() - path.stat().st_mtime < 86400
            if os.name == "posix" and host == platform.node():
                os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            alive = False
        except OSError:  # another user's process, or gone meanwhile
            alive = True
        if not alive:
            shutil.rmtree(path, ignore_errors=True)


def masked_sample(prepared: Prepared) -> list[tuple[str, bool]]:
    """Spans of one chat (of a text where there is none), at most 512 tokens, each with whether it is learnt."""
    chats = np.flatnonzero(prepared.kinds == CHAT)
    document = int(chats[0]) if len(chats) else 0
    start, stop = prepared.documents[document:document + 2].tolist()
    stop = min(stop, start + 512)
    flags = prepared.supervised[start:stop]
    edges = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), stop - start]
    return [(prepared.tokenizer.decode(prepared.tokens[start + a:start + b].tolist()), bool(flags[a]))
            for a, b in zip(edges[:-1], edges[1:], strict=True)]


# ----------------------------------------------------------------------------------------------------- packing

# Tokens that may stand in for each other in a copy: Chinese words, words after a blank, other words and their parts.
WORDS = tuple(map(re.compile, (r"[\u4e00-\u9fff]+", r" [^\W\d_]+", r"[^\W\d_]+")))
PADDING = 0.025  # share of slots that may stay empty before pieces are cut to fill them
NO_TARGET = -100  # ignored by the loss, as in torch.nn.functional.cross_entropy


@dataclass
class Batch:
    """input_ids and targets (B, T) int64, targets NO_TARGET where there is nothing to learn.

    documents (B, T) int32 numbers the piece a slot belongs to inside its row, -1 for padding. It is None where each
    row is one piece: then plain causal attention is right.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    documents: Optional[torch.Tensor]


class Packed:
    """One split as rows of context_length slots, in which pieces of documents lie side by side.

    A piece of n tokens fills n - 1 slots: what is fed and what is to be predicted. Each row of each epoch is a
    function of (seed, epoch, index) alone, so that a resume needs no state.
    """

    def __init__(self, prepared: Prepared, starts: np.ndarray, stops: np.ndarray, kinds: np.ndarray,
                 context_length: int, seed: int = 0, vary_copies: bool = False):
        if context_length < 2:
            raise InputError(f"context_length must be at least 2, not {context_length}")
        self.prepared, self.context_length, self.seed = prepared, context_length, seed % 2**32
        self._tokens, self._supervised = np.asarray(prepared.tokens), np.asarray(prepared.supervised)
        slots = stops - starts - 1
        long = slots > context_length
        texts, chats = long & (kinds == TEXT), long & (kinds == CHAT)
        # Runs are (first token, slots, first token of the system message put before, its slots).
        whole = np.stack([starts, slots, starts, np.zeros_like(starts)], 1)[~long].astype(np.int64)
        self._short_texts = ((kinds == TEXT) & (slots > 1))[~long].astype(np.int64)
        turns = [part for start, stop in zip(starts[chats].tolist(), stops[chats].tolist(), strict=True)
                 for part in self._cut_chat(start, stop)]
        self._fixed = np.concatenate([whole, np.array(turns, dtype=np.int64).reshape(-1, 4)])
        self._long_texts = starts[texts].astype(np.int64), slots[texts].astype(np.int64)
        self._plan_epoch, self._plan = -1, None
        self._vary, self._word_kinds = vary_copies, None

    def _cut_chat(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Parts of a long chat, each starting at a user's turn, with the conversation's system message before it."""
        context = self.context_length
        headers = {role: ids.tolist() for role, ids in self.prepared.tokenizer._headers.items()}
        ids = self._tokens[start:stop]
        messages = np.flatnonzero(ids == self.prepared.tokenizer.im_start_id).tolist()

        def says(message: int, role: str) -> bool:
            return ids[message:message + len(headers[role])].tolist() == headers[role]

        system = messages[1] if len(messages) > 1 and says(0, "system") else 0
        if system > context // 2:
            system = 0
        turns = [system] + [m for m in messages if m > system and says(m, "user")]
        ends = turns[1:] + [len(ids)]
        i = 0
        while i < len(turns):
            j = i
            while j + 1 < len(turns) and ends[j + 1] - turns[i] - 1 + system <= context:
                j += 1
            for first in range(turns[i], ends[j] - 1, context):
                last = min(first + context, ends[j] - 1)
                fits = first == turns[i] and last - first + system <= context
                if self._supervised[start + first + 1:start + last + 1].any():
                    yield start + first, last - first, start, system if fits else 0
            i = j + 1

    def _pieces(self, epoch: int) -> np.ndarray:
        """(pieces, 4) runs of this epoch. Long texts are cut at other places each time.

        In every second epoch short texts go without the end-of-text token before them, as most prompts come.
        """
        starts, slots = self._long_texts
        fixed = self._fixed
        if epoch % 2 and self._short_texts.any():
            fixed = fixed.copy()
            fixed[:len(self._short_texts), :2] += np.outer(self._short_texts, (1, -1))
        if not len(starts):
            return fixed
        first = np.random.default_rng([self.seed, epoch, 1]).integers(1, self.context_length + 1, len(starts))
        counts = 1 + -(-(slots - first) // self.context_length)
        which = np.repeat(np.arange(len(starts)), counts)
        number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = np.where(number == 0, 0, first[which] + (number - 1) * self.context_length)
        end = np.minimum(first[which] + number * self.context_length, slots[which])
        windows = np.stack([starts[which] + begin, end - begin, starts[which], np.zeros_like(begin)], 1)
        return np.concatenate([fixed, windows])

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces, which of them lie in each row one row after the other, and where each row begins in that."""
        if self._plan_epoch != epoch:
            pieces = self._pieces(epoch)
            rng = np.random.default_rng([self.seed, epoch])
            sizes = pieces[:, 1] + pieces[:, 3]
            order = rng.permutation(len(pieces))
            order = order[np.argsort(-sizes[order], kind="stable")]  # by size, shuffled among equals
            histogram = np.bincount(sizes, minlength=self.context_length + 1)
            next_of = np.cumsum(histogram[::-1])[::-1] - histogram  # where the pieces of each size start in order
            tables = []
            for bins, content in best_fit(histogram, self.context_length):
                columns = []
                for size, times in content:
                    columns.append(order[next_of[size]:next_of[size] + bins * times].reshape(bins, times))
                    next_of[size] += bins * times
                tables.append(np.concatenate(columns, 1))
            members = np.concatenate([table.ravel() for table in tables])
            lengths = np.concatenate([np.full(len(table), table.shape[1]) for table in tables])
            row_of = np.repeat(np.arange(len(lengths)), lengths)
            pieces, members, row_of = self._fill_gaps(pieces, members, row_of, rng)
            names, row_of = np.unique(row_of, return_inverse=True)
            row_of = rng.permutation(len(names))[row_of]
            by_row = np.argsort(row_of, kind="stable")
            offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
            self._plan, self._plan_epoch = (pieces, members[by_row], offsets), epoch
        return self._plan

    def _fill_gaps(self, pieces: np.ndarray, members: np.ndarray, row_of: np.ndarray,
                   rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where pieces fit badly side by side, takes some rows apart to fill the gaps of the others.

        Their pieces are cut where a user's turn starts if that is near, else where the gap ends. Other rows are
        taken apart in each epoch, so that each piece is whole in most of them.
        """
        context = self.context_length
        sizes = (pieces[:, 1] + pieces[:, 3])[members]
        gaps = context - np.bincount(row_of, sizes).astype(np.int64)
        if gaps.sum() <= PADDING * gaps.size * context:
            return pieces, members, row_of
        order = rng.permutation(len(gaps))
        ascending = order[np.argsort(gaps[order], kind="stable")]
        small = ascending[:np.searchsorted(np.cumsum(gaps[ascending]), PADDING * gaps.size * context)]
        wanted = np.where(gaps > context // 32, gaps, 0)
        wanted[small] = 0
        wanted = wanted[order]
        donors = int(np.searchsorted(np.cumsum(context - gaps[order]) + np.cumsum(wanted), wanted.sum()))
        is_donor = np.zeros(len(gaps), dtype=bool)
        is_donor[order[:donors]] = True
        given = is_donor[row_of]
        if not donors:
            return pieces, members, row_of
        starts, slots = pieces[members[given], 0], pieces[members[given], 1]  # without the system message before
        ends = np.cumsum(slots)
        marks = np.union1d(self._user_turns(starts, slots), [0, *ends]).tolist()
        fillers = order[donors:][wanted[donors:] > 0]
        cuts, done = [], 0
        for gap in chain(gaps[fillers].tolist(), repeat(context)):  # what is left over makes rows of its own
            stop = min(done + gap, marks[-1])
            near = marks[bisect_right(marks, stop) - 1]
            done = near if near > done and stop - near <= context // 32 else stop
            cuts.append(done)
            if done == marks[-1]:
                break
        rows = np.concatenate([fillers[:len(cuts)], len(gaps) + np.arange(max(0, len(cuts) - len(fillers)))])
        edges = np.union1d(cuts, ends)
        begins = np.concatenate([[0], edges[:-1]])
        piece = np.searchsorted(ends, begins, "right")
        parts = np.zeros((len(edges), 4), dtype=np.int64)
        parts[:, 0], parts[:, 1] = starts[piece] + begins - (ends - slots)[piece], edges - begins
        return (np.concatenate([pieces, parts]),
                np.concatenate([members[~given], len(pieces) + np.arange(len(parts))]),
                np.concatenate([row_of[~given], rows[np.searchsorted(cuts, begins, "right")]]))

    def _user_turns(self, starts: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Where a user's turn starts in the slots of these pieces laid end to end."""
        tokenizer = self.prepared.tokenizer
        source = _ranges(starts, slots)
        turns = np.flatnonzero(self._tokens[source] == tokenizer.im_start_id)
        for i, token in enumerate(tokenizer._headers["user"]):
            turns = turns[self._tokens[source[turns] + i] == token]
        return turns

    def rows(self, epoch: int) -> int:
        """How many rows the epoch has; cutting texts at other places may change it by a few."""
        return len(self._planned(epoch)[2]) - 1

    def batch(self, epoch: int, row_indices: Sequence[int]) -> Batch:
        """The rows of these indices, from 0 to rows(epoch) - 1."""
        pieces, members, offsets = self._planned(epoch)
        indices = np.asarray(row_indices, dtype=np.int64)
        counts = offsets[indices + 1] - offsets[indices]
        chosen = pieces[members[_ranges(offsets[indices], counts)]]  # (pieces of the batch, 4)
        row = np.repeat(np.arange(len(indices)), counts)
        sizes = chosen[:, 1] + chosen[:, 3]
        before = np.cumsum(sizes) - sizes
        place = row * self.context_length + before - np.repeat(before[np.cumsum(counts) - counts], counts)
        runs, run_lengths = chosen[:, [2, 0]].ravel(), chosen[:, [3, 1]].ravel()
        source = _ranges(runs, run_lengths)
        slot = _ranges(place, sizes)
        shape = len(indices), self.context_length
        input_ids = np.full(shape, self.prepared.tokenizer.end_of_text_id, dtype=np.int64)
        targets = np.full(shape, NO_TARGET, dtype=np.int64)
        input_ids.reshape(-1)[slot] = self._tokens[source]
        source += 1
        targets.reshape(-1)[slot] = np.where(self._supervised[source], self._tokens[source].astype(np.int64), NO_TARGET)
        documents = np.full(shape, -1, dtype=np.int32)
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        documents.reshape(-1)[slot] = np.repeat(number, sizes)
        if self._vary:
            self._vary_copies(epoch, indices, input_ids, targets, documents)
        return Batch(torch.from_numpy(input_ids), torch.from_numpy(targets),
                     torch.from_numpy(documents) if counts.max() > 1 else None)

    def _vary_copies(self, epoch: int, indices: np.ndarray, input_ids: np.ndarray, targets: np.ndarray,
                     documents: np.ndarray) -> None:
        """Swaps words of copies for other words, alike in question and answer, for others in each epoch.

        A copy is a chat whose last answer says what was said before it: 70 % of its pairs of neighbouring tokens (a
        first word has other tokens where no blank is before it), two at least, and the last one. With the same words
        in each epoch it would be learnt by heart; so changed, only copying helps.
        """
        for row, index in enumerate(indices.tolist()):
            numbers, starts = np.unique(documents[row], return_index=True)
            ends, rng = [*starts[1:].tolist(), self.context_length], None
            for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True):
                common = self._copied(input_ids[row, start:end], targets[row, start:end]) if number >= 0 else None
                if common is not None:
                    rng = rng or np.random.default_rng([self.seed, epoch, 2, index])
                    self._swap_words(rng, common, input_ids[row, start:end], targets[row, start:end])

    def _copied(self, input_ids: np.ndarray, targets: np.ndarray) -> Optional[np.ndarray]:
        """The tokens that the last answer of a copy has in common with what came before; None for all else."""
        learnt = np.flatnonzero((targets >= 0) & (targets != self.prepared.tokenizer.im_end_id))
        if not 3 <= len(learnt) < len(targets) - 2:
            return None
        first = learnt[np.flatnonzero(np.diff(learnt, prepend=-2) > 1)[-1]]  # where the last answer starts
        before, answer = input_ids[:first + 1].tolist(), targets[first:learnt[-1] + 1].tolist()
        said = set(zip(before, before[1:], strict=False))
        copied = [pair in said for pair in zip(answer, answer[1:], strict=False)]
        if not copied or not copied[-1] or sum(copied) < max(2, 0.7 * len(copied)):
            return None
        return np.intersect1d(before, answer)

    def _swap_words(self, rng: np.random.Generator, common: np.ndarray, input_ids: np.ndarray,
                    targets: np.ndarray) -> None:
        """Swaps a random share of the words among these tokens wherever they stand in one document."""
        kinds = self._kinds_of_words()
        common = common[kinds[common] > 0]
        swapped = np.arange(len(kinds))
        for token in common[rng.random(len(common)) < rng.random()].tolist():
            swapped[token] = rng.choice(np.flatnonzero(kinds == kinds[token]))
        input_ids[:] = swapped[input_ids]
        targets[:] = np.where(targets >= 0, swapped[targets], targets)

    def _kinds_of_words(self) -> np.ndarray:
        """(V,) which of WORDS each token is, from 1; 0 for digits, punctuation and parts of characters."""
        if self._word_kinds is None:
            tokenizer = self.prepared.tokenizer
            texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
            self._word_kinds = np.array([next((number for number, pattern in enumerate(WORDS, 1)
                                               if pattern.fullmatch(text)), 0) for text in texts])
        return self._word_kinds

    def supervised_bytes(self, targets: torch.Tensor) -> int:
        """UTF-8 bytes of the targets that carry loss: bits per byte = nats / ln 2 / bytes."""
        ids = targets[targets != NO_TARGET].cpu().numpy()
        return int(self.prepared.tokenizer.token_byte_lengths[ids].sum())


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, `lengths` of them, one range after the other."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def best_fit(histogram: np.ndarray, capacity: int) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """Packs histogram[size] pieces of each size into bins: [(bins filled alike, ((size, times in one bin), ...))].

    The longest first, each into the fullest bin that has room (Krell et al. 2021, arXiv 2107.02027, algorithm 1);
    bins filled alike are handled at once, so that the time depends on the sizes and not on the pieces.
    """
    open_bins: list[list] = [[] for _ in range(capacity + 1)]  # by room left
    open_bins[capacity] = [(int(histogram.sum()), ())]
    rooms = [capacity]  # those of open_bins that are not empty, ascending
    for size in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[size])
        while left:
            room = rooms[bisect_left(rooms, size)]
            bins, content = open_bins[room].pop()
            times = min(room // size, left)
            used = min(bins, left // times)
            left -= used * times
            filled = used, room - size * times, (*content, (size, times))
            for count, rest, inside in ((bins - used, room, content), filled):
                if count:
                    if not open_bins[rest] and rest not in rooms:
                        insort(rooms, rest)
                    open_bins[rest].append((count, inside))
            if not open_bins[room]:
                rooms.remove(room)
    return [entry for entries in open_bins for entry in entries if entry[1]]


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """(B, T) numbers of documents to a (B, 1, T, T) float32 mask to add: 0 where a slot may see another, else -inf.

    A slot sees itself and what stands before it in its own document; padding sees the padding before it.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    causal = torch.ones(documents.shape[1], documents.shape[1], dtype=torch.bool, device=documents.device).tril()
    return torch.zeros_like(same, dtype=torch.float32).masked_fill_(~(same & causal), float("-inf"))
