"""What a model knows, what it has forgotten, and the pictures of both.

    python eval.py loss   RUN                       # loss on each validation set of a run's newest checkpoint
    python eval.py table  RUN RUN ... [--out x.md]  # final losses, forgetting, adaptation; x.json with what made them
        [--claims x.txt]                            # and what a paper says, put to the test on these runs
    python eval.py plot   RUN RUN ... [--out x.png] # loss on old and new data against tokens, learning rate below
        [--plane docs code]                         # or the final loss on new data against that on old data
    python eval.py sample RUN --prompt 'def '       # text from it
    python eval.py bench  RUN --tasks hellaswag     # benchmarks, by lm-eval; --tasks papers: those of the papers
    python eval.py export RUN DIR                   # a directory that transformers opens

RUN is a run folder (its newest checkpoint) or a checkpoint; where no training is looked at (loss, sample, bench,
export), also a Hugging Face directory. Runs named x_seed1, x_seed2, ... are one row of a table (mean +- standard
deviation) and one line of a plot.

A validation set is a fixed list of windows. Its loss is in nats per token, its standard error from the spread
between windows. With L(t) the loss of a set during a stage that starts at t = 0:

    forgetting of an old set    L(end) - L(0)                positive is worse
    adaptation to a new set     L(0) - L(end)                positive is better
    peak                        max over t of L(t) - L(0)    the bump of re-warming

Shapes: B windows or requests, T tokens of one, V vocab_size.
"""
import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import pickle
import re
import statistics
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import GPTNeoX, GPTNeoXConfig, ModelError, check_tensors, load_hf, sample_token, save_hf


class EvalError(ValueError):
    """A run or checkpoint that cannot be evaluated; the message says why."""


# -----------------------------------------------------------------------------
# What a run leaves behind

def checkpoints(out_dir):
    """{step: path} of a run folder, rising."""
    return {int(path.stem[5:]): path for path in sorted(Path(out_dir).glob('ckpt_????????.pt'))}


def read_checkpoint(path):
    """A checkpoint as plain values. EvalError when it is not whole, or no checkpoint of ours.

    torch.load alone misses flipped bits; the checksums of the zip that torch.save writes do not. weights_only: a
    file that would run code is refused.
    """
    hint = 'It is cut short or damaged, or no checkpoint of this program.'
    try:
        archive = zipfile.ZipFile(path)
        folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 16]
        if broken := archive.testzip() or ''.join(folders[:1]):     # of a "folder" torch.load reads nothing, silently
            raise EvalError(f'{path}: {broken} fails its checksum. {hint}')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:           # each of them met when bits of a file were flipped
        raise EvalError(f'{path}: cannot be loaded ({(str(error).splitlines() or [type(error).__name__])[0]}). {hint}')
    if not isinstance(state, dict) or not {'weights', 'model', 'config', 'step'} <= set(state):
        raise EvalError(f'{path}: holds no run. {hint}')
    return state


def newest_checkpoint(run):
    """The path of a checkpoint, or of the newest one in a run folder."""
    if Path(run).is_file():
        return Path(run)
    if not (found := checkpoints(run)):
        raise EvalError(f'{run}: no checkpoint there; expected a run folder with ckpt_*.pt, or a checkpoint')
    return found[max(found)]


def load_run(run):
    """(state, GPTNeoX on the CPU) of a run folder's newest checkpoint, of a checkpoint or a Hugging Face directory.

    The latter's state is that of a run without data.
    """
    if Path(run, 'config.json').is_file() and not (checkpoints(run) or Path(run, 'metrics.jsonl').exists()):
        model = load_hf(run)
        config = {'data_dir': 'data', 'paths': {}, 'val_data': [], 'eval_windows': 0}
        return {'step': 0, 'config': config, 'model': dataclasses.asdict(model.config), 'tokenizer': None}, model
    state = read_checkpoint(newest_checkpoint(run))
    model = GPTNeoX(GPTNeoXConfig(**state['model']))
    check_tensors(state['weights'], model.state_dict(), run)
    model.load_state_dict(state['weights'])
    return state, model


def find_tokenizer(run, state, spec):
    """(Tokenizer, {name: Path} of its files): what `spec` (--tokenizer) names, else the run's own, from its folder."""
    folder = Path(run).resolve()                        # absolute: no folder is mistaken for 'gpt2'
    name, where = state['tokenizer'], str(spec or (folder if folder.is_dir() else folder.parent))
    try:
        tokenizer, files = data.get_tokenizer(where), data.tokenizer_files(where)
    except data.DataError:
        if spec:
            raise
        tokenizer = None
    if not spec and name and (not tokenizer or tokenizer.name != name):
        tokenizer, files = data.find_tokenizer(name), {}            # bytes and gpt2, which need none
    if not tokenizer:
        raise EvalError(f'{run}: does not say which tokenizer it was trained with; name it: --tokenizer FOLDER')
    if tokenizer.vocab_size > (rows := state['model']['vocab_size']):
        raise EvalError(f'{run}: the model has {rows:,} ids, the tokenizer {tokenizer.name} {tokenizer.vocab_size:,}; '
                        'name the one it was trained with: --tokenizer FOLDER')
    return tokenizer, files


