"""results/: claims, planes, the commands of every run.sh, and the numbers of its README."""
import importlib
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import configurator
import data
import eval
import schedules
import train
from configurator import UserError
from conftest import ROOT
from support import checks
from test_eval import run_folder

from results import claims, dots, overview, plane, turns

RESULTS = ROOT / 'results'


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """a and b with three seeds, c with one. On 'old', b ends 0.1, 0.2 and 0.3 above a."""
    monkeypatch.chdir(tmp_path)
    folders = []
    for row, ends, new in (('a', (1.2, 1.3, 1.4), 2.0), ('b', (1.3, 1.5, 1.7), 2.01)):
        for seed, end in enumerate(ends, 1):
            curve = [(0, {'old': 1.0, 'new': 3.0}), (5, {'old': 1.9, 'new': 2.5}),
                     (10, {'old': end, 'new': new})]
            folders.append(run_folder(f'{row}_seed{seed}', curve, seed=seed))
    curve = [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': 1.6, 'new': 1.5})]
    return [*folders, run_folder('c_seed2', curve, seed=2)]


# ------------------------------------------------------------------------------
# Claims

# b - a on 'old' is 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, and for three seeds
# t = 4.303, so that the interval is 0.2 -+ 4.303 * 0.1 / sqrt(3) = 0.2 -+ 0.248
@pytest.mark.parametrize('formula, verdict, effects', [
    ('old: a < b', 'Not decided', ['0.200, 95% interval -0.048 to 0.448, 3 seeds']),
    ('old: b < a', 'Not decided', ['-0.200, 95% interval -0.448 to 0.048, 3 seeds']),
    ('old: a - 0.05 < b', 'Holds', ['0.250, 95% interval 0.002 to 0.498, 3 seeds']),
    ('old: b + 0.05 < a', 'Does not hold', ['-0.250, 95% interval -0.498 to -0.002, 3 seeds']),
    ('old: a < b < c', 'Not decided', ['0.200, 95%', '0.100, one seed']),
    ('old: b + 0.05 < a < c', 'Does not hold', ['-0.250', '0.300, one seed']),
    ('old: a < c', 'Not decided', ['0.300, one seed']),
    ('old: 2 * a@rise < b@rise', 'Does not hold', ['-0.100, 95% interval -0.100 to -0.100']),
    ('old: 0.5 * a@rise < b@rise', 'Not decided', ['0.350, 95%']),
    ('new: a ~0.02 b', 'Holds', ['0.010, 95% interval 0.010 to 0.010']),
    ('new: a ~0.005 b', 'Does not hold', ['0.010']),
    ('new: b ~0.005 a', 'Does not hold', ['-0.010']),
    ('old: a ~0.449 b', 'Holds', ['0.200']), ('old: a ~0.447 b', 'Not decided', ['0.200']),
    ('new: c ~0.6 b', 'Not decided', ['0.510, one seed']),
    ('old: a@start < a', 'Holds', ['0.300, 95% interval 0.052 to 0.548']),
    ('old: a < a@peak', 'Holds', ['0.600']), ('new: a@best < a@5', 'Holds', ['0.500']),
    ('average: a - 0.02 < b', 'Holds', ['0.125, 95% interval 0.001 to 0.249'])])
def test_verdicts_by_hand(runs, capsys, formula, verdict, effects):
    Path('claims.txt').write_text(f'# a comment\n\n{formula} | It is so (Someone, Fig. 1).\n')
    claims.main(['claims.txt', *runs])
    rule, _, line = capsys.readouterr().out.splitlines()
    assert rule == claims.RULE
    assert line.startswith(f'- **{verdict}.** It is so (Someone, Fig. 1). [')
    assert all(f'(by {effect}' in line for effect in effects), line


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip('scipy.stats')
    for n in range(2, 11):
        differences = np.random.default_rng().normal(0.3, 1, n)
        expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        np.testing.assert_allclose(claims.interval(differences), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_without_an_effect_a_claim_is_decided_one_time_in_twenty(seeds):
    draws = np.random.default_rng().normal(size=(4000, seeds))
    decided = [claims.holds('<', list(differences)) is not None for differences in draws]
    assert 0.03 < np.mean(decided) < 0.07


def test_more_seeds_than_the_table_of_t_has():
    with pytest.raises(UserError, match='11 seeds: STUDENT_T ends at 10'):
        claims.interval([0.0] * 11)


@pytest.mark.parametrize('line, words', [
    ('old: a < d | x', "no row 'd', but a, b, c"), ('odl: a < b | x', "evaluated on 'odl'"),
    ('old: a b | x', 'expected SET: TERM'), ('old: a < b', 'expected SET: TERM'),
    ('old: a < b | x | y', 'expected SET: TERM'),
    ('old: a@7 < b | x', '@7 is neither a step'), ('old: a@last < b | x', 'start, peak, best'),
    ('old: a ** 2 < b | x', "'a ** 2' is not a term"), ('old: c < d_seed9 | x', 'd_seed9')])
def test_a_claim_that_cannot_be_read_is_named(runs, line, words):
    Path('claims.txt').write_text(line)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        claims.main(['claims.txt', *runs])
    assert words in str(error.value)


def test_rows_without_a_common_seed(runs):
    groups = eval.by_seed([runs[0], runs[6], runs[1]])
    del groups['a'][1]
    with pytest.raises(UserError, match='no seed in common'):
        claims.verdict('old: a < c | x', groups)


def test_the_readme_has_the_overview_of_the_tables():
    text = (RESULTS / 'README.md').read_text()
    assert f'{overview.BEGIN}\n{overview.overview()}\n{overview.END}' in text, \
        'python -m results.overview results/README.md'


def test_an_overview_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, 'RESULTS', tmp_path)
    (tmp_path / 'q').mkdir()
    (tmp_path / 'q/claims_x.txt').write_text(
        'old: a < b | Two fields are no row.\n'
        'old: a < b < c | It rises (Someone). | by 0.1 | yes\nnew: a ~0.1 b | Alike. | so | no\n')
    (tmp_path / 'q/table_x.md').write_text(
        '| run |\n\n- **Holds.** It rises (Someone). [old: a 1.0 < b@5 1.2 (by 0.200, 95% interval '
        '-0.048 to 0.448, 3 seeds) < c 1.3 (by 0.100, one seed)]\n'
        '- **Not decided.** Alike. [new: a 1.0 ~ b 1.0 (by -0.010, one seed)]\n')
    page = tmp_path / 'page.md'
    page.write_text(f'before\n{overview.BEGIN}\nold\n{overview.END}\nafter\n')
    overview.main([str(page)])
    lines = page.read_text().splitlines()
    assert lines[:2] == ['before', overview.BEGIN] and lines[-2:] == [overview.END, 'after']
    assert lines[2:4] == overview.HEAD
    assert lines[4:-2] == [
        '| [It rises (Someone).](q/table_x.md) | by 0.1 | old: 0.200 (-0.048 to 0.448), 0.100 | '
        'Holds | yes |',
        '| [Alike.](q/table_x.md) | so | new: -0.010 | Not decided | no |']


def test_an_overview_of_a_table_that_was_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, 'RESULTS', tmp_path)
    (tmp_path / 'q').mkdir()
    (tmp_path / 'q/claims.txt').write_text('old: a < b | A new claim. | by 0.1 | yes\n')
    (tmp_path / 'q/table.md').write_text('- **Holds.** An old claim. [old: a 1.0 < b 1.2 (by 1)]\n')
    with pytest.raises(UserError, match="no verdict on 'A new claim.'. Run the run.sh"):
        overview.overview()
    with pytest.raises(UserError, match='must contain <!-- claims -->'):
        overview.main([str(tmp_path / 'q/table.md')])


