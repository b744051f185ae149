"""Memory and speed of sharded training (parallel = 'fsdp') beside DDP: two processes on the CPU.

    python bench/sharded.py --out=results/speed/sharded.json            # 10 GB, some minutes

Memory: the most that each process holds in two steps (VmHWM), above what it holds before its
model is built, beside what bench/plan.py predicts. Saving is not in it. malloc is told to return
what is freed; train.py itself lets it keep that, which is faster, and is measured once too.
Speed: the two take turns in the same two processes, one thread each; the figure is the median of
the ratios of neighbours.
"""
import ctypes
import gc
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import common
from common import Record
from corpora.formats import write_shard

# A width that makes 200M parameters of layers; and Pythia-160M, half of which is embeddings.
SHAPES = {'200m': dict(hidden_size=1024, num_hidden_layers=16, num_attention_heads=16),
          'pythia-160m': dict(pythia='160m', vocab_size=50304)}
SPEED = dict(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, block_size=256,
             micro_batch_size=4, max_steps=5)
TOY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
KNOBS = dict(train_data={'random': 1.0}, val_data=[], vocab_size=512, block_size=128, batch_size=8,
             micro_batch_size=2, max_steps=2, warmup=1, device='cpu', dtype='fp32', log_every=1)


def main():
    parser = common.option_parser(__doc__)
    parser.add_argument('--rounds', type=int, default=7, help='of the comparison of speed')
    args = parser.parse_args()
    record = Record(args, 'cpu')
    shapes = {'toy': TOY} if args.rehearse else SHAPES
    first, *others = shapes
    record.item(f'memory {first}', compare_memory, shapes[first])
    record.item('speed', compare_speed, TOY if args.rehearse else SPEED, args.rounds)
    for name in others:
        record.item(f'memory {name}', compare_memory, shapes[name])
    if not args.rehearse:
        record.item(f'memory {first}, malloc keeps what is freed', memory, shapes[first], 'fsdp',
                    'kept')
    return record.finish()


def compare_memory(shape):
    """GB by mode and process, predicted and measured, and the ratio of fsdp to ddp."""
    found = {mode: memory(shape, mode) for mode in ('ddp', 'fsdp')}
    found['fsdp_to_ddp'] = max(found['fsdp']['measured']) / max(found['ddp']['measured'])
    print(json.dumps(found, indent=1), flush=True)
    return found


def memory(shape, mode, freed='returned', **changes):
    """{predicted: GB, measured: [GB of rank 0, of rank 1]} of two steps of training."""
    from plan import make
    knobs = {**KNOBS, **shape, **changes, 'parallel': mode}
    plan = make([*options(knobs), '--world_size=2'])
    measured = [json.loads(line) for line in two_processes('memory', knobs, freed)]
    return {'predicted': plan.gpu_bytes() / 1e9, 'when': plan.peak()[0], 'measured': measured,
            'parameters': plan.parameters,
            'measured_to_predicted': [gb * 1e9 / plan.gpu_bytes() for gb in measured]}


def compare_speed(shape, rounds):
    """Tokens per second of both, and the median of fsdp / ddp over the rounds."""
    output, _ = two_processes('speed', {**KNOBS, 'max_steps': 5, **shape}, str(rounds))
    speed = json.loads(output)
    ratios = [fsdp / ddp for ddp, fsdp in zip(speed['ddp'], speed['fsdp'])]
    found = {'tokens_per_s': speed, 'ratios': ratios, 'fsdp_to_ddp': statistics.median(ratios)}
    print(json.dumps(found, indent=1), flush=True)
    return found


def options(knobs):
    return [f'--{key}={value}' for key, value in knobs.items()]


def two_processes(what, knobs, *more):
    """Run this script as rank 0 and 1 of a run -> the last line that each prints."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'random').mkdir()
        ids = np.random.default_rng(0).integers(0, 500, 200_000)
        write_shard(Path(folder, 'random', 'train_00000.bin'), ids, vocab_size=500)
        command = [sys.executable, __file__, what, folder, *more,
                   *options({**knobs, 'data_dir': folder, 'out_dir': f'{folder}/run'})]
        # malloc takes all but the smallest tensors from the system, and gives them back, unless
        # train.py says otherwise
        shared = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1',
                  'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': '2',
                  'LOCAL_WORLD_SIZE': '2'}
        ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                  env={**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)})
                 for rank in (0, 1)]
        printed = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError('\n'.join(printed)[-2000:])
    return [text.strip().splitlines()[-1] for text in printed]


# ------------------------------------------------------------------------------
# In one of the two processes

NUMBERS = itertools.count()


def run(train, words):
    """Train, in a folder of its own: the words end with that of all."""
    import configurator
    folder = [word for word in words if word.startswith('--out_dir')][0]
    words = [*words, f'{folder}_{next(NUMBERS)}']
    cfg, origin = configurator.load(train.Config, words)
    train.run(train.Stage(cfg, origin, train.Method), wait=False)
    return cfg


def work_of_memory(train, words):
    """Train a tiny model first, which loads all code. Then measure, and leave before saving."""
    from support import parallel
    run(train, [*words, *options({**TOY, 'pythia': ''})])
    real_build, base = train.build_model, []

    def build(*args):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')               # the peak starts again
        base.append(status('VmRSS'))
        return real_build(*args)

    def gathered(state):                                            # the first act of saving
        print(f'\n{(status("VmHWM") - base[0]) / 1e9}', flush=True)
        os._exit(0)

    train.build_model, parallel.gathered = build, gathered
    # nothing to save before the last step
    run(train, words)


def status(key):
    """Bytes that /proc has under that key."""
    lines = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def work_of_speed(train, words, rounds):
    """The same steps by one and the other, in turns."""
    import eval
    from support import checkpoints, processes
    found = {'ddp': [], 'fsdp': []}
    eval.report, checkpoints.save = lambda folder: None, lambda cfg, state: None
    for _ in range(rounds):
        for mode, speeds in found.items():
            cfg = run(train, [*words, f'--parallel={mode}'])
            if processes.rank() == 0:
                lines = Path(cfg.out_dir, 'metrics.jsonl').read_text().splitlines()
                rows = [json.loads(line) for line in lines]
                steps = [row['tokens_per_s'] for row in rows if row['event'] == 'train']
                speeds.append(statistics.median(steps[1:]))
    print(json.dumps(found), flush=True)


def worker(what, folder, option, *words):
    import train
    from support import processes
    if option == 'returned':
        processes.keep_freed_memory = lambda: None
    processes.join('cpu')
    if what == 'memory':
        work_of_memory(train, list(words))
    else:
        work_of_speed(train, list(words), int(option))
    sys.stdout.flush()
    os._exit(0)


if __name__ == '__main__':
    if sys.argv[1:2] in (['memory'], ['speed']):
        worker(*sys.argv[1:])
    sys.exit(main())
