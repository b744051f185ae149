"""What a model knows, what it has forgotten, and pictures of both.

    python eval.py loss   RUN                       # loss on the validation sets of a run
    python eval.py table  RUN RUN ... [--out x.md]  # final losses, forgetting, adaptation
    python eval.py plot   RUN RUN ... [--out x.png] # forgetting curves, learning rate below
                          [--labels 'no replay' ...]
    python eval.py sample RUN --prompt 'def '       # text from the model
    python eval.py export RUN DIR                   # a directory for transformers and lm-eval

RUN is a run folder. loss, sample and export use its newest checkpoint, and also take a checkpoint
or a Hugging Face directory. Runs named x_seed1, x_seed2, ... are one row of a table (mean and
standard deviation) and one line of a plot, if they differ in nothing but the seed. Folders without
a run are skipped, so out/* works.

A validation set is a fixed list of windows. With L(t) its loss during a stage that starts at t = 0:

    forgetting of an old set    L(end) - L(0)                positive is worse
    its peak                    max over t of L(t) - L(0)    the bump that re-warming causes; t are
                                                             the steps that were evaluated
    adaptation to a new set     L(0) - L(end)                positive is better

Shapes: B windows, T tokens of a window.
"""
import argparse
import contextlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

import data
from configurator import UserError, require
from model import GPTNeoX, GPTNeoXConfig
from support import checkpoints, huggingface, methods, pictures, processes, record
from support.files import write_whole
from support.processes import DTYPES, say


# ------------------------------------------------------------------------------
# Loss

@torch.no_grad()
def evaluate(model, val_sets, batch, autocast):
    """Losses on {name: (Source, windows)} -> {name: {loss, se, ppl, bpb}}, the same on every rank.

    loss and its standard error se are in nats per token, ppl = exp(loss), and bpb in bits per byte
    of text, or None where the shards do not say how many bytes they are.
    """
    device, results = next(model.parameters()).device, {}
    rank, world = processes.rank(), processes.world_size()
    for name, (source, windows) in val_sets.items():
        # Processes share the windows. All make the same number of forward passes, since sharded
        # models exchange weights in each: one that has a window less repeats one, without counting.
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

        sums = [counted, losses.sum().item(), (losses**2).sum().item()]
        n, total, squares = processes.add_up(sums)
        loss = total / n
        variance = max(squares / n - loss**2, 0)
        se = math.sqrt(variance / (n - 1)) if n > 1 else None
        bpb = loss / math.log(2) / source.bytes_per_token if source.bytes_per_token else None
        results[name] = {'loss': loss, 'se': se, 'ppl': math.exp(min(loss, 700)), 'bpb': bpb}
    return results


# ------------------------------------------------------------------------------
# Runs: what config.json and metrics.jsonl of a run folder say

class Run:
    """A run folder.

    config: {knob: value}; roles: {validation set: what it is to the run}, as the run itself has
    worked it out (data.Plan); old: the sets that it may forget; new: those that it learns.
    """

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        about = record.read_config(folder)
        require(about, f'{folder} is not a run folder of this version')
        self.config, self.derived = about.pop('config'), about.pop('derived')
        shape = self.derived['shape']                   # which a stage inherits
        self.config |= {knob: value for knob, value in shape.items() if knob in self.config}
        self.id = about.pop('run')
        self.made_by = {key: value for key, value in about.items() if key != 'origin'}
        self.roles, self.sets = self.derived['roles'], list(self.derived['roles'])

        rows = [row for row in record.read_rows(Path(folder, 'metrics.jsonl'))
                if row['run'] == self.id]
        self.trains = [row for row in rows if row['event'] == 'train']
        self.evals = [row for row in rows if row['event'] == 'eval'
                      and row['val'].keys() == self.roles.keys()]
        require(self.evals, f'{folder} has not been evaluated yet')
        self.has_start = self.evals[0]['step'] == self.derived['start_step']
        self.old = [name for name in self.sets if self.roles[name] == 'old data']
        self.new = [name for name in self.sets
                    if self.roles[name] not in ('old data', 'never trained on')]

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
        if name not in self.old or not self.has_start:
            return None
        losses = self.losses(name)
        return losses[-1] - losses[0]

    def forgetting_peak(self, name):
        """max over t of L(t) - L(0): the bump that re-warming causes."""
        if name not in self.old or not self.has_start:
            return None
        losses = self.losses(name)
        return float(np.max(losses)) - losses[0]

    def adaptation(self, name):
        """L(0) - L(end) on a new set: positive means that the model learned."""
        is_scratch = not self.derived['parent']
        if name not in self.new or is_scratch or not self.has_start:
            return None
        losses = self.losses(name)
        return losses[0] - losses[-1]

    def share(self, name):
        """The share of the stage's samples that came from the sources of a set."""
        before, samples = self.derived['samples_before'], {}
        for source, n in (self.trains[-1]['samples'] if self.trains else {}).items():
            samples[source] = n - before.get(source, 0)
        own = sum(n for source, n in samples.items() if data.teaches(source, name))
        return own / max(sum(samples.values()), 1)

    def logged(self):
        """What a project logs beside the rest: {name: (tokens, values)}."""
        found = {}
        for row in sorted(self.trains + self.evals, key=lambda row: row['step']):
            for name in row.keys() - record.RESERVED:
                if isinstance(row[name], (int, float)):
                    found.setdefault(name, []).append((row['tokens'], row[name]))
        return {name: np.array(points, float).T for name, points in found.items()}


