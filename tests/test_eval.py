"""eval.py: losses against closed forms and float64, tables against numbers by hand, plots, samples, the command line."""
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics

import data
import eval
import train
from model import GPTNeoX, GPTNeoXConfig

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPE = GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=384,
                      max_position_embeddings=32)


def random_model():
    """Weights far larger than at the start of training, so that the losses of windows differ."""
    seed = random.randrange(10 ** 6)
    print('seed', seed)
    torch.manual_seed(seed)
    model = GPTNeoX(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def val_sets(corpora):
    """{name: (Source, windows)}, 13 windows of 'old' and all of 'new'."""
    sources = {name: data.Source(name, data.find_shards(name, 'val', corpora), 32) for name in ('old', 'new')}
    return {name: (source, data.val_windows(source, 13 * (name == 'old'))) for name, source in sources.items()}


def run_folder(name, evals, *, train_data=('new',), replay_data=(), replay=0.0, seen=('old',), **changes):
    """What a run leaves, by hand. evals: [(step, {set: loss}), ...]; 128 tokens a step."""
    folder = Path(name)
    folder.mkdir(parents=True)
    values = {**vars(train.Config()), 'out_dir': name, 'train_data': dict.fromkeys(train_data, 1.0),
              'replay_data': dict.fromkeys(replay_data, 1.0), 'replay': replay, **changes}
    (folder / 'config.json').write_text(json.dumps({'config': values, 'derived': {'seen': list(seen)}}))
    rows = [{'event': 'eval', 'step': step, 'tokens': 128 * step, 'lr': 1e-3,
             'val': {s: {'loss': loss, 'se': 0.01, 'ppl': math.exp(loss), 'bpb': loss / math.log(2)} for s, loss in val.items()}}
            for step, val in evals]
    rows += [{'event': 'train', 'step': step, 'tokens': 128 * step, 'loss': 2.0, 'lr': 1e-3 / step} for step in (1, 5, 10)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return name


def cells(table):
    """{run: {column: cell}} of a Markdown table."""
    lines = [[cell.strip() for cell in line.strip().strip('|').split('|')] for line in table.strip().splitlines()]
    assert set(''.join(lines[1])) <= set('-:') and len({len(line) for line in lines}) == 1
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


# -----------------------------------------------------------------------------
# Loss

def test_a_model_that_knows_nothing(val_sets):
    model = random_model()
    torch.nn.init.zeros_(model.embed_out.weight)
    for row in eval.evaluate(model, val_sets, 4, nullcontext()).values():
        assert row['loss'] == pytest.approx(math.log(384), rel=1e-6) and row['ppl'] == pytest.approx(384, rel=1e-5)
        assert row['se'] == pytest.approx(0, abs=1e-6)


def test_against_float64_by_hand(val_sets, corpora):
    model = random_model()
    found = eval.evaluate(model, val_sets, 5, nullcontext())
    model.double()
    for name, (_, windows) in val_sets.items():
        ids = np.fromfile(corpora / name / 'val_00000.bin', '<u2')[512:].astype(np.int64)
        each = []
        for w in windows:
            window = torch.from_numpy(ids[32 * w:32 * w + 33])
            logits = model(window[None, :-1])[0][0].detach().numpy()
            logits -= logits.max(1, keepdims=True)
            each.append(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(32), window[1:]]))
        row, expected = found[name], statistics.mean(each)
        assert row['loss'] == pytest.approx(expected, rel=1e-5)
        assert row['se'] == pytest.approx(statistics.stdev(each) / math.sqrt(len(each)), rel=1e-3)
        assert row['ppl'] == pytest.approx(math.exp(row['loss']))
        n_bytes = (ids < 256).sum()                             # end-of-text is a token, and no byte of text
        assert n_bytes < len(ids)
        assert row['bpb'] == pytest.approx(row['loss'] / math.log(2) * len(ids) / n_bytes)


