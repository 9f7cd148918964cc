"""The formats that export.py writes: weight map, tokenizer map, and a row of FORMATS each with writer and probe.

Writers read a Source, write below one target path, and never change the model. Only the maps here know the names that
other programs use.
"""

import io
import json
import logging
import re
import shutil
import warnings
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from model import GPT, Checkpoint, GPTConfig, InputError, build_model
from tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, Tokenizer, byte_of_character, harmless

ONNX_OPSET = 20  # the newest that runtimes of 2024 read, and the oldest with all that is needed
ONNX_FILE_LIMIT = 2**31 - 2**26  # bytes of weights; protobuf ends at 2 GiB, and the graph and tokenizer need some


@dataclass
class Source:
    """What the writers read: the checkpoint as it was trained, its model in float32, its tokenizer."""

    checkpoint: Checkpoint
    model: GPT
    tokenizer: Tokenizer
    seq_len: int

    @property
    def config(self) -> GPTConfig:
        return self.checkpoint.config

    @property
    def summary(self) -> dict:
        """What the checkpoint says of its training, or nothing."""
        training = self.checkpoint.training
        summary = training.get("summary") if isinstance(training, dict) else None
        return summary if isinstance(summary, dict) else {}

    @property
    def is_chat(self) -> bool:
        """False only for a model that saw plain text alone: there is no chat to be had with it."""
        return self.summary.get("chat") is not False

    @property
    def weight_bytes(self) -> int:
        """Of the weights in float32."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def config_text(self) -> str:
        return json.dumps({"model_type": "gpt", **self.config.to_dict(), "chat": self.is_chat}, indent=2) + "\n"

    @property
    def title(self) -> str:
        return f"A GPT of {self.config.parameter_count() / 1e6:.1f} million parameters"

    @cached_property
    def tokenizer_document(self) -> dict:
        """tokenizer.json, made once for all formats: recovering the merges of a large vocabulary takes a second."""
        return tokenizer_json(self.tokenizer)

    @property
    def tokenizer_text(self) -> str:
        return json.dumps(self.tokenizer_document, ensure_ascii=False) + "\n"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or a read-only place makes the libraries raise into an InputError."""
    try:
        yield
    except Exception as error:
        # torch raises RuntimeError; safetensors its own, not imported here as two of the formats do without it.
        if not isinstance(error, (OSError, RuntimeError)) and type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"cannot write {path.name}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, cut short; its name if it says nothing, as those of a lost connection may."""
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.200}"


# -------------------------------------------------------------------------------------------------- weight map


def weight_map(config: GPTConfig) -> Dict[str, Dict[str, int]]:
    """Our name of each tensor -> transformers' names of the tensors stacked in it, top to bottom, with their rows."""
    width, heads, kv = config.d_model, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    names = {"token_embedding.weight": {"model.embed_tokens.weight": config.vocab_size}}
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        names |= {
            ours + "attention_norm.weight": {theirs + "input_layernorm.weight": width},
            ours + "attention.qkv.weight": {theirs + "self_attn.q_proj.weight": heads,
                                            theirs + "self_attn.k_proj.weight": kv,
                                            theirs + "self_attn.v_proj.weight": kv},
            ours + "attention.out.weight": {theirs + "self_attn.o_proj.weight": width},
            ours + "ffn_norm.weight": {theirs + "post_attention_layernorm.weight": width},
            ours + "ffn.gate_up.weight": {theirs + "mlp.gate_proj.weight": config.d_ff,
                                          theirs + "mlp.up_proj.weight": config.d_ff},
            ours + "ffn.down.weight": {theirs + "mlp.down_proj.weight": width},
        }
        if config.qk_norm:
            names |= {ours + "attention.q_norm.weight": {theirs + "self_attn.q_norm.weight": config.head_dim},
                      ours + "attention.k_norm.weight": {theirs + "self_attn.k_norm.weight": config.head_dim}}
    names["final_norm.weight"] = {"model.norm.weight": width}
    if not config.tie_embeddings:
        names["lm_head.weight"] = {"lm_head.weight": config.vocab_size}
    return names


