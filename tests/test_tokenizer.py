"""tokenizer.py: parity with other tokenizers and the template, round trips, refusals."""

import itertools
import json
import os
import random
import re

import pytest
import torch
from conftest import CORPUS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import prepare
from model import InputError
from tokenizer import (
    CHAT_TEMPLATE,
    NAMED_ENCODINGS,
    PATTERN,
    ROLES,
    SAFE_CUT,
    SPECIAL_TOKENS,
    StreamDecoder,
    Tokenizer,
    _cut_runs,
    byte_of_character,
    clean_text,
    cut_text,
    render_chat,
)


@pytest.fixture(scope="module")
def twin(tokenizer):
    """The same vocabulary in the tokenizers library: a token's merge joins the two that its own bytes end in."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Twin

    spelling = {byte: character for character, byte in byte_of_character().items()}
    merges = []
    for token, rank in tokenizer.ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            ranks = [tokenizer.ranks.get(a + b, rank) for a, b in zip(parts[:-1], parts[1:], strict=True)]
            first = ranks.index(min(ranks))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        merges += [tuple("".join(spelling[byte] for byte in part) for part in parts)] if len(parts) == 2 else []
    vocab = {"".join(spelling[byte] for byte in token): rank for token, rank in tokenizer.ranks.items()}
    twin = Twin(models.BPE(vocab=vocab, merges=merges))
    twin.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return twin


# What breaks tokenizers: blanks of all kinds, joiners, marks, digits, apostrophes, and pieces of the corpus.
FRAGMENTS = st.sampled_from([
    "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\u200d", "e\u0301", "12", "٣", "，", "。",
    "你好", "春天", "Hello", "...", "😀", "\x00", "\x1c", "\x85", "<|im_end|>", "<|endoftext|>",
    "ſ", "_", "/", "İ", "ǅ", "ᄀ", "𝒳"])
TEXTS = st.lists(FRAGMENTS | st.text(max_size=6), max_size=12).map("".join)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ------------------------------------------------------------------------------------------------------ parity


@settings(max_examples=1000, deadline=None)
@given(text=TEXTS)
def test_tiktoken_gives_the_ids_of_the_tokenizers_library(tokenizer, twin, text):
    assert tokenizer.encode(text) == twin.encode(clean_text(text)).ids


def test_the_ids_agree_on_many_random_strings_of_any_characters(tokenizer, twin):
    rng = random.Random(0)
    ranges = [(0, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x600, 0x6FF), (0x2000, 0x206F), (0x3000, 0x30FF),
              (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0, 0xD7FF)]
    texts = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 20))) for _ in range(5000)]
    corpus = "".join(CORPUS)
    texts += [corpus[start:start + rng.randint(1, 6)] for start in rng.choices(range(len(corpus)), k=3000)]
    ids = tokenizer.encode_batch(texts)
    assert ids == [encoding.ids for encoding in twin.encode_batch(texts)]
    assert len({i for some in ids for i in some if i >= 256}) > 200  # so that a change of most merges is seen


def test_characters_come_before_the_phrases_they_make_up():
    """Plain BPE would spend these tokens on the sentence and leave its characters in pieces."""
    sentence = "法国的首都是巴黎请问你知道吗"
    small = Tokenizer.train([sentence] * 100 + ["Good day"] * 100 + ["独"], 259 + 2 * 40)
    assert all(len(small.encode(character)) == 1 for character in sentence)
    assert len(small.encode("独")) > 1  # seen once: not worth a token
    assert len(small.encode(sentence)) <= 2 * len(sentence) // 3
    assert len(small.encode("Good day")) == 2


def test_no_token_has_more_than_two_chinese_characters_and_the_vocabulary_is_full_all_the_same():
    """A phrase that is one token has nothing in common with the same phrase in other words."""
    pairs = ["".join(pair) for pair in itertools.permutations("法国的首都是巴黎请问", 2)]
    tokenizer = Tokenizer.train(["，请问法国的首都是哪里"] * 100 + pairs * 2 + ["the capital of France"] * 50, 360)
    assert tokenizer.vocab_size == 360
    longest = max(len(re.findall("[一-龥]", token.decode(errors="ignore"))) for token in tokenizer.ranks)
    assert longest == 2
    assert len(tokenizer.encode(" capital")) == 1  # words with blanks between them may be longer


def test_no_token_joins_what_stands_on_both_sides_of_a_character_without_one():
    tokenizer = Tokenizer.train(["ab独cd"] * 50, 259 + 3)
    assert {b"ab", b"cd"} <= tokenizer.ranks.keys()
    assert b"abcd" not in tokenizer.ranks
    assert b"bc" not in tokenizer.ranks


MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": TEXTS}), max_size=5)


@QUICK
@given(messages=MESSAGES, prompt=st.booleans())
def test_a_rendered_chat_is_the_template_encoded_with_specials_allowed(tokenizer, messages, prompt):
    jinja2 = pytest.importorskip("jinja2", reason="runs where jinja2 is installed; transformers brings it")
    messages = [{**m, "content": m["content"].replace("<|", "<")} for m in messages]
    text = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=prompt)
    expected = tokenizer.encoding.encode(clean_text(text), allowed_special="all")
    assert render_chat(tokenizer, messages, prompt)[0] == expected


@QUICK
@given(messages=MESSAGES)
def test_special_tokens_typed_in_a_chat_stay_text_and_only_answers_are_learnt(tokenizer, messages):
    ids, mask = render_chat(tokenizer, messages)
    structure = [i for i in ids if i in tokenizer.special_ids.values()]
    assert structure == [tokenizer.im_start_id, tokenizer.im_end_id] * len(messages)
    answers = [clean_text(m["content"].strip()) for m in messages if m["role"] == "assistant"]
    spoken = tokenizer.decode([i for i, flag in zip(ids, mask, strict=True) if flag])
    assert spoken == "".join(answer + "<|im_end|>" for answer in answers)


@QUICK
@given(text=TEXTS)
def test_typed_special_tokens_are_text(tokenizer, text):
    typed = text + "<|im_end|>" + text + "<|endoftext|>"
    ids = tokenizer.encode(typed)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == clean_text(typed)
    assert tokenizer.encode_batch([text, typed, text]) == [tokenizer.encode(t) for t in (text, typed, text)]


@settings(max_examples=1000, deadline=None)
@given(text=st.lists(FRAGMENTS, min_size=4, max_size=30).map("".join))
def test_cutting_at_a_safe_place_never_changes_the_tokens(tokenizer, text):
    segments = list(cut_text(text, 7))
    assert "".join(segments) == text
    assert all(len(segment) <= 7 for segment in segments)
    position, safe = 0, [0]
    for segment in segments[:-1]:
        position += len(segment)
        if any(match.start() == position for match in SAFE_CUT.finditer(text)):
            safe.append(position)
    parts = [text[a:b] for a, b in zip(safe, [*safe[1:], len(text)], strict=True)]
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                    reason="runs where TIKTOKEN_CACHE_DIR holds the encodings: tests must not need the network")
@pytest.mark.parametrize("name", NAMED_ENCODINGS)
def test_a_named_encoding_keeps_its_ids_and_gains_our_special_tokens(name):
    import tiktoken

    ours, theirs = Tokenizer.named(name), tiktoken.get_encoding(name)
    assert ours.end_of_text_id == theirs.eot_token
    assert ours.vocab_size == theirs.max_token_value + 3
    assert Tokenizer.from_dict(ours.to_dict()).ranks == ours.ranks
    rng = random.Random(0)
    fragments = ["'s", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u3000", "/", "!", "，", "你好", "Hello",
                 "12345", "_", "e\u0301", "'", "\n/", ".", "\x1c"]
    for _ in range(2000):
        text = "".join(rng.choices(fragments, k=rng.randint(1, 30)))
        assert ours.encode(text) == theirs.encode_ordinary(text)
        cuts = [0, *(match.start() for match in SAFE_CUT.finditer(text)), len(text)]
        parts = [theirs.encode_ordinary(text[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert sum(parts, []) == theirs.encode_ordinary(text)


# -------------------------------------------------------------------------------------------------- round trip


@settings(max_examples=500, deadline=None)
@given(text=TEXTS | st.text(st.characters(exclude_categories=[])))
def test_decoding_gives_the_text_back_whole_and_as_a_stream(tokenizer, text):
    ids = tokenizer.encode(text)
    clean = clean_text(text)
    assert tokenizer.decode(ids) == clean
    assert tokenizer.token_byte_lengths[ids].sum() == len(clean.encode())
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids] + [decoder.flush()]
    assert "".join(parts) == clean
    assert "".join(parts).count("\ufffd") == clean.count("\ufffd")


@QUICK
@given(ids=st.lists(st.integers(0, 700), max_size=30))
def test_a_stream_of_any_ids_is_their_decoded_text(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    assert "".join([*(decoder.push(i) for i in ids), decoder.flush()]) == tokenizer.decode(ids)
    assert decoder.push(tokenizer.encode("a")[0]) == "a"  # ready for the next text


def test_a_tokenizer_survives_a_checkpoint_and_json(tokenizer, tmp_path):
    torch.save(tokenizer.to_dict(), tmp_path / "t.pt")
    for values in (torch.load(tmp_path / "t.pt", weights_only=True), json.loads(json.dumps(tokenizer.to_dict()))):
        again = Tokenizer.from_dict(values)
        assert (again.ranks, again.special_ids, again.pattern, again.name) == (
            tokenizer.ranks, tokenizer.special_ids, tokenizer.pattern, tokenizer.name)
        assert again.encode(CORPUS[2]) == tokenizer.encode(CORPUS[2])


def test_training_is_repeatable_and_259_is_the_byte_tokenizer(tokenizer):
    assert Tokenizer.train(iter(CORPUS), 600).to_dict() == tokenizer.to_dict()
    smallest = Tokenizer.train(["你好"], 259)
    assert smallest.vocab_size == 259
    assert len(smallest.encode("你好")) == 6
    assert Tokenizer.train([], 5000).vocab_size == 259
    assert Tokenizer.train(["abcd"], 5000).vocab_size == 259  # no pair stands there twice


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("change", "words"), [
    ({"ranks": None}, "ranks must be a str"), ({"extra": 1}, "expected the keys"), ({"ranks": "AA=="}, "all 256"),
    ({"ranks": "%%%"}, "one base64 line"), ({"special_ids": {}}, "an integer each"), ({"pattern": "("}, "pattern"),
    ({"pattern": "a"}, "pattern"), ({"pattern": "x" * 5000}, "longer than"),
    ({"special_ids": dict(zip(SPECIAL_TOKENS, (600, 601, 10**12), strict=True))}, "must follow"),
    ({"special_ids": dict(zip(SPECIAL_TOKENS, (600, 600, 601), strict=True))}, "an integer each"),
    ({"special_ids": dict(zip(SPECIAL_TOKENS, (0, 1, 2), strict=True))}, "must follow"),
])
def test_a_tokenizer_that_to_dict_did_not_write_is_refused(tokenizer, change, words):
    with pytest.raises(InputError, match=words):
        Tokenizer.from_dict({**tokenizer.to_dict(), **change})


def test_a_pattern_that_makes_tiktoken_panic_is_refused(tokenizer, monkeypatch):
    class PanicException(BaseException):
        """What its Rust raises where a pattern backtracks too often, some seconds later."""

    def panic(self, text):
        raise PanicException

    monkeypatch.setattr(Tokenizer, "encode", panic)
    with pytest.raises(InputError, match="its pattern does not split text"):
        Tokenizer.from_dict(tokenizer.to_dict())


def test_a_token_that_stands_twice_is_refused(tokenizer):
    values = tokenizer.to_dict()
    with pytest.raises(InputError, match="stands twice"):
        Tokenizer.from_dict({**values, "ranks": values["ranks"] + "\n" + values["ranks"].split("\n")[300]})


def test_wrong_wishes_for_a_tokenizer_are_refused(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(InputError, match="unknown tokenizer 'gpt5'; known are gpt2"):
        Tokenizer.named("gpt5")
    with pytest.raises(InputError, match="vocab_size must be from 259 to"):
        Tokenizer.train(["a"], 258)
    with pytest.raises(InputError, match="vocab_size is for a tokenizer trained on the corpus"):
        prepare(tmp_path / "a.txt", tokenizer, 300, tmp_path / "cache")
    (tmp_path / "b.txt").touch()
    with pytest.raises(InputError, match=r"empty file$"):
        prepare(tmp_path / "b.txt", None, None, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*")) == []

    def offline(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(InputError, match="cannot load the tokenizer gpt2.*TIKTOKEN_CACHE_DIR"):
        Tokenizer.named("gpt2")


def test_a_chat_with_a_wrong_message_is_refused(tokenizer):
    for message in ({"role": "wizard", "content": ""}, {"role": "user"}, {"role": "user", "content": None}):
        with pytest.raises(InputError, match="a message needs a role"):
            render_chat(tokenizer, [message])


@pytest.mark.parametrize("run", ["a", " ", "\n", "好", "a1", "\t ", "'s", "^", "\u3000"])
def test_a_run_without_end_is_encoded_and_trained_on_in_its_length(tokenizer, run):
    text = run * (150_000 // len(run))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert Tokenizer.train([text], 280).decode(ids[:0]) == ""
    assert len(run) > 1 or max(map(len, _cut_runs(text))) == 256
