"""Are the Triton kernels of model.py right on this GPU?

    python3 bench/gpu_check.py --out=check.json             # about a minute

For the head sizes and widths of every Pythia: loss and gradients of a training step by the kernels
and by PyTorch, each against float64. Every tensor must be as near as PyTorch's, within a factor of
2. A second run must give the same bits, and the check with which train.py begins must agree. Exit
code 3 if anything is wrong.
"""
import copy
import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

import common
from common import Record
from configurator import UserError, require
from model import GPTNeoX, GPTNeoXConfig
from support import fast_path
from support.processes import DTYPES

Case = namedtuple('Case', 'size dtype layers tokens')
# 410m first, then the other head sizes (32, 128, 80, 256), then the other widths. Neither 2000 nor
# 1000 tokens are a multiple of a tile.
CASES = [Case('410m', 'bf16', 2, 2000), Case('410m', 'fp32', 1, 1000),
         Case('410m', 'fp16', 1, 1000), Case('14m', 'bf16', 1, 1000),
         Case('1.4b', 'bf16', 1, 1000), Case('2.8b', 'bf16', 1, 1000),
         Case('1b', 'bf16', 1, 1000), Case('70m', 'bf16', 1, 1000),
         Case('160m', 'bf16', 1, 1000), Case('31m', 'bf16', 1, 1000),
         Case('6.9b', 'bf16', 1, 1000), Case('12b', 'bf16', 1, 1000)]
# The interpreter multiplies bfloat16 wrongly, so a rehearsal leaves it out.
TOY_CASES = [Case('410m', 'fp32', 1, 40), Case('2.8b', 'fp16', 1, 40)]


def main():
    parser = common.option_parser(__doc__)
    parser.add_argument('--case', nargs=4, metavar=('SIZE', 'DTYPE', 'LAYERS', 'TOKENS'),
                        help='one alone, printed as JSON')
    args = parser.parse_args()
    device = common.device_of(args)
    if args.case:
        size, dtype, layers, tokens = args.case
        case = Case(size, dtype, int(layers), int(tokens))
        print(json.dumps(check(case, device, args.rehearse)))
        return 0

    # Several cases at a time, since compiling takes most of it. Each has a process of its own: an
    # illegal access by one kernel leaves the others a GPU that works.
    record = Record(args, device)
    record.result['cases'] = {}
    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as pool:
        cases = TOY_CASES if args.rehearse else CASES
        running = {pool.submit(check_apart, case, record, args.rehearse): case for case in cases}
        for future in as_completed(running):
            keep(record, running[future], future)
    return record.finish()


def check_apart(case, record, rehearse):
    """check(case) in another process -> its result, or None when no time is left to start it."""
    if record.time_left() <= 0:
        return None
    command = [sys.executable, __file__, '--case', *map(str, case)]
    if rehearse:
        command.append('--rehearse')
    run = subprocess.run(command, capture_output=True, text=True, timeout=record.time_left())
    if run.returncode:
        last_line = (run.stderr.strip().splitlines() or [''])[-1]
        raise RuntimeError(f'exit code {run.returncode}: {last_line}\n{run.stderr[-2000:]}')
    return json.loads(run.stdout.splitlines()[-1])


def keep(record, case, future):
    """Put the result of a case into the record, and say what it is."""
    name = f'{case.size} {case.dtype}'
    try:
        found = future.result()
    except Exception as error:
        record.fail(name, error)
        return
    if found is None:
        record.skip(name)
        return
    record.result['cases'][name] = found
    worst, bits = found['worst'], 'the same bits' if found['same_bits'] else 'OTHER BITS'
    line = (f'{name}: gradients {found["distance"]:.1e} from float64 '
            f'(PyTorch {found["pytorch"]:.1e}), worst {worst["name"]} {worst["distance"]:.1e} '
            f'({worst["pytorch"]:.1e}), {bits} in a second run {found["train_py_refuses"]}')
    if found['ok']:
        print(f'{line}: ok', flush=True)
        record.save()
    else:
        record.say_wrong(line)


# ------------------------------------------------------------------------------
# One case

def check(case, device, rehearse):
    torch.manual_seed(0)
    with torch.device(device):
        net = GPTNeoX(shrink(case, rehearse))
    batch = torch.randint(net.config.vocab_size, (2, 2, case.tokens), device=device)
    dtype = DTYPES[case.dtype]
    ours = step(net, batch, 'triton', dtype)
    again = step(net, batch, 'triton', dtype)
    theirs = step(net, batch, 'torch', dtype)
    exact = step(copy.deepcopy(net).double(), batch, 'torch', torch.float64)

    rows = []
    for name in exact:
        near = distance(ours[name], exact[name])
        usual = distance(theirs[name], exact[name])
        # In fp32 the order of sums alone makes differences of 1e-6. And a single number, the loss,
        # may be near by luck.
        least = 1e-3 if name == 'loss' and case.dtype != 'fp32' else 1e-5
        rows.append({'name': name, 'distance': near, 'pytorch': usual,
                     'ratio': near / max(usual, least)})
    worst = max(rows, key=lambda row: row['ratio'])
    finite = all(bool(tensor.isfinite().all()) for tensor in ours.values())
    same_bits = all(torch.equal(ours[name], again[name]) for name in ours)

    # what train.py does before its first step
    refusal = ''
    try:
        length = min(256, net.config.max_position_embeddings)
        shape = replace(net.config, max_position_embeddings=length)
        fast_path.check(GPTNeoX, shape, 'triton', device, dtype)
    except UserError as error:
        refusal = str(error)
    return {'case': case._asdict(), 'distance': distance(flat(ours), flat(exact)),
            'pytorch': distance(flat(theirs), flat(exact)), 'worst': worst, 'finite': finite,
            'same_bits': same_bits, 'train_py_refuses': refusal,
            'ok': finite and same_bits and worst['ratio'] < 2 and not refusal}


def shrink(case, rehearse):
    """The size with fewer layers, and but for 410m with a small vocabulary."""
    shape = dict(num_hidden_layers=case.layers, max_position_embeddings=case.tokens)
    if rehearse:
        head_size = GPTNeoXConfig.pythia(case.size).head_size
        shape.update(hidden_size=head_size, num_attention_heads=1, vocab_size=64)
    elif case.size != '410m':
        shape.update(vocab_size=2000)
    return GPTNeoXConfig.pythia(case.size, **shape)


def step(net, batch, kernels, dtype):
    """{name: gradient} of a training step, and its loss."""
    idx, targets = batch
    device = idx.device.type
    path = fast_path.choose(net, kernels, device, dtype)
    require(kernels == 'torch' or path == 'Triton', path)
    net.zero_grad()
    is_half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device, dtype if is_half else torch.bfloat16, enabled=is_half):
        loss = net(idx, targets)[1]
    # without a loss scale, small gradients in fp16 would be rounded to zero
    scale = 2**10 if dtype == torch.float16 else 1
    (loss * scale).backward()
    found = {name: p.grad / scale for name, p in net.named_parameters()}
    found['loss'] = loss.detach()
    return found


def distance(got, exact):
    """|got - exact| / |exact|"""
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def flat(tensors):
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


if __name__ == '__main__':
    sys.exit(main())