# ------------------------------------------------------------------------------
# Planes

def test_a_plane_of_runs_with_two_parents(runs, figures):
    replay = {'replay_data': {'old': 1.0}}
    for name, start, end, knobs in (
            ('r1', (1.0, 3.0), (1.25, 2.2), {'replay': 0.01, **replay}),
            ('r5', (1.0, 3.0), (1.1, 2.4), {'replay': 0.05, **replay}),
            ('other', (1.5, 2.8), (1.6, 2.5), {'replay': 0.05, **replay}),
            ('union', (6.0, 6.0), (1.05, 2.1), {'derived': {'start': 'scratch', 'parent': {}}})):
        run_folder(name, [(step, dict(zip(('old', 'new'), losses)))
                          for step, losses in ((0, start), (10, end))], **knobs)
    labels = ['no replay', '1% replay', '5% replay', 'another old model', 'both from the start']
    plane.main(['old', 'new', *runs[:3], 'r1', 'r5', 'other', 'union', '--out', 'x.png',
                '--labels', *labels])
    assert Path('x.png').read_bytes()[:4] == b'\x89PNG'
    figure, (ax,) = figures[0], figures[0].axes
    points = {}
    for line in ax.lines:
        if line.get_marker() in ('o', 's', '*'):
            points.setdefault(line.get_marker(), []).extend(line.get_xydata().tolist())
    assert sorted(points['*']) == [[1.0, 3.0], [1.5, 2.8]]          # where each group began
    np.testing.assert_allclose(points['s'], [[1.05, 2.1]])
    np.testing.assert_allclose(points['o'], [[1.3, 2.0], [1.25, 2.2], [1.1, 2.4], [1.6, 2.5]])
    joined = [line.get_xydata() for line in ax.lines if line.get_linestyle() == '-']
    assert any(np.allclose(line, [[1.25, 2.2], [1.1, 2.4]]) for line in joined if len(line) == 2)

    # every label is there, within the axes, and covers no other
    texts = [text for text in ax.texts if text.get_text()]
    assert [text.get_text().replace('\n', ' ') for text in texts] == labels
    boxes = [text.get_window_extent() for text in texts]
    assert all(ax.bbox.count_contains(box.corners()) == 4 for box in boxes)
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)
    whole = figure.bbox_inches.padded(0.01)
    assert whole.count_contains(figure.get_tightbbox().corners()) == 4


