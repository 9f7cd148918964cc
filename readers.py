"""What users have, as records: JSON in many forms, tables, plain text, recognised by their content.

    report = ReadReport()
    for record in read_records(["my.jsonl", "folder"], report): ...
"""

import codecs
import csv
import glob
import gzip
import io
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional, Sequence, Union

from model import InputError
from tokenizer import Message, clean_text, cut_text

Paths = Union[str, Path, Sequence[Union[str, Path]]]

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
