"""readers.py: every form of record, refusals, hostile input."""

import csv
import gzip
import json
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import readers
from model import InputError
from readers import ReadReport, read_records

ROOT = Path(__file__).resolve().parent.parent


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
    monkeypatch.setattr(readers, "BLOCK", block)  # so that elements lie across the ends of the buffer
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
    monkeypatch.setattr(readers, "RECORD_LIMIT", 1000)
    monkeypatch.setattr(readers, "BLOCK", 300)
    records = [{"text": "short"}, {"text": "long " * 400}, {"text": "after"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "b.json").write_text(json.dumps(records))
    assert read(tmp_path / "a.jsonl", skipped=1) == ["short", "after"]
    assert read(tmp_path / "b.json", skipped=1) == ["short", "after"]
    (tmp_path / "c.csv").write_text("id,text\n" + "".join(f"1,{record['text']}\n" for record in records))
    assert read(tmp_path / "c.csv", skipped=1) == ["short", "after"]


def test_a_record_of_brackets_alone_is_skipped_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BRACKET_LIMIT", 1 << 17)
    good, bad = '{"text": "good"}', '{"messages": [' + "{}," * (1 << 18) + "{}]}"
    loads = json.loads
    monkeypatch.setattr(readers.json, "loads", lambda text: loads(text) if len(text) < 1 << 18 else 1 / 0)
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    (tmp_path / "b.json").write_text(f"[{good},\n{bad},\n{good}]")
    (tmp_path / "c.csv").write_text(f'id,messages,text\n1,"{bad[13:-1]}",\n2,,good\n')
    for name, count in (("a.jsonl", 2), ("b.json", 2), ("c.csv", 1)):
        assert read(tmp_path / name, skipped=1) == ["good"] * count
