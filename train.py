"""Train a GPT-NeoX: from scratch, or on new data from an old model.

    python train.py config/rewarm_docs_code.py --replay=0.1
    torchrun --nproc_per_node=8 train.py config/rewarm_pile_slim.py

A stage is one config, trained from its start to its last step. A command trains a stage, after the
stages that it builds on: init_from may name their config.

Read the knobs, then train(), which is a stage in the order in which it happens. Method has the
functions that a project replaces. The helpers of train() follow in the order in which it calls
them, and main() is the last.

Shapes: B rows of a micro-batch, T = block_size tokens.
"""
import math
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch

import configurator
import data
import eval
import schedules
from configurator import UserError, require
from model import PYTHIA, GPTNeoX, GPTNeoXConfig, freeze, parameter_groups
from support import (checkpoints, checks, fast_path, huggingface, methods, parallel, processes,
                     record, rehearsal)
from support.processes import Stopped, is_first, say


@dataclass
class Config:
    # --- the run -------------------------------------------------------------------------------
    out_dir: str = 'out/run'            # checkpoints, metrics.jsonl, config.json, forgetting.png
    init_from: str = ''                 # new stage from a run's config or folder, a checkpoint, or
                                        # a Hugging Face directory
    branch_from: str = ''               # checkpoint of a run that this one continues differently
    keep_optimizer: bool = False        # init_from with the old moments; the papers start fresh
    seed: int = 1337                    # of initial weights and of the order of data; data that an
                                        # earlier stage has seen keep their order
    rehearse: bool = False              # the whole config in minutes, tiny, on built-in data

    # --- model ---------------------------------------------------------------------------------
    pythia: Literal[('', *PYTHIA)] = ''     # a size, '14m' to '12b', that sets the next three
    hidden_size: int = 192              # width C
    num_hidden_layers: int = 4
    num_attention_heads: int = 6        # H; head size D = C / H
    vocab_size: int = 0                 # rows of the embeddings; 0: what the data need, rounded up
                                        # to a multiple of 128 as GPT-NeoX does
    block_size: int = 256               # T, tokens of a window; a stage keeps that of its weights
    rotary_pct: float = 0.25            # share of each head's dims that carry position
    use_parallel_residual: bool = True  # x + Attn(LN1 x) + MLP(LN2 x), as Pythia; False: in turn
    hidden_act: str = 'gelu'            # exact, as in released Pythia configs; 'gelu_fast': tanh,
                                        # with which Pythia was trained

    # --- data: a source NAME is data_dir/NAME/{train,val}_*.bin ---------------------------------
    data_dir: str = 'data'
    paths: dict[str, object] = field(default_factory=dict)
                                        # shards elsewhere: {'pile/train': '/big/pile/*.bin'}
    train_data: dict[str, float] = field(default_factory=dict)      # new data {source: weight}
    replay_data: dict[str, float] = field(default_factory=dict)     # old data {source: weight}
    replay: float = 0.0                 # share of samples from replay_data; the total number of
                                        # tokens stays the same (Ibrahim et al. 2024)
    replay_order: Literal['first-seen', 'reshuffled', 'stored'] = 'first-seen'
                                        # as the earlier stage saw them, or in the order of files
    continue_data: bool = False         # sources seen before: continue where earlier stages have
                                        # stopped, training and replay each; else at window 0
    switches: list[dict] = field(default_factory=list)
                                        # [{'step': 900, 'train_data': {...}}]; 'lr_below': 0.2
                                        # instead: at a fifth of the peak (Parmar et al. 2024)
    old_data: list[str] = field(default_factory=list)   # what weights from elsewhere were
                                        # trained on, for roles in tables and pictures
    val_data: list[str] = field(default_factory=list)   # sources to evaluate on, old ones too

    # --- batch: the same optimisation on any number of devices ---------------------------------
    batch_size: int = 16                # sequences per step, over all devices
    micro_batch_size: int = 16          # sequences that a device takes at once, at most; the rest
                                        # is accumulated
    max_steps: int = 1000               # optimizer steps

    # --- learning rate (python schedules.py config/x.py plots it) ------------------------------
    schedule: Literal[tuple(schedules.SCHEDULES)] = 'cosine'
    learning_rate: float = 3e-3         # the peak: re-warming rises to it from 0 once more
    min_lr: float = 3e-4                # the end; a tenth of the peak, as Pythia
    warmup: float = 0.01                # steps, or below 1 a fraction of max_steps
    decay: float = 0.1                  # wsd: length of the final decay, likewise
    decay_shape: str = 'linear'         # wsd: linear, cosine, exponential or 1-sqrt
    constant_lr: float = 1.65e-3        # infinite: rate between cooldown and anneal
    cooldown: float = 0.6               # infinite: where the cooldown ends, a step or a fraction
    anneal: float = 0.85                # infinite: where the anneal begins; max_steps: never
    timescale: float = 10.0             # infinite_inv_sqrt: steepness of the cooldown
    repeats: int = 3                    # repeated_cosine: datasets, one after the other

    # --- what is trained, by AdamW as Pythia -----------------------------------------------------
    freeze: list[str] = field(default_factory=list)     # parameters that stay as they are, by name:
                                        # ['gpt_neox.embed_in.*', 'gpt_neox.layers.[01].*']
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1           # on matrices only
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no clipping

    # --- machine -------------------------------------------------------------------------------
    device: Literal['auto', 'cuda', 'mps', 'cpu'] = 'auto'      # auto: the first that is there
    dtype: Literal['auto', 'bf16', 'fp16', 'fp32'] = 'auto'     # bf16 where the hardware has it
    kernels: Literal['auto', 'triton', 'torch'] = 'auto'        # 'torch': the plain model
    compile: bool = False               # torch.compile each layer: pays on GPUs
    parallel: Literal['ddp', 'fsdp'] = 'ddp'    # of several processes, each has the model, or a
                                        # share of it, for models larger than one GPU
    checkpoint_activations: bool = False    # compute layers again in the backward pass: much less
                                        # memory for a third more time

    # --- record --------------------------------------------------------------------------------
    label: str = ''                     # name of the run in pictures; '': its folder's
    eval_every: int = 100               # steps; the first and the last step are evaluated too
    eval_windows: int = 200             # windows of each validation set, always the same; 0: all
    log_every: int = 10                 # steps
    save_every: int = 500               # steps; the last step is saved too; the newest two stay
    milestones: list[int] = field(default_factory=list)     # steps whose checkpoints stay as well
    mirror: Literal['', 'wandb', 'trackio'] = ''            # metrics.jsonl goes there too


