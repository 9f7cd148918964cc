"""Text in, batches out: the prepared cache and packing; readers.py and tokenizer.py do what comes before.

    prepared = prepare(["my.jsonl"], tokenizer=None, vocab_size=None, cache_dir="cache")
    packed = prepared.split("train", context_length=256)
    batch = packed.batch(epoch=0, row_indices=range(16))

Shapes: B rows of a batch, T context length.
"""

import hashlib
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
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional, Sequence, Union

import numpy as np
import torch

from model import InputError
from readers import BLOCK, Paths, ReadReport, Record, find_files, read_records
from tokenizer import PATTERN, TRAINING_SAMPLE, Tokenizer, chat_pieces, cut_text

Progress = Optional[Callable[[int, int, str], None]]  # done bytes, total bytes, what is being done

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

    Of 20 documents and more, those whose checksum is a multiple of 20 are for validation, but no text where 20 chats or
    more make up most of the corpus; of fewer, the last tenth of each text and the last of several chats.
    """
    starts, stops, kinds = prepared.documents[:-1], prepared.documents[1:], prepared.kinds
    if len(kinds) >= 20:
        # A few texts among chats hold most of the nats, and are learnt by heart while the chats still get better: with
        # them the lowest loss was that of a model which answered 82 % of the held-out questions, the last one 87 %.
        is_chat = kinds == CHAT
        mostly = is_chat.sum() >= 20 and 2 * (stops - starts)[is_chat].sum() > (stops - starts).sum()
        eligible = is_chat if mostly else np.ones(len(kinds), dtype=bool)
        held = eligible & (prepared.checksums % 20 == 0)
        if held[eligible].all() or not held.any():  # never so for a real corpus, but both sides must have something
            held = eligible & (prepared.checksums == prepared.checksums[eligible].min())
            if held[eligible].all():
                held = np.arange(len(kinds)) == np.flatnonzero(eligible)[-1]
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
            chat = chat_pieces(tokenizer, record.messages, [next(encoded) for _ in record.messages])
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


NEIGHBOURS = (-2, -1, 1, 2)  # places, from a token's own


def token_vectors(prepared: Prepared, width: int) -> torch.Tensor:
    """(V, width) float32, of mean square 1: alike for tokens that stand in like places of the training text.

    The largest singular directions of the positive pointwise mutual information of each token with the commonest ones
    at each of NEIGHBOURS (Levy & Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization). What stands
    beside one spelling of a word counts for the others too, so that a rare "Please" starts close to a common " please".
    Words that never occur get random ones. Draws from torch's generator; of a large corpus 8M tokens are read.
    """
    size, total, sample = prepared.tokenizer.vocab_size, len(prepared.tokens), 1 << 23
    spans = range(0, total, max(1, -(-total // 64)))
    length = min(spans.step, sample // 64)
    ids = np.concatenate([prepared.tokens[start:start + length] for start in spans]).astype(np.int64)
    places = np.concatenate([np.arange(start, min(start + length, total)) for start in spans])
    starts, stops, _ = _split(prepared)["val"]
    before = np.searchsorted(starts, places, "right") - 1
    ids[(before >= 0) & (places < stops[before])] = size  # a token of its own, left out below
    contexts = min(size, 1024, (1 << 24) // size)
    rank = np.full(size + 1, contexts)
    common = np.argsort(-np.bincount(ids, minlength=size + 1)[:size], kind="stable")[:contexts]
    rank[common] = np.arange(contexts)
    information, word = torch.zeros(size, len(NEIGHBOURS) * contexts), _words(prepared.tokenizer)
    for number, step in enumerate(NEIGHBOURS):
        token, context = ids[max(0, -step):len(ids) - max(0, step)], rank[ids[max(0, step):len(ids) + min(0, step)]]
        pairs = (token * contexts + context)[(token < size) & (context < contexts)]
        counts = torch.from_numpy(np.bincount(pairs, minlength=size * contexts).reshape(size, contexts)).float()
        counts += torch.zeros_like(counts).index_add_(0, word, counts)[word]
        usual = counts.sum(0) ** 0.75  # so that rare contexts do not outweigh the rest
        ratio = counts / counts.sum(1, keepdim=True).clamp(min=1) / (usual / usual.sum().clamp(min=1)).clamp(min=1e-9)
        information[:, number * contexts:(number + 1) * contexts] = ratio.log().clamp(min=0)
    left, values, _ = torch.svd_lowrank(information, q=min(width, *information.shape))
    vectors = torch.zeros(size, width)
    vectors[:, :left.size(1)] = left * values.sqrt()
    occurs = information.any(1)
    vectors -= vectors[occurs].mean(0)
    vectors[~occurs] = torch.randn(int((~occurs).sum()), width)
    return vectors / vectors.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)


def _words(tokenizer: Tokenizer) -> torch.Tensor:
    """(V,) of each token the first that is the same word, but for capitals and for blanks and quotes around it."""
    first: dict[object, int] = {}
    return torch.tensor([first.setdefault(token if "\ufffd" in text else text.strip(" \"“”'").lower() or text, token)
                         for token, text in enumerate(tokenizer.token_texts())])


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
        headers, ids = self.prepared.tokenizer._headers, self._tokens[start:stop]
        messages = np.flatnonzero(ids == self.prepared.tokenizer.im_start_id).tolist()
        system = messages[1] if len(messages) > 1 and 0 in _places(headers["system"], ids) else 0
        if system > context // 2:
            system = 0
        turns = [system] + [place for place in _places(headers["user"], ids).tolist() if place > system]
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
        return _places(self.prepared.tokenizer._headers["user"], self._tokens[_ranges(starts, slots)])

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

        A copy is a chat whose last answer repeats or recalls what was said before it. With the same words in each epoch
        it would be learnt by heart; so changed, only copying helps.
        """
        for row, index in enumerate(indices.tolist()):
            numbers, starts = np.unique(documents[row], return_index=True)
            ends, rng = [*starts[1:].tolist(), self.context_length], None
            for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True):
                found = self._copied(input_ids[row, start:end], targets[row, start:end]) if number >= 0 else None
                if found is not None:
                    rng = rng or np.random.default_rng([self.seed, epoch, 2, index])
                    self._swap_words(rng, *found, input_ids[row, start:end], targets[row, start:end])

    def _copied(self, input_ids: np.ndarray, targets: np.ndarray) -> Optional[tuple[np.ndarray, np.ndarray]]:
        """Of a copy, the tokens that its last answer has in common with what came before, and which slots (T,) are its.

        An answer repeats if 70 % of its pairs of neighbouring tokens were said before (a first word has other tokens
        where no blank is before it), two at least, and the last one. It recalls if 60 % of its words were told in one
        earlier question and none of these is in its own: "I am Ann." ... "Who am I?" "Your name is Ann."
        Exchanges about other things are none of its slots: a swap would make them untrue. None for all else.
        """
        tokenizer, kinds = self.prepared.tokenizer, self._kinds_of_words()
        learnt = np.flatnonzero((targets >= 0) & (targets != tokenizer.im_end_id))
        if not 3 <= len(learnt) < len(targets) - 2:
            return None
        first = learnt[np.flatnonzero(np.diff(learnt, prepend=-2) > 1)[-1]]  # where the last answer starts
        before, answer = input_ids[:first + 1].tolist(), targets[first:learnt[-1] + 1].tolist()
        said, answered = list(zip(before, before[1:], strict=False)), list(zip(answer, answer[1:], strict=False))
        earlier, later = set(said), set(answered)
        repeated = [pair in earlier for pair in answered]
        turns = _places(tokenizer._headers["user"], input_ids)
        exchange = np.searchsorted(turns, np.arange(len(input_ids)), "right")  # the question and answer of each slot
        if repeated and repeated[-1] and sum(repeated) >= max(2, 0.7 * len(repeated)):
            common = set(before) & set(answer)
            sources = exchange[[place for place, pair in enumerate(said) if pair in later]].tolist()
        else:
            words = {token for token in answer if kinds[token]}
            fed, number, asked = input_ids[:first + 1], exchange[:first + 1], np.append(True, targets[:first] < 0)
            *questions, own = (set(fed[(number == i) & asked].tolist()) for i in range(number[-1] + 1))
            common = max((words & told for told in questions), key=len, default=set())
            if not common or len(common) < 0.6 * len(words) or common & own:
                return None
            sources = [i for i in range(number[-1] + 1) if common <= set(fed[number == i].tolist())]
        return np.array(sorted(common)), np.isin(exchange, [*sources, exchange[first]])

    def _swap_words(self, rng: np.random.Generator, common: np.ndarray, slots: np.ndarray, input_ids: np.ndarray,
                    targets: np.ndarray) -> None:
        """Swaps a random share of the words among these tokens wherever they stand in these slots of a document."""
        kinds = self._kinds_of_words()
        common = common[kinds[common] > 0]
        swapped = np.arange(len(kinds))
        for token in common[rng.random(len(common)) < rng.random()].tolist():
            swapped[token] = rng.choice(np.flatnonzero(kinds == kinds[token]))
        input_ids[slots] = swapped[input_ids[slots]]
        targets[slots] = np.where(targets[slots] >= 0, swapped[targets[slots]], targets[slots])

    def _kinds_of_words(self) -> np.ndarray:
        """(V,) which of WORDS each token is, from 1; 0 for digits, punctuation, parts of characters, common words.

        Those make up the question and the form of the answer more than what is copied.
        """
        if self._word_kinds is None:
            sample = self._tokens[:1 << 23]
            kinds = np.array([next((number for number, pattern in enumerate(WORDS, 1) if pattern.fullmatch(text)), 0)
                              for text in self.prepared.tokenizer.token_texts()])
            kinds[np.bincount(sample, minlength=len(kinds)) > max(200, len(sample) / 2000)] = 0
            self._word_kinds = kinds
        return self._word_kinds

    def supervised_bytes(self, targets: torch.Tensor) -> int:
        """UTF-8 bytes of the targets that carry loss: bits per byte = nats / ln 2 / bytes."""
        ids = targets[targets != NO_TARGET].cpu().numpy()
        return int(self.prepared.tokenizer.token_byte_lengths[ids].sum())


def _places(part: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where `part` stands in the ids, ascending."""
    found = np.flatnonzero(ids[:max(0, len(ids) - len(part) + 1)] == part[0])
    for i, token in enumerate(part[1:], 1):
        found = found[ids[found + i] == token]
    return found


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
