"""The papers' experiments: every number that a true-scale config implies against the paper's, and two steps of each.

The configs are worked out by the program itself: configurator, schedules, train.resolve_phases, data.Mixture.
"""
import ast
import functools
import os
import re
import shlex
import signal
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_documents, metrics, saved

import configurator
import data
import schedules
import train
from model import GPTNeoX

pytestmark = pytest.mark.usefixtures('one_thread')

Plan = namedtuple('Plan', 'cfg origin lr phases mixture step_tokens')


@functools.cache
def plan(command):
    """What `train.py command` is going to do, with no more of the data than their names. Errors are train.py's."""
    values, origin = configurator.load(train.__file__, words := shlex.split(command))
    cfg = train.Config(**values)
    train.check(cfg, origin, 1)
    lr = schedules.build(cfg.schedule, steps=cfg.max_steps, peak=cfg.learning_rate, **values)
    if cfg.branch_from:                                         # of the main line, which is the config as it stands
        first_step, parent = int(re.search(r'ckpt_(\d{8})\.pt$', cfg.branch_from)[1]), plan(words[0])
        assert first_step in parent.cfg.milestones and cfg.branch_from.startswith(parent.cfg.out_dir)
        phases = train.resolve_phases(cfg, lr, first_step, {'phases': parent.phases})
    else:
        phases = train.resolve_phases(cfg, lr, 0, None)
    sources = {name: SimpleNamespace(block_size=cfg.block_size) for _, weights in phases for name in weights}
    return Plan(cfg, origin, lr, phases, data.Mixture(sources, phases), train.rows_per_step(cfg) * cfg.block_size)


CONFIGS = sorted(file.stem for file in (ROOT / 'config').glob('*.py'))
TRUE_SCALE = [name for name in CONFIGS if plan(f'config/{name}.py').cfg.block_size >= 2048]


def docstring(name):
    return ast.get_docstring(ast.parse((ROOT / f'config/{name}.py').read_text()))


# -----------------------------------------------------------------------------
# Every config

@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_says_what_it_is_and_how_to_run_it(name):
    opening, *rest = docstring(name).split('\n\n')
    assert re.fullmatch(r'[A-Z].*\.', opening.replace('\n', ' '))
    [command] = re.findall(rf'^    torchrun (.*)train\.py config/{name}\.py$', '\n\n'.join(rest), re.MULTILINE)
    processes = re.search(r'--nproc_per_node=(\d+)', command)
    this = plan(f'config/{name}.py')
    train.check(this.cfg, this.origin, int(processes[1]) if processes else 1)
    assert (processes is not None) == (name in TRUE_SCALE and not name.endswith('_1gpu'))
    assert this.cfg.out_dir == f'out/{name}'


OPTIONS = [f'config/{name}.py ' + re.split(r'  +', line.strip())[0]
           for name in CONFIGS for line in re.findall(r'^    (--.*)$', docstring(name), re.MULTILINE)]


@pytest.mark.parametrize('command', OPTIONS)
def test_the_options_in_docstrings_work(command):
    this, before = plan(command), plan(command.split()[0])
    for word in shlex.split(command)[1:]:
        key = word.removeprefix('--').partition('=')[0]
        assert this.origin[key] == f'--{key}' and getattr(this.cfg, key) != getattr(before.cfg, key), word


def test_there_are_options_in_docstrings():
    assert len(OPTIONS) > 25 and any('branch_from' in command for command in OPTIONS)


# -----------------------------------------------------------------------------
# Derived values against the papers

def total(this):
    """Billions of tokens."""
    return this.cfg.max_steps * this.step_tokens / 1e9


def tokens(this, first=0, last=None):
    """{source: billions of tokens} of steps first .. last - 1."""
    rows = train.rows_per_step(this.cfg)
    before, after = (this.mixture.counts(step * rows) for step in (first, last or this.cfg.max_steps))
    return {name: (after[name] - before[name]) * this.cfg.block_size / 1e9 for name in after}


def percent(this, first=0, last=None):
    """{source: percent of the tokens} of steps first .. last - 1."""
    found = tokens(this, first, last)
    return {name: 100 * n / sum(found.values()) for name, n in found.items()}


def ends(this):
    """The step after the last of each phase of the schedule."""
    return [row.end for row in this.lr.phases]


def lasts(this):
    """The rate at the end of each phase."""
    return [row.last for row in this.lr.phases]


def parameters(this):
    with torch.device('meta'):
        return GPTNeoX(train.model_config(this.cfg, this.origin, None, 50304)).num_params()