def _check_names(expected, given) -> None:
    for name in sorted(set(expected) ^ set(given)):
        raise InputError(f"weight map: {'unknown' if name in given else 'missing'} weight {name:.80}")


def to_transformers(weights: Dict[str, Tensor], config: GPTConfig) -> Dict[str, Tensor]:
    """Our weights under transformers' names, cut where ours are stacked. A missing or unknown name: InputError."""
    names = weight_map(config)
    _check_names(names, weights)
    return {theirs: part.clone() for ours, parts in names.items()
            for theirs, part in zip(parts, weights[ours].split(list(parts.values())), strict=True)}


def from_transformers(weights: Dict[str, Tensor], config: GPTConfig) -> Dict[str, Tensor]:
    """The inverse of to_transformers."""
    names = weight_map(config)
    _check_names([theirs for parts in names.values() for theirs in parts], weights)
    return {ours: torch.cat([weights[theirs] for theirs in parts]) for ours, parts in names.items()}


# Our fields -> those of transformers' Qwen3Config and LlamaConfig; rope_theta and qk_norm are expressed elsewhere.
CONFIG_MAP = {
    "vocab_size": "vocab_size", "context_length": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "d_model": "hidden_size",
    "d_ff": "intermediate_size", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
QK_NORM_OF = {"qwen3": True, "llama": False}  # model_type -> whether its attention norms queries and keys
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def to_transformers_config(config: GPTConfig, dtype: torch.dtype, end_ids: List[int], pad_id: int) -> dict:
    """config.json of the stock class. rope_theta and dtype stand in the spellings of transformers 4 and of 5."""
    model_type = next(name for name, qk_norm in QK_NORM_OF.items() if qk_norm == config.qk_norm)
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [ARCHITECTURES[model_type]], "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in CONFIG_MAP.items()},
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "use_cache": True, "dtype": dtype_name, "torch_dtype": dtype_name,
        "bos_token_id": None, "eos_token_id": end_ids, "pad_token_id": pad_id,
    }