# -----------------------------------------------------------------------------
# Loss

def add_up(values):
    """Sums over all processes of a list of numbers, in float64."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device='cuda' if dist.get_backend() == 'nccl' else 'cpu')
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(model, val_sets, batch, autocast, rank=0, world=1, stopped=lambda: False):
    """Losses on {name: (Source, [window, ...])} -> {name: {loss, se, ppl, bpb}}, the same on every rank.

    loss and its standard error se in nats per token, ppl = exp(loss), bpb in bits per byte of text (None where the
    shards do not say how many bytes they are). Ranks share the windows; `batch` windows at a time. None when
    `stopped` turned true on any rank: an evaluation that is cut short counts for nothing.
    """
    device, results = model.cos.device, {}
    for name, (source, windows) in val_sets.items():
        sums = [0, 0.0, 0.0]                                        # windows, their mean losses, and squares
        mine = windows[rank::world]
        for i in range(0, len(mine), batch):
            if stopped():
                break
            tokens = torch.from_numpy(np.stack([source.window(w) for w in mine[i:i + batch]])).to(device)   # (B, T+1)
            with autocast:
                _, losses = model(tokens[:, :-1], tokens[:, 1:], reduction='none')                          # (B, T)
            losses = losses.cpu().double().mean(dim=1)                                                      # (B,)
            sums = [a + b for a, b in zip(sums, (len(losses), losses.sum().item(), (losses ** 2).sum().item()))]
        n, total, squares, stops = add_up([*sums, float(bool(stopped()))])
        if stops:
            return None
        loss = total / n
        se = math.sqrt(max(squares / n - loss ** 2, 0) / (n - 1)) if n > 1 else None
        bpb = loss / math.log(2) / source.bytes_per_token if source.bytes_per_token else None
        results[name] = {'loss': loss, 'se': se, 'ppl': math.exp(min(loss, 700)), 'bpb': bpb}
    return results


# -----------------------------------------------------------------------------
# Runs as tables

class Run:
    """What config.json and metrics.jsonl of a run folder say.

    config: {knob: value}; sets: validation sets; evals and trains: rows of metrics.jsonl. Old sets are those that an
    earlier stage was trained on and this one is not, replay apart; new sets those in train_data, at first or later.
    """

    def __init__(self, folder):
        self.name = Path(folder).name
        try:
            self.config = json.loads(Path(folder, 'config.json').read_text())
            rows = [json.loads(line) for line in Path(folder, 'metrics.jsonl').read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise EvalError(f'{folder}: no run to be read there ({error}); expected config.json and metrics.jsonl')
        self.evals = [row for row in rows if row['event'] == 'eval']
        self.trains = [row for row in rows if row['event'] == 'train']
        if not self.evals:
            raise EvalError(f'{folder}: metrics.jsonl holds no evaluation yet')
        self.made_by = {k: v for k, v in self.config.items() if k not in ('config', 'origin', 'derived')}
        derived, self.config = self.config['derived'], self.config['config']
        self.config |= {k: v for k, v in derived.get('model', {}).items() if k in self.config}      # a parent's shape
        self.seen = derived['seen']
        self.sets = list(self.evals[0]['val'])
        later = {name for switch in self.config['switches'] for name in switch.get('train_data', {})}
        self.new = self.sets_of(self.config['train_data'].keys() | later)
        self.old = [name for name in self.sets_of(self.seen) if name not in self.new]

    def sets_of(self, sources):
        """The validation sets that these sources teach, in whole or, as docs_1of3 does docs, in part."""
        return [name for name in self.sets if any(f'{source}_'.startswith(f'{name}_') for source in sources)]

    def losses(self, name):
        return [row['val'][name]['loss'] for row in self.evals]

    def role(self, name):
        """What a validation set is to this run, for titles."""
        if name in self.old:
            share = self.config['replay'] if name in self.config['replay_data'] else 0
            return f'old data, {100 * share:.3g}% replay'
        if name in self.new:
            return ('the same data again' if name in self.sets_of(self.seen) else
                    'new data' if self.seen else 'training data')
        return 'never trained on'


def is_evaluated(folder, step):
    """Whether a run has got as far as its evaluation at that step."""
    try:
        return Run(folder).evals[-1]['step'] == step
    except EvalError:
        return False


def by_seed(folders):
    """Run folders -> {name without _seedN: [Run, ...]}, in the order given."""
    groups = {}
    for folder in folders:
        run = Run(folder)
        groups.setdefault(re.sub(r'_seed\d+$', '', run.name), []).append(run)
    return groups


def warn_of_unfinished(folders):
    for folder, run in zip(folders, map(Run, folders)):
        if (step := run.evals[-1]['step']) < run.config['max_steps']:
            print(f'{folder} is not finished: step {step:,} of {run.config["max_steps"]:,}', file=sys.stderr)


def spread(values, digits=3):
    """'1.234' of one value, '1.234 +- 0.005' (standard deviation) of several."""
    text = f'{statistics.mean(values):.{digits}f}'
    return text + (f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else '')


def table(folders):
    """The comparison as Markdown: final loss on each set, their average, forgetting and its peak, adaptation.

    In the layout of Ibrahim et al. 2024, Table 2. A dash: no such set in this run.
    """
    groups = by_seed(folders)
    sets = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run.sets))
    rows = [['run', 'seeds', *sets, 'average', 'forgetting', 'its peak', 'adaptation']]
    for label, runs in groups.items():
        def over(measure, names):                                   # mean over the sets of a run, spread over its seeds
            values = [statistics.mean(measure(run.losses(n)) for n in names(run)) for run in runs if names(run)]
            return spread(values) if values else '–'
        last = [over(lambda L: L[-1], lambda run, n=n: [n] if n in run.sets else []) for n in sets]
        rows.append([label, str(len(runs)), *last,
                     over(lambda L: L[-1], lambda run: run.sets),
                     over(lambda L: L[-1] - L[0], lambda run: run.old),
                     over(lambda L: max(L) - L[0], lambda run: run.old),
                     over(lambda L: L[0] - L[-1], lambda run: run.new if run.seen else [])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(cell.ljust(w) for cell, w in zip(row, widths)) + ' |' for row in rows]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (w + 2) for w in widths) + '|', *lines[1:]])


def summary(folders):
    """What a table is made of, as plain values: of every run its losses, and what made it."""
    return [{'run': run.name, 'row': label, 'start': run.evals[0]['val'], 'end': run.evals[-1]['val'],
             'best': {name: min(run.losses(name)) for name in run.sets},
             'peak': {name: max(run.losses(name)) for name in run.sets}, 'tokens': run.evals[-1]['tokens'],
             **run.made_by} for label, runs in by_seed(folders).items() for run in runs]


# -----------------------------------------------------------------------------
# Claims about runs

def measure(run, dataset, when):
    """A loss of a run: on a set, or the 'average' of its sets; at its end, at its 'start', its 'peak' or 'best', after
    N steps (when = '100'), or its 'rise' from start to end."""
    def one(name):
        L = run.losses(name)
        if when.isdigit():
            return dict(zip((row['step'] for row in run.evals), L))[int(when)]
        return {'': L[-1], 'start': L[0], 'peak': max(L), 'best': min(L), 'rise': L[-1] - L[0]}[when]
    return statistics.mean(map(one, run.sets if dataset == 'average' else [dataset]))


ONE_SEED = 0.005        # nats: as the difference of two runs of one seed varies from seed to seed in results/
TERM = re.compile(r'(?:([\d.]+) \* )?([^\s@]+)(?:@(\w+))?(?: ([+-]) ([\d.]+))?')       # 0.5 * row@when + 0.01


def compare(line, groups):
    """Verdict on a claim 'SET: TERM < TERM ... | sentence', as a sentence with its figures.

    TERM: [0.5 *] ROW[@when] [+ 0.01], see measure. < is less, ~0.02 is equal within 0.02. Seeds are compared each with
    itself; a difference counts when it exceeds its standard deviation over the seeds, or with one seed ONE_SEED.
    """
    try:
        formula, sentence = map(str.strip, line.split('|'))
        dataset, _, rest = (part.strip() for part in formula.partition(':'))
        first, *others = re.split(r'\s(<|~[\d.]+)\s', rest)
        values, shown = [], []
        for term in (first, *others[1::2]):
            factor, row, when, sign, offset = TERM.fullmatch(term.strip()).groups()
            shift = float(offset or 0) * (-1 if sign == '-' else 1)
            values.append({run.config['seed']: float(factor or 1) * measure(run, dataset, when or '') + shift
                           for run in groups[row]})
            shown.append(f'{term.strip()} {statistics.mean(values[-1].values()):.3f}')
    except (ValueError, KeyError, AttributeError) as error:
        raise EvalError(f'claim {line!r}: not understood ({type(error).__name__}: {error}); expected like '
                        f"'docs: rewarm_replay5 < rewarm_replay0 | replay helps', with rows of {', '.join(groups)}")
    verdicts, text = [], shown[0]
    for relation, left, right, label in zip(others[::2], values, values[1:], shown[1:]):
        seeds = sorted(left.keys() & right.keys())
        if not seeds:
            raise EvalError(f'claim {line!r}: the rows compared have no seed in common')
        by = [right[seed] - left[seed] for seed in seeds]
        mean, sd = statistics.mean(by), statistics.stdev(by) if len(by) > 1 else ONE_SEED
        text += f' {relation[0]} {label} (by {spread(by)}{f", {len(by)} seeds" if len(by) > 1 else ", one seed"})'
        verdicts.append(abs(mean) <= float(relation[1:]) if relation != '<' else
                        None if abs(mean) <= sd else mean > 0)
    verdict = 'Does not hold' if False in verdicts else 'Not decided' if None in verdicts else 'Holds'
    return f'- **{verdict}.** {sentence} [{dataset}: {text}]'


def claims(path, folders):
    """The verdicts on the claims of a file as Markdown; # begins a comment."""
    groups = by_seed(folders)
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    verdicts = [compare(line, groups) for line in lines if line and not line.startswith('#')]
    return '\n'.join(['Claims; a difference counts when it exceeds its standard deviation over the seeds, or with one '
                      f'seed {ONE_SEED}:\n', *verdicts])


