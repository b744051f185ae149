"""Errors that are told before anything is trained: knobs by themselves, and what out_dir holds.

Nobody needs this to understand a run.
"""
import dataclasses
import inspect
from dataclasses import asdict
from pathlib import Path

import data
import schedules
from configurator import require, typed
from support import checkpoints, methods, record, rehearsal
from support.files import PARTIAL
from support.processes import (from_first, is_first, local_world_size, pick_device, world_size)

# Knobs of this machine, which the stages before take over from the command line.
MACHINE = ('data_dir', 'device', 'dtype', 'kernels', 'compile', 'parallel',
           'checkpoint_activations')
# Knobs that may change when a run is resumed: they do not change what is computed.
FREE = (*MACHINE, 'out_dir', 'paths', 'micro_batch_size', 'label', 'eval_every', 'log_every',
        'save_every', 'mirror')
AT_LEAST_1 = ('block_size', 'batch_size', 'micro_batch_size', 'max_steps', 'eval_every',
              'log_every', 'save_every')
SWITCH_KEYS = {'step', 'lr_below', 'train_data', 'replay_data', 'replay'}


def check_knobs(cfg, origin):
    """UserError for the first thing that is wrong with a config by itself, whatever the data."""
    for knob, value in asdict(cfg).items():
        if isinstance(value, (int, float)):
            low = 1 if knob in AT_LEAST_1 else 0
            require(low <= value < 2**63, f'{knob} = {value}: expected {low} to 2^63.')
    require(cfg.batch_size <= 10**6, f'batch_size = {cfg.batch_size}: expected at most a million.')
    require(cfg.beta1 < 1 and cfg.beta2 < 1 and cfg.eps > 0, 'beta1 and beta2 must be below 1, and '
            'eps above 0.')
    require(cfg.train_data, "train_data is empty. Say what to train on: train_data = {'docs': 1.0}")
    require(not (cfg.init_from and cfg.branch_from), 'init_from and branch_from are both set. A '
            'run starts one way.')
    require(not cfg.old_data or (cfg.init_from and not cfg.init_from.endswith('.py')), 'old_data '
            'says what weights from elsewhere have seen, but this run has none: drop it.')
    sizes = [knob for knob in ('hidden_size', 'num_hidden_layers', 'num_attention_heads')
             if origin[knob] != 'default']
    require(not (cfg.pythia and sizes), f'pythia = {cfg.pythia!r} sets {", ".join(sizes)} too. '
            'Give one or the other.')
    require(cfg.parallel == 'ddp' or pick_device(cfg.device) != 'mps', "parallel = 'fsdp' does not "
            "run on mps. Use 'ddp'.")
    require(all(0 <= step <= cfg.max_steps for step in cfg.milestones),
            f'milestones = {cfg.milestones}: expected steps from 0 to max_steps.')
    if cfg.mirror:
        record.find_mirror(cfg.mirror)
    check_batch(cfg)
    check_effects(cfg, origin)


def settled(cfg, origin, last):
    """The config of a stage before, with what the command line of the last stage sets for all.

    That are the knobs of the machine, whether it is a rehearsal, and those paths that the stage
    before reads too. -> (config, origin)
    """
    def is_given(knob):
        return last.origin[knob].startswith('--')

    machine = {knob: getattr(last.cfg, knob) for knob in MACHINE if is_given(knob)}
    if is_given('paths'):
        ours = wanted(cfg)
        machine['paths'] = cfg.paths | {key: files for key, files in last.cfg.paths.items()
                                        if key in ours}
    cfg = dataclasses.replace(cfg, **machine, rehearse=last.cfg.rehearse)
    return rehearsal.shrink(cfg, origin)


def check_stages(stages):
    """UserError for the first thing that is wrong with the stages of a command."""
    last = stages[-1].cfg
    unused = set(last.paths).difference(*(wanted(stage.cfg) for stage in stages))
    require(not unused or last.branch_from, f'paths: {sorted(unused)} is read by no stage. They '
            f'read {", ".join(sorted(set().union(*(wanted(stage.cfg) for stage in stages))))}.')
    for stage in stages:
        check_knobs(stage.cfg, stage.origin)
        check_data(stage.cfg)


