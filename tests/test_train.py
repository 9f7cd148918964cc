"""train.py: a resumed run is the run that never stopped; two processes train as one; nothing mends by hand."""

import ast
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Iterator, Optional

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from model import GPT, Checkpoint, InputError
from tokenizer import Tokenizer, render_chat

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(n_layer=1, n_head=2, n_kv_head=1, d_model=32, d_ff=48, context_length=32, batch_size=4, vocab_size=300,
            eval_tokens=1024)


@pytest.fixture
def chats(tmp_path) -> Path:
    """120 short conversations, enough for two dozen steps an epoch at the tiny size."""
    path = tmp_path / "chats.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for n in range(120):
            turns = [("user", f"第{n}个数是几？"), ("assistant", f"是{n * 7 % 100}。"),
                     ("user", "and the next one?"), ("assistant", f"it is {n * 7 % 100 + 1}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


def settings(chats: Path, out: Path, **changes) -> train.TrainConfig:
    return train.TrainConfig(data_path=[str(chats)], out_dir=str(out), cache_dir=str(chats.parent / "cache"),
                             device="cpu", **{**TINY, "epochs": 2.0, **changes})


def command(chats: Path, out: Path, *more: str) -> list:
    flags = [part for key, value in {**TINY, "epochs": 2}.items() for part in (f"--{key}", str(value))]
    return [str(ROOT / "train.py"), "--data_path", str(chats), "--out_dir", str(out), "--cache_dir",
            str(chats.parent / "cache"), "--device", "cpu", *flags, *more]


def run(arguments: list, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, encoding="utf-8",
                          env=environment, timeout=120, check=False, **more)


def weights(out: Path, name: str = "last.pt") -> dict:
    return {key: tensor.clone() for key, tensor in Checkpoint.load(out / name).weights.items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are quicker on one thread, above all on a machine that does other work too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DRAW = train.Metrics.draw


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """The loss curve after each evaluation would take most of the time of runs this short."""
    monkeypatch.setattr(train.Metrics, "draw", lambda self: None)


@pytest.fixture(autouse=True)
def keep_signals():
    """train() takes over Ctrl-C and SIGTERM for good; the tests' process wants them back."""
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in kept:
        signal.signal(number, handler)


# Has everything loaded and forks a process for each request: a run then starts in a tenth of the time.
NURSERY = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import tokenizers, torch.distributed.fsdp, train
train.Metrics.draw = lambda self: None
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        pid, status = os.waitpid(request, os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    if pid := os.fork():
        print(pid, flush=True)
        continue
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    try:
        code = train.main()
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    os._exit(code)
"""


class Forked:
    """A run of train.py in a process of its own, to be killed or waited for."""

    def __init__(self, nursery: subprocess.Popen, arguments: list, log: Path, **environment: str):
        self.nursery, self.log, self.code = nursery, log, None
        self.pid = self.ask(dict(arguments=arguments, log=str(log), environment=environment))

    def ask(self, request: object):
        self.nursery.stdin.write(json.dumps(request) + "\n")
        self.nursery.stdin.flush()
        return json.loads(self.nursery.stdout.readline())

    def poll(self) -> Optional[int]:
        if self.code is None:
            self.code = self.ask(self.pid)
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.code


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen]:
    if not hasattr(os, "fork"):
        pytest.skip("forks processes; runs on Linux and macOS")
    process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield process
    process.communicate()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    """However a run ends, it takes its threads along: one that is no daemon would keep the process alive."""
    before = set(threading.enumerate())
    yield
    assert [thread for thread in threading.enumerate() if thread not in before and not thread.daemon] == []


def start(arguments: list, **options) -> tuple[subprocess.Popen, str]:
    """A process under way, and a mark by which `marked` finds it and all that it starts."""
    mark = f"MARK={uuid.uuid4().hex}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict([mark.split("=")])}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **options), mark


def marked(mark: str) -> list:
    """Command lines of the living processes with this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone meanwhile
            continue
    return found


finds_processes = pytest.mark.skipif(not Path("/proc/self/environ").exists(),
                                     reason="looks for processes in /proc; runs on Linux")


# ------------------------------------------------------------------------------------------------ parity


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(chats, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train.train(settings(chats, tmp_path / name, seed=seed, epochs=0.5))
    assert equal(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert not equal(weights(tmp_path / "one"), weights(tmp_path / "three"))


def test_a_run_stopped_at_any_step_and_resumed_is_the_straight_run_bit_for_bit(chats, tmp_path, monkeypatch):
    train.train(settings(chats, tmp_path / "straight"))
    straight = Checkpoint.load(tmp_path / "straight/last.pt").training
    update, steps = train.Trainer.update, 0

    def stop_now_and_then(self, factor):
        nonlocal steps
        steps += 1
        if steps in (3, 4, 45):  # of 34 an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, factor)

    monkeypatch.setattr(train.Trainer, "update", stop_now_and_then)
    config = settings(chats, tmp_path / "split")
    for _ in range(3):
        with pytest.raises(SystemExit) as stopped:
            train.train(config, {})
        assert stopped.value.code == 128 + signal.SIGTERM
        with open(tmp_path / "split/metrics.jsonl", "a") as file:
            file.write('{"step": 9999, "train_loss": 1.0}\n{"step": 9999, "tra')  # what a kill may leave
        config = train.TrainConfig(resume=True, out_dir=str(tmp_path / "split"), device="cpu")
    train.train(config, {})
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "split"))
    assert equal(weights(tmp_path / "straight", "best_model.pt"), weights(tmp_path / "split", "best_model.pt"))
    resumed = Checkpoint.load(tmp_path / "split/last.pt").training
    assert {**resumed["progress"], "seconds": 0} == {**straight["progress"], "seconds": 0}
    assert torch.equal(resumed["random_state"], straight["random_state"])

    def logged(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert logged("split") == logged("straight")


def test_a_resumed_run_knows_how_good_the_best_was(chats, tmp_path, monkeypatch):
    found = itertools.chain([3.0, 2.0], itertools.repeat(2.5))
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: (next(found), 1.0))
    train.train(settings(chats, tmp_path / "out", epochs=0.3, eval_interval=6))
    before = Checkpoint.load(tmp_path / "out/last.pt").training["progress"]
    assert (before["best_loss"], before["rising"]) == (2.0, 0)
    best = (tmp_path / "out/best_model.pt").read_bytes()
    again = train.TrainConfig(resume=True, out_dir=str(tmp_path / "out"), device="cpu")
    for epochs, rising in ((0.4, 1), (0.5, 2)):
        train.train(again, {"epochs": epochs, "eval_interval": 1000})
        after = Checkpoint.load(tmp_path / "out/last.pt").training["progress"]
        assert (after["best_loss"], after["rising"]) == (2.0, rising)
    assert (tmp_path / "out/best_model.pt").read_bytes() == best


def test_a_kill_costs_at_most_a_minute_of_training(chats, tmp_path, monkeypatch):
    saves, save = [], train.Metrics.save
    monkeypatch.setattr(train.Metrics, "save", lambda self, name, progress: (
        saves.append((name, progress.step)), save(self, name, progress)))
    seconds = itertools.count(step=25.0)
    monkeypatch.setattr(train, "agree", lambda world, real, number: (next(seconds), number))
    train.train(settings(chats, tmp_path / "out", epochs=0.3, eval_interval=1000))
    assert [step for name, step in saves[:2] if name == "last.pt"] == [4, 7]  # three steps are 75 seconds


def test_killed_at_random_moments_a_run_ends_with_the_weights_of_one_never_killed(chats, tmp_path, nursery):
    train.train(settings(chats, tmp_path / "straight", eval_interval=2, epochs=4.0))
    arguments = command(chats, tmp_path / "killed", "--eval_interval", "2", "--epochs", "4")
    kills, code, last = 0, None, tmp_path / "killed/last.pt"
    while code != 0:
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = Forked(nursery, arguments, tmp_path / "log")
        if kills < 5:
            while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
                time.sleep(0.01)  # at least one more checkpoint each time, or the run would never end
            time.sleep(0.013 * kills)
            os.kill(process.pid, signal.SIGKILL)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), process.log.read_text()
        kills += code != 0
        for path in (tmp_path / "killed").glob("*.pt"):
            Checkpoint.load(path).build_model()
        arguments = ["train.py", "--resume", "--out_dir", str(tmp_path / "killed"), "--device", "cpu"]
    print(f"{kills} kills")
    assert kills == 5
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "killed"))
    assert list((tmp_path / "killed").glob("*.tmp")) == []


def losses(out: Path) -> list:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line.get("train_loss", line.get("val_loss")) for line in lines]


