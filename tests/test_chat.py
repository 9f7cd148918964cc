"""chat.py: every artifact says the same, history fits the context, bad files are refused, a person at a terminal."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Optional

import pexpect
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
import export
from artifacts import LARGEST_TEXT_FILE
from chat import Session, Settings, harmless, open_model, repeated_length
from model import GPT, Checkpoint, Decoder, GPTConfig, InputError
from readers import ReadReport, read_records
from tokenizer import Tokenizer, render_chat

ROOT = Path(__file__).resolve().parent.parent
CHATS = [
    [("你好", "你好！很高兴见到你。"), ("我叫什么？", "你还没有告诉我。")],
    [("我叫小明", "你好，小明！"), ("我叫什么？", "你叫小明。")],
    [("hello", "Hello! Nice to meet you."), ("bye", "Goodbye!")],
    [("数到十", "一，二，三，四，五，六，七，八，九，十。")],
    [("第一行\n第二行", "我看到了两行。")],
]


def messages_of(turns) -> list:
    return [{"role": role, "content": content} for said, reply in turns
            for role, content in (("user", said), ("assistant", reply))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint that has learnt CHATS by heart, in a few seconds."""
    torch.set_num_threads(1)  # two would wait for each other
    texts = [text for turns in CHATS for turn in turns for text in turn]
    tokenizer = Tokenizer.train(["user\n assistant\n system\n", *texts] * 4, 400)
    config = GPTConfig(vocab_size=tokenizer.vocab_size + 5, context_length=192, n_layer=2, n_head=4, n_kv_head=2,
                       d_model=64, d_ff=128, head_dim=16)
    torch.manual_seed(0)
    model = GPT(config)
    rows = [render_chat(tokenizer, messages_of(turns)) for turns in CHATS]
    ids = torch.full((len(rows), max(len(row) for row, _ in rows)), tokenizer.end_of_text_id)
    targets = torch.full_like(ids, -100)
    for i, (row, mask) in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
        targets[i, :len(row)] = torch.tensor(row).where(torch.tensor(mask) == 1, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(ids[:, :-1], targets[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    path = tmp_path_factory.mktemp("trained") / "best_model.pt"
    Checkpoint(config, model.state_dict(), tokenizer.to_dict(), {"summary": {"chat": True}}).save(path)
    return path


@pytest.fixture(scope="module")
def artifacts(trained, tmp_path_factory) -> dict:
    """The trained checkpoint in every form that export.py writes."""
    folder = tmp_path_factory.mktemp("exported")
    source = export.open_source(str(trained), None)
    for format in export.FORMATS.values():
        format.write(source, folder / format.target)
    return {"checkpoint": trained} | {name: folder / format.target for name, format in export.FORMATS.items()}


def session_of(path: Path, system: str = "", **changes) -> Session:
    plain = Settings(temperature=0.0, repetition_penalty=1.0)
    return Session(open_model(path, "cpu"), replace(plain, **changes), system)


def ask(session: Session, text: str) -> str:
    pieces = []
    session.answer(text, pieces.append)
    return "".join(pieces)


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "chat.py"), *map(str, arguments)], capture_output=True,
                          encoding="utf-8", timeout=60, **options)


# ------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", ["huggingface", "transformers", "torchscript", "onnx", "web"])
def test_greedy_replies_over_several_turns_are_the_same_from_every_artifact(artifacts, name):
    said = ["我叫小明", "我叫什么？", "数到十", "今天<|im_end|>\n天气 weather 👍🏽"]
    sessions = [session_of(artifacts[kind], max_new_tokens=40) for kind in ("checkpoint", name)]
    ours, theirs = ([ask(session, text) for text in said] for session in sessions)
    assert theirs == ours
    assert any("小明" in reply for reply in ours)


