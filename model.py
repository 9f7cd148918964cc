"""A GPT in memory and on disk: the architecture, its key/value cache, sampling, and the checkpoint file.

The weights are those of Qwen3 (Yang et al. 2025, arXiv 2505.09388): RMSNorm before each sublayer, rotary positions,
RMSNorm on every query and key head, grouped-query attention, SwiGLU, no biases. `qk_norm=False` makes it Llama.

Shapes: B batch, T time (query positions), S time with the cache, H heads, K key/value heads, D width of a head,
C width of the model (d_model), F width of the feed-forward layer (d_ff), V vocabulary.
"""

import json
import os
import shutil
import zipfile
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a target that carries no loss, as in torch.nn.functional.cross_entropy


class InputError(Exception):
    """Something the user can mend: a path, a flag, a file. Each script shows its one line and exits with 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # what is quoted of a file may have several


# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of one GPT, all that is needed to rebuild it. InputError for values no model can have."""

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_kv_head: int
    d_model: int
    d_ff: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True
    tie_embeddings: bool = True

    def __post_init__(self):
        # Bounds far above any model this code will meet: they keep a hostile file from asking for all the memory.
        bounds = dict(vocab_size=2**20, context_length=2**20, n_layer=2**10, n_head=2**10, n_kv_head=2**10,
                      d_model=2**16, d_ff=2**18, head_dim=2**10)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not field.type:
                raise InputError(f"model config: {field.name} must be {field.type.__name__}, not {value!r:.40}")
            if field.name in bounds and not 1 <= value <= bounds[field.name]:
                raise InputError(f"model config: {field.name} must be from 1 to {bounds[field.name]}, not {value}")
        if not (0 < self.norm_eps < 1 and 1 < self.rope_theta < 1e12):
            raise InputError(f"model config: norm_eps {self.norm_eps} or rope_theta {self.rope_theta} is out of range")
        if self.n_head % self.n_kv_head:
            raise InputError(f"model config: n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.context_length * self.head_dim > 2**26:  # the rotary tables would not be small any more
            raise InputError(f"model config: context_length {self.context_length} with head_dim {self.head_dim} is "
                             "absurd")
        if self.head_dim % 2:
            raise InputError(f"model config: head_dim must be even for rotary positions, not {self.head_dim}")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """The inverse of to_dict. A key that is missing or unknown is an InputError."""
        if not isinstance(values, dict):
            raise InputError("model config: expected a mapping of names to values")
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if unknown := sorted(map(str, values.keys() - known)):
            raise InputError(f"model config: unknown key {unknown[0]!r:.60}")
        if missing := sorted(required - values.keys()):
            raise InputError(f"model config: missing key {missing[0]!r}")
        return cls(**values)

    def parameter_count(self) -> int:
        heads, kv, width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim, self.d_model
        block = (2 * heads + 2 * kv) * width + 3 * width * self.d_ff + 2 * width + 2 * self.head_dim * self.qk_norm
        return self.n_layer * block + width + self.vocab_size * width * (1 if self.tie_embeddings else 2)


# ------------------------------------------------------------------------------------------------------ layers


class SingleDotAttention(nn.Module):
    """Scaled dot-product attention of one head, softmax(q k^T / sqrt(D) + causal) v (Vaswani et al. 2017, eq. 1).

    q is (..., T, D), k and v are (..., S, D); leading dimensions are batch and heads, k and v may have fewer heads.
    `causal` lets position t see keys 0..t and is right only where T == S. `mask` (True or 0 = may be seen) is for
    the rest: several tokens onto a cache, or packed documents. Returns (..., T, D). No parameters.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, mask: Optional[Tensor] = None) -> Tensor:
        grouped = q.size(-3) != k.size(-3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class KVCache:
    """Keys and values of the positions already seen, so that a new token costs one forward of length 1.

    Preallocated: keys and values are lists, one (B, K, length, D) tensor a layer; `position` counts the tokens held.
    A plain class and not a Module, so that one forward serves training, decoding and every export.
    """

    def __init__(self, keys: List[Tensor], values: List[Tensor]):
        self.keys: List[Tensor] = keys
        self.values: List[Tensor] = values
        self.position: int = 0

    def length(self) -> int:
        return self.keys[0].size(2)

    def truncate(self, position: int) -> None:
        """Forgets every token from `position` on: what a chat does when the history changes."""
        assert 0 <= position <= self.position
        self.position = position

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
        """Writes (B, K, T, D) of one layer behind what it holds; returns (B, K, S, D) views of all there is."""
        end = self.position + k.size(2)
        self.keys[layer][:, :, self.position:end] = k
        self.values[layer][:, :, self.position:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split form (Su et al. 2021, arXiv 2104.09864). x (B, T, H, D); cos, sin (T, 1, D/2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class MultiheadAttention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023), rotary positions and normed q and k."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.qkv = nn.Linear(config.d_model, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.attention = SingleDotAttention()
        self.out = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: Optional[KVCache] = None,
                causal: bool = True, mask: Optional[Tensor] = None) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)  # (B, T, H, D), twice (B, T, K, D)
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)                         # (B, H, T, D)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)                         # (B, K, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                         # (B, K, S, D)
        y = self.attention(q, k, v, causal, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class FFN(nn.Module):
    """The feed-forward layer, SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202). Keeps (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)  # both in one product: fewer, larger
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One Transformer block: attention, then feed-forward, each on a normed copy and added back."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = MultiheadAttention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FFN(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Optional[KVCache] = None, causal: bool = True,
                mask: Optional[Tensor] = None, kept: Optional[Tensor] = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (N, C) where `kept` (N,) says which of the B T positions are looked at."""
        x = x + self.attention(self.attention_norm(x), cos, sin, self.layer, cache, causal, mask)
        if kept is not None:
            x = x.flatten(0, 1)[kept]
        return x + self.ffn(self.ffn_norm(x))


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `x @ weight.T` that never holds all its logits: chunk by chunk, gradients on the way.

    x (N, C), weight (V, C), targets (N,) int64 with -100 ignored -> nats, a scalar float32. The same arithmetic as
    F.cross_entropy(F.linear(x, weight), targets, reduction="sum") with 1/N of the memory (cf. Wijmans et al. 2024,
    arXiv 2411.09009).
    """

    CPU_LOGITS = 2**24  # held at once; fewer are slower, as each chunk streams all the weights

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x_cast, weight_cast = x.to(dtype), weight.to(dtype)
        rows = max(64, (LinearCrossEntropy.CPU_LOGITS if kind == "cpu" else 2**28) // weight.size(0))
        needs_grad = any(ctx.needs_input_grad)
        grad_x = torch.empty_like(x_cast) if needs_grad else None
        grad_weight = torch.zeros_like(weight_cast, dtype=torch.float32) if needs_grad else None
        total = x.new_zeros((), dtype=torch.float32)
        for chunk, target, into in zip(x_cast.split(rows), targets.split(rows),
                                       grad_x.split(rows) if needs_grad else x_cast.split(rows), strict=True):
            keep = (target >= 0)[:, None]
            target = target.clamp(min=0)[:, None]
            logits = F.linear(chunk, weight_cast).float()
            # The largest logit and its probability give log_softmax of the target; log_softmax and exp take twice
            # as long.
            below = logits.gather(1, target) - logits.amax(1, keepdim=True)
            probability = logits.softmax(-1)
            total -= (below + probability.amax(1, keepdim=True).log()).mul_(keep).sum()
            if needs_grad:
                error = probability.scatter_add_(1, target, torch.full_like(below, -1.0))
                error = error.mul_(keep).to(dtype)  # d loss / d logits
                torch.mm(error, weight_cast, out=into)
                if dtype == torch.float32:
                    grad_weight.addmm_(error.T, chunk)
                else:
                    grad_weight += error.T @ chunk
        if needs_grad:
            ctx.save_for_backward(grad_x.to(x.dtype), grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_total, grad_weight * grad_total, None


# ------------------------------------------------------------------------------------------------------- model


class GPT(nn.Module):
    """The whole model: token ids in, next-token logits out. `torch.jit.script(GPT(config).eval())` works."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.context_length = config.context_length
        table = torch.empty(config.vocab_size, config.d_model)
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
        if not table.is_meta:  # to compute there would import a second's worth of torch, for nothing
            self.reset_rotary()
            self.reset_parameters()

    @torch.jit.unused
    def reset_rotary(self) -> None:
        """Rotary tables (context, 1, D/2), made from the config and never saved."""
        device = self.token_embedding.weight.device
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
        position = torch.arange(self.context_length, dtype=torch.float32, device=device)
        angle = torch.outer(position, frequency)[:, None, :]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @torch.jit.unused
    def reset_parameters(self, token_vectors: Optional[Tensor] = None) -> None:
        """Normal(0, 0.02), and zero for what writes into the residual stream: each block starts as the identity.

        Narrow models get an embedding that is larger and, as much, a final norm that is smaller: rare tokens keep much
        of where they start, and would be hard to tell apart at 0.02. `token_vectors` (V, C), of mean square 1, become
        half of its variance.
        """
        embedding_std = max(0.02, min(0.1, 12.8 / self.config.d_model))
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
            elif name.endswith(("attention.out.weight", "ffn.down.weight")):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=embedding_std if name == "token_embedding.weight" else 0.02)
        if token_vectors is not None:
            self.token_embedding.weight.data.add_(token_vectors, alpha=embedding_std).mul_(0.5 ** 0.5)
        nn.init.constant_(self.final_norm.weight, 0.02 / embedding_std)
        self.start_previous_token_heads(embedding_std)

    @torch.jit.unused
    @torch.no_grad()
    def start_previous_token_heads(self, embedding_std: float) -> None:
        """Let the first two heads of the first block look one and two tokens back, from the first step on.

        To copy (a name told earlier, a sentence to repeat) a model needs a head that tells each position what came
        before it and a later one that searches for it (Olsson et al. 2022, arXiv 2209.11895). The first takes a small
        model most of a short run to find, so it starts in place. All embeddings share one direction, which the softmax
        does not see; from it alone these heads make their keys, and queries turned back by one or two positions, in
        the rotary pairs that turn fastest.
        """
        config, pairs = self.config, min(4, self.config.head_dim // 2)
        shared = F.normalize(torch.randn_like(self.token_embedding.weight[0]), dim=0)
        self.token_embedding.weight += shared * embedding_std * config.d_model ** 0.5
        heads = self.blocks[0].attention.qkv.weight.view(-1, config.head_dim, config.d_model)  # queries, keys, values
        key = shared.new_zeros(config.head_dim)
        key[:pairs] = pairs ** -0.5
        count = min(2, config.n_head, self.context_length - 1)
        for head in range(count):
            query = rotate(key, self.cos[head + 1, 0], -self.sin[head + 1, 0])
            heads[head] += torch.outer(query, shared)
        used = (count - 1) * config.n_kv_head // config.n_head + 1  # key heads of these queries
        heads[config.n_head:config.n_head + used] += torch.outer(key, shared)

    def hidden(self, input_ids: Tensor, cache: Optional[KVCache] = None, mask: Optional[Tensor] = None,
               kept: Optional[Tensor] = None) -> Tensor:
        """The normed last layer (B, T, C) for ids (B, T). With a cache the ids follow the positions it holds.

        `kept` (N,) leaves of the B T positions those that are looked at, (N, C).
        """
        T = input_ids.size(1)
        start, causal = 0, mask is None
        if cache is not None:
            start = cache.position
            if start + T > cache.length():
                raise ValueError("the sequence is longer than the key/value cache")
            if start > 0 and mask is None:
                causal = False
                if T > 1:  # aligned to the lower right: new token t sees all that is cached, and new tokens 0..t
                    mask = torch.ones(T, start + T, dtype=torch.bool, device=input_ids.device).tril(start)
        if start + T > self.context_length:
            raise ValueError("the sequence is longer than the model's context_length")
        cos, sin = self.cos[start:start + T], self.sin[start:start + T]
        x = self.token_embedding(input_ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache, causal, mask, kept if layer == len(self.blocks) - 1 else None)
        if cache is not None:
            cache.position = start + T
        return self.final_norm(x)

    def forward(self, input_ids: Tensor, targets: Optional[Tensor] = None, cache: Optional[KVCache] = None,
                mask: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
        """input_ids, targets (B, T) int64 -> logits (B, T, V) and the mean cross-entropy in nats (or None).

        Targets of -100 carry no loss. `mask` (B, 1, T, T) replaces plain causality, for packed documents.
        """
        logits = self.lm_head(self.hidden(input_ids, cache, mask))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.jit.unused
    def loss(self, input_ids: Tensor, targets: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Training's form of forward: the cross-entropy summed over the targets that are not -100, a scalar in nats."""
        targets, kept = targets.flatten(), None
        if targets.device.type == "cpu":  # most of a chat carries no loss; on a GPU picking would stall it
            kept = (targets >= 0).nonzero().squeeze(1)
            targets = targets[kept]
        x = self.hidden(input_ids, None, mask, kept).view(-1, self.config.d_model)
        return LinearCrossEntropy.apply(x, self.lm_head.weight, targets)

    @torch.jit.unused
    def new_cache(self, batch_size: int = 1, length: Optional[int] = None) -> KVCache:
        """An empty cache of `length` positions (default: the context), on the model's device, in its dtype."""
        weight, c = self.token_embedding.weight, self.config
        shape = (batch_size, c.n_kv_head, length or c.context_length, c.head_dim)
        keys, values = ([weight.new_zeros(shape) for _ in range(c.n_layer)] for _ in range(2))
        return KVCache(keys, values)

    @torch.jit.unused
    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0, top_k: int = 0,
                 top_p: float = 1.0, repetition_penalty: float = 1.0, stop_ids: Sequence[int] = (),
                 seed: Optional[int] = None, cache: Optional[KVCache] = None) -> Iterator[int]:
        """Yields up to max_new_tokens ids that continue the prompt; ends before a stop id. Temperature 0 is greedy.

        Past the context length it goes on from the newest half of the context. A `cache` that already holds the first
        `cache.position` ids of the prompt saves computing them again.
        """
        if not prompt:
            raise InputError("nothing to continue: the prompt is empty")
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        cache = cache if cache is not None else self.new_cache()
        decoder = Decoder(self, cache)
        ids = list(prompt)
        fed = cache.position
        for _ in range(max_new_tokens):
            if len(ids) - fed + cache.position > cache.length():
                cache.truncate(0)
                fed = len(ids) - max(1, cache.length() // 2)
            logits = decoder.feed(ids[fed:])
            fed = len(ids)
            token = sample(logits, temperature, top_k, top_p, repetition_penalty, ids, generator)
            if token in stop_ids:
                return
            ids.append(token)
            yield token

    @torch.jit.unused
    def save_pretrained(self, folder) -> None:
        """Writes model.safetensors and config.json, which from_pretrained reads back."""
        from safetensors.torch import save_file
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights_path, config_path = Path(folder, "model.safetensors"), Path(folder, "config.json")
        save_file(unwrapped(self.state_dict(), self.config), weights_path)
        values = {"model_type": "gpt", **self.config.to_dict()}
        config_path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(config_path, weights_path)  # safetensors lets only the owner read

    @classmethod
    def from_pretrained(cls, folder) -> "GPT":
        """A model in eval mode from a folder that save_pretrained wrote, or InputError.

        From the Hugging Face Hub: `class HubGPT(PyTorchModelHubMixin, GPT): pass`, then HubGPT.from_pretrained(name).
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
            weights = load_file(Path(folder, "model.safetensors"))
        except FileNotFoundError as error:
            raise InputError(f"{folder}: no {Path(error.filename or 'model.safetensors').name} here") from error
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise InputError(f"{folder}: not a folder this project wrote ({error!s:.200})") from error
        if not isinstance(values, dict) or values.pop("model_type", "gpt") != "gpt":  # the Hub's mixin writes none
            raise InputError(f"{folder}: config.json is not of this project (export.py --format huggingface writes it)")
        values.pop("chat", None)  # for chat.py: whether there is a chat to be had with these weights
        config = GPTConfig.from_dict(values)
        if config.tie_embeddings and "lm_head.weight" in weights:  # the name the mixin keeps of a tied pair
            weights.setdefault("token_embedding.weight", weights.pop("lm_head.weight"))
        return build_model(config, weights, str(folder))


class Decoder:
    """Next-token logits of one sequence, the prompt in one call and then a token a call, over a KVCache.

    On a CPU in float32 a single token goes through NumPy, on the very weights and cache: torch's products of one row
    stream the weights at half the speed of NumPy's, and its small operations cost ten times as much. Each result goes
    to a buffer made once. The plain form is GPT.hidden, against which it is tested.
    """

    def __init__(self, model: GPT, cache: KVCache):
        self.model, self.cache = model, cache
        weights = list(model.parameters())
        self.by_numpy = all(w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous() for w in weights)
        if not self.by_numpy:
            return

        def array(tensor: Tensor) -> np.ndarray:
            return tensor.detach().numpy()

        def empty(*shape: int) -> np.ndarray:
            return np.empty(shape, np.float32)

        c = model.config
        H, K, D = c.n_head, c.n_kv_head, c.head_dim
        # All that q and k are multiplied with besides the rotary tables: attention's 1 / sqrt(D), and of their norm,
        # x sqrt(D) / sqrt(x . x + D eps) scale, what stands above the line.
        factors = np.ones((c.n_layer, H + K, D), np.float32)
        factors[:, :H] *= D ** -0.5
        if c.qk_norm:
            for factor, block in zip(factors, model.blocks, strict=True):
                factor[:H] *= array(block.attention.q_norm.weight) * D ** 0.5
                factor[H:] *= array(block.attention.k_norm.weight) * D ** 0.5
        self.factors = factors.reshape(c.n_layer, H + K, 2, D // 2)
        self.swapped = self.factors[:, :, ::-1].copy()
        cos, sin = array(model.cos), array(model.sin)
        self.cos, self.sin = np.concatenate((cos, cos), 1), np.concatenate((-sin, sin), 1)  # (context, 2, D/2)
        self.by_cos, self.by_sin = np.empty_like(self.factors), np.empty_like(self.factors)  # of this position
        self.layers = [
            (array(block.attention_norm.weight), array(block.attention.qkv.weight), by_cos, by_sin, array(keys[0]),
             array(keys[0]).transpose(0, 2, 1), array(values[0]), array(block.attention.out.weight),
             array(block.ffn_norm.weight), array(block.ffn.gate_up.weight), array(block.ffn.down.weight))
            for block, by_cos, by_sin, keys, values in zip(model.blocks, self.by_cos, self.by_sin, cache.keys,
                                                           cache.values, strict=True)]
        self.embedding, self.head = array(model.token_embedding.weight), array(model.lm_head.weight)
        self.final_norm = array(model.final_norm.weight)
        self.x, self.normed, self.change = empty(c.d_model), empty(c.d_model), empty(c.d_model)
        self.heads, self.length = empty((H + 2 * K) * D), empty(H + K)
        self.rotated, self.crossed = empty(H + K, 2, D // 2), empty(H + K, 2, D // 2)
        self.total, self.y = empty(K, H // K), empty(H * D)
        self.hidden, self.gate, self.ones = empty(2 * c.d_ff), empty(c.d_ff), np.ones(cache.length(), np.float32)
        # Arrays without dimensions, as NumPy takes a number twice as slowly.
        self.one, self.scale, self.epsilon = np.array(1, np.float32), empty(), empty()
        # Normed q and k bound the scores (Cauchy-Schwarz); below 60, exp needs no shift to stay within float32.
        longest = np.abs(factors[:, :H]).max((1, 2)) * np.abs(factors[:, H:]).max((1, 2))
        self.bounded = c.qk_norm and longest.max() < 60

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Logits (V,) of the token after `ids`, which follow what the cache holds."""
        if len(ids) == 1 and self.by_numpy:
            return torch.from_numpy(self.step(ids[0]))
        with torch.inference_mode():
            input_ids = torch.tensor([ids], device=self.model.token_embedding.weight.device)
            return self.model.lm_head(self.model.hidden(input_ids, self.cache)[0, -1])

    def step(self, token: int) -> np.ndarray:
        """GPT.hidden and lm_head for one token of one sequence, (V,) float32."""
        c, position = self.model.config, self.cache.position
        assert position < self.cache.length()
        H, K, D, end = c.n_head, c.n_kv_head, c.head_dim, position + 1
        x, normed, change, heads, rotated, crossed, length, total, y = (
            self.x, self.normed, self.change, self.heads, self.rotated, self.crossed, self.length, self.total, self.y)
        hidden, gate, one, scale, epsilon = self.hidden, self.gate, self.one, self.scale, self.epsilon
        qk, halves = heads[:(H + K) * D].reshape(H + K, D), heads[:(H + K) * D].reshape(H + K, 2, D // 2)
        swapped, v = halves[:, ::-1], heads[(H + K) * D:].reshape(K, D)
        new = rotated.reshape(H + K, D)
        q, k, per_head = new[:H].reshape(K, H // K, D), new[H:], y.reshape(K, H // K, D)
        lengths, totals, ones = length[:, None], total[:, :, None], self.ones[:end]
        gated, up = hidden[:c.d_ff], hidden[c.d_ff:]

        def square() -> float:
            return float(x.dot(x)) / c.d_model + c.norm_eps

        np.multiply(self.factors, self.cos[position], self.by_cos)
        np.multiply(self.swapped, self.sin[position], self.by_sin)
        x[:] = self.embedding[token]                                                   # (C,)
        with np.errstate(all="ignore"):  # exp(-gate) may be infinite, and the gate then closed
            for (attention_norm, qkv, by_cos, by_sin, keys, keys_transposed, values, out, ffn_norm, gate_up,
                 down) in self.layers:
                # The norm's division waits until v is stored, and falls out of normed q and k but for their epsilon.
                mean = square()
                scale[()] = mean ** -0.5
                qkv.dot(np.multiply(x, attention_norm, normed), heads)
                np.add(np.multiply(halves, by_cos, rotated), np.multiply(swapped, by_sin, crossed), rotated)
                if c.qk_norm:
                    epsilon[()] = D * c.norm_eps * mean
                    np.add(np.vecdot(qk, qk, length), epsilon, length)
                    np.divide(new, np.sqrt(lengths, lengths), new)
                else:
                    np.multiply(new, scale, new)
                keys[:, position] = k
                np.multiply(v, scale, values[:, position])
                scores = np.matmul(q, keys_transposed[:, :, :end])                     # (K, H/K, S)
                if not self.bounded:
                    np.subtract(scores, np.maximum.reduce(scores, 2, keepdims=True), scores)
                np.exp(scores, scores)
                np.vecdot(scores, ones, total)
                np.divide(np.matmul(scores, values[:, :end], per_head), totals, per_head)
                np.add(x, out.dot(y, change), x)
                scale[()] = square() ** -0.5
                gate_up.dot(np.multiply(np.multiply(x, ffn_norm, normed), scale, normed), hidden)
                np.add(np.exp(np.negative(gated, gate), gate), one, gate)              # silu(g) = g / (1 + exp(-g))
                np.multiply(np.divide(gated, gate, gate), up, gate)
                np.add(x, down.dot(gate, change), x)
            scale[()] = square() ** -0.5
            self.cache.position = end
            return self.head.dot(np.multiply(np.multiply(x, self.final_norm, normed), scale, normed))


def sample(logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
           repetition_penalty: float = 1.0, seen: Sequence[int] = (),
           generator: Optional[torch.Generator] = None) -> int:
    """One id drawn from logits (V,) of any runtime. Temperature 0 takes the largest; top_k 0 and top_p 1 are off.

    The repetition penalty divides positive and multiplies negative logits of ids in `seen` (Keskar et al. 2019, arXiv
    1909.05858); top_p keeps the smallest set with this share of probability (Holtzman et al. 2019, arXiv 1904.09751).
    """
    scores = logits.float().cpu().numpy()  # torch takes three times as long for so little
    if repetition_penalty != 1.0 and len(seen):
        known = np.array(list(set(seen)))
        value = scores[known]
        scores = scores.copy()
        scores[known] = np.where(value > 0, value / repetition_penalty, value * repetition_penalty)
    if temperature <= 0:
        return int(scores.argmax())
    ids = np.arange(len(scores))
    if 0 < top_k < len(scores):
        ids = np.argpartition(scores, -top_k)[-top_k:]
    if top_p < 1.0:
        ids = ids[np.argsort(scores[ids])[::-1]]
    scores = scores[ids].astype(np.float64)
    mass = np.exp((scores - scores.max()) / max(temperature, 1e-9)).cumsum()
    if not mass[-1] > 0:
        raise InputError("the model is damaged: what it computes is not a number")
    if top_p < 1.0:
        mass = mass[:np.searchsorted(mass, top_p * mass[-1]) + 1]  # the likeliest id always stays
    drawn = torch.rand((), generator=generator, dtype=torch.float64).item() * mass[-1]
    return int(ids[np.searchsorted(mass[:-1], drawn, side="right")])


# -------------------------------------------------------------------------------------------------- checkpoint


def unwrapped(weights: Dict[str, Tensor], config: GPTConfig) -> Dict[str, Tensor]:
    """Weights under their own names: without the prefixes of torch.compile and DDP, without the tied copy."""
    plain = {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in weights.items()}
    if config.tie_embeddings:
        plain.pop("lm_head.weight", None)
    return plain


def build_model(config: GPTConfig, weights: Dict[str, Tensor], source: str) -> GPT:
    """A model in eval mode on these very tensors; InputError names `source` if they do not fit the config."""
    with torch.device("meta"):
        model = GPT(config)
    expected = unwrapped(model.state_dict(), config)
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            raise InputError(f"{source}: {'missing' if name not in weights else 'unknown'} weight {name!r:.80}")
        shape = expected[name].shape
        tensor = weights[name]
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            raise InputError(f"{source}: weight {name} does not have the shape {tuple(shape)} of its config")
        plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_neg()
        if not (plain and tensor.is_floating_point() and tensor.is_contiguous()):
            raise InputError(f"{source}: weight {name} is not a plain tensor of floating-point numbers")
    # The one memory that a small file could ask for without holding it: keys and values of the whole context.
    cache = config.n_layer * config.n_kv_head * config.head_dim * config.context_length
    if cache > 2**26 + 64 * config.parameter_count():
        raise InputError(f"{source}: a context of {config.context_length} tokens is absurd for its weights")
    model.load_state_dict(weights, strict=not config.tie_embeddings, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.token_embedding.weight
    model.reset_rotary()
    return model.requires_grad_(True).eval()


@dataclass
class Checkpoint:
    """The whole model in one file: config, weights, tokenizer (a plain dict never looked into here), training state.

    Tensors and plain Python only: reading runs no code. Written aside, flushed, then renamed: the file is always whole.
    """

    config: GPTConfig
    weights: Dict[str, Tensor]
    tokenizer: dict
    training: Optional[dict] = None

    VERSION = 1

    def save(self, path) -> None:
        path = Path(path)
        content = {"format": "gpt", "version": self.VERSION, "config": self.config.to_dict(),
                   "weights": unwrapped(self.weights, self.config), "tokenizer": self.tokenizer,
                   "training": self.training}
        aside = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except (OSError, RuntimeError) as error:  # torch wraps a full disk into a RuntimeError
            aside.unlink(missing_ok=True)
            reason = error.__context__ or error  # what the disk said, before torch spoke of positions in the file
            raise InputError(f"cannot write {path}: {reason}".splitlines()[0]) from error

    @classmethod
    def load(cls, path) -> "Checkpoint":
        """Reads a checkpoint, tensors mapped from the file. InputError: missing, cut off, not ours, a newer format."""
        path = Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise InputError(f"{path}: {what}; `python train.py` makes checkpoints/best_model.pt")
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise InputError(f"{path}: refused, it would unpack to more than its own size")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except InputError:
            raise
        except zipfile.BadZipFile as error:
            raise InputError(f"{path}: not a checkpoint, or cut off ({path.stat().st_size} bytes)") from error
        except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
            raise InputError(f"{path}: not a checkpoint of train.py, or damaged ({type(error).__name__})") from error
        if not isinstance(content, dict) or content.get("format") != "gpt":
            raise InputError(f"{path}: a PyTorch file, but not a checkpoint of train.py")
        version = content.get("version")
        if type(version) is not int or version != cls.VERSION:
            raise InputError(f"{path}: format {version!r:.40}, this code reads {cls.VERSION}")
        config, weights, tokenizer = (content.get(key) for key in ("config", "weights", "tokenizer"))
        named = isinstance(weights, dict) and all(type(name) is str for name in weights)
        if not named or not isinstance(tokenizer, dict):
            raise InputError(f"{path}: damaged, weights or tokenizer are missing")
        return cls(GPTConfig.from_dict(config), weights, tokenizer, content.get("training"))

    def build_model(self, device="cpu") -> GPT:
        """The model, in eval mode, on `device`."""
        return build_model(self.config, self.weights, "checkpoint").to(device)
