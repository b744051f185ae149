"""projects/merge.py: averages, interpolation and sums of weights."""
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import eval
from configurator import UserError
from conftest import ends_well, metrics, plain, ROOT, saved, stage
from projects import merge
from projects.merge import average_weights
from schedules import DECAYS
from support import checkpoints
from support.huggingface import load_hf

from results import claims, plane

pytestmark = pytest.mark.usefixtures('fast', 'one_thread')
KINDS = ['mean', 'ema', *DECAYS]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp('trained')


@pytest.fixture
def runs(config, trained):
    """out/a, checkpoints of steps 5, 10, 15 and 20 on old data, and out/b, 12 steps on new data."""
    paths = (config('a', milestones=[5, 10, 15]),
             stage(config, 'b', init_from='a.py', save_every=4, milestones=[4, 8]))
    if not (trained / 'b').exists():                    # once for all tests
        for path in paths:
            ends_well(path)
        shutil.copytree('out', trained, dirs_exist_ok=True)
    shutil.copytree(trained, 'out', dirs_exist_ok=True)


def command(text):
    merge.main(text.split())


def weights(run, step=20):
    return saved(run, step)['model']['weights']


# ------------------------------------------------------------------------------
# Weights of averages

@pytest.mark.parametrize('n', [2, 3, 7, 30])
@pytest.mark.parametrize('kind', KINDS)
def test_weights_are_shares(kind, n):
    c = average_weights(kind, n)
    assert len(c) == n and min(c) >= 0 and sum(c) == pytest.approx(1, abs=1e-12)


def test_a_plain_mean_is_a_linear_decay():
    assert average_weights('linear', 9) == pytest.approx(average_weights('mean', 9), abs=1e-12)


def test_the_exponential_average_is_a_running_one():
    values, alpha = torch.rand(6).tolist(), random.uniform(0.05, 0.95)
    average = values[0]
    for value in values[1:]:
        average += alpha * (value - average)
    c = average_weights('ema', 6, alpha)
    assert sum(a * b for a, b in zip(c, values)) == pytest.approx(average, abs=1e-12)


@pytest.mark.parametrize('kind', KINDS)
def test_an_average_is_a_decay_when_gradients_are_given(kind):
    """SGD at a constant rate, averaged, ends where SGD at the decayed rate ends."""
    k, steps, rate = 5, 3, 0.1                          # k intervals of a few steps each
    gradients = torch.randn(k, steps, 8, dtype=torch.float64)
    start = torch.randn(8, dtype=torch.float64)

    checkpoints = [start]
    for interval in gradients:
        checkpoints.append(checkpoints[-1] - rate * interval.sum(0))
    c = average_weights(kind, k + 1)
    average = sum(a * b for a, b in zip(c, checkpoints))

    decayed = start.clone()
    for i, interval in enumerate(gradients, 1):
        for gradient in interval:
            decayed -= rate * sum(c[i:]) * gradient
        if kind in DECAYS:
            assert sum(c[i:]) == pytest.approx(float(DECAYS[kind](i / (k + 1))), abs=1e-12)
    torch.testing.assert_close(average, decayed, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------
# Merged weights

@pytest.mark.parametrize('kind', KINDS)
def test_an_average_of_a_run(runs, kind):
    command(f'average out/a --steps 20 10 15 --weights {kind} --alpha 0.3 --out out/m')
    c = average_weights(kind, 3, 0.3)
    found = weights('out/m')
    for name, weight in found.items():
        parts = [weights('out/a', step)[name].double() for step in (10, 15, 20)]
        expected = c[0] * parts[0] + c[1] * parts[1] + c[2] * parts[2]
        torch.testing.assert_close(weight, expected.float(), rtol=1e-6, atol=1e-9)
        assert weight.dtype == torch.float32
    assert plain(found) != plain(weights('out/a'))


@pytest.mark.parametrize('amount, end', [('0', ('out/a', 20)), ('1', ('out/b', 12))])
def test_the_ends_of_an_interpolation_are_the_models(runs, amount, end):
    command(f'interpolate out/a out/b --amount {amount} --out out/m')
    assert plain(weights('out/m', 12)) == plain(weights(*end))
    # and their losses are to the last bit those that train.py has found
    losses = {'0': metrics('out/b', 'eval')[0], '1': metrics('out/b', 'eval')[-1]}[amount]['val']
    assert metrics('out/m', 'eval')[-1]['val'] == losses


def test_between_the_ends(runs):
    amount = random.uniform(-0.2, 1.2)
    command(f'interpolate out/a out/b --amount {amount} --out out/m')
    for name, weight in weights('out/m', 12).items():
        expected = torch.lerp(weights('out/a')[name], weights('out/b', 12)[name], amount)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


def test_what_is_added(runs):
    a, earlier, b = 'out/a', 'out/a/ckpt_00000005.pt', 'out/b'
    command(f'add {a} {a} {b} --out out/same')
    command(f'add {earlier} {a} {b} --out out/m')
    for name, weight in weights('out/m', 12).items():
        ours = weights('out/b', 12)[name]
        torch.testing.assert_close(weights('out/same', 12)[name], ours, rtol=1e-6, atol=1e-12)
        expected = ours + weights(a)[name] - weights(a, 5)[name]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)


