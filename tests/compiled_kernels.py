"""Machine code of the Triton kernels for an H100 (sm_90), compiled without one, at the shapes of Pythia.

test_kernels.py runs this file twice: with the Triton that is installed, and with the one of GPU machines, 3.6.
What is checked is what makes a kernel slow and no test of results would notice: registers spilled to memory, matrix
products done twice, tiles that are waited for in place of being loaded ahead, narrow memory accesses.
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

Code = namedtuple('Code', 'kernel options resources sass loops')
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.int64: '*i64'}


def kernels():
    return [name for name, value in vars(model).items() if isinstance(value, triton.runtime.JITFunction)
            and name.endswith('_kernel')]


class Launches:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel, kept):
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid):
        return lambda *args, **options: self.kept.append((self.kernel, args, options))


def signature(kernel, args):
    """What Triton derives from arguments: (types, values of constants, alignments)"""
    types, constants, aligned = {}, {}, {}
    for i, (param, arg) in enumerate(zip(kernel.params, args)):
        if param.is_constexpr or arg is None:
            types[param.name], constants[i,] = 'constexpr', arg
        else:
            types[param.name] = (TYPES[arg.dtype] if torch.is_tensor(arg) else
                                 'fp32' if isinstance(arg, float) else 'i32')
            if torch.is_tensor(arg) or isinstance(arg, int) and arg % 16 == 0:
                aligned[i,] = [['tt.divisibility', 16]]
    return types, constants, aligned


def compile_all(run):
    """[Code] of every kernel that run() launches, one for each signature."""
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        for name in kernels():
            patch.setattr(model, name, Launches(getattr(model, name), launched))
        patch.setattr(model, 'pick_kernels', lambda *_: model.Fused(True, True, True))
        run()
    different = {(kernel.__name__, str(signature(kernel, args))): (kernel, args, options)
                 for kernel, args, options in launched}
    return [compile_for_sm90(*launch) for launch in different.values()]


def compile_for_sm90(kernel, args, options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    binaries = Path(triton.__file__).parent / 'backends/nvidia/bin'
    compiled = triton.compile(ASTSource(kernel, *signature(kernel, args)), target=GPUTarget('cuda', 90, 32),
                              options=options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage, sass = (subprocess.run([binaries / 'cuobjdump', flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ('-res-usage', '-sass'))
    resources = {name: int(value) for name, value in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}
    resources['SHARED'] = compiled.metadata.shared
    return Code(kernel.__name__, options, resources, sass, inner_loops(sass))


def inner_loops(sass):
    """The instructions of every loop that multiplies matrices and holds no other loop: [[instruction, ...], ...]"""
    instructions = [(int(at, 16), text) for at, text in re.findall(r'/\*([0-9a-f]{4,})\*/ +(.*?) *;', sass)]
    jumps = [(int(target.group(1), 16), at) for at, text in instructions
             if (target := re.search(r'\bBRA(?:\.\S+)? (?:\S+, )?0x([0-9a-f]+)', text))]
    back = [(start, end) for start, end in jumps if start < end]    # a branch to itself is padding
    inner = [(s, e) for s, e in back if not any(s <= a and b <= e and (a, b) != (s, e) for a, b in back)]
    loops = [[text for at, text in instructions if s <= at <= e] for s, e in inner]
    return [loop for loop in loops if any('HGMMA' in text for text in loop)]


@pytest.fixture(scope='module')
def step():
    """The kernels of a step of two layers of Pythia-410M in bfloat16."""
    def run():
        net, idx = GPTNeoX(GPTNeoXConfig.pythia('410m', num_hidden_layers=2)), torch.zeros(1, 128, dtype=torch.long)
        with torch.autocast('cpu', torch.bfloat16):
            loss = net(idx, idx)[1]
        loss.backward()
    return compile_all(run)


def attention(D):
    """The three kernels of attention with heads of D."""
    qkv, o, L = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, 128, 2, 3, D), (1, 128, 2 * D), (1, 2, 128)))

    def run():
        model.attention_forward(qkv, o, L.float())
        model.attention_backward(qkv, o, L.float(), o, qkv.clone(), L.float())
    codes = compile_all(run)
    assert [code.kernel for code in codes] == ['attention_kernel', 'attention_dq_kernel', 'attention_dkv_kernel']
    return codes


@pytest.fixture(scope='module', params=[64, 128])
def heads(request):
    return request.param, attention(request.param)


def check_resources(code):
    print(code.kernel, code.resources)
    assert not any(re.search(r'\b(STL|LDL)\b', text) for loop in code.loops for text in loop), code.kernel
    # A few bytes, outside of all loops, are a compiler's business: Triton 3.7.1 spills 8 in add_norm_kernel.
    assert code.resources['STACK'] + code.resources['LOCAL'] <= 16, code.kernel
    assert code.resources['SHARED'] <= 99 * 1024, code.kernel
    assert code.resources['REG'] * 32 * code.options.get('num_warps', 4) <= 65536, code.kernel


def test_every_kernel_fits_its_registers(step):
    assert {code.kernel for code in step} == set(kernels())
    for code in step:
        check_resources(code)


def test_attention_of_any_head_size_fits_its_registers(heads):
    for code in [*heads[1], *(attention(256) if heads[0] == 128 else [])]:
        check_resources(code)


def test_no_product_is_done_twice(heads):
    """Multiplications of Hopper's matrix units in an inner loop, all warps together, are those of the formulas."""
    D, codes = heads
    places = {'attention_kernel': (0, 2), 'attention_dq_kernel': (1, 3), 'attention_dkv_kernel': (2, 4)}
    for code in codes:
        place, products = places[code.kernel]
        queries, keys, warps, _ = model.ATTENTION_TILES[2, D][place]
        assert len(code.loops) == 2, code.kernel                    # before the diagonal, and on it
        for loop in code.loops:
            shapes = [map(int, shape) for text in loop for shape in re.findall(r'HGMMA\.(\d+)x(\d+)x(\d+)', text)]
            done = sum(m * n * k for m, n, k in shapes) * (warps // 4)      # four warps issue one together
            assert done == products * queries * keys * D, (code.kernel, done / (queries * keys * D))
            assert not any(re.search(r'\bHMMA', text) for text in loop), code.kernel    # of older GPUs, half as fast


def test_tiles_are_loaded_ahead(heads):
    """Each inner loop waits until all but the newest of its loads are there: DEPBAR.LE SB0, n leaves n on their way."""
    D, codes = heads
    for code in codes:
        if D > 64 and code.kernel == 'attention_dkv_kernel':
            continue                                                # two stages: three take too much shared memory
        for loop in code.loops:
            left = [int(n, 16) for text in loop for n in re.findall(r'DEPBAR\.LE SB0, 0x(\w+)', text)]
            assert left and min(left) > 0, (code.kernel, left)


def test_memory_is_accessed_16_bytes_at_a_time(step):
    for code in step:
        for kind in 'LDG', 'STG', 'LDGSTS':                 # from memory, to memory, from memory to shared memory
            widths = re.findall(rf'\b{kind}\.E(\S*)', code.sass)
            wide = sum('.128' in width for width in widths)
            print(code.kernel, kind, wide, len(widths))
            assert wide > 0 or kind == 'LDGSTS' and not widths, code.kernel
            # One number a row, a mean or L, is no tile. How the compiler pipelines those differs between versions.
            assert kind == 'LDGSTS' or wide >= len(widths) / 2, code.kernel