def test_the_windows_are_spread_and_always_the_same(val_sets):
    source, windows = val_sets['old']
    assert len(set(windows)) == 13 and windows == sorted(windows)
    assert windows[0] < len(source) / 13 and windows[-1] >= len(source) * 12 // 13
    assert data.val_windows(source, 13) == windows


@pytest.mark.parametrize('batch', [1, 2, 13, 1000])
def test_any_batch_size(val_sets, batch):
    model = random_model()
    expected = eval.evaluate(model, val_sets, 3, nullcontext())
    for name, row in eval.evaluate(model, val_sets, batch, nullcontext()).items():
        assert row == pytest.approx(expected[name], rel=1e-5)


def test_ranks_share_the_windows(val_sets, monkeypatch):
    # The exchange itself is tested with two processes in test_train.py.
    model, parts = random_model(), []
    expected = eval.evaluate(model, val_sets, 3, nullcontext())
    monkeypatch.setattr(eval, 'add_up', lambda values: (parts.append(values), values)[1])
    for rank in range(3):
        eval.evaluate(model, val_sets, 3, nullcontext(), rank, 3)
    for i, (name, row) in enumerate(expected.items()):
        n, total, *_ = np.sum(parts[i::2], axis=0)
        assert n == len(val_sets[name][1]) and total / n == pytest.approx(row['loss'], rel=1e-6)
        assert max(part[0] for part in parts[i::2]) - min(part[0] for part in parts[i::2]) <= 1


def test_one_window_has_no_standard_error(val_sets):
    source, windows = val_sets['old']
    assert eval.evaluate(random_model(), {'old': (source, windows[:1])}, 3, nullcontext())['old']['se'] is None


def test_bytes_that_no_shard_tells(val_sets, tmp_path):
    (np.arange(400) % 90 + 30).astype('<u2').tofile(tmp_path / 'val.bin')
    source = data.Source('x', [tmp_path / 'val.bin'], 32, vocab_size=384)
    assert eval.evaluate(random_model(), {'x': (source, [0, 1])}, 3, nullcontext())['x']['bpb'] is None


def test_an_evaluation_that_is_cut_short_counts_for_nothing(val_sets):
    asked = []
    assert eval.evaluate(random_model(), val_sets, 3, nullcontext(), stopped=lambda: asked.append(1) or len(asked) > 3) is None
    assert len(asked) < 10


# -----------------------------------------------------------------------------
# Tables