# Knobs that are fields of GPTNeoXConfig too. A Pythia size sets the first three.
SHAPE = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'vocab_size', 'rotary_pct',
         'use_parallel_residual', 'hidden_act')

# There are four ways to start. They differ in the parts of a checkpoint that they take along; what
# they leave begins anew:
#   model       its shape and its weights
#   history     what it was trained on: the order of every source, and how far it has been read
#   optimizer   the moments of Adam, and what a Method keeps
#   progress    the step, and the mixture of sources up to there
#   stage       all else that is this stage's own: its first step, the mixtures still to come
TAKES = {
    'scratch': [],
    # new data and a new schedule: the rate is warmed up again, which is re-warming
    'init_from': ['model', 'history'],
    # the same run under another schedule or on other data from here on: to anneal it, for one
    'branch_from': ['model', 'history', 'optimizer', 'progress'],
    # whenever out_dir holds an unfinished run
    'resume': ['model', 'history', 'optimizer', 'progress', 'stage'],
}


class Method:
    """How a stage learns. A project inherits from it and replaces what it needs (see projects/).

    train() calls the functions in the order in which they stand here. What they return must be the
    same on every process, apart from the loss and the values of objective().
    """
    Config = Config                     # a project's own knobs are fields of a class that inherits
    Parent = None                       # what trains the stages before; None: the same Method
    autocast = scaler = None            # of mixed precision: train() puts them here at the start

    def __init__(self, cfg):
        self.cfg = cfg                  # with what the stage takes over, such as block_size

    def model(self, shape):
        """The model. One of your own has GPTNeoX's forward(idx, targets, reduction), config,
        gpt_neox.layers, num_params() and flops_per_token()."""
        return GPTNeoX(shape)

    def start(self, model, saved):
        """Called with the weights loaded. saved: what state_dict() returned when the moments were
        saved that this stage takes along, on the model's device; None where they begin anew."""

    def optimizer(self, model):
        """Any torch.optim.Optimizer whose step() needs no closure. What it keeps is saved and
        restored by the names of parameters."""
        cfg = self.cfg
        is_fused = next(model.parameters()).device.type in ('cpu', 'cuda')
        return torch.optim.AdamW(self.parameter_groups(model), lr=cfg.learning_rate,
                                 betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=is_fused)

    def parameter_groups(self, model):
        """Groups of (name, parameter). Their lr_factor multiplies the learning rate."""
        return parameter_groups(model, self.cfg.weight_decay)

    def weights(self, model):
        """{name: tensor} that are evaluated, saved and released in place of those that are trained:
        an average, for one. None: the trained. A run that is resumed trains the trained ones."""
        return None

    def state_dict(self):
        """What start() needs to go on: a dict of tensors and plain values."""
        return {}

    def evaluate(self, model, val_sets, rows, autocast):
        """Before a step -> {set: {'loss': ...}} of the weights that a checkpoint of it releases."""
        released = self.weights(model)
        if released is not None:
            model = fast_path.copy_of(model, self.model(model.config), released)
        return eval.evaluate(model, val_sets, rows, autocast)

    def after_evaluation(self, step, val):
        """-> ({name: number to log}, the mix of sources from here on, as data.mix_weights() returns
        it, or None to leave it). The checkpoint of the step was saved before this call, and a run
        that is resumed from it makes the call again."""
        return {}, None

    def objective(self, model, x, y, sources):
        """Inputs and targets (B, T) of a micro-batch, and the source of each row [B] -> (the loss
        to minimize, {name: number to log}). Of several processes, each has rows of its own."""
        _, loss = model(x, y)
        return loss, {}

    def change_gradients(self, model, step, batches):
        """After the backward passes and before clipping -> {name: number to log}. batches: the
        (x, y, sources) of the step, on this process."""
        return {}

    def after_step(self, model, step):
        """After the optimizer's step, with the gradients still there -> {name: number to log}."""
        return {}


