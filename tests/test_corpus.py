import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "corpus"


def load(path):
    """A script of a folder that is no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load(CORPUS / "build.py")
skills = load(ROOT / "benchmarks" / "skills.py")
FILES = sorted(CORPUS.glob("chat_*.jsonl"))


@pytest.fixture(scope="module")
def conversations():
    return [json.loads(line)["messages"] for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def texts():
    return [json.loads(line)["text"] for path in sorted(CORPUS.glob("text_*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def items():
    return skills.read_items(CORPUS / "heldout.jsonl")


# ------------------------------------------------------------------------------------------------------ the files


def test_a_rebuild_gives_the_committed_files_byte_for_byte(tmp_path):
    counts = build.build(tmp_path)
    assert set(counts) == {path.name for path in CORPUS.glob("*.jsonl")}
    for name in counts:
        assert (tmp_path / name).read_bytes() == (CORPUS / name).read_bytes(), f"{name}: run python corpus/build.py"


def test_the_corpus_keeps_to_its_size_and_is_mostly_chinese():
    sizes = {path.name: path.stat().st_size for path in CORPUS.glob("*.jsonl")}
    trained = {name: size for name, size in sizes.items() if name != "heldout.jsonl"}
    assert sum(sizes.values()) <= 4_000_000
    chinese = sum(size for name, size in trained.items() if "_zh" in name)
    assert 0.5 < chinese / sum(trained.values()) < 0.7


def test_every_conversation_is_well_formed(conversations):
    for messages in conversations:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns, messages
        assert turns == ["user", "assistant"] * (len(turns) // 2), messages
        for message in messages:
            assert message["content"] == message["content"].strip() != "", messages
            assert not re.search(r"[\[\]{}|]", message["content"]), messages  # a template that was not filled


def test_every_plain_text_is_filled_in_and_stands_once(texts):
    assert len(set(texts)) == len(texts) == sum(build.SIZES["text"]) > 400
    for text in texts:
        assert text == text.strip() != ""
        assert not re.search(r"[\[\]{}|]", text), text


def test_no_conversation_stands_twice(conversations):
    asked = [tuple(message["content"] for message in messages if message["role"] == "user")
             for messages in conversations]
    single = [questions for questions in asked if len(questions) == 1]
    assert len(set(single)) > 0.99 * len(single)  # files of two topics may share a word such as "?"
    assert len(set(asked)) > 0.99 * len(asked)


# -------------------------------------------------------------------------------------------------- what they say


def test_every_equation_is_true(conversations):
    equations = 0
    for messages in conversations:
        for message in messages:
            if message["role"] == "assistant":
                for left, right in re.findall(r"(?<![\d+-])(\d+(?:[+-]\d+)+)=(\d+)", message["content"]):
                    numbers = re.findall(r"[+-]?\d+", left)
                    assert sum(map(int, numbers)) == int(right), message
                    equations += 1
                worked = re.match(r"(\d+)([+-])(\d+)[：:].*?(\d+)[。.]$", message["content"])
                if worked:
                    a, sign, b, result = worked.groups()
                    assert int(a) + int(sign + b) == int(result), message
                for a, sign, b in re.findall(r"(\d+)([<>])(\d+)", message["content"]):
                    assert (int(a) < int(b)) == (sign == "<"), message
    assert equations > 3000


@pytest.mark.parametrize("language", build.LANGUAGES)
@pytest.mark.parametrize("kind", [build.country, build.animal, build.colour, build.opposite, build.general,
                                  build.translation, build.spelling])
def test_the_corpus_tells_every_fact_and_every_word_that_may_be_asked_for(kind, language, conversations):
    told = {message["content"] for messages in conversations for message in messages}
    rng = build.Dealer("any")
    assert {kind(rng, language).answer for _ in range(6000)} <= told


def test_a_country_has_one_answer_everywhere(conversations):
    rows = build.COUNTRIES["rows"]
    capitals = {row[0]: row[2] for row in rows} | {row[1]: row[3] for row in rows}
    currencies = {row[0]: row[8] for row in rows} | {row[1]: row[9] for row in rows}
    found = 0
    for messages in conversations:
        for message in messages:
            if message["role"] != "assistant":
                continue
            for pattern, table in (("^(.+)的首都是(.+)。$", capitals), ("^The capital of (.+) is (.+)\\.$", capitals),
                                   ("^(.+)的货币是(.+)。$", currencies),
                                   ("^The currency of (.+) is (.+)\\.$", currencies)):
                for name, value in re.findall(pattern, message["content"]):
                    assert table[name] == value, message
                    found += 1
    assert found > 800


def test_a_single_question_has_one_meaning(conversations):
    """One question is not answered in one file and declined in another."""
    declined, answered = set(), set()
    declining = [words for language in build.LANGUAGES for words in build.DO_NOT_KNOW[language]]
    for messages in conversations:
        if [message["role"] for message in messages] == ["user", "assistant"]:
            declines = any(words in messages[1]["content"] for words in declining)
            (declined if declines else answered).add(build.normalised(messages[0]["content"]))
    assert not declined & answered


# ----------------------------------------------------------------------------------------------------- held out


def test_held_out_items_are_balanced(items):
    for skill in build.SKILLS.values():
        for language in build.LANGUAGES:
            assert sum(item["skill"] == skill and item["language"] == language for item in items) == build.HELD_OUT_EACH


def test_no_held_out_question_is_trained_on(conversations, texts, items):
    trained = {build.normalised(message["content"]) for messages in conversations for message in messages
               if message["role"] == "user"}
    trained |= {build.normalised(line) for text in texts for line in text.removeprefix("你好，请问").split("\n")}
    for item in items:
        assert build.normalised(item["messages"][-1]["content"]) not in trained, item


def test_no_held_out_name_is_trained_on(conversations, texts, items):
    text = "\n".join([*texts, *(message["content"] for messages in conversations for message in messages)])
    english = set(re.findall(r"[a-z]+", text.lower()))
    told = [name for language in build.LANGUAGES for name in build.HELD_NAMES[language]]
    for name in told:
        assert (name.lower() not in english) if name.isascii() else (name not in text), name
    asked = [item["keys"][0] for item in items if item["keys"][0] in told]
    assert len(asked) > 20


def test_no_held_out_pair_is_trained_on(conversations, texts):
    comparisons = 0
    for text in [*texts, *(message["content"] for messages in conversations for message in messages)]:
        for a, sign, b in re.findall(r"(?<![\d+-])(\d+) ?([+-]) ?(\d+)(?![\d+-]| ?[+-])", text):
            assert (int(a), int(b)) not in build.HELD_PAIRS["add" if sign == "+" else "sub"], text
    for messages in conversations:
        for asked, answered in zip(messages, messages[1:], strict=False):
            numbers = re.findall(r"\d+", asked["content"])
            if asked["role"] == "user" and len(numbers) == 2 and re.search(r"\d[<>]\d", answered["content"]):
                assert (int(numbers[0]), int(numbers[1])) not in build.HELD_PAIRS["compare"], asked
                comparisons += 1
    assert comparisons > 500


# ---------------------------------------------------------------------------------------------------- the matcher


@pytest.mark.parametrize(("reply", "keys", "match", "language", "right"), [
    ("法国的首都是巴黎。", ["巴黎"], "any", "zh", True),
    ("法国的首都是柏林。", ["巴黎"], "any", "zh", False),
    ("The capital of France is paris.", ["Paris"], "any", "en", True),
    ("The comparison is hard.", ["Paris"], "any", "en", False),
    ("Cars have wheels.", ["car"], "any", "en", False),
    ("一周有17天。", ["7"], "any", "zh", False),
    ("一周有7天。", ["7"], "any", "zh", True),
    ("cat: c-a-t", ["c-a-t"], "any", "en", True),
    ("cat: c-a-tt", ["c-a-t"], "any", "en", False),
    ("37+45：个位7+5=12，十位3+4+1=8，等于82。", ["82"], "last_number", "zh", True),
    ("37+45：个位7+5=12，十位3+4+1=8，等于81。", ["82"], "last_number", "zh", False),
    ("No idea.", ["82"], "last_number", "en", False),
    ("The sky is blue.", ["the sky is blue"], "exact", "en", True),
    ("The sky is very blue.", ["the sky is blue"], "exact", "en", False),
    ("Once there was a fox who lived in a small village and was happy.", ["fox"], "story", "en", True),
    ("A fox.", ["fox"], "story", "en", False),
    ("Once there was a cat who lived in a small village and was happy.", ["fox"], "story", "en", False),
    ("抱歉，我不知道这个。", ["不知道", "不清楚"], "any", "zh", True),
])
def test_the_matcher_accepts_right_and_refuses_wrong_replies(reply, keys, match, language, right):
    assert skills.is_right(reply, keys, match, language) is right


def test_the_corpus_own_answers_are_all_right(items):
    """What the banks answer to a held-out question satisfies the keys, for every skill and language."""
    for language in build.LANGUAGES:
        for name in build.SKILLS:
            rng = build.Dealer(f"answers {name} {language}")
            for _ in range(200):
                make = build.SINGLE.get(name, lambda *arguments: build.memory(*arguments)[1])
                turn = make(rng, language, True)
                assert skills.is_right(turn.answer, list(turn.keys), turn.match, language), turn


def test_a_broken_held_out_file_is_one_clear_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"skill": "1"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["skills.py", "--heldout", str(path)])
    with pytest.raises(SystemExit) as stopped:
        skills.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
