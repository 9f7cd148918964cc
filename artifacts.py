"""Opens whatever this project makes: a training checkpoint, or what export.py writes (but GGUF), told apart by content.

Nothing in an artifact is executed, and nothing is unpickled beyond tensors and plain data. What cannot be opened is an
InputError that says why.
"""

import json
import os
import re
import zipfile
from base64 import b64encode
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import torch
from torch import Tensor

from model import GPT, Checkpoint, Decoder, GPTConfig, InputError
from tokenizer import Tokenizer, byte_of_character

SMALL_MODEL = 2**27  # bytes
LARGEST_TEXT_FILE = 2**28  # bytes of config.json or tokenizer.json; the largest vocabulary in use needs some 2**25


# ----------------------------------------------------------------------------------------------------- runtime


@dataclass
class Runtime:
    """An opened model: next-token logits for a growing list of ids, what is already computed kept.

    `feed(kept, new)` forgets all but the first `kept` ids it was fed, adds `new` (never empty) and returns the logits
    (V,) of the token after them.
    """

    kind: str
    tokenizer: Tokenizer
    config: GPTConfig
    feed: Callable[[int, List[int]], Tensor]
    is_chat: bool
    held: List[int] = field(default_factory=list)

    def __post_init__(self):
        self.context_length = self.config.context_length
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise InputError(f"the model is damaged: it knows {self.config.vocab_size} tokens, its tokenizer "
                             f"{self.tokenizer.vocab_size}")

    def start(self, ids: List[int]) -> Tensor:
        """Logits after `ids`; only what differs from the ids fed before is computed."""
        kept = 0
        for old, new in zip(self.held, ids[:-1], strict=False):
            if old != new:
                break
            kept += 1
        return self.extend(self.held[:kept], ids[kept:])

    def step(self, token: int) -> Tensor:
        """Logits after one more token."""
        return self.extend(self.held, [token])

    def extend(self, held: List[int], new: List[int]) -> Tensor:
        self.held = []  # what an interrupt in the middle of the model leaves behind is not to be trusted
        logits = self.feed(len(held), new)[:self.tokenizer.vocab_size]
        if logits.isnan().any():
            raise InputError("the model is damaged: what it computes is not a number")
        held += new
        self.held = held
        return logits


def uncached(compute: Callable[[List[int]], Tensor]) -> Callable[[int, List[int]], Tensor]:
    """The `feed` of a runtime that knows only whole sequences."""
    fed: List[int] = []

    def feed(kept: int, new: List[int]) -> Tensor:
        fed[kept:] = new
        return compute(fed)

    return feed


def gpt_runtime(kind: str, model: GPT, tokenizer: Tokenizer, device: str, is_chat: bool) -> Runtime:
    model = model.to(device)
    if device == "cpu":
        model = model.float()
    decoder = Decoder(model, model.new_cache())

    def feed(kept: int, new: List[int]) -> Tensor:
        decoder.cache.truncate(kept)
        return decoder.feed(new)

    return Runtime(kind, tokenizer, model.config, feed, is_chat)


# ------------------------------------------------------------------------------------------------------- parts


def read_tokenizer_json(text: str, source: str) -> Tokenizer:
    """Our tokenizer from the tokenizer.json of an export; any other tokenizer.json is an InputError."""
    try:
        values = json.loads(text)
        byte_of = byte_of_character()
        special_ids = {token["content"]: token["id"] for token in values["added_tokens"]}
        ranks = sorted((rank, bytes(byte_of[character] for character in token))
                       for token, rank in values["model"]["vocab"].items() if token not in special_ids)
        pattern = values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        if [rank for rank, _ in ranks] != list(range(len(ranks))) or values["normalizer"] is not None:
            raise ValueError
        lines = "\n".join(b64encode(token).decode() for _, token in ranks)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{source}: its tokenizer is not one that export.py writes") from None
    return Tokenizer.from_dict({"name": "exported", "pattern": pattern, "ranks": lines, "special_ids": special_ids})


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_TEXT_FILE:
            raise InputError(f"{path}: refused, {path.stat().st_size} bytes are too many for this kind of file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {path.name} here") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def read_config(text: str, source: str) -> dict:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{source}: its config.json is damaged")
    return values


