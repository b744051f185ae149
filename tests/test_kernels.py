"""The Triton kernels: their results, their machine code for an H100, and when they are chosen.

No GPU is needed. Results and machine code are tested in processes of their own: the interpreter and
the version of Triton are chosen before Triton is imported.
"""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from model import FlashAttention, GPTNeoX, GPTNeoXConfig, causal_attention
from support import fast_path
from support.cpu_attention import cpu_attention
from test_model import gradients

needs_triton = pytest.mark.skipif(model.triton is None, reason='Triton is not installed')
OLD_TRITON = '3.6.0'                                    # comes with torch 2.11


def run_tests(file, **environment):
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '--durations=5', '-p',
               'no:cacheprovider', Path(__file__).with_name(file)]
    environment = os.environ | {'OMP_NUM_THREADS': '1'} | environment
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0 and ' passed' in run.stdout


@needs_triton
def test_results():
    run_tests('interpreted_kernels.py', TRITON_INTERPRET='1')


@needs_triton
def test_machine_code():
    run_tests('compiled_kernels.py')


@needs_triton
def test_machine_code_by_an_older_triton(tmp_path):
    if model.triton.__version__.startswith(OLD_TRITON):
        pytest.skip('it is the one that is installed')
    install = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path,
               f'triton=={OLD_TRITON}']
    if subprocess.run(install, capture_output=True).returncode != 0:
        pytest.skip(f'triton {OLD_TRITON} cannot be installed here')
    run_tests('compiled_kernels.py', PYTHONPATH=str(tmp_path))


def compiled_graphs(net, idx, targets, kernels, dtype=torch.float32):
    """Gradients before and after layers are compiled one by one, and the graphs as text."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    eager = gradients(net, idx, targets, kernels, dtype)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    for layer in net.gpt_neox.layers:
        layer.compile(backend=backend, fullgraph=True)
    return eager, gradients(net, idx, targets, kernels, dtype), graphs


@pytest.mark.parametrize('kernels', ['torch', 'auto'])
@pytest.mark.parametrize('parallel', [True, False])
def test_compiled_layers_leave_the_embedding_outside(kernels, parallel):
    """In a graph for a GPU, its gradient would be atomic additions, in another order every time."""
    config = GPTNeoXConfig(50, 32, 8, 2, max_position_embeddings=9, use_parallel_residual=parallel)
    eager, compiled, graphs = compiled_graphs(GPTNeoX(config), *torch.randint(50, (2, 2, 9)),
                                              kernels)
    torch.testing.assert_close(compiled, eager)
    assert len(graphs) == 2                             # forward and backward serve all layers
    assert any('mm' in graph for graph in graphs)
    for outside in ('embedding', 'index_put', 'nll_loss'):
        assert not any(outside in graph for graph in graphs), outside


# ------------------------------------------------------------------------------
# The choice of the path, and its sentence

BF16 = torch.bfloat16
FLASH, PLAIN, ON_CPU = FlashAttention.apply, causal_attention, cpu_attention
BY_TRITON = (True, FLASH, 'Triton')
NO_GPU = 'plain PyTorch, not Triton: they need an NVIDIA GPU'


@needs_triton
@pytest.mark.parametrize('asked, machine, uses_triton, attend, sentence', [
    (('auto', 'cuda', BF16), {}, *BY_TRITON),
    (('triton', 'cuda', torch.float16), {}, *BY_TRITON),
    (('triton', 'cuda', torch.float32), {}, *BY_TRITON),
    (('torch', 'cuda', BF16), {}, False, PLAIN, 'plain PyTorch, as kernels = torch asks'),
    (('torch', 'cpu', BF16), {}, False, PLAIN, 'plain PyTorch, as kernels = torch asks'),
    (('auto', 'cpu', BF16), {}, False, ON_CPU, 'PyTorch, with a faster attention for CPUs'),
    (('auto', 'mps', BF16), {}, False, PLAIN, 'plain PyTorch'),

    # where the kernels cannot run
    (('triton', 'cpu', BF16), {}, False, PLAIN, f'{NO_GPU}, and this is cpu'),
    (('auto', 'cuda', BF16), {'hip': '6.0'}, False, PLAIN,
     'plain PyTorch, not Triton: they are written for NVIDIA GPUs, and this one is by AMD'),
    (('auto', 'cuda', BF16), {'triton': None}, False, PLAIN,
     'plain PyTorch, not Triton: Triton is not installed'),
    (('auto', 'cuda', BF16), {'capability': (7, 5)}, False, PLAIN, 'plain PyTorch, not Triton: '
     'this GPU is older than Ampere (compute capability 8.0)'),
    (('triton', 'cuda', torch.float64), {}, False, PLAIN, 'plain PyTorch, not Triton: they do not '
     'compute in torch.float64'),
    (('auto', 'cuda', BF16), {'width': 8200}, False, PLAIN, 'plain PyTorch, not Triton: the model '
     'is wider than they support (8192, heads of 256)'),
    (('auto', 'cuda', BF16), {'width': 257 * 8}, False, PLAIN, 'plain PyTorch, not Triton: the '
     'model is wider than they support (8192, heads of 256)'),

    # no matrix unit multiplies float32 in full
    (('auto', 'cuda', torch.float32), {}, True, PLAIN,
     'Triton; attention by PyTorch, faster in float32')])
def test_the_path_and_its_sentence(asked, machine, uses_triton, attend, sentence, monkeypatch):
    capability = machine.get('capability', (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: capability)
    monkeypatch.setattr(torch.version, 'hip', machine.get('hip'))
    triton = SimpleNamespace(knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    monkeypatch.setattr(fast_path, 'triton', machine.get('triton', triton))
    config = GPTNeoXConfig(8, machine.get('width', 64), 1, 8, 8)
    with torch.device('meta'):
        net = GPTNeoX(config)
    for _ in range(2):                                  # from any path to any other
        assert fast_path.choose(net, *asked) == sentence
        assert net.fast == uses_triton
        assert net.gpt_neox.layers[0].attention.attend == attend
        fast_path.choose(net, 'torch')


def test_a_path_that_does_not_exist_is_refused(config, capsys):
    import train
    assert train.main([config('a', kernels='cuda')]) == 2
    err = capsys.readouterr().err
    assert "'cuda'" in err and 'triton' in err and 'Traceback' not in err
