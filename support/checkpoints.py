"""Checkpoints: what they contain, and how they are written, found and read.

Nobody needs this to understand a run. A crash at any moment leaves the older checkpoints usable,
damage is noticed when one is read, and no code in a file is ever run.
"""
import errno
import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

import configurator
from configurator import UserError, require, typed
from model import GPTNeoXConfig
from support import huggingface, parallel, rehearsal
from support.files import PARTIAL
from support.processes import from_first, is_first, say

# What a checkpoint contains, with types. TAKES in train.py says which parts each start takes along.
CONTENTS = {
    'model': {
        'shape': dict,                  # the fields of GPTNeoXConfig
        'built_by': str,                # the Method whose model() built it; '': a plain GPTNeoX
        'weights': dict,                # {name: tensor}
    },
    'history': {
        'sources': dict[str, dict],     # what all stages so far have read of each: see data.Plan
        'tokenizer': object,            # hash as in the headers of shards, or None
        'context': int,                 # tokens of the longest windows that it was trained on
    },
    'optimizer': {
        'kind': str,                    # its class
        'moments': dict[str, dict],     # {name of a parameter: {'exp_avg': tensor, ...}}
        'groups': list[dict],           # what it has changed in its parameter groups
        'scaler': dict,                 # of fp16; else empty
        'method': dict,                 # what Method.state_dict() returned
        'trained': dict,                # weights, where Method.weights() released others
    },
    'progress': {
        'step': int,
        'seed': int,
        'batch_size': int,
        'mixes': list,                  # [(first sample, {source: weight as a fraction}), ...],
                                        # those that have begun
        'skips': dict[str, int],        # {source: samples that earlier stages took}
    },
    'stage': {
        'id': str,                      # of the run, made when it began
        'method': str,                  # how it is trained
        'parent': dict,                 # what it started from
        'start_step': int,
        'mixes': list,                  # those that are still to come
        'roles': dict[str, str],        # {validation set: 'old data', ...}
        'val_prints': dict[str, str],   # {validation set: fingerprint}
        'first': dict,                  # the row of its first evaluation
        'noted': dict,                  # what was logged since the last row
    },
    'config': dict,                     # all knobs, as they were given
}
PARTS = ('model', 'history', 'optimizer', 'progress', 'stage')


class Damaged(UserError):
    """A checkpoint that fails its own checksums."""


# ------------------------------------------------------------------------------
# Finding and reading

def path_of(folder, step):
    return Path(folder, f'ckpt_{step:08d}.pt')


def find(folder):
    """{step: path} of a run folder, rising."""
    found = {}
    for path in sorted(Path(folder).glob('ckpt_*.pt')):
        if re.fullmatch(r'ckpt_\d{8}\.pt', path.name):
            found[int(path.stem[5:])] = path
    return found


def newest(run):
    """The path of a checkpoint, or of the newest one in a run folder."""
    if Path(run).is_file():
        return Path(run)
    found = find(run)
    require(found, f'{run}: there is no checkpoint (ckpt_*.pt)')
    return found[max(found)]


def newest_whole(folder):
    """The newest checkpoint that is not damaged, as (path, state), or (None, None) without any."""
    found = find(folder)
    for path in reversed(found.values()):
        try:
            return path, read(path)
        except Damaged as error:
            say(f'{error} Trying an older checkpoint.')
    require(not found, f'{folder}: no checkpoint is whole. To train the run again, delete it.')
    return None, None


def to_resume(folder):
    """The path of a run's newest whole checkpoint, or None. The first process looks for all."""
    return from_first(str(newest_whole(folder)[0] or '') if is_first() else '') or None


def locate(cfg):
    """What init_from or branch_from stands for: the path of a checkpoint or of weights, or None.

    The first process looks for all: a run that is still training may save between two looks.
    """
    name = cfg.init_from or cfg.branch_from
    if not name:
        return None
    if name.endswith('.py'):                            # a config, which was trained before
        name = configurator.load(type(cfg), [name])[0].out_dir
        name = rehearsal.folder(name) if cfg.rehearse else name
    if is_first() and (Path(name).is_file() or find(name)):
        name = str(newest(name))
    return from_first(name)


