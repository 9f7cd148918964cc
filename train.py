"""Train a GPT on your text or chats.

    python train.py                                      # the embedded corpus, on whatever device there is
    python train.py --data_path my.txt more/*.jsonl      # your own, in the forms the README lists
    python train.py --resume                             # go on from checkpoints/last.pt

Writes checkpoints/best_model.pt (lowest validation loss), last.pt (to resume from), metrics.jsonl and loss.png.
"""

import argparse
import itertools
import json
import math
import os
import signal
import sys
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Iterator, List, Optional, Union, get_args, get_origin

# Before OpenMP loads: a thread that waits spins for some microseconds, then sleeps. On an idle machine steps of the
# tiny preset were a third faster than with threads that sleep at once, and as fast as with ones that only spin; with
# another process on one of the cores, those took five times as long, these a fifth longer than sleepers.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import Batch, Packed, Prepared, document_mask, masked_sample, prepare, token_vectors
from model import GPT, IGNORE, Checkpoint, GPTConfig, InputError
from optim import make_optimizers
from tokenizer import Tokenizer, harmless

HERE = Path(__file__).resolve().parent
OUTPUTS = ("best_model.pt", "last.pt", "metrics.jsonl", "loss.png")

# A preset answers what the flags leave open. Sizes in parameters; the vocabulary follows from the data.
PRESETS = {
    "tiny": dict(n_layer=4, n_head=2, n_kv_head=2, d_model=128, d_ff=352, context_length=256, batch_size=8,
                 learning_rate=0.012, embedding_lr=0.012),
    "26m": dict(n_layer=8, n_head=8, n_kv_head=2, d_model=512, d_ff=1408, context_length=512, batch_size=32,
                learning_rate=0.02, embedding_lr=0.003),
    "64m": dict(n_layer=8, n_head=12, n_kv_head=4, d_model=768, d_ff=2048, context_length=512, batch_size=64,
                learning_rate=0.02, embedding_lr=0.003),
    "124m": dict(n_layer=12, n_head=12, n_kv_head=12, d_model=768, d_ff=2048, context_length=1024, batch_size=256,
                 learning_rate=0.02, embedding_lr=0.002),
}


ARCHITECTURE = ("context_length", "n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "rope_theta", "qk_norm",
                "tie_embeddings")


def setting(default, text: str, **more):
    return field(default=default, metadata=dict(help=text, **more))


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the command line is derived from it. None: from the preset, the data or the device."""

    data_path: Optional[List[str]] = setting(None, "files, folders or globs to train on (default: the embedded corpus)")
    out_dir: str = setting("checkpoints", "where checkpoints, metrics and the loss curve go")
    preset: Optional[str] = setting(None, "model size (default: tiny on a CPU, 26m on a GPU)", choices=list(PRESETS))
    epochs: Optional[float] = setting(None, "passes over the data")
    max_minutes: Optional[float] = setting(None, "end, annealed, after this many minutes")
    batch_size: Optional[int] = setting(None, "rows of context_length tokens a step, over all devices")
    grad_accumulation: int = setting(1, "parts a step's batch is computed in, one after the other; saves memory")
    context_length: Optional[int] = setting(None, "tokens the model sees at once")
    n_layer: Optional[int] = setting(None, "blocks")
    n_head: Optional[int] = setting(None, "attention heads")
    n_kv_head: Optional[int] = setting(None, "key/value heads; n_head must be a multiple")
    d_model: Optional[int] = setting(None, "width of the model")
    d_ff: Optional[int] = setting(None, "width of the feed-forward layers")
    rope_theta: float = setting(10000.0, "base of the rotary positions")
    qk_norm: bool = setting(True, "norm queries and keys (Qwen3); off makes a Llama")
    tie_embeddings: bool = setting(True, "use the embedding as output layer")
    tokenizer: Optional[str] = setting(None, "a tiktoken encoding in place of a BPE trained on the data",
                                       choices=["gpt2", "cl100k_base", "o200k_base"])
    vocab_size: Optional[int] = setting(None, "size of the trained BPE (default: from the size of the data)")
    learning_rate: Optional[float] = setting(None, "peak learning rate of Muon, for the matrices in the blocks")
    embedding_lr: Optional[float] = setting(None, "peak learning rate of Adam, for embeddings and norms")
    weight_decay: float = setting(0.1, "of the matrices, times the learning rate")
    warmup: float = setting(0.02, "share of the run in which the learning rate rises")
    grad_clip: float = setting(1.0, "largest norm of the gradient")
    eval_interval: Optional[int] = setting(None, "steps between evaluations (default: 12 in a run)")
    eval_tokens: Optional[int] = setting(None, "tokens of the validation split to evaluate on, at most")
    neighbour_start: bool = setting(True, "start with like embeddings for tokens with like neighbours in the text")
    vary_copies: bool = setting(True, "put other words into answers that repeat what was said, anew each epoch")
    seed: int = setting(0, "fixes the weights and the order of the data")
    init_from: Optional[str] = setting(None, "start from this checkpoint's weights and tokenizer (fine-tuning)")
    resume: bool = setting(False, "go on from last.pt in out_dir")
    device: Optional[str] = setting(None, "cpu, cuda, cuda:1, mps ... (default: the best there is)")
    dtype: Optional[str] = setting(None, "of the products (default: bfloat16 where the device has it)",
                                   choices=["float32", "bfloat16"])
    compile: Optional[bool] = setting(None, "torch.compile (default: on a GPU that has triton)")
    fsdp: bool = setting(False, "shard weights over the processes of torchrun, for a model too large for one card")
    tensorboard: bool = setting(False, "also log to out_dir/tensorboard (pip install tensorboard)")
    cache_dir: str = setting(str(HERE / ".cache"), "where prepared tokens are kept")


@dataclass
class Progress:
    """All that the loop carries from step to step, saved in last.pt: a resumed run is one that never stopped."""

    step: int = 0
    epoch: int = 0
    row: int = 0  # next row of the epoch
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # of training, start-up included
    best_loss: float = math.inf
    rising: int = 0  # evaluations in a row that were worse than the best
    skipped: int = 0  # steps thrown away for a NaN or infinity
    skipped_in_a_row: int = 0
    reduced: int = 1  # times the micro-batch was halved for memory, as a factor


# ----------------------------------------------------------------------------------------------- where to run


@dataclass(frozen=True)
class World:
    """The processes of this run (torchrun sets RANK and its like) and the device of this one."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def open_world(name: Optional[str]) -> Iterator[World]:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({str(error).splitlines()[0]:.80})") from error
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    end_with_parent()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, rank, size)
    finally:
        dist.destroy_process_group()