def check_batch(cfg):
    """UserError unless a batch divides among the processes."""
    require(world_size() % local_world_size() == 0, f'{world_size()} processes do not divide among '
            f'nodes of {local_world_size()}. Start as many on every node.')
    share, rest = divmod(cfg.batch_size, world_size())
    require(rest == 0, f'batch_size = {cfg.batch_size} does not divide among {world_size()} '
            f'processes. The nearest that do are {max(1, share) * world_size()} and '
            f'{(share + 1) * world_size()}.')


def check_data(cfg):
    """UserError for everything about data that can be wrong before any stage is trained."""
    for name, patterns in cfg.paths.items():
        patterns = patterns if isinstance(patterns, list) else [patterns]
        require(all(isinstance(pattern, str) for pattern in patterns),
                f'paths[{name!r}] = {patterns}: expected a pattern, or a list of them.')
    for switch in cfg.switches:
        when = switch.get('step', switch.get('lr_below'))
        is_switch = isinstance(when, (int, float)) and abs(when) < 2**63
        is_one_change = len({'step', 'lr_below'} & set(switch)) == 1 < len(switch)
        require(is_switch and is_one_change and set(switch) <= SWITCH_KEYS, f"switches: {switch} "
                "needs either 'step' or 'lr_below', and what changes: train_data, replay_data or "
                'replay.')
        for knob in ('train_data', 'replay_data'):
            typed(f'{knob} of a switch', dict[str, float], switch.get(knob, {}))

    # a branch has its switches behind its first step, and the sources of the run that it continues
    lr = schedules.of(cfg)
    if not cfg.branch_from:
        data.plan_mixes(cfg, lr, 0)
    from corpora import embedded
    for key in sorted(wanted(cfg)):
        name, _, split = key.rpartition('/')
        is_made_later = name in embedded.EMBEDDED and not Path(cfg.data_dir, name).exists()
        if key in cfg.paths or not is_made_later:
            data.find_shards(name, split, cfg.data_dir, cfg.paths)


def make_corpora(cfg):
    """Make those built-in corpora that a config reads. The first process makes them for all."""
    from corpora import embedded
    if is_first():
        embedded.make({key.rpartition('/')[0] for key in wanted(cfg)}, cfg.data_dir, cfg.paths)
    from_first()


def wanted(cfg):
    """{'source/split', ...} that a config reads."""
    trained = set()
    for switch in [{}, *cfg.switches]:
        knobs = {knob: switch.get(knob, getattr(cfg, knob))
                 for knob in ('train_data', 'replay_data', 'replay')}
        trained |= {name for name, share in data.mix_weights(**knobs).items() if share}
    return {f'{name}/train' for name in trained} | {f'{name}/val' for name in cfg.val_data}


def check_effects(cfg, origin):
    """UserError for a knob that changes nothing, which the user surely did not want."""
    known = set().union(*(schedules.knobs_of(name) for name in schedules.SCHEDULES))
    takes, order = schedules.knobs_of(cfg.schedule), list(origin)

    # what an earlier file says for another schedule is left aside
    def is_meant(knob, other):
        here, there = origin[knob].rpartition(':')[0], origin[other].rpartition(':')[0]
        return origin[knob] != 'default' and (here == there
                                              or order.index(knob) > order.index(other))
    for knob in known & set(origin) - set(takes):
        require(not is_meant(knob, 'schedule'), f'{knob} has no effect, since schedule = '
                f'{cfg.schedule!r} does not take it ({origin[knob]}). Drop it.')

    starts = cfg.init_from or cfg.branch_from
    has_replay = cfg.replay or any(switch.get('replay') for switch in cfg.switches)
    is_project = len(type(cfg).__mro__) > 2             # it may read replay_data by itself
    idle = {'keep_optimizer': cfg.keep_optimizer and not cfg.init_from and 'without init_from',
            'continue_data': cfg.continue_data and not starts and 'in a run from scratch',
            'replay_order': cfg.replay_order != 'first-seen' and not has_replay and
            'without replay',
            'replay_data': cfg.replay_data and not has_replay and not is_project and
            'while replay is 0'}
    for knob, why in idle.items():
        # replay may have been on in the file that names them, and be off since
        replay = max('replay', 'switches', key=order.index)
        other = replay if knob == 'replay_data' else knob
        require(not (why and is_meant(knob, other)), f'{knob} has no effect {why or ""} '
                f'({origin[knob]}). Drop it.')


