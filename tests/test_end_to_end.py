"""The whole way as a user goes it, sockets blocked: train, chat in a terminal, export, open every artifact afresh."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pexpect
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Ends the process, as an error could be caught and never seen.
NO_NETWORK = '''
import os, socket, sys

def refuse(*asked, **more):
    print("the network was asked for:", *asked, file=sys.stderr, flush=True)
    os._exit(97)

def refuse_unless_local(self, address, *rest):
    return connect(self, address, *rest) if self.family == getattr(socket, "AF_UNIX", None) else refuse(address)

connect, socket.socket.connect, socket.socket.connect_ex = socket.socket.connect, *[refuse_unless_local] * 2
socket.getaddrinfo = socket.gethostbyname = socket.socket.sendto = refuse
'''
# The interpreters that prove an export are isolated: they do not read sitecustomize.py.
ALSO_IN_PROBES = f'''
import subprocess

def guarded(self, command, *rest, **options):
    if isinstance(command, list) and "-I" in command:
        command = [*command[:-1], {NO_NETWORK!r} + command[-1]]
    start(self, command, *rest, **options)

start, subprocess.Popen.__init__ = subprocess.Popen.__init__, guarded
'''
TALKS = [("你好", "你好！有什么可以帮你？"), ("谢谢", "不客气！"), ("再见", "再见，祝你愉快！"),
         ("你好，请问", "请说。"),
         ("hello", "Hello! How can I help?"), ("thanks", "You are welcome."), ("bye", "Goodbye!")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A user's folder, with a chat file of their own and no way to the network."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "sitecustomize.py").write_text(NO_NETWORK + ALSO_IN_PROBES)
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        for n in range(30):
            turns = TALKS[n % 7], TALKS[(n * 3 + n // 7) % 7]
            messages = [{"role": role, "content": text} for turn in turns
                        for role, text in zip(("user", "assistant"), turn, strict=True)]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return folder


def environment(place: Path, *more: Path) -> dict:
    ours = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # a user has not set it
    return {**ours, "PYTHONPATH": os.pathsep.join(map(str, (place, *more))), "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1"}


def python(place: Path, *arguments: str, path: tuple = ()) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=place, env=environment(place, *path), capture_output=True,
                          text=True, encoding="utf-8", timeout=240, check=False)


@pytest.fixture(scope="module")
def trained(place) -> Path:
    done = python(place, str(ROOT / "train.py"), "--data_path", "chats.jsonl", "--epochs", "60", "--n_layer", "2",
                  "--d_model", "48", "--n_head", "4", "--n_kv_head", "2", "--d_ff", "96", "--context_length", "64",
                  "--batch_size", "4", "--vocab_size", "400", "--cache_dir", "cache", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    return place


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    done = python(trained, str(ROOT / "export.py"), "--format", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((trained / "exported_models/export_report.json").read_text())["passed"] is True
    return trained


def test_the_network_is_really_blocked(place):
    for code in ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
                 "import contextlib, socket\nwith contextlib.suppress(OSError): socket.create_connection(('::1', 9))"):
        probe = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-c', {code!r}], check=True)"
        for tried in (python(place, "-c", code), python(place, "-c", probe)):
            assert tried.returncode
            assert "the network was asked for" in tried.stderr


def test_a_trained_model_answers_in_a_terminal(trained):
    chat = pexpect.spawn(sys.executable, [str(ROOT / "chat.py"), "--greedy"], cwd=str(trained), encoding="utf-8",
                         env={**environment(trained), "TERM": "dumb"}, timeout=20)
    for question, answer in (("谢谢", "不客气！"), ("hello", "How can I help"), ("再见", "祝你愉快")):
        chat.expect_exact("> ")
        chat.sendline(question)
        chat.expect_exact(answer)
    chat.expect_exact("> ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def blocks(page: str) -> list:
    return re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"))


def test_every_python_block_of_the_readme_runs_as_it_stands(exported):
    """README.md has the same blocks, which test_house.py checks."""
    def run(code: str) -> subprocess.CompletedProcess:
        return python(exported, "-c", code, path=(ROOT,) if "from model" in code or "from data" in code else ())

    codes = [code for code in blocks("README_en.md") if "cyllama" not in code or find_spec("cyllama")]
    with ThreadPoolExecutor(2) as pool:
        for code, done in zip(codes, pool.map(run, codes), strict=True):
            assert done.returncode == 0, code + done.stderr[-2000:]
            if "print(tokenizer.decode(outputs[0]))" in code:
                assert done.stdout.startswith("你好，请问")


def test_chat_says_the_same_through_every_artifact(exported):
    def reply(path: str) -> str:
        return python(exported, str(ROOT / "chat.py"), "--greedy", "--prompt", "谢谢", "--model_path", path).stdout

    names = ("huggingface", "transformers", "model.pt", "model.onnx", "web")
    artifacts = [f"exported_models/{name}" for name in names]
    with ThreadPoolExecutor(2) as pool:
        replies = list(pool.map(reply, ["checkpoints/best_model.pt", *artifacts]))
    assert "不客气" in replies[0]
    assert replies == replies[:1] * 6