def from_transformers_config(values: dict, source: str) -> GPTConfig:
    """Our config for a transformers config.json, or InputError if our layers are not its."""
    model_type = values.get("model_type")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    foreign = {"hidden_act": values.get("hidden_act", "silu") != "silu",
               "rope_type": rope.get("rope_type", "default") != "default",
               "attention_bias": bool(values.get("attention_bias")), "mlp_bias": bool(values.get("mlp_bias")),
               "sliding_window": bool(values.get("use_sliding_window"))}
    if model_type not in QK_NORM_OF or any(foreign.values()):
        what = next((name for name, is_foreign in foreign.items() if is_foreign), f"model_type {model_type!r:.40}")
        raise InputError(f"{source}: {what} is not what this project's layers compute")
    values = {"head_dim": values.get("hidden_size", 0) // max(1, values.get("num_attention_heads", 1)), **values}
    missing = [theirs for theirs in CONFIG_MAP.values() if theirs not in values]
    if missing:
        raise InputError(f"{source}: config.json lacks {missing[0]}")
    return GPTConfig.from_dict({
        **{ours: values[theirs] for ours, theirs in CONFIG_MAP.items()}, "qk_norm": QK_NORM_OF[model_type],
        "rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))})


def load_transformers(folder) -> GPT:
    """A GPT, in eval mode, with the weights of a Qwen3 or Llama folder of transformers (config.json, *.safetensors)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        weights: Dict[str, Tensor] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            weights |= load_file(path)
        config = from_transformers_config(values, str(folder))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: not a transformers folder ({first_line(error)})") from error
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return build_model(config, from_transformers(weights, config), str(folder))


# ----------------------------------------------------------------------------------------------- tokenizer map


def recover_merges(ranks: Dict[bytes, int]) -> List[Tuple[bytes, bytes]]:
    """The merges that made a vocabulary, in order: each token's bytes are merged by the ranks below its own.

    tiktoken keeps only the ranks of results. What is left before the last step is the pair that makes the token.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:], strict=False)]
            best = min(pairs)
            if best >= rank:
                raise InputError(f"tokenizer: no merges of earlier tokens make the token {token!r:.60}")
            at = pairs.index(best)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def portable_pattern(pattern: str) -> str:
    r"""The split pattern without possessive quantifiers and `$`, which Oniguruma and JavaScript read differently.

    Oniguruma takes `{1,3}+` for a repeated group and `$` for the end of any line. In tiktoken's patterns nothing that
    follows a possessive quantifier could match what it holds, so that a plain one finds the same.
    """
    return re.sub(r"([?*+]|\{\d[\d,]*\})\+", r"\1", pattern).replace("$", r"(?![\s\S])")


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The tokenizer in the form of the tokenizers library (tokenizer.json), giving the same ids.

    Special tokens stand in the vocabulary too: that is what pins their ids where a named encoding has gaps.
    """
    character = {byte: character for character, byte in byte_of_character().items()}

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    special = sorted(tokenizer.special_ids.items(), key=lambda item: item[1])
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for token, i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": portable_pattern(tokenizer.pattern)}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {spell(token): rank for token, rank in tokenizer.ranks.items()} | dict(special),
                  "merges": [f"{spell(left)} {spell(right)}" for left, right in recover_merges(tokenizer.ranks)]},
    }


# -------------------------------------------------------------------------------------------------- model card


def model_card(source: Source, library: str, snippet: str, notes: str) -> str:
    """README.md of an exported folder: what it is, how it was trained, the snippet that loads it."""
    config = source.config
    sizes = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in config.to_dict().items())
    trained = "\n".join(f"- {name.replace('_', ' ')}: {harmless(str(value)):.300}"
                        for name, value in source.summary.items() if isinstance(value, (str, int, float)))
    return f"""---
library_name: {library}
pipeline_tag: text-generation
---
# {source.title}

A decoder-only Transformer with the architecture of {"Qwen3" if config.qk_norm else "Llama"}: RMSNorm, rotary positions,
grouped-query attention, SwiGLU, no biases. It saw at most {config.context_length} tokens at a time.

```python
{snippet.strip()}
```

{notes.strip()}

## Training

{trained or "The checkpoint holds no facts of its training."}

## Sizes

| | |
|---|---|
{sizes}
"""


# ------------------------------------------------------------------------------------------------- huggingface

HUGGINGFACE_SNIPPET = """
from model import GPT
model = GPT.from_pretrained("exported_models/huggingface")
"""

HUGGINGFACE_NOTES = """
`model.py` is the project's own file. From the Hugging Face Hub, with the same `model.py`:

```python
from huggingface_hub import PyTorchModelHubMixin
class HubGPT(PyTorchModelHubMixin, GPT):
    pass
model = HubGPT.from_pretrained("user/name")
```

`tokenizer.json` is read by `tokenizers.Tokenizer.from_file`.
"""

# The one probe that needs this project's own code: the contract is that model.py loads the folder.
HUGGINGFACE_PROBE = """
config_text = open("exported_models/huggingface/config.json", encoding="utf-8").read()
tokenizer_text = open("exported_models/huggingface/tokenizer.json", encoding="utf-8").read()
model = model.float()

def compute_logits(ids):
    with torch.inference_mode():
        return model(torch.from_numpy(ids))[0].numpy()

def decode_greedily(prompt, count):
    return list(model.generate(prompt, count))
"""


def write_huggingface(source: Source, folder: Path) -> None:
    with writing(folder):
        source.checkpoint.build_model().save_pretrained(folder)
        folder.joinpath("config.json").write_text(source.config_text, encoding="utf-8")
        folder.joinpath("tokenizer.json").write_text(source.tokenizer_text, encoding="utf-8")
        card = model_card(source, "pytorch", HUGGINGFACE_SNIPPET, HUGGINGFACE_NOTES)
        folder.joinpath("README.md").write_text(card, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ transformers

TRANSFORMERS_SNIPPET = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("exported_models/transformers")
tokenizer = AutoTokenizer.from_pretrained("exported_models/transformers")
inputs = tokenizer("你好，请问", return_tensors="pt")
outputs = model.generate(**inputs, max_length=50)
print(tokenizer.decode(outputs[0]))
"""