def read_start(path, way):
    """The checkpoint that a stage starts from; of a Hugging Face directory, the parts it has."""
    empty = {part: {} for part in PARTS}
    if path is None:
        return empty
    if Path(path).is_file():
        return read(path, verify=is_first())            # whose checksums the first reads for all
    require(way == 'init_from' and Path(path, 'config.json').exists(), f'{way}: {path} is no run '
            'with a checkpoint, no checkpoint, and init_from takes a Hugging Face directory too.')
    found = huggingface.read(path)
    context = found['shape']['max_position_embeddings']
    return empty | {'model': found,
                    'history': {'sources': {}, 'tokenizer': None, 'context': context}}


def in_short(state, path):
    """What the record of a run says of the checkpoint that it started from."""
    if path is None:
        return {}
    about = {'path': path, 'context': state['history']['context']}
    if state['stage']:
        about |= {'run': state['stage']['id'], 'method': state['stage']['method'],
                  'step': state['progress']['step'],
                  'max_steps': state['config'].get('max_steps', 0)}
    return about


verified = {}                           # {path: size and time of the last change}, by this process


def read(path, verify=True):
    """A checkpoint as plain values; its tensors stay in the file until they are used.

    Damaged when its checksums fail; no code in it is run. torch.load alone misses flipped bits; the
    checksums of the zip that torch.save writes do not. verify: read them, once in a process.
    """
    try:
        print_now = os.path.getsize(path), os.stat(path).st_mtime_ns
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress; a small file that grows to gigabytes is not from it. Of
            # a tensor that is marked as a folder, torch.load would read nothing.
            odd = [entry.filename for entry in archive.infolist()
                   if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 16]
            if not odd and verify and verified.get(str(path)) != print_now:
                odd = [archive.testzip()]
        if odd and odd[0]:
            raise Damaged(f'{path}: {odd[0]} fails its checksum.')
        verified[str(path)] = print_now
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        raise Damaged(f'{path}: truncated or damaged ({error}).')
    except (OSError, MemoryError) as error:
        # EINVAL: the zip's directory points to before the beginning of the file
        is_damaged = isinstance(error, OSError) and error.errno == errno.EINVAL
        kind = Damaged if is_damaged else UserError
        raise kind(f'{path}: cannot be read ({error!r}). Nothing was changed.')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except (pickle.UnpicklingError, AttributeError, KeyError, ValueError, TypeError):
        raise UserError(f'{path}: refused. It holds more than tensors and plain values, or is not '
                        'a checkpoint of train.py.')
    except (OSError, RuntimeError, MemoryError) as error:
        # torch sees damage in the zip's directory that Python overlooks
        is_damaged = 'StreamReader' in str(error) and 'read failed' not in str(error)
        kind = Damaged if is_damaged else UserError
        raise kind(f'{path}: cannot be loaded ({error!r:.200}). Nothing was changed.')
    check(path, state)
    return state


def check(path, state):
    """UserError unless a file that may come from anywhere has the contents of a checkpoint."""
    try:
        for part in PARTS:
            typed(part, dict, state[part])
            for key, kind in CONTENTS[part].items() if state[part] else []:
                require(key in state[part], f'{key} of {part} is missing')
                typed(key, kind, state[part][key])
        typed('config', dict, state['config'])
        require(state['model'] and state['history'], 'the model or its history is missing')
        state['model']['shape'] = asdict(GPTNeoXConfig(**state['model']['shape']))
        for seen in state['history']['sources'].values():
            for key, kind in SEEN.items():
                typed(key, kind, seen[key])
        if state['progress'] and state['stage']:
            check_progress(state['progress'], state['stage'])
        plain = [state['config'], state['history'], state['progress'], state['stage']]
        json.dumps(plain)                               # plain values, and no tensors
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f'{path}: not a checkpoint of this version of train.py: {error!s:.300}')