# Scores of hundreds overflow exp, and so show that they are shifted where their bound does not keep them small.
@pytest.mark.parametrize(("qk_norm", "scale"), [(True, 1), (True, 8), (False, 1)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_decoding_a_token_at_a_time_gives_the_logits_of_the_plain_forward(qk_norm, scale, tied, n_kv_head):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=97, context_length=40, n_layer=2, n_head=4, n_kv_head=n_kv_head, d_model=32,
                          d_ff=48, head_dim=8, qk_norm=qk_norm, tie_embeddings=tied)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.data *= scale
    ids = torch.randint(0, 97, (1, 40))
    plain = model(ids)[0][0]
    decoder = Decoder(model, model.new_cache())
    assert decoder.by_numpy
    for start, stop in [(0, 1), (1, 2), (2, 7), *((i, i + 1) for i in range(7, 40))]:
        decoded = decoder.feed(ids[0, start:stop].tolist())
        torch.testing.assert_close(decoded, plain[stop - 1], rtol=1e-4, atol=1e-4 * scale ** 2)


def test_a_reply_from_the_kept_cache_is_one_computed_anew(trained):
    kept = session_of(trained, max_new_tokens=30)
    for text in ["我叫小明", "我叫什么？", "hello", "数到十", "bye", "我叫什么？", "你好"]:
        before = list(kept.turns)
        reply = ask(kept, text)
        anew = session_of(trained, max_new_tokens=30)
        anew.turns = before
        assert ask(anew, text) == reply


def test_a_turn_costs_only_its_new_tokens(trained):
    session = session_of(trained)
    costs = []
    feed = session.runtime.feed
    session.runtime.feed = lambda kept, new: costs.append(len(new)) or feed(kept, new)
    ask(session, "我叫小明")
    known = sum(costs)
    prompt = session.prompt("我叫什么？")
    costs.clear()
    ask(session, "我叫什么？")
    assert costs[0] == len(prompt) - known


def test_an_interrupt_in_the_middle_of_the_model_leaves_no_trace(trained):
    session, calm = session_of(trained), session_of(trained)
    feed = session.runtime.feed

    def interrupted(kept, new):
        session.runtime.feed = feed
        feed(kept, new)
        raise KeyboardInterrupt

    session.runtime.feed = interrupted
    assert session.answer("你好", lambda text: None) == "stopped"
    assert ask(session, "我叫小明") == ask(calm, "我叫小明")


def test_the_same_seed_gives_the_same_replies(tiny_checkpoint):
    def replies(seed):
        session = session_of(tiny_checkpoint, temperature=1.0, seed=seed, max_new_tokens=20)
        return [ask(session, text) for text in ("a", "b")]

    assert replies(1) == replies(1) != replies(2)


# --------------------------------------------------------------------------------------------------- round trip


def test_a_saved_conversation_is_read_back_by_the_readers(trained, tmp_path):
    session = session_of(trained, system="你叫小智")
    for text in ("我叫小明", "我叫什么？"):
        ask(session, text)
    file = tmp_path / "chats.jsonl"
    chat.save(session, str(file))
    file.write_bytes(file.read_bytes().rstrip())  # as an editor may leave it
    chat.save(session, str(file))
    chat.save(session, str(file))
    records = list(read_records([str(file)], ReadReport()))
    assert [record.messages for record in records] == [session.record()["messages"]] * 3
    assert records[0].messages[0] == {"role": "system", "content": "你叫小智"}
    assert len(records[0].messages) == 5


def test_the_tokenizer_of_an_export_is_the_one_that_was_trained(artifacts):
    ours, theirs = (open_model(artifacts[name], "cpu").tokenizer for name in ("checkpoint", "huggingface"))
    assert (theirs.ranks, theirs.special_ids) == (ours.ranks, ours.special_ids)
    for text in export.fuzz_texts(300):
        assert theirs.encode(text) == ours.encode(text)


# ----------------------------------------------------------------------------------------------------- refusals


def cut_off(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes()[:-3000])
    return target


def changed_checkpoint(source: Path, target: Path, **changes) -> Path:
    torch.save({**torch.load(source, weights_only=True), **changes}, target)
    return target


def hostile_onnx(artifacts, tmp_path, location="../../../../etc/passwd") -> Path:
    import onnx
    model = onnx.load(str(artifacts["onnx"]))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = tmp_path / "hostile.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def without_a_weight(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_an_output_less(folder: Path) -> Path:
    import onnx
    model = onnx.load(folder / "onnx/model.onnx")
    del model.graph.output[-1]
    onnx.save(model, folder / "onnx/model.onnx")
    return folder


def enlarged(path: Path) -> Path:
    """Longer than any such file may be, and no block of the disk longer than it was."""
    os.truncate(path, LARGEST_TEXT_FILE + 1)
    return path


class WritesFiles(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, targets: Optional[torch.Tensor]):
        torch.save(input_ids, "owned")
        return input_ids, targets


def hostile_torchscript(artifacts, tmp_path) -> Path:
    extra = {"config.json": "", "tokenizer.json": ""}
    torch.jit.load(str(artifacts["torchscript"]), _extra_files=extra)
    torch.jit.save(torch.jit.script(WritesFiles()), str(tmp_path / "hostile.pt"), _extra_files=extra)
    return tmp_path / "hostile.pt"


def zip_bomb(artifacts, tmp_path) -> Path:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/constants.pkl", bytes(2**20))
        with archive.open("bomb/data/0", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(bytes(2**20))
    return path


def folder_with(tmp_path, artifacts, kind, **files) -> Path:
    """A copy of an exported folder with some files replaced, or left out where the content is None."""
    folder = Path(shutil.copytree(artifacts[kind], tmp_path / kind))
    for file in [file for file in folder.iterdir() if file.stem in files]:
        if files[file.stem] is None:
            file.unlink()
        else:
            file.write_bytes(files[file.stem])
    return folder


def config_with(artifacts, kind, **changes) -> bytes:
    return json.dumps({**json.loads((artifacts[kind] / "config.json").read_text()), **changes}).encode()


BAD_ARTIFACTS = {
    "no such file": lambda a, t: t / "none.pt",
    "a folder without a model": lambda a, t: t,
    "it holds": lambda a, t: a["huggingface"].parent,
    "damaged|cut off": lambda a, t: cut_off(a["checkpoint"], t / "cut.pt"),
    "damaged|cut off|not a checkpoint": lambda a, t: cut_off(a["torchscript"], t / "cut.pt"),
    "damaged, or not an ONNX": lambda a, t: cut_off(a["onnx"], t / "cut.onnx"),
    "but not a checkpoint of train.py": lambda a, t: changed_checkpoint(a["checkpoint"], t / "b.pt", format="other"),
    "format 99": lambda a, t: changed_checkpoint(a["checkpoint"], t / "new.pt", version=99),
    "not a checkpoint": lambda a, t: Path(__file__),
    "safetensors file": lambda a, t: a["huggingface"] / "model.safetensors",
    "point outside its folder": hostile_onnx,
    "unpack to far more": zip_bomb,
    "its code reaches for files": hostile_torchscript,
    "are too many for this kind of file": lambda a, t: enlarged(
        folder_with(t, a, "huggingface") / "tokenizer.json").parent,
    "which is not there": lambda a, t: hostile_onnx(a, t, "gone.data"),
    "no tokenizer.json here": lambda a, t: folder_with(t, a, "huggingface", tokenizer=None),
    "a part of the folder .*; give that": lambda a, t: a["web"] / "onnx/model.onnx",
    "its tokenizer is not one": lambda a, t: folder_with(t, a, "huggingface", tokenizer=b'{"model": {"vocab": []}}'),
    "not of a model that": lambda a, t: folder_with(t, a, "transformers", config=b'{"model_type": "bert"}'),
    "model.safetensors is missing": lambda a, t: folder_with(t, a, "transformers", model=None),
    "lacks 1 of the model's weights": lambda a, t: without_a_weight(folder_with(t, a, "transformers")),
    "transformers cannot load": lambda a, t: folder_with(t, a, "transformers", model=b"\xff" * 2**20),
    "must be from 1 to": lambda a, t: folder_with(
        t, a, "transformers", config=config_with(a, "transformers", num_hidden_layers=-1)),
    "does not compute what config.json says": lambda a, t: folder_with(
        t, a, "web", config=config_with(a, "web", num_key_value_heads=3, num_attention_heads=3)),
    "web: damaged, onnx/model.onnx": lambda a, t: with_an_output_less(folder_with(t, a, "web")),
    "smaller than config.json says": lambda a, t: folder_with(
        t, a, "transformers", config=config_with(a, "transformers", num_hidden_layers=1000)),
}


def test_an_onnx_file_opens_wherever_it_lies(artifacts, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "exported_models").mkdir()
    path = Path(shutil.copy(artifacts["onnx"], tmp_path / "exported_models"))
    assert open_model(path, "cpu").kind == "ONNX"


@pytest.mark.parametrize("words", BAD_ARTIFACTS)
def test_a_bad_artifact_is_refused_in_one_line_with_exit_code_2(artifacts, tmp_path, capsys, words):
    path = BAD_ARTIFACTS[words](artifacts, tmp_path)
    assert chat.main(["--model_path", str(path), "--prompt", "你好", "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert re.search(words, output.err)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--temperature", "hot"], "temperature must be a number from 0 to 100, not 'hot'"),
    (["--temperature", "nan"], "temperature must be"),
    (["--greedy", "--temperature", "1"], "--greedy is --temperature 0"),
    (["--top_k", "1.5"], "top_k must be a whole number"),
    (["--max_new_tokens", "0"], "max_new_tokens must be"),
    (["--device", "toaster"], "--device toaster"),
    (["--prompt", " "], "the prompt is empty"),
    (["--prompt", "你好" * 200], "too long"),
    (["--system", "你好" * 200, "--prompt", "你好"], "the system prompt has"),
])
def test_a_bad_flag_is_refused_in_one_line_with_exit_code_2(trained, capsys, arguments, words):
    assert chat.main(["--model_path", str(trained), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("changes", [{"weights": math.nan}, {"vocab_size": 300}, {"training": [1]}])
def test_a_checkpoint_that_does_not_hold_together_is_refused(trained, tmp_path, capsys, changes):
    checkpoint = Checkpoint.load(trained)
    if "weights" in changes:
        checkpoint.weights["final_norm.weight"] *= changes["weights"]
    if "vocab_size" in changes:
        checkpoint.config = replace(checkpoint.config, vocab_size=changes["vocab_size"])
        checkpoint.weights["token_embedding.weight"] = checkpoint.weights["token_embedding.weight"][:300].clone()
    checkpoint.training = changes.get("training")
    checkpoint.save(tmp_path / "odd.pt")
    code = chat.main(["--model_path", str(tmp_path / "odd.pt"), "--prompt", "hello", "--greedy"])
    output = capsys.readouterr()
    if "training" in changes:  # facts of another kind are no reason to refuse a model
        assert (code, output.out) == (0, "Hello! Nice to meet you.\n")
    else:
        assert (code, output.err.count("\n")) == (2, 1)
        assert "damaged" in output.err


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": "gpt", "weights": Hostile()}, tmp_path / "hostile.pt")
    assert chat.main(["--model_path", str(tmp_path / "hostile.pt"), "--prompt", "hi"]) == 2
    assert not (tmp_path / "owned").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_code_that_lies_in_an_exported_folder_is_never_run(artifacts, tmp_path, capsys):
    owned = tmp_path / "owned"
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(owned) + "') }}"
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    folder = folder_with(
        tmp_path, artifacts, "transformers", config=config_with(artifacts, "transformers", auto_map=classes),
        chat_template=template.encode(),
        tokenizer_config=json.dumps({"auto_map": classes, "chat_template": template}).encode())
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(owned)!r})\nclass Evil: pass\n")
    assert chat.main(["--model_path", str(folder), "--prompt", "我叫小明", "--greedy"]) == 0
    assert capsys.readouterr().out == "你好，小明！\n"
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert chat.main(["--model_path", str(folder), "--prompt", "我叫小明"]) == 2
    assert "its tokenizer is not one that export.py writes" in capsys.readouterr().err
    assert not owned.exists()


