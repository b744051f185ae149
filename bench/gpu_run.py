"""A short real run of train.py on the GPU: killed and resumed, evaluated, and compiled.

    python3 bench/gpu_run.py --out=run.json                 # about a minute

Four runs of a toy model on random tokens: one to its end; one that is killed by SIGKILL between two
checkpoints and resumed by the same command; and two with --compile=true. The first two, and the
last two, must have the same losses, weights and moments, bit for bit. Exit code 3 if they do not.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import common
from common import ROOT, Record
from corpora.formats import write_shard

# What train.py is asked to do. Head size 64, several micro-steps, two checkpoints before the end.
KNOBS = dict(train_data={'random': 1.0}, val_data=['random'], hidden_size=256, num_hidden_layers=4,
             num_attention_heads=4, block_size=256, batch_size=16, micro_batch_size=8,
             max_steps=300, warmup=10, save_every=100, eval_every=100, eval_windows=16, log_every=1,
             device='cuda')
TOY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, block_size=32, batch_size=4,
           micro_batch_size=2, max_steps=90, save_every=30, eval_every=30, device='cpu')
VOCABULARY = 500


def main():
    args = common.option_parser(__doc__).parse_args()
    record = Record(args, common.device_of(args))
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), record, args.rehearse)
        runs.start_all()
        record.item('killed and resumed', runs.compare, 'whole', 'cut')
        # a rehearsal compiles nothing, so that its run is the same as the first
        again = 'whole' if args.rehearse else 'compiled_again'
        record.item('compiled twice', runs.compare, 'compiled', again)
        record.item('evaluation', runs.evaluation)
        record.item('compiled and not', runs.difference, 'whole', 'compiled')
    return record.finish()


class Runs:
    """Runs of train.py in `folder`, a run folder each, by name."""

    def __init__(self, folder, record, rehearse):
        self.folder, self.record, self.rehearse = folder, record, rehearse
        self.knobs = {**KNOBS, **(TOY if rehearse else {}), 'data_dir': str(folder / 'data')}
        draw = np.random.default_rng(0)
        (folder / 'data' / 'random').mkdir(parents=True)
        for split, tokens in (('train', 500_000), ('val', 20_000)):
            # some tokens are more frequent than others, so that there is something to learn
            ids = np.minimum(draw.geometric(0.02, tokens), VOCABULARY) - 1
            write_shard(folder / 'data' / 'random' / f'{split}_00000.bin', ids,
                        vocab_size=VOCABULARY)

    def start_all(self):
        """All four; several at a time, since most of each is starting and compiling."""
        jobs = {'whole': (self.train, 'whole'), 'cut': (self.train_killed_and_resumed, 'cut'),
                'compiled': (self.train, 'compiled', '--compile=true')}
        if not self.rehearse:
            jobs['compiled_again'] = self.train, 'compiled_again', '--compile=true'
        with ThreadPoolExecutor(2 if self.rehearse else 4) as pool:
            futures = {name: pool.submit(*job) for name, job in jobs.items()}
            for name, future in futures.items():
                self.record.item(f'run {name}', future.result)

    def popen(self, name, *options):
        knobs = [f'--{key}={value}' for key, value in self.knobs.items()]
        environment = dict(os.environ)
        if self.rehearse:
            # Inductor would take longer than all the rest
            environment.update(TORCH_COMPILE_DISABLE='1', OMP_NUM_THREADS='1')
        command = [sys.executable, str(ROOT / 'train.py'), *knobs, *options,
                   f'--out_dir={self.folder / name}']
        with open(self.folder / f'{name}.log', 'a') as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment,
                                    cwd=self.folder)

    def train(self, name, *options):
        """To the end -> {seconds: ...}"""
        began = time.monotonic()
        process = self.popen(name, *options)
        try:
            process.wait(timeout=max(1, self.record.time_left()))
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() != 0:
            self.give_up(name, f'train.py ended with exit code {process.wait()}')
        return {'seconds': round(time.monotonic() - began, 1)}

    def train_killed_and_resumed(self, name):
        """SIGKILL half-way between the first two checkpoints; then the same command again."""
        process, target = self.popen(name), self.knobs['save_every'] * 3 // 2
        while (process.poll() is None and self.last_step(name) < target
               and self.record.time_left() > 0):
            time.sleep(0.002)
        process.kill()
        code, step = process.wait(), self.last_step(name)
        if code != -signal.SIGKILL or not target <= step < self.knobs['max_steps']:
            self.give_up(name, f'not killed in its middle: exit code {code}, step {step}')
        return {'killed_at_step': step, **self.train(name)}

    def give_up(self, name, reason):
        print((self.folder / f'{name}.log').read_text()[-1500:], flush=True)
        raise RuntimeError(reason)

    # --- what a run leaves: metrics.jsonl and ckpt_<step>.pt --------------------------------------

    def rows(self, name, event):
        """{step: row} of metrics.jsonl."""
        path, found = self.folder / name / 'metrics.jsonl', {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith('\n'):                     # else it is being written
                row = json.loads(line)
                if row['event'] == event:
                    found[row['step']] = row
        return found

    def last_step(self, name):
        return max(self.rows(name, 'train'), default=0)

    def results(self, name):
        """{place: value} of everything that must not differ between two runs."""
        path = self.folder / name / f'ckpt_{self.knobs["max_steps"]:08d}.pt'
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        found = {part: checkpoint[part] for part in ('model', 'optimizer')}
        for step, row in self.rows(name, 'train').items():
            found[f'step {step}'] = row['loss'], row['grad_norm']
        for step, row in self.rows(name, 'eval').items():
            found[f'evaluation at step {step}'] = row['val']
        return leaves(found)

    # --- what has to hold -------------------------------------------------------------------------

    def compare(self, a, b):
        """Two runs that must not differ in a bit."""
        differ = differences(self.results(a), self.results(b))
        if differ:
            places = ', '.join(differ[:8])
            self.record.say_wrong(f'{a} and {b} differ in {len(differ)} places: {places}')
        return {'same_bits': not differ, 'differ': differ[:50], 'steps': self.last_step(a)}

    def evaluation(self):
        """{step: loss on the validation set}, which has to fall."""
        rows = self.rows('whole', 'eval')
        found = {step: row['val']['random']['loss'] for step, row in rows.items()}
        if not found[max(found)] < found[0]:
            self.record.say_wrong(f'the validation loss does not fall: {found}')
        return found

    def difference(self, a, b):
        """Largest difference between two runs' losses. Compiled code may round elsewhere."""
        one, other = self.rows(a, 'train'), self.rows(b, 'train')
        return {'loss': max(abs(one[step]['loss'] - other[step]['loss']) for step in one)}


def leaves(value, place=''):
    """{place: value} of what dictionaries, lists and tuples contain, however deep."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {place: value}
    found = {}
    for key, item in value.items():
        found |= leaves(item, f'{place}.{key}' if place else str(key))
    return found


def differences(one, other):
    """Places at which two {place: value} are not equal, tensors bit for bit."""
    found = []
    for place in sorted(one.keys() | other.keys()):
        a, b = one.get(place), other.get(place)
        if torch.is_tensor(a) and torch.is_tensor(b):
            same = a.dtype == b.dtype and torch.equal(a, b)
        else:
            same = type(a) is type(b) and a == b
        if not same:
            found.append(place)
    return found


if __name__ == '__main__':
    sys.exit(main())