SEEN = {'order': str, 'read': int, 'replayed': int, 'windows': str}


def check_progress(progress, stage):
    require(0 <= stage['start_step'] <= progress['step'] < 2**31, 'its step is out of range')
    require(1 <= progress['batch_size'] <= 10**6, 'its batch_size is out of range')
    require(all(0 <= skip < 2**62 for skip in progress['skips'].values()), 'a skip is out of range')
    before = -1
    for first_sample, weights in [*progress['mixes'], *stage['mixes']]:
        typed('mixes', int, first_sample)
        require(before < first_sample < 2**62 and (before >= 0 or first_sample == 0),
                'its mixes do not rise from sample 0')
        before = first_sample
        for weight in typed('mixes', dict[str, str], weights).values():
            require(re.fullmatch(r'\d{1,200}(/[1-9]\d{0,199})?', weight), f'{weight!r:.50} is no '
                    'weight of a source')
        require(any(int(weight.split('/')[0]) for weight in weights.values()), 'a mix is empty')
    require(before >= 0, 'there are no mixes')


# ------------------------------------------------------------------------------
# Writing

def save(cfg, state):
    """Write a checkpoint of a run. The newest two stay, and the milestones.

    All processes call it, and the first one writes.
    """
    if not is_first():
        return
    step, folder = state['progress']['step'], cfg.out_dir
    require(all(t.isfinite().all() for t in state['model']['weights'].values()), f'step {step}: '
            'the weights contain NaN or infinity, so they are not saved. Resume from an older '
            f'checkpoint in {folder} with a lower learning_rate.')
    write(path_of(folder, step), state)
    # what is newer than this step was damaged, or the run would have resumed from it
    others = [path for number, path in find(folder).items() if number not in cfg.milestones]
    older = [path for path in others if path <= path_of(folder, step)]
    for path in set(others) - set(older[-2:]):
        path.unlink()


def write(path, state):
    """Write beside, verify, rename: a crash at any moment leaves the older checkpoints usable."""
    require_plain(state)
    temporary = Path(f'{path}{PARTIAL}')
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, 'xb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        broken = zipfile.ZipFile(temporary).testzip()
        require(broken is None, f'{path}: {broken} reads back wrong. Check the disk.')
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # torch reports a full disk as RuntimeError
        free = shutil.disk_usage(Path(path).parent).free / 1e9
        raise UserError(f'{path} could not be saved ({error}). {free:.1f} GB are free: make room. '
                        'Older checkpoints are intact. Run the same command again to resume.')
    finally:
        temporary.unlink(missing_ok=True)


def require_plain(value, where='the checkpoint'):
    """UserError for what could be saved, but not be read again without running code."""
    if isinstance(value, dict):
        for key, item in value.items():
            require_plain(key, f'a key of {where}')
            require_plain(item, f'{where}[{key!r}]')
    elif type(value) in (list, tuple):
        for item in value:
            require_plain(item, f'an item of {where}')
    else:
        is_plain = value is None or type(value) in (bool, int, float, str)
        kind = f'{type(value).__module__}.{type(value).__name__}'
        require(is_plain or torch.is_tensor(value), f'{where} is a {kind}, which no checkpoint can '
                'hold. Make it a tensor or a plain number, text, list or dict.')


def save_weights(path, model, parent):
    """Write a checkpoint that init_from takes, of weights made by other means than training.

    parent: the checkpoint that they were made of, which says what they have been trained on; {} for
    weights from elsewhere.
    """
    context = model.config.max_position_embeddings
    history = {'sources': {}, 'tokenizer': None, 'context': context}
    state = {'history': history, 'progress': {}, 'stage': {}, 'config': {}} | parent
    state['model'] = {'shape': asdict(model.config), 'weights': dict(model.state_dict()),
                      'built_by': parent['model']['built_by'] if parent else ''}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, state | {'optimizer': {}})


