"""What a run writes into its folder beside checkpoints: config.json, metrics.jsonl, mirrors.

Nobody needs this to understand a run. All processes make a Record and call it alike; the first one
writes. A run has an id, made when it begins, which stands in every row and every checkpoint: rows
of another run are never taken for its own.
"""
import importlib
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import configurator
import schedules
from configurator import UserError, require, typed
from support import checkpoints, methods, parallel
from support.files import write_whole
from support.processes import from_all, from_first, is_first, say, utilisation

# What a row says beside the values of a Method, which take other names.
RESERVED = {'event', 'run', 'step', 'tokens', 'loss', 'lr', 'grad_norm', 'tokens_per_s', 'samples',
            'val'}


class Record:
    """metrics.jsonl, one object a line; its mirror; and the progress bar.

    A resumed run drops the rows that it does again. evaluated: {step: losses} of what it keeps.
    """

    def __init__(self, cfg, start, start_step, about):
        self.cfg, self.start_step, self.about = cfg, start_step, about
        self.id = start.stage.get('id') or from_first(secrets.token_hex(6))
        self.parent = start.stage.get('parent', start.parent)
        self.first = start.stage.get('first', {})       # the row of the first evaluation
        self.noted = {}                                 # {name: [value, ...]} since the last row
        if is_first():
            self.noted = {name: list(values) for name, values in
                          start.stage.get('noted', {}).items()}
        self.loaded = start.way == 'init_from'

        path, rows, first_step = Path(cfg.out_dir, 'metrics.jsonl'), [], start_step
        if start.stage:
            first_step = start.progress['step']
            rows = [row for row in read_rows(path) if row['run'] == self.id
                    and row['step'] <= first_step]
        rows = self.with_first_rows(rows)
        self.evaluated = from_first({row['step']: row['val'] for row in rows
                                     if row['event'] == 'eval'})
        self.bar = tqdm(total=cfg.max_steps, initial=first_step, desc=Path(cfg.out_dir).name,
                        unit='step', mininterval=0.5, disable=not is_first() or None,
                        dynamic_ncols=True)
        self.busy, self.logged_step = 0.0, first_step   # seconds of training since that step
        self.file = self.mirror = None
        if is_first():
            write_whole(path, *(f'{json.dumps(row)}\n'.encode() for row in rows))
            self.file = open(path, 'a', buffering=1)    # line by line, so that a kill loses none
            self.mirror = start_mirror(cfg, self.id)

    def with_first_rows(self, rows):
        """The rows, after those of the beginning, which a damaged file may have lost."""
        if not rows or rows[0]['event'] != 'start':
            rows = [self.row('start', self.start_step, parent=self.parent, **self.about), *rows]
        if self.first and not any(row['event'] == 'eval' and row['step'] == self.start_step
                                  for row in rows):
            say(f'{self.cfg.out_dir}/metrics.jsonl had lost the losses at the start of the run; '
                'they are put back from the checkpoint')
            rows.insert(1, self.first)
        return rows

    def row(self, event, step, **values):
        return without_nan({'event': event, 'run': self.id, 'step': step,
                            'tokens': self.tokens(step), **values})

    def tokens(self, steps):
        return steps * self.cfg.batch_size * self.cfg.block_size

    def note(self, values):
        """Add {name: number or tensor} to what the next row says: the mean over all that was noted
        of that name, in all steps since the last row, all micro-steps, and all processes."""
        for name, value in values.items():
            check_name(name)
            if torch.is_tensor(value) and value.numel() == 1:
                value = value.detach()
            else:
                require(isinstance(value, (int, float)), f'the method logs {name} = {value!r:.50}: '
                        'expected one number.')
            self.noted.setdefault(name, []).append(value)

    def noted_by_all(self):
        """{name: [number, ...]}, from all processes. All must call it."""
        own = {name: [float(value) for value in values] for name, values in self.noted.items()}
        together = {}
        for noted in from_all(own):
            for name, values in noted.items():
                together.setdefault(name, []).extend(values)
        return {name: together[name] for name in sorted(together)}

    def log_evaluation(self, step, lr, val, values, vocab_size):
        """Losses before a step. Those that an earlier process has recorded are there already."""
        for name in values:
            check_name(name)
        row = self.row('eval', step, lr=lr, val=val, **values)
        if step == self.start_step:
            self.first = row
        if step in self.evaluated:
            return
        self.write(row)
        say(f'step {step:,}: ' + in_one_line(val))
        if step == self.start_step and self.loaded:
            say(against_chance(val, vocab_size))

    def log_step(self, step, began, loss, values, model, is_due=False):
        """One step more has been done, which began at a time of time.perf_counter().

        loss is averaged over the steps since the last row; values are of this step.
        """
        self.busy += time.perf_counter() - began
        self.bar.update()
        self.noted.setdefault('loss', []).append(loss)
        is_due = is_due or step % self.cfg.log_every == 0
        if is_due or step in (self.start_step + 1, self.cfg.max_steps):
            means = {name: mean(values) for name, values in self.noted_by_all().items()}
            speed = self.tokens(step - self.logged_step) / max(self.busy, 1e-9)
            self.noted, self.busy, self.logged_step = {}, 0.0, step
            loss = means.pop('loss')
            self.write(self.row('train', step, loss=loss, **values, **means,
                                tokens_per_s=round(speed)))
            text = f'loss {loss:.3f} lr {values["lr"]:.2e} {speed:,.0f} tok/s'
            self.bar.set_postfix_str(text + utilisation(model, speed), refresh=False)

    def write(self, row):
        if not is_first():
            return
        self.file.write(json.dumps(row) + '\n')
        if self.mirror:
            flat = {f'{row["event"]}/{key}': x for key, x in row.items() if isinstance(x, float)}
            for name, losses in row.get('val', {}).items():
                flat |= {f'val/{name}/{key}': x for key, x in losses.items() if x is not None}
            self.mirror.log(flat, step=row['step'])

    def stage(self):
        """What a checkpoint says of the run. All processes must call it."""
        self.sync()
        return {'id': self.id, 'method': self.about['method'], 'parent': self.parent,
                'start_step': self.start_step, 'first': self.first, 'noted': self.noted_by_all()}

    def sync(self):
        """What was written so far survives a power cut."""
        if is_first():
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()
        if self.mirror:
            self.mirror.finish()


