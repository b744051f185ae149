"""train.py: reliability, start modes, data order, errors. Runs of a model of 37,000 weights for 20 steps."""
import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, losses, metrics, plain, saved

import configurator
import data
import eval
import train
from model import GPTNeoX, GPTNeoXConfig, save_hf

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    if 'pictures' not in request.keywords:
        monkeypatch.setattr(eval, 'plot', lambda folders, out: None)


@pytest.fixture
def batches(monkeypatch):
    """The rows that training asks for: a list of inputs [B, T], one a micro-batch, in order."""
    taken, real = [], data.Mixture.batch

    def batch(self, g):
        x, y = real(self, g)
        taken.append(x)
        return x, y
    monkeypatch.setattr(data.Mixture, 'batch', batch)
    return taken


class Crash(BaseException):
    """The power goes."""


def crash(argv, after, monkeypatch):
    """Run in this process until `after` batches were trained on, and leave it as a crash does."""
    left, real = [after], data.Mixture.batch

    def batch(self, g):
        if not left[0]:
            raise Crash
        left[0] -= 1
        return real(self, g)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(data.Mixture, 'batch', batch)
        train.main(argv)


def ends_well(*argv):
    assert train.main(list(argv)) == 0


@pytest.fixture
def fails(capsys):
    """fails(argv..., says=[...]): exit code 2 and one message, without a traceback, that holds all of these words."""
    def check(*argv, says):
        capsys.readouterr()
        code = train.main(list(argv))
        err = capsys.readouterr().err
        assert code == 2, err
        assert 'Traceback' not in err and err.count('train.py: ') == 1
        assert [text for text in says if not re.search(rf'(?<!\w){re.escape(text)}(?!\w)', err)] == [], err
        return err
    return check


def same_run(a, b, step=20):
    """Weights, moments and logged losses of two runs are equal bit for bit, and nothing is logged twice."""
    for key in ('weights', 'optimizer'):
        assert plain(saved(a, step)[key]) == plain(saved(b, step)[key]), key
    assert metrics(a, 'train') == metrics(b, 'train')
    steps = [row['step'] for row in metrics(b, 'eval')]
    assert len(steps) == len(set(steps))
    both = {row['step']: row for row in metrics(a, 'eval')}
    assert all(row == both.get(row['step'], row) for row in metrics(b, 'eval'))


def is_old(row):
    """Whether a window is of the source 'old': its letters are small."""
    return ((row >= ord('a')) & (row <= ord('z'))).any()


# -----------------------------------------------------------------------------
# What is computed

def test_the_losses_are_those_of_a_plain_loop(config, corpora):
    # Its own AdamW, rates, clipping, mixture and reading of shards; of ours are the model and the permutation.
    ends_well(config('a', train_data={'new': 1.0}, replay_data={'old': 2.0}, replay=0.25, grad_clip=0.7,
                     micro_batch_size=2))
    torch.manual_seed(1337)
    model = GPTNeoX(GPTNeoXConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=384,
                                  max_position_embeddings=32))
    files = {name: corpora / name / 'train_00000.bin' for name in ('old', 'new')}
    ids = {name: np.fromfile(file, '<u2')[512:].astype(np.int64) for name, file in files.items()}
    order = {name: data.Source(name, [file], 32, key=1337).order for name, file in files.items()}
    drawn = {'old': 0, 'new': 0}
    m, v, expected, g = {}, {}, [], 0
    for t in range(1, 21):
        windows = []
        for _ in range(4):
            name = 'old' if (g + 1 + 2) // 4 > (g + 2) // 4 else 'new'      # floor(g / 4 + 1/2) grows
            start = int(order[name](np.array([drawn[name]]))[0]) * 32
            windows.append(ids[name][start:start + 33])
            drawn[name] += 1
            g += 1
        batch = torch.from_numpy(np.stack(windows))
        logits, _ = model(batch[:, :-1])
        loss = -logits.log_softmax(-1).gather(2, batch[:, 1:, None]).mean()
        loss.backward()
        expected.append(loss.item())
        rate = 3e-3 * t / 4 if t <= 4 else 3e-4 + (3e-3 - 3e-4) / 2 * (1 + math.cos(math.pi * (t - 4) / 16))
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad * min(1, 0.7 / (norm + 1e-6))
                m[name] = 0.9 * m.get(name, 0) + 0.1 * grad
                v[name] = 0.95 * v.get(name, 0) + 0.05 * grad ** 2
                p.mul_(1 - rate * 0.1 * (p.dim() == 2))
                p -= rate * (m[name] / (1 - 0.9 ** t)) / ((v[name] / (1 - 0.95 ** t)).sqrt() + 1e-8)
                p.grad = None
    assert drawn == {'old': 20, 'new': 60}
    np.testing.assert_allclose(losses('out/a'), expected, rtol=1e-6)
    assert metrics('out/a', 'train')[-1]['samples'] == drawn


def test_one_batch_is_learned_by_heart(config, tmp_path):
    data.write_corpus(['abcdefgh' * 17], 'one', tmp_path / 'one', val=0)        # four windows
    ends_well(config('a', data_dir='one', train_data={'one': 1.0}, val_data=[], max_steps=150, learning_rate=1e-2,
                     save_every=1000, eval_every=1000, log_every=10))
    assert losses('out/a')[0] > 4 and losses('out/a')[-1] < 0.1


def test_evaluating_changes_nothing(config):
    ends_well(config('often', eval_every=1))
    ends_well(config('seldom', eval_every=1000))
    assert plain(saved('out/often')['weights']) == plain(saved('out/seldom')['weights'])
    assert losses('out/often') == losses('out/seldom')
    assert [row['step'] for row in metrics('out/often', 'eval')] == list(range(21))
    assert [row['step'] for row in metrics('out/seldom', 'eval')] == [0, 20]    # the first and the last, always


def test_accumulation_is_the_same_optimisation(config, batches):
    ends_well(config('whole'))
    whole = np.concatenate(batches)
    for size in (1, 2, 3):                              # of 4 rows at most 3 at once: 2
        batches.clear()
        ends_well(config(f'parts{size}', micro_batch_size=size))
        np.testing.assert_array_equal(np.concatenate(batches), whole)
        np.testing.assert_allclose(losses(f'out/parts{size}'), losses('out/whole'), rtol=1e-5)
        assert len(batches[0]) == (1, 2, 2)[size - 1]


