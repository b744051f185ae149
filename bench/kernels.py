"""Each Triton kernel of model.py against its floor and against PyTorch, on a CUDA GPU, at the shapes of a Pythia.

    python bench/kernels.py --check                                 # results first: right, and the same twice
    python bench/kernels.py --out=results/gpu_kernels.json
    python bench/kernels.py --sweep                                 # tiles of the attention kernels

The floor of what only moves memory is its bytes at the speed of a copy, measured here; that of matrix products is
their operations at the speed of a large one, measured here. Attention counts half the square; its backward pass 2.5
times its forward pass, as if no tile were computed twice. Contenders take turns; medians.
"""
import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model
from model import PYTORCH, FlashAttention, Fused, GPTNeoX, GPTNeoXConfig, SplitHeads, add_norm, head_loss

torch._functorch.config.donated_buffer = False          # compiled backward passes shall run more than once
TRITON, BF16 = Fused(True, True, True), torch.bfloat16
TILES = ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 4, 3),
         (64, 32, 4, 3), (32, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 2))      # (queries, keys, warps, stages)


def milliseconds(contenders, rounds=11, calls=5):
    """{name: median time of a call}. A sleeping GPU lets the CPU run ahead, so that launches cost nothing."""
    times = {name: [] for name in contenders}
    for function in contenders.values():
        function(), function()                                      # compiles, allocates
    for _ in range(rounds):
        for name, function in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(20_000_000)                           # cycles: about 10 ms
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def machine(device):
    """What floors are made of: bytes/s of a copy (read and written), FLOP/s of a bfloat16 product, both measured."""
    source = torch.empty(2**28, dtype=BF16, device=device)
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device=device).to(BF16)
    ms = milliseconds({'copy': lambda: target.copy_(source), 'product': lambda: a @ a})
    return 2 * source.nbytes / ms['copy'] * 1e3, 2 * 8192**3 / ms['product'] * 1e3


def both_ways(run, inputs):
    """(forward pass, backward pass) of run(), which gives a tensor or several, as functions to be timed."""
    outputs = run()
    outputs = (outputs,) if torch.is_tensor(outputs) else tuple(outputs)
    gradients = [torch.randn_like(t) for t in outputs]
    return run, lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def compare(title, runs, floors, figure):
    """Times {name: (function, inputs)} forward and backward beside floors (ms) and prints figure(floor, ms, way)."""
    result = {}
    for way, (direction, floor) in enumerate(zip(('forward', 'backward'), floors)):
        ms = milliseconds({name: both_ways(*run)[way] for name, run in runs.items()})
        result[direction] = {'floor_ms': floor, 'ms': ms}
        print(f'{title}, {direction}: floor {floor:.3f} ms; ' +
              ', '.join(f'{name} {t:.3f} ms ({figure(floor, t, way)})' for name, t in ms.items()), flush=True)
    return result


def share(floor, ms, way):
    return f'{floor / ms:.0%} of the floor\'s speed'


def bench_norm(config, B, T, device, copy):
    C = config.hidden_size
    x, *branches = (torch.randn(B, T, C, device=device, dtype=dtype).requires_grad_()
                    for dtype in (torch.float32, BF16, BF16))
    norms = [torch.nn.LayerNorm(C, device=device) for _ in range(2)]
    inputs = [x, *branches, *(p for norm in norms for p in norm.parameters())]

    def sum_and_norms(fused):
        with torch.autocast(device, BF16):
            s, *ys = add_norm(x, branches, norms, fused)
            return s, *(y.to(BF16) for y in ys)                     # what the products after it take

    compiled = torch.compile(sum_and_norms)
    runs = {'ours': (lambda: sum_and_norms(TRITON), inputs), 'eager': (lambda: sum_and_norms(PYTORCH), inputs),
            'compiled': (lambda: compiled(PYTORCH), inputs)}
    # Bytes: x, s and their gradients fp32; two branches, two norms, their gradients and that of the branches bf16.
    floors = [x.numel() * n / copy * 1e3 for n in (4 + 2 + 2 + 4 + 2 + 2, 4 + 4 + 2 + 2 + 4 + 2)]
    return compare(f'residual + 2 layer norms, {B * T} x {C}', runs, floors, share)


