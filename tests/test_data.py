"""data.py: the tokenizer against tokenizers, chats against the template, readers, cache and packing."""

import csv
import functools
import gzip
import json
import os
import random
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import data
from data import (
    CHAT,
    CHAT_TEMPLATE,
    NO_TARGET,
    SPECIAL_TOKENS,
    TEXT,
    Packed,
    Prepared,
    ReadReport,
    StreamDecoder,
    Tokenizer,
    best_fit,
    cut_text,
    document_mask,
    masked_sample,
    prepare,
    read_records,
    render_chat,
)
from model import InputError

ROOT = Path(__file__).resolve().parent.parent
CORPUS = [
    "春天来了，花开了，鸟儿在树上唱歌。夏天很热，秋天凉快，冬天会下雪。\n今天是星期一，明天是星期二。",
    "Hello there! It's a fine day, isn't it? We'll walk over the hills, 12 or 345 miles.\n\n  And back.\r\n",
    "def f(x):\n    return x + 1  # naïve café 😀👨‍👩‍👧 ñ ü ß Ж я\n\t\tif x: pass",
    "aaaa bbbb abab    \n\n\n ...!!! -- ==== user assistant system tool\n",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 600)


@pytest.fixture(scope="module")
def twin(tokenizer):
    """The same vocabulary in the tokenizers library: a token's merge joins the two that its own bytes end in."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Twin

    spelling = {byte: character for character, byte in data.byte_of_character().items()}
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
    twin.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(data.PATTERN), "isolated"),
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


@settings(max_examples=3000, deadline=None)
@given(text=TEXTS)
def test_tiktoken_gives_the_ids_of_the_tokenizers_library(tokenizer, twin, text):
    assert tokenizer.encode(text) == twin.encode(data.clean_text(text)).ids


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
    assert len(small.encode(sentence)) < len(sentence) // 2
    assert len(small.encode("Good day")) == 2


def test_no_token_joins_what_stands_on_both_sides_of_a_character_without_one():
    tokenizer = Tokenizer.train(["ab独cd"] * 50, 259 + 3)
    assert {b"ab", b"cd"} <= tokenizer.ranks.keys()
    assert b"abcd" not in tokenizer.ranks
    assert b"bc" not in tokenizer.ranks


MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(data.ROLES), "content": TEXTS}), max_size=5)


@QUICK
@given(messages=MESSAGES, prompt=st.booleans())
def test_a_rendered_chat_is_the_template_encoded_with_specials_allowed(tokenizer, messages, prompt):
    jinja2 = pytest.importorskip("jinja2", reason="runs where jinja2 is installed; transformers brings it")
    messages = [{**m, "content": m["content"].replace("<|", "<")} for m in messages]
    text = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=prompt)
    expected = tokenizer.encoding.encode(data.clean_text(text), allowed_special="all")
    assert render_chat(tokenizer, messages, prompt)[0] == expected


@QUICK
@given(messages=MESSAGES)
def test_special_tokens_typed_in_a_chat_stay_text_and_only_answers_are_learnt(tokenizer, messages):
    ids, mask = render_chat(tokenizer, messages)
    structure = [i for i in ids if i in tokenizer.special_ids.values()]
    assert structure == [tokenizer.im_start_id, tokenizer.im_end_id] * len(messages)
    answers = [data.clean_text(m["content"].strip()) for m in messages if m["role"] == "assistant"]
    spoken = tokenizer.decode([i for i, flag in zip(ids, mask, strict=True) if flag])
    assert spoken == "".join(answer + "<|im_end|>" for answer in answers)


@QUICK
@given(text=TEXTS)
def test_typed_special_tokens_are_text(tokenizer, text):
    typed = text + "<|im_end|>" + text + "<|endoftext|>"
    ids = tokenizer.encode(typed)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == data.clean_text(typed)
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
        if any(match.start() == position for match in data.SAFE_CUT.finditer(text)):
            safe.append(position)
    parts = [text[a:b] for a, b in zip(safe, [*safe[1:], len(text)], strict=True)]
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                    reason="runs where TIKTOKEN_CACHE_DIR holds the encodings: tests must not need the network")
@pytest.mark.parametrize("name", data.NAMED_ENCODINGS)
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
        cuts = [0, *(match.start() for match in data.SAFE_CUT.finditer(text)), len(text)]
        parts = [theirs.encode_ordinary(text[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert sum(parts, []) == theirs.encode_ordinary(text)


# -------------------------------------------------------------------------------------------------- round trip


@settings(max_examples=500, deadline=None)
@given(text=TEXTS | st.text(st.characters(exclude_categories=[])))
def test_decoding_gives_the_text_back_whole_and_as_a_stream(tokenizer, text):
    ids = tokenizer.encode(text)
    clean = data.clean_text(text)
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


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好\n吗？"},
                {"role": "assistant", "content": "好。"}, {"role": "user", "content": "And now?"},
                {"role": "assistant", "content": "Still <|im_end|> fine."}]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
FORMS = {
    "messages": {"messages": CONVERSATION},
    "parts": {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
                           for m in CONVERSATION]},
    "role and content": {"conversations": CONVERSATION},
    "from and value": {"conversations": [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in CONVERSATION]},
    "system apart": {"conversations": CONVERSATION[1:], "system": "Be brief."},
    "alpaca": {"instruction": "And now?", "input": "", "output": "Still <|im_end|> fine.", "system": "Be brief.",
               "history": [["你好\n吗？", "好。"]]},
    "prompt": {"prompt": "And now?", "completion": "Still <|im_end|> fine.", "system": "Be brief.",
               "history": [["你好\n吗？", "好。"]]},
    "query": {"query": "And now?", "response": "Still <|im_end|> fine.", "system": "Be brief.",
              "history": [["你好\n吗？", "好。"]]},
    "question": {"question": "And now?", "answer": "Still <|im_end|> fine.", "system": "Be brief.",
                 "history": [["你好\n吗？", "好。"]]},
}


def usable(path, report: ReadReport) -> list:
    """The texts of a path's records, none where it is refused; a refusal is one line."""
    try:
        return [record.text for record in read_records(path, report)]
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    return []


