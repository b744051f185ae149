"""eval.py: losses against closed forms and float64, tables against numbers by hand, pictures."""
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics

import data
import eval
import schedules
import train
from configurator import UserError
from model import GPTNeoX, GPTNeoXConfig
from support import pictures, processes

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPE = GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=384,
                      max_position_embeddings=32)


def random_model():
    """Its weights are larger than at the start of training, so the losses of windows differ."""
    seed = random.randrange(10**6)
    print('seed', seed)
    torch.manual_seed(seed)
    model = GPTNeoX(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def val_sets(corpora):
    """{name: (Source, windows)}: 13 windows of 'old' and all of 'new'."""
    found = {}
    for name, n in (('old', 13), ('new', 0)):
        source = data.Source(name, data.find_shards(name, 'val', corpora), 32)
        found[name] = source, data.val_windows(source, n)
    return found


def run_folder(name, evals, roles=None, samples=None, derived=None, **knobs):
    """What a run leaves behind, written by hand. 128 tokens a step.

    evals: [(step, {set: loss}), ...]; roles: {set: what it is to the run}; samples: {source:
    samples of the whole run}. A run is a second stage on `new`, unless knobs and derived differ.
    """
    folder = Path(name)
    folder.mkdir(parents=True)
    defaults = {'out_dir': name, 'train_data': {'new': 1.0}, 'max_steps': 10, 'warmup': 2}
    config = asdict(train.Config(**{**defaults, **knobs}))
    sets = evals[0][1] if evals else []
    shape = {key: knobs.get(key, value) for key, value in asdict(SHAPE).items()}
    roles = roles or {name: {'new': 'new data'}.get(name, 'old data') for name in sets}
    facts = {'start': 'init_from', 'start_step': 0, 'tokens_per_step': 128, 'roles': roles,
             'samples_before': {}, 'shape': shape, 'method': 'train:Method',
             'parent': {'path': 'out/parent', 'step': 20}, 'block_size': 32, 'tokenizer': 7,
             'val_prints': {name: '1 shard' for name in sets}, **(derived or {})}
    (folder / 'config.json').write_text(json.dumps({'run': f'id of {name}', 'config': config,
                                                    'derived': facts, 'commit': 'abc'}))
    rows = [{'event': 'start', 'step': facts['start_step'], 'tokens': 0}]
    for step, losses in evals:
        val = {dataset: {'loss': loss, 'se': 0.01} for dataset, loss in losses.items()}
        rows.append({'event': 'eval', 'step': step, 'tokens': 128 * step, 'val': val})
    rows.append({'event': 'train', 'step': 10, 'tokens': 1280, 'loss': 2.0, 'lr': 1e-3,
                 'samples': samples or {'new': 40}})
    lines = [json.dumps({'run': f'id of {name}', **row}) + '\n' for row in rows]
    (folder / 'metrics.jsonl').write_text(''.join(lines))
    return name


def edit(folder, **derived):
    """Change what a run folder says of its run."""
    path = Path(folder, 'config.json')
    about = json.loads(path.read_text())
    about['derived'] |= derived
    path.write_text(json.dumps(about))


FIRST = {'start': 'scratch', 'parent': {}}
FIRST_ROLES = {'new': 'never trained on', 'old': 'training data'}


def cells(table):
    """{run: {column: cell}} of the Markdown table at the beginning of a text."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')]
             for line in table.splitlines() if line.startswith('|')]
    assert set(''.join(lines[1])) <= {'-'} and len({len(line) for line in lines}) == 1
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


# ------------------------------------------------------------------------------
# Loss

def test_a_model_that_knows_nothing_is_at_chance(val_sets):
    model = random_model()
    torch.nn.init.zeros_(model.embed_out.weight)
    for row in eval.evaluate(model, val_sets, 4, nullcontext()).values():
        assert row['loss'] == pytest.approx(math.log(384), rel=1e-6)
        assert row['ppl'] == pytest.approx(384, rel=1e-5)
        assert row['se'] == pytest.approx(0, abs=1e-6)


def test_losses_equal_float64_by_hand(val_sets, corpora):
    model = random_model()
    found = eval.evaluate(model, val_sets, 5, nullcontext())
    model.double()
    for name, (_, windows) in val_sets.items():
        ids = np.fromfile(corpora / name / 'val_00000.bin', '<u2')[512:].astype(np.int64)
        losses = []
        for w in windows:
            window = torch.from_numpy(ids[32 * w:32 * w + 33])
            logits = model(window[None, :-1])[0][0].detach().numpy()
            logits -= logits.max(1, keepdims=True)
            right = logits[np.arange(32), window[1:]]
            losses.append(np.mean(np.log(np.exp(logits).sum(1)) - right))
        row = found[name]
        assert row['loss'] == pytest.approx(statistics.mean(losses), rel=1e-5)
        se = statistics.stdev(losses) / math.sqrt(len(losses))
        assert row['se'] == pytest.approx(se, rel=1e-3)
        assert row['ppl'] == pytest.approx(math.exp(row['loss']))
        n_bytes = (ids < 256).sum()                     # end-of-text is a token, but no byte
        assert n_bytes < len(ids)
        assert row['bpb'] == pytest.approx(row['loss'] / math.log(2) * len(ids) / n_bytes)


@pytest.mark.parametrize('batch', [1, 2, 13, 1000])
def test_any_batch_size_gives_the_same_losses(val_sets, batch):
    model = random_model()
    expected = eval.evaluate(model, val_sets, 3, nullcontext())
    for name, row in eval.evaluate(model, val_sets, batch, nullcontext()).items():
        assert row == pytest.approx(expected[name], rel=1e-5)


def test_ranks_share_the_windows_and_make_equally_many_passes(val_sets, monkeypatch):
    # test_train.py tests the exchange itself with two processes
    model, sums, passes = random_model(), [], []
    expected = eval.evaluate(model, val_sets, 2, nullcontext())
    monkeypatch.setattr(processes, 'add_up', lambda values: (sums.append(values), values)[1])
    monkeypatch.setattr(processes, 'world_size', lambda: 3)
    model.register_forward_hook(lambda *_: passes.append(rank))
    for rank in range(3):
        monkeypatch.setattr(processes, 'rank', lambda rank=rank: rank)
        eval.evaluate(model, val_sets, 2, nullcontext())
    for i, (name, row) in enumerate(expected.items()):
        n, total, _ = np.sum(sums[i::2], axis=0)
        assert n == len(val_sets[name][1])
        assert total / n == pytest.approx(row['loss'], rel=1e-6)
    assert passes.count(0) == passes.count(1) == passes.count(2)


def test_one_window_no_bytes_and_losses_that_are_not_finite(val_sets, tmp_path):
    model, (source, windows) = random_model(), val_sets['old']
    assert eval.evaluate(model, {'x': (source, windows[:1])}, 3, nullcontext())['x']['se'] is None
    (np.arange(400) % 90 + 30).astype('<u2').tofile(tmp_path / 'val.bin')
    source = data.Source('x', [tmp_path / 'val.bin'], 32)
    assert eval.evaluate(model, {'x': (source, [0, 1])}, 3, nullcontext())['x']['bpb'] is None
    torch.nn.init.constant_(model.embed_out.weight, math.nan)
    row = eval.evaluate(model, {'x': (source, [0, 1])}, 3, nullcontext())['x']
    assert all(math.isnan(row[key]) for key in ('loss', 'se', 'ppl'))


# ------------------------------------------------------------------------------
# Runs and tables

@pytest.fixture
def runs(tmp_path, monkeypatch):
    """In an empty working directory: a stage in two seeds, one with replay, and a first stage."""
    monkeypatch.chdir(tmp_path)
    start, middle = {'new': 3.0, 'old': 1.0}, {'new': 2.5, 'old': 1.75}
    return [run_folder('out/a_seed1', [(0, start), (5, middle), (10, {'new': 2.0, 'old': 1.5})]),
            run_folder('out/a_seed2', [(0, start), (5, middle), (10, {'new': 2.2, 'old': 1.25})],
                       seed=2),
            run_folder('out/b', [(0, start), (10, {'new': 2.25, 'old': 1.125})], replay=0.05,
                       replay_data={'old': 1.0}, label='5% replay', samples={'new': 38, 'old': 2}),
            run_folder('out/first', [(0, {'new': 6.0, 'old': 6.0}), (10, start)], FIRST_ROLES,
                       derived=FIRST, train_data={'old': 1.0}, samples={'old': 40})]


def test_the_table_by_hand(runs):
    table = cells(eval.table(eval.by_seed(runs)))
    assert list(table) == ['a', '5% replay', 'first']
    found = [list(row.values())[1:] for row in table.values()]
    assert found[1] == ['1', '2.250', '1.125', '1.688', '0.125', '0.125', '0.750']
    assert found[2] == ['1', '3.000', '1.000', '2.000', '–', '–', '–']
    assert table['a'] == {
        'run': 'a', 'seeds': '2', 'new': '2.100 ± 0.141', 'old': '1.375 ± 0.177',
        'average': '1.738 ± 0.018', 'forgetting': '0.375 ± 0.177', 'its peak': '0.750 ± 0.000',
        'adaptation': '0.900 ± 0.141'}


def test_a_run_alone_keeps_its_seed(runs, monkeypatch, capsys):
    assert list(eval.by_seed(runs[:1])) == ['a_seed1']
    monkeypatch.setattr(eval, 'plot', lambda *args: None)
    eval.report(runs[0])
    assert '| a_seed1 ' in capsys.readouterr().out


def test_every_old_set_has_its_columns_and_differences_are_named(runs):
    two = run_folder('two', [(0, {'p': 1.0, 'q': 2.0, 'new': 3.0}),
                             (10, {'p': 2.0, 'q': 2.5, 'new': 1.0})], eval_windows=0)
    text = eval.table(eval.by_seed([two, runs[0]]))
    row = cells(text)['two']
    assert [row['forgetting of p'], row['forgetting of q'], row['old']] == ['1.000', '0.500', '–']
    assert row['its peak of p'] == '1.000' and row['average'] == f'{(2.0 + 2.5 + 1.0) / 3:.3f}'
    assert 'different sets: new, p, q (two); new, old (a_seed1)' in text
    assert 'different numbers of windows: all (two); 200 (a_seed1)' in text
    assert 'NOTE' not in eval.table(eval.by_seed(runs))


def test_roles_are_read_and_shares_are_of_this_stage(runs):
    """docs/1of3 teaches docs, and docs_old does not. What came before a branch is not counted."""
    roles = {'docs': 'old data', 'maths': 'the same data again', 'code': 'new data',
             'x': 'never trained on'}
    run = eval.Run(run_folder('parts', [(0, dict.fromkeys(roles, 3.0)),
                                        (10, dict.fromkeys(roles, 2.0))], roles,
                              samples={'docs/2of3': 50, 'docs_old': 30, 'code': 60},
                              derived={'samples_before': {'docs/2of3': 30, 'docs_old': 30}}))
    assert run.old == ['docs'] and run.new == ['maths', 'code'] and run.roles == roles
    assert run.share('docs') == 0.25 and run.share('code') == 0.75 and run.share('x') == 0
    assert '(25% replay)' in pictures.panel_title({'parts': [run]}, 'docs')


def test_rows_of_another_run_are_not_read(runs):
    path = Path(runs[0], 'metrics.jsonl')
    foreign = {'event': 'eval', 'run': 'another', 'step': 0, 'tokens': 0,
               'val': {'new': {'loss': 9.0}, 'old': {'loss': 9.0}}}
    path.write_text(json.dumps(foreign) + '\n' + path.read_text())
    assert eval.Run(runs[0]).losses('old') == [1.0, 1.75, 1.5]


def test_without_the_losses_at_the_start_nothing_is_said_of_forgetting(runs):
    path = Path(runs[2], 'metrics.jsonl')
    kept = [line for line in path.read_text().splitlines(True)
            if '"step": 0, "tokens": 0, "val' not in line]
    path.write_text(''.join(kept))
    text = eval.table(eval.by_seed(runs[2:3]))
    row = cells(text)['5% replay']
    assert row['forgetting'] == row['its peak'] == row['adaptation'] == '–'
    assert 'NOTE: the losses at the start are missing' in text and 'b' in text


def test_runs_of_one_row_differ_in_nothing_but_the_seed(runs, capsys):
    losses = [(0, {'new': 3.0, 'old': 1.0}), (10, {'new': 2.0, 'old': 1.5})]
    others = [run_folder('out/a_seed3', losses, seed=3, learning_rate=1e-3),
              run_folder('out/a_seed4', losses, seed=2), run_folder('x/a_seed1', losses, seed=5)]
    groups = eval.by_seed([*runs[:2], *others])
    assert {name: len(seeds) for name, seeds in groups.items()} == {
        'a': 3, 'out/a_seed3': 1, 'out/a_seed4': 1}
    said = capsys.readouterr().err
    assert 'out/a_seed3 is a row of its own: it differs from out/a_seed1 in learning_rate' in said
    assert 'out/a_seed4 is a row of its own: it has the seed of out/a_seed2, 2' in said
    with pytest.raises(UserError, match='out/../out/b is given twice'):
        eval.by_seed([runs[2], 'out/../out/b'])
    # each run of a row has an old model of its own
    paths = [run_folder(f'out/c_seed{n}', losses, seed=n, init_from=f'out/up_seed{n}')
             for n in (1, 2)]
    assert list(eval.by_seed(paths)) == ['c']


@pytest.mark.parametrize('what, derived', [
    ('windows, in tokens: 32 (a_seed1); 64 (b)', {'block_size': 64}),
    ('tokenizers: 7 (a_seed1); 8 (b)', {'tokenizer': 8}),
    ('data of old: 1 shard (a_seed1); 2 shards (b)', {'val_prints': {'old': '2 shards'}})])
def test_a_comparison_says_what_differs(runs, what, derived):
    edit(runs[2], **derived)
    assert f'NOTE: evaluated on different {what}' in eval.table(eval.by_seed([runs[0], runs[2]]))


def test_what_is_no_run_is_skipped_with_a_line(runs, capsys):
    run_folder('out/c', [(0, {'old': 1.0}), (5, {'old': 2.0})])             # still running
    run_folder('out/failed', [])
    Path('out/b.log').write_text('said')
    Path('out/exported').mkdir()
    Path('out/exported/config.json').write_text('{"model_type": "gpt_neox"}')
    shutil.copytree('out/b', 'out/older')
    config = json.loads(Path('out/b/config.json').read_text())
    del config['derived']['roles']
    Path('out/older/config.json').write_text(json.dumps(config))
    with open('out/b/metrics.jsonl', 'a') as file:
        for row in ('[]', '{"event": "eval", "step": 11}', '{"event": "eval", "step": 11, '
                    '"tokens": 3, "val": {"old": {"loss": "x"}}}', '{"event": ["eval"]}'):
            file.write(f'{row}\n')                                          # by another program
        file.write('{"event": "ev')                                         # cut by a kill
    strange = {'switches': 5, 'train_data': {'old': 'x'}, 'label': 5, 'seed': None}
    for knob, value in strange.items():
        config = json.loads(Path('out/c/config.json').read_text())
        config['config'][knob] = value
        run_folder(f'out/strange_{knob}', [(0, {'old': 1.0})])
        Path(f'out/strange_{knob}/config.json').write_text(json.dumps(config))
    assert eval.main(['table', *map(str, sorted(Path('out').iterdir()))]) is None
    out, err = capsys.readouterr()
    assert list(cells(out)) == ['a', '5% replay', 'c', 'first']
    assert sorted(err.splitlines()) == [
        'out/c is not finished: step 5 of 10',
        'skipped: out/b.log is not a run folder of this version',
        'skipped: out/exported is not a run folder of this version',
        'skipped: out/failed has not been evaluated yet',
        'skipped: out/older is not a run folder of this version',
        'skipped: out/strange_label is not a run folder of this version',
        'skipped: out/strange_seed is not a run folder of this version',
        'skipped: out/strange_switches is not a run folder of this version',
        'skipped: out/strange_train_data is not a run folder of this version']


def test_evaluations_that_were_not_finite(runs):
    nan = run_folder('a_seed3', [(0, {'new': 3.0, 'old': 1.0}), (5, {'new': None, 'old': 9.0}),
                                 (10, {'new': 2.0, 'old': None})], seed=3)
    groups = eval.by_seed([*runs, nan])
    row = cells(eval.table(groups))['a']
    assert row['old'] == row['forgetting'] == 'nan ± nan' and '2.067' in row['new']
    assert eval.summary(groups)[2]['losses'] == {'new': [3.0, None, 2.0], 'old': [1.0, 9.0, None]}
    eval.plot(groups, 'x.png')
    eval.plot(eval.by_seed([nan]), 'y.png')


def test_the_table_of_a_real_run(config, monkeypatch):
    monkeypatch.setattr(eval, 'plot', lambda *args: None)
    config('up')
    assert train.main([config('b', init_from='up.py', train_data={'new': 1.0}, replay=0.1,
                              replay_data={'old': 1.0})]) == 0
    first, last = (metrics('out/b', 'eval')[i]['val'] for i in (0, -1))
    row = cells(eval.table(eval.by_seed(['out/b'])))['b']
    assert row['forgetting'] == f'{last["old"]["loss"] - first["old"]["loss"]:.3f}'
    assert row['adaptation'] == f'{first["new"]["loss"] - last["new"]["loss"]:.3f}'
    assert float(row['adaptation']) > 0.5
    assert eval.Run('out/b').share('old') == pytest.approx(0.1, abs=0.5 / 80)


# ------------------------------------------------------------------------------
# Pictures

@pytest.fixture
def drawn(figures):
    """drawn(groups, ...) -> the figure that eval.plot writes to x.png."""
    def draw(folders, **options):
        eval.plot(eval.by_seed(folders), 'x.png', **options)
        assert Path('x.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
        return figures.pop()
    return draw


def texts_of(figure):
    import matplotlib.text
    return [t for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]


def test_what_a_picture_shows(runs, drawn):
    # the first row is from random weights, and yet the old data come first
    figure = drawn([runs[3], *runs[:3]], labels=['from scratch', 'no replay', 'five percent'])
    old, old_rate, new, new_rate = figure.axes
    assert [old.get_title(), new.get_title()] == ['Old data: old', 'New data: new']
    curve = old.lines[1]                                        # of a: the mean over its seeds
    np.testing.assert_allclose(curve.get_xdata(), [0, 0.64, 1.28])      # thousands of tokens
    np.testing.assert_allclose(curve.get_ydata(), [1.0, 1.75, 1.375])
    dotted = [line for line in old.lines if line.get_linestyle() == ':' and len(line.get_xdata())]
    assert any(set(line.get_ydata()) == {1.0} for line in dotted)
    styles = {(line.get_color(), str(line.get_linestyle())) for line in old_rate.lines}
    assert len(styles) == len(new_rate.lines) == 3
    shown = [text.get_text() for text in texts_of(figure)]
    assert {'from scratch', 'no replay', 'five percent', 'training tokens (thousands)',
            'learning rate', 'validation loss (nats per token)'} <= set(shown)
    assert any('Dotted' in text and 'Shaded' in text for text in shown)
    assert not any('a_seed' in text or 'out/' in text for text in shown)
    shown = [text.get_text() for text in texts_of(drawn(runs))]
    assert {'a', '5% replay', 'first'} <= set(shown)            # the knob label, else the name


def test_a_single_run_says_how_its_losses_changed(runs, drawn):
    old, _, new, _ = drawn([runs[2]]).axes
    assert old.get_title() == 'Old data: old (5% replay)\n+0.125 nats since the start (peak +0.125)'
    assert new.get_title() == 'New data: new\n-0.750 nats since the start'
    assert drawn([runs[3]]).axes[2].get_title() == 'Never trained on: new'


def test_the_rate_panel_is_the_schedule_of_what_was_trained(runs, drawn):
    """With a warmup of one step, in a run that was resumed, and in a branch."""
    evals = [(0, {'old': 1.0}), (5, {'old': 2.0}), (9, {'old': 3.0})]
    resumed = run_folder('resumed', evals, schedule='wsd', warmup=1, decay=0.2, max_steps=20)
    branch = run_folder('branch', [(6, {'old': 2.0}), (20, {'old': 3.0})],
                        {'old': 'training data'}, max_steps=20, train_data={'old': 1.0},
                        branch_from='out/a', derived={'start': 'branch_from', 'start_step': 6})
    for folder, first, last in ((resumed, 0, 9), (branch, 6, 20)):
        line = drawn([folder]).axes[1].lines[0]
        knobs = eval.Run(folder).config
        lr = schedules.of(train.Config(**knobs))
        np.testing.assert_allclose(line.get_xdata(), np.arange(first, last + 1) * 0.128)
        np.testing.assert_allclose(line.get_ydata(), [lr(s) for s in range(first, last + 1)])
    figure = drawn([branch])                                    # of the same data: no new stage
    assert figure.axes[0].get_title() == 'Training data: old'
    assert not any('Dotted' in text.get_text() for text in texts_of(figure))


@pytest.mark.parametrize('steps', [1, 10, 7_654, 7_654_321, 10**8])
def test_nothing_is_cut_and_no_labels_collide(tmp_path, monkeypatch, drawn, steps):
    monkeypatch.chdir(tmp_path)
    sets = ['maths', 'maths/matplotlib', 'maths/networkx', 'docs', 'code'][:random.randint(1, 5)]
    curve = [(steps * i // 4, {name: random.uniform(1, 3) for name in sets}) for i in range(5)]
    roles = {name: 'old data' if name == 'docs' else 'new data' for name in sets}
    names = [run_folder(f'run{i}', curve, roles, train_data={'maths': 1.0},
                        max_steps=min(steps, 10**4)) for i in range(9)]
    rates = np.arange(2) * 128 * steps, [1e-3, 1e-4]
    monkeypatch.setattr(pictures, 'rates_of', lambda run: rates)
    figure = drawn(names, labels=['a label of many words, which no line can hold'] * 9)
    figure.draw_without_rendering()
    whole, drawn_on = figure.bbox_inches.padded(0.01), figure.get_tightbbox()
    assert whole.count_contains(drawn_on.corners()) == 4
    for ax in figure.axes[1::2]:                                # of the rates, below
        low, high = ax.get_xlim()
        labels = [label for x, label in zip(ax.get_xticks(), ax.get_xticklabels())
                  if low <= x <= high]
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) > 1 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))


def test_pictures_and_tables_are_never_written_through_a_link(runs):
    Path('precious').write_text('precious')
    for name in ('x.png', 'x.md', 'x.json'):
        Path(name).symlink_to('precious')
    assert eval.main(['plot', runs[0], '--out', 'x.png']) is None
    assert eval.main(['table', runs[0], '--out', 'x.md']) is None
    assert Path('precious').read_text() == 'precious'
    assert not any(Path(name).is_symlink() for name in ('x.png', 'x.md', 'x.json'))
    assert list(cells(Path('x.md').read_text())) == ['a_seed1']
    (row,) = json.loads(Path('x.json').read_text())
    assert (row['run'], row['seed'], row['commit'], row['tokens']) == ('a_seed1', 1337, 'abc', 1280)
    assert row['steps'] == [0, 5, 10] and row['losses']['old'] == [1.0, 1.75, 1.5]


# ------------------------------------------------------------------------------
# The command line

@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """A finished run, copied to out/a of an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, 'out/a')
    return 'out/a'


