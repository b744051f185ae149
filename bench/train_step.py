"""Tokens per second of our training step against transformers' GPTNeoXForCausalLM, in the same run.

    python bench/train_step.py                          # the demo's size, bf16 autocast, whatever device
    there is
    python bench/train_step.py --dtype=fp32 --out=results/train_step_fp32.json

One step = forward, loss, backward, gradient clip, AdamW step. Both models get the same weights, batch,
precision and optimizer, and take turns in blocks of steps, so that a disturbance of the machine hits both.
The figure to quote is the ratio of the medians. Model FLOPs follow GPTNeoX.flops_per_token.
"""
import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import GPTNeoX, GPTNeoXConfig, configure_optimizer, save_hf

try:
    import transformers
except ImportError:
    sys.exit('transformers is missing, there is nothing to compare with: pip install transformers')

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--layers', type=int, default=4)
    p.add_argument('--width', type=int, default=192, help='hidden_size')
    p.add_argument('--heads', type=int, default=6)
    p.add_argument('--vocab', type=int, default=384)
    p.add_argument('--block', type=int, default=256, help='tokens of a sequence')
    p.add_argument('--batch', type=int, default=16, help='sequences of a step')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--dtype', choices=DTYPES, default='bf16', help='bf16, fp16: autocast, weights fp32')
    p.add_argument('--compile', choices=('none', 'ours', 'both'), default='none', help='torch.compile')
    p.add_argument('--rounds', type=int, default=9, help='blocks each model is timed for')
    p.add_argument('--steps', type=int, default=4, help='steps of a block')
    p.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    p.add_argument('--out', help='JSON file for every sample and what made it')
    return p.parse_args()


def build_models(args):
    """{name: (parameters, loss function of a batch)}: ours, and transformers' reading what we saved."""
    config = GPTNeoXConfig(args.vocab, args.width, args.layers, args.heads,
                           max_position_embeddings=args.block)
    ours = GPTNeoX(config).to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, folder)
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(folder).to(args.device).train()
    forward_ours = torch.compile(ours) if args.compile in ('ours', 'both') else ours
    forward_theirs = torch.compile(theirs) if args.compile == 'both' else theirs

    def loss_theirs(idx, targets):                      # shift_labels: labels that need no shift any more
        return forward_theirs(idx, labels=targets, shift_labels=targets, use_cache=False).loss

    return {'ours': (ours, lambda idx, targets: forward_ours(idx, targets)[1]),
            'transformers': (theirs, loss_theirs)}


def make_step(model, loss_of, args):
    """A function that trains one step on (idx, targets) and returns the loss as a tensor."""
    optimizer = configure_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1, args.device)
    device_type = torch.device(args.device).type
    precision = (contextlib.nullcontext() if args.dtype == 'fp32' else
                 torch.autocast(device_type, dtype=DTYPES[args.dtype]))
    scaler = torch.amp.GradScaler(device_type, enabled=args.dtype == 'fp16')

    def step(idx, targets):
        with precision:
            loss = loss_of(idx, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def seconds_per_step(step, batch, args):
    synchronize = torch.cuda.synchronize if args.device.startswith('cuda') else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(args.steps):
        step(*batch)
    synchronize()
    return (time.perf_counter() - start) / args.steps


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


def main():
    args = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    models = build_models(args)
    tokens = torch.randint(args.vocab, (args.batch, args.block + 1), device=args.device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    steps = {name: make_step(model, loss_of, args) for name, (model, loss_of) in models.items()}

    # The first steps warm up and show that both train the same: step 0 the forward pass, step 2 the gradients
    # too.
    losses = {name: [step(*batch).item() for _ in range(3)] for name, step in steps.items()}
    tolerance = 1e-4 if args.dtype == 'fp32' else 2e-2
    for a, b in zip(*losses.values()):
        if abs(a - b) > tolerance:
            sys.exit(f'losses of the first steps differ by more than {tolerance}: {losses}')

    samples = {name: [] for name in steps}              # seconds per step, one per block
    for _ in range(args.rounds):
        for name, step in steps.items():
            samples[name].append(seconds_per_step(step, batch, args))

    per_step = args.batch * args.block
    speed = {name: per_step / statistics.median(s) for name, s in samples.items()}
    ratio = speed['ours'] / speed['transformers']
    flops = models['ours'][0].flops_per_token(args.block)
    print(f'{args.layers} layers x {args.width}, {args.heads} heads, vocabulary {args.vocab}, batch '
          f'{args.batch} x {args.block}, {args.dtype}, compile {args.compile}\n{hardware(args.device)}, '
          f'torch {torch.__version__}, transformers {transformers.__version__}\n')
    print(f'{"":14}{"tokens/s":>12}{"median ms":>12}{"best ms":>10}{"model GFLOP/s":>15}{"loss, step 2":>14}')
    for name, s in samples.items():
        print(f'{name:14}{speed[name]:>12,.0f}{statistics.median(s) * 1e3:>12.1f}{min(s) * 1e3:>10.1f}'
              f'{speed[name] * flops / 1e9:>15,.0f}{losses[name][2]:>14.4f}')
    best = min(samples['transformers']) / min(samples['ours'])
    print(f'\nours / transformers: {ratio:.2f} (of the best blocks: {best:.2f})')
    if args.out:
        record = {'command': ' '.join(['python', *sys.argv]), 'commit': commit(),
                  'hardware': hardware(args.device),
                  'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                               'transformers': transformers.__version__},
                  'settings': vars(args), 'first_losses': losses, 'seconds_per_step': samples,
                  'tokens_per_s': speed, 'ratio_of_medians': ratio, 'ratio_of_best': best}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