TRANSFORMERS_NOTES = """
The classes are those of transformers itself; nothing needs `trust_remote_code`.
"""

CHAT_NOTES = """
To chat:

```python
messages = [{"role": "user", "content": "你好"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
outputs = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(outputs[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

A special token typed by a user, such as `<|im_end|>`, becomes a control token by default. Encode text that you do not
trust with `tokenizer(text, split_special_tokens=True)`: there it stays text.
"""

PLAIN_TEXT_NOTES = """
It was trained on plain text alone: it continues a text, and has no chat template.
"""

TRANSFORMERS_PROBE = """
config_text = None
tokenizer_text = open("exported_models/transformers/tokenizer.json", encoding="utf-8").read()
assert type(model).__module__.startswith("transformers."), "not a stock class of transformers"
compare_chat(model.config.chat, tokenizer.chat_template)
model = model.float()

def compute_logits(ids):
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.numpy()

def decode_greedily(prompt, count):
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return ids[0, len(prompt):].tolist()

compare_ids(tokenizer(expected["texts"], split_special_tokens=True)["input_ids"], expected["ids"])
plain = [(text, ids) for text, ids in zip(expected["texts"], expected["ids"]) if "<|" not in text]
compare_ids(tokenizer([text for text, _ in plain])["input_ids"], [ids for _, ids in plain])
for messages, prompted, ids in expected["chats"]:
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=prompted, tokenize=True, return_dict=True)
    compare_ids([rendered["input_ids"]], [ids])
"""


def transformers_texts(source: Source, **more) -> Dict[str, str]:
    """The contents, by file name, of all that a transformers folder holds besides its weights and model card.

    `more` goes into config.json.
    """
    tokenizer, weights = source.tokenizer, source.checkpoint.weights
    end_of_text, _, im_end = SPECIAL_TOKENS
    ends, pad_id = [im_end, end_of_text] if source.is_chat else [end_of_text], tokenizer.end_of_text_id
    end_ids = [tokenizer.special_ids[token] for token in ends]
    config = to_transformers_config(source.config, weights["token_embedding.weight"].dtype, end_ids, pad_id)
    special = {"bos_token": None, "eos_token": ends[0], "pad_token": end_of_text, "unk_token": None}
    template = {"chat_template": CHAT_TEMPLATE} if source.is_chat else {}
    documents = {
        "config.json": {**config, "chat": source.is_chat, **more},
        "generation_config.json": {"bos_token_id": None, "eos_token_id": end_ids, "pad_token_id": pad_id},
        "special_tokens_map.json": {name: token for name, token in special.items() if token},
        "tokenizer_config.json": {
            # transformers would rebuild the tokenizer of its own Qwen2 class from any other name.
            "tokenizer_class": "PreTrainedTokenizerFast", **special,
            "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in special.values()],
            "model_max_length": source.config.context_length, "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False, "padding_side": "left", **template},
    }
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in documents.items()}
    texts["tokenizer.json"] = source.tokenizer_text
    if source.is_chat:
        texts["chat_template.jinja"] = CHAT_TEMPLATE
    return texts


def write_transformers(source: Source, folder: Path) -> None:
    from safetensors.torch import save_file
    notes = TRANSFORMERS_NOTES + (CHAT_NOTES if source.is_chat else PLAIN_TEXT_NOTES)
    card = model_card(source, "transformers", TRANSFORMERS_SNIPPET, notes)
    with writing(folder):
        folder.mkdir()
        for name, text in {**transformers_texts(source), "README.md": card}.items():
            folder.joinpath(name).write_text(text, encoding="utf-8")
        weights = to_transformers(source.checkpoint.weights, source.config)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read