def train(cfg, origin, method_class):
    """Train a stage, from its config to its last step.

    origin: {knob: 'default', or the file or option that set it}. method_class: Method, or a
    project's own.
    """
    # where it starts, and what it takes along; from here on cfg has the block size of old weights
    start = find_start(cfg)
    given, cfg = asdict(cfg), settle(cfg, origin, start)
    first_step = start.progress.get('step', 0)
    start_step = start.stage.get('start_step', first_step)      # a resumed stage is past it

    # what is known before the first step: the rate of every step, which rises once more in a stage
    # on new data (re-warming), and its samples, of new data and of old (replay)
    lr = schedules.of(cfg)
    plan = data.Plan(cfg, lr, start)

    # the model, with the weights of the stage before; they and the moments stay in float32
    method = method_class(cfg)
    device, dtype = processes.pick(cfg.device, cfg.dtype)       # dtype: of matrix products
    shape = model_shape(cfg, origin, start, plan.vocab_size)
    model, kernels = build_model(cfg, method, shape, start, device, dtype)
    method.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32,
                                     cache_enabled=not parallel.is_sharded(cfg))
    method.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    method.start(model, processes.moved(start.optimizer.get('method'), device) or None)
    forward = parallel.over_processes(model, cfg, device)       # the model, or DDP around it

    # the optimizer, with the moments of before where TAKES says so
    optimizer = method.optimizer(model)
    moments = checkpoints.Moments(model, optimizer, method)
    moments.load(start.optimizer, start.path)

    # all is known to be well: from here on the run writes into out_dir
    metrics = record.Record(cfg, start, start_step, record.identity(method, plan))
    record.announce(cfg, given, origin, lr, plan, metrics, {
        'start': start.way, 'parameters': model.num_params(), 'device': device,
        'dtype': str(dtype), 'kernels': kernels, 'shape': asdict(shape)})
    del start                                           # frees the weights and moments it was given

    stopping = processes.agree(0.0)[1]                  # asked already, while it was built
    for step in range(first_step, cfg.max_steps + 1):
        # save and evaluate before the step, so that the first and the last weights are seen too
        is_last = step == cfg.max_steps
        save_is_due = is_last or stopping or step % cfg.save_every == 0
        if (step > first_step and save_is_due) or step in cfg.milestones:
            weights = method.weights(model) or model.state_dict()
            checkpoints.save(cfg, {
                'model': {'shape': asdict(shape), 'built_by': methods.built_by(method_class),
                          'weights': parallel.gathered(weights)},
                'history': plan.history(step),
                'optimizer': moments.state_dict(),
                'progress': {'step': step, 'seed': cfg.seed, 'batch_size': cfg.batch_size,
                             **plan.progress(step)},
                'stage': {**metrics.stage(), **plan.stage(step)},
                'config': given})

        # old data are evaluated too: the rise of their loss since the start is the forgetting
        eval_is_due = step == start_step or step % cfg.eval_every == 0
        if is_last or (eval_is_due and not stopping):
            val = metrics.evaluated.get(step)           # a resumed run may have been here before
            if val is None:
                val = method.evaluate(model, plan.val_sets, plan.micro_batch_size, method.autocast)
            values, mix = method.after_evaluation(step, val)
            plan.change(step, mix)
            metrics.log_evaluation(step, lr(step), val, values, shape.vocab_size)
        if is_last or stopping:
            break

        # forward and backward; the last micro-step exchanges gradients between processes
        began, total, batches = time.perf_counter(), 0.0, []
        for group in optimizer.param_groups:
            group['lr'] = lr(step) * group.get('lr_factor', 1)
        for micro_step in range(plan.micro_steps):
            x, y, sources = plan.batch(step, micro_step)        # replayed rows among the new ones
            x, y = processes.to_device((x, y), device)                          # (B, T) each
            with parallel.exchange_gradients(forward, micro_step == plan.micro_steps - 1):
                with method.autocast:
                    loss, values = method.objective(forward, x, y, sources)
                method.scaler.scale(loss / plan.micro_steps).backward()
            total += loss.detach()
            metrics.note(values)
            batches.append((x, y, sources))

        # clip; all processes agree on the mean loss, and whether one of them was asked to stop
        method.scaler.unscale_(optimizer)
        metrics.note(method.change_gradients(forward, step, batches))
        max_norm = cfg.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        grad_norm = parallel.whole(grad_norm).item()
        loss, stopping = processes.agree(total.item() / plan.micro_steps)

        # A NaN anywhere shows in the loss or the norm on every process, and all stop together. In
        # fp16 a norm may be infinite now and then: the scaler skips the step and halves its scale.
        # At a scale of 1 nothing is left to halve.
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        may_skip = math.isfinite(loss) and method.scaler.is_enabled()
        if not is_finite and not (may_skip and method.scaler.get_scale() > 1):
            raise UserError(record.not_finite(cfg, step, loss, grad_norm, lr(step)))
        method.scaler.step(optimizer)
        method.scaler.update()
        metrics.note(method.after_step(model, step))
        optimizer.zero_grad(set_to_none=True)

        values = {'lr': lr(step), 'grad_norm': grad_norm, 'samples': plan.counts(step + 1)}
        metrics.log_step(step + 1, began, loss, values, model, is_due=not is_finite)
    metrics.close()
    if not is_last:
        raise Stopped(f'{cfg.out_dir}: stopped at step {step:,} of {cfg.max_steps:,}. '
                      'Run the same command again to resume.')