def test_a_batch_in_tokens(config):
    ends_well(config('rows'))
    ends_well(config('tokens', batch_size=None, batch_tokens=128))
    assert losses('out/tokens') == losses('out/rows')
    assert metrics('out/tokens', 'train')[-1]['tokens'] == 20 * 128


def test_the_record_is_complete(config):
    ends_well(config('a', log_every=7))
    kept = json.loads(Path('out/a/config.json').read_text())
    assert set(kept['config']) == set(configurator.knobs(train.__file__))
    assert kept['config']['hidden_size'] == 32 and kept['config']['beta2'] == 0.95
    assert kept['origin']['hidden_size'].startswith('a.py:') and kept['origin']['beta2'] == 'default'
    assert kept['derived']['tokens_per_step'] == 128 and kept['derived']['total_tokens'] == 2560
    assert kept['derived']['parameters'] == sum(t.numel() for t in saved('out/a')['weights'].values())
    assert {'command', 'commit', 'python', 'torch', 'numpy'} <= set(kept)
    rows = metrics('out/a', 'train')
    assert [row['step'] for row in rows if row['step'] % 7 == 0 or row['step'] == 20] == [7, 14, 20]
    assert all({'tokens', 'loss', 'lr', 'grad_norm', 'samples'} <= set(row) for row in rows)
    final = metrics('out/a', 'eval')[-1]
    assert final['step'] == 20 and final['tokens'] == 2560 and set(final['val']) == {'old', 'new'}
    assert set(final['val']['old']) == {'loss', 'se', 'ppl', 'bpb'}


@pytest.mark.pictures
def test_a_machine_without_git_records_no_commit(config, monkeypatch):
    monkeypatch.setenv('PATH', '/nonexistent')
    ends_well(config('a', max_steps=1, warmup=0))
    assert json.loads(Path('out/a/config.json').read_text())['commit'] == 'none'


def test_a_run_without_validation_sets_ends_well(config):
    ends_well(config('a', val_data=[], max_steps=5, warmup=1))


@pytest.mark.pictures
def test_a_run_draws_its_curve_and_prints_its_row(config, capsys):
    ends_well(config('a', max_steps=5, warmup=1))
    assert Path('out/a/forgetting.png').read_bytes()[:4] == b'\x89PNG'
    assert '| a ' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Killed, stopped, resumed

def test_ten_kills_change_nothing(config, forked):
    name = config('a', eval_every=5, max_steps=40, log_every=1)
    assert forked([name, '--out_dir=whole'])[0] == [0]
    seed = random.randrange(10 ** 6)
    print('seed', seed)
    draw = random.Random(seed)
    kills = [('', draw.randint(1, 60)) for _ in range(6)] + [('', draw.randint(1, 12)), ('save', 1), ('save', 2), ('replace', 3)]
    draw.shuffle(kills)
    steps = []
    for at in kills:
        codes, err = forked([name], at=at)
        assert codes in ([-9], [0]) and not err, err
        steps.append(max([0, *eval.checkpoints('out/a')]))
    assert steps == sorted(steps) and steps[-1] > 0         # a kill loses no checkpoint
    assert forked([name])[0] == [0]
    same_run('whole', 'out/a', 40)
    assert not list(Path('out/a').glob('*.tmp'))
    assert [row['step'] for row in metrics('out/a', 'train')] == list(range(1, 41))


def test_a_kill_within_a_save_leaves_the_older_checkpoint(config, forked):
    name = config('a')
    assert forked([name], at=('save', 2))[0] == [-9]
    assert list(eval.checkpoints('out/a')) == [5] and list(Path('out/a').glob('*.tmp'))
    assert saved('out/a', 5)['step'] == 5
    assert forked([name], at=('save', 1))[0] == [-9]        # again, before it came any further
    assert forked([name])[0] == [0]
    assert forked([name, '--out_dir=whole'])[0] == [0]
    same_run('whole', 'out/a')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('at', [('batch', 8), ('evaluate', 6)])     # at a step; in the evaluation of step 10
def test_a_signal_saves_and_stops(config, forked, number, at):
    name = config('a')
    codes, err = forked([name], at=at, signals=[number])
    assert codes == [0] and not err
    stopped = max(eval.checkpoints('out/a'))
    assert stopped in ((8,) if at[0] == 'batch' else (10, 11))
    assert f'{stopped} of 20' in Path('stdout_0').read_text()
    assert forked([name])[0] == [0]
    assert forked([name, '--out_dir=whole'])[0] == [0]
    same_run('whole', 'out/a')


def test_a_second_ctrl_c_ends_at_once(config, forked):
    codes, _ = forked([config('a')], at=('save', 1), signals=[signal.SIGINT, signal.SIGINT])
    assert codes == [130]
    assert not eval.checkpoints('out/a')


@pytest.mark.parametrize('at', [('batch', 20), ('evaluate', 10)])   # in the last step; in the last evaluation
def test_a_signal_at_the_very_end_loses_no_evaluation(config, forked, at):
    name = config('a')
    assert forked([name], at=at, signals=[signal.SIGTERM])[0] == [0]
    assert forked([name])[0] == [0]
    assert metrics('out/a', 'eval')[-1]['step'] == 20


def test_resumed_twice(config, monkeypatch):
    ends_well(config('whole'))
    name = config('a')
    for steps in (7, 6):                                    # from 0 to 7, then from 5 to 11
        crash([name], steps, monkeypatch)
    assert [row['step'] for row in metrics('out/a', 'train')] == list(range(1, 12))
    ends_well(name)                                         # from 10
    same_run('out/whole', 'out/a')
    assert [row['step'] for row in metrics('out/a', 'train')] == list(range(1, 21))


def test_rows_past_the_resumed_step_are_dropped(config, monkeypatch):
    name = config('a', eval_every=2)
    crash([name], 9, monkeypatch)
    with open('out/a/metrics.jsonl', 'a') as file:
        file.write('{"event": "train", "step": 10, "los')       # the kill cut this row
    crash([name], 0, monkeypatch)                               # resumed at 5, then the power goes again
    assert [row['step'] for row in metrics('out/a', 'train')] == [1, 2, 3, 4, 5]
    assert [row['step'] for row in metrics('out/a', 'eval')] == [0, 2, 4, 5]
    ends_well(name)
    assert [row['step'] for row in metrics('out/a', 'eval')] == [0, 2, 4, 5, *range(6, 21, 2)]