def pair(nursery: subprocess.Popen, arguments: list, folder: Path) -> list:
    """Two processes of one run, started as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [Forked(nursery, arguments, folder / f"log{rank}", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]


@pytest.mark.parametrize("flags", [[], ["--fsdp"]])
def test_two_processes_train_as_one(chats, tmp_path, nursery, flags):
    # Small rates: training multiplies a difference in rounding, the more the larger its steps are.
    train.train(settings(chats, tmp_path / "one", learning_rate=0.002, embedding_lr=0.002))
    arguments = command(chats, tmp_path / "two", *flags, "--learning_rate", "0.002", "--embedding_lr", "0.002")
    ends = [process.wait() for process in pair(nursery, arguments, tmp_path)]
    assert ends == [0, 0], (tmp_path / "log0").read_text()[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two[:20] == pytest.approx(one[:20], abs=2e-3)
    assert two == pytest.approx(one, abs=3e-2)
    assert weights(tmp_path / "one").keys() == weights(tmp_path / "two").keys()


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(chats, tmp_path, nursery):
    out = tmp_path / "out"
    both = pair(nursery, command(chats, out, "--epochs", "900"), tmp_path)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        time.sleep(0.02)
        assert [process.poll() for process in both] == [None, None]
    os.kill(both[1].pid, signal.SIGTERM)
    assert [process.wait() for process in both] == [128 + signal.SIGTERM] * 2, (tmp_path / "log0").read_text()[-2000:]
    assert "all is saved" in (tmp_path / "log0").read_text()


@finds_processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_stop_with_their_launcher_save_and_one_goes_on(chats, tmp_path, number):
    out = tmp_path / "out"
    with open(tmp_path / "log", "w") as log:
        launcher, mark = start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                *command(chats, out, "--epochs", "900")], stdout=log, stderr=log)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        time.sleep(0.05)
        assert launcher.poll() is None
    assert len(marked(mark)) == 3
    launcher.send_signal(number)
    launcher.wait()
    for _ in range(1200):
        if not marked(mark):
            break
        time.sleep(0.05)
    assert marked(mark) == []
    assert "all is saved" in (tmp_path / "log").read_text(encoding="utf-8")
    stopped = Checkpoint.load(out / "last.pt").training["progress"]
    train.train(train.TrainConfig(resume=True, out_dir=str(out), device="cpu"), {"epochs": stopped["epoch"] + 1.0})
    assert Checkpoint.load(out / "last.pt").training["progress"]["step"] > stopped["step"]


def test_accumulated_gradients_are_those_of_the_whole_batch(chats, tmp_path):
    train.train(settings(chats, tmp_path / "whole", epochs=0.5))
    train.train(settings(chats, tmp_path / "parts", epochs=0.5, grad_accumulation=4))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=5e-3)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(chats, tmp_path, monkeypatch, capsys):
    train.train(settings(chats, tmp_path / "whole", epochs=0.5))
    gradients = train.Trainer.gradients

    def too_large(self, batch, parts):
        if len(batch.input_ids) / parts > 1:
            raise torch.OutOfMemoryError("not enough")
        return gradients(self, batch, parts)

    monkeypatch.setattr(train.Trainer, "gradients", too_large)
    train.train(settings(chats, tmp_path / "short", epochs=0.5))
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "whole"), abs=5e-3)
    assert "out of memory: each step now runs in 4 parts, the batch stays as it was" in capsys.readouterr().out


def test_a_compile_that_fails_goes_on_without(chats, tmp_path, monkeypatch, capsys):
    def broken(module):
        class Broken(torch.nn.Module):
            def forward(self, *_):
                raise RuntimeError("no compiler")
        return Broken()

    monkeypatch.setattr(torch, "compile", broken)
    train.train(settings(chats, tmp_path / "out", epochs=0.2, compile=True))
    assert "torch.compile failed (RuntimeError); going on without it" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ what comes out


def test_a_run_leaves_a_model_that_opens_alone_and_every_figure(chats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Metrics, "draw", DRAW)
    train.train(settings(chats, tmp_path / "out"))
    best, last = (Checkpoint.load(tmp_path / "out" / name) for name in ("best_model.pt", "last.pt"))
    tokenizer = Tokenizer.from_dict(best.tokenizer)
    ids, _ = render_chat(tokenizer, [{"role": "user", "content": "第3个数是几？"}], add_generation_prompt=True)
    assert list(best.build_model().generate(ids, 5))
    assert not any(name.startswith(("module.", "_orig_mod.", "model.")) for name in last.weights)
    summary = best.training["summary"]
    assert summary["chat"] is True
    assert summary["parameters"] == best.config.parameter_count()
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    validation = [line["val_loss"] for line in lines if "val_loss" in line]
    assert validation[-1] < validation[0]
    assert last.training["progress"]["best_loss"] == pytest.approx(min(validation), abs=1e-4)
    if find_spec("matplotlib"):
        assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for words in ("data  ", "model  ", "sample  ", "device  ", "plan  ", "[是", "bits/byte", "python chat.py"):
        assert words in said
    assert "[第" not in said  # what the user says is not learnt


def test_nothing_in_the_data_or_the_model_can_steer_the_terminal(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.jsonl"
    turns = [{"role": role, "content": "\x1b[2J\x9b2J\x07 你好"} for role in ("user", "assistant")]
    lines = [json.dumps({"messages": turns})] * 30 + [json.dumps({"odd \x1b[2J": 1})]
    path.write_text("\n".join(lines), encoding="utf-8")
    escapes = Tokenizer.train([], 259).encode("\x1b[2J")
    monkeypatch.setattr(GPT, "generate", lambda self, *_, **__: iter(escapes))
    train.train(settings(path, tmp_path / "out", vocab_size=259, epochs=0.5))
    said = capsys.readouterr().out
    for words in ("no known form of record; its keys are: odd ␛[2J", "␛[2J�2J␇ 你好", "-> ␛[2J"):
        assert words in said
    path.write_text(lines[-1], encoding="utf-8")
    monkeypatch.setattr(sys, "argv", command(path, tmp_path / "other"))
    assert train.main() == 2
    said += capsys.readouterr().err
    assert "odd ␛[2J" in said.splitlines()[-1]
    assert not re.search(r"[\x07\x1b\x9b]", said.replace("\x1b[A", ""))  # tqdm's own


def test_plain_text_trains_too_however_short(tmp_path):
    (tmp_path / "short.txt").write_text("床前明月光，疑是地上霜。\n" * 6, encoding="utf-8")
    train.train(settings(tmp_path / "short.txt", tmp_path / "out", seed=10**30))
    assert Checkpoint.load(tmp_path / "out/best_model.pt").training["summary"]["chat"] is False


def test_fine_tuning_starts_from_the_weights_and_the_tokenizer_of_a_checkpoint(chats, tmp_path, monkeypatch):
    train.train(settings(chats, tmp_path / "first", epochs=0.5))
    (tmp_path / "more.txt").write_text("第九个数是六十三。" * 200, encoding="utf-8")
    starts = []
    restore = train.Trainer.try_gradients
    monkeypatch.setattr(train.Trainer, "try_gradients", lambda self, *rest: (
        starts.append({k: v.clone() for k, v in self.model.state_dict().items()}), restore(self, *rest))[1])
    config = train.TrainConfig(data_path=[str(tmp_path / "more.txt")], out_dir=str(tmp_path / "second"), device="cpu",
                               init_from=str(tmp_path / "first/best_model.pt"), batch_size=4, epochs=1.0,
                               cache_dir=str(tmp_path / "cache"))
    train.train(config)
    first, second = (Checkpoint.load(tmp_path / name / "best_model.pt") for name in ("first", "second"))
    assert second.tokenizer == first.tokenizer
    assert all(torch.equal(first.weights[key], starts[0][key]) for key in first.weights)


def test_a_new_run_keeps_the_files_of_all_runs_before_and_clears_the_rests_of_a_killed_one(chats, tmp_path):
    for seed in range(3):
        train.train(settings(chats, tmp_path / "out", epochs=0.2, seed=seed))
        if seed == 1:
            for name in train.OUTPUTS:
                (tmp_path / f"out/{name}.tmp").write_bytes(b"half a file")
    seeds = [Checkpoint.load(tmp_path / "out" / name / "last.pt").training["config"]["seed"]
             for name in ("previous", "previous_2", ".")]
    assert seeds == [0, 1, 2]
    assert (tmp_path / "out/previous/best_model.pt").exists()
    assert (tmp_path / "out/previous/metrics.jsonl").read_text()
    assert list((tmp_path / "out").glob("*.tmp")) == []


def test_a_start_that_saved_nothing_is_not_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    train.keep_previous(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_nan_costs_its_step_and_no_more(chats, tmp_path, monkeypatch, capsys):
    loss, calls = GPT.loss, 0

    def sometimes_nan(self, *batch):
        nonlocal calls
        value = loss(self, *batch)
        calls += value.requires_grad  # evaluations are not steps
        return value * math.nan if calls in (6, 9) and value.requires_grad else value

    monkeypatch.setattr(GPT, "loss", sometimes_nan)
    train.train(settings(chats, tmp_path / "out"))
    assert Checkpoint.load(tmp_path / "out/last.pt").training["progress"]["skipped"] == 2
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())
    assert "2 steps skipped" in capsys.readouterr().out


def test_a_loss_that_stays_nan_stops_the_run_with_the_last_good_checkpoint(chats, tmp_path, monkeypatch):
    loss, calls = GPT.loss, 0

    def soon_nan(self, *batch):
        nonlocal calls
        calls += 1
        return loss(self, *batch) * (math.nan if calls > 10 else 1)

    monkeypatch.setattr(GPT, "loss", soon_nan)
    out, update = tmp_path / "out", train.Trainer.update

    def stop_in_between(self, factor):
        if calls == 22:  # of 20 in a row: the rest are to come after the resume
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, factor)

    monkeypatch.setattr(train.Trainer, "update", stop_in_between)
    with pytest.raises(SystemExit):
        train.train(settings(chats, out, epochs=9.0, eval_interval=1000))
    counted = Checkpoint.load(out / "last.pt").training["progress"]
    assert 0 < counted["skipped"] == counted["skipped_in_a_row"] < 20
    again = train.TrainConfig(resume=True, out_dir=str(out), device="cpu")
    with pytest.raises(InputError, match="NaN or infinite for 20 steps in a row; .*last.pt holds the last good state"):
        train.train(again, {})
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    stopped = Checkpoint.load(out / "last.pt").training["progress"]
    assert stopped["step"] == counted["step"] + 20 - counted["skipped"]
    assert (stopped["skipped"], stopped["skipped_in_a_row"]) == (20, 0)  # and the next resume has twenty again


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("flags", "words"), [
    (["--epochs", "0"], "--epochs must be above 0, not 0.0"),
    (["--max_minutes", "nan"], "--max_minutes must be above 0, not nan"),
    (["--batch_size", "-3"], "--batch_size must be at least 1, not -3"),
    (["--d_model", "31"], "--d_model 31 must be a multiple of --n_head 2"),
    (["--data_path", "nowhere.txt"], "nowhere.txt"),
    (["--device", "cuda:77"], "--device cuda:77: not available here"),
    (["--init_from", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--resume"], "last.pt: no such file"),
    (["--n_head", "0"], "--d_model 32 must be a multiple of --n_head 0"),
    (["--n_layer", "-1"], "n_layer must be from 1 to"),
    (["--weight_decay", "inf"], "--weight_decay must be 0 or above, not inf"),
    (["--out_dir", "/proc/nowhere"], "--out_dir /proc/nowhere: cannot write there"),
])
def test_bad_flags_get_one_line_and_exit_code_2(chats, tmp_path, monkeypatch, capsys, flags, words):
    arguments = command(chats, tmp_path / "out")[1:] + flags
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert train.main() == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("train.py: ")
    assert words in said


def test_a_second_run_into_the_same_folder_is_refused(chats, tmp_path):
    with train.lock(tmp_path / "out"):
        second = run(command(chats, tmp_path / "out"))
    assert second.returncode == 2
    assert "another training run is writing there" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_resume_with_another_model_or_other_data_is_refused(chats, tmp_path):
    train.train(settings(chats, tmp_path / "out", epochs=0.5))
    again = train.TrainConfig(resume=True, out_dir=str(tmp_path / "out"), device="cpu")
    with pytest.raises(InputError, match="--d_model cannot change on --resume: it was 32, not 64"):
        train.train(again, {"d_model": 64})
    with open(chats, "a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n')
    with pytest.raises(InputError, match="the training data is not what it was"):
        train.train(again, {"epochs": 2.0})


def test_a_resume_may_go_on_for_longer_and_with_other_settings(chats, tmp_path):
    train.train(settings(chats, tmp_path / "out", epochs=0.5))
    again = train.TrainConfig(resume=True, out_dir=str(tmp_path / "out"), device="cpu")
    train.train(again, {"epochs": 1.5, "batch_size": 2, "weight_decay": 0.25})
    training = Checkpoint.load(tmp_path / "out/last.pt").training
    assert training["progress"]["epoch"] >= 1
    assert {group["weight_decay"] for group in training["optimizers"][0]["param_groups"]} == {0.25}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of a short run, with its data."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "text.txt").write_text("床前明月光，疑是地上霜。\n" * 40, encoding="utf-8")
    train.train(settings(folder / "text.txt", folder / "out", epochs=1.0))
    return folder


@pytest.mark.parametrize("damage", [
    lambda training: training.update(config=None), lambda training: training["config"].update(batch_size="many"),
    lambda training: training["config"].update(data_path=[7]), lambda training: training["config"].update(preset="x"),
    lambda training: training.update(progress=[]), lambda training: training["progress"].update(row=-1),
    lambda training: training["progress"].update(reduced=0),
    lambda training: training["optimizers"].pop(), lambda training: training["optimizers"][0]["state"].pop(0),
    lambda training: training["optimizers"][1]["state"][0].update(exp_avg=torch.zeros(3)),
    lambda training: training["optimizers"][1]["state"][0].pop("exp_avg_sq"),
    lambda training: training.update(random_state=torch.zeros(3)), lambda training: training.pop("data"),
])
def test_a_damaged_training_state_is_refused_in_one_line(stopped, tmp_path, damage):
    checkpoint = Checkpoint.load(stopped / "out/last.pt")
    damage(checkpoint.training)
    checkpoint.save(tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"last.pt: (damaged, its|holds no training state)") as refusal:
        train.train(train.TrainConfig(resume=True, out_dir=str(tmp_path), device="cpu"))
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------ a full disk


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Mounts a disk of 3 MB on the folder."""
    folder.mkdir(exist_ok=True)
    may = sys.platform == "linux" and os.geteuid() == 0
    if not may or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounts a small disk; runs on Linux as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def room(folder: Path, left: int) -> Iterator[None]:
    """Fills the disk of the folder up to `left` bytes."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(folder).free - left))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def limit(folder: Path, left: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `left` bytes."""
    resource = pytest.importorskip("resource", reason="limits the size of files the POSIX way; runs on Linux and macOS")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("place", "full"), [(disk, room), (nullcontext, limit)])