def test_one_model_at_a_time_is_in_memory(runs, monkeypatch):
    import weakref
    alive, real = weakref.WeakSet(), eval.load_run

    def load_run(path):
        state, loaded = real(path)
        alive.add(loaded)
        assert len(alive) <= 2                          # the last one goes when the next is there
        return state, loaded
    monkeypatch.setattr(eval, 'load_run', load_run)
    merge.combine([(0.25, f'out/a/ckpt_{step:08d}.pt') for step in (5, 10, 15, 20)])


# ------------------------------------------------------------------------------
# What comes out is a run

def test_every_command_takes_it(runs, config, capsys):
    command('average out/a --steps 10 15 --out out/m_seed1')
    out = Path('out/m_seed1')
    ends_well(stage(config, 'c', init_from=str(out), max_steps=1, warmup=0))
    assert metrics('out/c', 'eval')[0]['val'] == metrics(out, 'eval')[-1]['val']
    assert eval.Run('out/c').old == ['old']
    assert not eval.main(['sample', str(out), '--tokens', '5'])
    assert not eval.main(['export', str(out), 'exported'])
    assert plain(load_hf('exported').state_dict()) == plain(weights(out, 15))

    capsys.readouterr()
    assert not eval.main(['loss', str(out)])
    shown = re.findall(r'(\w+) +(\d\.\d{4}) ± ', capsys.readouterr().out)
    val = metrics(out, 'eval')[-1]['val']
    assert dict(shown) == {name: f'{row["loss"]:.4f}' for name, row in val.items()}


def test_its_record_is_that_of_its_parent(runs, capsys):
    command('interpolate out/a out/b --amount 0.5 --out out/m')
    ours, theirs = eval.Run('out/m'), eval.Run('out/b')
    assert (ours.old, ours.new, ours.roles) == (theirs.old, theirs.new, theirs.roles)
    assert ours.losses('old')[:-1] == theirs.losses('old')[:-1]
    assert ours.final('old') != theirs.final('old') and len(ours.evals) == len(theirs.evals)
    assert ours.config['merged'] == ['out/a', 'out/b'] and ours.config['factors'] == [0.5, 0.5]

    # tables and claims take it, and do not say that it has not been finished
    command('average out/a --steps 10 15 --out out/early')
    capsys.readouterr()
    assert not eval.main(['table', 'out/b', 'out/m', 'out/early', '--out', 'x.md'])
    output = capsys.readouterr()
    assert '| early ' in output.out and output.err == ''
    Path('claims.txt').write_text('new: b < m | Half of the way is less.\n')
    claims.main(['claims.txt', 'out/b', 'out/m'])
    assert 'new: b ' in capsys.readouterr().out


def test_a_plane_joins_the_points_between_two_models(runs):
    for amount in ('0.3', '0.6'):
        command(f'interpolate out/a out/b --amount {amount} --out out/m{amount}')
    command('average out/b --steps 4 8 12 --out out/mean')
    groups = eval.by_seed(['out/m0.3', 'out/m0.6', 'out/mean', 'out/b'])
    family = [point.family for point in plane.find_points(groups, 'old', 'new', ())]
    assert family[0] == family[1] and len(set(family)) == 3