def test_a_finished_run_returns_at_once(config, batches, capsys):
    ends_well(name := config('a'))
    batches.clear()
    before = {path: path.stat().st_mtime_ns for path in Path('out/a').glob('ckpt*')}
    ends_well(name)
    assert batches == [] and 'finished' in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in Path('out/a').glob('ckpt*')}
    assert metrics('out/a', 'eval')[-1]['step'] == 20


def test_overwrite_starts_anew(config):
    ends_well(config('a'))
    ends_well(config('b', seed=2))
    ends_well(config('a', out_dir='out/b'), '--overwrite=true')
    same_run('out/a', 'out/b')


def test_overwrite_deletes_nothing_before_all_is_checked(config, fails):
    ends_well(config('a'))
    fails(config('a', train_data={'odl': 1.0}), '--overwrite=true', says=['odl'])
    assert 20 in eval.checkpoints('out/a')


def test_the_machine_may_change_under_a_resume(config, monkeypatch):
    ends_well(config('whole'))
    crash([config('a')], 12, monkeypatch)
    ends_well(config('a', micro_batch_size=1, eval_every=3, log_every=2, keep_last=1))
    np.testing.assert_allclose(losses('out/a')[-1], losses('out/whole')[-1], rtol=1e-5)


# -----------------------------------------------------------------------------
# Several processes

def trained_on(ranks):
    """{global sample: its tokens} of what the ranks of the last forked run trained on."""
    rows = [json.loads(line) for rank in range(ranks) for line in Path(f'rows_{rank}').read_text().splitlines()]
    assert len(rows) == len({number for number, _ in rows})         # none twice
    return {number: row for number, row in rows}


@pytest.mark.parametrize('micro', [4, 1])                           # two rows a rank: at once, or one by one
def test_two_processes_are_one(config, forked, micro):
    changes = dict(train_data={'new': 1.0}, replay_data={'old': 1.0}, replay=0.3, micro_batch_size=micro)
    assert forked([config('one', **changes)])[0] == [0]
    one = trained_on(1)
    assert forked([config('two', **changes)], world=2)[0] == [0, 0]
    assert trained_on(2) == one and sorted(one) == list(range(80))
    np.testing.assert_allclose(losses('out/two'), losses('out/one'), rtol=1e-5)
    for a, b in zip(metrics('out/one', 'train'), metrics('out/two', 'train'), strict=True):
        assert a['samples'] == b['samples'] and a['step'] == b['step'] and a['lr'] == b['lr']
    for a, b in zip(metrics('out/one', 'eval'), metrics('out/two', 'eval'), strict=True):
        for name in ('old', 'new'):                                 # 7 windows: 4 of one rank, 3 of the other
            assert b['val'][name] == pytest.approx(a['val'][name], rel=1e-5)


def test_a_run_of_one_process_goes_on_with_two(config, forked, monkeypatch):
    ends_well(config('whole'))
    name = config('a')
    crash([name], 12, monkeypatch)
    assert forked([name], world=2)[0] == [0, 0]
    assert sorted(trained_on(2)) == list(range(40, 80))             # from the checkpoint of step 10
    np.testing.assert_allclose(losses('out/a'), losses('out/whole'), rtol=1e-5)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(config, forked):
    name = config('a', eval_windows=1)                              # and a rank without a window to evaluate
    codes, err = forked([name], world=2, at=('batch', 7), signals=[signal.SIGTERM], rank=1)
    assert codes == [0, 0] and 'Traceback' not in err
    assert max(eval.checkpoints('out/a')) == 7
    assert forked([name], world=2)[0] == [0, 0]
    assert [row['step'] for row in metrics('out/a', 'train')] == list(range(1, 21))


def test_a_batch_that_does_not_divide_names_the_nearest_that_do(config, forked):
    codes, err = forked([config('a', batch_size=3)], world=2)
    assert codes[0] == 2 and 'Traceback' not in err
    assert '3 sequences' in err and '2 processes' in err and '2 and 4' in err


def test_torchrun(config):
    name = config('a', max_steps=4, warmup=1, save_every=2, batch_size=6)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           str(ROOT / 'train.py'), name], capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert list(eval.checkpoints('out/a')) == [2, 4] and Path('out/a/forgetting.png').exists()
    assert metrics('out/a', 'train')[-1]['samples'] == {'old': 24}


# -----------------------------------------------------------------------------
# Start modes

def stage(config, name, **changes):
    """A second stage on 'new', which takes the shape of its parent."""
    shape = dict.fromkeys(('hidden_size', 'num_hidden_layers', 'num_attention_heads'))
    return config(name, **{**shape, 'train_data': {'new': 1.0}, 'learning_rate': 2e-3, 'max_steps': 12, **changes})


def test_init_from_a_config_trains_it_first(config, batches):
    config('up')
    ends_well(stage(config, 'b', init_from='up.py'))
    assert max(eval.checkpoints('out/up')) == 20 and len(batches) == 32
    assert metrics('out/b', 'eval')[0]['val'] == metrics('out/up', 'eval')[-1]['val']
    batches.clear()
    ends_well(stage(config, 'c', init_from='up.py'))                # it is there already
    assert len(batches) == 12
    same_run('out/b', 'out/c', 12)


def test_an_upstream_run_that_was_killed_goes_on(config, monkeypatch, batches):
    ends_well(config('whole'))
    config('up')
    crash([name := stage(config, 'b', init_from='up.py')], 8, monkeypatch)
    assert list(eval.checkpoints('out/up')) == [5]
    crash([name], 18, monkeypatch)                                  # 15 to its end, and 3 of the new stage
    same_run('out/whole', 'out/up')
    ends_well(name)
    assert len(losses('out/b')) == 12