# ------------------------------------------------------------------------------
# How a stage starts

# way: a key of TAKES. path: of the checkpoint or weights. parent: what the record says of it. Then
# the parts of the checkpoint: dicts, empty where they begin anew.
Start = namedtuple('Start', ['way', 'path', 'parent', *checkpoints.PARTS])


def find_start(cfg):
    """How a stage starts, with the parts of a checkpoint that TAKES says."""
    # an unfinished run in out_dir is resumed, however it began
    way, path = 'resume', checkpoints.to_resume(cfg.out_dir)
    if path is None:
        way = 'init_from' if cfg.init_from else 'branch_from' if cfg.branch_from else 'scratch'
        path = checkpoints.locate(cfg)
    state = checkpoints.read_start(path, way)           # {} from scratch

    takes = list(TAKES[way])
    if way == 'init_from' and cfg.keep_optimizer:
        takes.append('optimizer')
    require('optimizer' not in takes or state['optimizer'], f'{way}: {path} holds weights only, '
            'no moments. Use init_from, without keep_optimizer.')
    if way == 'branch_from':
        step = state['progress']['step']
        require(step < cfg.max_steps, f'branch_from is at step {step:,}, but max_steps is '
                f'{cfg.max_steps:,}. Raise max_steps.')
    parts = [state[part] if part in takes else {} for part in checkpoints.PARTS]
    return Start(way, str(path or ''), checkpoints.in_short(state, path), *parts)


