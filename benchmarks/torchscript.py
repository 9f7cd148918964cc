"""Is the TorchScript export, once warm, at least as fast as the model it was made from?

    python benchmarks/torchscript.py --model_path checkpoints/best_model.pt

Both run in turn within each round; `gain` is the median over the rounds of eager's time by TorchScript's, so that above
1 TorchScript is the faster. A round repeats a shape for about --seconds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export import open_source  # noqa: E402
from formats import write_torchscript  # noqa: E402

SHAPES = ((1, 1), (1, 256), (4, 256))  # (batch, time)


def seconds_of(model, ids: torch.Tensor, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        model(ids, None)
    return (time.perf_counter() - began) / repeats


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="checkpoints/best_model.pt")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.2)
    options = parser.parse_args()
    source = open_source(options.model_path, None)
    with tempfile.TemporaryDirectory() as folder:
        write_torchscript(source, Path(folder, "model.pt"))
        scripted = torch.jit.load(str(Path(folder, "model.pt")))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds, "
          f"{source.config.parameter_count():,} parameters")
    print(f"{'batch x time':14}{'eager ms':>10}{'TorchScript ms':>16}{'gain':>8}{'quartiles':>14}")
    for batch, length in SHAPES:
        ids = torch.randint(0, source.config.vocab_size, (batch, min(length, source.config.context_length)))
        seconds_of(scripted, ids, 10)  # the first two calls of a shape compile it
        repeats = max(1, int(options.seconds / seconds_of(source.model, ids, 10)))
        times = [[seconds_of(model, ids, repeats) for model in (source.model, scripted)]
                 for _ in range(options.rounds)]
        eager, script = (statistics.median(column) for column in zip(*times, strict=True))
        low, gain, high = statistics.quantiles([a / b for a, b in times], n=4)
        print(f"{f'{batch} x {ids.size(1)}':14}{eager * 1e3:10.2f}{script * 1e3:16.2f}{gain:8.3f}{low:8.3f}-{high:.3f}")


if __name__ == "__main__":
    main()
