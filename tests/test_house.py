"""The shape of the repo: who imports whom, what loads at start, and that the documents name what exists."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export import start_probe
from formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
# What each script may import of the others. No circle; training, chat and export know nothing of each other.
MAY_IMPORT = {"model": set(), "tokenizer": {"model"}, "readers": {"model", "tokenizer"},
              "data": {"model", "tokenizer", "readers"}, "optim": {"model"},
              "train": {"model", "tokenizer", "data", "optim"},
              "artifacts": {"model", "tokenizer"}, "chat": {"model", "tokenizer", "artifacts"},
              "formats": {"model", "tokenizer"}, "export": {"model", "tokenizer", "formats"}}
HEAVY = {"transformers", "onnx", "onnxruntime", "onnxscript", "tokenizers", "matplotlib", "pandas", "huggingface_hub",
         "safetensors", "tensorboard", "gguf", "cyllama"}


def imports(path: Path, top_level_only: bool = False) -> set:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_scripts_import_only_what_the_picture_allows():
    assert SCRIPTS == MAY_IMPORT.keys()
    for script, allowed in MAY_IMPORT.items():
        assert imports(ROOT / f"{script}.py") & SCRIPTS <= allowed, script


@pytest.mark.parametrize("script", sorted(MAY_IMPORT))
def test_no_script_loads_a_heavy_package_at_its_top(script):
    assert not imports(ROOT / f"{script}.py", top_level_only=True) & HEAVY


def test_importing_the_scripts_loads_no_heavy_package_by_a_side_door():
    code = f"import sys, torch, {', '.join(MAY_IMPORT)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(loaded.stdout.split()) & HEAVY


def test_only_training_preparing_and_exporting_start_threads_or_processes():
    """The tests of these see to it that none is left running; the others have nothing to leave."""
    starters = {"subprocess", "threading", "multiprocessing", "concurrent"}
    starting = {script for script in SCRIPTS if imports(ROOT / f"{script}.py") & starters}
    assert starting == {"train", "data", "tokenizer", "export"}


def test_a_probe_ends_with_the_export_that_started_it(tmp_path):
    endless = replace(FORMATS["torchscript"], snippet="open('running', 'w').close()\ntime.sleep(600)")
    probe = start_probe(endless, tmp_path)
    while not (tmp_path / "running").exists():
        assert probe.poll() is None
    probe.stdin.close()  # as the system does for a process that is killed
    assert probe.wait(60) == 1


@pytest.mark.parametrize("page", ["README.md", "README_en.md"])
def test_every_file_and_flag_a_readme_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for script, flags in re.findall(r"python (\w+)\.py([^\n`]*)", text):
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"--(\w+)", flags):
            assert re.search(rf"\b{flag}\b", source), f"{script}.py --{flag}"


def test_both_readmes_have_the_same_chapters_and_the_same_code():
    chinese, english = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_en.md"))
    assert len(re.findall(r"(?m)^#+ ", chinese)) == len(re.findall(r"(?m)^#+ ", english))

    def code(text):
        return re.findall(r"(?ms)^```(?:bash|python|js)\n(.*?)^```", text)

    assert code(chinese) == code(english)