def test_a_full_disk_is_one_line_and_costs_no_file(stopped, tmp_path, monkeypatch, capsys, place, full):
    out = tmp_path / "out"
    with place(out):
        shutil.copytree(stopped / "out", out, dirs_exist_ok=True)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--epochs", "2", "--out_dir", str(out), "--device",
                                          "cpu"])
        # Too little for a checkpoint, for another line of metrics.jsonl, for anything.
        for left in (65536, len(before["metrics.jsonl"]) + 10, 0):
            with full(out, left):
                assert train.main() == 2
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert re.match(rf"train.py: cannot write {out}/\S+: .*(No space left on device|File too large)", said)
            after = {path.name: path.read_bytes() for path in out.iterdir()}
            assert after.keys() == before.keys()
            assert all(after[name] == before[name] for name in ("best_model.pt", "last.pt"))
            assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
        assert train.main() == 0


@pytest.mark.parametrize(("place", "full"), [(disk, room), (nullcontext, limit)])
def test_a_full_disk_while_data_is_prepared_is_one_line_and_leaves_no_litter(chats, tmp_path, monkeypatch, capsys,
                                                                             place, full):
    folder = tmp_path / "disk"
    with place(folder):
        arguments = [*command(chats, tmp_path / "out"), "--cache_dir", str(folder / "cache")]
        monkeypatch.setattr(sys, "argv", arguments)
        with full(folder, 8192):
            assert train.main() == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(rf"train.py: {folder}/cache: cannot write the prepared data "
                        r"\((No space left on device|File too large)\)", said)
        assert list((folder / "cache").glob("tmp-*")) == []


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(chats, tmp_path, number):
    process, mark = start(command(chats, tmp_path / "out", "--epochs", "500"), stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
    while not (tmp_path / "out/metrics.jsonl").exists() or not (tmp_path / "out/metrics.jsonl").stat().st_size:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert marked(mark) == []
    assert f"go on with: python train.py --resume --out_dir {tmp_path / 'out'}" in said
    step = int(re.search(r"stopped at step (\d+)", said).group(1))
    assert Checkpoint.load(tmp_path / "out/last.pt").training["progress"]["step"] == step


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not(monkeypatch):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    stop = train.Stop()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.signal, ends) == (signal.SIGTERM, [])
    os.kill(os.getpid(), signal.SIGINT)
    assert ends == [130]