def end_with_parent() -> None:
    """Asks Linux for a SIGTERM when torchrun dies: killed, it takes no process with it, and these would train on."""
    if sys.platform == "linux":
        import ctypes
        libc = ctypes.CDLL(None)
        if hasattr(libc, "prctl"):
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks: giving them back costs a quarter of a CPU step in page faults."""
    if sys.platform == "linux":
        import ctypes
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Refuses a second run into the same folder. The system drops the lock with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise InputError(f"--out_dir {folder}: cannot write there ({error.strerror})") from error
    with file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"--out_dir {folder}: another training run is writing there; choose another") from error
        for name in OUTPUTS:  # what a run that was killed while it wrote has left
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        yield


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file aside that takes the place of `path` once it is whole. What cannot be written is an InputError."""
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between steps; a second Ctrl-C ends at once.

    SIGTERM may come several times in a row: from Linux, one for each thread of a launcher that was killed.
    """

    def __init__(self):
        self.signal = 0
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self)

    def __call__(self, number, frame):
        if self.signal and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number


# -------------------------------------------------------------------------------------------- model and batches


class LossModule(nn.Module):
    """What DistributedDataParallel and torch.compile wrap: a batch in, the summed loss out."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, documents: Optional[Tensor] = None) -> Tensor:
        mask = None if documents is None else document_mask(documents)
        return self.model.loss(input_ids, targets, mask)


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    if config.n_head < 1 or config.d_model % config.n_head:
        raise InputError(f"--d_model {config.d_model} must be a multiple of --n_head {config.n_head}")
    return GPTConfig(vocab_size=vocab_size, head_dim=config.d_model // config.n_head,
                     **{name: getattr(config, name) for name in ARCHITECTURE})


def tensors(batch: Batch) -> tuple[Optional[Tensor], ...]:
    return batch.input_ids, batch.targets, batch.documents


