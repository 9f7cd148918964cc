"""data.py: the cache, splits, packing, masks."""

import functools
import json
import random
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import CHAT, NO_TARGET, TEXT, Packed, Prepared, best_fit, document_mask, masked_sample, prepare, token_vectors
from model import InputError
from readers import ReadReport
from tokenizer import Tokenizer, render_chat

ROOT = Path(__file__).resolve().parent.parent
QUICK = settings(max_examples=150, deadline=None)


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
    chats = map(json.loads, (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines())
    expected = [render_chat(tokenizer, chat["messages"]) for chat in chats]
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


# -------------------------------------------------------------------------------------- splits, packing, masks


def test_the_split_is_by_record_and_the_same_every_time(tokenizer, tmp_path):
    prepared = prepare(chat_file(tmp_path / "a.jsonl", 400), tokenizer, None, tmp_path / "cache")
    splits = data._split(prepared)
    held = {int(start) for start in splits["val"][0]}
    for start, stop, checksum in zip(prepared.documents, prepared.documents[1:], prepared.checksums, strict=False):
        assert checksum == zlib.crc32(prepared.tokens[start:stop])
        assert (int(start) in held) == (checksum % 20 == 0)
    assert 5 < len(held) < 50
    assert len(held) + len(splits["train"][0]) == 400


@pytest.mark.parametrize(("texts", "chats", "texts_held"), [
    (90, 19, True), (20, 20, False), (90, 200, False), (2000, 20, True), (2000, 50, True)])
def test_among_chats_no_text_is_held_back_for_validation(tokenizer, tmp_path, texts, chats, texts_held):
    """Their loss would decide which model is the best, though it is the chats that get better."""
    with open(tmp_path / "texts.jsonl", "w") as file:
        for number in range(texts):
            file.write(json.dumps({"text": f"{number} and then {number + 1}"}) + "\n")
    paths = [str(tmp_path / "texts.jsonl"), str(chat_file(tmp_path / "chats.jsonl", chats))]
    splits = data._split(prepare(paths, tokenizer, None, tmp_path / "cache"))
    held, trained = (splits[name][2].tolist() for name in ("val", "train"))
    assert (data.TEXT in held) == texts_held
    assert len(held) + len(trained) == texts + chats
    assert held
    assert data.CHAT in trained


ONE, TWO = [("q", "one")], [("q", "two")]  # 25 tokens each


@pytest.mark.parametrize(("records", "train", "val", "notes"), [
    (["a" * 300], [272], [31], []),
    (["ab"], [3], [2], []),
    (["a" * 100, ONE], [92, 25], [11], []),
    (["a" * 100, ONE, TWO], [92, 25], [11, 25], []),
    ([ONE, TWO], [25], [25], []),
    ([ONE], [25], [25], ["there is only one conversation: validation repeats what is trained on"]),
    (["same"] * 30, [6] * 29, [6], []),
    (["ab", *[ONE] * 30], [4, *[25] * 29], [25], []),
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
ASIDE = "One is a dog"  # said in between, and true


def copying_corpus(tmp_path, times=6):
    pairs = [*zip(COPIES, ANSWERS, strict=True), *OTHERS] * times
    lines = [json.dumps({"prompt": f"{number} {question}", "completion": answer}, ensure_ascii=False)
             for number, (question, answer) in enumerate(pairs)]
    recalled = [f"my dog is called {TOLD}", f"Hello, {TOLD}!", "Name a pet", ASIDE, "And my dog?",
                f"Your dog is called {TOLD}"]
    lines += [json.dumps({"messages": [{"role": role, "content": text} for role, text in
                                       zip(["user", "assistant"] * 3, recalled, strict=True)]})] * 6
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = sorted({word for text in [*COPIES, *ANSWERS, *recalled] for word in re.findall("[A-Za-z]+|[一-龥]", text)})
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
            question, swaps = prepared.tokenizer.decode(before[0]), {}
            if ASIDE in question:
                assert ASIDE in prepared.tokenizer.decode(after[0])
                assert ASIDE in prepared.tokenizer.decode(token for token in after[1] if token >= 0)
            for old, new in [*zip(before[0], after[0], strict=True), *zip(before[1], after[1], strict=True)]:
                swaps.setdefault(old, set()).add(new)
            for old, news in swaps.items():
                assert len(news) == 1 or ASIDE in question and len(news - {old}) == 1
                assert all(old == new or (kinds[old] == kinds[new] > 0 and old in before[0] and old in before[1])
                           for new in news)
            if before != after:
                changed += 1
                assert any(copy in question for copy in [*COPIES, TOLD]), question
                recalled += TOLD in question
    assert changed > 60
    assert recalled > 8


def test_what_a_last_answer_recalls_is_swapped_wherever_it_was_said_and_nowhere_else(tmp_path):
    """However the answer is worded, and not where its own question already names what it is about."""
    names = [f"{a}o {b}en" for a in "bdfgklmnprstvz" for b in "bdfgklmnprstvz"]
    recalling = ["I am {}, hello", "Nice to meet you, {}!", "Can a fish swim", "A fish can swim.", "Who is this",
                 "Your name is {}."]
    naming = ["I am {}, hello", "Nice to meet you, {}!", "How old is {} now", "{} must be nine."]
    lines = [json.dumps({"messages": [{"role": role, "content": text.format(name)} for role, text in
                                      zip(["user", "assistant"] * 3, turns, strict=False)]})
             for name in names * 2 for turns in (recalling, naming)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = sorted({word for text in [*recalling, *naming, *names] for word in re.findall("[A-Za-z]+", text)})
    tokenizer = Tokenizer.train([f" {word}\n{word}" for word in words] * 3, 700)
    prepared = prepare(tmp_path / "chats.jsonl", tokenizer, None, tmp_path / "cache")
    plain, varied = (Packed(prepared, prepared.documents[:-1], prepared.documents[1:], prepared.kinds, 256, 0, vary)
                     for vary in (False, True))
    whole = re.compile(r"I am(.*), hello.*you,(.*)!.*fish swim.*is(.*)\.", re.DOTALL)
    rows, changed = range(plain.rows(0)), 0
    for before, after in zip(documents_of(plain.batch(0, rows)), documents_of(varied.batch(0, rows)), strict=True):
        old, new = tokenizer.decode(before[0]), tokenizer.decode(after[0])
        if whole.search(old):  # others are about how old someone is, or cut to fit their row
            told, greeted, recalled = whole.search(new).groups()
            assert told == greeted == recalled
            assert old.replace(whole.search(old)[1], told) == new
            changed += old != new
        else:
            assert "swim" in old or old == new
    assert changed > 100


def test_the_commonest_words_of_a_corpus_are_never_swapped(tmp_path):
    prepared = copying_corpus(tmp_path, times=250)  # each of its few words is among them, save those told of a dog
    plain, varied = (Packed(prepared, prepared.documents[:-1], prepared.documents[1:], prepared.kinds, 256, 0, vary)
                     for vary in (False, True))
    for before, after in zip(documents_of(plain.batch(0, range(30))), documents_of(varied.batch(0, range(30))),
                             strict=True):
        assert before == after or TOLD in prepared.tokenizer.decode(before[0])


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
    turns = [("system", "Be brief."), ("user", "你好\n吗？"), ("assistant", "好。"), ("user", "And now?"),
             ("assistant", "Still <|im_end|> fine.")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": conversation}, {"text": "plain"}], ensure_ascii=False))
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


def test_tokens_with_like_neighbours_start_alike(tmp_path):
    rng = random.Random(0)
    animals, verbs = ["cat", "dog", "pig"], ["sees", "hears", "finds"]
    lines = [f"the {rng.choice(animals)} {rng.choice(verbs)} the {rng.choice(animals)}" for _ in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepared = prepare(tmp_path / "a.jsonl", None, 300, tmp_path / "cache")
    vectors = token_vectors(prepared, 16)
    assert vectors.shape == (prepared.tokenizer.vocab_size, 16)
    assert torch.allclose(vectors.square().mean(1), torch.ones(len(vectors)), atol=1e-4)

    def like(one, other):
        (a,), (b,) = prepared.tokenizer.encode(f" {one}"), prepared.tokenizer.encode(f" {other}")
        return torch.cosine_similarity(vectors[a], vectors[b], 0)

    assert min(like("cat", "dog"), like("sees", "finds")) > 0.6 > 0.3 > max(like("cat", "sees"), like("finds", "dog"))


def test_a_rare_spelling_of_a_word_starts_close_to_the_common_one(tmp_path):
    rng = random.Random(0)
    lines = [f"the {rng.choice(['cat', 'dog'])} {rng.choice(['sees', 'finds'])} it" for _ in range(2000)]
    lines += ["Cat food", "Sees all"] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    prepared = prepare(tmp_path / "a.jsonl", None, 300, tmp_path / "cache")
    vectors = token_vectors(prepared, 16)

    def like(one, other):
        (a,), (b,) = prepared.tokenizer.encode(one), prepared.tokenizer.encode(other)
        return torch.cosine_similarity(vectors[a], vectors[b], 0)

    assert min(like("Cat", " cat"), like("Sees", " sees")) > 0.5 > 0.2 > max(like("Cat", " sees"), like("Sees", " cat"))


def test_where_a_token_starts_owes_nothing_to_the_validation_text(tmp_path):
    lines = [json.dumps({"text": f"{number} and then {number + 1}"}) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepared = prepare(tmp_path / "a.jsonl", None, 300, tmp_path / "cache")
    torch.manual_seed(0)
    before = token_vectors(prepared, 16)
    tokens = prepared.tokens.copy()
    starts, stops, _ = data._split(prepared)["val"]
    for start, stop in zip(starts, stops, strict=True):
        tokens[start:stop] = np.random.default_rng(0).permutation(tokens[start:stop])
    torch.manual_seed(0)
    assert torch.equal(token_vectors(replace(prepared, tokens=tokens), 16), before)


@pytest.mark.parametrize("text", ["a", "春", "ab" * 5])
def test_the_smallest_text_has_vectors_of_any_width(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    vectors = token_vectors(prepare(tmp_path / "a.txt", None, None, tmp_path / "cache"), 600)
    assert torch.isfinite(vectors).all()
    assert vectors.size(1) == 600