def check_name(name):
    require(name not in RESERVED, f'the method logs a value named {name!r}, which every row has '
            'already. Give it another name.')


def mean(values):
    """The mean of numbers, to the last bit the same in any order."""
    is_finite = all(math.isfinite(value) for value in values)
    return (math.fsum(values) if is_finite else sum(values)) / len(values)


def start_mirror(cfg, run_id):
    """wandb and trackio have the same functions: init, log, finish. None without the knob."""
    if not cfg.mirror:
        return None
    mirror = find_mirror(cfg.mirror)
    mirror.init(project='rewarm', name=f'{Path(cfg.out_dir).name} {run_id}', config=asdict(cfg),
                resume='allow', **({'id': run_id} if cfg.mirror == 'wandb' else {}))
    return mirror


def find_mirror(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'mirror = {name!r} needs a package: pip install {name}')


def without_nan(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------
# Reading it again

# Files may come from anywhere. These are the types of what is read of them: of knobs and of what
# was derived in config.json, and of the rows in metrics.jsonl.
KNOBS = {'train_data': dict[str, float], 'val_data': list[str], 'switches': list[dict],
         'data_dir': str, 'paths': dict, 'branch_from': str, 'schedule': str, 'max_steps': int,
         'learning_rate': float, 'save_every': int, 'eval_windows': int, 'seed': int, 'label': str}
DERIVED = {'start': str, 'start_step': int, 'tokens_per_step': int, 'roles': dict[str, str],
           'samples_before': dict[str, int], 'shape': dict, 'method': str, 'parent': dict,
           'val_prints': dict[str, str], 'tokenizer': object}
ROWS = {'start': {}, 'train': {'samples': dict[str, int]}, 'eval': {'val': dict[str, dict]}}


def check_types(kinds, values):
    for name, kind in kinds.items():
        require(name in values, f'{name} is missing')
        typed(name, kind, values[name])


def read_config(folder):
    """What config.json of a run folder contains. None where there is no run of this program."""
    try:
        about = json.loads(Path(folder, 'config.json').read_text())
        check_types({'run': str}, about)
        check_types(KNOBS, about['config'])
        check_types(DERIVED, about['derived'])
        return about
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return None


def read_rows(path):
    """The rows of a metrics.jsonl. A line that a kill has cut in two is left out."""
    rows = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            check_types({'run': str, 'step': int, 'tokens': int} | ROWS[row['event']], row)
            for losses in row.get('val', {}).values():
                typed('loss', float, losses['loss'] or 0.0)
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            continue
    return rows


# ------------------------------------------------------------------------------
# What is said, and kept in config.json

def in_one_line(val):
    return '  '.join(f'{name} {row["loss"]:.4f}' for name, row in val.items())


def identity(method, plan):
    """What the first row of a record says of its run, so that runs can be compared."""
    return {'method': methods.name_of(type(method)), 'block_size': method.cfg.block_size,
            'tokenizer': plan.tokenizer, 'val_prints': plan.val_prints}


# What config.json keeps, but nobody needs to see: the table of the data says it better.
UNSAID = ('mixes', 'schedule', 'samples_before', 'val_prints', 'start_step', 'roles', 'tokenizer')


def announce(cfg, given, origin, lr, plan, metrics, facts):
    """Print the run that is about to start, and keep it in config.json."""
    if not is_first():
        return
    path, made_by = Path(cfg.out_dir, 'config.json'), provenance()
    before = read_config(cfg.out_dir)
    facts = {**facts, 'parent': metrics.parent, 'start_step': metrics.start_step,
             **metrics.about, 'tokens_per_step': metrics.tokens(1),
             'total_tokens': metrics.tokens(cfg.max_steps),
             'processes': parallel.in_words(cfg), 'micro_batch_size': plan.micro_batch_size,
             'micro_steps': plan.micro_steps, 'roles': plan.roles, 'mixes': plan.mixes,
             'samples_before': plan.counts(metrics.start_step),
             'schedule': [phase._asdict() for phase in lr.phases]}
    shown = {key: f'{value:,}' if isinstance(value, int) else value for key, value in facts.items()
             if key not in UNSAID and value not in ('', {}, None)}
    say(*(f'{key}: {value}' for key, value in (shown | made_by).items()), '', sep='\n')
    say(configurator.describe(cfg, origin), '', schedules.table(lr), '', sep='\n')
    say(describe_data(cfg, plan), '', sep='\n')
    say(*plan.notes, *notes_of(cfg, lr, facts, before, metrics.id), sep='\n')
    whole = {'run': metrics.id, 'config': given, 'origin': origin, 'derived': facts, **made_by}
    write_whole(path, json.dumps(whole, indent=1).encode())
    if not before or before['run'] != metrics.id:
        copy_tokenizer(cfg.out_dir, plan, metrics.parent.get('path', cfg.out_dir))


def notes_of(cfg, lr, facts, before, run_id):
    """Sentences on what a user may not expect."""
    notes, parent = [], facts['parent']
    if 0 < cfg.warmup < 1 and round(cfg.warmup * cfg.max_steps) == 0:
        notes.append(f'NOTE: warmup = {cfg.warmup:g} of {cfg.max_steps} steps is less than half a '
                     'step, so there is none.')
    if parent.get('step', 0) < parent.get('max_steps', 0) and facts['start'] == 'init_from':
        notes.append(f'NOTE: {parent["path"]} is of step {parent["step"]:,} of '
                     f'{parent["max_steps"]:,}: the rate had not fallen to its end.')
    if parent.get('context', 0) > cfg.block_size:
        notes.append(f'NOTE: the weights were trained on windows of {parent["context"]:,} tokens. '
                     f'From here on, and in an export, the model takes {cfg.block_size:,}.')
    if before and before['run'] == run_id:
        changed = [key for key in ('device', 'dtype', 'kernels', 'processes')
                   if before['derived'].get(key) != facts[key]]
        notes += [f'NOTE: resumed with {key} = {facts[key]}; it was {before["derived"].get(key)}. '
                  'Losses agree to rounding only.' for key in changed]
    return notes


def describe_data(cfg, plan):
    """Requested and achieved shares of every source over the run, its epochs, and its shards."""
    B, total = cfg.batch_size, cfg.max_steps * cfg.batch_size
    lines = ['source            weight (by switch)  from window     samples     share  epochs  '
             'shards']
    for name, samples in plan.mixture.counts(total).items():
        source = plan.sources[name]
        weights = ', '.join(f'{float(Fraction(w.get(name, "0"))):.4g}' for _, w in plan.mixes)
        lines.append(f'{name:<16}  {weights:<18}  {source.skip:>11,}  {samples:>10,}  '
                     f'{samples / total:>8.3%}  {samples / len(source):>6.3f}  '
                     f'{len(source.shards):>6,}')
        if source.skip + samples > len(source) > source.skip:
            again = plan.mixture.reaches(name, len(source) - source.skip, total) // B
            lines.append(f'  {name}: read once by step {again:,}, then again in a new order')
        short = int((source.ends == source.starts).sum())
        if short:
            lines.append(f'  {name}: {short:,} of {len(source.shards):,} shards are shorter than a '
                         'window and left out')
    for first_sample, weights in plan.mixes[1:]:
        shares = ', '.join(f'{name} {float(Fraction(w)):.4g}' for name, w in weights.items())
        lines.append(f'from step {first_sample // B:,}: {shares}')
    lines += [f'{name}: {role}' for name, role in plan.roles.items()]
    return '\n'.join(lines)


def against_chance(val, vocab_size):
    """Compare the first losses with chance, to catch weights or tokenizers that do not match."""
    chance, losses = math.log(vocab_size), [row['loss'] for row in val.values()]
    text = f'chance would be ln {vocab_size} = {chance:.2f} nats per token'
    if losses and min(losses) > chance - 1:
        text += ('\nWARNING: on no validation set are the loaded weights a nat better. Were the '
                 'data prepared with their tokenizer? Is what they know in val_data?')
    return text


def not_finite(cfg, step, loss, grad_norm, lr):
    """What to say of a loss or a gradient that is NaN or infinite."""
    newest = max(checkpoints.find(cfg.out_dir), default='none')
    return (f'step {step:,}: the loss is {loss} and the gradient norm {grad_norm}, at learning '
            f'rate {lr:.3g}. The weights were not updated. The newest checkpoint in {cfg.out_dir} '
            f'is of step {newest}. Lower learning_rate, lengthen warmup, or look at the data.')


def provenance():
    """What is needed to make the run again."""
    root = Path(__file__).resolve().parents[1]

    def git(*words):
        try:
            run = subprocess.run(['git', *words], capture_output=True, text=True, cwd=root)
            return run.stdout.strip()
        except FileNotFoundError:                       # slim containers have no git
            return ''

    commit = git('describe', '--always', '--dirty', '--abbrev=12') or 'none'
    program, words = os.path.relpath(sys.argv[0]), sys.argv[1:]     # python -m gives a whole path
    if root in Path(program).resolve().parents:
        words = [program, *words]                       # a project of this repository
    for word in words:
        file = word.rpartition('=')[2]                  # --init_from=config/x.py names one too
        if file.endswith('.py') and not git('ls-files', os.path.abspath(file)):
            commit += f', {file} is not committed'
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'
    return {'command': ' '.join([program, *sys.argv[1:]]), 'commit': commit, 'gpu': gpu,
            'python': platform.python_version(), 'torch': str(torch.__version__),
            'numpy': np.__version__, 'machine': platform.platform(),
            'threads': torch.get_num_threads()}


def copy_tokenizer(out_dir, plan, start_from):
    """Keep the tokenizer's files in out_dir, for samples and exports.

    They come from beside the data, or from the weights that the run starts from.
    """
    from corpora.tokenizer import tokenizer_files
    folders = [Path(shard.path).parent for source in plan.opened.values()
               for shard in source.shards]
    for folder in dict.fromkeys([*folders, Path(start_from), Path(start_from).parent]):
        files = tokenizer_files(folder)
        for name, path in files.items():
            write_whole(Path(out_dir, name), path.read_bytes())
        if files:
            return