def read_runs(folders):
    """Run folders -> [Run, ...]. What is no run, or cannot be read, is skipped with a line."""
    runs = {}
    for folder in folders:
        path = Path(folder).resolve()
        require(path not in runs, f'{folder} is given twice')
        try:
            run = Run(folder)
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
            print(f'skipped: {error}', file=sys.stderr)
            continue
        last, wanted = run.evals[-1]['step'], run.derived.get('last_step', run.config['max_steps'])
        if last < wanted:
            print(f'{folder} is not finished: step {last:,} of {wanted:,}', file=sys.stderr)
        runs[path] = run
    require(runs, f'none of these is a run: {" ".join(map(str, folders))}')
    return list(runs.values())


def by_seed(folders):
    """Run folders -> {row name: [Run, ...]}, in their order. One row: runs that differ in nothing
    but the seed, and are named so: x_seed1, x_seed2."""
    runs = read_runs(folders)
    if len(runs) == 1:
        return {runs[0].name: runs}                         # with its seed
    groups = {}
    for run in runs:
        name = re.sub(r'_seed\d+$', '', run.name)
        seeds = groups.get(name, [])
        why = why_apart(seeds, run)
        if why:
            print(f'{run.folder} is a row of its own: {why}', file=sys.stderr)
            name = str(run.folder)
        groups.setdefault(name, []).append(run)
    return groups


def why_apart(seeds, run):
    """Why a run cannot join others in a row, or ''."""
    for other in seeds:
        knobs = [knob for knob in run.config if knob not in ('seed', 'out_dir', 'label')
                 and without_seed(run.config[knob]) != without_seed(other.config.get(knob))]
        if knobs:
            return f'it differs from {other.folder} in {", ".join(knobs)}'
        if run.config['seed'] == other.config['seed']:
            return f'it has the seed of {other.folder}, {run.config["seed"]}'
    return ''


def without_seed(value):
    """A path without the seed in its folders: each run of a row has an old model of its own."""
    return re.sub(r'_seed\d+', '', value) if isinstance(value, str) else value


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
    sets = pictures.all_sets(runs)
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
    return '\n'.join([*markdown(rows), *(f'\n{note}' for note in differences(runs))])