def read(path, **expected) -> list:
    """The records of a path as texts and lists of messages; expected fields of the report are checked."""
    report = ReadReport()
    records = list(read_records(path, report))
    assert {name: getattr(report, name) for name in expected} == expected
    return [record.text if record.messages is None else record.messages for record in records]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["lines", "array", "printed array", "one object", "gz", "gb18030", "utf-16", "bom"])
def test_every_form_of_record_gives_the_same_conversation(tmp_path, form, shape):
    record, path = FORMS[form], tmp_path / "data.txt"  # the content decides, not the ending
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for _ in range(3))
    written = {"array": json.dumps([record] * 3).encode(), "gz": gzip.compress(lines.encode()),
               "printed array": json.dumps([record] * 3, indent=2, ensure_ascii=False).encode(),
               "one object": json.dumps(record, indent=1).encode(), "gb18030": lines.encode("gb18030"),
               "utf-16": lines.encode("utf-16"), "bom": lines.encode("utf-8-sig")}.get(shape, lines.encode())
    path.write_bytes(written)
    assert read(path, skipped=0) == [CONVERSATION] * (1 if shape == "one object" else 3)


def test_a_column_left_empty_does_not_hide_the_form(tmp_path):
    rows = [{"messages": None, "text": "a"}, {"messages": None, "prompt": "q", "completion": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path, skipped=0) == [
        "a", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]]


def test_tables_are_read_by_their_column_names(tmp_path):
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["instruction", "input", "output"], ["问：\n多行", "", "答, yes"], ["q", "", ""], ["x"]])
    (tmp_path / "b.tsv").write_text("question\tanswer\nq\ta\n", encoding="utf-8")
    (tmp_path / "c.csv").write_text("id,text\n1,\"hello\"\n", encoding="utf-8")
    assert read(tmp_path, records=3, skipped=2) == [
        [{"role": "user", "content": "问：\n多行"}, {"role": "assistant", "content": "答, yes"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "hello"]


def test_a_column_may_have_a_name_of_any_length(tmp_path):
    csv.field_size_limit(1 << 17)  # as it is in a fresh process
    (tmp_path / "a.csv").write_text("text," + "x" * 200_000 + "\ngood,y\n")
    assert read(tmp_path / "a.csv", skipped=0) == ["good"]


def test_parquet_is_read_like_the_rest(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="runs where pyarrow is installed (pip install pyarrow)")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"messages": CONVERSATION}] * 2), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", skipped=0) == [CONVERSATION] * 2


def test_tools_and_their_answers_become_messages(tmp_path):
    record = {"conversations": [{"from": "human", "value": "time?"}, {"from": "function_call", "value": "{}"},
                                {"from": "observation", "value": "noon"}, {"from": "gpt", "value": "It is noon."}],
              "tools": "[{\"name\": \"clock\"}]", "system": "Help."}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert read(tmp_path / "a.json")[0] == [
        {"role": "system", "content": "Help.\n\nTools:\n[{\"name\": \"clock\"}]"}, {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "{}"}, {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "It is noon."}]