def bench_rotary(config, B, T, device, copy):
    H, D = config.num_attention_heads, config.head_size
    qkv = torch.randn(B, T, H, 3, D, device=device).to(BF16)
    cos, sin = (t[:T].to(device) for t in model.rotary_tables(config))
    floor = 2 * 2 * B * T * H * config.rotary_dims * 2 / copy * 1e3     # q and k, read and written, 2 bytes a number
    ms = milliseconds({'ours': lambda: model.rotate_packed_(qkv, cos, sin, False),
                       'eager, with the split of heads': lambda: SplitHeads.apply(qkv, cos, sin)})
    print(f'rotary: floor {floor:.3f} ms; ' + ', '.join(f'{name} {t:.3f} ms' for name, t in ms.items()), flush=True)
    return {'floor_ms': floor, 'ms': ms}


def bench_attention(config, B, T, device, product):
    """Ours includes the rotation. SDPA gets q, k, v as views of the projection, rotated already."""
    H, D = config.num_attention_heads, config.head_size
    cos, sin = (t[:T].to(device) for t in model.rotary_tables(config))
    ours, theirs = (torch.randn(B, T, H, 3, D, device=device).to(BF16).requires_grad_() for _ in range(2))

    def sdpa(backend):
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(*theirs.permute(3, 0, 2, 1, 4), is_causal=True)
        return y.transpose(1, 2).reshape(B, T, H * D)

    runs = {'ours': (lambda: FlashAttention.apply(ours, cos, sin), [ours])}
    for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION'):
        run = functools.partial(sdpa, getattr(SDPBackend, name)), [theirs]
        try:
            both_ways(*run)[1]()
            runs[f'SDPA {name.split("_")[0].lower()}'] = run
        except RuntimeError as error:
            print(f'SDPA {name} is not to be had here: {str(error).splitlines()[0]}')
    flops = 4 * B * H * T * T * D / 2, 10 * B * H * T * T * D / 2
    return compare(f'attention, {B} x {T}, {H} heads of {D}', runs, [f / product * 1e3 for f in flops],
                   lambda floor, ms, way: f'{flops[way] / ms / 1e9:.0f} TFLOP/s')


def bench_loss(config, B, T, device, product):
    """Forward and backward in one: ours computes the gradients on the way. Peak memory, too, above what goes in."""
    C, V = config.hidden_size, config.vocab_size
    x, head = torch.randn(B, T, C, device=device).to(BF16).requires_grad_(), torch.nn.Linear(C, V, False, device=device)
    targets = torch.randint(V, (B, T), device=device)
    compiled = torch.compile(head_loss)

    def run(function, fused):
        def both():
            with torch.autocast(device, BF16):
                loss = function(x, head, targets, 'mean', fused)
            torch.autograd.grad(loss, (x, head.weight))
        return both

    runs = {'ours': run(head_loss, TRITON), 'eager': run(head_loss, PYTORCH), 'compiled': run(compiled, PYTORCH)}
    ms, memory = milliseconds(runs, rounds=5, calls=2), {}
    for name, function in runs.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    floor = 6 * B * T * C * V / product * 1e3
    print(f'head and loss, {B * T} x {C} x {V}: floor {floor:.2f} ms; ' +
          ', '.join(f'{name} {ms[name]:.2f} ms, {memory[name]:.1f} GB' for name in runs), flush=True)
    return {'floor_ms': floor, 'ms': ms, 'peak_gb': memory}