def test_every_way_to_name_a_parent(config):
    ends_well(config('up'))
    state = saved('out/up')
    model = GPTNeoX(GPTNeoXConfig(**state['model']))
    model.load_state_dict(state['weights'])
    save_hf(model, 'hf')
    found = {}
    for parent in ('up.py', 'out/up', 'out/up/ckpt_00000020.pt', 'hf'):
        ends_well(stage(config, 'b', init_from=parent), '--overwrite=true')
        first = metrics('out/b', 'eval')[0]
        assert first['step'] == 0 and first['val'] == metrics('out/up', 'eval')[-1]['val'], parent
        assert losses('out/b') == found.setdefault('first', losses('out/b')), parent
        assert json.loads(Path('out/b/config.json').read_text())['derived']['start'] == 'init_from'
    assert eval.Run('out/b').old == []                              # weights alone do not say what they have seen
    ends_well(stage(config, 'b', init_from='hf', old_data=['old']), '--overwrite=true')
    assert eval.Run('out/b').old == ['old'] and eval.Run('out/b').new == ['new']


def test_fresh_and_kept_moments(config):
    ends_well(config('up'))
    ends_well(stage(config, 'fresh', init_from='out/up', weight_decay=0.0, schedule='constant', warmup=0))
    ends_well(stage(config, 'kept', init_from='out/up', weight_decay=0.0, schedule='constant', warmup=0, keep_optimizer=True))
    for run, steps in (('fresh', 12), ('kept', 32)):
        state = saved(f'out/{run}', 12)['optimizer']
        assert {float(moments['step']) for moments in state['state'].values()} == {steps}
        for group in state['param_groups']:                         # the new stage's, not the old one's end
            assert group['lr'] == 2e-3 and group['weight_decay'] == 0
        assert {row['lr'] for row in metrics(f'out/{run}', 'train')} == {2e-3}
    assert losses('out/fresh')[0] == losses('out/kept')[0] != losses('out/kept')[1] != losses('out/fresh')[1]


def test_weights_alone_hold_no_moments(config, fails, tmp_path):
    save_hf(GPTNeoX(GPTNeoXConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=384,
                                  max_position_embeddings=32)), tmp_path / 'hf')
    fails(stage(config, 'b', init_from='hf', keep_optimizer=True), says=['keep_optimizer', 'hf'])


def test_a_branch_under_the_same_schedule_is_the_same_run(config, batches):
    ends_well(config('up', seed=7, schedule='constant', replay_data={'new': 1.0}, replay=0.2))
    whole = np.concatenate(batches)
    batches.clear()
    ends_well(config('b', branch_from='out/up/ckpt_00000010.pt', schedule='constant', replay_data={'new': 1.0},
                     replay=0.2))                                   # no seed of its own
    np.testing.assert_array_equal(np.concatenate(batches), whole[40:])
    assert plain(saved('out/b')['weights']) == plain(saved('out/up')['weights'])
    assert plain(saved('out/b')['optimizer']) == plain(saved('out/up')['optimizer'])
    assert [row for row in metrics('out/up', 'train') if row['step'] > 10] == metrics('out/b', 'train')


def test_a_branch_under_another_schedule(config, batches):
    ends_well(config('up', schedule='constant'))
    whole = np.concatenate(batches)
    batches.clear()
    ends_well(config('b', branch_from='out/up/ckpt_00000010.pt', schedule='wsd', decay=8, max_steps=24))
    np.testing.assert_array_equal(np.concatenate(batches)[:40], whole[40:])
    rates = [row['lr'] for row in metrics('out/b', 'train')]
    np.testing.assert_allclose(rates, [3e-3] * 6 + [3e-3 - 2.7e-3 * k / 8 for k in range(1, 9)])
    assert losses('out/b')[:6] == losses('out/up')[10:16]           # the same until the decay begins
    assert losses('out/b')[8] != losses('out/up')[18]
    assert {float(m['step']) for m in saved('out/b', 24)['optimizer']['state'].values()} == {24}


def test_an_infinite_run_is_annealed_in_a_branch_while_the_main_line_goes_on(config, batches):
    line = dict(schedule='infinite_cosine', constant_lr=1e-3, warmup=2, cooldown=6)
    ends_well(config('main', **line, anneal=20, milestones=[10], keep_last=1))       # never anneals
    ends_well(config('released', **line, branch_from='out/main/ckpt_00000010.pt', anneal=10, max_steps=14))
    fall = [row['lr'] for row in metrics('out/released', 'train')]
    np.testing.assert_allclose(fall, [1e-3 * 0.3 ** (k / 4) for k in range(1, 5)])
    # The main line meets the next dataset at its constant rate, with its moments: nothing is re-warmed.
    ends_well(config('next', branch_from='out/main', schedule='constant', learning_rate=1e-3, warmup=0, max_steps=30,
                     train_data={'new': 1.0}, replay_data={'old': 1.0}, replay=0.25))
    rates = [row['lr'] for run in ('main', 'next') for row in metrics(f'out/{run}', 'train')]
    assert rates[6:] == [1e-3] * 24
    assert metrics('out/next', 'train')[-1]['samples'] == {'old': 80 + 10, 'new': 30}


def test_a_branch_is_resumed_with_what_it_inherited(config, monkeypatch):
    ends_well(config('up', seed=7, schedule='constant'))
    inherited = dict(branch_from='out/up/ckpt_00000010.pt', batch_size=None, block_size=None)   # and no seed
    ends_well(config('whole', **inherited))
    name = config('b', **inherited)
    crash([name], 7, monkeypatch)
    ends_well(name)
    same_run('out/whole', 'out/b')
    # The branch of a branch inherits it, too.
    ends_well(config('c', **{**inherited, 'branch_from': 'out/whole/ckpt_00000015.pt'}))
    assert losses('out/c') == losses('out/whole')[-5:]


def test_a_branch_to_other_data_counts_on(config, batches):
    ends_well(config('up', schedule='constant'))
    batches.clear()
    ends_well(config('b', branch_from='out/up/ckpt_00000010.pt', train_data={'new': 1.0}, replay_data={'old': 1.0},
                     replay=0.5))
    assert metrics('out/b', 'train')[-1]['samples'] == {'old': 60, 'new': 20}
    rows = np.concatenate(batches)
    assert sum(map(is_old, rows)) == 20