# ------------------------------------------------------------------------------------------------ properties


@hypothesis.settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([f for f in fields(train.TrainConfig) if f.type is not bool]),
                       st.integers() | st.floats() | st.integers(-2, 40), min_size=1))
def test_any_number_for_a_flag_is_taken_or_refused_in_one_line(wanted):
    numbers = {f.name: kind(value) for f, value in wanted.items() for kind in (int, float)
               if kind.__name__ in str(f.type) and (kind is float or math.isfinite(value))}
    try:
        config = train.settle(replace(train.TrainConfig(), **numbers), torch.device("cpu"))
    except InputError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017 (either way out is right)
        return
    assert train.model_config(config, 300).context_length == config.context_length
    assert 0 <= train.share_done(config, train.Progress(), 10) < 1


@given(st.floats(0, 1), st.floats(0, 0.9))
def test_the_learning_rate_rises_once_and_falls_to_zero(done, warmup):
    rate = train.learning_rate(done, warmup)
    assert 0 <= rate <= 1
    assert train.learning_rate(1.0, warmup) == 0
    if done > warmup:
        assert rate >= train.learning_rate(min(1.0, done + 0.01), warmup)


def test_a_run_with_epochs_and_minutes_ends_with_whichever_is_over_first():
    config = train.TrainConfig(epochs=4.0, max_minutes=2.0)
    assert train.share_done(config, train.Progress(epoch=3, row=0, seconds=6), 10) == 0.75
    assert train.share_done(config, train.Progress(epoch=0, row=5, seconds=60), 10) == 0.5


def test_a_budget_that_is_over_before_the_first_step_still_gives_a_model(chats, tmp_path):
    train.train(settings(chats, tmp_path / "out", epochs=None, max_minutes=1e-6))
    saved = Checkpoint.load(tmp_path / "out" / "best_model.pt")
    assert saved.training["summary"]["steps"] == 1


def test_progress_has_every_field_the_loop_uses_and_no_other():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "progress"}
    assert used == {field.name for field in fields(train.Progress)}


def test_help_names_every_setting_once():
    said = run([str(ROOT / "train.py"), "--help"])
    assert said.returncode == 0
    for field in fields(train.TrainConfig):
        assert f"--{field.name}" in said.stdout
