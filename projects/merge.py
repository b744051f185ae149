"""Weights made of other weights: averages of checkpoints, points between two models, sums.

    python -m projects.merge average out/a --steps 855 870 885 900 --weights mean --out out/b
    python -m projects.merge interpolate out/old out/new --amount 0.5 --out out/half
    python -m projects.merge add BASE CHAT CONTINUED --out out/continued_chat

A model is a run folder, a checkpoint or a Hugging Face directory. --out becomes a run folder that
every command takes. Its record is that of the last model, with the losses of the merged weights at
the end. Nothing is trained, so this takes seconds.

average (WSM, Tian et al. 2025, arXiv:2507.17634) is for checkpoints at a constant rate, equally far
apart. It stands for a decay of the rate: let theta_j = theta_(j-1) - g_j, and let the weights
c_0 + ... + c_k be 1. Then

    sum_j c_j theta_j = theta_0 - sum_i w_i g_i     where w_i = c_i + c_(i+1) + ... + c_k,

so the steps between two checkpoints count as if their rate had been w_i times as high. A wished-for
decay 1 = w_0 >= w_1 >= ... >= w_(k+1) = 0 gives c_j = w_j - w_(j+1). A plain mean is the linear
decay. One thing differs: a real decay would also have changed the gradients that follow.

interpolate (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903): old + amount (new - old).

add (Chat Vector, Huang et al. 2024, arXiv:2310.04799): continued + (chat - base) gives a base model
that was pre-trained further what its chat version has learned.

Expect (three seeds): the mean of the last 45 steps of an infinite main line is as good as an anneal
over them, 1.504 against 1.506 on docs, and costs nothing (results/release_by_average). On the way
from the old model to the new one, the mean of both losses falls from 1.626 and 1.641 to 1.494. With
5% replay it is 1.463, and 1.434 after going two fifths of the way back (results/interpolation).
"""
import argparse
import json
import secrets
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import eval
from configurator import UserError, require
from corpora.tokenizer import tokenizer_files
from schedules import DECAYS
from support import checkpoints, fast_path, processes, record
from support.files import write_whole


def average_weights(kind, n, alpha=0.2):
    """The weights of n checkpoints, the oldest first. They add up to 1.

    kind: 'mean'; 'ema', average = (1 - alpha) average + alpha checkpoint; or one of DECAYS.
    """
    if kind == 'mean':
        return [1 / n] * n
    if kind == 'ema':
        return [(1 - alpha)**(n - 1)] + [alpha * (1 - alpha)**(n - 1 - j) for j in range(1, n)]
    rates = [float(DECAYS[kind](i / n)) for i in range(n + 1)]          # w_0 = 1, ..., w_n = 0
    return [rate - later for rate, later in zip(rates, rates[1:])]


def combine(parts):
    """The sum of factor * weights over [(factor, model), ...] -> (checkpoint, GPTNeoX).

    It is computed in float64, with one model in memory at a time. The checkpoint is that of the
    last model: what it was trained on, and at which step it is.
    """
    total, first = {}, None
    for factor, path in parts:
        state, model = eval.load_run(path)
        shape = asdict(model.config) | {'max_position_embeddings': 0}   # windows may differ
        first = first or shape
        for name, value in shape.items():
            require(value == first[name], f'{path}: {name} is {value!r}, but {first[name]!r} in '
                    f'{parts[0][1]}. Only models of one shape can be merged.')
        for name, weight in model.state_dict().items():
            total[name] = total.get(name, 0) + factor * weight.double()
    model.load_state_dict(total)                                        # rounds to float32
    return state, model


