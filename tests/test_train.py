"""train.py: losses, resume, start modes, order of the data, errors. 37,000 weights, 20 steps."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, before_batch, contents, crash, ends_well, evaluated, losses, metrics,
                      plain, same_run, saved, stage)

import data
import eval
import model
import train
from corpora.shards import write_corpus
from model import GPTNeoX, GPTNeoXConfig
from support import checkpoints, fast_path, record
from support.huggingface import save_hf

pytestmark = pytest.mark.usefixtures('one_thread', 'fast')

NEW = {'train_data': {'new': 1.0}}


def weights(run, step=20):
    """The weights of a checkpoint as bytes."""
    return plain(saved(run, step)['model']['weights'])


@pytest.fixture
def batches(monkeypatch):
    """The inputs [B, T] that are trained on, one array for each micro-batch, in order."""
    taken, wanted = [], []
    real_rows, real_batch = data.batch_rows, data.Mixture.batch

    def batch_rows(*args):
        wanted.append(real_rows(*args))
        return wanted[-1]

    def batch(self, g):
        x, y, names = real_batch(self, g)
        if wanted and g is wanted[-1]:                      # and not the batch of the first check
            taken.append(x)
        return x, y, names
    monkeypatch.setattr(data, 'batch_rows', batch_rows)
    monkeypatch.setattr(data.Mixture, 'batch', batch)
    return taken


@pytest.fixture
def resumes(config, monkeypatch):
    """resumes(after, ...): a run that is killed after some batches and resumed is the same run."""
    def check(after, step=20, **changes):
        ends_well(config('whole', **changes))
        name = config('killed', **changes)
        crash([name], after, monkeypatch)
        ends_well(name)
        same_run('out/whole', 'out/killed', step)
    return check


def is_old(row):
    """Whether a window is of the source 'old': its letters are small."""
    return ((row >= ord('a')) & (row <= ord('z'))).any()


def old_rows(batches):
    return np.array([row for rows in batches for row in rows if is_old(row)])


def old_counts(batches):
    return [sum(map(is_old, rows)) for rows in batches]


# ------------------------------------------------------------------------------
# What is computed

def test_the_losses_are_those_of_a_plain_loop(config, corpora):
    # The optimizer, rates, clipping, mixture and shards are written again here. The model and the
    # order of the windows are the program's.
    ends_well(config('a', **NEW, replay_data={'old': 2.0}, replay=0.25, grad_clip=0.7,
                     micro_batch_size=2))
    torch.manual_seed(1337)
    net = GPTNeoX(GPTNeoXConfig(384, 32, num_hidden_layers=1, num_attention_heads=2,
                                max_position_embeddings=32))
    files = {name: corpora / name / 'train_00000.bin' for name in ('old', 'new')}
    ids = {name: np.fromfile(file, '<u2')[512:].astype(np.int64) for name, file in files.items()}
    order = {name: data.Source(name, [file], 32, key=1337).order for name, file in files.items()}
    drawn = {'old': 0, 'new': 0}
    m, v, expected, g = {}, {}, [], 0
    for t in range(1, 21):
        windows = []
        for _ in range(4):
            grows = (g + 1 + 2) // 4 > (g + 2) // 4         # does floor(g / 4 + 1/2) grow?
            name = 'old' if grows else 'new'
            start = int(order[name](np.array([drawn[name]]))[0]) * 32
            windows.append(ids[name][start:start + 33])
            drawn[name] += 1
            g += 1
        batch = torch.from_numpy(np.stack(windows))
        logits, _ = net(batch[:, :-1])
        loss = -logits.log_softmax(-1).gather(2, batch[:, 1:, None]).mean()
        loss.backward()
        expected.append(loss.item())
        rate = 3e-4 + (3e-3 - 3e-4) / 2 * (1 + math.cos(math.pi * (t - 4) / 16))
        if t <= 4:
            rate = 3e-3 * t / 4
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in net.parameters()))
        with torch.no_grad():
            for name, p in net.named_parameters():
                grad = p.grad * min(1, 0.7 / (norm + 1e-6))
                m[name] = 0.9 * m.get(name, 0) + 0.1 * grad
                v[name] = 0.95 * v.get(name, 0) + 0.05 * grad ** 2
                p.mul_(1 - rate * 0.1 * (p.dim() == 2))
                p -= rate * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
                p.grad = None
    assert drawn == {'old': 20, 'new': 60}
    np.testing.assert_allclose(losses('out/a'), expected, rtol=1e-6)
    assert metrics('out/a', 'train')[-1]['samples'] == drawn


def test_one_batch_is_learned_by_heart(config):
    write_corpus(['abcdefgh' * 17], 'one', 'mine', val=0)           # four windows
    ends_well(config('a', data_dir='mine', train_data={'one': 1.0}, val_data=[], max_steps=150,
                     learning_rate=1e-2, save_every=1000, eval_every=1000, log_every=10))
    assert losses('out/a')[0] > 4 and losses('out/a')[-1] < 0.1


def test_evaluating_changes_nothing(config):
    ends_well(config('often', eval_every=1))
    ends_well(config('seldom', eval_every=1000))
    assert weights('out/often') == weights('out/seldom')
    assert losses('out/often') == losses('out/seldom')
    assert evaluated('out/often') == list(range(21))
    assert evaluated('out/seldom') == [0, 20]                       # always the first and the last


def test_accumulation_is_the_same_optimisation(config, batches):
    ends_well(config('whole'))
    whole = np.concatenate(batches)
    for size, rows in ((1, 1), (2, 2), (3, 2)):             # of 4 rows, at most 3 at once: 2
        batches.clear()
        ends_well(config(f'parts{size}', micro_batch_size=size))
        assert len(batches[0]) == rows
        np.testing.assert_array_equal(np.concatenate(batches), whole)
        np.testing.assert_allclose(losses(f'out/parts{size}'), losses('out/whole'), rtol=1e-5)


def test_a_run_trains_what_is_written_or_says_that_it_does_not(config, fails, monkeypatch):
    ends_well(config('good'))
    real = model.causal_attention
    for module in (model, fast_path):                               # as an edit of the file does
        monkeypatch.setattr(module, 'causal_attention', lambda *args: real(*args) / 2)
    fails(config('a'), says=['fast path', '--kernels=torch'])
    assert not Path('out/a').exists()
    ends_well(config('a', kernels='torch'))
    assert losses('out/a') != losses('out/good')


def test_the_record_is_complete(config, capsys):
    ends_well(config('a', log_every=7))
    said = capsys.readouterr().out
    assert 'tokens_per_step: 128' in said and 'max_steps = 20' in said
    assert 'weight_decay' not in said                               # it has its default
    names = {f'ckpt_{step:08}.pt' for step in (15, 20)}
    assert set(contents('out/a')) == {'config.json', 'metrics.jsonl', *names}
    kept = json.loads(Path('out/a/config.json').read_text())
    assert set(kept['config']) == {knob.name for knob in fields(train.Config)}
    assert kept['config']['hidden_size'] == 32 and kept['config']['beta2'] == 0.95
    assert kept['origin']['hidden_size'].startswith('a.py:')
    assert kept['origin']['beta2'] == 'default'
    assert kept['derived']['tokens_per_step'] == 128 and kept['derived']['total_tokens'] == 2560
    tensors = saved('out/a')['model']['weights'].values()
    assert kept['derived']['parameters'] == sum(tensor.numel() for tensor in tensors)
    assert {'command', 'commit', 'python', 'torch', 'numpy'} <= set(kept)
    rows = metrics('out/a', 'train')
    assert [row['step'] for row in rows] == [1, 7, 14, 20]
    assert all({'tokens', 'loss', 'lr', 'grad_norm', 'samples'} <= set(row) for row in rows)
    final = metrics('out/a', 'eval')[-1]
    assert final['step'] == 20 and final['tokens'] == 2560 and set(final['val']) == {'old', 'new'}
    assert set(final['val']['old']) == {'loss', 'se', 'ppl', 'bpb'}


def test_a_commit_names_configs_that_are_not_committed(config, monkeypatch):
    ours = str(ROOT / 'config/pretrain_docs.py')
    monkeypatch.setattr(sys, 'argv', ['train.py', ours, config('a')])
    commit = record.provenance()['commit']
    assert commit.endswith(', a.py is not committed') and ours not in commit
    monkeypatch.setenv('PATH', '/nonexistent')                      # a machine without git
    assert record.provenance()['commit'].startswith('none')


# ------------------------------------------------------------------------------
# Killed, stopped, resumed

def test_thirty_kills_change_nothing(config, forked):
    name = config('a', eval_every=5, max_steps=40)
    assert forked([name, '--out_dir=whole'])[0] == [0]
    seed = random.randrange(10**6)
    print('seed', seed)
    draw = random.Random(seed)
    kills = [('', draw.randint(1, 12)) for _ in range(15)]
    kills += [('', draw.randint(1, 60)) for _ in range(10)]
    kills += [('save', 1), ('save', 2), ('replace', 3), ('fsync', 2), ('evaluate', 5)]
    draw.shuffle(kills)
    steps = []
    for at in kills:
        codes, err = forked([name], at=at)
        assert codes in ([-9], [0]) and not err, err
        steps.append(max([0, *checkpoints.find('out/a')]))
    assert steps == sorted(steps) and steps[-1] > 0                 # a kill loses no checkpoint
    assert forked([name])[0] == [0]
    same_run('whole', 'out/a', 40)
    assert not list(Path('out/a').glob('*partial'))


def test_an_interruption_at_any_evaluation_or_save_leaves_no_trace(config, forked):
    """Four passes make an evaluation, before steps 0, 8, ..., 40. Saves come every 10 steps."""
    name = config('a', max_steps=40, eval_every=8, save_every=10)
    assert forked([name, '--out_dir=whole'])[0] == [0]
    events = [('evaluate', 4 * k + 2) for k in range(6)] + [('save', k) for k in range(1, 5)]
    renames = [('replace', k + 2) for k in range(1, 5)]             # of checkpoints
    for number, code, moments in ((signal.SIGTERM, 0, events),
                                  (signal.SIGKILL, -9, events + renames)):
        for at in moments:
            shutil.rmtree('out/a', ignore_errors=True)
            codes, err = forked([name], at=at, signals=[number])
            assert codes == [code] and not err
            assert forked([name])[0] == [0]
            assert metrics('whole') == metrics('out/a'), (at, number)
            assert weights('whole', 40) == weights('out/a', 40)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_stops(config, forked, number):
    name = config('a')
    codes, err = forked([name], at=('batch', 8), signals=[number])
    assert codes == [0] and not err
    assert max(checkpoints.find('out/a')) == 8
    said = Path('stdout_0').read_text()
    assert '8 of 20' in said and 'the same command again' in said
    assert forked([name])[0] == [0]
    assert forked([name, '--out_dir=whole'])[0] == [0]
    same_run('whole', 'out/a')


def test_a_second_ctrl_c_ends_at_once(config, forked):
    codes, _ = forked([config('a')], at=('save', 1), signals=[signal.SIGINT, signal.SIGINT])
    assert codes == [130]
    assert not checkpoints.find('out/a')


def test_rows_past_the_resumed_step_are_dropped(config, monkeypatch):
    name = config('a', eval_every=2)
    crash([name], 9, monkeypatch)
    with open('out/a/metrics.jsonl', 'a') as file:
        file.write('{"event": "train", "step": 10, "los')           # the kill has cut this row
    crash([name], 0, monkeypatch)                                   # resumed at 5, and killed again
    assert [row['step'] for row in metrics('out/a', 'train')] == [1, 2, 3, 4, 5]
    assert evaluated('out/a') == [0, 2, 4]
    ends_well(name)
    assert evaluated('out/a') == list(range(0, 21, 2))


def test_a_finished_run_returns_at_once(config, batches, capsys):
    name = config('a')
    ends_well(name)
    batches.clear()
    before = contents('out/a')
    ends_well(name)
    assert batches == [] and 'finished' in capsys.readouterr().out
    assert contents('out/a') == before


def test_the_machine_may_change_under_a_resume(config, monkeypatch):
    ends_well(config('whole'))
    crash([config('a')], 12, monkeypatch)
    ends_well(config('a', micro_batch_size=1, eval_every=3, log_every=2))
    for name in ('old', 'new'):
        last, expected = (metrics(run, 'eval')[-1]['val'][name] for run in ('out/a', 'out/whole'))
        assert last == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------
# Several processes

def trained_on(ranks):
    """{global sample: its tokens} of what the ranks of the last forked run trained on."""
    lines = [line for rank in range(ranks) for line in open(f'rows_{rank}')]
    rows = [json.loads(line) for line in lines]
    assert len(rows) == len({number for number, _ in rows})         # none twice
    return {number: row for number, row in rows}


@pytest.mark.parametrize('micro', [4, 1])                   # the two rows of a rank: 2 or 1 + 1
def test_two_processes_are_one(config, forked, micro):
    changes = dict(**NEW, replay_data={'old': 1.0}, replay=0.3, micro_batch_size=micro)
    assert forked([config('one', **changes)])[0] == [0]
    one = trained_on(1)
    assert forked([config('two', **changes)], world=2)[0] == [0, 0]
    assert trained_on(2) == one and sorted(one) == list(range(80))
    np.testing.assert_allclose(losses('out/two'), losses('out/one'), rtol=1e-5)
    for a, b in zip(metrics('out/one', 'train'), metrics('out/two', 'train'), strict=True):
        assert a['samples'] == b['samples'] and a['step'] == b['step'] and a['lr'] == b['lr']
    for a, b in zip(metrics('out/one', 'eval'), metrics('out/two', 'eval'), strict=True):
        for name in ('old', 'new'):                                 # 7 windows: 4 and 3
            assert b['val'][name] == pytest.approx(a['val'][name], rel=1e-5)


def test_two_processes_resume_a_run_of_one(config, forked, monkeypatch):
    ends_well(config('whole'))
    name = config('a')
    crash([name], 12, monkeypatch)
    assert forked([name], world=2)[0] == [0, 0]
    assert sorted(trained_on(2)) == list(range(40, 80))             # from the checkpoint of step 10
    np.testing.assert_allclose(losses('out/a'), losses('out/whole'), rtol=1e-5)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(config, forked):
    name = config('a', eval_windows=1)                      # one rank has nothing to evaluate
    codes, err = forked([name], world=2, at=('batch', 7), signals=[signal.SIGTERM], rank=1)
    assert codes == [0, 0] and 'Traceback' not in err
    assert max(checkpoints.find('out/a')) == 7
    assert forked([name], world=2)[0] == [0, 0]
    assert [row['step'] for row in metrics('out/a', 'train')] == list(range(1, 21))


def test_a_batch_that_does_not_divide_names_the_nearest_that_do(config, forked):
    codes, err = forked([config('a', batch_size=3)], world=2)
    assert codes[0] == 2 and 'Traceback' not in err
    assert 'batch_size = 3' in err and '2 processes' in err and '2 and 4' in err
    # nor one that a branch takes over
    ends_well(config('up', batch_size=3, milestones=[10]))
    codes, err = forked([config('b', branch_from='out/up/ckpt_00000010.pt', batch_size=None)],
                        world=2)
    assert codes[0] == 2 and 'batch_size = 3' in err and '2 processes' in err


def test_torchrun(config):
    name = config('a', max_steps=4, warmup=1, save_every=2, batch_size=6)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                           '--nproc_per_node=2', str(ROOT / 'train.py'), name],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert list(checkpoints.find('out/a')) == [2, 4] and Path('out/a/forgetting.png').exists()
    assert metrics('out/a', 'train')[-1]['samples'] == {'old': 24}


# ------------------------------------------------------------------------------
# Start modes

def test_init_from_a_config_trains_it_first(config, batches):
    config('up')
    ends_well(stage(config, 'b', init_from='up.py'))
    assert max(checkpoints.find('out/up')) == 20 and len(batches) == 32
    assert metrics('out/b', 'eval')[0]['val'] == metrics('out/up', 'eval')[-1]['val']
    batches.clear()
    ends_well(stage(config, 'c', init_from='up.py'))                # now it is there
    assert len(batches) == 12
    same_run('out/b', 'out/c', 12)


def test_an_upstream_run_that_was_killed_is_resumed(config, monkeypatch):
    ends_well(config('whole'))
    config('up')
    name = stage(config, 'b', init_from='up.py')
    crash([name], 8, monkeypatch)
    assert list(checkpoints.find('out/up')) == [5]
    crash([name], 18, monkeypatch)                                  # 15 to its end, and 3 of b
    same_run('out/whole', 'out/up')
    ends_well(name)
    assert len(losses('out/b')) == 12


def test_every_way_to_name_a_parent(config):
    ends_well(config('up'))
    old_model = saved('out/up')['model']
    net = GPTNeoX(GPTNeoXConfig(**old_model['shape']))
    net.load_state_dict(old_model['weights'])
    save_hf(net, 'hf')
    found = {}
    for parent in ('up.py', 'out/up', 'out/up/ckpt_00000020.pt', 'hf'):
        shutil.rmtree('out/b', ignore_errors=True)
        ends_well(stage(config, 'b', init_from=parent))
        first = metrics('out/b', 'eval')[0]
        assert first['step'] == 0 and first['val'] == metrics('out/up', 'eval')[-1]['val'], parent
        assert losses('out/b') == found.setdefault('first', losses('out/b')), parent
    assert eval.Run('out/b').old == []                              # hf does not say what it knows
    ends_well(stage(config, 'c', init_from='hf', old_data=['old']))
    assert eval.Run('out/c').old == ['old'] and eval.Run('out/c').new == ['new']


def test_fresh_and_kept_moments(config):
    ends_well(config('up'))
    same = dict(init_from='out/up', weight_decay=0.0, schedule='constant', warmup=0)
    ends_well(stage(config, 'fresh', **same))
    ends_well(stage(config, 'kept', keep_optimizer=True, **same))
    for run, steps in (('fresh', 12), ('kept', 32)):
        moments = saved(f'out/{run}', 12)['optimizer']['moments']
        assert {float(moment['step']) for moment in moments.values()} == {steps}
        assert {row['lr'] for row in metrics(f'out/{run}', 'train')} == {2e-3}
    fresh, kept = losses('out/fresh'), losses('out/kept')
    assert fresh[0] == kept[0] and fresh[1] != kept[1]


def test_a_branch_under_the_same_schedule_is_the_same_run(config, batches):
    same = dict(schedule='constant', replay_data={'new': 1.0}, replay=0.2)
    ends_well(config('up', seed=7, milestones=[10], **same))
    whole = np.concatenate(batches)
    batches.clear()
    ends_well(config('b', branch_from='out/up/ckpt_00000010.pt', **same))       # no seed of its own
    np.testing.assert_array_equal(np.concatenate(batches), whole[40:])
    for part in ('model', 'optimizer'):
        assert plain(saved('out/b')[part]) == plain(saved('out/up')[part])
    assert metrics('out/up', 'train')[10:] == metrics('out/b', 'train')


def test_a_branch_under_another_schedule(config, batches):
    ends_well(config('up', schedule='constant', milestones=[10]))
    whole = np.concatenate(batches)
    batches.clear()
    ends_well(config('b', branch_from='out/up/ckpt_00000010.pt', schedule='wsd', decay=8,
                     max_steps=24))
    np.testing.assert_array_equal(np.concatenate(batches)[:40], whole[40:])
    rates = [row['lr'] for row in metrics('out/b', 'train')]
    np.testing.assert_allclose(rates, [3e-3] * 6 + [3e-3 - 2.7e-3 * k / 8 for k in range(1, 9)])
    assert losses('out/b')[:6] == losses('out/up')[10:16]           # until the decay begins
    assert losses('out/b')[8] != losses('out/up')[18]
    moments = saved('out/b', 24)['optimizer']['moments'].values()
    assert {float(m['step']) for m in moments} == {24}


def test_an_infinite_run_is_annealed_in_a_branch(config):
    line = dict(schedule='infinite_cosine', constant_lr=1e-3, warmup=2, cooldown=6)
    ends_well(config('main', **line, anneal=20, milestones=[10]))  # it never anneals
    ends_well(config('released', **line, branch_from='out/main/ckpt_00000010.pt', anneal=10,
                     max_steps=14))
    fall = [row['lr'] for row in metrics('out/released', 'train')]
    np.testing.assert_allclose(fall, [1e-3 * 0.3 ** (k / 4) for k in range(1, 5)])
    # the main line meets the next dataset at its constant rate, without re-warming
    ends_well(config('next', **NEW, branch_from='out/main', schedule='constant', warmup=0,
                     learning_rate=1e-3, max_steps=30, replay_data={'old': 1.0}, replay=0.25))
    rates = [row['lr'] for run in ('main', 'next') for row in metrics(f'out/{run}', 'train')]
    assert rates[6:] == [1e-3] * 24
    assert metrics('out/next', 'train')[-1]['samples'] == {'old': 80 + 10, 'new': 30}


def test_a_branch_is_resumed_with_what_it_inherited(config, resumes):
    ends_well(config('up', seed=7, schedule='constant', milestones=[10]))
    inherited = dict(branch_from='out/up/ckpt_00000010.pt', batch_size=None, block_size=None)
    resumes(7, **inherited)                                         # and no seed
    # a branch of a branch inherits it too
    ends_well(config('c', **{**inherited, 'branch_from': 'out/whole/ckpt_00000015.pt'}))
    assert losses('out/c') == losses('out/whole')[-5:]


def test_a_branch_to_other_data_counts_on(config, batches, resumes):
    ends_well(config('up', schedule='constant', milestones=[10]))
    batches.clear()
    parent = dict(branch_from='out/up/ckpt_00000010.pt', **NEW)
    ends_well(config('b', **parent, replay_data={'old': 1.0}, replay=0.5))
    assert metrics('out/b', 'train')[-1]['samples'] == {'old': 60, 'new': 20}
    assert sum(old_counts(batches)) == 20
    resumes(7, **parent)                                            # 'old' is only in its past


def test_what_a_branch_must_not_change(config, fails):
    ends_well(config('up', milestones=[10]))
    parent = dict(branch_from='out/up/ckpt_00000010.pt')
    fails(config('b', seed=8, **parent), says=['seed', '1337'])
    fails(config('b', batch_size=8, **parent), says=['batch_size', '4'])
    fails(config('b', max_steps=10, **parent), says=['step 10', 'max_steps'])


def test_the_shape_is_the_parents(config, fails):
    ends_well(config('up', rotary_pct=0.5, use_parallel_residual=False, hidden_act='gelu_fast'))
    ends_well(stage(config, 'b', init_from='out/up', block_size=16))            # that may change
    shape = saved('out/b', 12)['model']['shape']
    assert shape['hidden_size'] == 32 and shape['rotary_pct'] == 0.5
    assert shape['hidden_act'] == 'gelu_fast' and not shape['use_parallel_residual']
    assert shape['max_position_embeddings'] == 16
    fails(stage(config, 'c', init_from='out/up', hidden_size=64), says=['hidden_size', '32', '64'])
    fails(stage(config, 'c', init_from='out/up', pythia='14m'), says=['hidden_size', '128', '32'])
    assert not Path('out/c').exists()


# ------------------------------------------------------------------------------
# Order, replay and switches

@pytest.mark.parametrize('changes, start', [
    ({'seed': 5}, 0), ({'seed': 6}, 0), ({'continue_data': True}, 0),
    ({'replay_order': 'stored'}, None), ({'replay_order': 'reshuffled'}, None)], ids=str)
def test_replay_comes_in_the_order_that_is_asked_for(config, batches, corpora, capsys, changes,
                                                     start):
    ends_well(config('long', seed=5, max_steps=24))                 # as 'up', and 16 rows more
    first = np.concatenate(batches)
    ends_well(config('up', seed=5))
    batches.clear()
    ends_well(stage(config, 'b', **{'seed': 5, 'init_from': 'up.py', 'replay_data': {'old': 1.0},
                                    'replay': 0.25, **changes}))
    rows = old_rows(batches)
    assert len(rows) == 12                                          # a quarter of 12 steps of 4
    if start is not None:
        np.testing.assert_array_equal(rows, first[start:start + 12])
    else:
        source = data.Source('old', data.find_shards('old', 'train', corpora), 32)
        is_stored = np.array_equal(rows, source.read(range(12))[:, :-1])
        assert is_stored == (changes['replay_order'] == 'stored')
        assert not np.array_equal(rows, first[:12])
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith('old ')][-1]
    assert line.split()[2:4] == [f'{start or 0}', '12']             # from window, samples


def test_a_third_stage_knows_the_order_and_the_positions_of_the_first(config, batches, resumes):
    ends_well(config('long', seed=5, max_steps=40))
    whole = np.concatenate(batches)
    config('up', seed=5)
    ends_well(stage(config, 'b', init_from='up.py', seed=6, replay_data={'old': 1.0}, replay=0.25,
                    continue_data=True))
    batches.clear()
    ends_well(stage(config, 'c', init_from='b.py', seed=9, replay_data={'old': 1.0}, replay=0.5))
    np.testing.assert_array_equal(old_rows(batches), whole[:24])
    third = dict(init_from='b.py', train_data={'old': 1.0}, continue_data=True, max_steps=12)
    batches.clear()
    resumes(7, 12, learning_rate=2e-3, **third)                     # 48 rows, 28, and 28 again
    np.testing.assert_array_equal(old_rows(batches)[:48], whole[80:128])
    batches.clear()                                     # replay continues where replay stopped
    ends_well(stage(config, 'd', init_from='b.py', replay_data={'old': 1.0}, replay=0.5,
                    continue_data=True))
    np.testing.assert_array_equal(old_rows(batches), whole[12:36])


def test_the_seed_orders_new_data_but_not_those_seen_before(config, batches):
    config('up', seed=5)
    found = {}
    for seed in (6, 7):
        ends_well('up.py')
        batches.clear()
        ends_well(stage(config, f'b{seed}', init_from='up.py', seed=seed,
                        train_data={'old': 1, 'new': 1}))
        found[seed] = np.concatenate(batches)
    old, other = (old_rows([rows]) for rows in found.values())
    np.testing.assert_array_equal(old, other)
    assert not np.array_equal(found[6], found[7])


def test_a_switch_at_a_step(batches, resumes):
    second = {'step': 0.6, **NEW, 'replay_data': {'old': 1.0}, 'replay': 0.5}
    resumes(11, switches=[{'step': 6, **NEW}, second])
    assert old_counts(batches[:20]) == [4] * 6 + [0] * 6 + [2] * 8
    taken = {row.tobytes() for row in old_rows(batches[:20])}
    assert len(taken) == 24 + 16                                    # 'old' continues: nothing twice


def test_a_switch_at_a_fraction_of_the_rate(config, batches):
    ends_well(config('a', schedule='linear', max_steps=24, switches=[{'lr_below': 0.5, **NEW}]))
    # the warmup passes half the peak too; then the rate is 3e-3 - 2.7e-3 (t - 4) / 20
    expected = [t for t in range(5, 25) if 3e-3 - 2.7e-3 * (t - 4) / 20 <= 1.5e-3][0] - 1
    assert old_counts(batches) == [4] * expected + [0] * (24 - expected)
    rows = metrics('out/a', 'train')
    assert rows[expected]['lr'] <= 1.5e-3 < rows[expected - 1]['lr']


# ------------------------------------------------------------------------------
# NaN

def test_a_nan_stops_before_the_update(config, fails, monkeypatch):
    def forward(self, idx, targets=None, reduction='mean'):
        logits, loss = real(self, idx, targets, reduction)
        return logits, loss * math.nan if here and reduction == 'mean' else loss
    ends_well(config('good', milestones=[5]))
    real, here = GPTNeoX.forward, []
    name = config('a', log_every=10)
    with monkeypatch.context() as patch:
        patch.setattr(GPTNeoX, 'forward', forward)
        before_batch(patch, 7, lambda: here.append(1))
        fails(name, says=['step 6', 'nan', 'learning_rate', '5'])
    assert list(checkpoints.find('out/a')) == [5]
    assert weights('out/a', 5) == weights('out/good', 5)
    ends_well(name, '--log_every=1')                                # it can be resumed
    assert weights('out/a') == weights('out/good')


def test_an_infinite_gradient_stops_too(config, fails, monkeypatch):
    def forward(self, *args, **kwargs):
        logits, loss = real(self, *args, **kwargs)
        if armed and loss.requires_grad:
            loss.register_hook(lambda grad: grad * math.inf)        # the loss itself is finite
        return logits, loss
    real, armed = GPTNeoX.forward, []
    monkeypatch.setattr(GPTNeoX, 'forward', forward)
    before_batch(monkeypatch, 1, lambda: armed.append(1))
    fails(config('a'), says=['step 0', 'gradient norm'])


def test_nan_weights_are_not_saved(config, fails, monkeypatch):
    def init(self, config):
        build(self, config)
        nets.append(self)

    def spoil():
        with torch.no_grad():                                       # a row that no token reads
            nets[-1].gpt_neox.embed_in.weight[380] = math.nan
    nets, build = [], GPTNeoX.__init__
    monkeypatch.setattr(GPTNeoX, '__init__', init)
    before_batch(monkeypatch, 8, spoil)
    fails(config('a', grad_clip=0.0), says=['step 10', 'NaN', 'out/a'])
    assert list(checkpoints.find('out/a')) == [5]


# ------------------------------------------------------------------------------
# Bad input

OUT_OF_RANGE = dict(
    replay=-0.1, grad_clip=-1.0, eval_windows=-1, block_size=0, batch_size=0,
    micro_batch_size=0, max_steps=0, eval_every=0, log_every=0, save_every=0, replay_order='random',
    device='tpu', dtype='fp8', kernels='fast', beta1=1.0, beta2=-0.1, milestones=[-1],
    train_data={}, keep_optimizer=True, weight_decay=-0.1, eps=0.0, seed=-1)

IMPOSSIBLE = [
    (dict(pythia='15m'), ['pythia', '15m', '14m']), (dict(pythia='14m'), ['pythia', 'hidden_size']),
    (dict(schedule='cosin'), ['cosin', 'cosine']), (dict(learning_rate=-1.0), ['-1']),
    (dict(min_lr=1.0), ['min_lr']), (dict(warmup=30), ["'decay'", '-10']),
    (dict(warmup=-1.0), ['-1']), (dict(hidden_size=33), ['33']),
    (dict(rotary_pct=1.5), ['rotary_pct', '1.5']), (dict(vocab_size=200), ['200', '257']),
    (dict(hidden_act='relu'), ['hidden_act', 'relu']),
    (dict(block_size=10**6), ['1000001', 'block_size']),
    (dict(train_data={'old': 0.0}), ['train_data', 'above zero']),
    (dict(train_data={'old': -1.0}), ['train_data', '-1']),
    (dict(train_data={'old': 'much'}), ['train_data', 'much']),
    (dict(replay=1.0, replay_data={'new': 1.0}), ['replay', '1']),
    (dict(replay=0.1), ['replay_data']),
    (dict(replay=0.1, replay_data={'old': 1.0}), ['old', 'train_data', 'replay_data']),
    (dict(replay=0.1, replay_data={'new': 0.0}), ['replay_data', 'above zero']),
    (dict(val_data=['odl']), ['odl', 'val']), (dict(val_data=[3]), ['val_data', '3']),
    (dict(milestones=['x']), ['milestones']), (dict(milestones=[21]), ['milestones', '21']),
    (dict(paths={'old/train': 'elsewhere/*.bin'}), ['elsewhere/*.bin']),
    (dict(paths={'old/train': 3}), ['paths', '3']), (dict(paths={'old': 'x'}), ['paths', "'old'"]),
    (dict(paths={'odl/train': 'x'}), ['paths', 'odl/train', 'old/train']),
    (dict(switches=[{'step': 20, **NEW}]), ['switches', '20']),
    (dict(switches=[{'step': 9, **NEW}, {'step': 5, **NEW}]), ['switches', '5']),
    (dict(switches=[{'lr_below': 0.01, **NEW}]), ['switches', '0.01']),
    (dict(switches=[{'stpe': 5, **NEW}]), ['switches', "'stpe'"]),
    (dict(switches=[{'step': 3, 'lr_below': 0.2, **NEW}]), ['switches', "'lr_below'"]),
    (dict(switches=[{'step': 'five', **NEW}]), ['switches', "'five'"]),
    (dict(switches=[{'step': 5, 'replay': 'x', 'replay_data': {'new': 1}}]), ['replay', 'x']),
    (dict(switches=[{'step': 5, 'train_data': {'nwe': 1}}]), ["'nwe'"]),
    (dict(switches=[{'step': 5, 'train_data': {5: 1}}]), ['train_data', '5']),
    (dict(switches=[{'step': 5}]), ['switches', 'what changes']),
    (dict(seed=10**20), ['seed', '2']), (dict(hidden_size=10**9), ['hidden_size']),
    (dict(num_hidden_layers=10**6), ['1000000 layers']),
    (dict(init_from='a', branch_from='b'), ['init_from', 'branch_from'])]


def test_a_value_out_of_range(config, fails):
    for knob, value in OUT_OF_RANGE.items():
        print(knob, value)
        fails(config('a', **{knob: value}), says=[knob])
    assert not Path('out').exists()


def test_what_cannot_be_trained(config, fails):
    for changes, says in IMPOSSIBLE:
        print(changes)
        fails(config('a', **changes), says=says)
        assert not Path('out/a').exists()


def test_keys_and_types(config, fails):
    config('a')
    said = fails('a.py', '--learning_rat=1', '--nope=3',
                 says=["'learning_rat'", "'learning_rate'", "'nope'"])
    assert len(said.strip().splitlines()) == 3
    fails('a.py', '--max_steps=many', says=['max_steps', 'many', 'int'])
    fails('nowhere.py', says=['nowhere.py'])
    assert not Path('out').exists()


def test_all_is_checked_before_an_upstream_run_is_trained(config, fails, batches):
    config('up')
    for changes, says in ((dict(schedule='cosin'), 'cosin'), (dict(warmup=99), "'decay'"),
                          (dict(train_data={'x': 1.0}), "'x'"),
                          (dict(switches=[{'step': 99, **NEW}]), 'switches')):
        fails(stage(config, 'b', init_from='up.py', **changes), says=[says])
        assert batches == [] and not Path('out/up').exists(), changes


def test_parents_that_are_none(config, fails):
    stage(config, 'b')
    Path('empty').mkdir()
    Path('notes.txt').write_text('hello')
    for parent in ('nowhere', 'empty', 'notes.txt', 'nowhere.pt', 'nowhere.py'):
        fails('b.py', f'--init_from={parent}', says=[parent])
        fails('b.py', f'--branch_from={parent}', says=[parent])
    assert not Path('out/b').exists()


def test_help_prints_every_knob(capsys):
    ends_well('--help')
    said = capsys.readouterr().out
    assert all(f'{knob.name}: ' in said for knob in fields(train.Config))