def is_chat(config: dict) -> bool:
    """Whether a config.json is of a model that was trained on chats, as nearly all are: False stands there if not."""
    return config.get("chat") is not False


def read_exported_config(text: str, source: str) -> Tuple[GPTConfig, bool]:
    """The sizes in a config.json that lies inside an exported file, and whether the model chats."""
    values = read_config(text, source)
    sizes = {name: value for name, value in values.items() if name not in ("model_type", "chat")}
    return GPTConfig.from_dict(sizes), is_chat(values)


def read_transformers_sizes(values: dict) -> GPTConfig:
    """The sizes in a config.json of transformers."""
    names = dict(vocab_size="vocab_size", context_length="max_position_embeddings", n_layer="num_hidden_layers",
                 n_head="num_attention_heads", n_kv_head="num_key_value_heads", d_model="hidden_size",
                 d_ff="intermediate_size", head_dim="head_dim", tie_embeddings="tie_word_embeddings")
    return GPTConfig.from_dict({ours: values[theirs] for ours, theirs in names.items() if theirs in values})


# ----------------------------------------------------------------------------------------------------- openers


def open_checkpoint(path: Path, device: str) -> Runtime:
    checkpoint = Checkpoint.load(path)
    tokenizer = Tokenizer.from_dict(checkpoint.tokenizer)
    summary = checkpoint.training.get("summary") if isinstance(checkpoint.training, dict) else None
    chats = not isinstance(summary, dict) or is_chat(summary)
    return gpt_runtime("checkpoint", checkpoint.build_model(), tokenizer, device, chats)


def open_huggingface(path: Path, device: str) -> Runtime:
    tokenizer = read_tokenizer_json(read_text(path / "tokenizer.json"), str(path))
    chats = is_chat(read_config(read_text(path / "config.json"), str(path)))
    return gpt_runtime("huggingface folder", GPT.from_pretrained(path), tokenizer, device, chats)


def open_transformers(path: Path, device: str) -> Runtime:
    """Weights from safetensors alone, classes from transformers alone: nothing in the folder is executed."""
    tokenizer = read_tokenizer_json(read_text(path / "tokenizer.json"), str(path))
    values = read_config(read_text(path / "config.json"), str(path))
    sizes = read_transformers_sizes(values)
    if sizes.parameter_count() > sum(file.stat().st_size for file in path.glob("*.safetensors")):
        raise InputError(f"{path}: model.safetensors is missing, or smaller than config.json says")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoModelForCausalLM, DynamicCache
        from transformers.utils import logging
    except ImportError:
        raise InputError("a transformers folder needs transformers: pip install transformers") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32 if device == "cpu" else "auto", trust_remote_code=False, local_files_only=True,
            use_safetensors=True, output_loading_info=True)
    except Exception as error:  # whatever a damaged folder makes the library raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: transformers cannot load it ({what:.200})") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise InputError(f"{path}: model.safetensors lacks {len(info['missing_keys'])} of the model's weights")
    model = model.to(device).eval()
    cache = DynamicCache()
    cache_name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # before 5.24

    @torch.inference_mode()
    def feed(kept: int, new: List[int]) -> Tensor:
        nonlocal cache
        if not kept:
            cache = DynamicCache()
        elif surplus := cache.get_seq_length() - kept:
            cache.crop(-surplus)
        ids = torch.tensor([new], device=device)
        return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name: cache}).logits[0, -1]

    return Runtime("transformers folder", tokenizer, sizes, feed, is_chat(values))


def read_torchscript_texts(path: Path) -> Tuple[bytes, dict]:
    """The code of a TorchScript file and the texts that export.py put beside it, without loading anything."""
    with zipfile.ZipFile(path) as archive:
        # Only code and texts are compressed: what unpacks to far more than the file itself is a bomb.
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size + LARGEST_TEXT_FILE:
            raise InputError(f"{path}: refused, it would unpack to far more than its own size")
        code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))
        return code, {name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist()
                      if name.partition("/")[2] in ("extra/config.json", "extra/tokenizer.json")}


