"""The Triton kernels of model.py: their results, their machine code for an H100, and what runs where. No GPU is needed.

Results and machine code are tested by files of their own, which run in processes of their own: the interpreter, and the
version of Triton, are chosen before Triton is imported.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from model import GPTNeoX, GPTNeoXConfig, ModelError, pick_kernels

needs_triton = pytest.mark.skipif(model.triton is None, reason='Triton is not installed')
GPU_MACHINES_TRITON = '3.6.0'                   # comes with torch 2.11, which GPU machines have


def run_tests(file, **environment):
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '--durations=5', '-p', 'no:cacheprovider',
               Path(__file__).with_name(file)]
    run = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1', **environment}, capture_output=True,
                         text=True, timeout=600)
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0 and ' passed' in run.stdout


@needs_triton
def test_results():
    run_tests('interpreted_kernels.py', TRITON_INTERPRET='1')


@needs_triton
def test_machine_code():
    run_tests('compiled_kernels.py')


@needs_triton
def test_machine_code_by_the_triton_of_gpu_machines(tmp_path):
    if model.triton.__version__.startswith(GPU_MACHINES_TRITON):
        pytest.skip('it is the one that is installed')
    install = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path,
               f'triton=={GPU_MACHINES_TRITON}']
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f'triton {GPU_MACHINES_TRITON} cannot be installed here')
    run_tests('compiled_kernels.py', PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize('parallel', [True, False])
def test_compiled_layers_leave_the_embedding_outside(parallel):
    """Inside a graph, Inductor makes its gradient atomic additions on a GPU, in another order in every run."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    net = GPTNeoX(GPTNeoXConfig(50, 32, 8, 2, max_position_embeddings=9, use_parallel_residual=parallel))
    idx, graphs = torch.randint(50, (2, 2, 9)), []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    def gradients():
        net.zero_grad()
        loss = net(*idx)[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters())]
    eager = gradients()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    for layer in net.gpt_neox.layers:
        layer.compile(backend=backend)
    torch.testing.assert_close(gradients(), eager)
    assert len(graphs) == 4 and any('mm' in graph for graph in graphs)        # of the first layer, and of all others
    assert not any('embedding' in graph or 'index_put' in graph or 'nll_loss' in graph for graph in graphs)


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
    ({}, ('auto', 'cuda', torch.float32, 1024, 64), (True, False, True),
     'norm by Triton, attention by PyTorch (it is faster in float32), loss by Triton'),
    ({}, ('triton', 'cuda', torch.float32, 1024, 64), ALL, 'norm by Triton, attention by Triton, loss by Triton'),
    ({}, ('auto', 'cuda', BF16, 2048, 128, False), (True, model.CUDNN, True),
     'attention by PyTorch (cuDNN: heads above 64 on Hopper, deterministic = False)'),
    ({}, ('auto', 'cuda', BF16, 2048, 128), ALL, 'norm by Triton, attention by Triton, loss by Triton'),
    ({}, ('triton', 'cuda', BF16, 2048, 128, False), ALL, 'norm by Triton, attention by Triton, loss by Triton'),
    ({}, ('auto', 'cuda', BF16, 1024, 64, False), ALL, 'norm by Triton, attention by Triton, loss by Triton'),
    ({'capability': (8, 0)}, ('auto', 'cuda', BF16, 2048, 128, False), ALL, 'norm by Triton, attention by Triton'),
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
