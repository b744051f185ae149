"""What a model knows, what it has forgotten, and pictures of both.

    python eval.py loss   RUN                       # loss on the validation sets of a run
    python eval.py table  RUN RUN ... [--out x.md]  # final losses, forgetting, adaptation
    python eval.py plot   RUN RUN ... [--out x.png] # forgetting curves, learning rate below
                          [--labels 'no replay' ...]
    python eval.py sample RUN --prompt 'def '       # text from the model
    python eval.py export RUN DIR                   # a directory for transformers and lm-eval

RUN is a run folder. loss, sample and export use its newest checkpoint, and also take a checkpoint
or a Hugging Face directory. Runs named x_seed1, x_seed2, ... are one row of a table (mean and
standard deviation) and one line of a plot. Folders without a run are skipped, so out/* works.

A validation set is a fixed list of windows. With L(t) its loss during a stage that starts at t = 0:

    forgetting of an old set    L(end) - L(0)                positive is worse
    its peak                    max over t of L(t) - L(0)    the bump that re-warming causes
    adaptation to a new set     L(0) - L(end)                positive is better

Shapes: B windows, T tokens of a window.
"""
import argparse
import contextlib
import errno
import io
import json
import math
import pickle
import re
import sys
import textwrap
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import schedules
from configurator import UserError, require, typed
from model import DTYPES, GPTNeoX, GPTNeoXConfig, load_hf, load_weights, save_hf


# ------------------------------------------------------------------------------
# Loss

def add_up(values):
    """Sums of a list of numbers over all processes, in float64."""
    if not dist.is_initialized():
        return values
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(model, val_sets, batch, autocast, rank=0, world=1):
    """Losses on {name: (Source, windows)} -> {name: {loss, se, ppl, bpb}}, the same on every rank.

    loss and its standard error se are in nats per token, ppl = exp(loss), and bpb in bits per byte
    of text, or None where the shards do not say how many bytes they are.
    """
    device, results = model.cos.device, {}
    for name, (source, windows) in val_sets.items():
        # Ranks share the windows. All make the same number of forward passes, since sharded models
        # exchange weights in each: a rank that has one window less repeats one without counting it.
        mine = windows[rank::world]
        counted = len(mine)
        if counted < math.ceil(len(windows) / world):
            mine = mine + [windows[0]]

        losses = []
        for start in range(0, len(mine), batch):
            tokens = source.read(mine[start:start + batch])                     # (B, T + 1)
            tokens = torch.from_numpy(tokens).to(device)
            with autocast:
                _, loss = model(tokens[:, :-1], tokens[:, 1:], reduction='none')    # (B, T)
            losses.append(loss.cpu().double().mean(dim=1))                      # (B,)
        losses = torch.cat(losses)[:counted]

        n, total, squares = add_up([counted, losses.sum().item(), (losses**2).sum().item()])
        loss = total / n
        variance = max(squares / n - loss**2, 0)
        se = math.sqrt(variance / (n - 1)) if n > 1 else None
        bpb = loss / math.log(2) / source.bytes_per_token if source.bytes_per_token else None
        results[name] = {'loss': loss, 'se': se, 'ppl': math.exp(min(loss, 700)), 'bpb': bpb}
    return results


def in_one_line(results):
    return '  '.join(f'{name} {row["loss"]:.4f}' for name, row in results.items())


# ------------------------------------------------------------------------------
# Runs: what config.json and metrics.jsonl of a run folder say