def open_torchscript(path: Path, device: str) -> Runtime:
    try:
        code, texts = read_torchscript_texts(path)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile raise
        raise InputError(f"{path}: damaged, or cut off") from error
    if re.search(rb"\b(save|from_file)\b", code):  # all of TorchScript that touches files
        raise InputError(f"{path}: refused, its code reaches for files")
    if len(texts) < 2:
        raise InputError(f"{path}: a TorchScript file, but not one that export.py wrote")
    tokenizer = read_tokenizer_json(texts["tokenizer.json"], str(path))
    config, chats = read_exported_config(texts["config.json"], str(path))
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise InputError(f"{path}: damaged, it does not load as TorchScript") from error

    @torch.inference_mode()
    def compute(ids: List[int]) -> Tensor:
        return model(torch.tensor([ids], device=device), None)[0][0, -1]

    return Runtime("TorchScript", tokenizer, config, uncached(compute), chats)


def read_onnx_texts(path: Path) -> dict:
    """The texts in an ONNX file. Nothing is loaded, and it is sure that no weight lies outside the file's folder."""
    try:
        import onnx
        import onnxruntime  # noqa: F401 (what start_session needs, missed here with the other)
    except ImportError as error:
        raise InputError(f"an ONNX file needs {error.name}: pip install onnx onnxruntime") from None
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors
        raise InputError(f"{path}: damaged, or not an ONNX file") from error
    for location in external_locations(proto):
        target = (path.parent / location).resolve()
        if not target.is_relative_to(path.parent.resolve()):
            raise InputError(f"{path}: refused, its weights point outside its folder ({location!r:.80})")
        if not target.is_file():
            raise InputError(f"{path}: its weights should lie beside it in {location!r:.80}, which is not there")
    return {prop.key: prop.value for prop in proto.metadata_props}


def start_session(path: Path):
    """An ONNX Runtime session on the CPU, for a file that read_onnx_texts has found safe."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, and said in one line
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own errors
        raise InputError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]:.200})") from error


def open_onnx(path: Path, device: str) -> Runtime:
    texts = read_onnx_texts(path)
    if "config.json" not in texts or "tokenizer.json" not in texts:
        if (path.parent.parent / "config.json").exists():
            raise InputError(f"{path}: a part of the folder {path.parent.parent}; give that")
        raise InputError(f"{path}: an ONNX file, but not one that export.py wrote")
    tokenizer = read_tokenizer_json(texts["tokenizer.json"], str(path))
    config, chats = read_exported_config(texts["config.json"], str(path))
    session = start_session(path)

    def compute(ids: List[int]) -> Tensor:
        logits = session.run(["logits"], {"input_ids": torch.tensor([ids]).numpy()})[0]
        return torch.from_numpy(logits[0, -1])

    return Runtime("ONNX", tokenizer, config, uncached(compute), chats)


def open_web(path: Path, device: str) -> Runtime:
    """The graph that keeps keys and values, of a folder for transformers.js, in ONNX Runtime."""
    tokenizer = read_tokenizer_json(read_text(path / "tokenizer.json"), str(path))
    values = read_config(read_text(path / "config.json"), str(path))
    config = read_transformers_sizes(values)
    read_onnx_texts(path / "onnx/model.onnx")
    session = start_session(path / "onnx/model.onnx")
    names = [put.name for put in session.get_inputs() if put.name.startswith("past_key_values.")]
    past = [torch.zeros(1, config.n_kv_head, 0, config.head_dim).numpy()] * len(names)

    def feed(kept: int, new: List[int]) -> Tensor:
        inputs = {name: array[:, :, :kept] for name, array in zip(names, past, strict=True)}
        ids, positions = torch.tensor([new]), torch.arange(kept, kept + len(new))[None]
        mask = torch.ones(1, kept + len(new), dtype=torch.long)
        inputs |= {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        try:
            found = session.run(None, inputs)
        except Exception:  # ONNX Runtime's own errors
            found = []
        pair = 1, config.n_kv_head, kept + len(new), config.head_dim
        if [array.shape for array in found] != [(1, len(new), config.vocab_size)] + [pair] * len(past):
            raise InputError(f"{path}: damaged, onnx/model.onnx does not compute what config.json says")
        logits, *past[:] = found
        return torch.from_numpy(logits[0, -1])

    feed(0, [0])  # so that a damaged graph is refused here
    return Runtime("web folder", tokenizer, config, feed, is_chat(values))


def external_locations(message) -> Iterator[str]:
    """Where the tensors of an ONNX message lie that are not in the file itself, wherever in the graph they stand."""
    for descriptor, value in message.ListFields():
        if descriptor.name == "external_data":
            yield from (entry.value for entry in value if entry.key == "location")
        elif descriptor.message_type is not None:
            for part in value if hasattr(value, "__len__") else [value]:
                yield from external_locations(part)


# ---------------------------------------------------------------------------------------------- told by content


def is_zip_with(name: str) -> Callable[[Path], bool]:
    """A test for PyTorch's zip files by an entry that only one kind has."""
    def test(path: Path) -> bool:
        try:
            with zipfile.ZipFile(path) as archive:
                return any(entry.partition("/")[2] == name for entry in archive.namelist())
        except Exception:  # whatever a file that is no zip, or a damaged one, makes zipfile raise
            return False
    return test


