"""Tokens per second of our training step beside other implementations, in one run.

    python bench/train_step.py                              # the demo's size, on this machine
    python bench/train_step.py --dtype=fp32 --out=results/speed/train_step_cpu_fp32.json
    python bench/train_step.py --model=410m --block=2048 --accumulation=4       # on a GPU

Contenders; '+compile' after a name compiles it:
    ours           model.py by its fastest path; compiled layer by layer, as train.py does
    ours-pytorch   model.py in plain PyTorch (kernels = 'torch'); likewise
    ours-fsdp      sharded over this one device: what parallel = 'fsdp' costs beside its exchange
    transformers   its GPTNeoXForCausalLM, with our weights
    nanogpt        the GPT of nanoGPT's model.py, from a clone: --nanogpt=FOLDER
    litgpt         its GPT, as for Pythia
The last two have weights and losses of their own, and nanoGPT's architecture is that of GPT-2, of
the same width and depth. A contender that is not installed is left out.

One step = forward, loss, backward (of --accumulation micro-batches), gradient clip, AdamW step. All
get the same batch, precision and optimizer, and on a GPU the attention of PyTorch that is fastest
for the shape. They take turns in blocks of steps, so that a disturbance of the machine hits all.
The file is written after every block. The figure to quote is the ratio of our best median to the
best of the others. FLOPs are those of GPTNeoX.flops_per_token; MFU is their share of the GPU's
dense bf16 peak.
"""
import contextlib
import copy
import functools
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from common import Record, empty_cache, peak_gb, synchronize
from configurator import UserError, require
from internals import make_optimizer
from model import PYTHIA, GPTNeoX, GPTNeoXConfig, cross_entropy
from support import fast_path
from support.huggingface import save_hf
from support.processes import DTYPES, GPU_PEAK_FLOPS, pick

ON_CPU = 'ours,transformers,nanogpt'
ON_GPU = ('ours,transformers,ours-pytorch,ours+compile,transformers+compile,ours-pytorch+compile,'
          'nanogpt+compile,litgpt+compile')


def main():
    args = parse_arguments()
    torch.manual_seed(0)
    record = Record(args, args.device)
    race = Race(args, record)
    with race.best_attention():
        race.run()
    return record.finish()


def parse_arguments():
    parser = common.option_parser(__doc__)
    add = parser.add_argument
    add('--model', default='demo', choices=['demo', *PYTHIA], help='the size (default: demo)')
    add('--block', type=int, default=256, help='tokens of a sequence')
    add('--batch', type=int, default=16, help='sequences of a micro-batch')
    add('--accumulation', type=int, default=1, help='micro-batches of a step')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--dtype', choices=['auto', *DTYPES], default='auto', help='of matrix products; weights '
        'are in fp32. auto: bf16 where the hardware has it')
    add('--contenders', help=f'default: {ON_CPU}; on a GPU {ON_GPU}')
    add('--nanogpt', help='folder with a clone of github.com/karpathy/nanoGPT')
    add('--rounds', type=int, default=9, help='blocks each contender is timed for')
    add('--steps', type=int, default=4, help='steps of a block')
    args = parser.parse_args()
    if args.rehearse:
        vars(args).update(device='cpu', model='toy', block=32, batch=2, rounds=2, steps=1)
    default = ON_GPU if args.device == 'cuda' else ON_CPU
    args.contenders = (args.contenders or default).split(',')
    return args


def config_of(args):
    """The shape of the model. 'demo' is the default of train.py."""
    if args.model in PYTHIA:
        return GPTNeoXConfig.pythia(args.model, max_position_embeddings=args.block)
    if args.model == 'toy':
        shape = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=64)
    else:
        shape = dict(num_hidden_layers=4, hidden_size=192, num_attention_heads=6, vocab_size=384)
    return GPTNeoXConfig(max_position_embeddings=args.block, **shape)


# ------------------------------------------------------------------------------
# Contenders

# which kernels they ask for
OURS = {'ours': 'auto', 'ours-pytorch': 'torch', 'ours-fsdp': 'auto'}


# builders of peers: our model, args -> (model, function that computes its loss)

def build_transformers(ours, args):
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, folder)
        model = transformers.GPTNeoXForCausalLM.from_pretrained(folder)

    def loss(idx, targets):
        # shift_labels: the targets are shifted already
        return model(idx, labels=targets, shift_labels=targets, use_cache=False).loss
    return model, loss


def build_nanogpt(ours, args):
    require(args.nanogpt, 'it needs --nanogpt=FOLDER')
    spec = importlib.util.spec_from_file_location('nanogpt', Path(args.nanogpt, 'model.py'))
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt'] = nanogpt                    # its dataclass looks itself up there
    spec.loader.exec_module(nanogpt)
    c = ours.config
    model = nanogpt.GPT(nanogpt.GPTConfig(
        block_size=c.max_position_embeddings, vocab_size=c.vocab_size, bias=True,
        n_layer=c.num_hidden_layers, n_head=c.num_attention_heads, n_embd=c.hidden_size))
    return model, lambda idx, targets: model(idx, targets)[1]