class Run:
    """A run folder.

    config: {knob: value}; sets: its validation sets; old: those that an earlier stage was trained
    on and this one is not, apart from replay; new: those that it is trained on.
    """

    def __init__(self, folder):
        self.name = Path(folder).name
        about = read_config(folder)
        require(about, f'{folder} is not a run folder')
        rows = read_rows(Path(folder, 'metrics.jsonl'))
        self.evals = [row for row in rows if row['event'] == 'eval']
        self.trains = [row for row in rows if row['event'] == 'train']
        require(self.evals, f'{folder} has not been evaluated yet')
        self.config, self.derived = about.pop('config'), about.pop('derived')
        shape = self.derived['model']                   # which a stage inherits
        self.config |= {knob: value for knob, value in shape.items() if knob in self.config}
        self.made_by = {key: value for key, value in about.items() if key != 'origin'}
        self.trained_on = self.derived['trained_on']        # the sources of earlier stages

        taught = list(self.config['train_data'])
        for switch in self.config['switches']:
            taught += switch.get('train_data', [])
        self.sets = list(self.evals[0]['val'])
        self.new = self.sets_of(taught)
        self.old = [name for name in self.sets_of(self.trained_on) if name not in self.new]

    def sets_of(self, sources):
        """The validation sets that these sources teach: docs teaches docs, and so does a part of
        it such as docs_1of3."""
        return [name for name in self.sets
                if any(source == name or source.startswith(f'{name}_') for source in sources)]

    def losses(self, name):
        """The loss on a set at every evaluation. NaN where it was not finite."""
        losses = [row['val'][name]['loss'] for row in self.evals]
        return [math.nan if loss is None else loss for loss in losses]

    def final(self, name):
        """L(end), or None where the run was not evaluated on the set; likewise below."""
        return self.losses(name)[-1] if name in self.sets else None

    def average(self):
        """The mean of L(end) over all validation sets."""
        return mean([self.final(name) for name in self.sets])

    def forgetting(self, name):
        """L(end) - L(0) on an old set: positive means that the model got worse."""
        if name not in self.old:
            return None
        losses = self.losses(name)
        return losses[-1] - losses[0]

    def forgetting_peak(self, name):
        """max over t of L(t) - L(0): the bump that re-warming causes."""
        if name not in self.old:
            return None
        losses = self.losses(name)
        return float(np.max(losses)) - losses[0]

    def adaptation(self, name):
        """L(0) - L(end) on a new set: positive means that the model learned."""
        if name not in self.new or not self.trained_on:
            return None
        losses = self.losses(name)
        return losses[0] - losses[-1]

    def share(self, name):
        """The share of the samples so far that came from the sources of a set."""
        samples = self.trains[-1]['samples'] if self.trains else {}
        own = sum(n for source, n in samples.items() if name in self.sets_of([source]))
        return own / max(sum(samples.values()), 1)

    def logged(self):
        """What a project logs beside the rest: {name: (tokens, values)}."""
        found = {}
        for row in sorted(self.trains + self.evals, key=lambda row: row['step']):
            for name in row.keys() - LOGGED_BY_ALL:
                if isinstance(row[name], (int, float)):
                    found.setdefault(name, []).append((row['tokens'], row[name]))
        return {name: np.array(points, float).T for name, points in found.items()}

    def role(self, name):
        """What a validation set is to this run, for titles: one of ROLES."""
        if name in self.old:
            return 'old data'
        if name not in self.new:
            return 'never trained on'
        if not self.trained_on:
            return 'training data'
        if name not in self.sets_of(self.trained_on):
            return 'new data'
        return 'training data' if self.config['branch_from'] else 'the same data again'


LOGGED_BY_ALL = {'event', 'step', 'tokens', 'loss', 'lr', 'grad_norm', 'tokens_per_s', 'samples',
                 'val'}
# in the order in which pictures show them
ROLES = ('old data', 'the same data again', 'new data', 'training data', 'never trained on')


# Files may come from anywhere. These are the types of what is read here: of knobs in config.json
# and in checkpoints, and of the rows in metrics.jsonl.
KNOBS = {'train_data': dict[str, float], 'val_data': list[str], 'switches': list[dict],
         'data_dir': str, 'paths': dict, 'branch_from': str, 'schedule': str, 'max_steps': int,
         'learning_rate': float, 'save_every': int, 'eval_windows': int, 'seed': int}
ROWS = {'train': {'step': int, 'samples': dict[str, int]},
        'eval': {'step': int, 'tokens': int, 'val': dict[str, dict]}}


