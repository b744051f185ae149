"""Pre-train a GPT-NeoX, continue it on new data, branch it, resume it: the knobs and the loop.

    python train.py config/rewarm_docs_code.py --replay=0.1        # one process
    torchrun --nproc_per_node=8 train.py config/rewarm_pile_slim.py

Four ways to start, which differ in what they take along (the table is in README.md):
scratch; resume (automatic, when out_dir holds an unfinished run of the same config); init_from (a new stage
from trained weights: re-warming); branch_from (the same run under another schedule).

Shapes: B rows of a micro-batch, T = block_size tokens.
"""
import atexit
import bisect
import contextlib
import ctypes
import dataclasses
import datetime
import importlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import configurator
import data
import eval
import schedules
from eval import EvalError, add_up, checkpoints, evaluate, newest_checkpoint, read_checkpoint
from model import PYTHIA, GPTNeoX, GPTNeoXConfig, check_tensors, configure_optimizer, load_hf


@dataclass
class Config:
    # --- the run ----------------------------------------------------------------------------------------
    out_dir: str = 'out/run'            # checkpoints, metrics.jsonl, config.json and the forgetting curve go here
    init_from: str = ''                 # new stage from a run's config or folder, checkpoint, Hugging Face directory
    branch_from: str = ''               # go on with that checkpoint's step, moments and data, under this schedule
    keep_optimizer: bool = False        # init_from with the old Adam moments; both Mila papers start with fresh ones
    overwrite: bool = False             # delete what out_dir holds and start anew
    seed: int = 1337                    # of the initial weights and the order of the data

    # --- model ------------------------------------------------------------------------------------------
    model: str = ''                     # a Pythia size, '14m' to '12b', in place of the next three
    hidden_size: int = 192              # width C
    num_hidden_layers: int = 4
    num_attention_heads: int = 6        # H; head size D = C / H
    vocab_size: int = 0                 # rows of the embeddings; 0: what the data need, rounded up to 128 as GPT-NeoX
    block_size: int = 256               # T, tokens of a training window
    rotary_pct: float = 0.25            # share of each head's dims that carry position
    use_parallel_residual: bool = True  # x + Attn(LN1 x) + MLP(LN2 x), as Pythia; False: one after the other
    hidden_act: str = 'gelu'            # exact erf, as released Pythia configs; 'gelu_fast': tanh, as it was trained

    # --- data: a source NAME is data_dir/NAME/{train,val}*.bin --------------------------------------------
    data_dir: str = 'data'
    paths: dict = field(default_factory=dict)         # {'pile/train': '/big/pile/*.bin'}: shards that lie elsewhere
    train_data: dict = field(default_factory=dict)    # new data {source: weight}
    replay_data: dict = field(default_factory=dict)   # old data {source: weight}
    replay: float = 0.0                 # share of the samples from replay_data; total tokens stay (Ibrahim et al. 2024)
    replay_order: str = 'first-seen'    # as the first run saw them, 'reshuffled', or 'stored': as they are in the files
    switches: list = field(default_factory=list)      # [{'step': 900, 'train_data': {...}}]; with 'lr': 0.2 for 'step',
                                        # when the rate has fallen to a fifth of its peak (Parmar et al. 2024)
    max_epochs: dict = field(default_factory=dict)    # {source: epochs}; read so often, its share goes to the others
    old_data: list = field(default_factory=list)      # what weights from elsewhere were trained on; our runs know
    val_data: list = field(default_factory=list)      # sources to evaluate on, each by itself, old ones too

    # --- batch: the same optimisation on any number of devices -------------------------------------------
    batch_size: int = 16                # sequences per step, over all devices and micro-steps
    batch_tokens: int = 0               # or: tokens per step, a multiple of block_size
    micro_batch_size: int = 16          # sequences a device takes at once, at most; accumulation follows
    max_steps: int = 1000               # optimizer steps

    # --- learning rate (python schedules.py config/x.py draws it) -----------------------------------------
    schedule: str = 'cosine'            # see schedules.py
    learning_rate: float = 3e-3         # the peak
    min_lr: float = 3e-4                # the end; a tenth of the peak, as Pythia
    warmup: float = 0.01                # steps, or below 1 a fraction of max_steps
    decay: float = 0.1                  # wsd: length of the final decay, likewise
    decay_shape: str = 'linear'         # wsd: linear, cosine, exponential or 1-sqrt
    constant_lr: float = 1.65e-3        # infinite schedules: rate between cooldown and anneal; midway as Ibrahim et al.
    cooldown: float = 0.6               # infinite schedules: where the cooldown ends, a step or a fraction of all
    anneal: float = 0.85                # infinite schedules: where the anneal begins, likewise; max_steps: never
    timescale: float = 10.0             # infinite_inv_sqrt: steepness of the cooldown
    repeats: int = 3                    # repeated_cosine: datasets, one after the other

    # --- AdamW, as Pythia -------------------------------------------------------------------------------
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1           # on matrices only
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no clipping
    nonfinite: str = 'stop'             # at a NaN or infinite loss or gradient; 'skip': that step, at most 10 in a row

    # --- machine ----------------------------------------------------------------------------------------
    device: str = 'auto'                # cuda, mps or cpu; auto: the first of these that is there
    dtype: str = 'auto'                 # bf16, fp16 or fp32; auto: bf16 where the hardware has it, else fp16 on cuda
    kernels: str = 'auto'               # 'triton', 'torch', or auto: Triton on cuda, PyTorch elsewhere (model.py)
    compile: bool = False               # torch.compile of each layer: pays on GPUs; on CPU only after about 500 steps
    deterministic: bool = True          # False: faster attention for heads above 64 on Hopper, whose last bits vary

    # --- record -----------------------------------------------------------------------------------------
    eval_every: int = 100               # steps; the first and the last step are evaluated too
    eval_windows: int = 200             # windows of each validation set, always the same ones; 0: all
    log_every: int = 10                 # steps
    save_every: int = 500               # steps; the last step is saved too
    keep_last: int = 2                  # newest checkpoints to keep; 0: all
    milestones: list = field(default_factory=list)    # steps whose checkpoints are saved and always kept
    wandb: bool = False                 # mirror metrics.jsonl to Weights & Biases
    tensorboard: bool = False           # or to TensorBoard, in out_dir


