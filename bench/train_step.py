"""Tokens per second of our training step against other implementations of GPT-NeoX, in the same run.

    python bench/train_step.py                          # the demo's size, bf16 autocast, whatever device there is
    python bench/train_step.py --dtype=fp32 --out=results/train_step_fp32.json
    python bench/train_step.py --model=410m --block=2048 --accumulation=8       # on a GPU: more contenders

Contenders; '+compile' after a name puts it through torch.compile:
    ours           model.py as it runs by default: on a GPU by its Triton kernels
    ours-pytorch   model.py with kernels = 'torch'
    transformers   GPTNeoXForCausalLM
    litgpt         its GPT, if it is installed; its weights are its own, so its losses are not compared

Who calls PyTorch's attention gets the backend that is fastest for the shape, which is found out first.

One step = forward, loss, backward (of --accumulation micro-batches), gradient clip, AdamW step. All get the same
weights, batch, precision and optimizer, and take turns in blocks of steps, so that a disturbance of the machine hits
all. The figure to quote is the ratio of our best median to the best of the others. Model FLOPs follow
GPTNeoX.flops_per_token, 6 N + 12 L C T; MFU is their share of the GPU's dense bf16 peak in its data sheet.
"""
import argparse
import contextlib
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import PYTHIA, GPTNeoX, GPTNeoXConfig, configure_optimizer, save_hf

try:
    import transformers
except ImportError:
    sys.exit('transformers is missing, there is nothing to compare with: pip install transformers')
try:
    import litgpt
except ImportError:
    litgpt = None

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
PEAK_FLOPS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}
ON_GPU = 'ours,ours+compile,ours-pytorch+compile,transformers,transformers+compile,litgpt+compile'


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', choices=PYTHIA, help='a size of Pythia, in place of the next four')
    p.add_argument('--layers', type=int, default=4)
    p.add_argument('--width', type=int, default=192, help='hidden_size')
    p.add_argument('--heads', type=int, default=6)
    p.add_argument('--vocab', type=int, default=384)
    p.add_argument('--block', type=int, default=256, help='tokens of a sequence')
    p.add_argument('--batch', type=int, default=16, help='sequences of a micro-batch')
    p.add_argument('--accumulation', type=int, default=1, help='micro-batches of a step')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--dtype', choices=DTYPES, default='bf16', help='bf16, fp16: autocast, weights fp32')
    p.add_argument('--contenders', help=f'default: ours,transformers; on a GPU {ON_GPU}')
    p.add_argument('--rounds', type=int, default=9, help='blocks each contender is timed for')
    p.add_argument('--steps', type=int, default=4, help='steps of a block')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    p.add_argument('--out', help='JSON file for every sample and what made it')
    args = p.parse_args()
    args.contenders = (args.contenders or (ON_GPU if args.device == 'cuda' else 'ours,transformers')).split(',')
    if not litgpt:
        args.contenders = [name for name in args.contenders if not name.startswith('litgpt')]
    return args


def build_models(args):
    """{contender: (model, loss function of a batch)}; those of one implementation share the model, to save memory."""
    shape = dict(max_position_embeddings=args.block)
    config = (GPTNeoXConfig.pythia(args.model, **shape) if args.model else
              GPTNeoXConfig(args.vocab, args.width, args.layers, args.heads, **shape))
    with torch.device(args.device):
        ours = GPTNeoX(config)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, folder)
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(folder).to(args.device).train()
    models = {}
    for name in args.contenders:
        implementation, _, compiled = name.partition('+')
        wrap = torch.compile if compiled else lambda model: model
        if implementation in ('ours', 'ours-pytorch'):
            models[name] = ours, loss_of_ours(ours, wrap(ours), 'torch' if 'pytorch' in implementation else 'auto')
        elif implementation == 'transformers':
            models[name] = theirs, loss_of_transformers(wrap(theirs))
        elif implementation == 'litgpt':
            models[name] = loss_of_litgpt(config, wrap, args.device)
        else:
            sys.exit(f'no contender {name!r}; there are ours, ours-pytorch, transformers and litgpt, +compile or not')
    return models


def loss_of_ours(model, forward, kernels):
    def loss(idx, targets):
        model.kernels = kernels
        return forward(idx, targets)[1]
    return loss


def loss_of_transformers(forward):
    def loss(idx, targets):                             # shift_labels: labels that need no shift any more
        return forward(idx, labels=targets, shift_labels=targets, use_cache=False).loss
    return loss


def loss_of_litgpt(config, wrap, device):
    """litgpt's GPT of the same shape, and the loss as its pretraining computes it."""
    model = litgpt.GPT(litgpt.Config(
        block_size=config.max_position_embeddings, padded_vocab_size=config.vocab_size, vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_embd=config.hidden_size,
        rotary_percentage=config.rotary_pct, parallel_residual=True)).to(device)
    forward = wrap(model)

    def loss(idx, targets):
        return litgpt.utils.chunked_cross_entropy(forward(idx), targets, chunk_size=0)
    return model, loss


