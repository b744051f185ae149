"""How long a command will take: a list of its stages before the first begins, and --plan.

Nobody needs this to understand a run.
"""
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import data
from configurator import UserError
from model import GPTNeoXConfig
from support.processes import is_first, pick, say, world_size


def list_stages(stages):
    """Say what a command of several stages will train, the oldest first."""
    if len(stages) < 2 or not is_first():
        return
    speed, shape = flops_per_second(stages[-1].cfg), None
    say('This command trains these stages, the oldest first:')
    for number, (cfg, origin, method_class) in enumerate(stages, 1):
        shape = shape or shape_of(cfg)
        with torch.device('meta'):
            model = method_class(cfg).model(shape)
        tokens = cfg.max_steps * cfg.batch_size * cfg.block_size
        hours = tokens * model.flops_per_token() / speed / 3600 / world_size()
        say(f'  {number}  {cfg.out_dir}: {model.num_params():,} parameters, '
            f'{cfg.max_steps:,} steps, {tokens:,} tokens, at least {in_words(hours)} here')


def shape_of(cfg):
    """The shape of a model from scratch, as far as it is known before the data are opened."""
    size = GPTNeoXConfig.pythia(cfg.pythia) if cfg.pythia else cfg
    vocab_size = cfg.vocab_size or vocabulary(cfg)
    return GPTNeoXConfig(vocab_size=vocab_size, hidden_size=size.hidden_size,
                         num_hidden_layers=size.num_hidden_layers,
                         num_attention_heads=size.num_attention_heads, rotary_pct=cfg.rotary_pct,
                         max_position_embeddings=cfg.block_size)


def vocabulary(cfg):
    """Rows of the embeddings that the data need. Built-in corpora that are made later are bytes."""
    rows = 257
    for name in cfg.train_data:
        try:
            files = data.find_shards(name, 'train', cfg.data_dir, cfg.paths)
            rows = max([rows, *(data.open_shard(file).vocab_size or 50304 for file in files)])
        except UserError:
            continue
    return -(-rows // 128) * 128


def flops_per_second(cfg):
    """What the matrix products of this device reach, measured in a fraction of a second."""
    device, dtype = pick(cfg.device, cfg.dtype)
    size = 1024 if device == 'cpu' else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        if device == 'cuda':
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / max(time.perf_counter() - began, 1e-9))
    return best


def in_words(hours):
    if hours < 1 / 60:
        return 'seconds'
    return f'{60 * hours:,.0f} minutes' if hours < 1 else f'{hours:,.1f} hours'


# ------------------------------------------------------------------------------
# python train.py CONFIG --plan

def plan(stages, train):
    """Train five steps of every stage, from random weights, and say how long all will take."""
    total = 0
    for cfg, origin, method_class in stages:
        with tempfile.TemporaryDirectory() as folder:
            few = replace(cfg, out_dir=folder, init_from='', branch_from='', old_data=[],
                          keep_optimizer=False, continue_data=False, switches=[], milestones=[],
                          max_steps=5, schedule='constant', warmup=0.0, log_every=1,
                          save_every=10**9, eval_every=10**9, mirror='')
            began = time.perf_counter()
            train(few, origin, method_class)
            rows = [json.loads(line) for line in Path(folder, 'metrics.jsonl').open()]
            took = time.perf_counter() - began
        speeds = sorted(row['tokens_per_s'] for row in rows if row['event'] == 'train')
        per_step = cfg.batch_size * cfg.block_size / speeds[len(speeds) // 2]
        # what is left of the time are two evaluations, one checkpoint, and the start
        evaluation = max(0, took - sum(cfg.batch_size * cfg.block_size / s for s in speeds)) / 2
        hours = (cfg.max_steps * per_step + cfg.max_steps / cfg.eval_every * evaluation) / 3600
        total += hours
        say(f'{cfg.out_dir}: {per_step:.3f} s a step, so {cfg.max_steps:,} steps take about '
            f'{in_words(hours)} here')
    if len(stages) > 1:
        say(f'all {len(stages)} stages: about {in_words(total)}')