def merge(parts, out):
    """Write a run folder of the merged weights, whole or not at all."""
    out, last = Path(out), Path(parts[-1][1])
    require(not out.exists(), f'--out {out} exists already. Choose another, or delete it.')
    state, model = combine(parts)
    partial = out.with_name(f'{out.name}.rewarm-partial')
    shutil.rmtree(partial, ignore_errors=True)
    step, run_id = state.get('progress', {}).get('step', 0), secrets.token_hex(6)
    if state.get('stage'):                              # not of weights from elsewhere
        state['stage'] = state['stage'] | {'id': run_id}
    checkpoints.save_weights(partial / f'ckpt_{step:08d}.pt', model, state)
    parent = last if last.is_dir() else last.parent
    for name, path in tokenizer_files(parent).items():
        write_whole(partial / name, path.read_bytes())
    about = record.read_config(parent)
    if about and about['config']['val_data']:           # else there is no record of losses
        factors, models = zip(*parts)
        about['config'] |= {'out_dir': str(out), 'label': '', 'factors': factors,
                            'merged': [str(path) for path in models]}
        about['derived']['last_step'] = step
        whole = json.dumps(about | record.provenance() | {'run': run_id}, indent=1)
        write_whole(partial / 'config.json', whole.encode())
        write_record(partial, parent, about['derived'], step, run_id)
    partial.rename(out)


def write_record(folder, parent, derived, step, run_id):
    """metrics.jsonl: that of the parent up to the step of the weights, and then their losses."""
    # evaluated as by train.py, to the last bit
    device = processes.pick_device('auto')
    dtype = getattr(torch, derived['dtype'].removeprefix('torch.'))
    options = argparse.Namespace(sets=None, windows=None, data_dir=None, device=device, method='')
    _, model, val_sets = eval.open_run(folder, options)
    fast_path.choose(model, 'auto', device, dtype)
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    val = eval.evaluate(model, val_sets, derived['micro_batch_size'], autocast)
    print(record.in_one_line(val))

    rows = [row for row in record.read_rows(parent / 'metrics.jsonl')
            if row['step'] < step or row['event'] == 'start']
    tokens = step * derived['tokens_per_step']
    rows.append({'event': 'eval', 'step': step, 'tokens': tokens, 'val': val})
    lines = ''.join(json.dumps(row | {'run': run_id}) + '\n' for row in rows)
    write_whole(folder / 'metrics.jsonl', lines.encode())


def find_checkpoints(models, steps):
    """The models to average: those given, or the checkpoints of one run at these steps."""
    if steps:
        require(len(models) == 1, f'--steps are those of one run, but there are {len(models)}.')
        found = checkpoints.find(models[0])
        missing = sorted(set(steps) - set(found))
        require(not missing, f'{models[0]} has no checkpoints of steps {missing}, but of '
                f'{list(found)}. Train it with --milestones="{steps}".')
        models = [found[step] for step in sorted(set(steps))]
    require(len(models) > 1, 'an average needs two checkpoints or more.')
    return models


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest='command')
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument('--out', required=True, help='the run folder to write')
    p = commands.add_parser('average', parents=[out])
    p.add_argument('models', nargs='+', help='from the oldest to the newest; one run with --steps')
    p.add_argument('--steps', type=int, nargs='+', help='of the checkpoints of one run')
    p.add_argument('--weights', default='mean', choices=['mean', 'ema', *DECAYS])
    p.add_argument('--alpha', type=float, default=0.2, help='ema: the share of a new checkpoint')
    p = commands.add_parser('interpolate', parents=[out])
    p.add_argument('models', nargs=2, metavar=('OLD', 'NEW'))
    p.add_argument('--amount', type=float, required=True, help='0: the old model, 1: the new one')
    p = commands.add_parser('add', parents=[out])
    p.add_argument('models', nargs=3, metavar=('BASE', 'CHAT', 'CONTINUED'))
    args = parser.parse_args(argv)

    if args.command == 'average':
        require(0 < args.alpha <= 1, f'--alpha {args.alpha}: expected above 0, up to 1.')
        models = find_checkpoints(args.models, args.steps)
        factors = average_weights(args.weights, len(models), args.alpha)
    elif args.command == 'interpolate':
        require(-1 <= args.amount <= 2, f'--amount {args.amount}: expected 0 to 1, or up to one '
                'difference beyond either model.')
        models, factors = args.models, [1 - args.amount, args.amount]
    else:
        models, factors = args.models, [-1, 1, 1]
    merge(list(zip(factors, models)), args.out)
    for factor, model in zip(factors, models):
        print(f'{factor:+.3f} {model}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'projects.merge: {error}')