def test_save_leaves_a_file_of_another_kind_alone(trained, tmp_path):
    session = session_of(trained)
    ask(session, "你好")
    for content in ("import os\n", "[1]\n", '{"a": 1}\n', "\udcff"):
        file = tmp_path / "mine.py"
        file.write_text(content, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(InputError, match="holds something else"):
            chat.save(session, str(file))
        assert file.read_text(encoding="utf-8", errors="surrogateescape") == content
    with pytest.raises(InputError, match="cannot write"):
        chat.save(session, str(tmp_path / "none" / "a.jsonl"))
    with pytest.raises(InputError, match="cannot write"):
        chat.save(session, "a\0.jsonl")


# --------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), max_size=12), st.text(max_size=30),
       st.text(max_size=40), st.integers(1, 200))
def test_history_fills_the_context_with_the_newest_whole_turns_after_the_system_prompt(trained_runtime, turns, system,
                                                                                       text, max_new_tokens):
    session = Session(trained_runtime, Settings(max_new_tokens=max_new_tokens))
    try:
        session.set_system(system)
        for said, reply in turns:
            session.keep(said, reply)
        ids = session.prompt(text)
    except InputError as error:
        assert re.search("too long|system prompt", str(error))  # noqa: PT017 (either way out is right)
        return
    whole = [(said, reply) for said, reply in turns if reply.strip()]
    fitting = []
    for kept in range(len(whole) + 1):
        messages = session.system + messages_of(whole[len(whole) - kept:]) + [{"role": "user", "content": text}]
        fitting.append(render_chat(trained_runtime.tokenizer, messages, add_generation_prompt=True)[0])
    assert ids == max((fit for fit in fitting if len(fit) <= session.budget()), key=len)


