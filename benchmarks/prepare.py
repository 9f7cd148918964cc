"""How fast is a text file turned into packed tokens, and in how much memory?

    python benchmarks/prepare.py FILE                    three paired rounds on the file as it is
    python benchmarks/prepare.py FILE --gigabytes 2      the file repeated up to two gigabytes, once, tokenizer included

Ours is all of prepare(): checking the content, reading, decoding, cutting, encoding and writing the cache, from a file
on disk. The peers only encode a list of strings that lies in memory. All three have the same vocabulary, trained on
the file, and all cores. Of each peer the better of two lengths of strings counts.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import prepare  # noqa: E402
from readers import ReadReport, read_records  # noqa: E402
from tokenizer import PATTERN, Tokenizer, byte_of_character  # noqa: E402

LENGTHS = (2_000, 100_000)  # characters


def tokenizers_twin(tokenizer: Tokenizer):
    """The same vocabulary as a model of the tokenizers library; merges come from replaying the ranks."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Twin

    spelling = {byte: character for character, byte in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    merges = []
    for token, rank in tokenizer.ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            ranks = [tokenizer.ranks.get(a + b, rank) for a, b in zip(parts[:-1], parts[1:], strict=True)]
            i = ranks.index(min(ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spelled(parts[0]), spelled(parts[1])))
    twin = Twin(models.BPE(vocab={spelled(token): rank for token, rank in tokenizer.ranks.items()}, merges=merges))
    twin.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return twin


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def speed(path: Path, rounds: int) -> None:
    text = "".join(record.text for record in read_records(path, ReadReport()))
    megabytes = len(text.encode()) / 1e6
    tokenizer = Tokenizer.train([text], 4096)
    twin = tokenizers_twin(tokenizer)
    strings = {n: [text[i:i + n] for i in range(0, len(text), n)] for n in LENGTHS}

    def ours():
        with tempfile.TemporaryDirectory() as cache:
            return seconds(lambda: prepare(path, tokenizer, None, cache))

    cores = os.cpu_count()
    runs = {
        "prepare, whole": ours,
        "tiktoken encode_ordinary_batch": lambda: min(seconds(
            lambda n=n: tokenizer.encoding.encode_ordinary_batch(strings[n], num_threads=cores)) for n in LENGTHS),
        "tokenizers encode_batch": lambda: min(seconds(lambda n=n: twin.encode_batch(strings[n])) for n in LENGTHS),
    }
    taken = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(run())
    print(f"{path.name}, {megabytes:.1f} MB, vocabulary 4096, {cores} cores, medians of {rounds} paired rounds")
    print(f"{'':32}{'MB/s':>8}{'ours to it':>12}")
    first = taken["prepare, whole"]
    for name, times in taken.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times, first, strict=True))
        print(f"{name:32}{megabytes / statistics.median(times):8.1f}{ratio:12.2f}")


def size(path: Path, gigabytes: float) -> None:
    stages: dict[str, float] = {}

    def progress(done: int, total: int, what: str) -> None:
        stages.setdefault(what, time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.txt"
        data = path.read_bytes()
        with open(large, "wb") as file:
            while file.tell() < gigabytes * 1e9:
                file.write(data)
        total = large.stat().st_size / 1e6
        prepared = prepare(large, None, None, Path(folder) / "cache", progress)
        end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    print(f"{path.name} repeated to {total:.0f} MB: {len(prepared.tokens):,} tokens, vocabulary "
          f"{prepared.tokenizer.vocab_size}, peak memory of the process {peak:.0f} MB")
    begins = [*stages.values(), end]
    for name, begin, stop in zip(stages, begins[:-1], begins[1:], strict=True):
        print(f"{name:32}{stop - begin:8.1f} s")
    print(f"{'tokenising, MB/s':32}{total / (end - stages['tokenising']):8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a text file in UTF-8")
    parser.add_argument("--gigabytes", type=float, default=0.0, help="repeat the file up to this size, ours alone")
    parser.add_argument("--rounds", type=int, default=3, help="paired rounds (default 3)")
    args = parser.parse_args()
    if args.gigabytes:
        size(args.file, args.gigabytes)
    else:
        speed(args.file, args.rounds)


if __name__ == "__main__":
    main()
