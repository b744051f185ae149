"""How fast is the loader, and does anything but a list of shards grow with the corpus?

    python bench/loader.py --out=results/speed/loader.json

Tokens per second of Mixture.batch() on one core, with its checks: from a real file of 400 MB in the
page cache, from one source of 300 billion tokens, and from a mixture of 600 billion (SlimPajama's
seven sets and 5% replay of the Pile). Then start-up time and memory of a fresh process, 300 million
to 300 billion tokens.

The big corpora are sparse files: of full size, so that every offset is real, but taking no disk and
read as zeros. Too big for the page cache, they show a first read, without a disk's part.
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from corpora.formats import write_shard                      # noqa: E402
from data import HEADER_BYTES, Mixture, Source, mix_weights  # noqa: E402

VOCAB_SIZE = 50304
SHARD_TOKENS = 100_000_000
BIG = 300_000_000_000
# Iterations over each set in the domain-by-domain run of Ibrahim et al. 2024: shares of
# SlimPajama's tokens.
SLIMPAJAMA = {'arxiv': 5861, 'book': 5563, 'c4': 35326, 'commoncrawl': 68946, 'github': 6914,
              'stackexchange': 4462, 'wikipedia': 5291}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', help='also write the numbers to this JSON file')
    parser.add_argument('--folder', help='where to make the files (400 MB); default: temporary')
    parser.add_argument('--start-up', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start_up:
        print(json.dumps(measure_start_up(json.load(sys.stdin))))
        return
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])     # one core
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sets = make_corpora(Path(folder))
        result = {'tokens_per_s': speeds(sets), 'start_up': start_ups(sets['pile'])}
    # it imports torch, which the processes that are measured do without
    import common
    if args.out:
        Path(args.out).write_text(json.dumps({**common.provenance(), **result}, indent=1) + '\n')


def make_corpora(folder):
    """{name: [paths]}: 'real', 'pile', and the sets of SlimPajama."""
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 200_000_000, np.uint16)
    write_shard(folder / 'real.bin', ids, vocab_size=VOCAB_SIZE)
    total = sum(SLIMPAJAMA.values())
    sets = {name: sparse_corpus(folder, name, BIG * n // total) for name, n in SLIMPAJAMA.items()}
    return sets | {'pile': sparse_corpus(folder, 'pile', BIG), 'real': [str(folder / 'real.bin')]}


def sparse_corpus(folder, name, tokens):
    """Shards of 100M tokens that take no disk: a true header, then a hole. [paths]"""
    count = max(1, tokens // SHARD_TOKENS)
    words = [20240520, 1, min(tokens, SHARD_TOKENS), 2, VOCAB_SIZE]
    header = np.array(words, '<i4').tobytes().ljust(HEADER_BYTES, b'\0')
    paths = [str(folder / f'{name}_{i:05d}.bin') for i in range(count)]
    for path in paths:
        with open(path, 'wb') as file:
            file.write(header)
            file.truncate(HEADER_BYTES + 2 * words[2])
    return paths


def speeds(sets):
    """{mixture, T, B: tokens per second}"""
    mixtures = {'real file, 0.2B': {'real': 1}, 'one source, 300B': {'pile': 1},
                '7 + replay, 600B': mix_weights(SLIMPAJAMA, {'pile': 1}, 0.05)}
    found = {}
    for T, B, label in itertools.product((2048, 256), (16, 64, 1104), mixtures):
        weights = mixtures[label]
        sources = {name: Source(name, sets[name], T) for name in weights}
        speed = tokens_per_second(Mixture(sources, [(0, weights)]), T, B)
        found[f'{label}, T={T}, B={B}'] = round(speed)
        print(f'{label:18} T={T:<5} B={B:<5} {speed / 1e6:8.1f}M tokens/s', flush=True)
    return found


def tokens_per_second(mixture, T, B, seconds=1.5):
    """Median over timed batches of one size, at consecutive steps."""
    times, step = [], 0
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        mixture.batch(range(step * B, (step + 1) * B))
        times.append(time.perf_counter() - start)
        step += 1
    return B * T / statistics.median(times[len(times) // 5:])       # the first fifth warms caches


def start_ups(paths):
    """{tokens: medians of 5 fresh processes}"""
    found = {}
    command = [sys.executable, __file__, '--start-up']
    for tokens in (BIG // 1000, BIG // 100, BIG // 10, BIG):
        shards = json.dumps(paths[:tokens // SHARD_TOKENS])
        runs = [json.loads(subprocess.check_output(command, input=shards, text=True))
                for _ in range(5)]
        row = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        found[f'{tokens:,} tokens'] = row
        print(f'{tokens:>15,} tokens: {row}', flush=True)
    return found


def measure_start_up(paths):
    """Milliseconds to open a corpus, and MB that this and then 50 batches add."""
    warm = Mixture({'warm': Source('warm', paths[:1], 2048)}, [(0, {'warm': 1})])
    warm.batch(range(64))
    before, start = resident_mb(), time.perf_counter()
    mixture = Mixture({'big': Source('big', paths, 2048)}, [(0, {'big': 1})])
    seconds, opened = time.perf_counter() - start, resident_mb()
    for step in range(50):
        mixture.batch(range(step * 64, step * 64 + 64))
    return {'shards': len(paths), 'start_up_ms': 1000 * seconds, 'mb_to_open': opened - before,
            'mb_after_50_batches': resident_mb() - before}


def resident_mb():
    """Memory of this process now (Linux)."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


if __name__ == '__main__':
    main()
