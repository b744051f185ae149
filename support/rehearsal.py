"""--rehearse: any config in minutes, on two cores and without a network, and all it builds on.

Nobody needs this to understand a run. The schedule, the switches and the milestones keep their
shape: all numbers of steps are divided by one factor. The model is a tiny one, and where data are
missing, built-in corpora play them: `docs` for what the first stage reads, `code` for what is new.
A rehearsal shows that a config runs and what its curve looks like. Its losses mean nothing.
"""
from dataclasses import replace
from pathlib import Path

import configurator
import data
from configurator import UserError
from support.processes import from_first, is_first, say, world_size

STEPS = 200                             # of a stage
SHAPE = {'pythia': '', 'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2,
         'vocab_size': 0, 'block_size': 64}
PARENT = 'config/pretrain_pile.py'      # in the place of weights that are not there


def folder(out_dir):
    """Where the rehearsal of a run is kept."""
    name = Path(out_dir)
    parts = name.parts[1:] if name.parts[:1] == ('out',) else (name.name,)
    return str(Path('out', 'rehearsal', *parts))


def shrink(cfg, origin):
    """(the config of a rehearsal, and where its knobs were set), unless none is asked for."""
    if not cfg.rehearse:
        return cfg, origin
    factor = STEPS / cfg.max_steps

    def fewer(steps):
        """A number of steps, divided by the factor. A fraction of the run stays one."""
        return steps if steps < 1 else type(steps)(max(1, round(steps * factor)))

    def in_switch(switch):
        return switch | {'step': fewer(switch['step'])} if 'step' in switch else switch

    batch_size = max(8, world_size())
    changed = {'out_dir': folder(cfg.out_dir), 'batch_size': batch_size,
               'micro_batch_size': batch_size, 'max_steps': STEPS, 'compile': False,
               'eval_every': STEPS // 10, 'eval_windows': 32, 'log_every': 5, 'save_every': STEPS,
               'milestones': sorted({fewer(step) for step in cfg.milestones}),
               'switches': [in_switch(switch) for switch in cfg.switches]}
    for knob in ('warmup', 'decay', 'cooldown', 'anneal'):
        changed[knob] = fewer(getattr(cfg, knob))
    # a tiny model takes higher rates than a large one
    factor_of_rates = max(1, 3e-3 / cfg.learning_rate)
    for knob in ('learning_rate', 'min_lr', 'constant_lr'):
        changed[knob] = getattr(cfg, knob) * factor_of_rates

    # a new stage takes the shape of its old model
    starts = cfg.init_from or cfg.branch_from
    if starts and not starts.endswith('.py'):
        say(f'rehearsal: {PARENT} plays {starts}')
        changed |= {'init_from': PARENT, 'branch_from': '', 'old_data': []}
    changed |= {'pythia': '', 'vocab_size': 0} if starts else SHAPE
    origin = origin | dict.fromkeys(SHAPE, 'default' if starts else 'rehearsal')
    cfg = replace(cfg, **changed)
    return replace(cfg, paths=cast(cfg)), origin | {'pythia': 'default'}


def cast(cfg):
    """The paths of a rehearsal: built-in corpora in the place of data that are not there."""
    from corpora import embedded
    from support.checks import wanted
    missing = set()
    for key in wanted(cfg):
        name, _, split = key.rpartition('/')
        try:
            data.find_shards(name, split, cfg.data_dir, cfg.paths)
        except UserError:
            missing.add(name)
    if not missing - set(embedded.EMBEDDED):
        return cfg.paths

    # one tokenizer for all: what is there does not play either
    if is_first():
        embedded.make({'docs', 'code'}, cfg.data_dir, {})
    from_first()
    paths, old = {}, old_names(cfg)
    for key in sorted(wanted(cfg)):
        name, _, split = key.rpartition('/')
        is_old = any(data.teaches(other, name) or data.teaches(name, other) for other in old)
        player = 'docs' if is_old else 'code'
        paths[key] = str(Path(cfg.data_dir, player, f'{split}_*.bin'))
    return paths


def old_names(cfg):
    """The sources of the first stage, and those that a config says are old."""
    starts = cfg.init_from or cfg.branch_from
    old = {*cfg.replay_data, *cfg.old_data}
    if not starts:
        return {*old, *cfg.train_data}
    if starts.endswith('.py'):
        old |= old_names(configurator.load(type(cfg), [starts])[0])
    return old
