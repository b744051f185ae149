"""bench/plan.py: what it counts is what the code holds, and what the headers of configs say."""
import gc
import random
import re
import sys

import pytest
import torch
from conftest import ROOT

import model
from support import fast_path
from support.processes import DTYPES

sys.path.insert(0, str(ROOT / 'bench'))
import plan as planner
import sharded

SMALL = ['--hidden_size=48', '--num_attention_heads=3', '--num_hidden_layers=3',
         '--vocab_size=70', '--block_size=128', '--micro_batch_size=2', '--batch_size=4',
         "--train_data={'old': 1.0}", '--device=cpu']


@pytest.fixture(autouse=True)
def one_process_again(monkeypatch):
    """make() tells train.py how many processes there are."""
    monkeypatch.setenv('WORLD_SIZE', '1')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')


def use_path(net, path, monkeypatch):
    """Let the layers call the functions of a path. Triton's allocate and compute nothing here."""
    fast_path.choose(net, 'auto' if path == 'cpu' else 'torch')
    if path == 'triton':
        for name in ('add_norm_forward', 'rotate_packed_', 'attention_forward', 'cross_entropy_'):
            monkeypatch.setattr(model, name, lambda *args: None)
        net.fast = True
        for layer in net.gpt_neox.layers:
            layer.attention.attend = model.FlashAttention.apply


def bytes_kept(net, x, dtype):
    """Bytes that are held between forward and backward, beside the model and its batch."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    gc.collect()
    before = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    enabled = dtype == torch.bfloat16
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled, cache_enabled=False):
            _, loss = net(x, x)
    # arguments of layers that are recomputed are saved without the hooks
    for tensor in gc.get_objects():
        if type(tensor) is torch.Tensor:
            keep(tensor)
    for tensor in [*before, *net.parameters(), *net.buffers(), x, loss]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize('again', [False, True], ids=['kept', 'recomputed'])
@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
@pytest.mark.parametrize('path', ['plain', 'cpu', 'triton'])
def test_activations_are_what_autograd_keeps(path, dtype, again, monkeypatch):
    is_parallel = random.random() < 0.5
    plan = planner.make([*SMALL, f'--dtype={dtype}', f'--checkpoint_activations={again}',
                         f'--use_parallel_residual={is_parallel}', '--parallel=fsdp',
                         '--world_size=2'])
    plan.path = path
    net = model.GPTNeoX(plan.model.config)
    net.checkpoint_activations = again
    use_path(net, path, monkeypatch)
    x = torch.randint(70, (2, 128))
    N, V, C = 256, 70, 48
    # the loss keeps log-probabilities; HeadLoss two gradients, of which activations() has dx
    loss = 4 * V * C if path == 'triton' else 4 * N * V
    copies = plan.copies()
    if again and copies:                            # between two layers there is none
        copies -= 2 * plan.layer_matrices()
    expected = plan.activations() + copies + loss
    if again and path == 'triton':                  # the first layer takes no branches
        expected -= plan.input_of_a_layer() - 4 * N * C
    # what the plan leaves out: a state of random numbers, 5 kB, for each layer that is recomputed
    assert 0 <= bytes_kept(net, x, DTYPES[dtype]) - expected + 16 * N < 16_000


# ------------------------------------------------------------------------------
# Parameters, and what is said of them

def test_parameters_are_those_of_the_model():
    plan = planner.make(SMALL)
    net = model.GPTNeoX(plan.model.config)
    assert plan.parameters == sum(p.numel() for p in net.parameters())
    assert plan.layer == sum(p.numel() for p in net.gpt_neox.layers[1].parameters())
    assert plan.weights() + plan.gradients() + plan.moments() == 16 * plan.parameters


def test_shards_make_up_the_whole():
    whole = planner.make([*SMALL, '--world_size=4'])
    shares = planner.make([*SMALL, '--world_size=4', '--nodes=2', '--parallel=fsdp'])
    assert shares.weights() == whole.weights() / 2          # one copy in each node
    assert whole.buckets() == whole.weights() and shares.buckets() == 0


TEN_B = ['pretrain_pile_10b', 'rewarm_pile_slim_10b']
NODES = [[], ['--world_size=32', '--nodes=4']]


@pytest.mark.parametrize('name', [*TEN_B, 'pretrain_general', 'reuse_general_qa'])
@pytest.mark.parametrize('nodes', NODES, ids=['one node', 'four'])
def test_the_memory_in_a_header_is_what_the_plan_counts(name, nodes):
    text = ' '.join((ROOT / f'config/{name}.py').read_text().split('"""')[1].split())
    four = re.search(r'(--batch_size=1120 --max_steps=\d+)', text)
    batch = four[1].split() if nodes and four else []
    plan = planner.make([f'config/{name}.py', '--world_size=8', *nodes, *batch])
    when, parts = plan.peak()
    parts = {part: value for part, value in parts.items() if value}
    said = {part: float(re.search(rf'{part} (\d+\.\d)', text)[1]) for part in [*parts, 'peak']}
    parts['peak'] = plan.gpu_bytes()
    # a batch for four nodes may have smaller micro-batches
    for part, value in parts.items():
        assert said[part] == pytest.approx(value / 1e9, abs=0.051) or (batch and plan.rows == 5)
    assert plan.gpu_bytes() < 0.9 * 80e9
    if not nodes:
        hours = plan.flops() / (8 * 989e12 * 0.4) / 3600
        assert f'{hours:,.0f} hours' in text
    if 'disk' in text:
        assert f'{plan.checkpoint_bytes() / 1e9:.1f} GB of disk' in text