@pytest.mark.parametrize('argv, words', [
    ('old newer a_seed1 --out x.png', 'evaluated on old and newer'),
    ('old new nowhere --out x.png', 'none of these is a run'),
    ('old new a_seed1 --out x.gif', 'ends in .png'),
    ('old new a_seed1 --out x.png --labels p q', '2 labels for 1 rows')])
def test_a_plane_that_cannot_be_drawn(runs, argv, words):
    with pytest.raises(UserError, match=words):
        plane.main(argv.split())


def test_dots_are_differences_seed_by_seed(runs, figures):
    argv = ['old', *runs, '--labels', 'first', 'second', 'third', '--out', 'x.png']
    panels = ['--panel', 'ends', 'a', 'b', 'c', '--panel', 'on the way', 'b@5', 'a', 'b@start']
    dots.main(argv + panels)
    assert Path('x.png').read_bytes()[:4] == b'\x89PNG'
    for ax, title, means in zip(figures[0].axes, ('ends', 'on the way'),
                                ((0, 0.2, 0.3), (0, -0.6, -0.9))):
        big = [line.get_xydata()[0] for line in ax.lines if line.get_markersize() == 7]
        np.testing.assert_allclose([x for x, _ in big], means, atol=1e-12)
        assert ax.get_title() == title and [y for _, y in big] == [0, 1, 2]
    labels = figures[0].axes[0].get_yticklabels()
    assert [text.get_text() for text in labels] == ['first', 'second', 'third']
    lines = [line.get_xdata() for line in figures[0].axes[0].lines if len(line.get_xdata()) == 2]
    assert any(np.allclose(x, claims.interval([0.1, 0.2, 0.3])) for x in lines)

    dots.main([*argv, *panels[:5], '--zero', 'c'])
    big = [line.get_xdata()[0] for line in figures[1].axes[0].lines if line.get_markersize() == 7]
    np.testing.assert_allclose(big, (-0.3, -0.1, 0), atol=1e-12)


@pytest.mark.parametrize('panel, words', [
    ('x a', "panel 'x' has 1 terms, but there are 2 labels"), ('x a d', "no row 'd'"),
    ('x a a@7', '@7 is neither')])
def test_dots_that_cannot_be_drawn(runs, panel, words):
    argv = ['old', *runs, '--labels', 'p', 'q', '--out', 'x.png', '--panel', *panel.split()]
    with pytest.raises(UserError, match=words):
        dots.main(argv)