def check_types(kinds, values):
    for name, kind in kinds.items():
        require(name in values, f'{name} is missing')
        typed(name, kind, values[name])


def read_config(folder):
    """What config.json of a run folder contains. None where there is no run of this program."""
    try:
        about = json.loads(Path(folder, 'config.json').read_text())
        check_types(KNOBS, about['config'])
        check_types({'trained_on': list[str], 'tokens_per_step': int}, about['derived'])
        typed('label', str, about['config'].setdefault('label', ''))    # older runs have neither
        typed('model', dict, about['derived'].setdefault('model', {}))
        return about
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return None


def read_rows(path):
    """The rows of a metrics.jsonl. A line that a kill has cut in two is left out."""
    rows = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            check_types(ROWS[row['event']], row)
            for losses in row.get('val', {}).values():
                typed('loss', float, losses['loss'] or 0.0)
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError, UserError):
            continue
    return rows


def by_seed(folders):
    """Run folders -> {name without _seedN: [Run, ...]}, in their order. Skips what is no run."""
    runs = []
    for folder in folders:
        try:
            run = Run(folder)
        except UserError as error:
            print(f'skipped: {error}', file=sys.stderr)
            continue
        last, wanted = run.evals[-1]['step'], run.derived.get('last_step', run.config['max_steps'])
        if last < wanted:
            print(f'{folder} is not finished: step {last:,} of {wanted:,}', file=sys.stderr)
        runs.append(run)
    require(runs, f'none of these is a run: {" ".join(map(str, folders))}')
    if len(runs) == 1:
        return {runs[0].name: runs}                         # with its seed
    groups = {}
    for run in runs:
        groups.setdefault(re.sub(r'_seed\d+$', '', run.name), []).append(run)
    return groups


def all_sets(runs):
    """The validation sets of all runs, in the order in which they appear."""
    return list(dict.fromkeys(name for run in runs for name in run.sets))


# ------------------------------------------------------------------------------
# Tables

def mean(values):
    """The mean of what is not None, or None."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def spread(values):
    """'1.234' of one value, '1.234 ± 0.005' (standard deviation) of several, a dash of none."""
    values = [value for value in values if value is not None]
    if not values:
        return '–'
    text = f'{np.mean(values):.3f}'
    return f'{text} ± {np.std(values, ddof=1):.3f}' if len(values) > 1 else text


def table(groups):
    """The comparison of {name: [Run of a seed, ...]} as Markdown.

    As Table 2 of Ibrahim et al. 2024: the final loss on each set and the average over them,
    forgetting and its peak for each old set, adaptation as the mean over the new sets.
    """
    runs = [run for seeds in groups.values() for run in seeds]
    sets = all_sets(runs)
    old = [name for name in sets if any(name in run.old for run in runs)]
    header = ['run', 'seeds', *sets, 'average']
    for name in old:
        suffix = f' of {name}' if len(old) > 1 else ''
        header += [f'forgetting{suffix}', f'its peak{suffix}']
    rows = [[*header, 'adaptation']]

    for row_name, seeds in groups.items():
        row = [seeds[0].config['label'] or row_name, str(len(seeds))]
        for name in sets:
            row.append(spread([run.final(name) for run in seeds]))
        row.append(spread([run.average() for run in seeds]))
        for name in old:
            row.append(spread([run.forgetting(name) for run in seeds]))
            row.append(spread([run.forgetting_peak(name) for run in seeds]))
        row.append(spread([mean(map(run.adaptation, run.new)) for run in seeds]))
        rows.append(row)
    return '\n'.join([*markdown(rows), *differences(runs)])


def markdown(rows):
    """The lines of a Markdown table. The first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ['-' * width for width in widths]
    return ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |'
            for row in (rows[0], rule, *rows[1:])]