def test_layers_that_are_kept_need_smaller_micro_batches():
    kept = ['config/pretrain_pile_10b.py', '--world_size=8', '--checkpoint_activations=false']
    assert planner.make(kept).gpu_bytes() > 80e9
    docstring = (ROOT / 'config/pretrain_pile_10b.py').read_text()
    two = planner.make([*kept, '--micro_batch_size=2'])
    assert f'{two.gpu_bytes() / 1e9:.1f} GB' in docstring


def test_the_page_that_is_printed(capsys):
    assert planner.main(['config/pretrain_pile_10b.py', '--world_size=8']) == 0
    page = capsys.readouterr().out
    for text in ('9,642,249,216', 'It fits into 80 GB', '2,260,992 a step', '1,590.0 hours',
                 'a checkpoint: 115.7 GB', 'to save one: 115.7 GB', 'the model sharded over 8'):
        assert text in page
    assert planner.main(['config/pretrain_pile_10b.py', '--world_size=8', '--parallel=ddp']) == 0
    assert 'IT DOES NOT FIT' in capsys.readouterr().out
    # released weights that are not here, and a run on the CPU
    assert planner.main(['config/rewarm_pythia_slim.py', '--world_size=8']) == 0
    assert planner.main(['config/rewarm_docs_code.py', '--device=cpu', '--dtype=fp32']) == 0
    assert 'cpu, fp32' in capsys.readouterr().out


@pytest.mark.parametrize('words, says', [
    (['--world_size=6', '--nodes=4'], '6 does not divide among 4 nodes'),
    (['--gpu=H1000'], 'H1000'),
    (['--init_from=nowhere'], 'nowhere is not here'), (['--mufu=1'], 'mfu'),
    (['--world_size=3'], '3 processes')])
def test_what_cannot_be_planned_is_one_message(words, says, capsys):
    assert planner.main([*SMALL, *words]) == 2
    err = capsys.readouterr().err
    assert says in err and 'Traceback' not in err


# ------------------------------------------------------------------------------
# Measured: two processes on the CPU. bench/sharded.py does the same at 200M parameters.

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_two_processes_hold_what_the_plan_says():
    shape = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=4, block_size=64)
    found = {mode: sharded.memory(shape, mode) for mode in ('ddp', 'fsdp')}
    print(found)
    for mode in found:
        assert found[mode]['measured_to_predicted'] == pytest.approx([1, 1], abs=0.15)
    assert max(found['fsdp']['measured']) < 0.6 * max(found['ddp']['measured'])