def test_files_folders_and_globs_are_found_in_order(tmp_path):
    for name in ("b.txt", "a.txt", ".hidden", "deep/er/c.md", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"in {name}")
    assert read(tmp_path) == ["in a.txt", "in b.txt", "in deep/er/c.md"]
    assert read([tmp_path / "b.txt", tmp_path / "*.txt"]) == ["in b.txt", "in a.txt"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_a_long_text_comes_in_parts_and_whole(tmp_path, encoding):
    text = "第一回 甄士隐梦幻识通灵，贾雨村风尘怀闺秀。\n\n  此开卷第一回也。\n" * 40_000
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    report = ReadReport()
    records = list(read_records(tmp_path / "a.txt", report))
    assert "".join(record.text for record in records) == text
    assert [r.opens for r in records] == [True] + [False] * (len(records) - 1)
    assert [r.closes for r in records] == [False] * (len(records) - 1) + [True]
    assert (len(records) > 1, report.records) == (True, 1)


# ---------------------------------------------------------------------------------------------------- refusals


def refused(path, **options) -> str:
    with pytest.raises(InputError) as caught:
        list(read_records(path, ReadReport(), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_with_nothing_usable_is_refused_in_one_line(tmp_path):
    def file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return refused(tmp_path / name).removeprefix(f"{tmp_path}/")

    noise = random.Random(0).randbytes(5000)
    assert file("a.txt", b"") == "a.txt: empty file"
    assert file("b.txt", b" \r\n\n") == "b.txt: empty file"
    assert file("b2.txt", "\u3000\n".encode()) == "b2.txt: empty file"
    assert file("c.jsonl", b"\xef\xbb\xbf") == "c.jsonl: empty file"
    assert file("d.txt", noise) == "d.txt: looks like a binary file"
    assert file("e.txt", b"caf\xe9 cr\xe8me br\xfbl\xe9e") == (
        "e.txt: neither UTF-8, UTF-16 nor GB18030 text, or a binary file")
    assert file("f.jsonl", b'{"text": 1}\n') == "f.jsonl:1: text is a number, not a text"
    assert file("g.json", b"[]") == "g.json: no records in it"
    assert file("h.txt.gz", gzip.compress(b"hello" * 1000)[:20]) == "h.txt.gz: its gzip data is cut off or damaged"
    assert file("i.jsonl", b"no\njson\n") == (
        f"no usable record among 2; the first: {tmp_path}/i.jsonl:1: broken JSON (Expecting value)")
    assert refused(tmp_path / "none.txt") == f"{tmp_path}/none.txt: no such file or folder"
    assert refused(tmp_path / "*.none") == f"{tmp_path}/*.none: no such file or folder"
    assert refused(os.devnull) == "/dev/null: neither a file nor a folder"
    assert refused([]) == "no training data given"
    (tmp_path / "folder").mkdir()
    assert refused(tmp_path / "folder") == f"{tmp_path}/folder: the folder holds no files"


@pytest.mark.parametrize(("record", "reason"), [
    ({"messages": [{"role": "user", "content": "q"}]}, "no answer of an assistant"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "empty answer"),
    ({"messages": [{"role": "wizard", "content": "q"}]}, "unknown role 'wizard'"),
    ({"messages": "hello"}, "the conversation is a text, not an array"),
    ({"messages": [["q"]]}, "a message is an array, not an object"),
    ({"messages": [{"role": "user", "content": 7}]}, "a message's content is a number, not a text"),
    ({"instruction": "", "output": "a"}, "empty user message"),
    ({"prompt": "q", "completion": "a", "history": ["q"]}, "history must hold pairs of question and answer"),
    ({"prompt": "q", "completion": "a", "history": 5}, "history must hold pairs of question and answer"),
    ({"text": ""}, "empty text"),
    ({"a": 1, "b": 2}, "no known form of record; its keys are: a, b"),
    ({"text": "a\udcff"}, "text has bytes that are not text in the file's encoding"),
    ({"a\nb": 1}, "no known form of record; its keys are: a b"),
    ({}, "an empty object"),
    ({"messages": None, "text": None}, "an empty object"),
    (3, "it is a number, not an object"),
])
def test_a_bad_record_is_skipped_with_its_place_and_reason(tmp_path, record, reason):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n\n{json.dumps(record)}\n{{"text": "also"}}\n')
    assert read(tmp_path / "a.jsonl", records=2, skipped=1, reasons=[f"{tmp_path}/a.jsonl:3: {reason}"]) == [
        "good", "also"]


def test_nesting_that_can_be_read_but_not_written_again_costs_its_record_alone(tmp_path):
    turns = json.dumps(CONVERSATION)
    lines = [f'{{"messages": {turns}, "tools": {"[" * depth + "1" + "]" * depth}}}' for depth in range(800, 1000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "good"}']))
    report = ReadReport()
    assert list(read_records(tmp_path / "a.jsonl", report))[-1].text == "good"
    assert report.records + report.skipped == len(lines) + 1
    assert all(reason.endswith("nested too deeply") for reason in report.reasons)


def test_half_a_surrogate_pair_becomes_the_mark_of_a_lost_character(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800 x \\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl", skipped=0) == ["\ufffd x 😀"]
    assert tokenizer.encode_arrays(["\ud800"])[0].tolist() == tokenizer.encode("\ufffd")


def test_an_odd_file_in_a_folder_does_not_cost_the_others(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.bin").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "c.txt").touch()
    assert read(tmp_path, records=1, skipped=2, reasons=[
        f"{tmp_path}/b.bin: looks like a binary file", f"{tmp_path}/c.txt: empty file"]) == ["good"]


def test_a_file_may_begin_with_megabytes_of_blank_lines(tmp_path):
    for name, content in (("a.jsonl", '{"text": "good"}'), ("a.json", '[{"text": "good"}]'), ("a.txt", "good")):
        (tmp_path / name).write_text("\n" * 3_000_000 + content)
        assert [text.strip() for text in read(tmp_path / name, records=1, skipped=0)] == ["good"]


def test_a_few_bytes_that_are_no_text_are_left_out_and_told(tmp_path):
    (tmp_path / "a.txt").write_bytes("春天来了，花开了。".encode() * 20 + b"\xff\xfe" + "夏天很热。".encode())
    report = ReadReport()
    (record,) = read_records(tmp_path / "a.txt", report)
    assert record.text == "春天来了，花开了。" * 20 + "夏天很热。"
    assert report.notes == [f"{tmp_path}/a.txt: 2 bytes that are not utf-8 text were left out"]


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


# ----------------------------------------------------------------------------------------------------- hostile

JUNK = [b'{"text": "cut', b'{"text": "x"', b"}{", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 300, b'{"text": 5}',
        b"null", b'{"text": "\xff\xfe"}', b'{"text": "\\ud800', b"1" * 5000, b'"text"', b'{"messages": [[[]]]}', b"NaN",
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]}', b",,", b"\xe4\xbd", b"'", b'"',
        b"{]"]


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.sampled_from(JUNK) | st.binary(max_size=30) | st.integers(0, 99), min_size=1, max_size=8),
       ending=st.sampled_from([b"\n", b"\r\n"]))
def test_good_lines_among_any_junk_are_all_kept(tmp_path, parts, ending):
    lines = [json.dumps({"text": f"good 好 {part}"}, ensure_ascii=part % 2 > 0).encode() if isinstance(part, int)
             else part.replace(b"\n", b"") for part in parts]
    content = ending.join(lines)
    assume(not content.startswith((b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PAR1")))  # other kinds of file
    (tmp_path / "a.jsonl").write_bytes(content)
    report, good = ReadReport(), [f"good 好 {part}" for part in parts if isinstance(part, int)]
    assert [text for text in usable(tmp_path / "a.jsonl", report) if text.startswith("good 好")] == good


# Each leaves the brackets and quotes of the array around it in doubt; none holds a record of its own.
BROKEN = ['{"text": "x" "y"}', '{"text": x}', '{"text": "line\nbreak"}', '{"text": "a\\q"}', "{,}", "nonsense",
          '{"text": 5}', '{"messages": [{"role": "user" "content": "q"}, {"role": "assistant", "content": "a"}]}', "{}",
          "[" * 5000, '{"a":' * 5000]


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=st.lists(st.sampled_from(BROKEN) | st.integers(0, 99), min_size=1, max_size=8),
       separator=st.sampled_from([",", ",\n", " ,\n  "]), cut=st.booleans(), block=st.sampled_from([80, 200, 1 << 20]))
def test_good_elements_of_an_array_among_broken_ones_are_all_kept(tmp_path, monkeypatch, parts, separator, cut, block):
    monkeypatch.setattr(data, "BLOCK", block)  # so that elements lie across the ends of the buffer
    elements = [json.dumps({"text": f"good {p}"}) if isinstance(p, int) else p for p in parts]
    text = "[" + separator.join(elements) + (separator + '{"text": "cut o' if cut else "]")
    (tmp_path / "a.json").write_text(text)
    report, good = ReadReport(), [f"good {p}" for p in parts if isinstance(p, int)]
    assert usable(tmp_path / "a.json", report) == good
    assert bool(report.skipped) == (len(good) < len(parts) or cut)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "surrogatepass")),
       start=st.sampled_from([b"", b"[", b"{", b'[{"text":', b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1",
                              b"id,text\n1,"]),
       ending=st.sampled_from(["a.txt", "a.json", "a.jsonl", "a.csv", "a.txt.gz", "a"]))
def test_no_bytes_make_a_reader_raise_anything_but_one_line(tmp_path, content, start, ending):
    (tmp_path / ending).write_bytes(start + content)
    for text in usable(tmp_path / ending, ReadReport()):
        text.encode()


def test_no_generated_file_brings_the_readers_or_the_openers_down():
    """A small run of benchmarks/fuzz.py, which says what is asked of each case and runs ten thousand of them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import fuzz

    kinds = [kind for kind in fuzz.KINDS if kind not in ("transformers", "TorchScript", "ONNX")]  # take long to load
    outcomes = fuzz.run_cases(fuzz.plan(300, kinds), seed=0, sizes=(0.2, 5000), quiet=True)
    print(fuzz.table(outcomes))
    assert [(kind, number, outcome.failure) for kind, found in outcomes.items() for number, outcome in found
            if outcome.failure] == []


def test_a_zip_bomb_is_refused_before_it_fills_memory(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        for _ in range(100):
            file.write(b"a" * (1 << 20))
    assert refused(tmp_path / "a.txt.gz") == (
        f"{tmp_path}/a.txt.gz: its gzip data grows more than 250 times: a zip bomb?")


def test_a_cut_off_gz_keeps_what_came_before(tmp_path):
    rng = random.Random(0)
    lines = [json.dumps({"text": rng.randbytes(40).hex()}) for _ in range(2000)]
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:len(packed) // 2])
    report = ReadReport()
    found = [record.text for record in read_records(tmp_path / "a.jsonl.gz", report)]
    assert 800 < len(found) < 1200
    assert found == [json.loads(line)["text"] for line in lines[:len(found)]]
    assert report.reasons[-1] == f"{tmp_path}/a.jsonl.gz: its gzip data is cut off or damaged"


def test_a_record_past_the_limit_is_skipped_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RECORD_LIMIT", 1000)
    monkeypatch.setattr(data, "BLOCK", 300)
    records = [{"text": "short"}, {"text": "long " * 400}, {"text": "after"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "b.json").write_text(json.dumps(records))
    assert read(tmp_path / "a.jsonl", skipped=1) == ["short", "after"]
    assert read(tmp_path / "b.json", skipped=1) == ["short", "after"]
    (tmp_path / "c.csv").write_text("id,text\n" + "".join(f"1,{record['text']}\n" for record in records))
    assert read(tmp_path / "c.csv", skipped=1) == ["short", "after"]


def test_a_record_of_brackets_alone_is_skipped_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BRACKET_LIMIT", 1 << 17)
    good, bad = '{"text": "good"}', '{"messages": [' + "{}," * (1 << 18) + "{}]}"
    monkeypatch.setattr(data.json, "loads", lambda text, real=json.loads: real(text) if len(text) < 1 << 18 else 1 / 0)
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    (tmp_path / "b.json").write_text(f"[{good},\n{bad},\n{good}]")
    (tmp_path / "c.csv").write_text(f'id,messages,text\n1,"{bad[13:-1]}",\n2,,good\n')
    for name, count in (("a.jsonl", 2), ("b.json", 2), ("c.csv", 1)):
        assert read(tmp_path / name, skipped=1) == ["good"] * count


@pytest.mark.parametrize("run", ["a", " ", "\n", "好", "a1", "\t ", "'s", "^", "\u3000"])
def test_a_run_without_end_is_encoded_and_trained_on_in_its_length(tokenizer, run):
    text = run * (150_000 // len(run))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert Tokenizer.train([text], 280).decode(ids[:0]) == ""
    assert len(run) > 1 or max(map(len, data._cut_runs(text))) == 256


# ------------------------------------------------------------------------------------------------------- cache


def chat_file(path: Path, count: int = 60, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            turns = [{"role": role, "content": f"{i} " + "好 word " * rng.randint(1, 12)}
                     for _ in range(rng.randint(1, 6)) for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path


def contents(prepared: Prepared) -> list:
    return [getattr(prepared, name).tolist() for name in ("tokens", "supervised", "documents", "kinds", "checksums")]


def test_prepared_documents_are_the_rendered_records(tokenizer, tmp_path):
    chat_file(tmp_path / "a.jsonl", 5)
    text = "春天来了。\nSpring is <|im_end|> here. " * 60_000
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "<|endoftext|>"}\n{"text": "short"}')
    prepared = prepare(tmp_path, tokenizer, None, tmp_path / "cache")
    expected = [render_chat(tokenizer, messages) for messages in read(tmp_path / "a.jsonl")]
    for plain in (text, "<|endoftext|>", "short"):
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(plain), tokenizer.end_of_text_id]
        expected.append((ids, [0] + [1] * (len(ids) - 1)))
    for i, (ids, mask) in enumerate(expected):
        start, stop = prepared.documents[i:i + 2]
        assert prepared.tokens[start:stop].tolist() == ids
        assert prepared.supervised[start:stop].tolist() == mask
    assert prepared.kinds.tolist() == [CHAT] * 5 + [TEXT] * 3
    assert prepared.is_chat
    assert prepared.tokens.dtype == np.uint16
    assert prepared.bytes == tokenizer.token_byte_lengths[prepared.tokens].sum()


def test_a_second_start_reads_the_cache_and_a_change_makes_another(tokenizer, tmp_path, monkeypatch):
    path, cache, done = chat_file(tmp_path / "a.jsonl"), tmp_path / "cache", []

    def progress(now, total, what):
        assert 0 <= now <= total
        done.append(what)

    first = prepare(path, None, 400, cache, progress)
    assert set(done) == {"checking", "training the tokenizer", "tokenising"}
    done.clear()
    second = prepare(path, None, 400, cache, progress)
    assert set(done) == {"checking"}
    assert contents(first) == contents(second)
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict()
    assert second.report == first.report
    done.clear()
    prepare(path, first.tokenizer, None, cache, progress)  # as a resume asks for it
    assert set(done) == {"checking"}
    other = chat_file(tmp_path / "b.jsonl", seed=1)
    for options in ((path, None, 262), (path, tokenizer, None), (other, tokenizer, None)):
        done.clear()
        prepare(*options, cache, progress)
        assert "tokenising" in done
    with open(path, "a") as file:
        file.write('{"text": "one more"}')
    assert prepare(path, None, 400, cache).report.records == first.report.records + 1


@pytest.mark.parametrize("name", [*data.ARRAYS, "meta.json", "tokenizer"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_cache_is_made_anew(tmp_path, name, damage):
    path, cache = chat_file(tmp_path / "a.jsonl", 20), tmp_path / "cache"
    before = contents(prepare(path, None, 300, cache))
    (victim,) = cache.glob("*.json" if name == "tokenizer" else f"*/{name}")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content if damage == "changed" else content[:-1])
    if damage == "missing":
        victim.unlink()
    assert contents(prepare(path, None, 300, cache)) == before
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".json"]


def in_another_process(code: str, *args, **options) -> subprocess.CompletedProcess:
    code = f"import sys, os, signal, resource; sys.path.insert(0, {str(ROOT)!r})\nimport data\n{code}"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, **options)


def test_a_killed_preparation_leaves_nothing_after_the_next(tmp_path):
    path, cache = chat_file(tmp_path / "a.jsonl", 20), tmp_path / "cache"
    run = in_another_process("def die(done, total, what):\n"
                             "    if what == 'tokenising': os.kill(os.getpid(), signal.SIGKILL)\n"
                             "data.prepare(sys.argv[1], None, 300, sys.argv[2], die)", path, cache)
    assert run.returncode == -9
    assert len(list(cache.glob("tmp-*"))) == 1
    assert prepare(path, None, 300, cache).report.records == 20
    assert not list(cache.glob("tmp-*"))


def test_two_preparations_at_once_do_no_harm(tmp_path):
    path, cache = chat_file(tmp_path / "a.jsonl", 200), tmp_path / "cache"
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(in_another_process, "data.prepare(sys.argv[1], None, 300, sys.argv[2])", path, cache)
                for _ in range(2)]
    assert [(run.result().returncode, run.result().stderr) for run in runs] == [(0, ""), (0, "")]
    assert prepare(path, None, 300, cache).report.records == 200
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_is_one_line_and_leaves_no_litter(tmp_path):
    path, cache = chat_file(tmp_path / "a.jsonl", 200), tmp_path / "cache"
    run = in_another_process("resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
                             "try: data.prepare(sys.argv[1], None, 300, sys.argv[2])\n"
                             "except data.InputError as error: print(error)", path, cache)
    assert (run.stdout, run.stderr) == (f"{cache}: cannot write the prepared data (File too large)\n", "")
    assert [p.suffix for p in cache.iterdir()] == [".json"]  # the tokenizer still fitted
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write the prepared data \(Not a directory\)"):
        prepare(path, None, 300, tmp_path / "file" / "cache")


def test_a_large_file_is_prepared_in_bounded_memory(tmp_path):
    rng, words = random.Random(0), ["spring", "summer", "autumn", "winter", "天"]
    text = "\n".join(" ".join(rng.choices(words, k=50)) for _ in range(500)) + "\n"
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        for _ in range(60_000_000 // len(text)):
            file.write(text)
    run = in_another_process(
        "tokenizer = data.Tokenizer.train(['spring summer autumn winter 天 '] * 9, 300)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepared = data.prepare(sys.argv[1], tokenizer, None, sys.argv[2])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(prepared.tokens))",
        tmp_path / "a.txt", tmp_path / "cache")
    grown, tokens = map(int, run.stdout.split())
    assert tokens > 10_000_000
    assert grown < 200, f"{grown} MB"


# ------------------------------------------------------------------------------------- splits, packing, masks


def test_the_split_is_by_record_and_the_same_every_time(tokenizer, tmp_path):
    prepared = prepare(chat_file(tmp_path / "a.jsonl", 400), tokenizer, None, tmp_path / "cache")
    splits = data._split(prepared)
    held = {int(start) for start in splits["val"][0]}
    for start, stop, checksum in zip(prepared.documents, prepared.documents[1:], prepared.checksums, strict=False):
        assert checksum == zlib.crc32(prepared.tokens[start:stop])
        assert (int(start) in held) == (checksum % 20 == 0)
    assert 5 < len(held) < 50
    assert len(held) + len(splits["train"][0]) == 400


ONE, TWO = [("q", "one")], [("q", "two")]  # 25 tokens each


@pytest.mark.parametrize(("records", "train", "val", "notes"), [
    (["a" * 300], [272], [31], []),
    (["ab"], [3], [2], []),
    (["a" * 100, ONE], [92, 25], [11], []),
    (["a" * 100, ONE, TWO], [92, 25], [11, 25], []),
    ([ONE, TWO], [25], [25], []),
    ([ONE], [25], [25], ["there is only one conversation: validation repeats what is trained on"]),
    (["same"] * 30, [6] * 29, [6], []),
])
def test_tiny_data_still_gives_two_splits(tmp_path, records, train, val, notes):
    with open(tmp_path / "a.jsonl", "w") as file:
        for record in records:
            file.write(json.dumps({"text": record} if isinstance(record, str) else {
                "messages": [{"role": role, "content": text} for turn in record
                             for role, text in zip(("user", "assistant"), turn, strict=True)]}) + "\n")
    prepared = prepare(tmp_path / "a.jsonl", byte_tokenizer(), None, tmp_path / "cache")
    assert prepared.report.notes == notes
    lengths = {name: (stops - starts).tolist() for name, (starts, stops, _) in data._split(prepared).items()}
    assert lengths == {"train": train, "val": val}
    for name in ("train", "val"):
        packed = prepared.split(name, 16)
        assert (packed.batch(0, range(packed.rows(0))).targets != NO_TARGET).any()


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """A token a byte, so that lengths are plain."""
    return Tokenizer.train([], 259)


def corpus(documents: list, dtype=np.uint32) -> tuple[Prepared, Tokenizer]:
    """Documents given as a length (text) or message lengths (chat), each learnt token with a value of its own."""
    tokenizer = byte_tokenizer()
    ids, supervised, offsets, kinds = [], [], [0], []
    for document in documents:
        kinds.append(TEXT if isinstance(document, int) else CHAT)
        if isinstance(document, int):
            ids += [tokenizer.end_of_text_id, *range(1000 + len(ids) + 1, 1000 + len(ids) + document)]
            supervised += [0] + [1] * (document - 1)
        else:
            for role, length in document:
                ids += tokenizer._headers[role].tolist()
                supervised += [0] * (len(ids) - len(supervised))
                ids += range(1000 + len(ids), 1000 + len(ids) + length)
                supervised += [int(role == "assistant")] * length
        offsets.append(len(ids))
    prepared = Prepared(tokenizer, ReadReport(), 0, np.array(ids, dtype), np.array(supervised, np.uint8),
                        np.array(offsets), np.array(kinds, np.uint8), np.zeros(len(kinds), np.uint32))
    return prepared, tokenizer


TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool", "system"]), st.integers(1, 40)), max_size=8)
CHATS = TURNS.map(lambda turns: [("system", 5), ("user", 3)][len(turns) % 2:] + turns + [("assistant", 4)])


@settings(max_examples=300, deadline=None)
@given(documents=st.lists(st.integers(2, 200) | CHATS, min_size=1, max_size=40), context=st.integers(4, 100),
       seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_every_learnt_token_is_predicted_once_an_epoch_from_the_token_before_it(documents, context, seed, epoch):
    prepared, tokenizer = corpus(documents)
    packed = Packed(prepared, prepared.documents[:-1], prepared.documents[1:], prepared.kinds, context, seed)
    rows = packed.rows(epoch)
    batch = packed.batch(epoch, range(rows))
    assert batch.input_ids.shape == batch.targets.shape == (rows, context)
    targets = batch.targets[batch.targets != NO_TARGET].numpy()
    learnt = prepared.supervised == 1
    if epoch % 2:  # short texts go without the end of text before them, and so nothing foretells their first token
        slots = np.diff(prepared.documents) - 1
        learnt[prepared.documents[:-1][(prepared.kinds == TEXT) & (slots > 1) & (slots <= context)] + 1] = False
    assert sorted(targets.tolist()) == prepared.tokens[learnt].tolist()
    # A target's value tells its place, and no learnt token opens a document: so nothing crosses from one to the next.
    assert (batch.input_ids[batch.targets != NO_TARGET].numpy() == prepared.tokens[targets - 1000 - 1]).all()
    if batch.documents is not None:
        numbers = batch.documents.numpy()
        document_of = np.searchsorted(prepared.documents, np.arange(len(prepared.tokens)), "right")
        for row, own in zip(numbers, batch.targets.numpy(), strict=True):
            used = row[row >= 0]
            assert (row[len(used):] == -1).all()
            assert (np.diff(used) >= 0).all()
            assert set(used.tolist()) == set(range(used.max() + 1))
            for number in range(used.max() + 1):
                values = own[(row == number) & (own != NO_TARGET)]
                assert len(set(document_of[values - 1000].tolist())) <= 1
        assert (batch.targets.numpy()[numbers == -1] == NO_TARGET).all()


@QUICK
@given(documents=st.lists(st.integers(2, 200) | CHATS, min_size=1, max_size=40), context=st.integers(4, 100))
def test_a_row_depends_on_seed_epoch_and_index_alone(documents, context):
    prepared, _ = corpus(documents)
    ranges = prepared.documents[:-1], prepared.documents[1:], prepared.kinds
    one, other = Packed(prepared, *ranges, context, 3), Packed(prepared, *ranges, context, 3)
    whole = one.batch(4, range(one.rows(4)))
    other.batch(2, range(other.rows(2)))  # what was asked before does not matter
    for i in reversed(range(other.rows(4))):
        row = other.batch(4, [i])
        assert torch.equal(row.input_ids[0], whole.input_ids[i])
        assert torch.equal(row.targets[0], whole.targets[i])
        if row.documents is None:
            assert whole.documents is None or (whole.documents[i] <= 0).all()
        else:
            assert torch.equal(row.documents[0], whole.documents[i])


COPIES = ["重复：早上朋友在海边跑步", "把“下雨了快回家”再说一遍", "Repeat after me: the small dog sleeps near the door",
          "Please say exactly this: we sing at night", "说：一 二 三 四"]
ANSWERS = ["早上朋友在海边跑步", "下雨了快回家", "the small dog sleeps near the door", "we sing at night",
           "一 二 三 四"]
OTHERS = [("法国的首都是哪里？", "法国的首都是巴黎。"),
          ("Paris is the capital of which country?", "Paris is the capital of France."),
          ("38+21=?", "38+21: ones 8+1=9, tens 3+2=5, so it is 59."), ("What is 1 2 3 4 5?", "1 2 3 4 5")]
TOLD = "red green blue"  # and asked for later


def copying_corpus(tmp_path):
    pairs = [*zip(COPIES, ANSWERS, strict=True), *OTHERS] * 6
    lines = [json.dumps({"prompt": f"{number} {question}", "completion": answer}, ensure_ascii=False)
             for number, (question, answer) in enumerate(pairs)]
    recalled = [f"my dog is called {TOLD}", f"Hello, {TOLD}!", "What is 1 2 3 4 5?", "1 2 3 4 5", "And my dog?",
                f"Your dog is called {TOLD}"]
    lines += [json.dumps({"messages": [{"role": role, "content": text} for role, text in
                                       zip(["user", "assistant"] * 3, recalled, strict=True)]})] * 6
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = sorted({word for text in [*COPIES, *ANSWERS, TOLD] for word in re.findall("[A-Za-z]+|[一-龥]", text)})
    tokenizer = Tokenizer.train([f" {word}\n{word}" for word in words] * 3, 700)  # none that holds a whole sentence
    return prepare(tmp_path / "chats.jsonl", tokenizer, None, tmp_path / "cache")


def documents_of(batch):
    """(fed, to be learnt) of each document of a batch, as lists of ids."""
    for ids, targets, numbers in zip(batch.input_ids, batch.targets, batch.documents, strict=True):
        for number in range(int(numbers.max()) + 1):
            yield ids[numbers == number].tolist(), targets[numbers == number].tolist()


def test_words_of_a_copy_are_swapped_alike_in_question_and_answer_and_nothing_else_is(tmp_path):
    prepared = copying_corpus(tmp_path)
    plain, varied = (Packed(prepared, prepared.documents[:-1], prepared.documents[1:], prepared.kinds, 256, 0, vary)
                     for vary in (False, True))
    kinds = varied._kinds_of_words()
    changed = recalled = 0
    for epoch in range(4):
        rows = range(plain.rows(epoch))
        for before, after in zip(documents_of(plain.batch(epoch, rows)), documents_of(varied.batch(epoch, rows)),
                                 strict=True):
            swaps = {old: new for part in (0, 1) for old, new in zip(before[part], after[part], strict=True)}
            for part in (0, 1):
                assert [swaps[token] for token in before[part]] == after[part]
            for old, new in swaps.items():
                assert old == new or (kinds[old] == kinds[new] > 0 and old in before[0] and old in before[1])
            if before != after:
                changed += 1
                question = prepared.tokenizer.decode(before[0])
                assert any(copy in question for copy in [*COPIES, TOLD]), question
                recalled += TOLD in question
    assert changed > 60
    assert recalled > 8


def test_varied_copies_depend_on_seed_epoch_and_row_alone(tmp_path):
    prepared = copying_corpus(tmp_path)
    train, again, plain = (prepared.split("train", 64, 5, vary_copies=vary) for vary in (True, True, False))
    rows = range(train.rows(1))
    whole = train.batch(1, rows)
    assert not torch.equal(whole.input_ids, plain.batch(1, rows).input_ids)
    for i in reversed(rows):
        assert torch.equal(again.batch(1, [i]).input_ids[0], whole.input_ids[i])
        assert torch.equal(again.batch(1, [i]).targets[0], whole.targets[i])


def test_epochs_and_seeds_differ_and_one_long_text_is_cut_elsewhere(tokenizer):
    prepared, _ = corpus([5000])
    ranges = prepared.documents[:-1], prepared.documents[1:], prepared.kinds
    starts = [set(packed.batch(epoch, range(packed.rows(epoch))).input_ids[:, 0].tolist())
              for packed in (Packed(prepared, *ranges, 64, 0), Packed(prepared, *ranges, 64, 1)) for epoch in range(2)]
    assert all(len(a & b) < 10 for i, a in enumerate(starts) for b in starts[:i])


def test_a_long_chat_is_split_at_turns_with_its_system_message_in_front():
    chat = [("system", 4), *[("user", 6), ("assistant", 10)] * 5]
    prepared, tokenizer = corpus([chat])
    packed = Packed(prepared, prepared.documents[:-1], prepared.documents[1:], prepared.kinds, 90)
    batch = packed.batch(0, range(packed.rows(0)))
    system = prepared.tokens[:12].tolist()
    user = tokenizer._headers["user"].tolist()
    assert packed.rows(0) == 3
    for row in batch.input_ids.tolist():
        assert row[:12] == system
        assert row[12:12 + len(user)] == user


@pytest.mark.parametrize("context", [64, 128, 256, 512])
def test_padding_stays_below_three_percent_on_chats_that_fit_badly(context):
    rng = random.Random(0)
    chats = [[(role, rng.randint(5, 60)) for _ in range(rng.randint(1, 12)) for role in ("user", "assistant")]
             for _ in range(600)]
    for documents in (chats, [context * 5 // 9] * 500, [context * 7 // 9] * 500):
        prepared, _ = corpus(documents)
        packed = Packed(prepared, prepared.documents[:-1], prepared.documents[1:], prepared.kinds, context)
        batch = packed.batch(0, range(packed.rows(0)))
        assert (batch.documents == -1).float().mean() < 0.03


def test_short_chats_are_never_cut_where_they_fit_well():
    rng = random.Random(0)
    chats = [[("user", rng.randint(1, 30)), ("assistant", rng.randint(1, 30))] for _ in range(800)]
    prepared, tokenizer = corpus(chats)
    packed = Packed(prepared, prepared.documents[:-1], prepared.documents[1:], prepared.kinds, 256)
    batch = packed.batch(0, range(packed.rows(0)))
    before = torch.nn.functional.pad(batch.documents, (1, 0), value=-1)[:, :-1]
    starts = (batch.documents >= 0) & (batch.documents != before)
    assert int(starts.sum()) == 800
    assert (batch.input_ids[starts] == tokenizer.im_start_id).all()


@settings(max_examples=300, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=300))
def test_best_fit_places_each_piece_once_and_overfills_no_bin(sizes):
    histogram = np.bincount(sizes, minlength=51) if sizes else np.zeros(51, dtype=int)
    placed = np.zeros_like(histogram)
    for bins, content in best_fit(histogram, 50):
        assert bins > 0
        assert sum(size * times for size, times in content) <= 50
        for size, times in content:
            placed[size] += bins * times
    assert (placed == histogram).all()


def test_a_million_pieces_are_placed_by_their_sizes_not_one_by_one():
    histogram = np.random.default_rng(0).multinomial(10**9, np.ones(512) / 512)
    bins = best_fit(np.concatenate([[0], histogram]), 512)
    used = sum(count for count, _ in bins)
    assert len(bins) < 3000
    assert 10**9 * 513 / 2 / 512 <= used <= 10**9 * 513 / 2 / 512 * 1.001


def test_a_document_mask_lets_each_slot_see_its_own_past_only():
    documents = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 2, 2, -1, -1]], dtype=torch.int32)
    mask = document_mask(documents)
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                seen = j <= i and documents[b, i] == documents[b, j]
                assert mask[b, 0, i, j] == (0 if seen else float("-inf"))


def test_the_masked_sample_shows_what_is_learnt(tokenizer, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": CONVERSATION}, {"text": "plain"}], ensure_ascii=False))
    (tmp_path / "b.txt").write_text("plain text")
    sample = masked_sample(prepare(tmp_path / "a.json", tokenizer, None, tmp_path / "cache"))
    assert [text for text, learnt in sample if learnt] == ["好。<|im_end|>", "Still <|im_end|> fine.<|im_end|>"]
    assert "".join(text for text, _ in sample).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert masked_sample(prepare(tmp_path / "b.txt", tokenizer, None, tmp_path / "cache")) == [
        ("<|endoftext|>", False), ("plain text<|endoftext|>", True)]


def test_each_role_is_one_token_of_a_tokenizer_trained_on_chats(tmp_path):
    turns = [{"role": role, "content": "你好"} for role in ("system", "user", "assistant")]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns}, ensure_ascii=False) for _ in range(9)), encoding="utf-8")
    tokenizer = prepare([str(path)], None, 320, tmp_path / "cache").tokenizer
    assert all(len(tokenizer.encode(role)) == 1 for role in ("system", "user", "assistant"))