# What may change when a run is resumed: the machine and the record, not what is computed.
FREE = {'out_dir', 'overwrite', 'data_dir', 'paths', 'micro_batch_size', 'nonfinite', 'device', 'dtype', 'kernels',
        'compile', 'deterministic', 'eval_every', 'log_every', 'save_every', 'keep_last', 'milestones', 'wandb', 'tensorboard'}
# An upstream run takes these from its heir.
MACHINE = ('data_dir', 'paths', 'device', 'dtype', 'kernels', 'compile', 'deterministic')
SHAPE = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size', 'rotary_pct',
         'use_parallel_residual', 'hidden_act')                     # fields of GPTNeoXConfig, too
UPSTREAM_FLOPS = 1e18       # larger upstream runs (an hour of a large GPU) are not started as a side effect
MAX_SKIPS = 10
# Dense bf16 peaks of the data sheets, FLOP/s, for the utilisation in the progress bar.
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12, '4090': 165e12}


class TrainError(ValueError):
    """What the user can mend; ends the program with its message and exit code 2."""


class Stopped(Exception):
    """The run was asked to stop, has saved, and is to be continued by the same command."""


# -----------------------------------------------------------------------------
# Processes and devices

Process = namedtuple('Process', 'rank local_rank world')
stop_signals = []               # signals received so far; the loop looks at it between steps