def differences(runs):
    """Sentences that say where runs were not evaluated alike."""
    sets = {', '.join(sorted(run.sets)): run.name for run in runs}
    windows = {run.config['eval_windows'] or 'all': run.name for run in runs}
    notes = []
    for what, found in (('sets', sets), ('numbers of windows', windows)):
        if len(found) > 1:
            listed = '; '.join(f'{value} ({name})' for value, name in found.items())
            notes.append(f'\nNOTE: evaluated on different {what}: {listed}')
    return notes


def summary(groups):
    """What a table was made of, as plain values: the losses of every run, and what made it."""
    rows = []
    for row_name, seeds in groups.items():
        for run in seeds:
            losses = {}
            for name in run.sets:
                losses[name] = [row['val'][name]['loss'] for row in run.evals]
            rows.append({'run': run.name, 'row': row_name, 'seed': run.config['seed'],
                         'tokens': run.evals[-1]['tokens'], 'start': run.evals[0]['val'],
                         'end': run.evals[-1]['val'], 'steps': [row['step'] for row in run.evals],
                         'losses': losses, **run.made_by})
    return rows


# ------------------------------------------------------------------------------
# Forgetting curves

# The colours of Okabe and Ito with a line style each: they differ in grey and for the colour-blind.
STYLES = [('#0072B2', '-'), ('#D55E00', '--'), ('#009E73', '-.'), ('#CC79A7', ':'),
          ('#E69F00', (0, (5, 1))), ('#56B4E9', (0, (3, 1, 1, 1))), ('#000000', (0, (1, 1))),
          ('#999999', '-')]


def legend(groups, labels=(), width=30):
    """{name: text} of --labels, or of the knob `label`, or else the names of the runs."""
    if not labels:
        labels = [seeds[0].config['label'] or name for name, seeds in groups.items()]
    require(len(labels) == len(groups), f'--labels: there are {len(labels)} labels for '
            f'{len(groups)} rows ({", ".join(groups)})')
    return {name: textwrap.fill(label, width) for name, label in zip(groups, labels)}


def mean_curve(seeds, name):
    """Tokens, mean loss and standard deviation over the seeds, where all were evaluated."""
    curves = [dict(zip([row['tokens'] for row in run.evals], run.losses(name))) for run in seeds]
    tokens = sorted(set.intersection(*map(set, curves)))
    require(tokens, f'the seeds of {seeds[0].name} were never evaluated after the same tokens')
    losses = np.array([[curve[t] for t in tokens] for curve in curves])         # (seeds, points)
    deviation = losses.std(0, ddof=1) if len(seeds) > 1 else np.zeros(len(tokens))
    return np.array(tokens), losses.mean(0), deviation


def rates_of(run):
    """Tokens and learning rates of every step from the first evaluation to the last.

    They come from the schedule: the log has a few of them only.
    """
    config = run.config
    lr = schedules.build(config['schedule'], steps=config['max_steps'],
                         peak=config['learning_rate'], **config)
    steps = np.arange(run.evals[0]['step'], run.evals[-1]['step'] + 1)
    rates = lr.rates[np.minimum(steps, len(lr.rates) - 1)]
    return steps * run.derived['tokens_per_step'], rates