def settle(cfg, origin, start):
    """The config with what the stage takes over from its start."""
    if not start.model:
        return cfg
    block_size = start.model['shape']['max_position_embeddings']
    if origin['block_size'] == 'default':
        cfg = replace(cfg, block_size=block_size)
    if not start.progress:
        return cfg

    # a run goes on with the data where it was, so its batches must stay what they are
    fixed = {'seed': start.progress['seed'], 'batch_size': start.progress['batch_size'],
             'block_size': block_size}
    for knob, value in fixed.items():
        require(origin[knob] == 'default' or getattr(cfg, knob) == value, f'the run that goes on '
                f'counts its data by {knob} = {value}. Drop it from the config.')
    cfg = replace(cfg, **fixed)
    checks.check_batch(cfg)
    return cfg


def model_shape(cfg, origin, start, vocab_size):
    """The GPTNeoXConfig of the stage: that of its weights, or what the knobs say."""
    wanted = {name: getattr(cfg, name) for name in SHAPE if origin[name] != 'default'}
    if cfg.pythia:
        pythia = GPTNeoXConfig.pythia(cfg.pythia)
        wanted |= {name: getattr(pythia, name) for name in SHAPE[:3]}
    if not start.model:
        knobs = {name: getattr(cfg, name) for name in SHAPE} | wanted
        knobs |= {'vocab_size': vocab_size, 'max_position_embeddings': cfg.block_size}
        return GPTNeoXConfig(**knobs)

    shape = GPTNeoXConfig(**start.model['shape'])
    # the other GELU is allowed: released Pythia configs say exact, but tanh trained them
    if cfg.init_from and 'hidden_act' in wanted:
        shape = replace(shape, hidden_act=wanted['hidden_act'])
    for name, value in wanted.items():
        there = getattr(shape, name)
        require(value == there or (name == 'vocab_size' and value == 0), f'{name} is {there!r} in '
                f'the weights that the run starts from, but {value!r} in the config. A stage takes '
                'the shape of its parent: drop the knob.')
    return replace(shape, max_position_embeddings=cfg.block_size)


