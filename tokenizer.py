"""Text to token ids and back: byte-level BPE, and ChatML for conversations.

    tokenizer = Tokenizer.train(texts, vocab_size=4096)
    ids, mask = render_chat(tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True)
"""

import base64
import binascii
import codecs
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Iterable, Iterator

import numpy as np
import tiktoken

from model import InputError

Message = dict[str, str]  # role and content

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
HAN = re.compile(r"[\u3400-\u9fff]")
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
        """A new vocabulary of at most `vocab_size` tokens, the three special ones included, learnt from texts.

        No token has more than two Chinese characters.
        """
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
        room = vocab_size - len(SPECIAL_TOKENS)
        spare = room // 2 if HAN.search("".join(alphabet)) else 0  # for those left out below
        trainer = trainers.BpeTrainer(
            vocab_size=len(symbols) + room + spare - len(ranks), min_frequency=2,
            show_progress=False, initial_alphabet=symbols, limit_alphabet=len(symbols))
        trainable.train_from_iterator((piece for part in parts for piece in uncovered.split(part)), trainer)
        for token, _ in sorted(trainable.get_vocab().items(), key=lambda item: item[1]):
            # Chinese has no blanks between words: a longer token is mostly a phrase, and a question in other words
            # shares none with those learnt from. This takes 1 % more tokens for poems, 4 % for the default corpus.
            if len(HAN.findall(token)) <= 2 and len(ranks) < room:
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

    def token_texts(self) -> list[str]:
        """The text of each token by itself, by id."""
        return [self.decode([token]) for token in range(self.vocab_size)]


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
    pieces, lengths, learnt = chat_pieces(tokenizer, messages, contents)
    if add_generation_prompt:
        pieces.append(tokenizer._headers["assistant"])
        lengths.append(len(pieces[-1]))
        learnt.append(0)
    ids = np.concatenate(pieces).tolist() if pieces else []
    return ids, np.repeat(np.array(learnt, np.uint8), lengths).tolist()


def chat_pieces(tokenizer: Tokenizer, messages: list[Message],
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