def test_the_table_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder('out/plain', [(0, {'old': 1.0, 'new': 3.0}), (5, {'old': 1.75, 'new': 2.5}), (10, {'old': 1.5, 'new': 2.0})])
    run_folder('out/replay', [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': 1.125, 'new': 2.25})], replay_data=('old',), replay=0.05)
    run_folder('out/first', [(0, {'old': 5.0, 'new': 6.0}), (10, {'old': 1.0, 'new': 3.0})], train_data=('old',), seen=())
    table = cells(eval.table(['out/plain', 'out/replay', 'out/first']))
    assert list(table) == ['plain', 'replay', 'first']
    found = {run: [row[key] for key in ('old', 'new', 'average', 'forgetting', 'its peak', 'adaptation')] for run, row in table.items()}
    assert found['plain'] == ['1.500', '2.000', '1.750', '0.500', '0.750', '1.000']
    assert found['replay'] == ['1.125', '2.250', '1.688', '0.125', '0.125', '0.750']
    assert found['first'] == ['1.000', '3.000', '2.000', '–', '–', '–']


def test_seeds_are_one_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = (1.25, 1.5, 2.0)
    for seed, end in enumerate(ends):
        run_folder(f'out/a_seed{seed}', [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': end, 'new': 2.0})])
    run_folder('out/b', [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': 1.0, 'new': 2.0})])
    table = cells(eval.table([*(f'out/a_seed{seed}' for seed in range(3)), 'out/b']))
    assert list(table) == ['a', 'b'] and table['a']['seeds'] == '3' and table['b']['seeds'] == '1'
    assert table['a']['old'] == f'{statistics.mean(ends):.3f} ± {statistics.stdev(ends):.3f}'
    assert table['a']['forgetting'] == f'{statistics.mean(ends) - 1:.3f} ± {statistics.stdev(ends):.3f}'
    assert table['a']['new'] == '2.000 ± 0.000' and table['b']['old'] == '1.000'


def test_sets_that_a_run_lacks_and_several_old_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder('two', [(0, {'p': 1.0, 'q': 2.0, 'new': 3.0}), (10, {'p': 2.0, 'q': 2.5, 'new': 1.0})], seen=('p', 'q'))
    run_folder('one', [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': 1.5, 'new': 2.0})])
    table = cells(eval.table(['two', 'one']))
    assert table['two']['old'] == '–' and table['one']['p'] == '–'
    assert table['two']['forgetting'] == '0.750'                # the mean over the old sets
    assert table['two']['average'] == f'{(2.0 + 2.5 + 1.0) / 3:.3f}'


def test_parts_of_a_set(tmp_path, monkeypatch):
    """docs_1of3 teaches docs, documents does not; also what was seen, and what comes with a switch."""
    monkeypatch.chdir(tmp_path)
    losses = [(0, {'docs': 3.0, 'maths': 3.0, 'code': 3.0}), (10, {'docs': 4.0, 'maths': 2.5, 'code': 2.0})]
    run = eval.Run(run_folder('a', losses, train_data=('maths_sympy',), seen=('docs_1of3', 'documents', 'maths_old'),
                              switches=[{'step': 5, 'train_data': {'code': 1}}]))
    assert run.old == ['docs'] and run.new == ['maths', 'code']
    assert [run.role(name) for name in run.sets] == ['old data, 0% replay', 'the same data again', 'new data']


def test_the_table_of_a_real_run(config, monkeypatch):
    monkeypatch.setattr(eval, 'plot', lambda folders, out: None)
    config('up')
    assert train.main([config('b', init_from='up.py', train_data={'new': 1.0}, replay_data={'old': 1.0}, replay=0.1)]) == 0
    first, last = (metrics('out/b', 'eval')[i]['val'] for i in (0, -1))
    row = cells(eval.table(['out/b']))['b']
    assert row['forgetting'] == f'{last["old"]["loss"] - first["old"]["loss"]:.3f}'
    assert row['adaptation'] == f'{first["new"]["loss"] - last["new"]["loss"]:.3f}' and float(row['adaptation']) > 0.5


# -----------------------------------------------------------------------------
# Claims

@pytest.fixture
def rows(tmp_path, monkeypatch):
    """a and b with three seeds, c with one; on 'old' b ends 0.1, 0.2 and 0.3 above a."""
    monkeypatch.chdir(tmp_path)
    runs = [run_folder(f'{row}_seed{seed}', [(0, {'old': 1.0, 'new': 3.0}), (5, {'old': 1.9, 'new': 2.5}),
                                             (10, {'old': end, 'new': new})], seed=seed, max_steps=10)
            for row, ends, new in (('a', (1.2, 1.3, 1.4), 2.0), ('b', (1.3, 1.5, 1.7), 2.01))
            for seed, end in enumerate(ends, 1)]
    return [*runs, run_folder('c_seed2', [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': 1.6, 'new': 1.5})], seed=2, max_steps=10)]


@pytest.mark.parametrize('formula, verdict, effects', [
    ('old: a < b', 'Holds', ['0.200 ± 0.100, 3 seeds']), ('old: b < a', 'Does not hold', ['-0.200 ± 0.100, 3 seeds']),
    ('old: a < b < c', 'Holds', ['0.200 ± 0.100, 3 seeds', '0.100, one seed']),
    ('old: c - 0.103 < b@peak - 0.4', 'Not decided', ['0.003, one seed']), ('old: c - 0.11 < b@peak - 0.4', 'Holds', ['0.010']),
    ('old: a < c < b', 'Does not hold', ['0.300, one seed', '-0.100, one seed']),
    ('old: a + 0.15 < b', 'Not decided', ['0.050 ± 0.100']), ('old: a - 0.05 < b', 'Holds', ['0.250 ± 0.100']),
    ('old: 2 * a@rise < b@rise', 'Does not hold', ['-0.100 ± 0.000']), ('old: 0.5 * a@rise < b@rise', 'Holds', ['0.350']),
    ('new: a ~0.02 b', 'Holds', ['0.010 ± 0.000']), ('new: a ~0.005 b', 'Does not hold', ['0.010']),
    ('old: a@start < a', 'Holds', ['0.300 ± 0.100']), ('old: a < a@peak', 'Holds', ['0.600']),
    ('new: a@best < a@5', 'Holds', ['0.500']), ('average: a < b', 'Holds', ['0.105 ± 0.050'])])
def test_claims_by_hand(rows, formula, verdict, effects):
    Path('claims.txt').write_text(f'# what is said\n\n{formula} | It is so (Someone, Fig. 1)\n')
    *_, line = eval.claims('claims.txt', rows).splitlines()
    assert line.startswith(f'- **{verdict}') and 'It is so (Someone, Fig. 1)' in line
    assert all(f'(by {effect}' in line for effect in effects), line


@pytest.mark.parametrize('line', ['old: a < d | no such row', 'odl: a < b | no such set', 'old: a b | no relation',
                                  'old: a < b', 'old: a@7 < b | no such step', 'old: a@end < b | no such time'])
def test_claims_that_say_nothing(rows, line):
    Path('claims.txt').write_text(line)
    with pytest.raises(eval.EvalError, match='claim .* expected like'):
        eval.claims('claims.txt', rows)


def test_claims_follow_the_table(rows, capsys):
    Path('claims.txt').write_text('old: a < b | First\nold: b < a | Second')
    out = said(capsys, 'table', *rows, '--claims', 'claims.txt', '--out', 'table.md')
    assert Path('table.md').read_text() == out and out.index('| c ') < out.index('First') < out.index('Second')
    run_folder('d', [(0, {'old': 1.0}), (5, {'old': 1.0})], max_steps=10)
    eval.main(['table', 'd'])
    assert capsys.readouterr().err == 'd is not finished: step 5 of 10\n'        # once


# -----------------------------------------------------------------------------
# Pictures

def test_the_plane(rows, monkeypatch):
    """A point a row at its mean, joined where replay alone differs, runs from random weights as squares."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    run_folder('a_replay', [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': 1.1, 'new': 2.2})], replay=0.05, seed=1, max_steps=10)
    run_folder('union', [(0, {'old': 6.0, 'new': 6.0}), (10, {'old': 1.05, 'new': 2.1})], seen=(), max_steps=10)
    run_folder('less', [(0, {'old': 1.0}), (10, {'old': 2.0})], max_steps=10)
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    eval.plane([*rows[:3], 'a_replay', 'union', 'less'], 'old', 'new', 'x.png')
    (ax,) = figures[0].axes
    points = {line.get_marker(): line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 1}
    assert {'o', 's', '*'} == set(points)
    np.testing.assert_allclose(points['s'], [[1.05, 2.1]])
    np.testing.assert_allclose(points['*'], [[1.0, 3.0]])
    joins = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_marker() == 'None']
    assert any(np.allclose(join, [[1.3, 2.0], [1.1, 2.2]]) for join in joins)
    assert [t.get_text() for t in ax.texts] == ['a', '0.05', 'union', 'start']
    with pytest.raises(eval.EvalError, match='old and newer'):
        eval.plane(rows, 'old', 'newer', 'x.png')
    assert not eval.main(['plot', *rows, '--plane', 'old', 'new', '--out', 'plane.png'])
    assert Path('plane.png').read_bytes()[:4] == b'\x89PNG'


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        run_folder(f'a_seed{seed}', [(0, {'old': 1.0, 'new': 3.0}), (5, {'old': 1.5 + seed / 10, 'new': 2.5}),
                                     (10, {'old': 1.5, 'new': 2.0})])
    run_folder('b', [(0, {'old': 1.0, 'new': 3.0}), (10, {'old': 1.1, 'new': 2.1})], replay_data=('old',), replay=0.05)
    run_folder('less', [(0, {'old': 1.0}), (10, {'old': 2.0})])
    run_folder('first', [(0, {'old': 6.0}), (10, {'old': 1.0})], train_data=('old',), seen=())
    run_folder('other', [(0, {'x': 6.0}), (10, {'x': 1.0})])
    run_folder('none', [(0, {}), (10, {})])
    for i, runs in enumerate((['b'], ['first'], ['a_seed1', 'a_seed2'], ['a_seed1', 'a_seed2', 'b', 'less', 'first'],
                              ['b', 'other'])):
        eval.plot(runs, f'{i}.png')
        assert Path(f'{i}.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n', runs
    pictures = [Path(f'{i}.png').read_bytes() for i in range(5)]
    assert len(set(pictures)) == 5
    with pytest.raises(eval.EvalError, match='none'):
        eval.plot(['none'], 'none.png')


def test_what_a_picture_shows(tmp_path, monkeypatch):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    monkeypatch.chdir(tmp_path)
    run_folder('a', [(0, {'new': 3.0, 'old': 1.0}), (5, {'new': 2.5, 'old': 1.75}), (10, {'new': 2.0, 'old': 1.5})], seed=1)
    run_folder('b', [(0, {'new': 3.0, 'old': 1.0}), (10, {'new': 2.1, 'old': 1.1})], replay_data=('old',), replay=0.05, seed=2)
    older = json.loads(Path('b/config.json').read_text())
    del older['config']['max_epochs']                                               # a knob that came later
    Path('b/config.json').write_text(json.dumps(older))
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    eval.plot(['a', 'b'], 'x.png')
    panels, text = figures[0].axes, ' '.join(t.get_text() for t in figures[0].findobj(matplotlib.text.Text))
    assert 'old' in panels[0].get_title() and 'new' in panels[1].get_title()        # old data first
    curve = panels[0].lines[0]
    np.testing.assert_allclose(curve.get_ydata(), [1.0, 1.75, 1.5])
    np.testing.assert_allclose(curve.get_xdata(), np.array([0, 640, 1280]))
    assert any(line.get_linestyle() == ':' and set(line.get_ydata()) == {1.0} for line in panels[0].lines)
    np.testing.assert_allclose(panels[2].lines[0].get_ydata(), [1e-3, 2e-4, 1e-4])  # the rate, below
    assert len({(line.get_color(), str(line.get_linestyle())) for line in panels[2].lines[:2]}) == 2
    assert 'replay 0.05' in text and 'seed' not in text                             # what differs, but the seed
    assert 'nats per token' in text and 'learning rate' in text and 'tokens' in text


# -----------------------------------------------------------------------------
# Command line

@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """Its folder, copied to out/a of an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, 'out/a')
    return 'out/a'


def said(capsys, *argv):
    capsys.readouterr()
    assert not eval.main(list(argv))
    return capsys.readouterr().out


def test_loss_of_a_run_and_of_a_checkpoint(trained, capsys, corpora):
    row = metrics(trained, 'eval')[-1]['val']
    for run in (trained, f'{trained}/ckpt_00000030.pt'):
        out = said(capsys, 'loss', run)
        assert 'step 30' in out
        for name in ('old', 'new'):
            assert f'{row[name]["loss"]:.4f} ±' in out and f'{row[name]["bpb"]:.4f} bits per byte' in out
    assert 'step 10' in said(capsys, 'loss', f'{trained}/ckpt_00000010.pt')
    only = said(capsys, 'loss', trained, '--sets', 'new', '--windows', '3', '--data_dir', str(corpora), '--device', 'cpu')
    assert 'old' not in only.replace(trained, '') and '3 windows' in only


def test_sample(trained, capsys):
    argv = ['sample', trained, '--prompt', 'abc', '--tokens', '60', '--device', 'cpu']
    out = said(capsys, *argv)
    assert out == said(capsys, *argv) and out.startswith('abc') and len(out) > 60
    assert out != said(capsys, *argv, '--seed', '2')
    assert said(capsys, *argv, '--samples', '3').count('-' * 80) == 3
    greedy = said(capsys, *argv, '--temperature', '0')
    assert greedy == said(capsys, *argv, '--top_k', '1') == said(capsys, *argv, '--temperature', '0', '--seed', '5')


def test_table_and_plot(trained, capsys):
    out = said(capsys, 'table', trained, '--out', 'table.md')
    assert cells(out) == cells(Path('table.md').read_text()) and 'a' in cells(out)
    assert 'x.png' in said(capsys, 'plot', trained, '--out', 'x.png')
    assert Path('x.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('argv, says', [
    (['loss', 'nowhere'], 'nowhere'), (['sample', 'nowhere'], 'nowhere'), (['table', 'nowhere'], 'nowhere'),
    (['plot', 'nowhere'], 'nowhere'), (['loss', 'empty'], 'no checkpoint'), (['table', 'empty'], 'config.json'),
    (['plot', 'unevaluated'], 'no evaluation'), (['table', 'unevaluated'], 'no evaluation'),
    (['loss', 'cut.pt'], 'cut.pt'), (['sample', 'cut.pt'], 'cut.pt'), (['loss', 'text.pt'], 'text.pt'),
    (['loss', 'tensor.pt'], 'holds no run'), (['loss', 'out/a', '--sets', 'odl'], 'odl'),
    (['loss', 'out/a', '--data_dir', 'elsewhere'], 'elsewhere'), (['table', 'rubbish'], 'rubbish'),
    (['sample', 'out/a', '--top_k', '0'], 'top_k'), (['sample', 'out/a', '--temperature', '-1'], 'temperature'),
    (['plot', 'out/a', '--out', 'nowhere/x.png'], 'nowhere'), (['sample', 'untokenized.pt'], 'tokenizer'),
    (['plot', 'out/a', '--out', 'x.gif8'], 'gif8'), (['loss', 'out/a', '--windows', '-3'], 'windows'),
    (['loss', 'other.pt'], 'other.pt'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_errors_are_one_line(trained, capsys, argv, says):
    Path('empty').mkdir()
    run_folder('unevaluated', [])
    raw = Path(trained, 'ckpt_00000030.pt').read_bytes()
    Path('cut.pt').write_bytes(raw[:len(raw) // 2])
    Path('text.pt').write_text('hello')
    torch.save(torch.zeros(3), 'tensor.pt')
    state = torch.load(f'{trained}/ckpt_00000030.pt', weights_only=True)
    torch.save({**state, 'tokenizer': None}, 'untokenized.pt')
    torch.save({**state, 'weights': {**state['weights'], 'embed_out.weight': torch.zeros(384, 16)}}, 'other.pt')
    shutil.copytree(trained, 'rubbish')
    Path('rubbish/metrics.jsonl').write_text('{"event": "ev')
    capsys.readouterr()
    assert eval.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith('eval.py: ') and says in err and 'Traceback' not in err
    assert all(line.startswith('  ') for line in err.splitlines()[1:])      # commands, or a list of what differs


def test_as_a_program(trained):
    def program(*argv):
        return subprocess.run([sys.executable, str(ROOT / 'eval.py'), *argv], capture_output=True, text=True)
    done = program('table', trained)
    assert done.returncode == 0 and '| a ' in done.stdout
    done = program('loss', 'nowhere')
    assert done.returncode == 2 and done.stderr.startswith('eval.py: nowhere')
