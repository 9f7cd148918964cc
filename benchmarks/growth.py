"""How do speed and memory change from 2 to 350 million parameters and from 128 to 4096 tokens of context?

    python benchmarks/growth.py
    python benchmarks/growth.py --sizes 350m --contexts 512 4096
    python benchmarks/growth.py --device cuda --tokens 65536

One process a cell, one step of train.py's own functions at `--tokens` tokens after a short one to warm up: tokens/s of
the gradients, seconds of the update (which does not grow with the batch), most memory held. Then, on paper, what
several GPUs need of the wires between them, with the arithmetic.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402 - found through the line above
from model import GPT, GPTConfig  # noqa: E402
from optim import POLAR_EXPRESS  # noqa: E402

# blocks, width, vocabulary; heads of 64, a feed-forward layer of 8/3
SIZES = {"2m": (4, 192, 4096), "10m": (6, 320, 6400), "26m": (8, 512, 6400), "64m": (8, 768, 6400),
         "124m": (12, 768, 32768), "350m": (24, 1024, 32768)}


def shape(size: str, context: int) -> GPTConfig:
    layers, width, vocabulary = SIZES[size]
    return GPTConfig(vocab_size=vocabulary, context_length=context, n_layer=layers, n_head=width // 64,
                     n_kv_head=width // 64, d_model=width, d_ff=round(width / 12) * 32, head_dim=64)


def cell(size: str, context: int, tokens: int, name: str) -> tuple[float, float, float]:
    """In a process of its own: tokens/s of the gradients, seconds of the update, gigabytes."""
    train.keep_freed_memory()
    device = torch.device(name)
    model = GPT(shape(size, context)).to(device)
    module = train.LossModule(model)
    if device.type == "cuda":
        module = torch.compile(module)
    optimizers = train.make_optimizers(model, 0.01, 0.001, 0.1, tokens)
    whole = tokens // context, context
    for rows_and_length in ((1, min(128, context)) if device.type == "cpu" else whole, whole):
        ids = torch.randint(0, model.config.vocab_size, rows_and_length, device=device)
        marks = [moment(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module(ids, ids) / ids.numel()
        loss.backward()
        marks.append(moment(device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.found_inf = torch.zeros((), device=device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        marks.append(moment(device))
    return ids.numel() / (marks[1] - marks[0]), marks[2] - marks[1], train.memory_gb(device)


def moment(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(options: argparse.Namespace) -> None:
    where = (torch.cuda.get_device_name() + ", bfloat16, compiled" if options.device == "cuda"
             else f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, float32, eager")
    print(f"torch {torch.__version__}, {where}, {options.tokens:,} tokens a step: tokens/s, peak memory\n")
    print("| | parameters | update |" + "".join(f" context {context} |" for context in options.contexts))
    print("|---" * (3 + len(options.contexts)) + "|")
    for size in options.sizes:
        cells, updates = [], []
        for context in options.contexts:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                speed, update, memory = pool.submit(cell, size, context, options.tokens, options.device).result()
            cells.append(f"{speed:,.0f}, {memory:.1f} GB")
            updates.append(update)
        count = shape(size, 2).parameter_count() / 1e6
        print(f"| {size} | {count:.1f} M | {min(updates):.2f} s | " + " | ".join(cells) + " |", flush=True)


def update_flops(size: str) -> float:
    """Of Muon, for one update: as often as it has polynomials x x^T, its square, and their product with x, a matrix."""
    config = shape(size, 2)
    shapes = [(config.d_model, config.d_model)] * 4 + [(config.d_model, config.d_ff)] * 3
    return config.n_layer * sum(len(POLAR_EXPRESS) * (4 * rows**2 * columns + 2 * rows**3) for rows, columns in shapes)


def on_paper(tflops: float) -> None:
    """Bytes a step between GPUs as train.py sends them, float32, and the rate at which they hide behind computing."""
    print(f"""
With P parameters, t tokens a GPU and step, N GPUs that each reach R = {tflops:.0f} TFLOP/s:
gradients take 6 P t / R seconds, two thirds of it the backward pass;
Muon's update takes the same on every GPU, however many they are: it is not divided among them;
replicas (torchrun) all-reduce 4 P bytes of gradients: 2 (N-1)/N 4 P in and out of each GPU, to hide behind the backward
pass; shards (--fsdp) gather the weights twice, scatter the gradients and gather Muon's momentum: 4 (N-1)/N 4 P, to hide
behind both passes. Held by each GPU, besides activations: weights, gradients and momentum, 12 P bytes, or 12 P / N.

| | GPUs | tokens a GPU | gradients | update | replicas send | need | hold | shards send | need | hold |""")
    print("|---" * 11 + "|")
    for size in ("124m", "350m"):
        parameters = shape(size, 2).parameter_count()
        update = update_flops(size) / (tflops * 1e12)
        for tokens_with in (lambda count: 2**15, lambda count: 2**19 // count):  # the batch grows with them, or stays
            for count in (8, 64, 512):
                tokens = tokens_with(count)
                seconds = 6 * parameters * tokens / (tflops * 1e12)
                part = 4 * parameters * (count - 1) / count / 1e9
                print(f"| {size} | {count} | {tokens:,} | {seconds * 1e3:.1f} ms | {update * 1e3:.1f} ms "
                      f"| {2 * part:.2f} GB | {2 * part / (seconds * 2 / 3):.0f} GB/s | {12 * parameters / 1e9:.2f} GB "
                      f"| {4 * part:.2f} GB | {4 * part / seconds:.0f} GB/s | {12 * parameters / 1e9 / count:.3f} GB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=4096, help="of a step; at least the longest context")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--gpu_tflops", type=float, default=400, help="a GPU is taken to reach, in the second table")
    options = parser.parse_args()
    if options.tokens < max(options.contexts):
        parser.error(f"--tokens {options.tokens} is less than a context of {max(options.contexts)}")
    measured(options)
    on_paper(options.gpu_tflops)


if __name__ == "__main__":
    main()