def test_a_branch_that_dropped_a_source_is_resumed(config, monkeypatch):
    ends_well(config('up', schedule='constant'))
    other = dict(branch_from='out/up/ckpt_00000010.pt', train_data={'new': 1.0})     # 'old' counts in its past only
    ends_well(config('whole', **other))
    name = config('b', **other)
    crash([name], 7, monkeypatch)
    ends_well(name)
    same_run('out/whole', 'out/b')


def test_what_a_branch_must_not_change(config, fails):
    ends_well(config('up'))
    parent = dict(branch_from='out/up/ckpt_00000010.pt')
    fails(config('b', seed=8, **parent), says=['seed', '1337', '8'])
    fails(config('b', batch_size=8, **parent), says=['batch_size', '4 there', '8 here'])
    fails(config('b', max_steps=10, **parent), says=['step 10', 'max_steps'])


def test_the_shape_is_the_parents(config, fails):
    ends_well(config('up', rotary_pct=0.5, use_parallel_residual=False, hidden_act='gelu_fast'))
    ends_well(stage(config, 'b', init_from='out/up', block_size=16))        # a window of its own is allowed
    shape = saved('out/b', 12)['model']
    assert shape['hidden_size'] == 32 and shape['rotary_pct'] == 0.5 and not shape['use_parallel_residual']
    assert shape['hidden_act'] == 'gelu_fast' and shape['max_position_embeddings'] == 16
    fails(stage(config, 'c', init_from='out/up', hidden_size=64, num_hidden_layers=3),
          says=['hidden_size', '32', '64', 'num_hidden_layers', '3'])
    fails(stage(config, 'c', init_from='out/up', model='14m'), says=['hidden_size', '128', '32'])
    assert not eval.checkpoints('out/c')


# -----------------------------------------------------------------------------
# Replay and switches

def two_stages(config, batches, **changes):
    """Rows of a first run, and those of them that a second run replays."""
    ends_well(config('up', seed=5))
    first = np.concatenate(batches)
    batches.clear()
    ends_well(stage(config, 'b', init_from='up.py', replay_data={'old': 1.0}, replay=0.25, **changes))
    rows = np.concatenate(batches)
    return first, rows[[is_old(row) for row in rows]]


@pytest.mark.parametrize('seed', [5, 6])
def test_replay_comes_in_the_order_of_the_first_run(config, batches, seed):
    first, replayed = two_stages(config, batches, seed=seed)
    assert len(replayed) == 12                                      # a quarter of 12 steps of 4
    np.testing.assert_array_equal(replayed, first[:12])


def test_replay_reshuffled(config, batches):
    first, replayed = two_stages(config, batches, seed=5, replay_order='reshuffled')
    assert len(replayed) == 12
    assert not np.array_equal(replayed, first[:12])


def test_replay_as_stored(config, batches, corpora):
    _, replayed = two_stages(config, batches, seed=5, replay_order='stored')
    source = data.Source('old', data.find_shards('old', 'train', corpora), 32)
    np.testing.assert_array_equal(replayed, [source.window(i)[:-1] for i in range(12)])


def test_replay_in_the_third_stage_remembers_the_first(config, batches):
    first, _ = two_stages(config, batches, seed=6)
    batches.clear()
    ends_well(stage(config, 'c', init_from='b.py', seed=9, replay_data={'old': 1.0}, replay=0.5))
    rows = np.concatenate(batches)
    np.testing.assert_array_equal(rows[[is_old(row) for row in rows]], first[:24])


def test_a_switch_at_a_step(config, batches, monkeypatch):
    name = config('a', switches=[{'step': 6, 'train_data': {'new': 1.0}},
                                 {'step': 0.6, 'train_data': {'new': 1.0}, 'replay_data': {'old': 1.0}, 'replay': 0.5}])
    ends_well(name, '--out_dir=whole')
    old = [sum(map(is_old, rows)) for rows in batches]
    assert old == [4] * 6 + [0] * 6 + [2] * 8
    whole = np.concatenate(batches)
    replayed = whole[48:][[is_old(row) for row in whole[48:]]]
    taken = {row.tobytes() for row in whole[:24]}
    assert not taken & {row.tobytes() for row in replayed}          # it goes on where it was: nothing twice
    crash([name], 11, monkeypatch)
    ends_well(name)
    same_run('whole', 'out/a')


def test_a_cap_on_epochs(config, batches, capsys, fails):
    """'old' has 623 windows: a cap of 0.02 epochs lets 12 of them in, 2 a step, so that step 6 is the first without."""
    ends_well(config('a', train_data={'old': 1, 'new': 1}, max_epochs={'old': 0.02}))
    out = capsys.readouterr().out
    assert 'max_epochs: old comes to its cap of 0.02 epochs in step 6; from there on its share goes to new' in out
    assert [sum(map(is_old, x)) for x in batches] == [2] * 6 + [0] * 14
    assert metrics('out/a', 'train')[-1]['samples'] == {'new': 68, 'old': 12}
    fails(config('b', max_epochs={'odl': 2}), says=['max_epochs', 'odl', 'old'])
    fails(config('b', max_epochs={'old': 0}), says=['max_epochs', "'old'", '0'])
    fails(config('b', max_epochs={'old': 0.01}), says=['max_epochs', 'no other source is left'])


def test_a_switch_at_a_fraction_of_the_rate(config, batches):
    ends_well(config('a', schedule='linear', max_steps=24, switches=[{'lr': 0.5, 'train_data': {'new': 1.0}}]))
    # Up in 4 steps, which pass half the peak too; then 3e-3 - 2.7e-3 (t - 4)/20, half of it at t - 4 = 11.1
    expected = next(t for t in range(5, 25) if 3e-3 - 2.7e-3 * (t - 4) / 20 <= 1.5e-3) - 1
    assert [sum(map(is_old, rows)) for rows in batches] == [4] * expected + [0] * (24 - expected)
    rows = metrics('out/a', 'train')
    assert rows[expected]['lr'] <= 1.5e-3 < rows[expected - 1]['lr']