def qa(this):
    """Billions of tokens of QA data."""
    return sum(n for name, n in tokens(this).items() if name.startswith('qa_'))


def late(this):
    """Billions of tokens from the last switch on."""
    return total(this) - this.phases[-1][0] * this.cfg.block_size / 1e9


PILE, PYTHIA, SLIM, GERMAN = (f'config/{name}.py' for name in
                              ('pretrain_pile', 'rewarm_pythia_slim', 'rewarm_pile_slim', 'rewarm_pile_german'))
UNION, SCRATCH, DOMAINS, SPLITS = (f'config/{name}.py' for name in
                                   ('union_pile_slim', 'scratch_slim', 'domains_slim', 'rewarm_splits'))
INFINITE, REUSE, TEN_B = (f'config/{name}.py' for name in ('infinite_slim', 'reuse_general_qa', 'pretrain_pile_10b'))
UNION_GERMAN, BRANCH_1, BRANCH_2 = (next(c for c in OPTIONS if word in c) for word in
                                    ('out/union_pile_german', 'ckpt_00037595', 'ckpt_00081824'))
COSINE_INF = f'{SCRATCH} --schedule=infinite_cosine --constant_lr=1.65e-4'
NEVER, THROUGHOUT = f'{REUSE} --switches="[]"', f'{REUSE} --switches="[]" --replay=0.1'


def switched(at):
    return f'{REUSE} --switches="[{{\'lr\': {at}, \'replay\': 0.1}}]"'