def test_turns_are_the_differences_of_claims(runs, figures):
    short, long = 'It is so (Someone 2021, Fig. 1).', 'And (unlike some) that is so: ' + 50 * 'x '
    Path('p.txt').write_text(f'old: a < b | {short}\nold: a@start < c | {long}\n')
    Path('q.txt').write_text(f'old: b + 0.1 < a | {short} | up | yes\nold: c < b | {long}\n')
    turns.main(['p.txt', 'q.txt', '--runs', *runs, '--labels', 'P', 'Q', '--out', 'x.png'])
    assert Path('x.png').read_bytes()[:4] == b'\x89PNG'
    ax = figures[0].axes[0]
    dots = {line.get_label(): line.get_xydata() for line in ax.lines if line.get_marker() == 'o'}
    # one seed of c: it began at 1.0 and ended at 1.6, where b ended at 1.5
    np.testing.assert_allclose(dots['P'], [[0.2, -0.125], [0.6, 0.875]])
    np.testing.assert_allclose(dots['Q'], [[-0.3, 0.125], [-0.1, 1.125]])
    bars = [line.get_xdata() for line in ax.lines if line.get_lw() == 2]
    np.testing.assert_allclose(bars, [claims.interval([0.1, 0.2, 0.3]),
                                      claims.interval([-0.2, -0.3, -0.4])])
    labels = [text.get_text().replace('\n', ' ') for text in ax.get_yticklabels()]
    assert labels == ['It is so.', long.strip()]


@pytest.mark.parametrize('p, q, labels, words', [
    ('old: a < b | So.', 'old: a < b | Other.', 'P Q', 'differ in their sentences'),
    ('old: a < b | So.', 'old: b < a | So.', 'P', '1 labels for 2 files'),
    ('old: a < b < c | So.', 'old: a < b | So.', 'P Q', "p.txt: 'old: a < b < c': .*two terms"),
    ('old: a ~0.1 b | So.', 'old: a < b | So.', 'P Q', 'two terms'),
    ('old: a < d | So.', 'old: a < b | So.', 'P Q', "no row 'd'"),
    ('', '', 'P Q', 'no claim')])
def test_turns_that_cannot_be_drawn(runs, p, q, labels, words):
    Path('p.txt').write_text(p)
    Path('q.txt').write_text(q)
    with pytest.raises(UserError, match=words):
        turns.main(['p.txt', 'q.txt', '--runs', *runs, '--labels', *labels.split(),
                    '--out', 'x.png'])


def test_as_programs(runs):
    for words in (['claims', 'claims.txt', 'a_seed1'],
                  ['dots', 'x', 'a_seed1', '--out', 'x.png', '--labels', 'p', '--panel', 'x', 'a'],
                  ['plane', 'old', 'x', 'a_seed1', '--out', 'x.png'],
                  ['turns', 'x', '--runs', 'a_seed1', '--labels', 'p', '--out', 'x.png']):
        done = subprocess.run([sys.executable, '-m', f'results.{words[0]}', *words[1:]], text=True,
                              capture_output=True, env={'PYTHONPATH': str(ROOT)})
        assert done.returncode == 1 and done.stderr.startswith(f'results.{words[0]}: ')
        assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------
# Scripts

# In place of python: writes down what it is asked to do, a file each, for two may write at once.
PYTHON = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > asked/$EPOCHREALTIME.$$\n'


def commands(question, folder):
    """[words of each command] that a run.sh gives to python."""
    for name in ('results', 'config'):
        shutil.copytree(ROOT / name, folder / name)
    Path(folder, 'asked').mkdir()
    Path(folder, 'python').write_text(PYTHON)
    Path(folder, 'python').chmod(0o755)
    subprocess.run([folder / 'results' / question / 'run.sh'], check=True, cwd='/', timeout=60,
                   stdout=subprocess.DEVNULL,
                   env={'PATH': f'{folder}:/usr/bin:/bin', 'AT_ONCE': '20'})
    return [path.read_text().splitlines() for path in sorted(Path(folder, 'asked').iterdir())]


def test_what_is_finished_is_skipped_and_a_failure_ends_the_script(tmp_path):
    (tmp_path / 'results/q').mkdir(parents=True)
    (tmp_path / 'config').mkdir()
    shutil.copy(RESULTS / 'common.sh', tmp_path / 'results')
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env bash\necho "${@: -1}" >> asked\n'
                      'mkdir out/a_seed1 2> out/error || [[ $* != *fail* ]]\n')
    python.chmod(0o755)

    def script(command):
        Path(tmp_path, 'results/q/run.sh').write_text(
            f'. "$(dirname "$0")/../common.sh"\nrun a_seed1 x.py {command}\nwait\necho end\n')
        done = subprocess.run(['bash', 'results/q/run.sh'], cwd=tmp_path, text=True,
                              capture_output=True, env={'PATH': f'{tmp_path}:/usr/bin:/bin'})
        return done, len(Path(tmp_path, 'asked').read_text().splitlines())

    for calls in (1, 1):                                        # the second time, it is there
        done, asked = script("--k=\"{'b c': 2}\"")
        assert done.returncode == 0 and done.stdout.endswith('end\n') and asked == calls
    done, asked = script('--k=3')                               # by another command
    assert done.returncode == 0 and asked == 2
    (tmp_path / 'config/x.py').write_text('')                   # changed since
    os.utime(tmp_path / 'config/x.py', (2**31 - 1, 2**31 - 1))
    assert script('--k=3')[1] == 3
    done, asked = script('--fail')
    assert done.returncode != 0 and 'end' not in done.stdout and asked == 4