# -----------------------------------------------------------------------------
# Runs as pictures

# Okabe and Ito's colours and a line style each: apart in grey and for colour-blind readers.
STYLES = [('#0072B2', '-'), ('#D55E00', '--'), ('#009E73', '-.'), ('#CC79A7', ':'), ('#E69F00', (0, (5, 1))),
          ('#56B4E9', (0, (3, 1, 1, 1))), ('#000000', (0, (1, 1))), ('#999999', '-')]
LOUD = ['replay', 'schedule', 'learning_rate', 'warmup', 'min_lr']      # told first of what differs
QUIET = {'out_dir', 'overwrite', 'seed', 'data_dir', 'device', 'dtype', 'compile', 'micro_batch_size', 'init_from',
         'branch_from', 'replay_data'}


def labels(groups):
    """{name: label}: the name of a run, and the knobs in which the runs drawn together differ."""
    configs = {name: runs[0].config for name, runs in groups.items()}
    known = set.intersection(*map(set, configs.values())) - QUIET       # by older runs, too
    differ = [key for key in dict.fromkeys([*LOUD, *next(iter(configs.values()))]) if key in known
              and len({json.dumps(config[key]) for config in configs.values()}) > 1]

    def show(value):
        if isinstance(value, (dict, list)):
            return '+'.join(value) or 'none' if isinstance(value, dict) else len(value)     # of switches, how many
        return f'{value:g}' if type(value) is float else str(value)[:30]
    return {name: '\n'.join([name, *(f'{key} {show(configs[name][key])}' for key in differ[:3])]) for name in groups}