# ------------------------------------------------------------------------------------------------- torchscript

TORCHSCRIPT_SNIPPET = """
import torch
model = torch.jit.load("exported_models/model.pt")
inputs = torch.randint(0, 100, (1, 10), dtype=torch.long)
outputs = model(inputs, None)
"""

TORCHSCRIPT_PROBE = """
extra = {"config.json": "", "tokenizer.json": ""}
torch.jit.load("exported_models/model.pt", _extra_files=extra)
config_text, tokenizer_text = (extra[name].decode() for name in ("config.json", "tokenizer.json"))

def compute_logits(ids):
    with torch.inference_mode():
        return model(torch.from_numpy(ids), None)[0].numpy()
"""


def write_torchscript(source: Source, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*deprecated")  # upstream, with no successor in C++
        scripted = torch.jit.script(source.model)
        # By way of memory: given a path, torch.jit.save aborts the whole process when the disk is full.
        content = io.BytesIO()
        torch.jit.save(scripted, content, _extra_files={"config.json": source.config_text,
                                                        "tokenizer.json": source.tokenizer_text})
    with writing(path):
        path.write_bytes(content.getbuffer())


# -------------------------------------------------------------------------------------------------------- onnx

ONNX_SNIPPET = """
import onnxruntime as ort
import numpy as np
session = ort.InferenceSession("exported_models/model.onnx")
inputs = np.random.randint(0, 100, (1, 10)).astype(np.int64)
outputs = session.run(None, {"input_ids": inputs})
"""

ONNX_PROBE = """
import onnx
onnx.checker.check_model("exported_models/model.onnx", full_check=True)
extra = session.get_modelmeta().custom_metadata_map
config_text, tokenizer_text = extra["config.json"], extra["tokenizer.json"]

def compute_logits(ids):
    return session.run(["logits"], {"input_ids": ids})[0]
"""


class LogitsOnly(nn.Module):
    """The model with one input and one output, which is what an ONNX graph has."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


def write_onnx(source: Source, path: Path) -> None:
    context = source.config.context_length
    # A dimension of 1 in the example would be frozen into the graph, and so would one that fills the context.
    example = torch.zeros(2, min(max(source.seq_len, 2), context - 1), dtype=torch.long)
    shape = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("seq", min=1, max=context)}
    with quiet_libraries():
        program = torch.onnx.export(
            LogitsOnly(source.model).eval(), (example,), dynamo=True, opset_version=ONNX_OPSET, external_data=False,
            input_names=["input_ids"], output_names=["logits"], dynamic_shapes={"input_ids": shape}, verbose=False)
        program.model.metadata_props["config.json"] = source.config_text
        program.model.metadata_props["tokenizer.json"] = source.tokenizer_text
        with writing(path):
            program.save(str(path), external_data=source.weight_bytes > ONNX_FILE_LIMIT)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Holds back the warnings and log lines of libraries that speak about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --------------------------------------------------------------------------------------------------------- web

WEB_SNIPPET = """
import onnxruntime as ort
session = ort.InferenceSession("exported_models/web/onnx/model.onnx")
"""

WEB_NOTES = """
In a browser, or in Node.js after `npm install @huggingface/transformers`, with this folder at `models/web`:

```js
import { env, pipeline } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "models/";
const generate = await pipeline("text-generation", "web");
%s
```

The graph keeps keys and values: ids of new tokens, `past_key_values` -> logits, `present`, named as Optimum names them.
transformers.js leaves no old turn out by itself, and past the context that the model was trained on its replies are
nonsense: leave out the oldest messages before that.
"""

WEB_CHAT = """const messages = [{ role: "user", content: "你好，请问" }];
const [{ generated_text }] = await generate(messages, { max_new_tokens: 50 });
console.log(generated_text.at(-1).content);"""

WEB_CONTINUE = """const [{ generated_text }] = await generate("你好，请问", { max_new_tokens: 50 });
console.log(generated_text);"""

# Logits from one call, greedy tokens one by one onto what the calls before have kept.
WEB_PROBE = """
import onnx
onnx.checker.check_model("exported_models/web/onnx/model.onnx", full_check=True)
folder = "exported_models/web/"
tokenizer_text = open(folder + "tokenizer.json", encoding="utf-8").read()
config_text = None
config = json.load(open(folder + "config.json", encoding="utf-8"))
tokenizer_config = json.load(open(folder + "tokenizer_config.json", encoding="utf-8"))
compare_chat(config["chat"], tokenizer_config.get("chat_template"))
names = [put.name for put in session.get_inputs()[3:]]

def extend(past, ids):
    before = past[0].shape[2]
    inputs = dict(input_ids=ids, attention_mask=np.ones((len(ids), before + ids.shape[1]), np.int64),
                  position_ids=np.tile(np.arange(before, before + ids.shape[1]), (len(ids), 1)))
    logits, *present = session.run(None, {**inputs, **dict(zip(names, past))})
    return logits, present

def nothing(batch):
    shape = batch, config["num_key_value_heads"], 0, config["head_dim"]
    return [np.zeros(shape, np.float32)] * len(names)

def compute_logits(ids):
    return extend(nothing(len(ids)), ids)[0]

def decode_greedily(prompt, count):
    ids, new, past = [], prompt, nothing(1)
    for _ in range(count):
        logits, past = extend(past, np.array([new]))
        new = [int(logits[0, -1].argmax())]
        ids += new
    return ids
"""


class GrowingCache:
    """KVCache's `extend` on tensors of their own, as a graph has its inputs and outputs."""

    def __init__(self, past: List[Tuple[Tensor, Tensor]]):
        self.past, self.present = past, []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
        old_k, old_v = self.past[layer]
        self.present.append((torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)))
        return self.present[-1]