def printed(capsys, *argv):
    capsys.readouterr()
    assert not eval.main(list(argv))
    return capsys.readouterr().out


def test_the_loss_of_a_run_a_checkpoint_and_an_exported_model(trained, capsys, corpora):
    row = metrics(trained, 'eval')[-1]['val']
    printed(capsys, 'export', trained, 'hf')
    exported = ['hf', '--sets', 'old', 'new', '--data_dir', str(corpora)]
    for run in ([trained], [f'{trained}/ckpt_00000030.pt'], exported):
        out = printed(capsys, 'loss', *run, '--device', 'cpu')
        for name in ('old', 'new'):
            assert f'{row[name]["loss"]:.4f} ±' in out
            assert f'{row[name]["bpb"]:.4f} bits per byte' in out
    assert 'step 25' in printed(capsys, 'loss', f'{trained}/ckpt_00000025.pt')
    only = printed(capsys, 'loss', trained, '--sets', 'new', '--windows', '3')
    assert 'old' not in only and '3 windows' in only


def test_samples_are_reproducible_and_follow_their_knobs(trained, capsys):
    argv = ['sample', trained, '--prompt', 'abc', '--tokens', '60', '--device', 'cpu']
    out = printed(capsys, *argv)
    assert out == printed(capsys, *argv) and out.startswith('abc') and len(out) > 60
    assert out != printed(capsys, *argv, '--seed', '2')
    assert printed(capsys, *argv, '--samples', '3').count('-' * 80) == 3
    greedy = printed(capsys, *argv, '--temperature', '0')
    assert greedy == printed(capsys, *argv, '--top_k', '1')
    assert greedy == printed(capsys, *argv, '--temperature', '0', '--seed', '5')
    printed(capsys, 'export', trained, 'hf')
    assert out == printed(capsys, 'sample', 'hf', *argv[2:])