def markdown(rows):
    """The lines of a Markdown table. The first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ['-' * width for width in widths]
    return ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |'
            for row in (rows[0], rule, *rows[1:])]


def differences(runs):
    """Sentences that say in what runs cannot be compared."""
    compared = {'sets': lambda run: ', '.join(sorted(run.sets)),
                'numbers of windows': lambda run: run.config['eval_windows'] or 'all',
                'windows, in tokens': lambda run: run.derived['block_size'],
                'tokenizers': lambda run: run.derived['tokenizer']}
    for name in pictures.all_sets(runs):
        compared[f'data of {name}'] = lambda run, name=name: run.derived['val_prints'].get(name)
    notes = []
    for what, value_of in compared.items():
        values = {value_of(run): run.name for run in runs if value_of(run) is not None}
        if len(values) > 1:
            listed = '; '.join(f'{value} ({name})' for value, name in values.items())
            notes.append(f'NOTE: evaluated on different {what}: {listed}')
    lost = [run.name for run in runs if not run.has_start]
    if lost:
        notes.append(f'NOTE: the losses at the start are missing, so nothing is said of what was '
                     f'forgotten or learned: {", ".join(lost)}')
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


def plot(groups, out, labels=()):
    """Forgetting curves of {row: [Run of a seed, ...]} as a PNG."""
    notes = differences([run for seeds in groups.values() for run in seeds])
    pictures.plot(groups, out, labels, notes)


def report(folder):
    """At the end of a run: draw its curve, print its row. Nothing here can undo the run."""
    if not processes.is_first():
        return
    try:
        run = Run(folder)
        groups, picture = {run.name: [run]}, Path(folder, 'forgetting.png')
        if not run.sets:
            say(f'{folder}: there is no val_data, hence no forgetting curve')
            return
        plot(groups, picture)
        say(f'\n{table(groups)}\n\n{picture}: its forgetting curve')
    except Exception as error:                          # of matplotlib, for one
        say(f'{folder} is finished and saved, but its curve could not be drawn: {error!r}')


# ------------------------------------------------------------------------------
# Commands

def load_run(run, method=''):
    """(state, model on the CPU) of a run folder, a checkpoint or a Hugging Face directory.

    The state of a Hugging Face directory is {}. method: 'module:Class' that built the model, where
    the checkpoint names one that is not in projects/.
    """
    is_hf = Path(run, 'config.json').is_file() and record.read_config(run) is None
    if is_hf and not checkpoints.find(run):
        return {}, huggingface.load_hf(run)
    state = checkpoints.read(checkpoints.newest(run))
    shape, model = GPTNeoXConfig(**state['model']['shape']), None
    if state['model']['built_by']:
        Method = methods.find(state['model']['built_by'], method)
        model = Method(Method.Config(**state['config'])).model(shape)
    model = model or GPTNeoX(shape)
    huggingface.load_weights(model, state['model']['weights'], run)
    return state, model


def open_run(run, args):
    """(checkpoint, model, {name: (Source, windows)}) of a run, for commands that evaluate one."""
    state, model = load_run(run, args.method)
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
    data.one_tokenizer(sources, state.get('history', {}).get('tokenizer'))
    for warning in data.limit_ids(sources, model.config.vocab_size):
        print(warning, file=sys.stderr)
    val_sets = {name: (s, data.val_windows(s, windows)) for name, s in sources.items()}
    return state, model.to(args.device), val_sets


def loss_command(args):
    """Print the loss on every validation set, in float32."""
    for name in args.runs:
        state, model, val_sets = open_run(name, args)
        print(f'{name}, step {state.get("progress", {}).get("step", 0):,}')
        batch = max(1, 4096 // model.config.max_position_embeddings)
        for dataset, row in evaluate(model, val_sets, batch, contextlib.nullcontext()).items():
            bpb = f'{row["bpb"]:.4f} bits per byte' if row['bpb'] else 'bytes unknown'
            se = math.nan if row['se'] is None else row['se']
            print(f'  {dataset:<16} {row["loss"]:.4f} ± {se:.4f} nats per token   perplexity '
                  f'{row["ppl"]:.3f}   {bpb}   {len(val_sets[dataset][1])} windows')


def table_command(args):
    groups = by_seed(args.runs)
    text = table(groups)
    print(text)
    if args.out:
        path = Path(args.out)
        require(path.suffix == '.md' and path.stem != 'config', f'--out {path}: expected x.md. '
                'The details go into x.json beside it.')
        write_whole(path, f'{text}\n'.encode())
        details = json.dumps(summary(groups), indent=1) + '\n'
        write_whole(path.with_suffix('.json'), details.encode())


def plot_command(args):
    plot(by_seed(args.runs), args.out, args.labels)
    print(args.out)


def sample_command(args):
    from support.sampling import generate
    state, model = load_run(args.run, args.method)
    tokenizer = tokenizer_of(args.run, state, model, args.tokenizer)
    model.to(args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    # where documents end with an end-of-text, the prompt follows one, as a document does
    prompt = tokenizer.encode(args.prompt).tolist()
    if ends_documents(state) or not prompt:
        prompt = [tokenizer.eot, *prompt]
    ids = torch.tensor([prompt], device=args.device)
    for _ in range(args.samples):
        sample = generate(model, ids, args.tokens, args.temperature, args.top_k, args.top_p,
                          generator)
        known = [i for i in sample[0].tolist() if i < tokenizer.vocab_size]     # no padding
        known = known[1:] if known[0] == tokenizer.eot else known
        print(tokenizer.decode(known), '\n' + '-' * 80)


def ends_documents(state):
    """Whether the data of a run have end-of-text tokens. Where they cannot say: yes."""
    config = state.get('config', {})
    try:
        shards = [shard for name in config.get('train_data', {}) for shard in
                  map(data.open_shard, data.find_shards(name, 'train', config['data_dir'],
                                                        config['paths']))]
    except UserError:                                   # the data are elsewhere
        return True
    return not shards or any(shard.eot is not None for shard in shards)


def tokenizer_of(run, state, model, spec=''):
    """The tokenizer that `spec` names, else the one whose files are in the run folder."""
    from corpora.tokenizer import find_tokenizer, load_tokenizer
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    wanted = state.get('history', {}).get('tokenizer')
    tokenizer = load_tokenizer(spec) if spec else find_tokenizer(wanted, folder)
    rows = model.config.vocab_size
    require(tokenizer.vocab_size <= rows, f'{run}: the model has {rows:,} ids, but the tokenizer '
            f'{tokenizer.name} has {tokenizer.vocab_size:,}. Name another: --tokenizer FOLDER')
    return tokenizer


def export_command(args):
    """Write a Hugging Face directory, with the tokenizer's files if there are any."""
    from corpora.tokenizer import hugging_face_files
    state, model = load_run(args.run, args.method)
    eot, files = 0, {}
    try:
        tokenizer = tokenizer_of(args.run, state, model, args.tokenizer)
        eot, files = tokenizer.eot, hugging_face_files(tokenizer)
    except UserError as error:
        require(not args.tokenizer, str(error))
        print(f'{args.dir} gets no tokenizer: {error}')
    huggingface.save_hf(model, args.dir, eot, files, DTYPES[args.dtype])
    names = sorted(path.name for path in Path(args.dir).iterdir())
    print(f'{args.dir}: {model.num_params():,} parameters in {args.dtype}; {", ".join(names)}')
    length, context = model.config.max_position_embeddings, state.get('history', {}).get('context')
    if context and context > length:
        print(f'NOTE: it takes sequences of {length:,} tokens, as this stage was trained. The '
              f'weights were trained on windows of {context:,} before: to keep that length, edit '
              'max_position_embeddings in config.json, and compare the losses.')