def check_own_knobs(Config):
    """UserError when a project's class of knobs declares one that exists already."""
    *own, plain, _ = Config.__mro__                     # the last two: train.Config and object
    for cls in own:
        clash = set(inspect.get_annotations(cls)) & {knob.name for knob in
                                                     dataclasses.fields(plain)}
        require(not clash, f'{cls.__module__}: the knobs {sorted(clash)} exist in train.py '
                'already. Choose other names.')


# ------------------------------------------------------------------------------
# What out_dir holds

def is_finished(cfg, Method):
    """Whether a run has been trained and evaluated to its last step. UserError if it is another."""
    finished = False
    if is_first() and Path(cfg.out_dir).is_dir():
        run_id = check_out_dir(cfg, Method)
        rows = record.read_rows(Path(cfg.out_dir, 'metrics.jsonl'))
        last = 'eval', cfg.max_steps, run_id
        is_evaluated = any((row['event'], row['step'], row['run']) == last for row in rows)
        finished = is_evaluated and checkpoints.path_of(cfg.out_dir, cfg.max_steps).exists()
    return from_first(finished)


def check_out_dir(cfg, Method):
    """The id of the run that out_dir holds, or None. UserError if it is another run, or no run."""
    folder = Path(cfg.out_dir)
    others = [path.name for path in folder.iterdir() if not path.name.endswith(PARTIAL)]
    found, about = checkpoints.find(folder), record.read_config(folder)
    # a run that was killed as it began has its first row, and no config.json yet
    has_begun = others == ['metrics.jsonl'] and len(record.read_rows(folder / others[0])) == 1
    require(found or about or has_begun or not others, f'out_dir {folder} contains '
            f'{others[:1]}, which no run has written. Choose another out_dir.')
    if not found and not about:
        return None

    # a checkpoint knows best; config.json may have been edited
    if found:
        state = checkpoints.newest_whole(folder)[1]
        require(state['stage'], f'{folder} holds weights that were not trained there. Choose '
                'another out_dir, and init_from for these.')
        theirs, trained_by, run_id = state['config'], state['stage']['method'], state['stage']['id']
    else:
        theirs, trained_by, run_id = about['config'], about['derived']['method'], about['run']
    ours = asdict(cfg)
    free = set(FREE)
    if methods.replaces(Method, 'after_evaluation'):
        free -= {'eval_every'}                          # there it decides when the Method acts
    differ = [f'  {knob}: {theirs.get(knob, "unknown")!r} there, {ours.get(knob, "unknown")!r} now'
              for knob in {**theirs, **ours} if knob not in free
              and theirs.get(knob, 'unknown') != ours.get(knob, 'unknown')]
    if trained_by != methods.name_of(Method):
        differ.append(f'  the method: {trained_by} there, {methods.name_of(Method)} now (Parent of '
                      'a Method says which trains the stages before)')
    require(not differ, '\n'.join([f'{folder} holds a run of another config:', *differ,
            'Choose another out_dir, or delete that run.']))

    # a record without a checkpoint is of a run that was killed early, or its checkpoints are gone
    rows = [row for row in record.read_rows(folder / 'metrics.jsonl') if row['run'] == run_id]
    steps = rows[-1]['step'] - rows[0]['step'] if rows else 0
    require(found or steps <= theirs['save_every'], f'{folder} holds the record of {steps:,} '
            'steps, but no checkpoint. To train the run again, delete it.')
    return run_id