def build_litgpt(ours, args):
    import litgpt
    c = ours.config
    model = litgpt.GPT(litgpt.Config(
        block_size=c.max_position_embeddings, padded_vocab_size=c.vocab_size,
        vocab_size=c.vocab_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
        n_embd=c.hidden_size, rotary_percentage=c.rotary_pct, parallel_residual=True))
    return model, lambda idx, targets: cross_entropy(model(idx), targets)


PEERS = {'transformers': build_transformers, 'nanogpt': build_nanogpt, 'litgpt': build_litgpt}


def shard_on_one_device(model, device):
    """As shard() in train.py does, which leaves a model whole where there is one process."""
    if not dist.is_initialized():
        backend = 'nccl' if device == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device, (1,))
    for module in (*model.gpt_neox.layers, model):
        fully_shard(module, mesh=mesh)


class Contender:
    """A model with an optimizer of its own, and the step that trains it."""

    def __init__(self, name, ours, args, dtype):
        kind, _, compiled = name.partition('+')
        if kind in OURS:
            model = copy.deepcopy(ours)
            self.path = fast_path.choose(model, OURS[kind], args.device, dtype)
            self.loss = lambda idx, targets: model(idx, targets)[1]
            parts = model.gpt_neox.layers
        else:
            model, self.loss = PEERS[kind](ours, args)
            self.path = 'its own'
            parts = [model]
        if compiled:
            for part in parts:
                part.compile(backend='eager' if args.rehearse else 'inductor')
        self.model = model.to(args.device).train()
        if kind == 'ours-fsdp':
            shard_on_one_device(self.model, args.device)
        self.optimizer = make_optimizer(model, args.device)
        self.scaler = torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)
        self.autocast = torch.autocast(args.device, dtype, enabled=dtype != torch.float32,
                                       cache_enabled=kind != 'ours-fsdp')
        self.accumulation = args.accumulation

    def step(self, idx, targets):
        """Train on a batch -> the loss, a tensor."""
        for _ in range(self.accumulation):
            with self.autocast:
                loss = self.loss(idx, targets)
            self.scaler.scale(loss / self.accumulation).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


# ------------------------------------------------------------------------------
# The race

