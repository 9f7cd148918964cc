"""How fast is one reply? Tokens per second at batch 1, ours against transformers, ONNX Runtime and TorchScript.

    python benchmarks/decode.py --preset tiny 26m
    python benchmarks/decode.py --model_path checkpoints/best_model.pt

All rows are taken in one run, one after the other in each round; a ratio is the median of the ratios of the rounds.
ONNX and TorchScript are the exported files, which keep no cache. Below stand two bounds: how many tokens a second
torch's own one-row F.linear, and a plain read of memory, would stream the weights for. No prompt is in the bounds, so
they are compared with a reply to a prompt of one token.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as chat.py does, before NumPy is loaded

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import export  # noqa: E402 - found through the line above
from model import GPT, Checkpoint, GPTConfig  # noqa: E402
from tokenizer import SPECIAL_TOKENS, Tokenizer  # noqa: E402
from train import ARCHITECTURE, PRESETS  # noqa: E402

VOCABULARY = {"tiny": 4096, "26m": 6400, "64m": 6400, "124m": 32768}
PROMPT = [i % 200 for i in range(16)]
OURS, OURS_ALONE = "GPT.generate", "GPT.generate, prompt of 1"


def random_checkpoint(preset: str, path: Path) -> None:
    """A model of the preset's shape with random weights: they decode as fast as trained ones."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes(divmod(i, 256)): 256 + i for i in range(VOCABULARY[preset] - 259)}
    specials = {token: VOCABULARY[preset] - 3 + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer("random", r"[\s\S]", ranks, specials)
    sizes = {name: value for name, value in PRESETS[preset].items() if name in ARCHITECTURE}
    config = GPTConfig(vocab_size=VOCABULARY[preset], head_dim=sizes["d_model"] // sizes["n_head"], **sizes)
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05 + (parameter.dim() == 1)
    Checkpoint(config, model.state_dict(), tokenizer.to_dict()).save(path)


def timed(run, tokens: int) -> float:
    """Tokens a second of one call."""
    start = time.perf_counter()
    run(tokens)
    return tokens / (time.perf_counter() - start)


def greedily(logits_of):
    """A decoder for a runtime without a cache."""
    def run(tokens: int) -> None:
        ids = list(PROMPT)
        for _ in range(tokens):
            ids.append(int(logits_of(torch.tensor([ids]))[0, -1].argmax()))
    return run


def contestants(checkpoint: Checkpoint, folder: Path) -> dict:
    """Name -> a function that decodes so many tokens, each from the file that export.py writes."""
    import onnxruntime
    from transformers import AutoModelForCausalLM
    ours = checkpoint.build_model()
    theirs = AutoModelForCausalLM.from_pretrained(folder / "transformers", dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.max_length = None
    scripted = torch.jit.load(str(folder / "model.pt"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    prompt = torch.tensor([PROMPT])
    return {
        OURS: lambda tokens: list(ours.generate(PROMPT, tokens)),
        "transformers generate": lambda tokens: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False),
        "ONNX Runtime, no cache": greedily(
            lambda ids: torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])),
        "TorchScript, no cache": greedily(lambda ids: scripted(ids, None)[0]),
        OURS_ALONE: lambda tokens: list(ours.generate(PROMPT[:1], tokens)),
    }


def streamed_linear(checkpoint: Checkpoint):
    """One F.linear per weight matrix and token, each on one row."""
    matrices = [w for name, w in checkpoint.weights.items() if w.dim() == 2 and name != "token_embedding.weight"]
    if checkpoint.config.tie_embeddings:
        matrices.append(checkpoint.weights["token_embedding.weight"])
    matrices = [w.float().clone() for w in matrices]
    rows = [torch.randn(1, 1, w.shape[1]) for w in matrices]

    def run(tokens: int) -> None:
        for _ in range(tokens):
            for row, matrix in zip(rows, matrices, strict=True):
                F.linear(row, matrix)
    return run


def streamed_memory(checkpoint: Checkpoint):
    """A sum over as many bytes as a token needs of weights."""
    size = sum(w.numel() for name, w in checkpoint.weights.items()
               if checkpoint.config.tie_embeddings or name != "token_embedding.weight")
    memory = torch.randn(size)

    def run(tokens: int) -> None:
        for _ in range(tokens):
            memory.sum()
    return run


def by_position(checkpoint: Checkpoint) -> str:
    """Milliseconds a token at growing lengths."""
    model = checkpoint.build_model()
    context = checkpoint.config.context_length
    places = [place for place in (50, 100, 200, 500, 1000, 2000) if place + 48 < context]
    shown = []
    for place in places:
        times = []
        for _ in range(5):
            reply = model.generate([i % 200 for i in range(place)], 33)
            next(reply)
            start = time.perf_counter()
            list(reply)
            times.append((time.perf_counter() - start) / 32 * 1e3)
        shown.append(f"{min(times):.2f} ms at {place}")
    return ", ".join(shown)


def table(path: Path, rounds: int, tokens: int) -> None:
    checkpoint = Checkpoint.load(path)
    tokens = min(tokens, checkpoint.config.context_length - len(PROMPT))
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        source = export.open_source(str(path), None)
        for format in export.FORMATS.values():
            format.write(source, Path(name) / format.target)
        runs = contestants(checkpoint, Path(name))
        runs |= {"bound: F.linear": streamed_linear(checkpoint), "bound: memory": streamed_memory(checkpoint)}
        rates: dict = {name: [] for name in runs}
        for run in runs.values():
            run(min(4, tokens))
        for _ in range(rounds):
            for name, run in runs.items():
                rates[name].append(timed(run, tokens))
        config = checkpoint.config
        print(f"\n{config.n_layer} x {config.d_model}, vocabulary {config.vocab_size}, context "
              f"{config.context_length}, {config.parameter_count() / 1e6:.1f} million parameters; {tokens} after "
              f"{len(PROMPT)}, {rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print("| | tokens/s | ours is |\n|---|---|---|")
        for name, found in rates.items():
            ours = rates[OURS_ALONE if name.startswith("bound") else OURS]
            ratio = statistics.median(a / b for a, b in zip(ours, found, strict=True))
            print(f"| {name} | {statistics.median(found):.0f} | {ratio:.2f} x |")
        print(f"\nA token takes {by_position(checkpoint)}.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="a checkpoint (default: random weights of the presets)")
    parser.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=["tiny", "26m"])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="to decode in a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.model_path:
        table(Path(options.model_path), options.rounds, options.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        for preset in options.preset:
            random_checkpoint(preset, Path(folder, f"{preset}.pt"))
            table(Path(folder, f"{preset}.pt"), options.rounds, options.tokens)


if __name__ == "__main__":
    main()