# command, quantity, value, how far off it may be (default: nothing but rounding of floats); billions of tokens
FACTS = [
    # Gupta et al. 2023
    (PYTHIA, lambda p: p.step_tokens, 2_260_992, 0),                        # 1104 x 2048, the iterations' tokens
    (PYTHIA, total, 296.86, 0.005),                                         # Table 1, the sum
    (PYTHIA, percent, {'slim_stackexchange': 2, 'slim_arxiv': 2.5, 'slim_wikipedia': 4.5, 'slim_book': 4.5,
                       'slim_github': 4.5, 'slim_c4': 15, 'slim_commoncrawl': 67}, 1e-4),     # Table 1, Sampling %
    (PYTHIA, lambda p: p.lr.phases[-1].start * p.step_tokens / 1e9, 239.5, 0.5),    # section 3: 10% of MaxLR at 240B
    (PYTHIA, lasts, [3e-4, 3e-5, 3e-5], 0),                                 # section 3: warmup, cosine, then constant
    (PYTHIA, lambda p: p.lr.phases[0].end / p.cfg.max_steps, 0.01, 1e-5),   # section 3: 1%
    (PYTHIA, lambda p: [step * p.step_tokens / 1e9 for step in p.cfg.milestones], [50, 240], 0.002),   # Figs. 1, 2
    # Ibrahim et al. 2024: lengths
    (PILE, lambda p: p.step_tokens, 2_260_992, 0),                          # 1104 x 2048
    (PILE, total, 299.28, 0.005),                                           # 132,366 iterations
    (SLIM, total, 299.27, 0.01),                                            # the sample of SlimPajama
    (GERMAN, total, 200, 0.002),                                            # "200B"
    (UNION, total, 598.6, 0.05),                                            # 264,732 iterations
    (UNION, tokens, {'pile': 299.28, 'slimpajama': 299.28}, 0.005),         # half and half
    (UNION_GERMAN, total, 500, 1),                                          # "500B"
    (UNION_GERMAN, tokens, {'pile': 299.28, 'german': 200}, 0.005),         # as many of each as the two runs
    (TEN_B, total, 299.28, 0.005),                                          # section 6.4
    # eqs. 1-2 and Table 14
    (SLIM, ends, [1324, 132_366], 0),                                       # 1% of the iterations
    (SLIM, lasts, [3e-4, 3e-5], 0),
    (TEN_B, lasts, [1.2e-4, 1.2e-5], 0),
    # replay, Table 2: tokens of the Pile and of the new data
    (SLIM, tokens, {'pile': 15, 'slimpajama': 285}, 0.75),                  # 5% of "300B"
    (SLIM, percent, {'pile': 5, 'slimpajama': 95}, 1e-4),
    (f'{SLIM} --replay=0.005', tokens, {'pile': 1.5, 'slimpajama': 298.5}, 0.75),
    (f'{SLIM} --replay=0.5', tokens, {'pile': 150, 'slimpajama': 150}, 0.75),
    (GERMAN, tokens, {'pile': 50, 'german': 150}, 0.002),                   # 25% of 200B
    (f'{GERMAN} --replay=0.5', tokens, {'pile': 100, 'german': 100}, 0.002),
    # infinite schedules, section 7: 1%, 60%, 85% of one dataset of 300B (Fig. 9) and of a split of 100B (Fig. 10)
    (COSINE_INF, ends, [1324, 79_420, 112_511, 132_366], 0),
    (COSINE_INF, lasts, [3e-4, 1.65e-4, 1.65e-4, 3e-5], 0),
    (f'{SCRATCH} --schedule=infinite_inv_sqrt --constant_lr=1.65e-4', lasts, [3e-4, 1.65e-4, 1.65e-4, 3e-5], 0),
    (INFINITE, ends, [442, 26_537, 132_687], 0),                            # no anneal on the main line
    (BRANCH_1, ends, [442, 26_537, 37_595, 44_229], 0),
    (BRANCH_1, tokens, {'slimpajama_1': 100}, 0.002),
    (BRANCH_2, lambda p: [p.lr(88_457), p.lr(81_823)], [3e-5, 1.65e-4], 0),
    (BRANCH_2, tokens, {'slimpajama_1': 100, 'slimpajama_2': 100}, 0.002),
    (INFINITE, tokens, {'slimpajama_1': 100, 'slimpajama_2': 100, 'slimpajama_3': 100}, 0.002),
    (INFINITE, lambda p: p.cfg.constant_lr, (3e-4 + 3e-5) / 2, 1e-12),      # eta_const, midway
    (INFINITE, lambda p: [p.lr(step) for step in (44_228, 44_229, 88_458)], [1.65e-4] * 3, 0),      # no re-warming
    (f'{INFINITE} --schedule=repeated_cosine', ends, [442, 44_229, 44_671, 88_458, 88_900, 132_687], 0),
    (f'{INFINITE} --schedule=repeated_cosine', lasts, [3e-4, 3e-5] * 3, 0),
    # domains one by one: Table 1 (tokens, weight), A.1 (132,363 iterations in all)
    (DOMAINS, lambda p: p.cfg.max_steps, 132_363, 0),
    (DOMAINS, tokens, {'slim_commoncrawl': 155.89, 'slim_c4': 79.87, 'slim_github': 15.63, 'slim_arxiv': 13.25,
                       'slim_book': 12.58, 'slim_wikipedia': 11.96, 'slim_stackexchange': 10.09}, 0.006),
    (DOMAINS, percent, {'slim_commoncrawl': 52.088, 'slim_c4': 26.688, 'slim_github': 5.224, 'slim_arxiv': 4.428,
                        'slim_book': 4.203, 'slim_wikipedia': 3.997, 'slim_stackexchange': 3.371}, 0.001),
    # replay in stages, the authors' settings: 5% among all that came before
    (SPLITS, lambda p: percent(p, 0, 44_229),
     {'pile': 5, 'slimpajama_1': 95, 'slimpajama_2': 0, 'slimpajama_3': 0}, 0.001),
    (SPLITS, lambda p: percent(p, 44_229, 88_458),
     {'pile': 3.81, 'slimpajama_1': 1.19, 'slimpajama_2': 95, 'slimpajama_3': 0}, 0.001),
    (SPLITS, lambda p: percent(p, 88_458),
     {'pile': 3.09, 'slimpajama_1': 0.96, 'slimpajama_2': 0.95, 'slimpajama_3': 95}, 0.001),
    (SPLITS, ends, [442, 44_229, 44_671, 88_458, 88_900, 132_687], 0),
    # models
    (PILE, parameters, 405_334_016, 0),                                     # both papers; Pythia-410M
    (TEN_B, parameters, 9_642_249_216, 0),                                  # Ibrahim et al., section 6.4
    # Parmar et al. 2024
    ('config/pretrain_general.py', total, 8000, 0.005),                     # section 3: 8T tokens
    ('config/pretrain_general.py', lambda p: ends(p)[0] * p.step_tokens / 1e9, 16, 0.005),      # 16B of warmup
    ('config/pretrain_general.py', lasts, [4.5e-4, 4.5e-5], 0),
    ('config/pretrain_general.py', lambda p: percent(p)['code'], 15, 0.05),         # Fig. 1, bars sum to 100.2
    ('config/pretrain_general.py', lambda p: percent(p)['multilingual'], 15, 0.05),
    (REUSE, lambda p: p.cfg.max_steps / 1000, 63.6, 0.05),                  # 300B / (1152 x 4096)
    (REUSE, total, 300, 0.005),
    (REUSE, lasts, [4.5e-7], 0),                                            # a hundredth of the start
    (REUSE, lambda p: p.lr(0), 4.5e-5, 1e-12),                              # no re-warming
    (REUSE, late, 86.6, 0.2),                                               # from a fifth of the rate on
    (switched(0.5), late, 149, 0.2), (switched(0.1), late, 58.5, 0.2), (switched(0.02), late, 19.2, 0.2),   # Table 9
    (f'{REUSE} --switches="[{{\'step\': 52982, \'replay\': 0.1}}]"', late, 50, 0.005),      # Table 4
    (REUSE, lambda p: qa(p) / late(p), 0.1, 1e-6),                          # 10% QA
    (REUSE, lambda p: qa(p) / 2.81, 3.1, 0.05),                             # epochs of 2.81B (Table 2)
    (THROUGHOUT, lambda p: qa(p) / 2.81, 10.7, 0.05), (NEVER, qa, 0, 0),    # Table 4
    (REUSE, lambda p: [100 * tokens(p)[f'qa_{n}'] / qa(p) for n in ('chat', 'reasoning', 'stem', 'code', 'world')],
     [9.3, 32.7, 11.0, 6.6, 40.5], 0.05),                                   # Fig. 2, blend 3, bars sum to 100.1
    (NEVER, lambda p: percent(p)['web_hq'], 12, 0.1),                       # Fig. 1, bars sum to 100.5
    (f'{REUSE} --max_steps=21192', total, 100, 0.005), (f'{REUSE} --max_steps=211927', total, 1000, 0.005),
]