def test_switches_that_cannot_be(config, fails):
    new = {'train_data': {'new': 1.0}}
    fails(config('a', switches=[{'step': 20, **new}]), says=['switches', '20'])
    fails(config('a', switches=[{'step': 9, **new}, {'step': 5, 'train_data': {'old': 1.0}}]), says=['switches', '5'])
    fails(config('a', switches=[{'lr': 0.01, **new}]), says=['switches', '0.01'])
    fails(config('a', switches=[{'stpe': 5, **new}, {'step': 3, 'lr': 0.2, **new}]), says=['switches[0]', 'switches[1]'])
    fails(config('a', switches=[{'step': 'five', **new}]), says=['switches', 'five'])


# -----------------------------------------------------------------------------
# NaN

def poison(monkeypatch, steps):
    """The loss of these training steps (0-based) becomes NaN, with all its gradients."""
    real, count = GPTNeoX.forward, [-1]

    def forward(self, idx, targets=None, cache=None, reduction='mean'):
        logits, loss = real(self, idx, targets, cache, reduction)
        if self.training and targets is not None and reduction == 'mean':
            count[0] += 1
            loss = loss * (math.nan if count[0] in steps else 1)
        return logits, loss
    monkeypatch.setattr(GPTNeoX, 'forward', forward)


def test_a_nan_stops_before_the_update(config, fails, monkeypatch):
    ends_well(config('good'))
    name = config('a', log_every=10)
    with monkeypatch.context() as patch:
        poison(patch, {6})
        fails(name, says=['step 6', 'nan', 'learning_rate', '5'])
    assert list(eval.checkpoints('out/a')) == [5]
    assert plain(saved('out/a', 5)['weights']) == plain(saved('out/good', 5)['weights'])
    ends_well(name, '--log_every=1')                                # and it can be gone on with
    assert plain(saved('out/a')['weights']) == plain(saved('out/good')['weights'])


def test_an_infinite_gradient_stops_too(config, fails, monkeypatch):
    real = GPTNeoX.forward

    def forward(self, idx, targets=None, cache=None, reduction='mean'):
        logits, loss = real(self, idx, targets, cache, reduction)
        if reduction == 'mean':
            loss.register_hook(lambda grad: grad * math.inf)        # the loss itself is finite
        return logits, loss
    monkeypatch.setattr(GPTNeoX, 'forward', forward)
    fails(config('a'), says=['step 0', 'gradient norm'])


def test_a_nan_is_skipped_when_asked(config, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, {6, *range(8, 18)})                           # one, and ten in a row
        ends_well(config('a', nonfinite='skip', log_every=10))
    state = saved('out/a')
    assert all(t.isfinite().all() for t in state['weights'].values())
    assert {float(m['step']) for m in state['optimizer']['state'].values()} == {9}
    assert [row['step'] for row in metrics('out/a', 'train') if row.get('skipped')] == [7, *range(9, 19)]
    assert plain(saved('out/a', 15)['weights']) == plain(saved('out/a', 10)['weights'])     # left alone


def test_eleven_nans_in_a_row_are_too_many(config, fails, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, set(range(6, 17)))
        fails(config('a', nonfinite='skip'), says=['step 16', 'nan'])
    assert list(eval.checkpoints('out/a')) == [5, 10, 15]


def test_nan_weights_are_not_saved(config, fails, monkeypatch):
    real, count = data.Mixture.batch, [0]
    models, build = [], GPTNeoX.__init__
    monkeypatch.setattr(GPTNeoX, '__init__', lambda self, config: (build(self, config), models.append(self))[0])

    def batch(self, g):
        count[0] += 1
        if count[0] == 8:                                           # a row that no token reads: the loss is well
            with torch.no_grad():
                models[-1].gpt_neox.embed_in.weight[380] = math.nan
        return real(self, g)
    monkeypatch.setattr(data.Mixture, 'batch', batch)
    fails(config('a', grad_clip=0.0), says=['step 10', 'NaN', 'out/a'])
    assert list(eval.checkpoints('out/a')) == [5] and not list(Path('out/a').glob('*.tmp'))


# -----------------------------------------------------------------------------
# Checkpoints

@pytest.mark.parametrize('keep', [0, 0.5, -1])
def test_a_truncated_checkpoint_is_set_aside(config, monkeypatch, capsys, keep):
    ends_well(config('whole'))
    name = config('a')
    crash([name], 12, monkeypatch)
    path = Path('out/a/ckpt_00000010.pt')
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] if keep == -1 else raw[:int(len(raw) * keep)])
    capsys.readouterr()
    ends_well(name)
    said = capsys.readouterr().out
    assert str(path) in said and 'cut short' in said
    assert Path(f'{path}.corrupt').exists()
    same_run('out/whole', 'out/a')


def test_no_readable_checkpoint_is_an_error_and_no_fresh_start(config, fails, monkeypatch):
    name = config('a')
    crash([name], 12, monkeypatch)
    for path in eval.checkpoints('out/a').values():
        path.write_bytes(b'')
    for _ in range(2):                                              # nor at the second attempt
        fails(name, says=['out/a', 'no checkpoint', '--overwrite=true'])
    ends_well(name, '--overwrite=true')


def test_flipped_bits_are_detected(config, monkeypatch):
    crash([config('a')], 6, monkeypatch)
    path = Path('out/a/ckpt_00000005.pt')
    raw, whole = path.read_bytes(), plain(eval.read_checkpoint(path))
    seed = random.randrange(10 ** 6)
    print('seed', seed)
    draw = random.Random(seed)
    with zipfile.ZipFile(path) as archive:                          # where the large members' bytes are
        inside = [(e.header_offset + 512, e.header_offset + e.file_size) for e in archive.infolist() if e.file_size > 4096]
        directory = archive.start_dir
    offsets = [(draw.randrange(*draw.choice(inside)), True) for _ in range(8)]
    offsets += [(draw.randrange(directory, len(raw)), False) for _ in range(60)]
    offsets += [(draw.randrange(len(raw)), False) for _ in range(8)]
    for offset, must_be_found in offsets:
        flipped = bytearray(raw)
        flipped[offset] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            state = eval.read_checkpoint(path)
        except eval.EvalError as error:
            assert str(path) in str(error)
            continue
        assert not must_be_found, offset
        assert plain(state) == whole, offset                        # padding, a date: it changes nothing


class Payload:
    def __reduce__(self):
        return os.system, ('touch was_run',)