def plot(groups, out, labels=()):
    """Forgetting curves as a PNG: a panel for each set, old sets first, and the rate below.

    What a project logs has a row of panels of its own, below those.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    runs = [seeds[0] for seeds in groups.values()]
    sets = all_sets(runs)
    require(sets, 'there is nothing to draw: val_data was empty')
    sets.sort(key=lambda name: ROLES.index(common_role(runs, name)))

    unit, xlabel = unit_of_tokens(max(run.evals[-1]['tokens'] for run in runs))
    width = min(4.6, max(3.2, 14 / len(sets)))              # inches of a panel
    values_of = {row_name: seeds[0].logged() for row_name, seeds in groups.items()}
    logged = sorted({name for values in values_of.values() for name in values})
    size = width * len(sets) + 1, 4.8 + 1.2 * len(logged)
    fig, axes = plt.subplots(2 + len(logged), len(sets), figsize=size, sharex='col', squeeze=False,
                             height_ratios=[3] + [1] * (1 + len(logged)), layout='constrained')
    texts = legend(groups, labels)
    handles = {}                                            # {row: line} for the legend
    for column, name in enumerate(sets):
        ax, rate_ax, *logged_axes = axes[:, column]
        shown = []                                          # losses that the panel must show
        for row_name, (color, style) in zip(groups, STYLES * len(groups)):
            seeds = [run for run in groups[row_name] if name in run.sets]
            if seeds:
                line, losses = draw_curve(ax, seeds, name, unit, color, style)
                handles.setdefault(row_name, line)
                shown.extend(losses)
                tokens, rates = rates_of(seeds[0])
                rate_ax.plot(tokens / unit, rates, color=color, ls=style, lw=1.5)
                for a, value in zip(logged_axes, logged):
                    tokens, values = values_of[row_name].get(value, ((), ()))
                    a.plot(np.divide(tokens, unit), values, color=color, ls=style, lw=1)
        if shown:
            margin = 0.08 * np.ptp(shown) or 0.1
            ax.set_ylim(min(shown) - margin, max(shown) + margin)
        ax.set_title(panel_title(groups, name), fontsize=10)
        axes[-1, column].set_xlabel(xlabel)
        rate_ax.set_ylim(0, None)
        rate_ax.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
        for a in axes[:, column]:
            plain_axes(a)

    names = ['validation loss (nats per token)', 'learning rate', *logged]
    for a, name in zip(axes[:, 0], names):
        a.set_ylabel(name)
    notes = []
    if any(has_start(run) for run in runs):
        notes.append('Grey dotted line: the loss when this stage of training began.')
    if any(len(seeds) > 1 for seeds in groups.values()):
        notes.append('Shaded: one standard deviation over the seeds.')
    fig.supxlabel('  '.join(notes), fontsize=9, color='0.3')
    if len(groups) > 1:
        fig.legend(handles.values(), [texts[row_name] for row_name in handles], frameon=False,
                   loc='outside right center', fontsize=8.5, labelspacing=0.9)
    save_figure(fig, out)


def unit_of_tokens(most):
    """(tokens in a unit, label of an axis) that keep tick labels short."""
    unit, label = 1, 'training tokens'
    for size, word in ((1e3, 'thousands'), (1e6, 'millions'), (1e9, 'billions')):
        if most >= size:
            unit, label = size, f'training tokens ({word})'
    return unit, label


def draw_curve(ax, seeds, name, unit, color, style):
    """Draw the mean loss of a row on one set -> (line, the losses that must be seen)."""
    run = seeds[0]
    tokens, loss, deviation = mean_curve(seeds, name)
    line, = ax.plot(tokens / unit, loss, color=color, ls=style, lw=1.8)
    low, high = loss - deviation, loss + deviation
    ax.fill_between(tokens / unit, low, high, color=color, alpha=0.2, lw=0)
    if has_start(run):
        ax.axhline(loss[0], color='0.4', ls=':', lw=1, zorder=0)
    # the fall from random weights may leave through the top
    late = tokens >= (0 if run.trained_on else tokens[-1] / 10)
    seen = np.concatenate((low[late], high[late]))
    return line, seen[np.isfinite(seen)]


def has_start(run):
    """Whether a run began a stage: from an old model, and not as a branch on the same data."""
    return bool(run.trained_on) and (bool(run.old) or not run.config['branch_from'])


def common_role(runs, name):
    """What a set is to the runs of a picture: what comes first in ROLES of what it is to each."""
    roles = [run.role(name) for run in runs if name in run.sets]
    return min(roles, key=ROLES.index)


def panel_title(groups, name):
    """The role of a set and its name; for a single run, how its loss has changed too."""
    runs = [seeds[0] for seeds in groups.values()]
    role = common_role(runs, name)
    title = f'{role[0].upper()}{role[1:]}: {name}'
    run = runs[0]
    if len(runs) > 1 or not has_start(run):
        return title
    if name in run.old:
        title += f' ({100 * run.share(name):.2g}% replay)'
    losses = run.losses(name)
    title += f'\n{losses[-1] - losses[0]:+.3f} nats since the start'
    if name in run.old:
        title += f' (peak {run.forgetting_peak(name):+.3f})'
    return title


def plain_axes(ax, grid='both'):
    """A light grid, and no frame at the top and right."""
    ax.grid(axis=grid, alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)


def save_figure(fig, out):
    """Write a PNG whole, never through a link."""
    import matplotlib.pyplot as plt
    require(str(out).endswith('.png'), f'--out {out}: expected a name that ends in .png')
    image = io.BytesIO()
    fig.savefig(image, dpi=130)
    plt.close(fig)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    data.write_whole(out, image.getvalue())


def report(folder):
    """At the end of a run: draw its curve, return its row."""
    run = Run(folder)
    if not run.sets:
        return f'{folder}: there is no val_data, hence no forgetting curve'
    groups, picture = {run.name: [run]}, Path(folder, 'forgetting.png')
    plot(groups, picture)
    return f'\n{table(groups)}\n\n{picture}: its forgetting curve'


# ------------------------------------------------------------------------------
# Checkpoints

class Damaged(UserError):
    """A checkpoint that fails its own checksums."""


# What a checkpoint of train.py contains, with types; train.py's snapshot() has a comment on each.
CONTENTS = {'step': int, 'start_step': int, 'config': dict, 'model': dict, 'weights': dict,
            'method': dict, 'batch': dict[str, int], 'phases': list, 'starts': dict[str, int],
            'data': dict, 'order_keys': dict[str, str], 'positions': dict[str, int],
            'trained_on': list[str], 'kept': list[int]}


def checkpoints(folder):
    """{step: path} of a run folder, rising."""
    found = {}
    for path in sorted(Path(folder).glob('ckpt_*.pt')):
        if re.fullmatch(r'ckpt_\d{8}\.pt', path.name):
            found[int(path.stem[5:])] = path
    return found


def newest_checkpoint(run):
    """The path of a checkpoint, or of the newest one in a run folder."""
    if Path(run).is_file():
        return Path(run)
    found = checkpoints(run)
    require(found, f'{run}: there is no checkpoint (ckpt_*.pt)')
    return found[max(found)]


def read_checkpoint(path, verify=True, mmap=False):
    """A checkpoint as plain values. Damaged when its checksums fail; no code in it is run.

    torch.load alone misses flipped bits; the checksums of the zip that torch.save writes do not.
    verify: read them. mmap: tensors stay in the file until they are used.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if verify else None
            # of a tensor that is marked as a folder, torch.load would read nothing
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 16]
        if broken or folders:
            raise Damaged(f'{path}: {broken or folders[0]} fails its checksum.')
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        raise Damaged(f'{path}: truncated or damaged ({error}).')
    except (OSError, MemoryError) as error:
        # EINVAL: the zip's directory points to before the beginning of the file
        is_damaged = isinstance(error, OSError) and error.errno == errno.EINVAL
        kind = Damaged if is_damaged else UserError
        raise kind(f'{path}: cannot be read ({error!r}). Nothing was changed.')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, AttributeError, KeyError, ValueError, TypeError):
        raise UserError(f'{path}: refused. It holds more than tensors and plain values, or is not '
                        'a checkpoint of train.py.')
    except (OSError, RuntimeError, MemoryError) as error:
        # torch sees damage in the zip's directory that Python overlooks
        is_damaged = 'StreamReader' in str(error) and 'read failed' not in str(error)
        kind = Damaged if is_damaged else UserError
        raise kind(f'{path}: cannot be loaded ({error!r:.200}). Nothing was changed.')
    require(isinstance(state, dict), f'{path}: not a checkpoint of train.py.')
    if isinstance(state.get('weights'), dict):
        state['weights'] = dict(state['weights'])       # older versions saved an OrderedDict
    try:
        check_types(CONTENTS, state)
        check_types(KNOBS, state['config'])
        for first_sample, weights in state['phases']:
            typed('phases', int, first_sample)
            typed('phases', dict[str, str], weights)
        json.dumps([state['config'], state['data']])    # plain values, and no tensors
        require(0 <= state['start_step'] <= state['step'] < 2**31, 'its step is out of range.')
        require(set(state['batch']) == {'seed', 'batch_size'}, 'its batch is unknown.')
        state['model'] = asdict(GPTNeoXConfig(**state['model']))
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f'{path}: not a checkpoint of this version of train.py: {error!s:.300}')
    return state