def mean_curve(runs, rows, value):
    """Tokens, mean and standard deviation over the seeds of value(row), where all seeds have a row."""
    curves = [{row['tokens']: value(row) for row in rows(run)} for run in runs]
    tokens = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[t] for t in tokens] for curve in curves])     # (seeds, points)
    return np.array(tokens), values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(tokens))


def plot(folders, out):
    """Forgetting curves as a PNG: a panel for each validation set, old sets first, and the learning rate below."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    groups = by_seed(folders)
    names, first = labels(groups), next(iter(groups.values()))[0]
    sets = sorted(dict.fromkeys(n for runs in groups.values() for n in runs[0].sets),
                  key=lambda n: (n not in first.sets_of(first.seen), n not in first.new))
    if not sets:
        raise EvalError(f'{" ".join(map(str, folders))}: nothing to draw, val_data was empty')
    fig, axes = plt.subplots(2, len(sets), figsize=(4.6 * len(sets) + 1, 4.8), sharex='col', squeeze=False,
                             height_ratios=(3, 1), layout='constrained')
    largest = max(runs[0].evals[-1]['tokens'] for runs in groups.values())
    unit, name = next((u, n) for u, n in ((1e9, 'billion'), (1e6, 'million'), (1, '')) if largest >= u or u == 1)
    for ax, low, dataset in zip(*axes, sets):
        shown = []                                  # the fall from random weights leaves through the top
        for (color, style), (label, runs) in zip(STYLES * len(groups), groups.items()):
            if dataset in runs[0].sets:
                t, loss, sd = mean_curve(runs, lambda run: run.evals, lambda row: row['val'][dataset]['loss'])
                ax.plot(t / unit, loss, color=color, ls=style, lw=1.8, label=names[label])
                ax.fill_between(t / unit, loss - sd, loss + sd, color=color, alpha=0.2, lw=0)
                shown.extend(loss[t >= (0 if runs[0].seen else t[-1] / 10)])
                if runs[0].seen and not runs[0].config['branch_from']:
                    ax.axhline(loss[0], color='0.4', ls=':', lw=1, zorder=0)
            t, lr, _ = mean_curve(runs, lambda run: run.trains, lambda row: row['lr'])
            low.plot(t / unit, lr, color=color, ls=style, lw=1.5)
        change = ''
        if len(groups) == 1 and first.seen:
            L = first.losses(dataset)
            change = f'\n{L[-1] - L[0]:+.3f} nats since the start'
            change += f' (peak {max(L) - L[0]:+.3f})' * (dataset in first.old)
        teacher = next((runs[0] for runs in groups.values() if dataset in runs[0].new + runs[0].old), first)
        role = teacher.role(dataset).partition(',')[0] if len(groups) > 1 else first.role(dataset)
        ax.set_title(f'{dataset} ({role}){change}', fontsize=10)
        ax.set_ylabel('validation loss (nats per token)')
        margin = 0.08 * np.ptp(shown) or 0.1
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
        low.set(xlabel=f'tokens of this stage ({name})'.replace(' ()', ''), ylabel='learning rate', ylim=(0, None))
        low.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
        for a in (ax, low):
            a.grid(alpha=0.25)
            a.spines[['top', 'right']].set_visible(False)
    if first.seen:
        fig.supxlabel('dotted: loss at the start of the stage' + ', bands: one standard deviation over seeds' *
                      any(len(runs) > 1 for runs in groups.values()), fontsize=8, color='0.3', x=0.99, ha='right')
    if len(groups) > 1:
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside right center', fontsize=8, frameon=False)
    fig.savefig(out, dpi=130)
    plt.close(fig)


def plane(folders, old, new, out):
    """Loss on old data against loss on new data at the end, a point a row: down and left is better.

    A line joins neighbours of the list that differ in replay, or in the rates, alone. Squares started from random
    weights; the star is where the others started from.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    groups = {label: runs for label, runs in by_seed(folders).items() if {old, new} <= set(runs[0].sets)}
    if not groups:
        raise EvalError(f'no run was evaluated on both {old} and {new}')
    fig, ax = plt.subplots(figsize=(6.4, 4.8), layout='constrained')
    before, color = None, -1
    for label, runs in groups.items():
        at = np.array([[run.losses(old)[-1], run.losses(new)[-1]] for run in runs])        # (seeds, 2)
        (x, y), (dx, dy) = at.mean(0), at.std(0, ddof=1) if len(runs) > 1 else (0, 0)
        config = {k: v for k, v in runs[0].config.items() if k not in QUIET}
        differ = before and {k for k in config if config[k] != before[0].get(k, config[k])}
        joined = runs[0].seen and differ and (differ <= {'replay'} or differ <= {'learning_rate', 'min_lr'})
        color += not joined
        style = dict(color=STYLES[color % 7][0], zorder=3)
        ax.errorbar(x, y, dy, dx, marker='o' if runs[0].seen else 's', ms=6, lw=1, **style)
        if joined:
            ax.plot([before[1], x], [before[2], y], lw=1, **style)
        short = f'{config["replay"]:.3g}' if joined and 'replay' in differ else f'{config["learning_rate"]:.3g}'
        where = dict(xytext=(4, 6)) if runs[0].seen else dict(xytext=(0, -24), ha='center')
        ax.annotate(short if joined else label, (x, y), **where, textcoords='offset points', fontsize=8)
        before = (config, x, y) if runs[0].seen else None
    if start := [[run.losses(old)[0], run.losses(new)[0]] for runs in groups.values() for run in runs if run.seen]:
        x, y = np.mean(start, 0)
        ax.plot(x, y, '*', color='0.3', ms=12)
        ax.annotate('start', (x, y), xytext=(7, 4), textcoords='offset points', fontsize=8)
    ax.set(xlabel=f'loss on {old}, old data (nats per token)', ylabel=f'loss on {new}, new data (nats per token)')
    ax.set_title('circles: continued, squares: from random weights; down and left is better', fontsize=9)
    ax.margins(0.15)
    ax.grid(alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(out, dpi=130)
    plt.close(fig)


def report(folder):
    """At the end of a run: draw its curve, return its row."""
    if not Run(folder).sets:
        return f'{folder}: no val_data, hence no forgetting curve'
    plot([folder], Path(folder, 'forgetting.png'))
    return f'\n{table([folder])}\n\n{Path(folder, "forgetting.png")}: its forgetting curve'


# -----------------------------------------------------------------------------
# Benchmarks, by EleutherAI's lm-evaluation-harness (pip install lm-eval)

# {list: {examples before a question: tasks}}, as Ibrahim et al. 2024, in English and in German translation. Parmar et
# al. 2024 took MMLU, HellaSwag, MGSM and HumanEval; the last runs what a model writes, which lm-eval does on request.
PAPERS = {'papers': {0: ['hellaswag', 'arc_challenge', 'arc_easy', 'boolq', 'mathqa', 'openbookqa', 'piqa',
                         'winogrande', 'truthfulqa_mc1', 'truthfulqa_mc2'], 5: ['mmlu', 'nq_open', 'triviaqa']},
          'papers-german': {0: ['hellaswag_de', 'arc_de', 'truthfulqa_de_mc1', 'truthfulqa_de_mc2'], 5: ['m_mmlu_de']}}
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@torch.no_grad()
def score(model, requests, batch, autocast):
    """[(context ids, continuation ids), ...] -> [(log-probability in nats, whether it is the likeliest), ...].

    Of the continuation after its context, which loses its beginning where it is too long. Padding stands on the right,
    where a causal model does not see it. The softmax is over all rows of the vocabulary, as in training.
    """
    block, device = model.config.max_position_embeddings, model.cos.device
    results, same, cut = [None] * len(requests), {}, 0      # same: answers A to D of a question share one input
    for i, (context, continuation) in enumerate(requests):
        if len(continuation) > block:
            raise EvalError(f'a text of {len(continuation)} tokens is to be scored as one, the block size is {block}')
        cut += len(context) + len(continuation) > block + 1
        same.setdefault(tuple((context + continuation)[-block - 1:-1]), []).append(i)
    if cut:
        print(f'{cut:,} of {len(requests):,} contexts cut to the block size {block}, at the front', file=sys.stderr)
    inputs = sorted(same, key=len, reverse=True)        # what does not fit in memory fails at once
    for start in tqdm(range(0, len(inputs), batch), desc='scoring', unit='batch', disable=None):
        rows = inputs[start:start + batch]
        idx = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)                        # (B, T)
        for row, ids in zip(idx, rows):
            row[:len(ids)] = torch.tensor(ids)
        with autocast:
            logits, _ = model(idx.to(device))                                               # (B, T, V)
        for ids, row in zip(rows, logits):
            for i in same[ids]:
                wanted = torch.tensor(requests[i][1], dtype=torch.long, device=device)      # (n)
                logp = row[len(ids) - len(wanted):len(ids)].float().log_softmax(dim=-1)     # (n, V)
                results[i] = (logp.gather(1, wanted[:, None]).sum().item(), bool((logp.argmax(-1) == wanted).all()))
    return results


