"""How many tokens a second does a training step take in, against nanoGPT and transformers at equal shape?

    python benchmarks/throughput.py PATH_TO_NANOGPT
    python benchmarks/throughput.py PATH_TO_NANOGPT --compile --shapes small
    python benchmarks/throughput.py PATH_TO_NANOGPT --compile --device cuda --shapes 64m 124m 350m --trace

Each side lives in a process of its own and takes a turn after the others, so that neither settings nor a change of the
machine's speed favour one; a ratio is the median of the ratios of the rounds. `gradients` is forward, loss and
backward; `step` is also clipping and the optimizer, each side's own (ours Muon with Adam, the others AdamW). A model's
FLOPs are 6 a parameter and token, and 6 L T C a token for causal attention. float32 on a CPU; on a GPU bfloat16 by
autocast, and a turn is ten steps between which the host does not wait.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# blocks, width, heads, batch, context, vocabulary
SHAPES = {
    "small": (6, 256, 4, 16, 256, 4096), "large": (12, 768, 12, 4, 512, 32768),  # for a CPU
    "64m": (8, 768, 12, 64, 512, 6400), "124m": (12, 768, 12, 32, 1024, 32768), "350m": (24, 1024, 16, 16, 1024, 32768),
}


def d_ff(width: int) -> int:
    """Three matrices of this width hold what nanoGPT's two of 4 times the model's width do."""
    return round(8 * width / 3 / 32) * 32


def ours(layers, width, heads, rows, context, vocabulary, device):
    sys.path.insert(0, str(ROOT))
    import train
    from model import GPT, GPTConfig
    train.keep_freed_memory()
    model = GPT(GPTConfig(vocab_size=vocabulary, context_length=context, n_layer=layers, n_head=heads, n_kv_head=heads,
                          d_model=width, d_ff=d_ff(width), head_dim=width // heads)).to(device)
    optimizers = train.make_optimizers(model, 0.01, 0.001, 0.1, rows * context)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros((), device=device)
    return model, train.LossModule(model), lambda loss, count: loss / count, optimizers


def nanogpt(layers, width, heads, rows, context, vocabulary, device):
    from model import GPT, GPTConfig  # the peer's: its folder is the first of the path
    model = GPT(GPTConfig(block_size=context, vocab_size=vocabulary, n_layer=layers, n_head=heads, n_embd=width,
                          dropout=0.0, bias=False)).to(device)
    return model, model, lambda found, _: found[1], [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)]


def transformers(layers, width, heads, rows, context, vocabulary, device):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=d_ff(width), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads, tie_word_embeddings=True,
        max_position_embeddings=context, use_cache=False, attn_implementation="sdpa")).train().to(device)

    class Labelled(torch.nn.Module):
        """Its labels are the inputs, which it shifts itself."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, targets):
            return self.model(input_ids, labels=targets).loss

    adamw = torch.optim.AdamW(model.parameters(), 6e-4, fused=device == "cuda")
    return model, Labelled(), lambda loss, _: loss, [adamw]


SIDES = {"ours": ours, "nanoGPT": nanogpt, "transformers": transformers}


def begin(name: str, shape: tuple, path: str, device: str, compiled: bool) -> None:
    """In the side's process: what the functions below will use."""
    global model, module, mean_loss, optimizers, batch, autocast
    _, _, _, rows, context, vocabulary = shape
    sys.path.insert(0, path)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model, module, mean_loss, optimizers = SIDES[name](*shape, device)
    if compiled:
        module = torch.compile(module)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    batch = torch.randint(0, vocabulary, (2, rows, context), device=device)


def now():
    """A mark in time: on a GPU one in its queue, which costs no wait."""
    if batch.device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start, stop) -> float:
    return stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1e3


def step():
    """One training step; the mark between its gradients and its update."""
    with autocast:
        loss = mean_loss(module(*batch), batch[1].numel())
    loss.backward()
    between = now()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return between


def turn() -> tuple[float, float]:
    """Seconds a step: of the gradients, and of those with the update."""
    marks = [now()]
    for _ in range(1 if batch.device.type == "cpu" else 10):
        marks += [step(), now()]
    if batch.device.type == "cuda":
        torch.cuda.synchronize()
    gradients = [seconds(*pair) for pair in zip(marks[:-1:2], marks[1::2], strict=True)]
    return statistics.mean(gradients), seconds(marks[0], marks[-1]) / len(gradients)


def parameters() -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def trace() -> str:
    """Where the time of a turn goes, by operation."""
    from torch.profiler import ProfilerActivity, profile
    kind = batch.device.type
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (kind == "cuda")]) as found:
        turn()
    return found.key_averages().table(sort_by=f"self_{'device' if kind == 'cuda' else 'cpu'}_time_total", row_limit=25,
                                      max_name_column_width=60)


def multiply(device: str) -> float:
    """FLOP/s of torch.mm on square matrices, the best of several: the rate that the steps are held against."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    taken = []
    for _ in range(4 if device == "cpu" else 30):
        began = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / min(taken)


def measure(shape: tuple, path: str, options: argparse.Namespace) -> None:
    layers, width, _, rows, context, _ = shape
    spawn = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, spawn, begin, (name, shape, path, options.device, options.compile))
             for name in SIDES}
    multiplier = ProcessPoolExecutor(1, spawn)
    times, rates = {name: [] for name in SIDES}, []
    for number in range(-2, options.rounds):  # the first two pay for compiling and for first allocations
        for name, pool in pools.items():
            taken = pool.submit(turn).result()
            if number >= 0:
                times[name].append(taken)
        rates.append(multiplier.submit(multiply, options.device).result())
    tokens, rate = rows * context, statistics.median(rates[2:])
    print(f"\n{layers} x {width}, batch {rows} x {context}, {'compiled' if options.compile else 'eager'}, "
          f"{options.rounds} rounds, torch.mm {rate / 1e9:,.0f} GFLOP/s\n")
    print("| | parameters | gradients, tokens/s | of mm | ours is | step, tokens/s | of mm | ours is |")
    print("|---" * 8 + "|")
    for name, pool in pools.items():
        count = pool.submit(parameters).result()
        flops = 6 * count + 6 * layers * context * width
        cells = []
        for part in (0, 1):
            speed = tokens / statistics.median(taken[part] for taken in times[name])
            ratio = statistics.median(b[part] / a[part] for a, b in zip(times["ours"], times[name], strict=True))
            cells.append(f"{speed:,.0f} | {flops * speed / rate:.0%} | {ratio:.2f} x")
        print(f"| {name} | {count / 1e6:.2f} M | {' | '.join(cells)} |", flush=True)
    if options.trace:
        print(pools["ours"].submit(trace).result())
    for pool in (*pools.values(), multiplier):
        pool.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["small", "large"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="all sides through torch.compile (needs a C++ compiler)")
    parser.add_argument("--trace", action="store_true", help="also where the time of our step goes, by operation")
    options = parser.parse_args()
    where = (torch.cuda.get_device_name() if options.device == "cuda"
             else f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")
    print(f"torch {torch.__version__}, {where}, {'bfloat16' if options.device == 'cuda' else 'float32'}")
    for shape in options.shapes:
        measure(SHAPES[shape], str(options.peer.resolve()), options)


if __name__ == "__main__":
    main()