class Batches:
    """This process's share of each step's rows, one step ahead of the model, in pinned memory for a GPU.

    A pure function of (epoch, row): nothing to save but the position. The next batch is `take()`n; its rows are
    rank, rank + size, ... of the global batch.
    """

    def __init__(self, packed: Packed, batch_size: int, world: World, epoch: int, row: int):
        self.packed, self.batch_size, self.world = packed, batch_size, world
        self.pool = ThreadPoolExecutor(1)
        self.ahead = self.pool.submit(self.make, epoch, row)

    def make(self, epoch: int, row: int):
        rows = self.packed.rows(epoch)
        if row >= rows:
            epoch, row = epoch + 1, 0
            rows = self.packed.rows(epoch)
        end = min(row + self.batch_size, rows)
        mine = list(range(row, end))[self.world.rank::self.world.size]
        on_gpu = self.world.device.type == "cuda"
        # The last batch of an epoch may be short: a process may get no row, and a compiled step wants one shape.
        wanted = -(-self.batch_size // self.world.size) if on_gpu else max(1, len(mine))
        batch = self.packed.batch(epoch, mine + [row] * (wanted - len(mine)))
        batch.targets[len(mine):] = IGNORE
        if on_gpu:
            batch = Batch(*(None if t is None else t.pin_memory() for t in tensors(batch)))
        return batch, epoch, end, rows

    def take(self) -> tuple[Batch, int, int, int]:
        """The batch, the (epoch, row) after it, and the rows of that epoch."""
        taken = self.ahead.result()
        self.ahead = self.pool.submit(self.make, *taken[1:3])
        return taken

    def close(self):
        self.pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------- schedule and plan


def share_done(config: TrainConfig, progress: Progress, rows: int) -> float:
    """How much of the run is over, from 0 to 1: by epochs or by time, whichever is further."""
    by_epochs = (progress.epoch + progress.row / rows) / config.epochs if config.epochs else 0.0
    by_time = progress.seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
    return max(by_epochs, by_time)


def learning_rate(done: float, warmup: float) -> float:
    """Factor on the peak rates: up in a straight line over `warmup`, then down in one to zero at the end."""
    return max(0.0, min(1.0, (done + 0.001) / warmup if warmup else 1.0, (1 - done) / (1 - warmup)))


def count(n: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def memory_gb(device: torch.device) -> float:
    """Most memory held so far by this process, on the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if os.name == "nt":
        return float("nan")
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


# ------------------------------------------------------------------------------------------------- one training


class Trainer:
    """One model in training: gradients, evaluation, sample replies, and the files of the run."""

    def __init__(self, config: TrainConfig, world: World, prepared: Prepared, start: Optional[Checkpoint]):
        self.config, self.world, self.prepared = config, world, prepared
        self.folder = Path(config.out_dir)
        self.tokenizer = prepared.tokenizer
        self.train_rows = prepared.split("train", config.context_length, config.seed, config.vary_copies)
        self.val_rows = prepared.split("val", config.context_length, config.seed)
        torch.manual_seed(config.seed % 2**63)
        if start is None:
            self.model = GPT(model_config(config, self.tokenizer.vocab_size))
            if config.neighbour_start:
                self.model.reset_parameters(token_vectors(prepared, config.d_model))
            self.model.to(world.device)
        else:
            if self.tokenizer.vocab_size > start.config.vocab_size:
                raise InputError(f"the checkpoint is damaged: its tokenizer has {self.tokenizer.vocab_size} ids, its "
                                 f"model {start.config.vocab_size}")
            self.model = start.build_model().float().to(world.device)
            self.model.train()
        self.module: nn.Module = LossModule(self.model)
        if config.fsdp and world.size > 1:
            from torch.distributed.fsdp import fully_shard
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.module)
        elif world.size > 1:
            self.module = nn.parallel.DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.summary = (start.training or {}).get("summary", {}) if start and config.resume else {}
        self.optimizers = make_optimizers(self.model, config.learning_rate, config.embedding_lr, config.weight_decay,
                                          config.batch_size * config.context_length)
        self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
        self.eager = self.module
        if config.compile:
            self.module = torch.compile(self.module)

    def loss(self, batch: Batch) -> Tensor:
        moved = (None if t is None else t.to(self.world.device, non_blocking=True) for t in tensors(batch))
        with self.autocast:
            return self.module(*moved)

    def gradients(self, batch: Batch, parts: int) -> tuple[Tensor, Tensor]:
        """Leaves the gradient of the mean loss over the global batch; returns the summed loss, the targets in all."""
        # Filled on the device: copying a number there would make the host wait for all that is queued.
        mine = torch.full((), int((batch.targets >= 0).sum()), dtype=torch.float32, device=self.world.device)
        targets = self.world.sum(mine).clamp(min=1)
        total = torch.zeros((), device=self.world.device)
        chunks = [t.chunk(parts) for t in tensors(batch) if t is not None]
        pieces = [Batch(*(*piece, None)[:3]) for piece in zip(*chunks, strict=True)]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with nullcontext() if last or not hasattr(self.module, "no_sync") else self.module.no_sync():
                loss = self.loss(piece)
                (loss * (self.world.size / targets)).backward()  # the processes' gradients are averaged, not summed
            total += loss.detach()
        return total, targets

    def try_gradients(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor]:
        """`gradients`, with the micro-batch halved as often as memory demands, and eager where compiling fails."""
        while True:
            parts = min(self.config.grad_accumulation * progress.reduced, len(batch.input_ids))
            try:
                return self.gradients(batch, parts)
            except (MemoryError, RuntimeError) as error:
                self.zero_grad()
                no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(error)
                if no_memory and parts < len(batch.input_ids) and self.world.size == 1:
                    progress.reduced *= 2
                    if self.world.device.type == "cuda":
                        torch.cuda.empty_cache()
                    tqdm.write(f"out of memory: each step now runs in {parts * 2} parts, the batch stays as it was")
                elif no_memory:
                    raise InputError("out of memory: choose a smaller --preset, --context_length or, on several "
                                     "GPUs, a larger --grad_accumulation") from error
                elif self.module is not self.eager:
                    self.module = self.eager
                    tqdm.write(f"torch.compile failed ({type(error).__name__}); going on without it")
                else:
                    raise

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def update(self, factor: float) -> Tensor:
        """One optimizer step at `factor` of the peak rates; returns 1.0 where a NaN or infinity made it do nothing."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        found_inf = 1.0 - norm.isfinite().float()
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
        self.zero_grad()
        return found_inf

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Validation loss in nats a target and in bits a byte, over the first eval_tokens tokens of the split."""
        rows = max(1, min(self.val_rows.rows(0), self.config.eval_tokens // self.config.context_length))
        nats, targets, octets = torch.zeros(3, dtype=torch.float64)
        size = max(1, self.config.batch_size // self.config.grad_accumulation // self.world.size)
        mine = list(range(rows))[self.world.rank::self.world.size]
        turns = -(-rows // self.world.size)  # the same for every process: under fsdp each forward is a joint one
        for at in range(0, turns, size):
            part = mine[at:at + size]
            batch = self.val_rows.batch(0, part or [0])
            if not part:
                batch.targets.fill_(IGNORE)
            nats += self.loss(batch).double().cpu()
            targets += (batch.targets >= 0).sum()
            octets += self.tokenizer.token_byte_lengths[batch.targets[batch.targets >= 0].numpy()].sum()
        sums = self.world.sum(torch.stack((nats, targets, octets)).to(self.world.device, torch.float32)).tolist()
        return sums[0] / max(1, sums[1]), sums[0] / math.log(2) / max(1, sums[2])

    def sample_reply(self) -> str:
        """What the model makes of one fixed prompt of the validation split."""
        batch = self.val_rows.batch(0, [0])
        start = int((batch.targets[0] >= 0).nonzero()[0]) + 1
        prompt = batch.input_ids[0, :max(start, 12)] if not self.prepared.is_chat else batch.input_ids[0, :start]
        stops = (self.tokenizer.im_end_id, self.tokenizer.end_of_text_id)
        self.model.eval()
        reply = list(self.model.generate(prompt.tolist(), 48, stop_ids=stops))
        self.model.train()
        asked, said = self.tokenizer.decode(prompt.tolist()), self.tokenizer.decode(reply)
        for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
            asked = asked.replace(token, "")
        return f"{' '.join(asked.split())[-60:]} -> {' '.join(said.split())}"

    # -- what last.pt needs beyond the weights

    def state(self, progress: Progress, summary: dict) -> dict:
        return {"config": asdict(self.config), "progress": asdict(progress), "summary": summary,
                "data": data_identity(self.prepared), "random_state": torch.get_rng_state(),
                "optimizers": [whole(optimizer.state_dict()) for optimizer in self.optimizers]}

    def restore(self, training: dict, path: Path) -> None:
        """Takes over random state and moments; rates and decay are those of the settings, typed now perhaps."""
        if training["data"] != data_identity(self.prepared):
            raise InputError("--resume: the training data is not what it was; start anew with --init_from")
        try:
            self.restore_moments(training["optimizers"])
            torch.set_rng_state(training["random_state"])
        except Exception as error:  # whatever a damaged state makes torch raise
            raise InputError(f"{path}: damaged, its training state does not fit ({type(error).__name__})") from error

    def restore_moments(self, optimizers: List[dict]) -> None:
        kinds = {"momentum"}, {"step", "exp_avg", "exp_avg_sq"}
        for optimizer, saved, names in zip(self.optimizers, optimizers, kinds, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {}
            for index, like in enumerate(parameters):
                values = state[index] = dict(saved["state"][index])
                if values.keys() != names or any(values[name].shape != like.shape for name in names - {"step"}):
                    raise ValueError(f"moments of parameter {index}")
                if hasattr(like, "full_tensor"):
                    from torch.distributed.tensor import distribute_tensor
                    for name in names - {"step"}:
                        values[name] = distribute_tensor(values[name], like.device_mesh, like.placements)
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def data_identity(prepared: Prepared) -> list:
    """Two numbers that change whenever a record or the tokenizer does."""
    return [len(prepared.tokens), zlib.crc32(prepared.checksums)]


def whole(tree):
    """The same nest of dicts and lists with sharded tensors gathered and every tensor on the CPU."""
    if isinstance(tree, Tensor):
        return (tree.full_tensor() if hasattr(tree, "full_tensor") else tree).detach().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


# -------------------------------------------------------------------------------------------------- the run


def settle(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Fills what the flags left open from the preset and the device."""
    on_gpu = device.type == "cuda"
    name = config.preset or ("26m" if on_gpu else "tiny")
    open_values = dict(PRESETS[name], preset=name, eval_tokens=2**19 if on_gpu else 2**14,
                       data_path=[str(HERE / "corpus" / name) for name in ("chat_*.jsonl", "text_*.jsonl")],
                       dtype="bfloat16" if on_gpu and torch.cuda.is_bf16_supported(False) else "float32")
    if config.epochs is None and config.max_minutes is None:  # both: whichever is over first
        open_values.update(epochs=10.0, max_minutes=9.5 if name == "tiny" else 60.0)
    if config.compile is None:
        from importlib.util import find_spec
        open_values["compile"] = on_gpu and find_spec("triton") is not None
    config = replace(config, **{key: value for key, value in open_values.items() if getattr(config, key) is None})
    for key, least in (("batch_size", 1), ("grad_accumulation", 1), ("context_length", 2), ("eval_tokens", 1)):
        if getattr(config, key) < least:
            raise InputError(f"--{key} must be at least {least}, not {getattr(config, key)}")
    for key in ("epochs", "max_minutes", "learning_rate", "embedding_lr", "grad_clip", "eval_interval"):
        value = getattr(config, key)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{key} must be above 0, not {value}")
    if not 0 <= config.warmup < 1:
        raise InputError(f"--warmup must be from 0 to below 1, not {config.warmup}")
    if not 0 <= config.weight_decay < math.inf:
        raise InputError(f"--weight_decay must be 0 or above, not {config.weight_decay}")
    model_config(config, vocab_size=1)  # refuses sizes that no model can have before the data is read
    return config


def fits(value, kind) -> bool:
    """Whether a value from a file has the type of a field: bool, int, float, str, List or Optional of one."""
    if get_origin(kind) is Union:
        return any(fits(value, option) for option in get_args(kind))
    if get_origin(kind) is list:
        return type(value) is list and all(fits(item, get_args(kind)[0]) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def from_saved(kind: type, values: object, path: Path):
    """A TrainConfig or Progress from what last.pt holds of it; unknown names are left out, a wrong type: InputError."""
    def sound(f) -> bool:
        value, choices = values.get(f.name, f.default), f.metadata.get("choices")
        return (fits(value, f.type) and (value is None or not choices or value in choices)
                and (kind is TrainConfig or value >= (f.name == "reduced")))

    if not isinstance(values, dict) or not all(map(sound, fields(kind))):
        raise InputError(f"{path}: damaged, its {kind.__name__} is not one that train.py writes")
    return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})


def resumed(config: TrainConfig, typed: dict, path: Path) -> tuple[TrainConfig, Progress, Checkpoint]:
    """The settings of the interrupted run, under those typed now; how far it was; its checkpoint."""
    start = Checkpoint.load(path)
    state = start.training if isinstance(start.training, dict) else {}
    if not state.keys() >= {"config", "progress", "data", "random_state", "optimizers"}:
        raise InputError(f"{path}: holds no training state; --resume wants last.pt, --init_from any checkpoint")
    before = from_saved(TrainConfig, state["config"], path)
    for name in (*ARCHITECTURE, "preset", "tokenizer", "vocab_size", "seed", "data_path", "init_from"):
        if name in typed and typed[name] != getattr(before, name):
            raise InputError(f"--{name} cannot change on --resume: it was {getattr(before, name)}, not {typed[name]}; "
                             "start a run of its own with --init_from")
    here = {name: getattr(config, name) for name in ("device", "dtype", "compile", "out_dir", "resume")}
    return replace(before, **{**here, **typed}), from_saved(Progress, state["progress"], path), start


def train(config: TrainConfig, typed: Optional[dict] = None) -> None:
    """Runs one training to its end, its budget or a signal. `typed` names the flags given beside --resume."""
    began = time.monotonic()
    with open_world(config.device) as world:
        folder = Path(config.out_dir)
        with lock(folder) if world.first else nullcontext():
            start = progress = None
            if config.resume:
                config, progress, start = resumed(config, typed or {}, folder / "last.pt")
            elif config.init_from:
                start = Checkpoint.load(config.init_from)
            if start:
                config = replace(config, **{name: getattr(start.config, name) for name in ARCHITECTURE})
            config = settle(config, world.device)
            prepared = read_data(config, world, start)
            trainer = Trainer(config, world, prepared, start)
            if progress:
                trainer.restore(start.training, folder / "last.pt")
            else:
                progress = Progress(seconds=time.monotonic() - began)
                if world.first:
                    keep_previous(folder)
            rows = trainer.train_rows
            with closing(Batches(rows, config.batch_size, world, progress.epoch, progress.row)) as batches:
                run(trainer, progress, batches)


def read_data(config: TrainConfig, world: World, start: Optional[Checkpoint]) -> Prepared:
    """Tokens from the cache or made now, by the first process alone; the tokenizer of `start` where there is one."""
    tokenizer = Tokenizer.from_dict(start.tokenizer) if start else config.tokenizer
    bar = tqdm(total=1.0, desc="reading", unit_scale=True, leave=False, disable=not world.first)

    def show(done: int, total: int, what: str) -> None:
        bar.total = total
        bar.set_description(what, refresh=False)
        bar.update(done - bar.n)

    if not world.first:
        dist.barrier()
    with bar:
        vocab_size = None if config.resume else config.vocab_size  # the checkpoint's tokenizer has its size
        prepared = prepare(config.data_path, tokenizer, vocab_size, config.cache_dir, show)
    if world.first and world.size > 1:
        dist.barrier()
    return prepared


def keep_previous(folder: Path) -> None:
    """A new run moves the last one's files into `previous/` (`previous_2/` ...), so that nothing is ever lost.

    Only a run that saved a checkpoint is worth it: what else is there goes.
    """
    try:
        if any((folder / name).exists() for name in OUTPUTS if name.endswith(".pt")):
            names = itertools.chain(["previous"], (f"previous_{number}" for number in itertools.count(2)))
            kept = next(folder / name for name in names if not (folder / name).exists())
            kept.mkdir()
            for name in OUTPUTS:
                if (folder / name).exists():
                    (folder / name).rename(kept / name)
        for name in OUTPUTS:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep the files of the run before in {folder}: {error.strerror}") from error


def run(trainer: Trainer, progress: Progress, batches: Batches) -> None:
    """The loop, from the plan to the last checkpoint."""
    config, world, folder = trainer.config, trainer.world, trainer.folder
    say = (lambda text: tqdm.write(harmless(text))) if world.first else (lambda text: None)
    stop = Stop()
    plan(trainer, progress, batches, say)
    metrics = Metrics(trainer, progress)
    log_every = 1 if world.device.type == "cpu" else 10
    skipped = torch.tensor([0.0, progress.skipped_in_a_row], device=world.device)  # since the last look, in a row
    rows = batches.ahead.result()[3]
    done = share_done(config, progress, rows)
    if not progress.step:  # a budget that preparing the data used up still gives a model
        done = min(done, 0.99)
    bar = tqdm(total=100, initial=100 * done, disable=not world.first, unit="%",
               bar_format="{percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}")
    clock = time.monotonic() - progress.seconds
    saved, stopping = progress.seconds, 0
    loss_sum = torch.zeros(2, device=world.device)  # nats and targets since the last line of metrics
    with bar:
        while done < 1:
            batch, epoch, row, rows = batches.take()
            total, targets = trainer.try_gradients(batch, progress)
            found_inf = trainer.update(learning_rate(done, config.warmup))
            skipped = torch.stack((skipped[0] + found_inf, (skipped[1] + 1) * found_inf))
            loss_sum += torch.where(found_inf > 0, 0.0, torch.stack((world.sum(total), targets)))
            progress.step, progress.epoch, progress.row = progress.step + 1, epoch, row
            before = done
            if progress.step % log_every == 0:  # the only place where the host waits for the device
                # What all agree on decides: a process alone in saving or stopping would wait for the others forever.
                progress.seconds, stopping = agree(world, time.monotonic() - clock, stop.signal)
                metrics.step(progress, loss_sum, skipped, bar)
            done = share_done(config, progress, rows)
            bar.update(min(100.0, 100 * done) - bar.n)
            interval = config.eval_interval
            if done >= 1 or (progress.step % interval == 0 if interval else int(12 * done) > int(12 * before)):
                loss, bits = trainer.evaluate()
                metrics.evaluation(progress, rows, loss, bits, say)
                saved = progress.seconds
            if progress.skipped_in_a_row >= 20:
                in_a_row, progress.skipped_in_a_row = progress.skipped_in_a_row, 0  # a resume is a new attempt
                metrics.save("last.pt", progress)  # skipped steps changed nothing: these weights are the last good ones
                raise InputError(f"the loss has been NaN or infinite for {in_a_row} steps in a row; "
                                 f"{folder / 'last.pt'} holds the last good state; try half the --learning_rate")
            if stopping or progress.seconds - saved > 60:
                metrics.save("last.pt", progress)
                saved = progress.seconds
            if stopping:
                bar.close()
                say(f"stopped at step {progress.step}, all is saved; go on with: python train.py --resume"
                    + (f" --out_dir {folder}" if str(folder) != "checkpoints" else ""))
                raise SystemExit(128 + stopping)
    metrics.finish(progress, say)


def agree(world: World, seconds: float, signal_number: int) -> tuple[float, int]:
    """The same clock and the same signal on every process, so that all take the same step and stop at the same one."""
    if world.size > 1:
        values = torch.tensor([seconds, float(signal_number)], device=world.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        seconds, signal_number = values.tolist()
    return seconds, int(signal_number)


def plan(trainer: Trainer, progress: Progress, batches: Batches, say) -> None:
    """Says what the run will be before it starts: sizes, steps, memory and, from a short probe, speed and end."""
    config, world, prepared = trainer.config, trainer.world, trainer.prepared
    report = prepared.report
    say(f"data     {', '.join(config.data_path)}: {report.records:,} records, {count(len(prepared.tokens))} tokens"
        + (f", {count(int(prepared.supervised.sum()))} of them trained on" if prepared.is_chat else ""))
    if report.skipped:
        say(f"         {report.skipped:,} bad records skipped: " + "; ".join(report.reasons))
    c = trainer.model.config
    say(f"model    {count(c.parameter_count())} parameters: {c.n_layer} blocks of width {c.d_model}, {c.n_head} heads, "
        f"vocabulary {c.vocab_size:,}, context {c.context_length}")
    if prepared.is_chat:
        spans = "".join(f"[{text}]" if kept else text for text, kept in masked_sample(prepared))
        say("sample   the loss counts what stands in brackets\n  " + spans.strip().replace("\n", "\n  "))
    batch, _, _, rows = batches.ahead.result()
    for _ in range(2):  # the first pays for compiling and for first allocations
        began = time.monotonic()
        float(trainer.try_gradients(batch, progress)[0])
        seconds = time.monotonic() - began
        trainer.zero_grad()
    steps = math.ceil(rows / config.batch_size)
    total = steps * config.epochs if config.epochs else math.inf
    needed = (total - progress.step) * seconds * 1.3  # the optimizers and the evaluations come on top
    budget = 60 * config.max_minutes - progress.seconds if config.max_minutes else math.inf
    end = time.strftime("%H:%M", time.localtime(time.time() + min(needed, budget, 1e11)))
    length = (f"{config.epochs:g} epochs, about {total:,.0f} steps" if needed < budget
              else f"{config.max_minutes:g} minutes")
    speed = min(config.batch_size, rows) * config.context_length / seconds
    say(f"device   {world.device}" + (f" x {world.size}" if world.size > 1 else f", {torch.get_num_threads()} threads"
        if world.device.type == "cpu" else "") + f", {config.dtype}, "
        + ("compiled" if trainer.module is not trainer.eager else "eager"))
    say(f"plan     {length}, {steps:,} steps an epoch of {config.batch_size} x {config.context_length} tokens; about "
        f"{count(speed)} tokens/s, {memory_gb(world.device):.1f} GB at most; ends about {end}")


class Metrics:
    """What a run tells: progress bar, metrics.jsonl, TensorBoard, the loss curve, samples; and its checkpoints."""

    def __init__(self, trainer: Trainer, progress: Progress):
        self.trainer, self.config, self.world = trainer, trainer.config, trainer.world
        self.path = trainer.folder / "metrics.jsonl"
        self.best_train, self.warned = math.inf, False
        self.train_loss, self.shown = math.nan, (progress.tokens, progress.seconds)
        self.summary = trainer.summary
        self.lines: List[dict] = []
        self.board = None
        if not self.world.first:
            return
        if progress.step and self.path.exists():  # a killed run may have written lines past its last checkpoint
            lines = self.path.read_text(encoding="utf-8").splitlines()
            lines = [json.loads(line) for line in lines if line.endswith("}")]
            self.lines = [line for line in lines if line["step"] <= progress.step]
        self.write()
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError("--tensorboard needs: pip install tensorboard") from error
            self.board = SummaryWriter(self.trainer.folder / "tensorboard", purge_step=progress.step)

    def write(self) -> None:
        with writing(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def log(self, line: dict) -> None:
        if not self.world.first:
            return
        self.lines.append(line)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items() if self.board else ():
                self.board.add_scalar(name, value, line["step"])
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def step(self, progress: Progress, loss_sum: Tensor, skipped: Tensor, bar: tqdm) -> None:
        """Takes the sums over from the device and empties them."""
        nats, targets = loss_sum.tolist()
        loss_sum.zero_()
        new_skips, progress.skipped_in_a_row = int(skipped[0]), int(skipped[1])
        skipped[0] = 0
        progress.skipped += new_skips
        progress.tokens += int(targets)
        if targets:
            mean = nats / targets
            before = mean if math.isnan(self.train_loss) else self.train_loss
            self.train_loss = before + 0.05 * (mean - before)  # smoothed over some twenty lines
            self.log({"step": progress.step, "seconds": round(progress.seconds, 2), "tokens": progress.tokens,
                      "train_loss": round(mean, 5)})
        tokens, seconds = self.shown
        if progress.seconds - seconds > 1:
            speed = (progress.tokens - tokens) / (progress.seconds - seconds)
            bar.set_postfix_str(f"loss {self.train_loss:.3f}, {count(speed)} targets/s"
                                + (f", {progress.skipped} steps skipped" if progress.skipped else ""), refresh=False)
            self.shown = (progress.tokens, progress.seconds)

    def evaluation(self, progress: Progress, rows: int, loss: float, bits: float, say) -> None:
        """Notes a validation loss; keeps the model if it is the best; says so when it turns up while training falls."""
        better = loss < progress.best_loss
        progress.rising = 0 if better else progress.rising + 1
        progress.best_loss = min(loss, progress.best_loss)
        self.log({"step": progress.step, "seconds": round(progress.seconds, 2), "tokens": progress.tokens,
                  "val_loss": round(loss, 5), "val_bits_per_byte": round(bits, 5)})
        say(f"step {progress.step}: train {self.train_loss:.3f}, validation {loss:.3f} ({bits:.3f} bits/byte)"
            + (", best so far" if better else ""))
        if not self.config.fsdp:
            say(f"  {self.trainer.sample_reply()}")
        if progress.rising >= 3 and self.train_loss < self.best_train and not self.warned:
            self.warned = True
            say("  validation gets worse while training gets better: the model now learns the data by heart. "
                "best_model.pt keeps the best; fewer --epochs, more data or a smaller model would serve better")
        self.best_train = min(self.best_train, self.train_loss)
        config = self.trainer.model.config
        self.summary = {
            "chat": bool(self.trainer.prepared.is_chat), "data": ", ".join(Path(p).name for p in self.config.data_path),
            "preset": self.config.preset, "parameters": config.parameter_count(), "steps": progress.step,
            "tokens": progress.tokens, "epochs": round(progress.epoch + progress.row / rows, 2),
            "minutes": round(progress.seconds / 60, 2), "device": str(self.world.device),
            "dtype": self.config.dtype, "validation_loss": round(loss, 4), "bits_per_byte": round(bits, 4)}
        if better:
            self.save("best_model.pt", progress)
        self.save("last.pt", progress)
        self.draw()

    def save(self, name: str, progress: Progress) -> None:
        """best_model.pt is the model and the facts of its training; last.pt has all that a resume needs."""
        trainer = self.trainer
        weights = whole(trainer.model.state_dict())
        training = {"summary": self.summary} if name == "best_model.pt" else trainer.state(progress, self.summary)
        if self.world.first:
            Checkpoint(trainer.model.config, weights, trainer.tokenizer.to_dict(), training).save(trainer.folder / name)
            if self.board:
                self.board.flush()  # or a stopped run would lose the last two minutes

    def draw(self) -> None:
        """loss.png, where matplotlib is installed; metrics.jsonl has the figures in any case."""
        if not self.world.first:
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for key, label, style in (("train_loss", "training", dict(alpha=0.5, linewidth=0.8)),
                                  ("val_loss", "validation", dict(marker="o", markersize=3))):
            points = [(line["step"], line[key]) for line in self.lines if key in line]
            axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3)
        with writing(self.trainer.folder / "loss.png") as aside:
            figure.savefig(aside, format="png")

    def finish(self, progress: Progress, say) -> None:
        folder = self.trainer.folder
        say(f"done: {progress.step:,} steps in {progress.seconds / 60:.1f} minutes, best validation loss "
            f"{progress.best_loss:.3f}" + (f", {progress.skipped} steps skipped" if progress.skipped else ""))
        say(f"talk to it: python chat.py --model_path {folder / 'best_model.pt'}")
        if self.board:
            self.board.close()


# ----------------------------------------------------------------------------------------------------- command


def parse(arguments: Optional[List[str]] = None) -> tuple[TrainConfig, dict, bool]:
    """The command line, derived from TrainConfig: (settings, those that were typed, --traceback)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(TrainConfig):
        kind = str(f.type)
        options = dict(help=f.metadata["help"], default=argparse.SUPPRESS)
        if f.default not in (None, MISSING) and not isinstance(f.default, bool) and f.name != "cache_dir":
            options["help"] += f" (default: {f.default})"
        if "bool" in kind:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = next(t for t in (int, float, str) if t.__name__ in kind)
            options["choices"] = f.metadata.get("choices")
            names = {int: "N", float: "X", str: "PATH" if "path" in f.name or "dir" in f.name else "NAME"}
            options["metavar"] = None if options["choices"] else names[options["type"]]
            if "List" in kind:
                options["nargs"] = "+"
        parser.add_argument(f"--{f.name}", **options)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    typed = vars(parser.parse_args(arguments))
    traceback_wanted = typed.pop("traceback")
    return TrainConfig(**typed), typed, traceback_wanted


def main() -> int:
    config, typed, show_traceback = parse()
    keep_freed_memory()
    try:
        train(config, typed)
    except InputError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"train.py: {harmless(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the loop took over the signal
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