def make_step(model, loss_of, optimizer, args):
    """A function that trains one step on (idx, targets) and returns the loss as a tensor."""
    device_type = torch.device(args.device).type
    precision = (contextlib.nullcontext() if args.dtype == 'fp32' else
                 torch.autocast(device_type, dtype=DTYPES[args.dtype]))
    scaler = torch.amp.GradScaler(device_type, enabled=args.dtype == 'fp16')

    def step(idx, targets):
        for _ in range(args.accumulation):
            with precision:
                loss = loss_of(idx, targets)
            scaler.scale(loss / args.accumulation).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def fastest_backend(config, args):
    """The backend of scaled_dot_product_attention that takes least, forward and backward, on heads of this shape."""
    seconds, shape = {}, (3, args.batch, config.num_attention_heads, args.block, config.head_size)
    qkv = torch.randn(shape, device=args.device, dtype=DTYPES[args.dtype], requires_grad=True)

    def step(backend):
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()

    for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION'):
        try:
            run = functools.partial(step, getattr(SDPBackend, name))
            run()
            seconds[name] = min(seconds_per_step(run, (), args) for _ in range(5))
        except RuntimeError as error:
            print(f'{name} is not to be had here: {str(error).splitlines()[0]}')
    print('attention of PyTorch, ms:', {name: round(s * 1e3, 3) for name, s in seconds.items()}, flush=True)
    return min(seconds, key=seconds.get)


def seconds_per_step(step, batch, args):
    synchronize = torch.cuda.synchronize if args.device.startswith('cuda') else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(args.steps):
        step(*batch)
    synchronize()
    return (time.perf_counter() - start) / args.steps


def peak_memory(step, batch):
    """GB that a step takes at most on the GPU, above the weights and moments that are there before and after."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(*batch)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def hardware(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
        return f'{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, ' \
               f'{torch.backends.cpu.get_cpu_capability()}'
    return f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'


def commit():
    out = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    return out.stdout.strip() or 'unknown'


def prepare(models, batch, args):
    """Warm every contender up from the same weights -> ({name: step}, {name: losses of its first 3 steps})"""
    steps, losses, optimizers, initial = {}, {}, {}, {}
    for name, (model, loss_of) in models.items():
        if id(model) not in optimizers:
            optimizers[id(model)] = configure_optimizer(model, 1e-4, (0.9, 0.95), 1e-8, 0.1, args.device)
            initial[id(model)] = {key: t.clone() for key, t in model.state_dict().items()}
        optimizer = optimizers[id(model)]
        steps[name] = make_step(model, loss_of, optimizer, args)
        model.load_state_dict(initial[id(model)])
        optimizer.state.clear()
        try:
            losses[name] = [steps[name](*batch).item() for _ in range(3)]
        except Exception as error:                      # out of memory, a compiler's: the others go on
            if name.startswith('ours'):
                raise
            print(f'{name} fails and is left out: {str(error).splitlines()[0]}', flush=True)
            del steps[name]
            model.zero_grad()
            continue
        print(f'{name}: first losses {losses[name]}', flush=True)
    # Step 0 compares the forward pass, step 2 the gradients too.
    tolerance = 1e-4 if args.dtype == 'fp32' else 2e-2
    for step in zip(*(values for name, values in losses.items() if not name.startswith('litgpt'))):
        if max(step) - min(step) > tolerance:
            sys.exit(f'losses of the first steps differ by more than {tolerance}: {losses}')
    return steps, losses


def main():
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    models = build_models(args)
    ours = next(model for model, _ in models.values() if isinstance(model, GPTNeoX))
    c = ours.config
    tokens = torch.randint(c.vocab_size, (args.batch, args.block + 1), device=args.device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    backend = fastest_backend(c, args) if args.device == 'cuda' else None
    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
        steps, losses = prepare(models, batch, args)
        samples = {name: [] for name in steps}          # seconds per step, one per block
        for _ in range(args.rounds):
            for name, step in steps.items():
                samples[name].append(seconds_per_step(step, batch, args))
        memory = {name: peak_memory(step, batch) for name, step in steps.items()} if backend else {}

    speed = {name: args.batch * args.block * args.accumulation / statistics.median(s) for name, s in samples.items()}
    flops = ours.flops_per_token(args.block)
    peak = next((f for gpu, f in PEAK_FLOPS.items() if gpu in hardware(args.device)), None)
    print(f'\n{c.num_hidden_layers} layers x {c.hidden_size}, {c.num_attention_heads} heads, vocabulary '
          f'{c.vocab_size}, batch {args.batch} x {args.block}, {args.accumulation} a step, {args.dtype}\n'
          f'{hardware(args.device)}, torch {torch.__version__}, transformers {transformers.__version__}\n')
    print(f'{"":22}{"tokens/s":>12}{"median ms":>12}{"best ms":>10}{"model TFLOP/s":>15}{"MFU":>6}{"peak GB":>9}')
    for name, s in samples.items():
        used = f'{speed[name] * flops / peak:.0%}' if peak else '-'
        held = f'{memory[name]:.1f}' if memory else '-'
        print(f'{name:22}{speed[name]:>12,.0f}{statistics.median(s) * 1e3:>12.1f}{min(s) * 1e3:>10.1f}'
              f'{speed[name] * flops / 1e12:>15.3f}{used:>6}{held:>9}')
    best = {us: max((name for name in speed if name.startswith('ours') == us), key=speed.get, default=None)
            for us in (True, False)}
    ratio = speed[best[True]] / speed[best[False]] if best[False] else None
    if ratio:
        print(f'\n{best[True]} / {best[False]}: {ratio:.2f}')
    if args.out:
        record = {'command': ' '.join(['python', *sys.argv]), 'commit': commit(),
                  'hardware': hardware(args.device),
                  'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                               'transformers': transformers.__version__,
                               **({'litgpt': litgpt.__version__} if litgpt else {})},
                  'settings': vars(args), 'first_losses': losses, 'seconds_per_step': samples,
                  'attention_backend': backend, 'tokens_per_s': speed, 'peak_gb_above_state': memory,
                  'mfu': {name: v * flops / peak for name, v in speed.items()} if peak else None,
                  'best': list(best.values()), 'ratio_of_medians': ratio}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