def starts_with(start: bytes, at: int = 0) -> Callable[[Path], bool]:
    def test(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(at + len(start))[at:] == start
    return test


def has_config_of(*model_types: str) -> Callable[[Path], bool]:
    return lambda path: read_config(read_text(path / "config.json"), str(path)).get("model_type") in model_types


def refuse(what: str) -> Callable[[Path, str], Runtime]:
    def open_nothing(path: Path, device: str) -> Runtime:
        raise InputError(f"{path}: {what}")
    return open_nothing


# What tells a file or folder, and what opens it. The first that fits is taken.
FILES: Tuple[Tuple[Callable[[Path], bool], Callable[[Path, str], Runtime]], ...] = (
    (is_zip_with("constants.pkl"), open_torchscript),
    (is_zip_with("data.pkl"), open_checkpoint),
    (starts_with(b"\x08"), open_onnx),  # the ir_version of an ONNX ModelProto
    (starts_with(b"GGUF"), refuse("a GGUF file, which llama.cpp runs; chat.py opens what it was made from")),
    (starts_with(b"{", at=8), refuse("a safetensors file; give the folder that it lies in, with its config.json")),
    (lambda path: True, open_checkpoint),
)
FOLDERS: Tuple[Tuple[Callable[[Path], bool], Callable[[Path, str], Runtime]], ...] = (
    (has_config_of("gpt"), open_huggingface),
    (lambda path: (path / "onnx/model.onnx").exists(), open_web),
    (has_config_of("qwen3", "llama"), open_transformers),
    (lambda path: True, refuse("config.json is not of a model that export.py writes")),
)


def open_model(path: Path, device: str) -> Runtime:
    """Opens any artifact of this project, told apart by content, or InputError."""
    if not path.exists():
        raise InputError(f"{path}: no such file; `python train.py` makes checkpoints/best_model.pt")
    if path.is_dir() and not (path / "config.json").exists():
        inside = [entry for entry in sorted(path.iterdir()) if entry.suffix in (".pt", ".onnx") or entry.is_dir()
                  and (entry / "config.json").exists()]
        hint = f"; it holds {', '.join(map(str, inside[:5]))}" if inside else ""
        raise InputError(f"{path}: a folder without a model{hint}")
    parts = path.glob("*.safetensors") if path.is_dir() else [path]
    if sum(part.stat().st_size for part in parts) < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # splitting products this small costs more than it saves, more so on a busy machine
    try:
        opener = next(opener for fits, opener in (FOLDERS if path.is_dir() else FILES) if fits(path))
        return opener(path, device)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