def start_processes(device):
    """Join the other processes when torchrun started this one: nccl between GPUs, gloo elsewhere."""
    if 'RANK' not in os.environ:
        return Process(0, 0, 1)
    me = Process(*(int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')))
    if me.world > 1:
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo', timeout=datetime.timedelta(minutes=30))
    return me


def from_rank_0(value):
    """The value that rank 0 has, on every rank: two ranks that list a shared folder may see different files."""
    if dist.is_initialized():
        dist.broadcast_object_list(box := [value])
        return box[0]
    return value


def handle_signal(number, frame):
    if stop_signals and number == signal.SIGINT:        # a second Ctrl-C means now
        os._exit(130)
    stop_signals.append(number)


def pick_device(name):
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if name == 'cuda' and not torch.cuda.is_available() or name == 'mps' and not torch.backends.mps.is_available():
        raise TrainError(f'device = {name!r}, but this PyTorch finds none. Use --device=auto.')
    return name


def pick_dtype(name, device):
    """The type of the matrix products; weights, moments and statistics stay fp32 (autocast)."""
    if name == 'auto':
        if device == 'cuda':
            name = 'bf16' if torch.cuda.get_device_capability() >= (8, 0) else 'fp16'
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            name = 'bf16' if device == 'cpu' and native else 'fp32'
    return eval.DTYPES[name]


def keep_freed_memory():
    """Let glibc keep what a step frees. By default it goes back to the kernel, and every step faults in tens of
    thousands of zeroed pages again: a tenth of a CPU step. mallopt: M_MMAP_THRESHOLD (-3), M_TRIM_THRESHOLD (-1).
    """
    if sys.platform == 'linux' and platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)
        libc.mallopt(-1, 2 ** 31 - 1)


# -----------------------------------------------------------------------------
# Checking the config

def check(cfg, origin, world):
    """TrainError with everything that is wrong with the config by itself, before anything slow starts."""
    at_least = {0: ('vocab_size', 'batch_tokens', 'replay', 'grad_clip', 'weight_decay', 'eval_windows', 'keep_last'),
                1: ('block_size', 'batch_size', 'micro_batch_size', 'max_steps', 'eval_every', 'log_every',
                    'save_every')}
    problems = [f'{key} = {getattr(cfg, key)}: expected at least {low}'
                for low, keys in at_least.items() for key in keys if not getattr(cfg, key) >= low]
    choices = dict(model=('', *PYTHIA), replay_order=('first-seen', 'reshuffled', 'stored'), nonfinite=('stop', 'skip'),
                   device=('auto', 'cuda', 'mps', 'cpu'), dtype=('auto', 'bf16', 'fp16', 'fp32'),
                   kernels=('auto', 'triton', 'torch'))
    problems += [f'{key} = {getattr(cfg, key)!r}: expected one of {", ".join(map(repr, allowed))}'
                 for key, allowed in choices.items() if getattr(cfg, key) not in allowed]
    problems += [f'eps = {cfg.eps}: expected above 0'] * (not cfg.eps > 0)
    problems += [f'{key} = {getattr(cfg, key)}: expected 0 <= {key} < 1' for key in ('beta1', 'beta2')
                 if not 0 <= getattr(cfg, key) < 1]
    if not cfg.train_data:
        problems.append("train_data is empty; say what to train on: train_data = {'docs': 1.0}")
    if cfg.init_from and cfg.branch_from:
        problems.append('init_from and branch_from are both set; a run starts one way')
    if cfg.keep_optimizer and not cfg.init_from:
        problems.append('keep_optimizer goes with init_from')
    if cfg.model and (sizes := [key for key in SHAPE[:3] if origin[key] != 'default']):
        problems.append(f'model = {cfg.model!r} sets {", ".join(sizes)} too; give one or the other')
    if cfg.batch_tokens and (cfg.batch_tokens % max(1, cfg.block_size) or origin['batch_size'] != 'default'):
        problems.append(f'batch_tokens = {cfg.batch_tokens}: expected a multiple of block_size = {cfg.block_size}, '
                        'and no batch_size beside it')
    elif cfg.block_size > 0 and (size := rows_per_step(cfg)) % world:
        problems.append(f'the batch of {size} sequences does not divide among {world} processes; nearest that do: '
                        f'{max(1, size // world) * world} and {(size // world + 1) * world}')
    if not all(isinstance(s, int) and 0 <= s <= cfg.max_steps for s in cfg.milestones):
        problems.append(f'milestones = {cfg.milestones}: expected steps from 0 to max_steps')
    problems += [f'{key} = {getattr(cfg, key)}: expected names of sources' for key in ('val_data', 'old_data')
                 if not all(isinstance(name, str) for name in getattr(cfg, key))]
    problems += [f'paths[{name!r}] = {where!r}: expected a pattern, or a list of them'
                 for name, where in cfg.paths.items()
                 if not all(isinstance(p, str) for p in (where if isinstance(where, list) else [where]))]
    for i, switch in enumerate(cfg.switches):
        if not isinstance(switch, dict) or len({'step', 'lr'} & set(switch)) != 1 or \
                not isinstance(switch.get('step', switch.get('lr')), (int, float)) or \
                set(switch) - {'step', 'lr', 'train_data', 'replay_data', 'replay'}:
            problems.append(f"switches[{i}] = {switch}: expected 'step' or 'lr', and what changes of "
                            'train_data, replay_data and replay')
    problems += [f'max_epochs[{name!r}] = {cap!r}: expected a number above 0' for name, cap in cfg.max_epochs.items()
                 if not isinstance(cap, (int, float)) or not cap > 0]
    if problems:
        raise TrainError('\n'.join(problems))


def rows_per_step(cfg):
    return cfg.batch_tokens // cfg.block_size if cfg.batch_tokens else cfg.batch_size


# -----------------------------------------------------------------------------
# Run folder and checkpoints

def lock(out_dir):
    """Hold out_dir for this run; the kernel lets go when the process ends, however it ends."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        file = open(Path(out_dir, 'run.lock'), 'a+')
    except OSError as error:
        raise TrainError(f'out_dir {out_dir}: cannot be written ({error.strerror}). Choose another: --out_dir=...')
    try:
        import fcntl                                    # not on Windows, where nothing is locked
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return file
    except OSError:
        file.seek(0)
        raise TrainError(f'out_dir {out_dir} is in use by the run with process id {file.read().strip()}. '
                         'Wait for it, stop it, or choose another out_dir.')
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def save_checkpoint(out_dir, state, keep_last, milestones):
    """Written beside, synced, checked and renamed: a kill at any instant leaves the older checkpoints usable."""
    path = Path(out_dir, f'ckpt_{state["step"]:08d}.pt')
    temp = path.with_suffix('.tmp')
    if not all(t.isfinite().all() for t in state['weights'].values()):
        raise TrainError(f'step {state["step"]}: the weights hold NaN or infinity and are not saved. '
                         f'Go on from an older checkpoint in {out_dir} with a lower learning_rate.')
    try:
        with open(temp, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if broken := zipfile.ZipFile(temp).testzip():
            raise OSError(f'{broken} reads back wrong')
        os.replace(temp, path)
    except (OSError, RuntimeError) as error:            # torch reports a full disk as a RuntimeError
        temp.unlink(missing_ok=True)
        free = shutil.disk_usage(out_dir).free / 1e9
        raise TrainError(f'{path}: not saved ({error}); {free:.1f} GB are free. Older checkpoints are intact: make '
                         'room and run the same command again.')
    old = [p for step, p in checkpoints(out_dir).items() if step not in milestones]
    for p in old[:-keep_last] if keep_last else []:
        p.unlink()
    return path


def newest(out_dir):
    """The newest checkpoint of a run folder that reads well; a broken one is set aside, and said."""
    for path in reversed(checkpoints(out_dir).values()):
        try:
            return read_checkpoint(path)
        except EvalError as error:
            print(f'{error} Set aside as {path.name}.corrupt.')
            path.rename(f'{path}.corrupt')
    if list(Path(out_dir).glob('*.corrupt')):
        raise TrainError(f'{out_dir}: no checkpoint is left that can be read. Start anew with --overwrite=true.')


def find_resume(cfg):
    """The state to go on from, or None for a start. TrainError when out_dir holds another run."""
    for stale in Path(cfg.out_dir).glob('*.tmp'):       # of a killed save
        stale.unlink()
    state = None if cfg.overwrite else newest(cfg.out_dir)
    if state is None:
        return None
    ours, theirs = dataclasses.asdict(cfg), dataclasses.asdict(Config()) | state['config']     # older runs know fewer
    differ = [f'{key}: {theirs.get(key)!r} there, {ours[key]!r} now' for key in ours
              if key not in FREE and theirs.get(key) != ours[key]]
    if differ:
        raise TrainError(f'{cfg.out_dir} holds a run of another config, at step {state["step"]}:\n  ' +
                         '\n  '.join(differ) +
                         '\nGive this run its own out_dir, or delete that one with --overwrite=true.')
    return state


# -----------------------------------------------------------------------------
# Start modes: where weights come from

def parent_name(cfg):
    """What the config starts from, as it names it; '' for a start from scratch."""
    return cfg.init_from or cfg.branch_from


def find_parent(cfg, process):
    """(start mode, what it starts from or None). An upstream config is trained first when it has not been."""
    name = parent_name(cfg)
    if not name:
        return 'scratch', None
    mode, path = 'init_from' if cfg.init_from else 'branch_from', Path(name)
    if name.endswith('.py'):
        check_upstream_size(cfg)
        path = run(*upstream(cfg), process)
    if path.is_dir() and checkpoints(path) or path.suffix == '.pt' and path.is_file():
        return mode, read_checkpoint(newest_checkpoint(path))
    if path.is_dir() and (path / 'config.json').exists() and mode == 'init_from':
        model = load_hf(path)
        return mode, {'weights': model.state_dict(), 'model': dataclasses.asdict(model.config)}
    raise TrainError(f"{mode} = {name!r}: expected a run's config (.py), a run folder with checkpoints, a checkpoint "
                     f'(.pt)' + ' or a Hugging Face directory (config.json)' * (mode == 'init_from') +
                     ('; the folder holds neither' if path.is_dir() else '; it does not exist' if not path.exists()
                      else '; it is neither'))


def upstream(cfg):
    """(config, origins) of the run that init_from or branch_from names by its config file."""
    values, origin = configurator.load(__file__, [parent_name(cfg)])
    return Config(**{**values, **{key: getattr(cfg, key) for key in MACHINE}}), origin


def is_finished(cfg):
    return cfg.max_steps in checkpoints(cfg.out_dir)


def model_config(cfg, origin, parent, vocab_size):
    """The shape of the model: its parent's, else that of a Pythia size, else the knobs'.

    init_from may name the other GELU, which no weight depends on: released Pythia configs say erf, gpt-neox trained
    them with tanh (its bias_gelu_fusion).
    """
    if parent:
        shape = GPTNeoXConfig(**parent['model'])
        if cfg.init_from and origin['hidden_act'] != 'default' and cfg.hidden_act != shape.hidden_act:
            say(f'hidden_act: {shape.hidden_act!r} in {cfg.init_from}, {cfg.hidden_act!r} from here on')
            shape = dataclasses.replace(shape, hidden_act=cfg.hidden_act)
        wanted = {key: getattr(cfg, key) for key in SHAPE if origin[key] != 'default'}
        wanted |= {key: getattr(GPTNeoXConfig.pythia(cfg.model), key) for key in SHAPE[:3]} if cfg.model else {}
        differ = [f'{key}: {getattr(shape, key)!r} there, {value!r} in the config' for key, value in wanted.items()
                  if getattr(shape, key) != value and not (key == 'vocab_size' and value == 0)]
        if differ:
            raise TrainError(f'{parent_name(cfg)} is a model of another size:\n  ' +
                             '\n  '.join(differ) + '\nDrop these keys: a stage takes the shape of its parent.')
        return dataclasses.replace(shape, max_position_embeddings=cfg.block_size)
    sizes = GPTNeoXConfig.pythia(cfg.model) if cfg.model else cfg
    sizes = {key: getattr(sizes, key) for key in SHAPE[:3]}
    return GPTNeoXConfig(**sizes, vocab_size=cfg.vocab_size or -(-vocab_size // 128) * 128, rotary_pct=cfg.rotary_pct,
                         max_position_embeddings=cfg.block_size, hidden_act=cfg.hidden_act,
                         use_parallel_residual=cfg.use_parallel_residual)


def load_moments(optimizer, saved):
    """Adam's moments and step counts from a checkpoint, but this run's rates and decays.

    load_state_dict alone would bring back the old run's learning rate, decayed to its end.
    """
    own = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, own):
        group.update(settings)


# -----------------------------------------------------------------------------
# Data of a run

def sources_of(cfg):
    """What the mixture is made of, by phase: [(switch or None, {source: weight}), ...]."""
    phases = [(None, data.mix_weights(cfg.train_data, cfg.replay_data, cfg.replay))]
    for switch in cfg.switches:
        changed = {key: switch.get(key, getattr(cfg, key)) for key in ('train_data', 'replay_data', 'replay')}
        phases.append((switch, data.mix_weights(**changed)))
    return phases


def missing_data(cfg):
    """{source: what to say} of every source without shards, also of an upstream run that is to be trained first."""
    wanted = {(name, 'train') for _, weights in sources_of(cfg) for name, w in weights.items() if w}
    wanted |= {(name, 'val') for name in cfg.val_data}
    problems = {}
    for name, split in sorted(wanted):
        try:
            if name not in data.EMBEDDED or Path(cfg.data_dir, name).exists() or f'{name}/{split}' in cfg.paths:
                data.find_shards(name, split, cfg.data_dir, cfg.paths)
        except data.DataError as error:
            problems.setdefault(name, str(error))       # one command makes all splits of a source
    if parent_name(cfg).endswith('.py') and not is_finished(up := upstream(cfg)[0]):
        problems = missing_data(up) | problems
    return problems


def open_data(cfg, parent, mode, process):
    """({training source: Source}, {validation set: (Source, windows)}). Embedded corpora are built here."""
    names = {name for _, weights in sources_of(cfg) for name in weights}
    if mode in ('resume', 'branch_from'):               # what the run was fed before counts on
        names |= {name for _, weights in parent['phases'] for name in weights}
    if process.rank == 0:
        for name in sorted((names | set(cfg.val_data)) & set(data.EMBEDDED)):
            if f'{name}/train' not in cfg.paths:
                data.prepare_embedded(name, cfg.data_dir)
    from_rank_0(None)                                   # the others wait for the files
    # The order in which an earlier stage saw a source depends on the seed it had then: take that along.
    keys = (parent or {}).get('keys', {})
    if cfg.replay_order != 'first-seen':
        key = 'stored' if cfg.replay_order == 'stored' else f'{cfg.seed}/reshuffled'
        keys = keys | {name: key for name in cfg.replay_data}
    train = {name: data.Source(name, data.find_shards(name, 'train', cfg.data_dir, cfg.paths), cfg.block_size,
                               key=keys.get(name, cfg.seed)) for name in sorted(names)}
    val = {name: data.Source(name, data.find_shards(name, 'val', cfg.data_dir, cfg.paths), cfg.block_size)
           for name in cfg.val_data}
    return train, {name: (source, data.val_windows(source, cfg.eval_windows)) for name, source in val.items()}


def resolve_phases(cfg, lr, first_step, parent):
    """[(first sample, {source: weight}), ...] of the whole run: every switch becomes a step before training starts.

    parent: of a branch, whose mixture up to first_step stays, so that its sources go on from where they are.
    """
    rows = rows_per_step(cfg)
    phases = [phase for phase in parent['phases'] if phase[0] < first_step * rows] if parent else []
    for switch, weights in sources_of(cfg):
        step = first_step
        if switch and 'lr' in switch:
            step = schedules.first_below(lr, switch['lr'])
        elif switch:
            step = round(switch['step'] * cfg.max_steps) if isinstance(switch['step'], float) else switch['step']
        if step is None or not first_step <= step < cfg.max_steps or switch and not step > phases[-1][0] // rows:
            raise TrainError(f'switches: {switch} falls on step {step}, expected one after the switch before it and '
                             f'before max_steps = {cfg.max_steps}')
        weights = {name: str(w) for name, w in weights.items()}
        if not phases or phases[-1][1] != weights:
            phases.append((step * rows, weights))
    return phases


def describe_data(mixture, phases, total, rows):
    """Requested and achieved shares and epochs of every source over the run, and where a source starts anew."""
    counts, lines = mixture.counts(total), ['source            weight (by phase)      samples     share    epochs']
    for name, source in mixture.sources.items():
        n, weights = counts[name], ', '.join(f'{float(Fraction(w.get(name, "0"))):.4g}' for _, w in phases)
        line = f'{name:<16}  {weights:<18}  {n:>11,}  {n / total:>8.3%}  {n / len(source):>8.3f}'
        if n > len(source):                             # counts only grow: the first sample of the second epoch
            g = bisect.bisect_right(range(total), len(source), key=lambda g: mixture.counts(g)[name])
            line += f'   read once by step {g // rows:,}, then again in a new order'
        if short := int((source.ends == source.starts).sum()):
            line += f'   {short:,} of {len(source.shards):,} shards are shorter than a window, and left out'
        lines.append(line)
    return '\n'.join(lines + [f'starts at step {start // rows:,}: ' + ', '.join(
        f'{name} {float(Fraction(w)):.4g}' for name, w in weights.items()) for start, weights in phases[1:]])


def against_chance(val, vocab_size):
    """What the losses of loaded weights, before the first step, say of the loading itself."""
    losses, chance = {name: row['loss'] for name, row in val.items()}, math.log(vocab_size)
    text = (f'the loaded weights, before the first step: {", ".join(f"{name} {x:.2f}" for name, x in losses.items())} '
            f'nats per token (chance, ln {vocab_size}: {chance:.2f})')
    if not any(x < chance - 1 for x in losses.values()):        # data in a new language may lie there; old data do not
        text += ('\nWARNING: on no validation set are they a nat better than chance. Are the data prepared with their '
                 'tokenizer? Are the files whole? Is what they were trained on in val_data?')
    return text


# -----------------------------------------------------------------------------
# Record

class Record:
    """metrics.jsonl, one object an event, and its mirrors. On resume, rows past the resumed step are dropped."""

    def __init__(self, cfg, step):
        path, kept = Path(cfg.out_dir, 'metrics.jsonl'), []
        if step and path.exists():
            for line in path.read_text().splitlines(keepends=True):
                with contextlib.suppress(ValueError):   # a line that a kill cut in two
                    row = json.loads(line)
                    if row['step'] < step or row['step'] == step and row['event'] == 'train':
                        kept.append(line)
        data.write_whole(path, ''.join(kept))
        self.file = open(path, 'a', buffering=1)        # a line at a time, so a kill loses none
        self.mirrors = []
        if cfg.wandb:
            wandb = optional('wandb', '--wandb')
            wandb.init(project='rewarm', name=Path(cfg.out_dir).name, config=dataclasses.asdict(cfg), dir=cfg.out_dir)
            self.mirrors.append(lambda flat, step: wandb.log(flat, step=step))
        if cfg.tensorboard:
            writer = optional('torch.utils.tensorboard', '--tensorboard', 'tensorboard').SummaryWriter(cfg.out_dir)
            self.mirrors.append(lambda flat, step: [writer.add_scalar(k, v, step) for k, v in flat.items()])

    def write(self, event, **values):
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps({'event': event, **values}) + '\n')     # strict JSON has no NaN
        flat = {f'{event}/{key}': value for key, value in values.items() if isinstance(value, float)}
        flat |= {f'val/{name}/{key}': x for name, row in values.get('val', {}).items() for key, x in row.items()
                 if x is not None}
        for mirror in self.mirrors:
            mirror(flat, values['step'])


def optional(module, flag, package=None):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise TrainError(f'{flag} needs a package that is not installed: pip install {package or module}')


def provenance():
    """What is needed to make the run again."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=12'], capture_output=True, text=True,
                                cwd=Path(__file__).parent).stdout.strip() or 'none'
    except FileNotFoundError:                           # slim containers have no git
        commit = 'none'
    return {'command': ' '.join(sys.argv), 'commit': commit, 'python': platform.python_version(),
            'torch': str(torch.__version__), 'numpy': np.__version__, 'machine': platform.platform(),
            'threads': torch.get_num_threads(),
            'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}


# -----------------------------------------------------------------------------
# The run

def run(cfg, origin, process):
    """Train to the end -> path of the final checkpoint. Raises Stopped after a signal, TrainError for bad input."""
    check(cfg, origin, process.world)
    held = lock(cfg.out_dir) if process.rank == 0 else None
    from_rank_0(None)
    try:
        state = find_resume(cfg) if process.rank == 0 else None
        resume_step = from_rank_0(state and state['step'])
        if resume_step is not None and process.rank:
            state = read_checkpoint(checkpoints(cfg.out_dir)[resume_step])
        done = resume_step == cfg.max_steps and process.rank == 0 and eval.is_evaluated(cfg.out_dir, resume_step)
        if from_rank_0(done):
            say(f'{cfg.out_dir}: finished already, at step {resume_step:,}')
        else:
            train(cfg, origin, process, state)
        if process.rank == 0:
            print(eval.report(cfg.out_dir))
        from_rank_0(None)                               # all leave together
        return checkpoints(cfg.out_dir)[cfg.max_steps]
    finally:
        if held:
            held.close()


def say(*lines):
    """Print on rank 0."""
    if os.environ.get('RANK', '0') == '0':
        print(*lines, flush=True)


def inherit(cfg, origin, parent, mode):
    """The config with what a stage takes over from its parent. TrainError where it says otherwise."""
    if parent and origin['block_size'] == 'default':
        cfg = dataclasses.replace(cfg, block_size=parent['model']['max_position_embeddings'])
    if mode not in ('resume', 'branch_from'):
        return cfg
    was = parent['batch'] | {'block_size': parent['model']['max_position_embeddings']}
    if mode == 'resume':                                # perhaps of a branch, which had inherited these
        return dataclasses.replace(cfg, **was)
    if differ := [f'{key}: {value!r} there, {getattr(cfg, key)!r} here' for key, value in was.items()
                  if origin[key] != 'default' and getattr(cfg, key) != value]:
        raise TrainError('branch_from goes on with the data where that run was, so these must agree:\n  ' +
                         '\n  '.join(differ))
    if parent['step'] >= cfg.max_steps:
        raise TrainError(f'branch_from is at step {parent["step"]:,}, max_steps = {cfg.max_steps:,}: expected more')
    return dataclasses.replace(cfg, **was)


def build_model(cfg, shape, parent, mode, process, device, dtype):
    """(model, what to call in training, optimizer, loss scaler), filled from the parent as the start mode says."""
    torch.manual_seed(cfg.seed)                         # on the CPU: the same initial weights on every device
    model = GPTNeoX(shape)
    model.kernels, model.deterministic = cfg.kernels, cfg.deterministic
    if parent:
        check_tensors(parent['weights'], model.state_dict(), parent_name(cfg) or cfg.out_dir)
        model.load_state_dict(parent['weights'])
    model.to(device)
    optimizer = configure_optimizer(model, cfg.learning_rate, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay, device)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    if mode in ('resume', 'branch_from') or cfg.keep_optimizer:
        if 'optimizer' not in parent:
            raise TrainError(f'keep_optimizer: {cfg.init_from} holds weights only, no moments')
        load_moments(optimizer, parent['optimizer'])
        if scaler.is_enabled() and parent['scaler']:
            scaler.load_state_dict(parent['scaler'])
    if cfg.compile:
        # Layer by layer: one graph serves them all. Inside a graph, the embedding's gradient would become atomic
        # additions on a GPU, which vary from run to run; and DDP would send no gradient before the whole backward pass.
        for layer in model.gpt_neox.layers:
            layer.compile()
    forward = model
    if process.world > 1:
        ids = [process.local_rank] if device == 'cuda' else None
        DDP = torch.nn.parallel.DistributedDataParallel
        DDP._set_params_and_buffers_to_ignore_for_model(model, ['cos', 'sin'])      # alike already: nothing to exchange
        forward = DDP(model, device_ids=ids)
    return model, forward, optimizer, scaler


def keep_tokenizer(cfg, tokenizer, shards):
    """Copy the tokenizer's files into out_dir, where eval.py looks: from beside the shards, or from the parent."""
    folders = [Path(shard.path).parent for shard in shards]
    if name := parent_name(cfg):
        path = Path(upstream(cfg)[0].out_dir if name.endswith('.py') else name)
        folders += [path if path.is_dir() else path.parent]
    for folder in map(os.path.abspath, dict.fromkeys(folders)):        # absolute: no folder is mistaken for 'gpt2'
        with contextlib.suppress(data.DataError):       # most folders hold none
            if tokenizer in (None, data.get_tokenizer(folder).name):
                for file, path in data.tokenizer_files(folder).items():
                    shutil.copyfile(path, Path(cfg.out_dir, file))
                return


def announce(cfg, origin, derived, lr, mixture):
    """Print the run that is about to start and keep it in config.json."""
    given, (total, rows) = dataclasses.asdict(cfg), (cfg.max_steps * rows_per_step(cfg), rows_per_step(cfg))
    facts = {key: f'{value:,}' if isinstance(value, int) else value for key, value in derived.items()
             if key not in ('phases', 'schedule', 'model')}
    made_by = provenance()
    print(configurator.render(given, origin), *(f'{key}: {value}' for key, value in (facts | made_by).items()), '',
          schedules.table(lr), '', describe_data(mixture, derived['phases'], total, rows), '', sep='\n', flush=True)
    data.write_whole(Path(cfg.out_dir, 'config.json'),
                     json.dumps({'config': given, 'origin': origin, 'derived': derived, **made_by}, indent=1))


def train(cfg, origin, process, state):
    """From a checked config to the last step. state: the checkpoint to resume from, or None."""
    given, rank, world = dataclasses.asdict(cfg), process.rank, process.world

    # --- where it starts: a resumed run is its own parent ---------------------------------------------------
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    if device == 'cuda':
        torch.cuda.set_device(process.local_rank)
    elif device == 'cpu':
        keep_freed_memory()
    if problems := missing_data(cfg):
        raise data.DataError('\n'.join(problems.values()))
    lr = schedules.build(cfg.schedule, steps=cfg.max_steps, peak=cfg.learning_rate, **given)
    if not cfg.branch_from:
        resolve_phases(cfg, lr, 0, None)                # its errors, before an upstream run is trained
    mode, parent = ('resume', state) if state else find_parent(cfg, process)
    cfg = inherit(cfg, origin, parent, mode)
    first_step = parent['step'] if mode in ('resume', 'branch_from') else 0
    seen = (parent or {}).get('keys', {})               # {source: key of its order}, of this run or earlier stages
    stages = state['seen'] if state else sorted({*seen, *cfg.old_data})     # what earlier stages were trained on

    # --- data: all of it known before the first step -----------------------------------------------------------
    sources, val_sets = open_data(cfg, parent, mode, process)
    shards = [shard for source in sources.values() for shard in source.shards]
    shape = model_config(cfg, origin, parent, max(shard.vocab_size or 50304 for shard in shards))
    notes = data.check_compatible({f'{name}/train': s for name, s in sources.items()} |
                                  {f'{name}/val': s for name, (s, _) in val_sets.items()}, shape.vocab_size)
    say(*notes)
    prints = data.fingerprint(sources)
    if mode == 'resume' and (changed := [name for name in prints if prints[name] != state['data'].get(name)]):
        raise TrainError(f'the data have changed since the checkpoint: source {changed[0]!r} was '
                         f'{state["data"].get(changed[0])}, is {prints[changed[0]]}. Put the old shards back, or '
                         'start anew with --overwrite=true.')
    rows = rows_per_step(cfg)
    if mode == 'resume':
        phases = parent['phases']
    else:
        phases = resolve_phases(cfg, lr, first_step, parent if mode == 'branch_from' else None)
        if unknown := [name for name in cfg.max_epochs if name not in sources]:
            raise TrainError(f'max_epochs names {", ".join(unknown)}; trained on are {", ".join(sources)}')
        first, total = first_step * rows, cfg.max_steps * rows
        phases, changes = data.cap_epochs(sources, phases, cfg.max_epochs, first, total, rows)
        say(*changes)
    mixture = data.Mixture(sources, phases)

    # --- the batch, the model ----------------------------------------------------------------------------------
    micro = max(n for n in range(1, rows // world + 1) if rows // world % n == 0 and n <= cfg.micro_batch_size)
    accumulation = rows // world // micro
    model, forward, optimizer, scaler = build_model(cfg, shape, parent, mode, process, device, dtype)
    autocast = torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    tokenizer = next(filter(None, map(data.tokenizer_name, shards)), None)
    tokens_per_step, flops = rows * cfg.block_size, model.flops_per_token()
    gpu = torch.cuda.get_device_name() if device == 'cuda' else ''
    peak = next((f for name, f in PEAK_FLOPS.items() if name in gpu), None)

    def snapshot(step):
        return {'step': step, 'config': given, 'model': dataclasses.asdict(shape), 'weights': model.state_dict(),
                'batch': {key: getattr(cfg, key) for key in ('seed', 'batch_size', 'batch_tokens')},
                'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(), 'phases': phases, 'data': prints,
                'keys': seen | {name: str(source.key) for name, source in sources.items()}, 'seen': stages,
                'tokenizer': tokenizer}

    if rank == 0:
        derived = {'start': mode, 'first_step': first_step, 'parameters': model.num_params(), 'processes': world,
                   'tokens_per_step': tokens_per_step, 'total_tokens': tokens_per_step * cfg.max_steps,
                   'micro_batch': micro, 'accumulation': accumulation, 'device': device, 'seen': stages,
                   'dtype': str(dtype).removeprefix('torch.'), 'phases': phases, 'model': dataclasses.asdict(shape),
                   'schedule': [row._asdict() for row in lr.phases]}
        if mode != 'resume':                            # what overwrite gives up, now that all else is known to be well
            for path in [*checkpoints(cfg.out_dir).values(), *Path(cfg.out_dir).glob('*.corrupt')]:
                path.unlink()
        keep_tokenizer(cfg, tokenizer, shards)
        announce(cfg, origin, derived, lr, mixture)
        record = Record(cfg, first_step if mode == 'resume' else 0)
    bar = tqdm(total=cfg.max_steps, initial=first_step, desc=Path(cfg.out_dir).name, unit='step', mininterval=0.5,
               disable=rank > 0 or None, dynamic_ncols=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle_signal)
    step, logged, busy, skipped, stop = first_step, first_step, 0.0, 0, False
    saved = first_step if mode == 'resume' else None    # the step whose checkpoint is on disk already
    while True:
        # --- save, evaluate, stop: before the step, so that the first and the last weights are seen too --------
        due = step > first_step and step % cfg.save_every == 0 or step in cfg.milestones or step == cfg.max_steps
        if (due or stop) and step != saved:
            if rank == 0:
                save_checkpoint(cfg.out_dir, snapshot(step), cfg.keep_last, cfg.milestones)
            saved = step
        if step == cfg.max_steps or not stop and (step % cfg.eval_every == 0 or step == first_step):
            # The last evaluation is never cut short: no later one would make up for it.
            val = evaluate(model, val_sets, micro, autocast, rank, world, lambda: stop_signals and step < cfg.max_steps)
            if val is not None and rank == 0:
                record.write('eval', step=step, tokens=step * tokens_per_step, lr=lr(step), val=val)
                bar.write(f'step {step:,}: ' + '  '.join(f'{name} {row["loss"]:.4f}' for name, row in val.items()))
                if mode == 'init_from' and step == first_step and val:
                    bar.write(against_chance(val, shape.vocab_size))
        if step == cfg.max_steps or stop:
            break

        # --- one optimizer step ----------------------------------------------------------------------------------
        began, total = time.perf_counter(), 0.0         # total: of this rank's losses, nats per token
        for group in optimizer.param_groups:
            group['lr'] = lr(step)
        for a in range(accumulation):
            batch = map(torch.from_numpy, mixture.batch(data.rows(step, rows, rank, world, micro, a)))
            x, y = ((t.pin_memory() if device == 'cuda' else t).to(device, non_blocking=True) for t in batch)   # (B, T)
            last = world == 1 or a == accumulation - 1  # gradients are exchanged once, with the last micro-step
            with contextlib.nullcontext() if last else forward.no_sync():
                with autocast:
                    _, loss = forward(x, y)
                scaler.scale(loss / accumulation).backward()
            total = total + loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float('inf')).item()
        # One exchange tells every rank the mean loss, and whether any was asked to stop. The norm they know already.
        loss, signals = add_up([total.item() / accumulation / world, len(stop_signals)])
        stop, finite = signals > 0, math.isfinite(loss) and math.isfinite(norm)
        skipped = 0 if finite else skipped + 1
        # fp16: a loss scale that is too large overflows now and then; the scaler skips that step and halves it.
        scaling = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(loss)
        if not finite and not scaling and (cfg.nonfinite == 'stop' or skipped > MAX_SKIPS):
            raise TrainError(
                f'step {step:,}: loss {loss}, gradient norm {norm}, at learning rate {lr(step):.3g}; the weights were '
                f'not updated. Newest checkpoint in {cfg.out_dir}: {max(checkpoints(cfg.out_dir), default="none")}. '
                'Lower learning_rate, lengthen warmup, look at the data, or pass --nonfinite=skip.')
        if finite or scaling:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        busy += time.perf_counter() - began

        # --- record ------------------------------------------------------------------------------------------------
        if rank == 0 and (step % cfg.log_every == 0 or step in (first_step + 1, cfg.max_steps) or not finite):
            speed = tokens_per_step * (step - logged) / busy
            record.write('train', step=step, tokens=step * tokens_per_step, loss=loss, lr=lr(step - 1), grad_norm=norm,
                         tokens_per_s=round(speed), samples=mixture.counts(step * rows),
                         **({} if finite else {'skipped': True}))
            used = f' mfu {speed * flops / world / peak:.0%}' if peak else ''      # 6 N + 12 L C T over the peak
            bar.set_postfix_str(f'loss {loss:.3f} lr {lr(step - 1):.2e} {speed:,.0f} tok/s{used}', refresh=False)
            busy, logged = 0.0, step
        bar.update()
    bar.close()
    if step < cfg.max_steps:
        raise Stopped(f'{cfg.out_dir}: stopped at step {step:,} of {cfg.max_steps:,}, saved; the same command goes on')


def check_upstream_size(cfg):
    """TrainError for an upstream run that is missing and too long to start as a side effect."""
    up, _ = upstream(cfg)
    if not is_finished(up):
        with torch.device('meta'):
            model = GPTNeoX(model_config(up, dict.fromkeys(dataclasses.asdict(up), 'default'), None, 50304))
        flops = model.flops_per_token() * rows_per_step(up) * up.block_size * up.max_steps
        if flops > UPSTREAM_FLOPS:
            name = parent_name(cfg)
            raise TrainError(
                f'{name} has not been trained: no {up.out_dir}/ckpt_{up.max_steps:08d}.pt. It takes {flops:.0e} FLOPs, '
                f'too much to start on the side. Run it first:\n  torchrun --nproc_per_node=8 train.py {name}\nor '
                'start from released weights:\n  hf download EleutherAI/pythia-410m --local-dir weights/pythia-410m\n'
                'and --init_from=weights/pythia-410m')


def main(argv):
    if '--help' in argv or '-h' in argv:
        print(f'{__doc__}\nKnobs, with their defaults:\n\n{configurator.help_text(__file__)}')
        return 0
    process = Process(0, 0, 1)
    try:
        values, origin = configurator.load(__file__, argv)
        cfg = Config(**values)
        process = start_processes(pick_device(cfg.device))
        run(cfg, origin, process)
        code = 0
    except Stopped as stopped:
        say(stopped)
        code = 0
    except KeyboardInterrupt:                           # before the first step: there is nothing to save
        code = 130
    except (ValueError, OSError) as error:
        if type(error) is ValueError:                   # a fault of the program: show where
            raise
        # Most errors meet every rank. Rank 0 speaks for all; torchrun ends the others when it is gone.
        if int(os.environ.get('RANK', '0')):
            time.sleep(3)
        print(f'\ntrain.py: {error}', file=sys.stderr, flush=True)
        code = 2
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    return code


if __name__ == '__main__':
    code = main(sys.argv[1:])
    if 'RANK' in os.environ:
        # All is saved and said. C++ destructors of process groups, run at exit, abort a rank now and then ("terminate
        # called without an active exception"), and torchrun then reports a finished run as failed: leave without them.
        atexit._run_exitfuncs()                         # wandb's among them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
