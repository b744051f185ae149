"""parallel = 'fsdp': the arithmetic, checkpoints and memory of runs whose model is sharded."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics, plain, saved

from configurator import UserError
from model import GPTNeoX, GPTNeoXConfig
from support import checkpoints, parallel
from support.huggingface import save_hf

FSDP = dict(parallel='fsdp', batch_size=12, num_hidden_layers=2, milestones=[0])
# replay, a switch in the middle, and 7 windows, which neither 2 nor 3 processes share evenly
MIXED = dict(FSDP, replay_data={'new': 1.0}, replay=0.25, switches=[{'step': 7, 'replay': 0.5}])


def weights(run, step=20):
    """The weights of a checkpoint as bytes."""
    return plain(saved(run, step)['model']['weights'])


def curves(run):
    """Logged losses and gradient norms, and the losses on validation sets."""
    trained = [(row['loss'], row['grad_norm']) for row in metrics(run, 'train')]
    evaluated = [tuple(losses['loss'] for losses in row['val'].values())
                 for row in metrics(run, 'eval')]
    return torch.tensor(trained), torch.tensor(evaluated)


def rows(world):
    """The rows that all processes were trained on, by their number."""
    found = {}
    for rank in range(world):
        for line in Path(f'rows_{rank}').read_text().splitlines():
            number, row = json.loads(line)
            found[number] = row
    return found


def ends_well(forked, *args, **kwargs):
    codes, err = forked(*args, **kwargs)
    assert set(codes) == {0}, err


@pytest.mark.parametrize('world, per_node', [(2, 2), (3, 3), (4, 2)])
def test_sharded_processes_train_as_one(config, forked, world, per_node):
    ends_well(forked, [config('one', **MIXED)])
    expected = rows(1)
    ends_well(forked, [config('many', **MIXED)], world=world, per_node=per_node)
    assert rows(world) == expected
    for many, one in zip(curves('out/many'), curves('out/one')):
        torch.testing.assert_close(many, one, rtol=0, atol=1e-6)
    # the same initial weights to the last bit; after 20 steps of Adam, within rounding
    assert weights('out/many', 0) == weights('out/one', 0)
    for name, tensor in saved('out/many')['model']['weights'].items():
        one = saved('out/one')['model']['weights'][name]
        torch.testing.assert_close(tensor, one, rtol=0, atol=2e-3)


def test_a_killed_run_resumes_bit_for_bit(config, forked):
    ends_well(forked, [config('whole', **MIXED)], world=2)
    codes, _ = forked([config('cut', **MIXED)], world=2, at=('update', 14))
    assert -signal.SIGKILL in codes
    ends_well(forked, ['cut.py'], world=2)
    for part in ('model', 'optimizer'):
        assert plain(saved('out/whole')[part]) == plain(saved('out/cut')[part])
    assert metrics('out/whole', 'train') == metrics('out/cut', 'train')


def test_a_damaged_checkpoint_is_found_by_one_process_for_all(config, forked):
    ends_well(forked, [config('whole', **MIXED)], world=2)
    forked([config('cut', **MIXED)], world=2, at=('update', 14))
    newest = Path('out/cut/ckpt_00000010.pt')
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    ends_well(forked, ['cut.py'], world=2)
    assert 'Trying an older checkpoint' in Path('stdout_0').read_text()
    assert weights('out/whole') == weights('out/cut')


@pytest.mark.parametrize('first, second', [((2, 'fsdp'), (1, 'ddp')), ((2, 'fsdp'), (2, 'ddp')),
                                           ((1, 'ddp'), (2, 'fsdp')), ((2, 'fsdp'), (3, 'fsdp'))])
def test_a_checkpoint_serves_any_parallelism(config, forked, first, second):
    ends_well(forked, [config('one', **MIXED)])
    codes, _ = forked([config('a', **MIXED), f'--parallel={first[1]}'], world=first[0],
                      at=('update', 12))
    assert -signal.SIGKILL in codes
    ends_well(forked, ['a.py', f'--parallel={second[1]}'], world=second[0])
    for a, one in zip(curves('out/a'), curves('out/one')):
        torch.testing.assert_close(a, one, rtol=0, atol=1e-6)


def test_every_way_to_start(config, forked):
    """From a checkpoint with its moments, a branch, and a Hugging Face directory in bfloat16."""
    ends_well(forked, [config('up', **FSDP)], world=2)
    kept = config('kept', **FSDP, init_from='out/up', keep_optimizer=True)
    ends_well(forked, [kept], world=2)
    assert weights('out/kept', 0) == weights('out/up')
    moments = [plain(saved(run, step)['optimizer']['moments'])
               for run, step in (('out/kept', 0), ('out/up', 20))]
    assert moments[0] == moments[1]
    ends_well(forked, [config('branch', **dict(FSDP, max_steps=24, milestones=[20]),
                              branch_from='out/up')], world=2)
    assert weights('out/branch') == weights('out/up')

    net = GPTNeoX(GPTNeoXConfig(384, 32, 2, 2, max_position_embeddings=32)).bfloat16()
    save_hf(net, 'hf')
    ends_well(forked, [config('hf', **FSDP, init_from='hf')], world=2)
    for name, tensor in net.state_dict().items():
        assert torch.equal(saved('out/hf', 0)['model']['weights'][name], tensor.float())


def test_eval_opens_what_a_sharded_run_saves(config, forked):
    ends_well(forked, [config('a', **FSDP)], world=2)
    import eval
    state, net = eval.load_run('out/a')
    assert state['progress']['step'] == 20
    assert net.num_params() == sum(p.numel() for p in net.parameters())


def test_a_signal_to_one_process_stops_all(config, forked):
    codes, _ = forked([config('a', **FSDP)], world=2, at=('train', 7), rank=1,
                      signals=[signal.SIGTERM])
    assert codes == [0, 0]
    assert max(checkpoints.find('out/a')) < 20
    ends_well(forked, ['a.py'], world=2)


def test_recomputed_activations_change_no_bit(config, forked):
    knobs = dict(FSDP, max_steps=6)
    for name, changes in (('one', {}), ('again', {'checkpoint_activations': True})):
        ends_well(forked, [config(name, **{**knobs, 'parallel': 'ddp'}, **changes)])
        ends_well(forked, [config(f'{name}2', **knobs, **changes)], world=2)
    assert metrics('out/one', 'train') == metrics('out/again', 'train')
    assert metrics('out/one2', 'train') == metrics('out/again2', 'train')


def torchrun(config):
    """Two processes that train, and the torchrun that started them."""
    launcher = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', ROOT / 'train.py',
         config('a', **dict(FSDP, max_steps=5000, save_every=5000))],
        stdout=subprocess.DEVNULL, stderr=open('stderr', 'w'),
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    record = Path('out/a/metrics.jsonl')
    wait_for(lambda: record.exists() and len(record.read_text().splitlines()) > 5)
    return launcher


def test_a_run_whose_torchrun_is_killed_saves_and_stops(config):
    launcher = torchrun(config)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: any(step > 0 for step in checkpoints.find('out/a')))


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds the processes in /proc')
def test_one_killed_process_ends_the_others_with_a_message(config):
    launcher = torchrun(config)
    ranks = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    assert 'Signal 9 (SIGKILL)' in Path('stderr').read_text()
    wait_for(lambda: not any(Path(f'/proc/{pid}').exists() for pid in ranks), seconds=10)


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize('changes, world, per_node, says', [
    (dict(batch_size=5), 2, 2, ['5', '2 processes']), ({}, 3, 2, ['nodes of 2']),
    (dict(device='mps'), 2, 2, ['mps'])])
def test_what_cannot_be_sharded(config, forked, changes, world, per_node, says):
    codes, err = forked([config('a', **{**FSDP, **changes})], world=world, per_node=per_node)
    assert codes[0] == 2 and 'Traceback' not in err
    assert all(text in err for text in says), err


def test_a_checkpoint_of_another_size_is_one_message(config, forked):
    ends_well(forked, [config('up', **FSDP)], world=2)
    path = Path('out/up/ckpt_00000020.pt')
    state = torch.load(path, weights_only=True)
    state['model']['weights']['embed_out.weight'] = torch.zeros(3, 3)
    torch.save(state, path)
    codes, err = forked([config('b', **FSDP, init_from='out/up')], world=2)
    assert codes[0] == 2 and 'Traceback' not in err
    assert 'embed_out.weight' in err and '[3, 3]' in err


def test_one_process_says_that_nothing_is_sharded(config, forked):
    ends_well(forked, [config('a', **dict(FSDP, max_steps=5))])
    assert 'processes: 1, so nothing is sharded' in Path('stdout_0').read_text()


def test_a_machine_with_too_little_memory_is_told_before_the_first_step(monkeypatch):
    monkeypatch.setattr(parallel.Path, 'read_text',
                        lambda self: 'MemAvailable: 1 kB\nMemFree: 1 kB')
    with pytest.raises(UserError, match='GB of CPU memory, but 0.0 GB are free'):
        parallel.check_memory_to_save(GPTNeoX(GPTNeoXConfig(384, 32, 2, 2)))