# ------------------------------------------------------------------------------
# The optimizer's part

ADAMW = {'step', 'exp_avg', 'exp_avg_sq'}       # what it keeps of a parameter


class Moments:
    """What an optimizer and a Method keep from step to step, by the names of parameters."""

    def __init__(self, model, optimizer, method):
        self.model, self.optimizer, self.method = model, optimizer, method
        self.scaler = method.scaler
        self.names = {p: name for name, p in model.named_parameters()}
        self.options = [options_of(group) for group in optimizer.param_groups]
        require_plain(method.state_dict(), 'Method.state_dict()')

    def state_dict(self):
        """The part of a checkpoint, whole on the first process. All must call it."""
        groups = [{key: value for key, value in options_of(group).items() if value != first[key]}
                  for group, first in zip(self.optimizer.param_groups, self.options)]
        moments = {self.names[p]: dict(state) for p, state in self.optimizer.state.items() if state}
        trained = {}
        if self.method.weights(self.model) is not None:         # a checkpoint releases others
            trained = {name: p.detach() for name, p in self.model.named_parameters()}
        return parallel.gathered({
            'kind': type(self.optimizer).__name__, 'moments': moments, 'groups': groups,
            'scaler': self.scaler.state_dict(), 'method': self.method.state_dict(),
            'trained': trained})

    def load(self, part, where):
        """Go on with the part of a checkpoint. {}: begin anew.

        The learning rate and all that knobs set stay as they are here. Shapes are checked first:
        fused AdamW does not look, and would write past the end of a tensor.
        """
        if not part:
            return
        kind, own = type(self.optimizer).__name__, self.optimizer.state_dict()
        require(part['kind'] == kind, f'{where}: the moments are of {part["kind"]}, but this run '
                f'has {kind}. Use init_from without keep_optimizer, or the same optimizer.')
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in part['trained']:
                    p.copy_(parallel.share_of(part['trained'][name], p))

        saved = part['moments']
        try:
            for group, numbers in zip(self.optimizer.param_groups, own['param_groups']):
                for p, i in zip(group['params'], numbers['params']):
                    name = self.names[p]
                    if saved:                           # there are none before the first step
                        is_whole = name in saved and (kind != 'AdamW' or ADAMW <= set(saved[name]))
                        require(is_whole, f'{where}: there are no moments of {name}.')
                        own['state'][i] = {
                            key: moment(key, value, p, f'{where}: of the moments, {key} of {name}')
                            for key, value in saved[name].items()}
            self.optimizer.load_state_dict(own)
            for group, changed in zip(self.optimizer.param_groups, part['groups']):
                group.update({key: value for key, value in changed.items() if key in group})
            if self.scaler.is_enabled() and part['scaler']:
                self.scaler.load_state_dict(part['scaler'])
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f'{where}: {kind} does not take the moments: {error!r}.') from error


def options_of(group):
    """What a parameter group says beside its parameters and the rate, in plain values."""
    return {key: value for key, value in group.items() if key not in ('params', 'lr')
            and type(value) in (bool, int, float, str, tuple, type(None))}


def moment(key, value, p, where):
    """A value of an optimizer's state, in the form that it has for a parameter."""
    is_tensor = torch.is_tensor(value) and value.dim() > 0
    is_like_p = is_tensor and value.shape == p.shape
    if key in ('exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'):
        require(is_like_p and value.dtype == torch.float32, f'{where} does not fit the weights.')
    require(key != 'step' or not is_tensor, f'{where} is no number.')
    if not is_tensor:
        return value
    require(is_like_p or not parallel.is_share(p), f'{where} has another shape than the parameter, '
            "so a sharded model cannot take it. Use parallel = 'ddp'.")
    return parallel.share_of(value, p) if is_like_p else value.clone()