@pytest.mark.parametrize('argv, words', [
    ('loss nowhere', 'nowhere'), ('sample nowhere', 'nowhere'), ('table nowhere', 'nowhere'),
    ('plot nowhere', 'nowhere'), ('loss empty', 'no checkpoint'), ('table empty', 'is a run'),
    ('loss cut.pt', 'truncated or damaged'), ('sample cut.pt', 'truncated or damaged'),
    ('loss flipped.pt', 'checksum'), ('loss text.pt', 'damaged'), ('loss code.pt', 'refused'),
    ('loss tensor.pt', 'not a checkpoint'), ('loss part.pt', 'not a checkpoint of this version'),
    ('loss other.pt', 'other.pt'), ('loss out/a --sets odl', "'odl'"),
    ('loss out/a --data_dir elsewhere', 'elsewhere'), ('loss out/a --windows -3', '--windows -3'),
    ('loss unnamed.pt', '--sets'), ('sample out/a --top_k 0', 'top_k'),
    ('sample out/a --temperature -1', 'temperature'),
    ('sample out/a --temperature 1e-320', 'temperature'), ('sample untokenized.pt', '--tokenizer'),
    ('plot out/a --out x.gif', '--out x.gif'), ('plot out/a --out folder.png', 'folder.png'),
    ('plot out/a --labels one two', '2 labels for 1 rows'), ('plot nothing', 'val_data was empty'),
    ('table out/a --out out/a/config.md', 'config.md'), ('table out/a --out x.txt', 'x.md')])