@torch.no_grad()
def complete(model, tokenizer, contexts, settings, autocast):
    """The texts that follow contexts (B, T), up to end-of-text or a stop of lm-eval's settings."""
    until = [*filter(None, settings['until']), tokenizer.decode([tokenizer.eot])]
    sampling = {'temperature': settings.get('temperature', 1.0) if settings['do_sample'] else 0.0,
                'top_k': settings.get('top_k') or None, 'top_p': settings.get('top_p')}
    cache, fed, rows = model.new_cache(), torch.tensor(contexts, device=model.cos.device), [[] for _ in contexts]
    for _ in range(settings['max_gen_toks']):
        with autocast:
            logits, _ = model(fed, cache=cache)
        fed = sample_token(logits[:, -1], **sampling)                                       # (B, 1)
        for row, (token,) in zip(rows, fed.tolist()):
            row += [token] * (token < tokenizer.vocab_size)                                 # no padding row
        texts = [tokenizer.decode(row) for row in rows]
        if all(any(stop in text for stop in until) for text in texts):
            break
    for stop in until:
        texts = [text.split(stop)[0] for text in texts]
    return texts


def harness_model(model, tokenizer, batch, autocast):
    """The model as one of lm-eval's, which asks in texts. It answers as lm-eval's own `hf` model, to rounding."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    block = model.config.max_position_embeddings

    class Adapter(TemplateLM):
        eot_token_id = tokenizer.eot                    # also what comes before a text without context

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests, **kwargs):
            # lm-eval moves spaces at the end of a context to the continuation, and may leave nothing.
            return score(model, [(before or [tokenizer.eot], after) for _, before, after in requests], batch, autocast)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows, totals = [], [0.0] * len(requests)
            for i, request in enumerate(requests):
                parts = get_rolling_token_windows(self.tok_encode(*request.args), tokenizer.eot, block, 1)
                windows += [(i, make_disjoint_window(part)) for part in parts]
            for (i, _), (logp, _) in zip(windows, score(model, [w for _, w in windows], batch, autocast)):
                totals[i] += logp
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            alike, texts = {}, {}                       # alike: of one length, so that none is padded, and one setting
            for i, (context, settings) in enumerate(request.args for request in requests):
                settings = normalize_gen_kwargs(settings)
                if (room := block - (n := settings['max_gen_toks'])) < 1:
                    raise EvalError(f'{n} tokens are to be generated: no room for a context in the block size {block}')
                ids = self.tok_encode(context)[-room:] or [tokenizer.eot]
                alike.setdefault((len(ids), str(settings)), []).append((i, ids, settings))
            groups = [group[k:k + batch] for group in alike.values() for k in range(0, len(group), batch)]
            for group in tqdm(groups, desc='generating', unit='batch', disable=None):
                owners, contexts, (settings, *_) = zip(*group)
                texts |= zip(owners, complete(model, tokenizer, contexts, settings, autocast))
            return [texts[i] for i in range(len(requests))]

    return Adapter()


def find_tasks(names, include_path):
    """lm-eval's TaskManager that knows these tasks: of the files in include_path alone when they suffice."""
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):        # its own are 14,000, and take seconds to list
        manager = TaskManager(include_path=include_path)
    for name in (name for name in names if name not in manager.all_tasks):
        near = ', '.join(difflib.get_close_matches(name, [*PAPERS, *manager.all_tasks], 3)) or 'nothing'
        raise EvalError(f'--tasks {name}: unknown to lm-eval; near it: {near}. One of your own: --include_path FOLDER')
    return manager