@pytest.mark.parametrize('form', ['zip', 'pickle'])
def test_a_malicious_checkpoint_runs_nothing(config, fails, form):
    name = stage(config, 'b', init_from='evil.pt')
    torch.save({'step': 1, 'weights': Payload()}, 'evil.pt') if form == 'zip' else \
        Path('evil.pt').write_bytes(pickle.dumps(Payload()))
    fails(name, says=['evil.pt'])
    Path('out/a').mkdir(parents=True)
    shutil.copy('evil.pt', 'out/a/ckpt_00000010.pt')
    fails(config('a'), says=['out/a', 'no checkpoint'])
    assert not Path('was_run').exists()


def test_a_checkpoint_of_another_model(config, fails, monkeypatch):
    name = config('a')
    crash([name], 6, monkeypatch)
    state = saved('out/a', 5)
    state['weights']['embed_out.weight'] = torch.zeros(384, 16)
    del state['weights']['gpt_neox.final_layer_norm.bias']
    torch.save(state, 'out/a/ckpt_00000005.pt')
    fails(name, says=['embed_out.weight', '(384, 16)', '(384, 32)', 'missing gpt_neox.final_layer_norm.bias'])
    assert saved('out/a', 5)['step'] == 5


def test_retention(config):
    ends_well(config('a', save_every=3, keep_last=2, milestones=[0, 4, 9, 10]))
    assert list(eval.checkpoints('out/a')) == [0, 4, 9, 10, 18, 20]
    assert saved('out/a', 0)['step'] == 0 and saved('out/a', 4)['step'] == 4


def test_stale_files_are_swept_and_foreign_ones_left(config):
    name = config('a')
    Path('out/a').mkdir(parents=True)
    Path('out/a/ckpt_00000003.tmp').write_bytes(b'half')
    Path('out/a/notes.txt').write_text('mine')
    ends_well(name)
    assert not list(Path('out/a').glob('*.tmp')) and Path('out/a/notes.txt').read_text() == 'mine'


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'),
                                   RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')])
def test_a_full_disk_loses_nothing(config, fails, monkeypatch, error):
    ends_well(config('whole'))
    name, real, calls = config('a'), torch.save, []

    def save(state, file, *args):
        calls.append(1)
        if len(calls) == 2:
            file.write(b'half')
            raise error
        return real(state, file, *args)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', save)
        fails(name, says=['ckpt_00000010.pt', str(error), 'GB are free'])
    assert list(eval.checkpoints('out/a')) == [5] and not list(Path('out/a').glob('*.tmp'))
    ends_well(name)
    same_run('out/whole', 'out/a')


# -----------------------------------------------------------------------------
# Bad input

def test_a_folder_in_use_by_a_live_run(config, fails, monkeypatch):
    ends_well(config('whole'))
    name, real, tried = config('a'), data.Mixture.batch, []

    def batch(self, g):
        if not tried:                                               # while this run is in its first step
            tried.append(1)
            fails(name, says=['out/a', 'in use', str(os.getpid()), 'out_dir'])
            fails(config('a', seed=3), '--overwrite=true', says=['in use'])
        return real(self, g)
    with monkeypatch.context() as patch:
        patch.setattr(data.Mixture, 'batch', batch)
        ends_well(name)
    assert tried
    same_run('out/whole', 'out/a')


def test_a_folder_of_another_config(config, fails):
    ends_well(config('a'))
    before = plain(saved('out/a'))
    fails(config('a', seed=8, beta2=0.99), says=['out/a', 'seed', '1337', '8', 'beta2', '0.95', '0.99', '--overwrite=true'])
    assert plain(saved('out/a')) == before and len(losses('out/a')) == 20


def test_out_dir_that_cannot_be(config, fails):
    name = config('a')
    Path('file').write_text('mine')
    fails(name, '--out_dir=file', says=['out_dir', 'file'])
    fails(name, '--out_dir=file/deeper', says=['out_dir', 'file/deeper'])
    assert Path('file').read_text() == 'mine'
    if sys.platform == 'linux':
        fails(name, '--out_dir=/proc/rewarm', says=['out_dir', '/proc/rewarm'])
    if os.geteuid():                                                # root writes everywhere
        Path('locked').mkdir(mode=0o500)
        fails(name, '--out_dir=locked', says=['locked', 'cannot be written'])


def test_parents_that_are_none(config, fails):
    stage(config, 'b')
    Path('empty').mkdir()
    Path('notes.txt').write_text('hello')
    for parent, says in (('nowhere', 'does not exist'), ('empty', 'empty'), ('notes.txt', 'notes.txt'),
                         ('nowhere.pt', 'nowhere.pt'), ('nowhere.py', 'nowhere.py')):
        fails('b.py', f'--init_from={parent}', says=[says])
        fails('b.py', f'--branch_from={parent}', says=[says])
    fails('b.py', '--init_from=b', '--branch_from=c', says=['init_from', 'branch_from'])
    assert not eval.checkpoints('out/b')