def test_bad_input_gives_one_message(trained, capsys, argv, words):
    Path('empty').mkdir()
    Path('folder.png').mkdir()
    run_folder('nothing', [(0, {}), (10, {})])
    raw = Path(trained, 'ckpt_00000030.pt').read_bytes()
    middle = len(raw) // 2
    Path('cut.pt').write_bytes(raw[:middle])
    flipped = bytes([raw[middle] ^ 1])
    Path('flipped.pt').write_bytes(raw[:middle] + flipped + raw[middle + 1:])
    Path('text.pt').write_text('hello')
    torch.save(torch.zeros(3), 'tensor.pt')
    torch.save({'model': Path('x')}, 'code.pt')
    state = torch.load(f'{trained}/ckpt_00000030.pt', weights_only=True)
    torch.save({key: state[key] for key in state if key != 'progress'}, 'part.pt')
    torch.save({**state, 'history': {**state['history'], 'tokenizer': None}}, 'untokenized.pt')
    torch.save({**state, 'config': {**state['config'], 'val_data': []}}, 'unnamed.pt')
    weights = {**state['model']['weights'], 'embed_out.weight': torch.zeros(384, 16)}
    torch.save({**state, 'model': {**state['model'], 'weights': weights}}, 'other.pt')
    config = Path(trained, 'config.json').read_bytes()
    capsys.readouterr()
    assert eval.main(argv.split()) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('skipped')]
    assert err[0].startswith('eval.py: ') and words in ' '.join(err)
    assert all(line[:1].isspace() for line in err[1:])                  # a list of what differs
    assert Path(trained, 'config.json').read_bytes() == config


def test_a_device_that_is_not_there(trained, capsys):
    for name in ('foo', 'mps' if torch.cuda.is_available() else 'cuda'):
        with pytest.raises(SystemExit):
            eval.main(['loss', trained, '--device', name])
        assert f"invalid choice: '{name}'" in capsys.readouterr().err


def test_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'eval.py'), 'loss', 'nowhere'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('eval.py: nowhere')