# -----------------------------------------------------------------------------
# Command line

def open_run(run, args):
    """(checkpoint, its model, {name: (Source, windows)}) of a run, for the commands that evaluate one."""
    if args.windows is not None and args.windows < 0:
        raise EvalError(f'--windows {args.windows}: expected 0 (all) or more')
    state, model = load_run(run)
    config, block = state['config'], state['model']['max_position_embeddings']
    data_dir, names = args.data_dir or config['data_dir'], args.sets or config['val_data']
    if not names:
        raise EvalError(f'{run}: names no validation sets; give some: --sets docs code')
    sources = {name: data.Source(name, data.find_shards(name, 'val', data_dir, config['paths']), block)
               for name in names}
    data.check_compatible(sources, state['model']['vocab_size'])
    n = config['eval_windows'] if args.windows is None else args.windows
    return state, model.to(args.device), {k: (s, data.val_windows(s, n)) for k, s in sources.items()}


def loss_command(args):
    """Prints the loss on every validation set, in fp32."""
    for run in args.runs:
        state, model, val_sets = open_run(run, args)
        print(f'{run}, step {state["step"]:,}')
        batch = max(1, 4096 // state['model']['max_position_embeddings'])   # of 4096 tokens, logits of Pythia: 0.8 GB
        for name, row in evaluate(model, val_sets, batch, contextlib.nullcontext()).items():
            bpb = f'{row["bpb"]:.4f} bits per byte' if row['bpb'] else 'bytes unknown'
            print(f'  {name:<16} {row["loss"]:.4f} ± {row["se"] or math.nan:.4f} nats per token   '
                  f'perplexity {row["ppl"]:.3f}   {bpb}   {len(val_sets[name][1])} windows')


def table_command(args):
    warn_of_unfinished(args.runs)
    text = table(args.runs) + (f'\n\n{claims(args.claims, args.runs)}' if args.claims else '')
    print(text)
    if args.out:
        Path(args.out).write_text(text + '\n')
        Path(args.out).with_suffix('.json').write_text(json.dumps(summary(args.runs), indent=1) + '\n')


def plot_command(args):
    if not args.out.endswith('.png'):
        raise EvalError(f'--out {args.out}: expected a name that ends in .png')
    warn_of_unfinished(args.runs)
    plane(args.runs, *args.plane, args.out) if args.plane else plot(args.runs, args.out)
    print(args.out)


def sample_command(args):
    state, model = load_run(args.run)
    tokenizer, _ = find_tokenizer(args.run, state, args.tokenizer)
    model.to(args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    # A document follows an end-of-text, and so does the prompt.
    ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(args.prompt).tolist()]], device=args.device)
    for _ in range(args.samples):
        text = model.generate(ids, args.tokens, args.temperature, args.top_k, args.top_p, generator)[0, 1:].tolist()
        print(tokenizer.decode([t for t in text if t < tokenizer.vocab_size]), '\n' + '-' * 80)


