"""results/law.py: the law against loops and limits, fits against laws that made the curves."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_eval import run_folder
from test_results import check_training, commands, option

import train
from configurator import UserError
from results import law, law_check

PREDICT = ROOT / 'results/predict'
TRUE = {'old': {'C': 60.0, 'a1': -0.5, 'B': 0.04, 'E': 800.0, 'beta': -0.2, 'R': 0.06, 'K': 400.0},
        'new': {'C': 40.0, 'a1': 0.1, 'B': 0.1, 'E': 500.0, 'beta': 0.2, 'h': 0.3}}
MOMENTUM = 0.9
KNOBS = {'max_steps': 100, 'replay_data': {'old': 1.0}, 'val_data': ['old', 'new'],
         'schedule': 'cosine', 'min_lr': 1e-4}
SHAPES = {'a': {'replay': 0.0, 'learning_rate': 3e-3}, 'b': {'replay': 0.05, 'learning_rate': 3e-3},
          'c': {'replay': 0.3, 'learning_rate': 2e-3}, 'd': {'replay': 0.0, 'learning_rate': 1e-3},
          'e': {'replay': 0.1, 'learning_rate': 1e-3, 'schedule': 'constant'},
          'f': {'replay': 0.02, 'learning_rate': 3e-4, 'schedule': 'constant'}}
START = {'old': 1.5, 'new': 2.0}


def make_run(name, noise=0.0, at=range(0, 101, 10), **knobs):
    """A run folder whose curves follow the TRUE law."""
    config = {**KNOBS, **knobs}
    shape = law.Stage(name, {**vars(train.Config()), 'warmup': 2, **config})
    shape.start = START
    rng = np.random.default_rng()
    curves = {}
    for role, form in law.FORMS['recovery'].items():
        curve = law.follow(form, TRUE[role], shape, role, MOMENTUM)
        curves[role] = curve * np.exp(noise * rng.standard_normal(len(curve)))
        curves[role][0] = START[role]
    evals = [(step, {role: float(curve[step]) for role, curve in curves.items()}) for step in at]
    return run_folder(name, evals, **config)


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    """A folder with runs a to f, and law.json fitted to them."""
    folder = tmp_path_factory.mktemp('law')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(law, 'MOMENTA', (MOMENTUM, 0.99))
        patch.setattr(law, 'STARTS', 3)
        runs = [make_run(f'{name}_seed1', 5e-4, **knobs) for name, knobs in SHAPES.items()]
        law.main(['fit', *runs, '--form', 'recovery', '--out', 'law.json'])
    return folder


@pytest.fixture
def here(fitted, monkeypatch):
    monkeypatch.chdir(fitted)
    return law.read_law('law.json')


def options(**knobs):
    """The words of a config that continues as KNOBS say."""
    knobs = {**KNOBS, 'train_data': {'new': 1.0}, 'warmup': 2, **knobs}
    if not knobs.get('replay'):                         # replay_data would have no effect
        knobs.pop('replay_data')
    return [f'--{key}={value}' for key, value in knobs.items()]


def unseen(of, **knobs):
    return law.read_config(of, options(**knobs), START)


# ------------------------------------------------------------------------------
# The law

def test_areas_are_those_of_a_double_loop():
    rng = np.random.default_rng()
    rates, momentum = rng.uniform(0, 1e-2, 30), rng.uniform(0, 1)
    S1, S2 = law.areas(rates, momentum)
    eta = [0.0, *rates]
    for t in range(31):
        plain = sum((eta[k - 1] - eta[k]) * momentum ** (i - k)
                    for i in range(1, t + 1) for k in range(1, i + 1))
        assert math.isclose(S1[t], sum(rates[:t]), abs_tol=1e-15)
        assert math.isclose(S2[t], (1 - momentum) * plain, abs_tol=1e-15)


def test_growth_levels_off_or_not():
    x = np.array([0.0, 1e-6, 1.0, 1e8])
    np.testing.assert_allclose(law.growth(x, 0.0), np.log(1 + x))
    np.testing.assert_allclose(law.growth(x, 1e-5), np.log(1 + x), rtol=1e-3)
    np.testing.assert_allclose(law.growth(x, 2.0), (1 - (1 + x) ** -2.0) / 2, atol=1e-12)
    assert abs(law.growth(1e8, 2.0) - 0.5) < 1e-9                   # the paper's B is ours / beta
    np.testing.assert_allclose(law.growth(x, -0.5), 2 * (np.sqrt(1 + x) - 1), atol=1e-12)


FUNCTIONS = [form for forms in law.FORMS.values() for form in forms.values()]


def draw(form):
    """Parameters within their ranges."""
    rng = np.random.default_rng()
    return {name: rng.uniform(*law.RANGES[name]) for name in law.parameters_of(form)}


@pytest.mark.parametrize('form', FUNCTIONS, ids=lambda form: form.__name__)
def test_without_steps_or_a_rate_nothing_changes(form):
    values = draw(form)
    assert form(0.0, 0.0, 0, 0.3, **values) == 0
    values |= {'G': 0.0} if 'G' in values else {}                   # learning at any rate
    S1, S2 = law.areas(np.zeros(5), 0.9)
    np.testing.assert_allclose(form(S1, S2, np.arange(6), 0.3, **values), 0, atol=1e-12)


@pytest.mark.parametrize('form', FUNCTIONS, ids=lambda form: form.__name__)
def test_with_nothing_but_replay_nothing_shifts(form):
    values = draw(form)
    for name in values.keys() & {'A', 'G'}:
        values[name] = 0.0                                          # learning that needs no shift
    S1, t = np.linspace(0, 3, 7), np.arange(7)
    np.testing.assert_allclose(form(S1, np.zeros(7), t, 1.0, **values), 0, atol=1e-12)


def test_steps_count_beside_rates():
    """Half the rate for twice the steps has the same S1, but learns more of both sets."""
    rates = np.full(200, 1e-3)
    for form in law.FORMS['steps'].values():
        values = TRUE[form.__name__[:3]] | {'C': 0.0, 'G': 0.05, 'tau': 100.0, 'p': 0.4}
        values = {name: values[name] for name in law.parameters_of(form)}
        ends = []
        for r in (rates, np.repeat(rates / 2, 2)):
            S1, S2 = law.areas(r, 0.9)
            ends.append(form(S1[-1], S2[-1], len(r), 0.05, **values))
        assert ends[1] < ends[0] - 0.01


# ------------------------------------------------------------------------------
# Fit and predict

def test_a_fit_finds_the_law_that_made_the_curves(here):
    for role, fitted in here['sets'].items():
        assert fitted['role'] == role and fitted['momentum'] == MOMENTUM
        assert abs(fitted['parameters']['C'] / TRUE[role]['C'] - 1) < 0.1
    for knobs in ({'replay': 0.15, 'learning_rate': 2e-3}, {'schedule': 'wsd', 'decay': 0.3},
                  {'schedule': 'linear', 'learning_rate': 5e-4, 'replay': 0.01}):
        stage = unseen(here, **knobs)
        for role, found in law.predict(here, stage).items():
            form = law.FORMS['recovery'][role]
            true = law.follow(form, TRUE[role], stage, role, MOMENTUM)
            np.testing.assert_allclose(found['curve'], true, rtol=0.01)
            assert found['curve'][0] == START[role] and found['final'] == found['curve'][-1]


def test_the_interval_is_of_students_t_over_rows(here):
    from scipy.stats import t
    found = law.predict(here, unseen(here))
    for role, fitted in here['sets'].items():
        errors = np.array(list(fitted['left_out'].values()))
        assert len(errors) == len(SHAPES)
        half = t.ppf(0.975, len(SHAPES) - 1) * np.sqrt(np.mean(errors**2))
        assert math.isclose(math.log(found[role]['high'] / found[role]['final']), half)
        assert math.isclose(math.log(found[role]['final'] / found[role]['low']), half)


def test_seeds_are_left_out_together(here, monkeypatch):
    fits = []
    monkeypatch.setattr(law, 'fit_set', lambda form, stages, *_, **__:
                        (fits.append([stage.name for stage in stages]), TRUE['old'])[::-1])
    stages = law.read_runs(['a_seed1', 'b_seed1', 'c_seed1'])
    stages[1].row = 'a'
    law.leave_out(law.old_recovery, stages, 'old', MOMENTUM)
    assert fits == [['c_seed1'], ['a_seed1', 'b_seed1']]


def test_predict_prints_saves_and_draws(here, capsys):
    run = 'b_seed1'
    words = options(replay=0.1, out_dir='out/next', eval_every=30)
    law.main(['predict', 'law.json', *words, '--start', 'old=1.5', 'new=2', '--save', 'p.json',
              '--out', 'x.png'])
    printed = capsys.readouterr().out
    saved = json.loads(Path('p.json').read_text())['next']
    assert saved['steps'] == [0, 30, 60, 90, 100] and saved['start'] == START
    for role, found in saved['sets'].items():
        assert found['curve'][-1] == round(found['final'], 5)
        assert f'{found["final"]:.3f}' in printed and f'{found["low"]:.3f} to' in printed
    assert Path('x.png').read_bytes()[:4] == b'\x89PNG' and 'NOTE' not in printed

    # the old model's losses come from its folder, or from that of its config
    Path('base.py').write_text(f"out_dir = '{run}'\n")
    for init_from in (run, 'base.py'):
        stage = law.read_config(here, options(init_from=init_from), None)
        assert stage.start == law.start_of(run, ['old', 'new']) != START


@pytest.mark.parametrize('knobs, words', [
    ({'learning_rate': 6e-3}, r'peak rate is 0.006, outside .* 0.0003 to 0.003: 2 times'),
    ({'learning_rate': 1e-4, 'min_lr': 1e-5}, r'peak rate is 0.0001, .*: 0.33 times'),
    ({'replay': 0.6}, r'share of replay is 0.6, outside .* 0 to 0.3: 2 times'),
    ({'max_steps': 150}, r'number of steps is 150, .*: 1.5 times'),
    ({'max_steps': 150}, r'sum of the rates')])
def test_a_prediction_outside_says_how_far(here, knobs, words):
    notes = law.outside(here, unseen(here, **{'learning_rate': 3e-3, **knobs}))
    assert any(re.search(words, note) for note in notes.values()), notes


def test_another_old_model_is_noted(here):
    stage = unseen(here)
    assert not law.outside(here, stage)
    stage.start = {'old': 1.8, 'new': 2.0}
    assert 'loss on old at step 0 is 1.8' in law.outside(here, stage)['old']


def test_advice_is_the_least_weighted_loss_within_the_range(here, capsys):
    stage = unseen(here)
    for weights in ({'old': 1.0, 'new': 1.0}, {'old': 9.0, 'new': 1.0}, {'old': 0.0, 'new': 1.0}):
        tried = law.advise(here, stage, weights)
        loss, best, found = min(tried, key=lambda option: option[0])
        ends = np.array([[p['old']['final'], p['new']['final']] for _, _, p in tried])
        weighted = ends @ [weights['old'], weights['new']] / sum(weights.values())
        assert math.isclose(loss, weighted.min())
        assert 3e-4 <= best.peak * (1 + 1e-9) and best.peak <= 3e-3 * (1 + 1e-9)
        assert 0 <= best.share <= 0.3
        ratio = best.config['min_lr'] / best.config['learning_rate']
        assert math.isclose(ratio, stage.config['min_lr'] / stage.config['learning_rate'])
    law.main(['advise', 'law.json', *options(), '--start', 'old=1.5', 'new=2.0', '--weights',
              'old=0', 'new=1', '--out', 'plane.png'])
    assert f'least weighted loss {loss:.3f}: --replay={best.share:.3g}' in capsys.readouterr().out
    assert Path('plane.png').read_bytes()[:4] == b'\x89PNG'


# ------------------------------------------------------------------------------
# Comparison with finished runs

def test_errors_by_hand(here, capsys, monkeypatch):
    monkeypatch.setattr(law_check, 'STARTS', 2)
    make_run('held', replay=0.15, learning_rate=2e-3)
    make_run('higher', learning_rate=6e-3)
    fitted = [f'{name}_seed1' for name in SHAPES]
    law_check.main(['law.json', 'held', 'higher', '--fitted', *fitted, '--out', 'errors.md',
                    '--picture', 'curves.png', '--labels', '15%', 'twice the peak'])
    text, rows = Path('errors.md').read_text(), json.loads(Path('errors.json').read_text())
    for row in rows:
        near = law.read_runs([row['nearest_run']])[0]
        assert near.name == {'held': 'c_seed1', 'higher': 'a_seed1'}[row['run']]
        expected = 100 * (near.losses[row['set']][-1] / row['end'] - 1)
        assert math.isclose(row['nearest'], expected)
        assert math.isclose(row['law'], 100 * (row['predicted'] / row['end'] - 1))
        assert row['is_inside'] == (row['run'] == 'held')
        if row['is_inside']:
            assert abs(row['law']) < 1
    errors = [abs(row['law']) for row in rows if row['set'] == 'old']
    assert re.search(rf'worst of the 2 +\| {max(errors):.1f}%', text)
    assert re.search(rf'worst of the 1 within .*shares +\| {errors[0]:.1f}%', text)
    assert 'twice the peak: NOTE: the peak rate is 0.006' in capsys.readouterr().out
    assert Path('curves.png').read_bytes()[:4] == b'\x89PNG'


def test_the_baseline_of_shares_is_found_again():
    true = {'E0': 0.5, 'B': 0.8, 'eta': 0.3, 'beta': 0.2, 'C': 0.05, 'eps': 0.05, 'gamma': 0.5}
    D, r = (grid.ravel() for grid in np.meshgrid(np.arange(10, 101, 10.), [0, .05, .2, .5]))
    seen = law_check.dcpt(D, r, **true)
    values, cost = law.search(law_check.DCPT, 4, lambda v: np.log(law_check.dcpt(D, r, **v) / seen))
    np.testing.assert_allclose(law_check.dcpt(D, r, **values), seen, rtol=2e-3)


# ------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize('changes, words', [
    ({'vocab_size': 50304}, 'vocab_size is 50304 in odd, but 384'),
    ({'eval_windows': 7}, 'eval_windows is 7 in odd'), ({'val_data': ['old']}, 'val_data is'),
    ({'batch_size': 99}, 'batch_size is 99'), ({'train_data': {'new_1of2': 1.0}}, 'train_data'),
    ({'switches': [{'step': 5, 'train_data': {'new': 1.0}}]}, 'neither switches nor branch_from'),
    ({'at': range(10, 101, 10)}, 'not evaluated at step 0'),
    ({'at': range(0, 91, 10)}, 'at its last step'),
    ({'roles': {'old': 'new data', 'new': 'new data'}}, 'both old and new')])
def test_runs_that_do_not_belong_together(here, tmp_path, monkeypatch, changes, words):
    runs = [str(Path(f'{name}_seed1').resolve()) for name in SHAPES]
    monkeypatch.chdir(tmp_path)
    make_run('odd', at=changes.pop('at', range(0, 101, 10)))
    about = json.loads(Path('odd/config.json').read_text())
    for part in (about['derived'], about['derived']['shape'], about['config']):
        part |= {key: value for key, value in changes.items() if key in part}
    Path('odd/config.json').write_text(json.dumps(about))
    with pytest.raises(UserError, match=words):
        law.main(['fit', *runs, 'odd', '--out', 'x.json'])
    assert not Path('x.json').exists()


def test_too_few_runs_or_evaluations(here):
    names = [f'{name}_seed1' for name in SHAPES]
    with pytest.raises(UserError, match='3 different runs with 30 evaluations are too few for 9'):
        law.fit(law.read_runs(names[:3]))
    stages = law.read_runs(names)
    for stage in stages:
        stage.at = stage.at[[0, 5, 10]]
    with pytest.raises(UserError, match='6 different runs with 12 evaluations are too few for 7'):
        law.fit(stages, 'recovery')


@pytest.mark.parametrize('argv, words', [
    (['predict', 'a_seed1/config.json', *options()], 'is not a law'),
    (['predict', 'a_seed1/metrics.jsonl', *options()], 'is not a law'),
    (['predict', 'law.json', *options(init_from='nowhere')], r"'nowhere' are not known.*--start"),
    (['predict', 'law.json', *options(), '--start', 'old=1.5'], '--start takes a number for each'),
    (['predict', 'law.json', *options(), '--start', 'old=1', 'new=x'], '--start takes a number'),
    (['advise', 'law.json', *options(), '--weights', 'old'], '--weights takes a number'),
    (['advise', 'law.json', *options(), '--weights', 'old=0', 'new=0'], 'one must be above 0'),
    (['advise', 'law.json', *options(), '--weights', 'old=-1', 'new=2'], 'none may be negative'),
    (['predict', 'law.json', *options(batch_size=3)], 'batch_size is 3'),
    (['predict', 'law.json', *options(replay=2)], 'replay is 2.0'),
    (['predict', 'law.json', *options(replay=-1)], 'replay = -1.0'),
    (['predict', 'law.json', *options(schedule='cosines')], 'cosines'),
    (['predict', 'law.json', *options(branch_from='a_seed1')], 'neither switches nor branch_from'),
    (['predict', 'law.json', *options(), '--start', 'old=1', 'new=2', '--out', 'x.gif'], '.png'),
    (['fit', 'nowhere', '--out', 'x.json'], 'none of these is a run')])
def test_bad_input_has_one_message(here, argv, words):
    with pytest.raises(UserError, match=words):
        law.main(argv)


@pytest.mark.parametrize('argv, words', [
    ('a_seed1 --fitted a_seed1 b_seed1', 'name the runs of the law'),
    ('a_seed1 --fitted {all}', 'was fitted to a_seed1'),
    ('held2 --fitted {all} --labels x y', '2 labels for 1 runs'),
    ('wider --fitted {all}', 'hidden_size is 999 in wider')])
def test_bad_comparisons(here, argv, words):
    if not Path('held2').exists():
        make_run('held2')
        make_run('wider', hidden_size=999)
    argv = argv.format(all=' '.join(f'{name}_seed1' for name in SHAPES))
    with pytest.raises(UserError, match=words):
        law_check.main(['law.json', *argv.split()])


def test_without_scipy_the_package_is_named(here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.stats', None)
    with pytest.raises(UserError, match='pip install scipy'):
        law.predict(here, unseen(here))


def test_as_programs(here):
    for words in (['law', 'fit', 'nowhere', '--out', 'x.json'],
                  ['law_check', 'law.json', 'nowhere', '--fitted', 'nowhere']):
        done = subprocess.run([sys.executable, '-m', f'results.{words[0]}', *words[1:]], text=True,
                              capture_output=True, env={'PYTHONPATH': str(ROOT)})
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f'results.{words[0]}: none of these')


# ------------------------------------------------------------------------------
# results/predict

def test_the_commands_of_predict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, fitted, predicted = set(), {}, {}
    written = {'run.sh'}
    for script, *words in commands('predict', tmp_path):
        if script == 'train.py':
            check_training(train.Config, words, made)
            continue
        files = [option(words, name)[0] for name in ('--out', '--picture', '--save')
                 if name in words]
        assert all((ROOT / path).exists() for path in files), words
        written |= {Path(path).name for path in files}
        asked = {word for word in words if word.startswith('out/')}
        assert asked <= made, words
        if words[1] == 'fit':
            fitted[files[0]] = asked
        elif words[1] == 'predict':                                     # before it is trained
            name = [word for word in words if word.startswith('--out_dir=')][0][10:]
            assert name not in made
            predicted.setdefault(words[2], set()).add(name)
        elif words[0] == 'results.law_check':
            runs = predicted[words[1].replace('_printed', '')]
            assert set(option(words, '--fitted')) == fitted[words[1]]
            assert asked == fitted[words[1]] | runs and not fitted[words[1]] & runs
            assert len(option(words, '--labels')) == len(runs)
    assert [len(runs) for runs in predicted.values()] == [10, 9]
    for path, runs in fitted.items():
        assert {f'out/{run["name"]}' for run in law.read_law(ROOT / path)['runs']} == runs
    written |= {name.replace('.md', '.json') for name in written}
    assert written == {path.name for path in PREDICT.iterdir()}
    assert all(path.stat().st_size < 300_000 for path in PREDICT.iterdir())


@pytest.mark.parametrize('which', ['', '_second'])
def test_what_was_said_beforehand_is_what_the_law_predicts(which, monkeypatch):
    monkeypatch.chdir(ROOT)
    the_law = law.read_law(PREDICT / f'law{which}.json')
    said = json.loads((PREDICT / f'predictions{which}.json').read_text())
    errors = json.loads((PREDICT / f'errors{which}.json').read_text())
    assert {row['run'] for row in errors} == set(said)
    for row in errors:
        entry = said[row['run']]
        stage = law.read_config(the_law, entry['config'].split(), entry['start'])
        found, before = law.predict(the_law, stage)[row['set']], entry['sets'][row['set']]
        np.testing.assert_allclose(found['curve'][entry['steps']], before['curve'], atol=1e-4)
        for key in ('final', 'low', 'high'):
            assert math.isclose(found[key], before[key], rel_tol=1e-4)
            assert math.isclose(row['predicted' if key == 'final' else key], before[key],
                                rel_tol=1e-4)


def test_every_percentage_of_the_readme_is_in_the_tables():
    text = (ROOT / 'results/README.md').read_text()
    sections = [part for part in re.split(r'\n## |\n\| ', text) if '(predict' in part]
    tables = ''.join(path.read_text() for path in PREDICT.glob('errors*.md'))
    for section in sections:
        numbers = re.findall(r'(?<![\d.])\d+\.\d%', section)
        assert numbers and set(numbers) <= set(re.findall(r'\d+\.\d%', tables)), section
    assert len(sections) == 2
    numbers = re.findall(r'\d+\.\d%', (ROOT / 'README.md').read_text())
    assert len(numbers) == 3 and set(numbers) <= set(re.findall(r'\d+\.\d%', tables))