def load_run(run):
    """(state, GPTNeoX on the CPU) of a run folder, a checkpoint or a Hugging Face directory.

    The state of a Hugging Face directory is {}.
    """
    is_hf = Path(run, 'config.json').is_file() and read_config(run) is None
    if is_hf and not checkpoints(run):
        return {}, load_hf(run)
    state = read_checkpoint(newest_checkpoint(run))
    model = GPTNeoX(GPTNeoXConfig(**state['model']))
    load_weights(model, state['weights'], run)
    return state, model


# ------------------------------------------------------------------------------
# Commands

def loss_command(args):
    """Print the loss on every validation set, in float32."""
    for name in args.runs:
        state, model, val_sets = open_run(name, args)
        print(f'{name}, step {state.get("step", 0):,}')
        batch = max(1, 4096 // model.config.max_position_embeddings)
        for dataset, row in evaluate(model, val_sets, batch, contextlib.nullcontext()).items():
            bpb = f'{row["bpb"]:.4f} bits per byte' if row['bpb'] else 'bytes unknown'
            se = math.nan if row['se'] is None else row['se']
            print(f'  {dataset:<16} {row["loss"]:.4f} ± {se:.4f} nats per token   perplexity '
                  f'{row["ppl"]:.3f}   {bpb}   {len(val_sets[dataset][1])} windows')


def open_run(run, args):
    """(checkpoint, model, {name: (Source, windows)}) of a run, for commands that evaluate one."""
    state, model = load_run(run)
    config = state.get('config', {})
    names = args.sets or config.get('val_data')
    require(names, f'{run}: names no validation sets. Give some: --sets docs code')
    windows = config.get('eval_windows', 0) if args.windows is None else args.windows
    require(windows >= 0, f'--windows {windows}: expected at least 0')
    data_dir = args.data_dir or config.get('data_dir', 'data')
    sources = {}
    for name in names:
        shards = data.find_shards(name, 'val', data_dir, config.get('paths', {}))
        sources[name] = data.Source(name, shards, model.config.max_position_embeddings)
    warning = data.check_compatible(sources, model.config.vocab_size)
    if warning:
        print(warning, file=sys.stderr)
    val_sets = {name: (s, data.val_windows(s, windows)) for name, s in sources.items()}
    return state, model.to(args.device), val_sets


def table_command(args):
    groups = by_seed(args.runs)
    text = table(groups)
    print(text)
    if args.out:
        path = Path(args.out)
        require(path.suffix == '.md' and path.stem != 'config', f'--out {path}: expected x.md. '
                'The details go into x.json beside it.')
        data.write_whole(path, f'{text}\n'.encode())
        details = json.dumps(summary(groups), indent=1) + '\n'
        data.write_whole(path.with_suffix('.json'), details.encode())


def plot_command(args):
    plot(by_seed(args.runs), args.out, args.labels)
    print(args.out)


def sample_command(args):
    state, model = load_run(args.run)
    tokenizer = tokenizer_of(args.run, state, model, args.tokenizer)
    model.to(args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    # a document follows an end-of-text, and so does the prompt
    prompt = [tokenizer.eot, *tokenizer.encode(args.prompt).tolist()]
    ids = torch.tensor([prompt], device=args.device)
    for _ in range(args.samples):
        sample = model.generate(ids, args.tokens, args.temperature, args.top_k, args.top_p,
                                generator)
        known = [i for i in sample[0, 1:].tolist() if i < tokenizer.vocab_size]     # no padding
        print(tokenizer.decode(known), '\n' + '-' * 80)


def tokenizer_of(run, state, model, spec=''):
    """The tokenizer that `spec` names, else the one whose files are in the run folder."""
    from corpora.tokenizer import find_tokenizer, load_tokenizer
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    tokenizer = load_tokenizer(spec) if spec else find_tokenizer(state.get('tokenizer'), folder)
    rows = model.config.vocab_size
    require(tokenizer.vocab_size <= rows, f'{run}: the model has {rows:,} ids, but the tokenizer '
            f'{tokenizer.name} has {tokenizer.vocab_size:,}. Name another: --tokenizer FOLDER')
    return tokenizer


def export_command(args):
    """Write a Hugging Face directory, with the tokenizer's files if there are any."""
    from corpora.tokenizer import hugging_face_files
    state, model = load_run(args.run)
    eot, files = 0, {}
    try:
        tokenizer = tokenizer_of(args.run, state, model, args.tokenizer)
        eot, files = tokenizer.eot, hugging_face_files(tokenizer)
    except UserError as error:
        require(not args.tokenizer, str(error))
        print(f'{args.dir} gets no tokenizer: {error}')
    model.to(DTYPES[args.dtype])
    require(all(p.isfinite().all() for p in model.parameters()), f'--dtype {args.dtype}: some '
            'weights are too large for it. Use bf16 or fp32.')
    save_hf(model, args.dir, eot, files)
    names = sorted(path.name for path in Path(args.dir).iterdir())
    print(f'{args.dir}: {model.num_params():,} parameters in {args.dtype}; {", ".join(names)}')


def main(argv):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')        # a terminal without Unicode is no error
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    found = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    devices = [name for name in found if found[name]] + ['cpu']
    device = 'cuda' if found['cuda'] else 'cpu'

    def evaluation(name, command, what):
        """A command that opens runs and their validation sets: see open_run."""
        p = commands.add_parser(name, help=what)
        p.set_defaults(command=command)
        p.add_argument('runs', nargs='+')
        p.add_argument('--sets', nargs='+', help='sources to evaluate on (default: as in the run)')
        p.add_argument('--windows', type=int, help='of each; 0: all (default: as in the run)')
        p.add_argument('--data_dir')
        p.add_argument('--device', default=device, choices=devices)

    evaluation('loss', loss_command, 'loss on validation sets')

    p = commands.add_parser('table', help='comparison as Markdown')
    p.set_defaults(command=table_command)
    p.add_argument('runs', nargs='+')
    p.add_argument('--out', help='x.md; x.json gets the details')

    p = commands.add_parser('plot', help='forgetting curves')
    p.set_defaults(command=plot_command)
    p.add_argument('runs', nargs='+')
    p.add_argument('--out', default='out/forgetting.png')
    p.add_argument('--labels', nargs='+', default=(), help='names of the rows, in their order')

    p = commands.add_parser('sample', help='generate text')
    p.set_defaults(command=sample_command)
    p.add_argument('run')
    p.add_argument('--prompt', default='')
    p.add_argument('--tokens', type=int, default=300)
    p.add_argument('--samples', type=int, default=1)
    p.add_argument('--temperature', type=float, default=0.8)
    p.add_argument('--top_k', type=int)
    p.add_argument('--top_p', type=float)
    p.add_argument('--seed', type=int, default=1337)
    p.add_argument('--tokenizer', help='bytes, gpt2, a tokenizer.json, or a folder with one')
    p.add_argument('--device', default=device, choices=devices)

    p = commands.add_parser('export', help='write a Hugging Face directory')
    p.set_defaults(command=export_command)
    p.add_argument('run')
    p.add_argument('dir')
    p.add_argument('--tokenizer', help='bytes, gpt2, a tokenizer.json, or a folder with one')
    p.add_argument('--dtype', choices=DTYPES, default='fp32')

    args = parser.parse_args(argv)
    try:
        args.command(args)
    except (UserError, OSError) as error:
        print(f'eval.py: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