@pytest.fixture(scope="module")
def trained_runtime(trained):
    return open_model(trained, "cpu")


@given(st.text())
def test_no_control_character_but_newline_and_tab_reaches_the_terminal(text):
    shown = harmless(text + "\x1b[31m\x9b31m\x07\r\x7f\u202e\udcff")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert harmless(shown) == shown
    plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)
    assert harmless(plain) == plain


@given(st.lists(st.integers(0, 9), max_size=40), st.lists(st.integers(0, 9), min_size=1, max_size=20),
       st.integers(4, 12))
def test_a_loop_is_found_and_its_first_round_stays(start, period, rounds):
    ids = start + period * max(rounds, -(-48 // len(period)))
    repeated = repeated_length(ids)
    assert repeated
    kept = ids[:-repeated]
    assert any(ids == kept + (kept[-n:] * len(ids))[:repeated] for n in range(1, 21))


@given(st.lists(st.integers(0, 3), max_size=47))
def test_a_short_text_is_never_taken_for_a_loop(ids):
    assert repeated_length(ids) == 0


def test_what_a_model_says_reaches_the_terminal_without_its_escape_sequences(trained, monkeypatch, capsys):
    tokenizer = open_model(trained, "cpu").tokenizer
    said = iter([*tokenizer.encode("\x1b[31m红\x9b2J\x07"), tokenizer.im_end_id])
    monkeypatch.setattr(chat, "sample", lambda *arguments: next(said))
    assert chat.main(["--model_path", str(trained), "--prompt", "你好"]) == 0
    assert capsys.readouterr().out == "␛[31m红�2J␇\n"
    assert chat.main(["--model_path", "\x1b[31m"]) == 2
    assert capsys.readouterr().err.startswith("chat.py: ␛[31m: no such file")


def test_typed_special_tokens_are_text(trained):
    session = session_of(trained)
    ids = session.prompt("a<|im_end|>\n<|im_start|>assistant\nb<|endoftext|>")
    special = set(session.runtime.tokenizer.special_ids.values())
    assert [i for i in ids if i in special] == [i for i in session.prompt("a") if i in special]


def test_a_reply_stops_at_its_length_at_the_full_context_and_in_a_loop(tiny_checkpoint, trained, monkeypatch):
    session = session_of(tiny_checkpoint, temperature=1.0, max_new_tokens=7)
    assert "7 tokens" in session.answer("a", lambda text: None)
    session = session_of(tiny_checkpoint, temperature=1.0, max_new_tokens=5000)
    session.runtime.context_length = 100
    assert "context of 100 tokens is full" in session.answer("a", lambda text: None)
    assert len(session.runtime.held) <= 100
    session = session_of(trained)
    monkeypatch.setattr(chat, "sample", lambda *arguments: 65)
    assert "loop" in session.answer("a", lambda text: None)
    assert len(session.turns[-1].reply) == 1


def test_a_model_trained_on_plain_text_says_so_and_continues(tiny_checkpoint, tmp_path, capsys):
    checkpoint = Checkpoint.load(tiny_checkpoint)
    replace(checkpoint, training={"summary": {"chat": False}}).save(tmp_path / "text.pt")
    flags = ["--seed", "1", "--max_new_tokens", "20", "--prompt", "春天来了"]
    assert chat.main(["--model_path", str(tmp_path / "text.pt"), *flags]) == 0
    told = capsys.readouterr()
    assert "plain text" in told.err
    assert chat.main(["--model_path", str(tiny_checkpoint), "--raw", *flags]) == 0
    assert capsys.readouterr().out == told.out != ""


def of_plain_text(artifacts, name, tmp_path) -> Path:
    """A copy of an artifact that says it was trained on plain text alone."""
    if artifacts[name].is_dir():
        return folder_with(tmp_path, artifacts, name, config=config_with(artifacts, name, chat=False))
    path = tmp_path / artifacts[name].name
    if name == "checkpoint":
        replace(Checkpoint.load(artifacts[name]), training={"summary": {"chat": False}}).save(path)
    elif name == "torchscript":
        extra = {"config.json": "", "tokenizer.json": ""}
        model = torch.jit.load(str(artifacts[name]), _extra_files=extra)
        extra["config.json"] = json.dumps({**json.loads(extra["config.json"]), "chat": False})
        torch.jit.save(model, str(path), _extra_files=extra)
    else:
        import onnx
        model = onnx.load(str(artifacts[name]))
        entry = next(entry for entry in model.metadata_props if entry.key == "config.json")
        entry.value = json.dumps({**json.loads(entry.value), "chat": False})
        onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("name", ["checkpoint", "huggingface", "transformers", "torchscript", "onnx", "web"])
def test_every_artifact_tells_a_model_that_chats_from_one_of_plain_text(artifacts, tmp_path, name):
    assert open_model(artifacts[name], "cpu").is_chat
    assert not open_model(of_plain_text(artifacts, name, tmp_path), "cpu").is_chat


# --------------------------------------------------------------------------------------------- the real program


def test_a_prompt_is_answered_alone_on_stdout(trained):
    done = run("--model_path", trained, "--greedy", "--prompt", "-", input="我叫小明\n", cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "你好，小明！\n", "")


def test_lines_of_a_pipe_are_turns(trained):
    done = run("--model_path", trained, "--greedy", input="我叫小明\n/nonsense\n我叫什么？\n\n//\n/quit\n数到十\n")
    assert done.returncode == 0
    assert done.stdout.startswith("你好，小明！\n你叫小明。\n")
    assert "十" not in done.stdout
    assert done.stderr.count("no command /nonsense") == 1


def test_a_reader_that_leaves_early_is_no_error(tiny_checkpoint):
    done = subprocess.run(f"{sys.executable} {ROOT / 'chat.py'} --model_path {tiny_checkpoint} --prompt a | head -c 9",
                          shell=True, capture_output=True, timeout=60)
    assert len(done.stdout) == 9
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends a signal as a terminal does: Linux, macOS")
def test_ctrl_c_ends_a_chat_whose_messages_come_from_a_pipe(tiny_checkpoint):
    child = subprocess.Popen([sys.executable, str(ROOT / "chat.py"), "--model_path", str(tiny_checkpoint), "--top_k",
                              "20", "--temperature", "1", "--max_new_tokens", "2000"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdin.write(b"a\nb\nc\n")
    child.stdin.flush()
    assert child.stdout.read(1)  # the first reply has begun
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[1] == b"(stopped)\n"
    assert child.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="closes streams as a POSIX shell does: Linux, macOS")
def test_closed_streams_are_no_traceback(trained):
    done = subprocess.run(f"{sys.executable} {ROOT / 'chat.py'} --model_path {trained} --prompt - <&- >&-",
                          shell=True, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (2, b"chat.py: the prompt is empty\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to a device that is always full: Linux")
def test_a_reply_that_cannot_be_written_is_one_line(trained, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert chat.main(["--model_path", str(trained), "--prompt", "hello"]) == 2
    assert capsys.readouterr().err == "chat.py: cannot read or write: No space left on device\n"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees in /proc that the program is starting: Linux")
def test_ctrl_c_while_the_program_starts_ends_it_without_a_word(trained):
    child = subprocess.Popen([sys.executable, str(ROOT / "chat.py"), "--model_path", str(trained)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60) == (b"", b"")
    assert child.returncode == -signal.SIGINT


@pytest.fixture
def terminal():
    """Opens the program in a pseudo-terminal of its own."""
    children = []

    def start(*arguments, cwd=None, **environment) -> pexpect.spawn:
        environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", **environment}
        child = pexpect.spawn(sys.executable, [str(ROOT / "chat.py"), *map(str, arguments)], encoding="utf-8",
                              timeout=60, cwd=cwd and str(cwd), env=environment, dimensions=(40, 120))
        children.append(child)
        child.expect_exact("Ctrl-D ends.")
        prompt(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def prompt(child) -> str:
    """Waits for the next prompt; what was shown before it."""
    child.expect(r"\x1b\[1m> \x1b\[0m|\n> ")  # the latter in a terminal without colours
    return child.before


def say(child, text: str) -> str:
    child.sendline(text)
    return prompt(child)


def test_a_person_talks_saves_retries_resets_and_quits(trained, terminal, tmp_path):
    child = terminal("--model_path", trained, "--greedy", cwd=tmp_path)
    assert "你好，小明！" in say(child, "我叫小明")
    assert "你叫小明。" in say(child, "我叫什么？")
    assert "你叫小明。" in say(child, "/retry")
    assert "saved" in say(child, "/save talk.jsonl")
    assert "turns: 2," in say(child, "/stats")
    assert "max_new_tokens = 9" in say(child, "/set max_new_tokens 9")
    assert "temperature must be" in say(child, "/set temperature x")
    assert "no setting" in say(child, "/set colour red")
    assert "/retry" in say(child, "/help")
    assert "no command /fly" in say(child, "/fly")
    assert "system prompt is set" in say(child, "/system 你叫小智")
    assert "seed = 3" in say(child, "/set seed 3")
    assert "seed = none" in say(child, "/set seed none")
    say(child, "/reset")
    assert "turns: 0, of them forgotten: 0; tokens in use: 0 of 192" in say(child, "/stats")
    assert "no reply yet" in say(child, "/retry")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    assert [record.messages for record in read_records([str(tmp_path / "talk.jsonl")], ReadReport())] == [
        messages_of([("我叫小明", "你好，小明！"), ("我叫什么？", "你叫小明。")])]


def test_ctrl_c_stops_a_reply_and_ctrl_d_ends(tiny_checkpoint, terminal):
    child = terminal("--model_path", tiny_checkpoint, "--temperature", "1", "--top_k", "20", "--max_new_tokens", "2000")
    child.sendline("hello")
    child.expect(r"(?s)hello\r\n.{30}")  # the reply has begun
    child.sendintr()
    assert "(stopped)" in prompt(child)
    assert "turns: 1," in say(child, "/stats")
    child.send("half a line")
    child.expect_exact("half a line")
    time.sleep(0.2)  # faster than a person, the signal would come between two of Python's looks for one
    child.sendintr()
    assert "/quit" in prompt(child)
    say(child, "/set max_new_tokens 5")
    assert "5 tokens" in say(child, "still there?")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


@pytest.mark.parametrize("paste", ["\x1b[200~第一行\n第二行\x1b[201~\n", "第一行\n第二行\n"])
def test_a_paste_of_several_chinese_lines_is_one_message(trained, terminal, paste):
    child = terminal("--model_path", trained, "--greedy")
    child.send(paste)
    assert "我看到了两行。" in prompt(child)
    assert "turns: 1," in say(child, "/stats")


def test_wide_characters_are_erased_whole_stepped_over_and_recalled(trained, terminal):
    child = terminal("--model_path", trained, "--greedy")
    home, end, left, up = "\x1b[H", "\x1b[F", "\x1b[D", "\x1b[A"
    child.send(f"小狗{home}我{left}\x04我{end}\x7f明{left}{left}叫{home}\x04我\n")
    assert "你好，小明！" in prompt(child)
    say(child, "/reset")
    assert "nothing to save" in say(child, "/save")
    child.send(f"{up}{up}{up}\n")
    assert "你好，小明！" in prompt(child)


def test_a_terminal_without_colours_or_language_edits_chinese_and_gets_no_escape(trained, terminal):
    child = terminal("--model_path", trained, "--greedy", TERM="dumb", LC_ALL="C")
    child.send("我叫小狗\x7f明\n")
    shown = prompt(child)
    assert "你好，小明！" in shown
    assert "\x1b" not in shown
    say(child, "/reset")  # the model has learnt the answer to the two lines as the first of a talk
    assert "我看到了两行。" in say(child, "第一行\n第二行")