def option(words, name):
    """What follows an option: the words up to the next one."""
    following = words[words.index(name) + 1:]
    ends = [i for i, word in enumerate(following) if word.startswith('--')]
    return following[:ends[0]] if ends else following


def check_training(Config, words, made):
    """The knobs of a run are sound, and what it starts from is in made, to which it is added."""
    cfg, origin = configurator.load(Config, words)
    checks.check_knobs(cfg, origin)
    data.plan_mixes(cfg, schedules.of(cfg), 0)
    start = cfg.init_from or cfg.branch_from
    # in an order that works
    assert cfg.out_dir not in made, words
    assert not start or {start, re.sub(r'/\w+\.pt$', '', start)} & made, words
    made.add(cfg.out_dir)


def check_claims(path, runs):
    """All rows that a claims file compares are there."""
    rows = {re.sub(r'_seed\d$', '', Path(run).name) for run in runs}
    for line in claims.read_claims(path):
        comparison = line.partition('|')[0].partition(':')[2]
        terms = re.split(r'\s(?:<|~[\d.]+)\s', comparison.strip())
        named = {re.sub(r'^[\d.]+ \* |@\w+| [+-] [\d.]+$', '', term) for term in terms}
        assert len(terms) > 1 and named <= rows, line


def check_labels(words, rows):
    """There is a label for each row of a picture, or for each row of a panel of results.dots."""
    labels = option(words, '--labels')
    if words[0] == 'results.turns':
        rows = words[1:words.index('--runs')]               # the claims files
    if words[0] != 'results.dots':
        assert len(labels) == len(rows), words
    while '--panel' in words:
        title, *terms = option(words, '--panel')
        assert len(terms) == len(labels), title
        assert {term.partition('@')[0] for term in terms} <= set(rows), title
        words = words[words.index('--panel') + 1:]


# predict makes no tables: see test_law.py
@pytest.mark.parametrize('question', sorted({path.parent.name for path in
                                             RESULTS.glob('*/run.sh')} - {'predict'}))