class WithPast(nn.Module):
    """The model for batches padded on the left that go on from keys and values kept: one (B, K, S - T, D) pair a layer.

    input_ids and position_ids (B, T), attention_mask (B, S) with 0 for padding -> logits (B, T, V), pairs (B, K, S, D).
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
                past: List[Tuple[Tensor, Tensor]]) -> Tuple[Tensor, List[Tuple[Tensor, Tensor]]]:
        model, cache = self.model, GrowingCache(past)
        T, S = input_ids.size(1), attention_mask.size(1)
        key, query = torch.arange(S), torch.arange(S - T, S)[:, None]
        # Padding sees itself: a softmax over nothing is not a number, and would spread from there.
        mask = (key == query) | ((key < query) & attention_mask[:, None, None, :].bool())  # (B, 1, T, S)
        # Not from the model's tables, which end with its context: a chat that grows past it would end in an error.
        half = model.config.head_dim // 2
        angle = position_ids[:, :, None, None] * model.config.rope_theta ** -(torch.arange(half) / half)
        cos, sin = angle.cos(), angle.sin()  # (B, T, 1, D/2)
        x = model.token_embedding(input_ids)
        for block in model.blocks:
            x = block(x, cos, sin, cache, False, mask)
        return model.lm_head(model.final_norm(x)), cache.present


def refused_by_web(source: Source) -> str:
    return "takes no model beyond 2 GB, where an ONNX file ends" if source.weight_bytes > ONNX_FILE_LIMIT else ""


def write_web(source: Source, folder: Path) -> None:
    config = source.config
    names = [f"{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    # Each a tensor of its own: torch.export takes one that is given twice for one input.
    kept = torch.zeros(config.n_layer, 2, 2, config.n_kv_head, 5, config.head_dim)
    example = (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 9, dtype=torch.long), torch.arange(4).repeat(2, 1),
               [(key.clone(), value.clone()) for key, value in kept])
    new, past = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 2: "past_sequence_length"}
    shapes = (new, {0: "batch_size", 1: "total_sequence_length"}, new, [(past, past)] * config.n_layer)
    with quiet_libraries():
        program = torch.onnx.export(
            WithPast(source.model).eval(), example, dynamo=True, opset_version=ONNX_OPSET, external_data=False,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)], dynamic_shapes=shapes, verbose=False)
    # Without a word transformers.js takes a quantized model in a browser, which is not here.
    kind = {"dtype": "float32", "torch_dtype": "float32", "transformers.js_config": {"dtype": "fp32"}}
    texts = transformers_texts(source, **kind)
    notes = WEB_NOTES % WEB_CHAT if source.is_chat else WEB_NOTES % WEB_CONTINUE + PLAIN_TEXT_NOTES
    texts["README.md"] = model_card(source, "transformers.js", WEB_SNIPPET, notes)
    with writing(folder):
        folder.joinpath("onnx").mkdir(parents=True)
        for name, text in texts.items():
            folder.joinpath(name).write_text(text, encoding="utf-8")
        program.save(str(folder / "onnx/model.onnx"), external_data=False)


# -------------------------------------------------------------------------------------------------------- gguf

GGUF_SNIPPET = """
from cyllama import LLM
llm = LLM("exported_models/model.gguf", max_tokens=50)
print(llm.chat([{"role": "user", "content": "你好，请问"}]))
"""

# By default llama.cpp keeps keys and values in half precision, which moves logits by some thousandths.
GGUF_PROBE = """
from cyllama.llama.llama_cpp import LlamaBatch, LlamaContext, LlamaContextParams, LlamaModel
from jinja2 import Template