def sweep(config, B, T, device):
    """Every tile of TILES for the three attention kernels: TFLOP/s; the table in model.py should hold the best."""
    H, D = config.num_attention_heads, config.head_size
    qkv, do = torch.randn(B, T, H, 3, D, device=device).to(BF16), torch.randn(B, T, H * D, device=device).to(BF16)
    o, L, dqkv = torch.empty_like(do), torch.empty(B, H, T, device=device), torch.empty_like(qkv)
    delta, key = torch.empty_like(L), (2, max(64, model.triton.next_power_of_2(D)))
    backward = lambda: model.attention_backward(qkv, o, L, do, dqkv, delta)
    result, table, flops = {}, model.ATTENTION_TILES[key], B * H * T * T * D / 2
    for place, (kernel, launch, work) in enumerate((
            ('forward', lambda: model.attention_forward(qkv, o, L), 4), ('dq, all', backward, 10),
            ('dk dv, all', backward, 10))):
        for tile in TILES:
            if tile[place == 2] % tile[place != 2]:     # which side has to divide the other: see ATTENTION_TILES
                continue
            model.ATTENTION_TILES[key] = table[:place] + (tile,) + table[place + 1:]
            try:
                speed = work * flops / milliseconds({'': launch}, rounds=5)[''] / 1e9
            except Exception as error:                  # of Triton, for one: more shared memory than there is
                print(f'{kernel} {tile}: {str(error).splitlines()[0]}')
                continue
            result[f'{kernel} {tile}'] = speed
            in_use = ' (in use)' * (tile == table[place])
            print(f'head size {D}, {kernel} {tile}{in_use}: {speed:.0f} TFLOP/s', flush=True)
    model.ATTENTION_TILES[key] = table
    return result


def check(device, size='410m', B=2, T=2000, **changes):
    """A training step by the kernels against one by PyTorch, both against float32: as near; and twice the same bits."""
    torch.manual_seed(0)
    config = GPTNeoXConfig.pythia(size, **{'num_hidden_layers': 2, **changes})
    net = GPTNeoX(config).to(device)
    idx, targets = torch.randint(config.vocab_size, (2, B, T), device=device)

    def gradient(kernels, dtype):
        net.kernels = kernels
        net.zero_grad()
        with torch.autocast(device, dtype or BF16, enabled=dtype is not None):
            loss = net(idx, targets)[1]
        (loss * 2**10 if dtype == torch.float16 else loss).backward()
        scale = 2**-10 if dtype == torch.float16 else 1
        return torch.cat([loss.detach()[None], *(p.grad.flatten() * scale for p in net.parameters())])

    exact, good = gradient('torch', None), True
    for dtype in None, BF16, torch.float16:
        ours, again, theirs = (gradient(kernels, dtype) for kernels in ('triton', 'triton', 'torch'))
        distance, usual = ((g - exact).norm().item() / exact.norm().item() for g in (ours, theirs))
        passed = torch.equal(ours, again) and distance < max(1.5 * usual, 2e-5)
        good &= passed
        print(f'{size}, {dtype or torch.float32}: gradients {distance:.1e} from float32 (PyTorch {usual:.1e}), '
              f'{"the same" if torch.equal(ours, again) else "OTHERS"} in a second run: {"ok" if passed else "WRONG"}')
    return good


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', nargs='+', default=['410m', '1.4b'], help='sizes of Pythia')
    p.add_argument('--batch', type=int, default=16)
    p.add_argument('--block', type=int, default=2048, help='tokens of a sequence')
    p.add_argument('--check', action='store_true', help='only whether results are right; exit code 1 if not')
    p.add_argument('--sweep', action='store_true', help='the tiles of attention, too')
    p.add_argument('--out', help='JSON file')
    args = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit('bench/kernels.py measures GPU kernels, and PyTorch finds no GPU with CUDA here')
    if args.check:
        sys.exit(not all([check('cuda', size) for size in args.model]))
    copy, product = machine('cuda')
    print(f'{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bfloat16 product {product / 1e12:.0f} TFLOP/s')
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True)
    record = {'command': ' '.join(['python', *sys.argv]), 'commit': commit.stdout.strip() or 'unknown',
              'hardware': torch.cuda.get_device_name(), 'copy_bytes_per_s': copy, 'product_flop_per_s': product,
              'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                           'triton': model.triton.__version__}}
    for size in args.model:
        config, shape = GPTNeoXConfig.pythia(size), (args.batch, args.block, 'cuda')
        record[size] = {'norm': bench_norm(config, *shape, copy), 'rotary': bench_rotary(config, *shape, copy),
                        'attention': bench_attention(config, *shape, product),
                        'loss': bench_loss(config, *shape, product),
                        **({'sweep': sweep(config, *shape)} if args.sweep else {})}
        if args.out:                                                # after each size: a time limit may end the run
            Path(args.out).write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__':
    main()