def test_the_commands_of_a_question(question, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, tables, pictures = set(), 0, 0
    for script, *words in commands(question, tmp_path):
        if script == 'train.py':
            check_training(train.Config, words, made)
            continue
        asked = [word for word in words if word.startswith('out/')]
        if words[0] == 'projects.merge':
            *asked, merged = asked                              # --out is the last option
            assert set(asked) <= made and merged not in made, words
            made.add(merged)
            continue
        assert set(asked) <= made, words
        rows = list(dict.fromkeys(re.sub(r'_seed\d$', '', Path(run).name) for run in asked))
        if words[0] == 'results.claims':
            tables += 1
            check_claims(words[1], asked)
        elif words[0] not in ('table', 'projects.self_replay'):     # which makes a corpus
            pictures += 1
            check_labels(words, rows)
            out = option(words, '--out')[0]
            assert (ROOT / out).exists() and out.startswith(f'results/{question}/')
    assert tables and pictures and made
    assert tables == len(list((RESULTS / question).glob('claims*.txt')))


# certified trains no language model
@pytest.mark.parametrize('project', sorted({path.parent.name for path in
                                            RESULTS.glob('projects/*/run.sh')} - {'certified'}))
def test_the_commands_of_a_project(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, written = set(), set()
    for script, *words in commands(f'projects/{project}', tmp_path):
        program = words.pop(0) if script == '-m' else script
        asked = [word for word in words if word.startswith('out/')]
        if program in ('projects.data_volume', 'projects.no_language'):
            configurator.load(importlib.import_module(program).Config, words)   # they make corpora
        elif program == 'train.py' or words[0].startswith('config/'):
            module = importlib.import_module(program.removesuffix('.py'))
            Config = [value.Config for value in vars(module).values() if inspect.isclass(value)
                      and issubclass(value, train.Method)
                      and value.__module__ == module.__name__][0]
            check_training(Config, words, made)
        elif program.startswith('projects.') and '--out' not in words:
            assert asked[0] in made, words              # a checkpoint made without training:
            made.add(asked[1])                          # RUN OUT
        else:
            runs = {word for word in asked if not word.endswith(('.pt', '.md', '.png', '.json'))}
            assert runs and runs <= made, words
            written |= {option(words, name)[0] for name in ('--out', '--picture') if name in words}
            if program == 'results.claims':
                check_claims(words[0], runs)
    assert made and written
    folder = f'results/projects/{project}'
    assert all(path.startswith(f'{folder}/') and (ROOT / path).exists() for path in written)
    for picture in (ROOT / folder).glob('*.png'):
        assert str(picture.relative_to(ROOT)) in written and picture.stat().st_size < 200_000


# ------------------------------------------------------------------------------
# Numbers

def published(folder):
    """The numbers to three decimals that the JSON files and verdicts of a question contain."""
    found = set()
    for path in folder.glob('table*.json'):
        rows = {}
        for run in json.loads(path.read_text()):
            rows.setdefault(run['row'], []).append(run)
        for runs in rows.values():
            per_seed = {}                                       # {what: one value of each seed}
            for run in runs:
                start, end = run['start'], run['end']
                per_seed.setdefault('average', []).append(
                    statistics.mean(losses['loss'] for losses in end.values()))
                for name in end:
                    losses = run.get('losses', {}).get(name)
                    peak = max(losses) if losses else run['peak'][name]
                    first, last = start[name]['loss'], end[name]['loss']
                    for what, value in (('end', last), ('start', first), ('peak', peak),
                                        ('rise', last - first), ('bump', peak - first)):
                        per_seed.setdefault((name, what), []).append(value)
            for values in per_seed.values():
                found |= {eval.spread(values), f'{statistics.mean(values):.3f}'}
    for path in folder.glob('table*.md'):                       # losses within a stage
        found |= set(re.findall(r'@\d+ (\d\.\d{3})', path.read_text()))
    return found


def test_every_number_of_the_readme_is_in_the_files():
    text = (RESULTS / 'README.md').read_text()
    # the rows between the marks are checked above
    text = text.split(overview.BEGIN)[0] + text.split(overview.END)[1]
    questions = [path.parent for path in RESULTS.glob('*/run.sh')]
    known = {folder.name: published(folder) for folder in questions}
    checked = 0
    for section in re.split(r'\n## |\n\| (?=.*\]\()', text):    # a section, or a row of the table
        folders = re.findall(r'\((\w+)(?:/[\w.]+)?\)', section)
        numbers = re.findall(r'(?<!\d)\d\.\d{3}(?!\d)(?: ± \d\.\d{3})?', section)
        allowed = set().union(*(known[name] for name in folders if name in known))
        assert set(numbers) <= allowed, (section[:60], set(numbers) - allowed)
        checked += len(numbers)
    assert checked > 100
    for name in re.findall(r'\]\(([\w./]+)\)', text):
        assert (RESULTS / name).exists(), name
    assert all(f'({folder.name})' in text or f'({folder.name}/' in text for folder in questions
               if folder.name != 'headline')


def test_the_numbers_of_the_first_page_are_rounded_from_the_files():
    text = (ROOT / 'README.md').read_text()
    rows = re.findall(r'^\| \[.*\]\(results/(\w+)\) \|(.*)$', text, re.M)
    assert len(rows) > 7
    for folder, row in rows:
        known = {float(number) for number in published(RESULTS / folder)
                 if re.fullmatch(r'-?[\d.]+', number)}
        for number in re.findall(r'\d\.\d+', row):
            decimals = len(number) - 2
            assert any(abs(value - float(number)) <= 0.5001 * 10**-decimals for value in known), row


def test_every_number_of_the_projects_is_in_the_files():
    for row in (ROOT / 'projects/README.md').read_text().splitlines():
        folders = re.findall(r'\(\.\./results/((?:projects/)?\w+)(?:/[\w.]+)?\)', row)
        if row.startswith('|') and folders:
            tables = [path.read_text() for name in folders
                      for path in (RESULTS / name).glob('*.md')]
            number = r'(?<!\d)\d\.\d{3}(?!\d)'         # and not the number of a paper
            allowed = re.findall(number, ' '.join(tables))
            assert set(re.findall(number, row)) <= set(allowed), row
