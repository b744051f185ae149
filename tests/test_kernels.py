"""The Triton kernels of model.py: their results, computed by Triton's interpreter; their machine code, compiled for an
H100 (sm_90) as a training step of Pythia-410M launches them; and what falls back to PyTorch when. None needs a GPU.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from model import GPTNeoX, GPTNeoXConfig, ModelError, pick_kernels

needs_triton = pytest.mark.skipif(model.triton is None, reason='Triton is not installed')


@needs_triton
def test_results():
    """In a process of its own: the interpreter is chosen before Triton is imported, for all kernels."""
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '--durations=5', '-p', 'no:cacheprovider',
               Path(__file__).with_name('interpreted_kernels.py')]
    run = subprocess.run(command, env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'},
                         capture_output=True, text=True, timeout=600)
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0 and ' passed' in run.stdout


# --- machine code -------------------------------------------------------------------------------------------------

class Launches:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel, kept):
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid):
        return lambda *args, **options: self.kept.append((self.kernel, args, options))


TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.int64: '*i64'}


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
    """[(kernel name, resources, machine code)] of every kernel that run() launches, one for each signature."""
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in vars(model) if name.endswith('_kernel')]:
            patch.setattr(model, name, Launches(getattr(model, name), launched))
        patch.setattr(model, 'pick_kernels', lambda *_: model.Fused(True, True, True))
        run()
    different = {(kernel.__name__, str(signature(kernel, args))): (kernel, args, options)
                 for kernel, args, options in launched}
    return [(kernel.__name__, *compile_for_sm90(kernel, args, options)) for kernel, args, options in different.values()]


@pytest.fixture(scope='module')
def machine_code():
    """Of a step of two layers of Pythia-410M in bfloat16."""
    def step():
        net, idx = GPTNeoX(GPTNeoXConfig.pythia('410m', num_hidden_layers=2)), torch.zeros(1, 128, dtype=torch.long)
        with torch.autocast('cpu', torch.bfloat16):
            loss = net(idx, idx)[1]
        loss.backward()
    return compile_all(step)


def compile_for_sm90(kernel, args, options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    binaries = Path(model.triton.__file__).parent / 'backends/nvidia/bin'
    compiled = model.triton.compile(ASTSource(kernel, *signature(kernel, args)), target=GPUTarget('cuda', 90, 32),
                                    options=options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage, sass = (subprocess.run([binaries / 'cuobjdump', flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ('-res-usage', '-sass'))
    resources = {name: int(value) for name, value in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}
    return {**resources, 'SHARED': compiled.metadata.shared, 'WARPS': compiled.metadata.num_warps}, sass


@needs_triton
def test_every_kernel_compiles_without_spills(machine_code):
    assert {name for name, _, _ in machine_code} == {name for name in vars(model) if name.endswith('_kernel')}
    for code in machine_code:
        check_resources(*code)


def check_resources(name, resources, sass):
    print(name, resources)
    assert resources['STACK'] == resources['LOCAL'] == 0 and not re.search(r'\b(STL|LDL)\b', sass), name
    assert resources['SHARED'] <= 99 * 1024 and resources['REG'] * 32 * resources['WARPS'] <= 65536, name


@needs_triton
@pytest.mark.parametrize('D', [128, 256])
def test_attention_of_larger_heads_compiles_without_spills(D):
    qkv, o, L = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, 16, 2, 3, D), (1, 16, 2 * D), (1, 2, 16)))

    def both():
        model.attention_forward(qkv, o, L.float())
        model.attention_backward(qkv, o, L.float(), o, qkv.clone(), L.float())
    for code in compile_all(both):
        check_resources(*code)


@needs_triton
def test_attention_runs_on_the_matrix_units(machine_code):
    for name, _, sass in machine_code:
        if name.startswith('attention'):                    # HGMMA: Hopper's; HMMA: that of older GPUs, half as fast
            assert len(re.findall(r'\bHGMMA', sass)) > 0 and not re.search(r'\bHMMA', sass), name


@needs_triton
def test_memory_is_accessed_16_bytes_at_a_time(machine_code):
    for name, _, sass in machine_code:
        for kind in 'LDG', 'STG', 'LDGSTS':                 # from memory, to memory, from memory to shared memory
            widths = re.findall(rf'\b{kind}\.E(\S*)', sass)
            wide = sum('.128' in width for width in widths)
            print(name, kind, wide, len(widths))
            assert wide > 0 or kind == 'LDGSTS' and not widths, name
            # One number a row, a mean or L, is no tile. How the compiler pipelines those differs between versions.
            assert kind == 'LDGSTS' or wide >= len(widths) / 2, name


# --- the choice ---------------------------------------------------------------------------------------------------

@pytest.fixture
def gpu(monkeypatch):
    """A new process with that GPU; Triton there or not."""
    def pretend(capability=(9, 0), triton=True):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: capability)
        if model.triton is None or not triton:
            monkeypatch.setattr(model, 'triton', None)
        monkeypatch.setattr(model, 'said', set())
    return pretend


ALL, NONE, BF16 = (True, True, True), (False, False, False), torch.bfloat16


@needs_triton
@pytest.mark.parametrize('there, asked, picked, says', [
    ({}, ('auto', 'cuda', BF16, 1024, 64), ALL, 'norm by Triton, attention by Triton, loss by Triton'),
    ({}, ('triton', 'cuda', torch.float16, 5120, 128), ALL, 'norm by Triton, attention by Triton, loss by Triton'),
    ({}, ('torch', 'cuda', BF16, 1024, 64), NONE, ''),
    ({}, ('auto', 'cpu', BF16, 1024, 64), NONE, ''),
    ({}, ('auto', 'mps', BF16, 1024, 64), NONE, ''),
    ({}, ('triton', 'cpu', BF16, 1024, 64), NONE, 'norm by PyTorch (the kernels need a GPU with CUDA, this is cpu)'),
    ({'triton': False}, ('auto', 'cuda', BF16, 1024, 64), NONE, 'norm by PyTorch (Triton is not installed)'),
    ({'capability': (7, 5)}, ('auto', 'cuda', BF16, 1024, 64), NONE, 'compute capability below 8.0'),
    ({}, ('auto', 'cuda', torch.float64, 1024, 64), NONE, 'torch.float64 is not one of float32, float16, bfloat16'),
    ({}, ('auto', 'cuda', BF16, 1024, 257), (True, False, True),
     'norm by Triton, attention by PyTorch (head size 257 is above 256), loss by Triton'),
    ({}, ('auto', 'cuda', BF16, 8193, 64), (False, True, True),
     'norm by PyTorch (width 8193 is above 8192), attention by Triton, loss by Triton'),
])
def test_what_runs_where_is_said_once(there, asked, picked, says, gpu, capsys, monkeypatch):
    gpu(**there)
    assert pick_kernels(*asked) == picked == pick_kernels(*asked)
    out = capsys.readouterr().out
    assert says in out and out.count('\n') == bool(says)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(model, 'said', set())
    assert pick_kernels(*asked) == picked and capsys.readouterr().out == ''


def test_bad_input():
    net = GPTNeoX(GPTNeoXConfig(11, 8, 1, 1))
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(ModelError, match='empty batch'):
            net(torch.zeros(shape, dtype=torch.long))
    net.kernels = 'cuda'
    with pytest.raises(ModelError, match="'cuda', expected 'auto', 'triton' or 'torch'"):
        net(torch.zeros(1, 3, dtype=torch.long))


def test_the_knob_takes_no_other_word(config, capsys):
    import train
    assert train.main([config('a', kernels='cuda')]) == 2
    assert "kernels = 'cuda': expected one of 'auto', 'triton', 'torch'" in capsys.readouterr().err


def test_a_model_without_memory_has_shapes():
    with torch.device('meta'):
        net = GPTNeoX(GPTNeoXConfig(50, 32, 2, 2))
        assert net(torch.zeros(2, 9, dtype=torch.long))[0].shape == (2, 9, 50)


def test_a_fallback_computes_the_same(capsys, monkeypatch):
    """Asked for Triton where there is none, the model says so and is the same to the last bit."""
    monkeypatch.setattr(model, 'said', set())
    net, idx = GPTNeoX(GPTNeoXConfig(50, 32, 2, 2)), torch.randint(50, (2, 9))
    expected = net(idx)[0]
    net.kernels = 'triton'
    assert torch.equal(net(idx)[0], expected)
    assert capsys.readouterr().out.count('kernels: ') == 1