class Race:
    """Times contenders; everything is in the record as soon as it is known."""

    def __init__(self, args, record):
        self.args, self.record = args, record
        self.dtype = pick(args.device, args.dtype)[1]
        with torch.device(args.device):
            self.ours = GPTNeoX(config_of(args))        # its weights are those of all
            tokens = torch.randint(self.ours.config.vocab_size, (args.batch, args.block + 1))
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.ready = {}                                 # {name: Contender} of those that run
        self.result = record.result
        self.result.update(
            settings=vars(args), dtype=str(self.dtype).removeprefix('torch.'), path={}, absent={},
            first_losses={}, first_step_s={}, seconds_per_step={}, tokens_per_s={},
            peak_gb_above_state={})

    def run(self):
        """Prepare each and time it once at once. Then all take turns."""
        for name in self.args.contenders:
            if self.record.time_left() <= 0:
                self.record.skip(name)
            elif self.attempt(name, self.prepare):
                self.attempt(name, self.time_block)
        self.compare_losses()
        for i in range(1, self.args.rounds):
            if self.record.time_left() <= 0:
                self.record.skip(f'rounds from {i} on')
                break
            for name in list(self.ready):
                self.attempt(name, self.time_block)
        if self.args.device == 'cuda':
            for name in list(self.ready):
                self.attempt(name, self.measure_memory)
        self.show()

    def attempt(self, name, function):
        """function(name) -> whether it worked. Memory may run out, or a compiler may fail."""
        try:
            function(name)
            return True
        except Exception as error:
            self.record.fail(name, error)
            self.ready.pop(name, None)
        empty_cache()
        return False

    def prepare(self, name):
        """Build it and take 3 steps, of which the first compiles."""
        kind = name.partition('+')[0]
        require(kind in OURS or kind in PEERS, f'there is no contender {name}, only '
                f'{", ".join([*OURS, *PEERS])}, each with +compile or without.')
        try:
            contender = Contender(name, self.ours, self.args, self.dtype)
        except (ImportError, UserError) as error:
            print(f'{name} is left out: {error}', flush=True)
            self.result['absent'][name] = str(error)
            return
        began = time.perf_counter()
        losses = [contender.step(*self.batch).item()]
        seconds = time.perf_counter() - began
        losses += [contender.step(*self.batch).item() for _ in range(2)]
        self.ready[name] = contender
        self.result['path'][name] = contender.path
        self.result['first_losses'][name] = losses
        self.result['first_step_s'][name] = seconds
        print(f'{name} ({contender.path}): first losses {losses}, first step {seconds:.1f} s',
              flush=True)

    def time_block(self, name):
        if name not in self.ready:
            return
        synchronize(self.args.device)
        began = time.perf_counter()
        for _ in range(self.args.steps):
            self.ready[name].step(*self.batch)
        synchronize(self.args.device)
        seconds = (time.perf_counter() - began) / self.args.steps
        self.result['seconds_per_step'].setdefault(name, []).append(seconds)
        self.summarise()

    def measure_memory(self, name):
        step = functools.partial(self.ready[name].step, *self.batch)
        self.result['peak_gb_above_state'][name] = peak_gb(step)

    def compare_losses(self):
        """Step 0 compares the forward pass, step 2 the gradients too."""
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        same_weights = {name: losses for name, losses in self.result['first_losses'].items()
                        if name.startswith(('ours', 'transformers'))}
        for step in range(3):
            values = [losses[step] for losses in same_weights.values()]
            if values and not max(values) - min(values) <= tolerance:
                self.record.say_wrong(
                    f'losses of step {step} differ by more than {tolerance}: {same_weights}')

    def best_attention(self):
        """A context in which PyTorch's attention takes the backend that is fastest here."""
        if self.args.device != 'cuda' and not self.args.rehearse:
            return contextlib.nullcontext()
        c, args = self.ours.config, self.args
        shape = 3, args.batch, c.num_attention_heads, args.block, c.head_size
        qkv = torch.randn(shape, device=args.device, dtype=self.dtype, requires_grad=True)

        def step(backend):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()

        runs = {name: functools.partial(step, getattr(SDPBackend, name))
                for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION')}
        ms, errors = common.milliseconds(runs, args.device, rounds=5)
        print('attention of PyTorch, ms:', ms, errors, flush=True)
        self.result['attention_ms'] = ms
        order = [*sorted(ms, key=ms.get), 'MATH']
        return sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True)

    def summarise(self):
        """Tokens per second, share of the peak, and our best beside the best of the others."""
        args, result = self.args, self.result
        tokens = args.batch * args.block * args.accumulation
        speed = {name: tokens / statistics.median(found)
                 for name, found in result['seconds_per_step'].items()}
        result['tokens_per_s'] = speed
        peaks = [peak for gpu, peak in GPU_PEAK_FLOPS.items() if gpu in result['hardware']]
        if peaks:
            flops = self.ours.flops_per_token(args.block)
            result['mfu'] = {name: value * flops / peaks[0] for name, value in speed.items()}
        if 'ours' in speed and 'ours-fsdp' in speed:
            result['fsdp_overhead_percent'] = 100 * (speed['ours'] / speed['ours-fsdp'] - 1)
        ours = [name for name in speed if name.startswith('ours')]
        others = [name for name in speed if not name.startswith('ours')]
        if ours and others:
            best = [max(names, key=speed.get) for names in (ours, others)]
            result['best'], result['ratio_of_medians'] = best, speed[best[0]] / speed[best[1]]
        self.record.save()

    def show(self):
        result, c, args = self.result, self.ours.config, self.args
        print(f'\n{c.num_hidden_layers} layers x {c.hidden_size}, {c.num_attention_heads} heads, '
              f'vocabulary {c.vocab_size}, batch {args.batch} x {args.block}, {args.accumulation} '
              f'a step, {result["dtype"]}\n{result["hardware"]}, {result["versions"]}\n')
        print(f'{"":22}{"tokens/s":>12}{"median ms":>12}{"best ms":>10}{"TFLOP/s":>10}{"MFU":>6}'
              f'{"peak GB":>9}')
        for name, speed in result['tokens_per_s'].items():
            found = result['seconds_per_step'][name]
            tflops = speed * self.ours.flops_per_token(args.block) / 1e12
            mfu = f'{result["mfu"][name]:.0%}' if 'mfu' in result else '-'
            gb = result['peak_gb_above_state'].get(name)
            gb = f'{gb:.1f}' if gb else '-'
            print(f'{name:22}{speed:>12,.0f}{statistics.median(found) * 1e3:>12.1f}'
                  f'{min(found) * 1e3:>10.1f}{tflops:>10.3f}{mfu:>6}{gb:>9}')
        if 'fsdp_overhead_percent' in result:
            print(f'\nfsdp on one device: {result["fsdp_overhead_percent"]:.1f}% slower')
        if 'best' in result:
            print(f'\n{" / ".join(result["best"])}: {result["ratio_of_medians"]:.2f}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