class Model(LlamaModel):
    n_vocab = llm.vocab.n_vocab  # get_logits_ith of cyllama 0.2.18 asks for it and LlamaModel lacks it

config_text = tokenizer_text = None
options = LlamaContextParams()
options.n_ctx = options.n_batch = options.n_ubatch = llm.model.n_ctx_train
options.type_k = options.type_v = 0  # float32
options.flash_attn_type = 0  # off
context = LlamaContext(Model("exported_models/model.gguf"), options)
batch = LlamaBatch(n_tokens=llm.model.n_ctx_train, embd=0, n_seq_max=1)

def feed(ids, start, wanted):
    batch.reset()
    for at, token in enumerate(ids):
        batch.add(token, start + at, [0], at in wanted)
    context.decode(batch)
    return [np.array(context.get_logits_ith(at), np.float32) for at in wanted]

def compute_logits(ids):
    rows = []
    for row in ids.tolist():
        context.kv_cache_clear()
        rows.append(feed(row, 0, range(len(row))))
    return np.array(rows)

def decode_greedily(prompt, count):
    context.kv_cache_clear()
    ids, new = list(prompt), prompt
    for _ in range(count):
        logits, = feed(new, len(ids) - len(new), [len(new) - 1])
        new = [int(logits.argmax())]
        ids += new
    return ids[len(prompt):]

def encode(text, special):
    return list(llm.vocab.tokenize(text, False, special))

template = llm.model.get_default_chat_template()
compare_chat(template)
if not llm.vocab.is_eog(llm.vocab.token_eos()):
    problems.append("no token ends a reply")
compare_ids([encode(text, False) for text in expected["texts"]], expected["ids"])
for messages, prompted, ids in expected["chats"]:
    text = Template(template or "").render(messages=messages, add_generation_prompt=prompted)
    compare_ids([encode(text, True)], [ids])