def test_broken_hugging_face_directories(config, fails):
    name = stage(config, 'b', init_from='hf')
    save_hf(GPTNeoX(GPTNeoXConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=384,
                                  max_position_embeddings=32)), 'hf')
    file = Path('hf/model.safetensors')
    raw = file.read_bytes()
    file.write_bytes(raw[:len(raw) // 2])
    fails(name, says=['hf/model.safetensors'])
    file.unlink()
    fails(name, says=['hf', 'model.safetensors'])
    file.write_bytes(raw)
    Path('hf/config.json').write_text('{"model_type": "gpt2"}')
    fails(name, says=['hf/config.json', 'gpt2', 'gpt_neox'])
    Path('hf/config.json').write_text('{"model')
    fails(name, says=['hf/config.json'])


def test_keys_and_types(config, fails):
    config('a')
    err = fails('a.py', '--learning_rat=1', '--max_steps=many', '--nope=3',
                says=["'learning_rat'", "'learning_rate'", '--max_steps', 'many', "'nope'"])
    assert len(err.strip().splitlines()) == 3
    fails('nowhere.py', says=['nowhere.py'])
    assert not Path('out').exists()


def test_every_value_out_of_range_at_once(config, fails):
    wrong = dict(replay=-0.1, grad_clip=-1.0, eval_windows=-1, keep_last=-2, block_size=0, batch_size=0,
                 micro_batch_size=0, max_steps=0, eval_every=0, log_every=0, save_every=0, replay_order='random',
                 nonfinite='ignore', device='tpu', dtype='fp8', beta1=1.0, beta2=-0.1, milestones=[-1],
                 train_data={}, keep_optimizer=True, weight_decay=-0.1, eps=-1.0)
    fails(config('a', **wrong), says=list(wrong))
    assert not Path('out/a').exists()


@pytest.mark.parametrize('changes, says', [
    (dict(model='15m'), ['model', '15m', '14m']), (dict(model='14m'), ['model', 'hidden_size', 'num_hidden_layers']),
    (dict(batch_tokens=100, batch_size=None), ['batch_tokens', '100', '32']),
    (dict(batch_tokens=128), ['batch_tokens', 'batch_size']),
    (dict(batch_tokens=128, batch_size=None, block_size=0), ['block_size']),
    (dict(schedule='cosin'), ['cosin', 'cosine']), (dict(learning_rate=-1.0), ['-1']), (dict(min_lr=1.0), ['min_lr']),
    (dict(warmup=30), ['warmup', '30']), (dict(hidden_size=33), ['33']), (dict(rotary_pct=1.5), ['rotary_pct', '1.5']),
    (dict(hidden_act='relu'), ['hidden_act', 'relu']), (dict(vocab_size=200), ['vocab_size', '200', '257']),
    (dict(train_data={'old': 0.0}), ['train_data', 'above zero']), (dict(train_data={'old': -1.0}), ['train_data', '-1']),
    (dict(train_data={'old': 'much'}), ['train_data', 'much']),
    (dict(replay=1.0, replay_data={'new': 1.0}), ['replay', '1']), (dict(replay=0.1), ['replay_data']),
    (dict(replay=0.1, replay_data={'old': 1.0}), ['old', 'train_data', 'replay_data']),
    (dict(replay=0.1, replay_data={'new': 0.0}), ['replay_data', 'above zero']),
    (dict(block_size=10 ** 6), ['1,000,001', 'block_size']), (dict(val_data=['old', 'odl']), ['odl', 'val', 'old?']),
    (dict(val_data=[3]), ['val_data', '3']), (dict(milestones=['x']), ['milestones']), (dict(eps=0.0), ['eps']),
    (dict(paths={'old/train': 'elsewhere/*.bin'}), ['elsewhere/*.bin']), (dict(paths={'old/train': 3}), ['paths', '3']),
    (dict(warmup=-1.0), ['-1']),
], ids=lambda value: ' '.join(value) if isinstance(value, dict) else '')
def test_what_cannot_be_trained(config, fails, changes, says):
    fails(config('a', **changes), says=says)
    assert not eval.checkpoints('out/a')


def test_all_is_checked_before_an_upstream_run_is_trained(config, fails, batches):
    config('up')
    for changes, says in ((dict(schedule='cosin'), 'cosin'), (dict(warmup=99), 'warmup'), (dict(train_data={'x': 1.0}), "'x'"),
                          (dict(switches=[{'step': 99, 'train_data': {'old': 1.0}}]), 'switches')):
        fails(stage(config, 'b', init_from='up.py', **changes), says=[says])
        assert batches == [] and not Path('out/up').exists(), changes


def test_every_missing_source_at_once(config, fails):
    config('up', data_dir='nothing', train_data={'pile': 1.0}, val_data=['pile'])
    err = fails(stage(config, 'b', init_from='up.py', data_dir='nothing', train_data={'slim': 1.0}, replay_data={'pile': 1.0},
                      replay=0.05, val_data=['pile', 'slim']),
                says=['nothing/pile/train*.bin', 'nothing/slim/train*.bin',
                      'python data.py prepare pile', 'python data.py prepare slim'])
    assert 'Traceback' not in err and not eval.checkpoints('out/up')


def test_data_that_changed_under_a_run(config, corpora, fails, monkeypatch, tmp_path):
    shutil.copytree(corpora, tmp_path / 'mine')
    name = config('a', data_dir='mine')
    crash([name], 6, monkeypatch)
    shutil.rmtree('mine/old')
    data.write_corpus(['some other text ' * 60] * 2 + ['and more of it ' * 90], 'old', 'mine', val=0)
    shutil.copy(corpora / 'old/val_00000.bin', 'mine/old')
    fails(name, says=["'old'", 'changed', '19950', '--overwrite=true'])
    assert list(eval.checkpoints('out/a')) == [5]


def test_a_shard_cut_while_training(config, corpora, fails, monkeypatch, tmp_path):
    shutil.copytree(corpora, tmp_path / 'mine')
    real, count = data.Mixture.batch, [0]

    def batch(self, g):
        count[0] += 1
        if count[0] == 8:
            os.truncate('mine/old/train_00000.bin', 2000)
        return real(self, g)
    monkeypatch.setattr(data.Mixture, 'batch', batch)
    fails(config('a', data_dir='mine'), says=['mine/old/train_00000.bin', 'cut'])
    assert list(eval.checkpoints('out/a')) == [5]


# -----------------------------------------------------------------------------
# The configs that come with the program

CONFIGS = sorted((ROOT / 'config').glob('*.py'))


@pytest.mark.parametrize('file', CONFIGS, ids=lambda file: file.stem)
def test_the_configs_are_whole(file):
    values, origin = configurator.load(train.__file__, [str(file)])
    train.check(train.Config(**values), origin, 1)
    opening = file.read_text().split('\nout_dir')[0]
    assert opening.startswith(('#', '"""')) and f'train.py config/{file.name}' in opening
    assert values['out_dir'] == f'out/{file.stem}'


@pytest.mark.skipif(not (ROOT / 'config/rewarm_pile_slim.py').exists(), reason='no such config yet')
def test_the_pile_without_the_pile(config, fails):
    config('x')
    fails('config/rewarm_pile_slim.py', says=['pile', 'slimpajama', 'train*.bin', 'python data.py prepare slimpajama'])
    assert not eval.checkpoints('out/rewarm_pile_slim')


def test_help_prints_every_knob(capsys):
    ends_well('--help')
    said = capsys.readouterr().out
    assert all(f'{name}:' in said for name in configurator.knobs(train.__file__))
