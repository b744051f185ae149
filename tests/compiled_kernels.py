"""Machine code of the Triton kernels for an H100 (sm_90), compiled without a GPU.

test_kernels.py runs this file twice: with the Triton that is installed, and with 3.6.0, which comes
with torch 2.11. It checks what makes a kernel slow and what no test of results would notice:
registers spilled to memory, matrix products done twice, tiles that are not loaded ahead, narrow
memory accesses.
"""
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from model import GPTNeoX, GPTNeoXConfig
from support import fast_path

# loops: the instructions of every innermost loop that multiplies matrices
Code = namedtuple('Code', 'kernel options resources sass loops')
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.int64: '*i64'}
BF16 = torch.bfloat16


# ------------------------------------------------------------------------------
# From launches to machine code

def kernels():
    """The names of all kernels in model.py."""
    return [name for name, value in vars(model).items()
            if isinstance(value, triton.runtime.JITFunction) and name.endswith('_kernel')]


class Launches:
    """Takes the place of a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel, kept):
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid):
        return lambda *args, **options: self.kept.append((self.kernel, args, options))


def signature(kernel, args):
    """What Triton derives from arguments: (types, values of constants, alignments)."""
    types, constants, aligned = {}, {}, {}
    for i, (param, arg) in enumerate(zip(kernel.params, args)):
        if param.is_constexpr or arg is None:
            types[param.name] = 'constexpr'
            constants[i,] = arg
        elif torch.is_tensor(arg):
            types[param.name] = TYPES[arg.dtype]
        else:
            types[param.name] = 'fp32' if isinstance(arg, float) else 'i32'
        is_multiple = isinstance(arg, int) and arg % 16 == 0
        if torch.is_tensor(arg) or (is_multiple and types[param.name] == 'i32'):
            aligned[i,] = [['tt.divisibility', 16]]
    return types, constants, aligned


def compile_all(run):
    """[Code] of every kernel that run() launches, one for each signature."""
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
        for name in kernels():
            patch.setattr(model, name, Launches(getattr(model, name), launched))
        run()
    different = {(kernel.__name__, str(signature(kernel, args))): (kernel, args, options)
                 for kernel, args, options in launched}
    return [compile_for_sm90(*launch) for launch in different.values()]


def compile_for_sm90(kernel, args, options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    source = ASTSource(kernel, *signature(kernel, args))
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'

    def dump(flag):
        with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
            file.write(compiled.asm['cubin'])
            file.flush()
            return subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True,
                                  check=True).stdout

    usage, sass = re.findall(r'(REG|STACK|LOCAL):(\d+)', dump('-res-usage')), dump('-sass')
    resources = {name: int(value) for name, value in usage}
    resources['SHARED'] = compiled.metadata.shared
    return Code(kernel.__name__, options, resources, sass, inner_loops(sass))


def inner_loops(sass):
    """[[instruction, ...], ...] of every loop that multiplies matrices and contains no other."""
    found = re.findall(r'/\*([0-9a-f]{4,})\*/ +(.*?) *;', sass)
    instructions = [(int(address, 16), text) for address, text in found]
    loops = []                                          # a loop is a jump back; one to itself pads
    for address, text in instructions:
        jump = re.search(r'\bBRA(?:\.\S+)? (?:\S+, )?0x([0-9a-f]+)', text)
        if jump and int(jump.group(1), 16) < address:
            loops.append((int(jump.group(1), 16), address))
    inner = [(start, end) for start, end in loops
             if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)]
    bodies = [[text for address, text in instructions if start <= address <= end]
              for start, end in inner]
    return [body for body in bodies if any('HGMMA' in text for text in body)]


# ------------------------------------------------------------------------------
# What is compiled

@pytest.fixture(scope='module')
def step():
    """The kernels of a training step of two layers of Pythia-410M in bfloat16."""
    def run():
        net = GPTNeoX(GPTNeoXConfig.pythia('410m', num_hidden_layers=2))
        assert fast_path.choose(net, 'auto', 'cuda', BF16) == 'Triton'
        idx = torch.zeros(1, 128, dtype=torch.long)
        with torch.autocast('cpu', BF16):
            loss = net(idx, idx)[1]
        loss.backward()
    return compile_all(run)


def attention(D, dtype=BF16):
    """The three kernels of attention with heads of D."""
    qkv, o = torch.empty(1, 128, 2, 3, D, dtype=dtype), torch.empty(1, 128, 2 * D, dtype=dtype)
    L = torch.empty(1, 2, 128)

    def run():
        model.attention_forward(qkv, o, L)
        model.attention_backward(qkv, o, L, o.clone(), qkv.clone(), L.clone())
    codes = compile_all(run)
    names = ['attention_kernel', 'attention_dq_kernel', 'attention_dkv_kernel']
    assert [code.kernel for code in codes] == names
    return codes


@pytest.fixture(scope='module', params=[64, 128])
def heads(request):
    """(head size, its kernels)"""
    return request.param, attention(request.param)


# ------------------------------------------------------------------------------

def check_resources(code):
    print(code.kernel, code.resources)
    for loop in code.loops:
        assert not any(re.search(r'\b(STL|LDL)\b', text) for text in loop), code.kernel
    # Outside of loops, a few bytes do no harm: Triton 3.7.1 spills 8 in add_norm_kernel.
    assert code.resources['STACK'] + code.resources['LOCAL'] <= 16, code.kernel
    assert code.resources['SHARED'] <= 99 * 1024, code.kernel
    assert code.resources['REG'] * 32 * code.options.get('num_warps', 4) <= 65536, code.kernel


def test_every_kernel_fits_its_registers(step):
    assert {code.kernel for code in step} == set(kernels())
    for code in step:
        check_resources(code)


def test_attention_of_any_head_size_fits_its_registers(heads):
    D, codes = heads
    for code in codes:
        check_resources(code)
    if D == 128:
        for code in attention(256):
            check_resources(code)


@pytest.mark.parametrize('D', [64, 256])
def test_attention_in_float32_fits_in_shared_memory(D):
    """Every run checks its fast path in float32. Registers may be spilled: it is two rows."""
    for code in attention(D, torch.float32):
        assert code.resources['SHARED'] <= 99 * 1024, code.kernel


def test_no_product_is_done_twice(heads):
    """An inner loop multiplies as much as the formulas say, all warps together."""
    D, codes = heads
    products = {'attention_kernel': 2, 'attention_dq_kernel': 3, 'attention_dkv_kernel': 4}
    for code, tile in zip(codes, model.ATTENTION_TILES[2, D]):
        queries, keys, warps, _ = tile
        assert len(code.loops) == 2, code.kernel        # away from the diagonal, and on it
        for loop in code.loops:
            shapes = re.findall(r'HGMMA\.(\d+)x(\d+)x(\d+)', '\n'.join(loop))
            done = sum(int(m) * int(n) * int(k) for m, n, k in shapes)
            done *= warps // 4                          # four warps issue one together
            assert done == products[code.kernel] * queries * keys * D, code.kernel
            # products of older GPUs run at half the speed
            assert not any(re.search(r'\bHMMA', text) for text in loop), code.kernel


def test_tiles_are_loaded_ahead(heads):
    """An inner loop waits until all but its newest loads are there.

    DEPBAR.LE SB0, n waits until at most n loads are on their way.
    """
    D, codes = heads
    for code in codes:
        if D == 128 and code.kernel == 'attention_dkv_kernel':
            continue                                    # three stages need too much shared memory
        for loop in code.loops:
            left = re.findall(r'DEPBAR\.LE SB0, 0x(\w+)', '\n'.join(loop))
            assert left and min(int(n, 16) for n in left) > 0, (code.kernel, left)


def test_memory_is_accessed_16_bytes_at_a_time(step):
    for code in step:
        # from memory, to memory, from memory to shared memory
        for kind in ('LDG', 'STG', 'LDGSTS'):
            widths = re.findall(rf'\b{kind}\.E(\S*)', code.sass)
            wide = sum('.128' in width for width in widths)
            print(code.kernel, kind, wide, len(widths))
            if kind == 'LDGSTS' and not widths:
                continue
            assert wide > 0, code.kernel
            # What is one number a row, a mean or L, is no tile. How the compiler pipelines those
            # differs between versions.
            assert kind == 'LDGSTS' or wide >= len(widths) / 2, code.kernel