"""

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


# Names of our tokenizers -> llama.cpp's of the patterns that they split text by. It has one for o200k_base too, but
# cuts words there at combining marks (Hindi, for one): 1,944 of 20,000 fuzzed texts got other ids.
GGUF_SPLITS = {"trained": "qwen2", "gpt2": "gpt-2", "cl100k_base": "llama-bpe"}


def refused_by_gguf(source: Source) -> str:
    return "" if source.tokenizer.name in GGUF_SPLITS else (
        f"takes a trained tokenizer, gpt2 or cl100k_base, not {source.tokenizer.name!r:.60}, whose texts llama.cpp may "
        "cut in other places")


def to_gguf(weights: Dict[str, Tensor], config: GPTConfig) -> Dict[str, Tensor]:
    """Our weights under llama.cpp's names, in float32."""
    def rename(name: str) -> str:
        for theirs, gguf in GGUF_NAMES.items():
            name = name.replace(theirs + ".", gguf + ".")
        return name

    named = {rename(name): tensor.float() for name, tensor in to_transformers(weights, config).items()}
    if not config.qk_norm:  # for the llama architecture llama.cpp rotates neighbours, not the halves of a head
        for name, tensor in named.items():
            if re.search(r"attn_[qk]\.", name):
                halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
                named[name] = halves.transpose(1, 2).flatten(0, 2)
    return named


def write_gguf(source: Source, path: Path) -> None:
    import gguf
    config, tokenizer = source.config, source.tokenizer
    vocabulary = source.tokenizer_document["model"]
    tokens, kinds = [f"[unused {i}]" for i in range(config.vocab_size)], [gguf.TokenType.UNUSED] * config.vocab_size
    for token, i in vocabulary["vocab"].items():
        tokens[i] = token
        kinds[i] = gguf.TokenType.CONTROL if token in tokenizer.special_ids else gguf.TokenType.NORMAL
    with writing(path), closing(gguf.GGUFWriter(path, "qwen3" if config.qk_norm else "llama")) as writer:
        writer.add_name(source.title)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.context_length)
        writer.add_block_count(config.n_layer)
        writer.add_embedding_length(config.d_model)
        writer.add_feed_forward_length(config.d_ff)
        writer.add_head_count(config.n_head)
        writer.add_head_count_kv(config.n_kv_head)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(GGUF_SPLITS[tokenizer.name])
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(vocabulary["merges"])
        writer.add_eos_token_id(tokenizer.im_end_id if source.is_chat else tokenizer.end_of_text_id)
        writer.add_pad_token_id(tokenizer.end_of_text_id)
        writer.add_add_bos_token(False)
        if source.is_chat:
            writer.add_chat_template(CHAT_TEMPLATE)
        for name, tensor in to_gguf(source.checkpoint.weights, config).items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


# ----------------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Format:
    """One row of FORMATS. The probe runs after the snippet, which is the README's too; PROBE in export.py says more."""

    name: str
    target: str  # below output_dir; a folder or a file
    packages: Tuple[str, ...]
    write: Callable[[Source, Path], None]
    snippet: str
    probe: str
    is_folder: bool = False
    uses_project: bool = False  # whether the snippet imports this project's own model.py
    refuses: Callable[[Source], str] = lambda source: ""  # why the format cannot hold this model, if it cannot

    @property
    def targets(self) -> Tuple[str, str]:
        """All that stands below output_dir once the format is there; the second name only beyond ONNX_FILE_LIMIT."""
        return self.target, self.target + ".data"


FORMATS = {format.name: format for format in (
    Format("huggingface", "huggingface", ("safetensors", "tokenizers"),
           write_huggingface, HUGGINGFACE_SNIPPET, HUGGINGFACE_PROBE, is_folder=True, uses_project=True),
    Format("transformers", "transformers", ("transformers", "safetensors", "tokenizers"),
           write_transformers, TRANSFORMERS_SNIPPET, TRANSFORMERS_PROBE, is_folder=True),
    Format("torchscript", "model.pt", ("tokenizers",),
           write_torchscript, TORCHSCRIPT_SNIPPET, TORCHSCRIPT_PROBE),
    Format("onnx", "model.onnx", ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
           write_onnx, ONNX_SNIPPET, ONNX_PROBE),
    Format("web", "web", ("onnx", "onnxscript", "onnxruntime", "tokenizers"),
           write_web, WEB_SNIPPET, WEB_PROBE, is_folder=True, refuses=refused_by_web),
    Format("gguf", "model.gguf", ("gguf", "cyllama"),
           write_gguf, GGUF_SNIPPET, GGUF_PROBE, refuses=refused_by_gguf),
)}