def main(argv):
    processes.tolerate_streams()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    found = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    devices = [name for name in found if found[name]] + ['cpu']
    device = 'cuda' if found['cuda'] else 'cpu'

    def add(name, command, what, loads_a_model=True):
        p = commands.add_parser(name, help=what)
        p.set_defaults(command=command)
        if loads_a_model:
            p.add_argument('--method', default='', help='module:Class that built the model, if it '
                           'is not in projects/')
        return p

    def evaluation(name, command, what):
        """A command that opens runs and their validation sets: see open_run."""
        p = add(name, command, what)
        p.add_argument('runs', nargs='+')
        p.add_argument('--sets', nargs='+', help='sources to evaluate on (default: as in the run)')
        p.add_argument('--windows', type=int, help='of each; 0: all (default: as in the run)')
        p.add_argument('--data_dir')
        p.add_argument('--device', default=device, choices=devices)

    evaluation('loss', loss_command, 'loss on validation sets')

    p = add('table', table_command, 'comparison as Markdown', loads_a_model=False)
    p.add_argument('runs', nargs='+')
    p.add_argument('--out', help='x.md; x.json gets the details')

    p = add('plot', plot_command, 'forgetting curves', loads_a_model=False)
    p.add_argument('runs', nargs='+')
    p.add_argument('--out', default='out/forgetting.png')
    p.add_argument('--labels', nargs='+', default=(), help='names of the rows, in their order')

    p = add('sample', sample_command, 'generate text')
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

    p = add('export', export_command, 'write a Hugging Face directory')
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
