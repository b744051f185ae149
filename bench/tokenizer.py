"""How fast is text turned into ids, beside the library that the ids are from, and how much memory does it take?

    python bench/tokenizer.py weights/pythia-410m/tokenizer.json --out results/speed/tokenizer.json

First one core, in MB of text per second: our Tokenizer.encode, `tokenizers`' encode and its encode_batch_fast, in turn,
medians of several rounds, on Python source and on English prose that every installation has; the ids are compared.
Then `data.py prepare` as a whole on .jsonl files of that text, by 1 and by 2 workers: MB/s from start to finished
shards, and the most memory that the first process and a worker held, for a file and for one of three times its size.
"""
import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import docs_of, get_tokenizer, python_files
from loader import hardware


def corpus(kind, size):
    """About `size` bytes of documents [str]: Python source, or docstrings, over and over when there is not enough."""
    documents, total = [], 0
    while total < size:
        for file in python_files('python') + (python_files('numpy') if kind == 'prose' else []):
            try:
                source = Path(file).read_text('utf-8')
                new = docs_of(file, source) if kind == 'prose' else [source]
            except (SyntaxError, ValueError):
                continue
            documents += new
            total += sum(len(text.encode()) for text in new)
            if total > size:
                break
    return documents


def one_core(path, rounds):
    """{kind: {who: MB/s}}, with one thread each."""
    import tokenizers
    ours, theirs, result = get_tokenizer(path), tokenizers.Tokenizer.from_file(path), {}
    theirs.encode_special_tokens = True
    for kind in ('Python source', 'prose'):
        documents = corpus(kind, 4_000_000)
        size, times = sum(len(text.encode()) for text in documents) / 1e6, {}
        for _ in range(rounds):
            for who, encode in (('ours', lambda: [ours.encode(text) for text in documents]),
                                ('tokenizers encode', lambda: [theirs.encode(text).ids for text in documents]),
                                ('tokenizers encode_batch_fast',
                                 lambda: [found.ids for found in theirs.encode_batch_fast(documents)])):
                start = time.perf_counter()
                ids = encode()
                times.setdefault(who, []).append(time.perf_counter() - start)
                if who == 'ours':
                    expected = ids
                assert all(list(a) == list(b) for a, b in zip(ids, expected, strict=True)), f'{who} differs'
        result[kind] = {who: round(size / statistics.median(t), 2) for who, t in times.items()}
        print(kind, result[kind], f'{size:.1f} MB, equal ids')
    return result


def prepare(path, file, workers, folder):
    """MB/s of a whole run, and the most MB that the first process and any worker held (Linux)."""
    code = f'''
import json, resource, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data
if __name__ == '__main__':
    start = time.perf_counter()
    data.prepare_files('x', [{str(file)!r}], {str(folder)!r}, tokenizer={path!r}, workers={workers})
    seconds = time.perf_counter() - start
    # Not getrusage for this process: its figure starts with that of the process that started it.
    own = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
    peaks = [own / 2 ** 10, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 10]
    print(json.dumps([json.load(open({str(folder / "x" / "summary.json")!r}))['splits'], seconds, peaks]))
'''
    script = folder / 'run.py'
    folder.mkdir()
    script.write_text(code)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    splits, seconds, peaks = json.loads(run.stdout.splitlines()[-1])
    return sum(n['bytes'] for n in splits.values()) / 1e6 / seconds, peaks


def whole(path, rounds, sizes, parent):
    """{(size, workers): {what: median}} of prepare."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        folder, found = Path(folder), {}
        for size in sizes:
            documents = corpus('Python source', size // 2) + corpus('prose', size // 2)
            (folder / f'{size}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
        for i in range(rounds):
            for size in sizes:
                for workers in (1, 2):
                    row = prepare(path, folder / f'{size}.jsonl', workers, folder / f'{size}_{workers}_{i}')
                    found.setdefault(f'{size / 1e6:g} MB, {workers} workers', []).append(row)
    result = {}
    for key, rows in found.items():
        speeds, peaks = zip(*rows)
        first, worker = map(max, zip(*peaks))
        result[key] = {'mb_per_s': round(statistics.median(speeds), 2), 'peak_mb_first': round(first),
                       'peak_mb_worker': round(worker)}
        print(key, result[key])
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tokenizer', help='a tokenizer.json')
    parser.add_argument('--out', help='also write the numbers to this JSON file')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--folder', help='where to make the files (1 GB); default: the temporary folder')
    args = parser.parse_args()
    os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='true')     # the batch on one core too
    result = {**hardware(), **{name: importlib.metadata.version(name) for name in ('tiktoken', 'tokenizers')},
              'load_before': round(os.getloadavg()[0], 2), 'mb_per_s_one_core': one_core(args.tokenizer, args.rounds),
              'prepare': whole(args.tokenizer, args.rounds, (60_000_000, 180_000_000), args.folder)}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