def bench_command(args):
    """Prints lm-eval's table, and keeps all that it reports."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.utils import handle_non_serializable, make_table
    except ImportError:
        raise EvalError('bench needs a package that is not installed: pip install lm-eval')
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise EvalError(f'--out {args.out}: there is no such folder')
    plan = {}                                           # {shots: tasks}; None: as the task says
    for name in args.tasks:
        for shots, tasks in PAPERS.get(name, {None: [name]}).items():
            plan.setdefault(shots if args.num_fewshot is None else args.num_fewshot, []).extend(tasks)
    manager = find_tasks(sum(plan.values(), []), args.include_path)
    state, model = load_run(args.run)
    tokenizer, _ = find_tokenizer(args.run, state, args.tokenizer)
    autocast = torch.autocast(torch.device(args.device).type, DTYPES[args.dtype], enabled=args.dtype != 'fp32')
    lm, results = harness_model(model.to(args.device), tokenizer, args.batch_size, autocast), {}
    for shots, tasks in plan.items():
        part = simple_evaluate(lm, tasks=tasks, num_fewshot=shots, limit=args.limit, task_manager=manager,
                               log_samples=False)
        results |= {key: results.get(key, {}) | x if isinstance(x, dict) else x for key, x in part.items()}  # by task
    print(*(make_table(results, column) for column in ('results', 'groups') if results.get(column)), sep='\n')
    if args.out:
        made_by = {'command': ' '.join(sys.argv), 'step': state['step'], 'tokenizer': tokenizer.name}
        results['run'] = vars(args) | made_by
        text = json.dumps(results, indent=1, default=handle_non_serializable)       # with the versions of all packages
        Path(args.out).write_text(text + '\n')


def export_command(args):
    """Writes a Hugging Face directory with the tokenizer's files, if there are any."""
    state, model = load_run(args.run)
    eot, files = 0, {}
    try:
        tokenizer, files = find_tokenizer(args.run, state, args.tokenizer)
        eot = tokenizer.eot
    except (EvalError, data.DataError) as error:
        if args.tokenizer:
            raise
        print(error)
    files = {name: path.read_bytes() for name, path in files.items()}
    if 'tokenizer.json' in files:                       # AutoTokenizer does not open it without the other
        end = tokenizer.decode([eot])
        settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': end, 'eos_token': end}
        files.setdefault('tokenizer_config.json', json.dumps(settings).encode())
    else:
        print(f'{args.dir} gets no tokenizer.json: there is none')
    if not all(p.isfinite().all() for p in model.to(DTYPES[args.dtype]).parameters()):
        raise EvalError(f'--dtype {args.dtype}: some weights are too large for it; take bf16 or fp32')
    save_hf(model, args.dir, eot, files)
    written = {file.name: file.stat().st_size for file in sorted(Path(args.dir).iterdir())}
    print(f'{args.dir}: {model.num_params():,} parameters in {args.dtype}, {sum(written.values()) / 1e9:.3g} GB: '
          f'{", ".join(written)}')


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    for name, command, what in (('loss', loss_command, 'loss on validation sets'),):
        p = commands.add_parser(name, help=what)
        p.add_argument('runs', nargs='+')
        p.add_argument('--sets', nargs='+', help='sources to evaluate on (default: those of the run)')
        p.add_argument('--windows', type=int, help='windows of each; 0: all (default: as in the run)')
        p.add_argument('--data_dir')
        p.add_argument('--device', default=device)
        p.set_defaults(command=command)
    for name, command, what, out in (('table', table_command, 'comparison as Markdown', None),
                                     ('plot', plot_command, 'forgetting curves', 'forgetting.png')):
        p = commands.add_parser(name, help=what)
        p.add_argument('runs', nargs='+')
        p.add_argument('--out', default=out)
        if name == 'table':
            p.add_argument('--claims', metavar='FILE', help="lines 'docs: row_a < row_b | sentence' to test")
        else:
            p.add_argument('--plane', nargs=2, metavar=('OLD', 'NEW'), help='final loss on one set against the other')
        p.set_defaults(command=command)
    for name, command, what in (('sample', sample_command, 'generate text'), ('bench', bench_command, 'benchmarks'),
                                ('export', export_command, 'write a Hugging Face directory')):
        p = commands.add_parser(name, help=what)
        p.add_argument('run')
        p.add_argument('--tokenizer', metavar='SPEC', help='tokenizer.json, folder with one, gpt2 or bytes')
        if name == 'sample':
            p.add_argument('--prompt', default='')
            p.add_argument('--tokens', type=int, default=300)
            p.add_argument('--samples', type=int, default=1)
            p.add_argument('--temperature', type=float, default=0.8)
            p.add_argument('--top_k', type=int)
            p.add_argument('--top_p', type=float)
            p.add_argument('--seed', type=int, default=1337)
        elif name == 'bench':
            p.add_argument('--tasks', nargs='+', required=True, help=f"lm-eval's names, or {' or '.join(PAPERS)}")
            p.add_argument('--num_fewshot', type=int, help='examples before a question (default: as task or paper)')
            p.add_argument('--limit', type=int, help='questions of each task (default: all)')
            p.add_argument('--include_path', metavar='FOLDER', help='tasks of your own, .yaml')
            p.add_argument('--batch_size', type=int, default=16)
            p.add_argument('--out', metavar='FILE.json')
        if name == 'export':
            p.add_argument('dir')
        else:
            p.add_argument('--device', default=device)
        if name != 'sample':
            p.add_argument('--dtype', choices=DTYPES, default='fp32')
        p.set_defaults(command=command)
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except (EvalError, ModelError, data.DataError, OSError) as error:
        print(f'eval.py: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