@pytest.mark.parametrize('command, quantity, value, off', FACTS,
                         ids=[f'{i}-{c.split()[0][7:-3]}' for i, (c, *_) in enumerate(FACTS)])
def test_a_number_of_the_papers(command, quantity, value, off):
    assert quantity(plan(command)) == pytest.approx(value, rel=1e-12, abs=off)


# -----------------------------------------------------------------------------
# Two steps of each, at toy size

TOY = ['--model=', '--hidden_size=32', '--num_hidden_layers=1', '--num_attention_heads=2', '--vocab_size=0',
       '--block_size=32', '--batch_size=8', '--micro_batch_size=4', '--eval_windows=4', '--log_every=1',
       '--device=cpu', '--dtype=fp32', '--compile=false']


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A data_dir with a tiny corpus for every source that the configs name."""
    folder = tmp_path_factory.mktemp('toys')
    plans = [plan(f'config/{name}.py') for name in TRUE_SCALE]
    names = {name for this in plans for name in [*this.cfg.val_data, *this.cfg.replay_data, *this.mixture.sources]}
    for seed, name in enumerate(sorted(names)):
        data.write_corpus(make_documents('abcdefghij', seed, n=20), name, folder, val=0.3)
    return folder


@pytest.fixture
def two_steps(toys, monkeypatch):
    """two_steps(name, *argv) -> folder of the toy run of that config, asked to stop in its second step."""
    taken, real = [], data.Mixture.batch

    def batch(self, g):
        taken.append(1)
        if len(taken) == 4:                                     # two micro-batches a step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, g)
    monkeypatch.setattr(data.Mixture, 'batch', batch)

    def run(name, *argv):
        out = toys / 'out' / name
        if not out.exists():
            taken.clear()
            monkeypatch.setattr(train, 'stop_signals', [])
            assert train.main([f'config/{name}.py', *TOY, f'--data_dir={toys}', f'--out_dir={out}', *argv]) == 0
        return out
    return run


@pytest.mark.parametrize('name', TRUE_SCALE)
def test_two_steps(name, two_steps):
    this, start, seen = plan(f'config/{name}.py'), [], []
    if this.cfg.init_from:                                      # a toy of its upstream; of the Pile's run, for Pythia
        upstream = re.fullmatch(r'config/(\w+)\.py|weights/pythia-[\w-]+', this.cfg.init_from)[1] or 'pretrain_pile'
        start, seen = [f'--init_from={two_steps(upstream)}'], sorted(plan(f'config/{upstream}.py').mixture.sources)
    out = two_steps(name, *start)
    # The size is a toy's; steps, rates, mixtures and where they switch are the paper's.
    rows = train.rows_per_step(this.cfg)
    assert [(g // 8, weights) for g, weights in saved(out, 2)['phases']] == [(g // rows, w) for g, w in this.phases]
    assert [(row['step'], row['lr']) for row in metrics(out, 'train')] == [(1, this.lr(0)), (2, this.lr(1))]
    [first] = metrics(out, 'eval')
    assert list(first['val']) == this.cfg.val_data
    assert saved(out, 2)['seen'] == seen