def build_model(cfg, method, shape, start, device, dtype):
    """(the model with its weights, which kernels run)."""
    fast_path.check(method.model, shape, cfg.kernels, device, dtype)

    def with_weights():
        torch.manual_seed(cfg.seed)                     # on the CPU: the same weights everywhere
        model = method.model(shape)
        if start.model:
            huggingface.load_weights(model, start.model['weights'], start.path)
        return model

    # of a sharded model, only the first process has the memory for all: it gives each its share
    whole_model = None
    if is_first() or not parallel.is_sharded(cfg):
        whole_model = model = with_weights()
    if parallel.is_sharded(cfg):
        with torch.device('meta'):
            model = method.model(shape)

    kernels = fast_path.choose(model, cfg.kernels, device, dtype)
    freeze(model, cfg.freeze)
    model.checkpoint_activations = cfg.checkpoint_activations
    if cfg.compile:
        # Layer by layer: one graph serves all. Inside a graph, the gradient of the embedding would
        # become atomic additions on a GPU, which vary from run to run; and DDP would exchange no
        # gradient before the end of the backward pass.
        for layer in model.gpt_neox.layers:
            layer.compile()
    if parallel.is_sharded(cfg):
        parallel.shard(model, whole_model, device)
    return model.to(device), kernels


# ------------------------------------------------------------------------------
# The stages of a command

Stage = namedtuple('Stage', 'cfg origin method_class')


def find_stages(cfg, origin, method_class):
    """[Stage, ...], the oldest first: a config that init_from names is trained before."""
    stages = [Stage(cfg, origin, method_class)]
    while True:
        # a stage that has begun needs its parent no more
        child = stages[0]
        name = child.cfg.init_from or child.cfg.branch_from
        if not name.endswith('.py') or checkpoints.to_resume(child.cfg.out_dir):
            return stages

        # its parent keeps its own knobs, apart from those of the machine on the command line
        method_class = child.method_class.Parent or child.method_class
        parent, its_origin = configurator.load(method_class.Config, [name])
        parent, its_origin = checks.settled(parent, its_origin, stages[-1])
        require(all(parent.out_dir != stage.cfg.out_dir for stage in stages), f'{name}: these '
                f'configs start from each other in a circle, or share out_dir {parent.out_dir}.')
        if checks.is_finished(parent, method_class):
            return stages
        stages.insert(0, Stage(parent, its_origin, method_class))


def run(stage, wait):
    """Train a stage unless that has been done. wait: for another process that trains it."""
    cfg = stage.cfg
    with processes.locked(cfg.out_dir, wait):
        if checks.is_finished(cfg, stage.method_class):
            say(f'{cfg.out_dir} is finished already, at step {cfg.max_steps:,}')
        else:
            checks.make_corpora(cfg)
            with processes.signals_are_noted():
                train(cfg, stage.origin, stage.method_class)
        eval.report(cfg.out_dir)


# ------------------------------------------------------------------------------
# The command line

def main(argv, method_class=Method):
    """Train the stages of a command -> exit code."""
    processes.tolerate_streams()
    if '--help' in argv or '-h' in argv:
        about, knobs = sys.modules[method_class.__module__].__doc__, method_class.Config
        print(f'{about}\nKnobs, with their defaults:\n\n{configurator.help_text(knobs)}')
        return 0
    code = 0
    try:
        checks.check_own_knobs(method_class.Config)
        cfg, origin = rehearsal.shrink(*configurator.load(method_class.Config, argv))
        processes.join(processes.pick_device(cfg.device))
        stages = find_stages(cfg, origin, method_class)
        checks.check_stages(stages)                     # all, before any is trained
        for stage in stages:
            run(stage, wait=stage is not stages[-1])
    except Stopped as stopped:
        say(stopped)
    except KeyboardInterrupt:                           # before a first step: nothing to save
        code = 130
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        code = processes.fail('train.py', error)
    return processes.leave(code)


def launch(method_class):
    """Run the command line of a method, and end the process."""
    processes.end(main(sys.argv[1:], method_class))


if __name__ == '__main__':
    launch(Method)