def test_hugging_face_directories(runs):
    for run in ('a', 'b'):
        assert not eval.main(['export', f'out/{run}', run])
    command('interpolate a b --amount 0.25 --out out/hf')
    command('interpolate out/a out/b --amount 0.25 --out out/m')
    assert plain(weights('out/hf', 0)) == plain(weights('out/m', 12))
    assert not eval.main(['export', 'out/hf', 'again'])
    assert Path('again/tokenizer.json').exists() == Path('a/tokenizer.json').exists()
    command('add a b out/b --out out/mixed')            # the last one is a run, with a record
    assert eval.Run('out/mixed').final('new') is not None


def test_weights_from_elsewhere_are_merged_too(runs, config):
    """They have a shape and no history."""
    _, model = eval.load_run('out/a')
    checkpoints.save_weights('bare/x.pt', model, {})
    command('interpolate out/b bare/x.pt --amount 0.5 --out out/m')
    expected = torch.lerp(*(saved(*end)['model']['weights']['embed_out.weight']
                            for end in (('out/b', 12), ('out/a', 20))), 0.5)
    torch.testing.assert_close(weights('out/m', 0)['embed_out.weight'], expected)
    ends_well(stage(config, 'c', init_from='out/m', max_steps=1, warmup=0))


def test_the_first_checkpoint_of_a_run_has_a_record(runs, config):
    ends_well(stage(config, 'c', init_from='a.py', max_steps=4, warmup=1, milestones=[0]))
    first = 'out/c/ckpt_00000000.pt'
    command(f'interpolate {first} {first} --amount 0.5 --out out/m')
    assert metrics('out/m', 'start') == metrics('out/c', 'start')
    assert [row['val'] for row in metrics('out/m')] == [metrics('out/c', 'eval')[0]['val']]
    assert eval.Run('out/m').has_start


def test_a_run_without_validation_sets_has_no_record(config):
    ends_well(config('a', val_data=[]))
    command('average out/a --steps 15 20 --out out/m')
    assert [path.name for path in Path('out/m').iterdir()] == ['ckpt_00000020.pt']


# ------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize('text, words', [
    ('average out/a --steps 20 --out out/m', 'two checkpoints or more'),
    ('average out/a --out out/m', 'two checkpoints or more'),
    ('average out/a --steps 10 12 --out out/m', 'no checkpoints of steps [12], but of [5, 10,'),
    ('average nowhere --steps 10 12 --out out/m', 'no checkpoints of steps [10, 12], but of []'),
    ('average out/a out/b --steps 10 20 --out out/m', '--steps are those of one run'),
    ('average out/a out/b --out out/b', 'out/b exists already'),
    ('interpolate out/a out/nowhere --amount 0.5 --out out/m', 'there is no checkpoint'),
    ('add out/a out/wide out/b --out out/m', 'hidden_size is 64, but 32 in out/a')])
def test_what_cannot_be_merged(runs, config, text, words):
    if 'wide' in text:
        ends_well(config('wide', hidden_size=64, max_steps=1, warmup=0))
    with pytest.raises(UserError, match=re.escape(words)):
        command(text)
    assert not Path('out/m').exists()


def test_weights_that_do_not_fit(runs):
    state = saved('out/b', 12)
    state['model']['weights'].pop('gpt_neox.embed_in.weight')
    torch.save(state, 'out/b/ckpt_00000012.pt')
    with pytest.raises(UserError, match='the weights do not fit the model'):
        command('interpolate out/a out/b --amount 0.5 --out out/m')


def test_a_merge_is_whole_or_absent(runs, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval, 'evaluate', fail)
        command('interpolate out/a out/b --amount 0.5 --out out/m')
    assert not Path('out/m').exists()
    command('interpolate out/a out/b --amount 0.5 --out out/m')
    assert sorted(path.name for path in Path('out').iterdir()) == ['a', 'b', 'm']


def test_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'projects.merge', 'average', 'x', '--out', 'y'],
                          capture_output=True, text=True, cwd=tmp_path,
                          env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith('projects.merge: ')
    assert len(done.stderr.splitlines()) == 1
