"""The papers' experiments: the numbers that true-scale configs imply, and two steps of each.

The program itself works them out: configurator, schedules, data.plan_mixes, data.Mixture.
"""
import ast
import functools
import os
import re
import shlex
import signal
import subprocess
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_documents, metrics, saved

import configurator
import data
import schedules
import train
from corpora.shards import write_corpus
from model import GPTNeoX
from support import checks, processes

pytestmark = pytest.mark.usefixtures('one_thread')

Plan = namedtuple('Plan', 'cfg origin lr mixes mixture step_tokens')


@functools.cache
def plan(command):
    """What `train.py command` will do. Of the data it needs only the names."""
    words = shlex.split(command)
    cfg, origin = configurator.load(train.Config, words)
    checks.check_knobs(cfg, origin)
    lr, mixes, step = schedules.of(cfg), [], 0
    if cfg.branch_from:                             # off the main line, the config as it stands
        step, line = int(re.search(r'ckpt_(\d{8})\.pt$', cfg.branch_from)[1]), plan(words[0])
        assert step in line.cfg.milestones and cfg.branch_from.startswith(line.cfg.out_dir)
        mixes = [mix for mix in line.mixes if mix[0] < step * cfg.batch_size]
    for first_sample, weights in data.plan_mixes(cfg, lr, step):
        if not mixes or mixes[-1][1] != weights:
            mixes.append((first_sample, weights))
    sources = {name: SimpleNamespace(block_size=cfg.block_size) for _, mix in mixes for name in mix}
    mixture = data.Mixture(sources, mixes)
    return Plan(cfg, origin, lr, mixes, mixture, cfg.batch_size * cfg.block_size)


def tracked_configs():
    """The names of the configs in git: one that you add for yourself is not tested."""
    command = ['git', 'ls-files', 'config/*.py']
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        files = run.stdout.split()
    except (OSError, subprocess.CalledProcessError):
        files = list((ROOT / 'config').glob('*.py'))            # a copy without git
    return sorted(os.path.basename(file).removesuffix('.py') for file in files)


CONFIGS = tracked_configs()
SMALL = [name for name in CONFIGS if plan(f'config/{name}.py').cfg.block_size < 2048]
TRUE_SCALE = [name for name in CONFIGS if name not in SMALL]


def docstring(name):
    return ast.get_docstring(ast.parse((ROOT / f'config/{name}.py').read_text()))


# ------------------------------------------------------------------------------
# Every config

@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_opens_with_all_that_is_needed_to_run_it(name, monkeypatch):
    opening, *rest = docstring(name).split('\n\n')
    assert re.fullmatch(r'[A-Z].*\.', opening)
    text = ' '.join(' '.join(rest).split())
    launcher = r'(python|torchrun --nproc_per_node=(\d+))'
    [[_, processes]] = re.findall(rf'{launcher} train\.py config/{name}\.py', text)
    assert re.search(r'CPU cores|GPU', text)
    assert re.search(r'\d minutes|\de\d+ FLOPs', text)
    measured = r'[Ee]xpect\b.{,120}\d\.\d'
    assert re.search(measured if name in SMALL else r'[Ee]xpect\b', text)

    # the command fits the config
    this = plan(f'config/{name}.py')
    monkeypatch.setenv('WORLD_SIZE', processes or '1')
    checks.check_knobs(this.cfg, this.origin)
    assert bool(processes) == (name in TRUE_SCALE and not name.endswith('_1gpu'))
    assert this.cfg.out_dir == f'out/{name}'


@pytest.mark.parametrize('name', TRUE_SCALE)
def test_the_flops_in_a_docstring_are_those_of_the_run(name):
    this = plan(f'config/{name}.py')
    claimed = float(re.search(r'([\d.]+e\d+)\s+FLOPs', docstring(name))[1])
    per_token = model_of(this).flops_per_token(this.cfg.block_size)
    assert claimed == pytest.approx(per_token * total(this) * 1e9, rel=0.25)


def commands_in(name):
    """The commands in a docstring: the config with options, up to the remark after two spaces."""
    for line in re.findall(r'^    (--.*)$', docstring(name), re.MULTILINE):
        yield f'config/{name}.py ' + re.split('  +', line.strip())[0]


OPTIONS = [command for name in CONFIGS for command in commands_in(name)]


@pytest.mark.parametrize('command', OPTIONS)
def test_the_options_in_docstrings_work(command):
    this, before = plan(command), plan(command.split()[0])
    for word in shlex.split(command)[1:]:
        key = word.removeprefix('--').partition('=')[0]
        assert this.origin[key] == f'--{key}'
        assert getattr(this.cfg, key) != getattr(before.cfg, key), word


def test_there_are_options_in_docstrings():
    assert len(OPTIONS) > 25 and any('branch_from' in command for command in OPTIONS)


# ------------------------------------------------------------------------------
# Derived values against the papers

def total(this):
    """Billions of tokens."""
    return this.cfg.max_steps * this.step_tokens / 1e9


def tokens(this, first=0, last=None):
    """{source: billions of tokens} of steps first .. last - 1."""
    steps = (first, last or this.cfg.max_steps)
    before, after = (this.mixture.counts(step * this.cfg.batch_size) for step in steps)
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


# a start from random weights
FROM_NOTHING = train.Start('scratch', '', {}, {}, {}, {}, {}, {})


def model_of(this):
    """The model that the run trains, without memory for its weights."""
    cfg, origin = this.cfg, this.origin
    if cfg.init_from.startswith('config/'):
        return model_of(plan(cfg.init_from))
    released = re.search(r'pythia-(\d+m)', cfg.init_from)
    if released:
        cfg = replace(cfg, pythia=released[1], vocab_size=50304)
    with torch.device('meta'):
        return GPTNeoX(train.model_shape(cfg, origin, FROM_NOTHING, cfg.vocab_size or 50304))


def parameters(this):
    return model_of(this).num_params()


def qa(this):
    """Billions of tokens of QA data."""
    return sum(n for name, n in tokens(this).items() if name.startswith('qa/'))


def late(this):
    """Billions of tokens from the last switch on."""
    return total(this) - this.mixes[-1][0] * this.cfg.block_size / 1e9


def option_with(word):
    """The first command in a docstring that contains the word."""
    return [command for command in OPTIONS if word in command][0]


PILE, TEN_B = 'config/pretrain_pile.py', 'config/pretrain_pile_10b.py'
PYTHIA, SLIM = 'config/rewarm_pythia_slim.py', 'config/rewarm_pile_slim.py'
SLIM_10B = 'config/rewarm_pile_slim_10b.py'
GERMAN, UNION = 'config/rewarm_pile_german.py', 'config/union_pile_slim.py'
SCRATCH, INFINITE = 'config/scratch_slim.py', 'config/infinite_slim.py'
DOMAINS, SPLITS = 'config/domains_slim.py', 'config/rewarm_splits.py'
GENERAL, REUSE = 'config/pretrain_general.py', 'config/reuse_general_qa.py'

UNION_GERMAN = option_with('out/union_pile_german')
BRANCH_1, BRANCH_2 = option_with('ckpt_00037595'), option_with('ckpt_00081824')
COSINE_INF = f'{SCRATCH} --schedule=infinite_cosine --constant_lr=1.65e-4'
INV_SQRT_INF = f'{SCRATCH} --schedule=infinite_inv_sqrt --constant_lr=1.65e-4'
REPEATED = f'{INFINITE} --schedule=repeated_cosine'
NEVER = f'{REUSE} --switches="[]"'
THROUGHOUT = f'{REUSE} --switches="[]" --replay=0.1'
LATE_50B = f'{REUSE} --switches="[{{\'step\': 52982, \'replay\': 0.1}}]"'
HALF, TENTH, FIFTIETH = (f'{REUSE} --switches="[{{\'lr_below\': {at}, \'replay\': 0.1}}]"'
                         for at in (0.5, 0.1, 0.02))

# Tokens are in billions. Without a number of its own, a fact holds but for rounding of floats.
Fact = namedtuple('Fact', 'command quantity value off', defaults=[0])

GUPTA = [
    # 1104 x 2048, the tokens of an iteration, and Table 1: their sum, and Sampling %
    Fact(PYTHIA, lambda p: p.step_tokens, 2_260_992),
    Fact(PYTHIA, total, 296.86, 0.005),
    Fact(PYTHIA, percent, {'slimpajama/stackexchange': 2, 'slimpajama/arxiv': 2.5,
                           'slimpajama/wikipedia': 4.5, 'slimpajama/book': 4.5,
                           'slimpajama/github': 4.5, 'slimpajama/c4': 15,
                           'slimpajama/commoncrawl': 67}, 1e-4),
    # section 3: warmup of 1%, cosine, then constant: 10% of MaxLR at 240B
    Fact(PYTHIA, lambda p: p.lr.phases[-1].start * p.step_tokens / 1e9, 239.5, 0.5),
    Fact(PYTHIA, lasts, [3e-4, 3e-5, 3e-5]),
    Fact(PYTHIA, lambda p: p.lr.phases[0].end / p.cfg.max_steps, 0.01, 1e-5),
    # Figs. 1 and 2
    Fact(PYTHIA, lambda p: [n * p.step_tokens / 1e9 for n in p.cfg.milestones], [50, 240], 0.002),
]

IBRAHIM = [
    # 132,366 iterations of 1104 x 2048 tokens; the sample of SlimPajama; "200B"
    Fact(PILE, lambda p: p.step_tokens, 2_260_992),
    Fact(PILE, total, 299.28, 0.005),
    Fact(SLIM, total, 299.27, 0.01),
    Fact(GERMAN, total, 200, 0.002),
    # unions of as many tokens of each as the two runs take: 264,732 iterations, "500B"
    Fact(UNION, total, 598.6, 0.05),
    Fact(UNION, tokens, {'pile': 299.28, 'slimpajama': 299.28}, 0.005),
    Fact(UNION_GERMAN, total, 500, 1),
    Fact(UNION_GERMAN, tokens, {'pile': 299.28, 'german': 200}, 0.005),
    # section 6.4
    Fact(TEN_B, total, 299.28, 0.005),
    # eqs. 1 and 2, with a warmup of 1% of the iterations, and Table 14
    Fact(SLIM, ends, [1324, 132_366]),
    Fact(SLIM, lasts, [3e-4, 3e-5]),
    Fact(TEN_B, lasts, [1.2e-4, 1.2e-5]),
    Fact(SLIM_10B, lasts, [1.2e-4, 1.2e-5]),
    Fact(SLIM_10B, tokens, {'pile': 15, 'slimpajama': 285}, 0.75),
    Fact(f'{TEN_B} --batch_size=1120 --max_steps=130475', total, 299.28, 0.005),
    # Table 2: 5% of "300B" are the Pile's, and 25% of 200B
    Fact(SLIM, tokens, {'pile': 15, 'slimpajama': 285}, 0.75),
    Fact(SLIM, percent, {'pile': 5, 'slimpajama': 95}, 1e-4),
    Fact(f'{SLIM} --replay=0.005', tokens, {'pile': 1.5, 'slimpajama': 298.5}, 0.75),
    Fact(f'{SLIM} --replay=0.5', tokens, {'pile': 150, 'slimpajama': 150}, 0.75),
    Fact(GERMAN, tokens, {'pile': 50, 'german': 150}, 0.002),
    Fact(f'{GERMAN} --replay=0.5', tokens, {'pile': 100, 'german': 100}, 0.002),
    # section 7: 1%, 60% and 85% of one dataset of 300B (Fig. 9)
    Fact(COSINE_INF, ends, [1324, 79_420, 112_511, 132_366]),
    Fact(COSINE_INF, lasts, [3e-4, 1.65e-4, 1.65e-4, 3e-5]),
    Fact(INV_SQRT_INF, lasts, [3e-4, 1.65e-4, 1.65e-4, 3e-5]),
    # and of a split of 100B (Fig. 10); the main line is neither annealed nor re-warmed
    Fact(INFINITE, ends, [442, 26_537, 132_687]),
    Fact(BRANCH_1, ends, [442, 26_537, 37_595, 44_229]),
    Fact(BRANCH_1, tokens, {'slimpajama/1': 100}, 0.002),
    Fact(BRANCH_2, lambda p: [p.lr(88_457), p.lr(81_823)], [3e-5, 1.65e-4]),
    Fact(BRANCH_2, tokens, {'slimpajama/1': 100, 'slimpajama/2': 100}, 0.002),
    Fact(INFINITE, tokens, {f'slimpajama/{i}': 100 for i in (1, 2, 3)}, 0.002),
    Fact(INFINITE, lambda p: p.cfg.constant_lr, (3e-4 + 3e-5) / 2, 1e-12),
    Fact(INFINITE, lambda p: [p.lr(n) for n in (44_228, 44_229, 88_458)], [1.65e-4] * 3),
    Fact(REPEATED, ends, [442, 44_229, 44_671, 88_458, 88_900, 132_687]),
    Fact(REPEATED, lasts, [3e-4, 3e-5] * 3),
    # A.1: 132,363 iterations in all; Table 1: tokens and weight of each domain
    Fact(DOMAINS, lambda p: p.cfg.max_steps, 132_363),
    Fact(DOMAINS, tokens, {'slimpajama/commoncrawl': 155.89, 'slimpajama/c4': 79.87,
                           'slimpajama/github': 15.63, 'slimpajama/arxiv': 13.25,
                           'slimpajama/book': 12.58, 'slimpajama/wikipedia': 11.96,
                           'slimpajama/stackexchange': 10.09}, 0.006),
    Fact(DOMAINS, percent, {'slimpajama/commoncrawl': 52.088, 'slimpajama/c4': 26.688,
                            'slimpajama/github': 5.224, 'slimpajama/arxiv': 4.428,
                            'slimpajama/book': 4.203, 'slimpajama/wikipedia': 3.997,
                            'slimpajama/stackexchange': 3.371}, 0.001),
    # the authors' settings: 5% replay among all that came before
    Fact(SPLITS, lambda p: percent(p, 0, 44_229),
         {'pile': 5, 'slimpajama/1': 95, 'slimpajama/2': 0, 'slimpajama/3': 0}, 0.001),
    Fact(SPLITS, lambda p: percent(p, 44_229, 88_458),
         {'pile': 3.81, 'slimpajama/1': 1.19, 'slimpajama/2': 95, 'slimpajama/3': 0}, 0.001),
    Fact(SPLITS, lambda p: percent(p, 88_458),
         {'pile': 3.09, 'slimpajama/1': 0.96, 'slimpajama/2': 0.95, 'slimpajama/3': 95}, 0.001),
    Fact(SPLITS, ends, [442, 44_229, 44_671, 88_458, 88_900, 132_687]),
    # both papers, and Pythia-410M; section 6.4
    Fact(PILE, parameters, 405_334_016),
    Fact(TEN_B, parameters, 9_642_249_216),
    Fact(SLIM_10B, parameters, 9_642_249_216),
]

PARMAR = [
    # section 3: 8T tokens, 16B of warmup; Fig. 1, whose bars sum to 100.2
    Fact(GENERAL, total, 8000, 0.005),
    Fact(GENERAL, lambda p: ends(p)[0] * p.step_tokens / 1e9, 16, 0.005),
    Fact(GENERAL, lasts, [4.5e-4, 4.5e-5]),
    Fact(GENERAL, lambda p: percent(p)['code'], 15, 0.05),
    Fact(GENERAL, lambda p: percent(p)['multilingual'], 15, 0.05),
    # 300B of 1152 x 4096 tokens a step; to a hundredth of the start, without re-warming
    Fact(REUSE, lambda p: p.cfg.max_steps / 1000, 63.6, 0.05),
    Fact(REUSE, total, 300, 0.005),
    Fact(REUSE, lasts, [4.5e-7]),
    Fact(REUSE, lambda p: p.lr(0), 4.5e-5, 1e-12),
    # from a fifth of the rate on; Table 9: other switches; Table 4: the last 50B
    Fact(REUSE, late, 86.6, 0.2),
    Fact(HALF, late, 149, 0.2),
    Fact(TENTH, late, 58.5, 0.2),
    Fact(FIFTIETH, late, 19.2, 0.2),
    Fact(LATE_50B, late, 50, 0.005),
    # 10% QA data; Table 2: epochs of their 2.81B; Table 4: throughout, and none
    Fact(REUSE, lambda p: qa(p) / late(p), 0.1, 1e-6),
    Fact(REUSE, lambda p: qa(p) / 2.81, 3.1, 0.05),
    Fact(THROUGHOUT, lambda p: qa(p) / 2.81, 10.7, 0.05),
    Fact(NEVER, qa, 0),
    # Fig. 2, blend 3, whose bars sum to 100.1; Fig. 1, whose bars sum to 100.5
    Fact(REUSE, lambda p: [100 * tokens(p)[f'qa/{n}'] / qa(p) for n in
                           ('chat', 'reasoning', 'stem', 'code', 'world')],
         [9.3, 32.7, 11.0, 6.6, 40.5], 0.05),
    Fact(NEVER, lambda p: percent(p)['web_hq'], 12, 0.1),
    Fact(f'{REUSE} --max_steps=21192', total, 100, 0.005),
    Fact(f'{REUSE} --max_steps=211927', total, 1000, 0.005),
]
FACTS = [*GUPTA, *IBRAHIM, *PARMAR]


def name_of(fact):
    return fact.command.split()[0][7:-3]


@pytest.mark.parametrize('fact', FACTS, ids=name_of)
def test_a_number_of_the_papers(fact):
    expected = pytest.approx(fact.value, rel=1e-12, abs=fact.off)
    assert fact.quantity(plan(fact.command)) == expected


# ------------------------------------------------------------------------------
# Two steps of each, at toy size

TOY = ['--pythia=', '--hidden_size=32', '--num_hidden_layers=1', '--num_attention_heads=2',
       '--vocab_size=0', '--block_size=32', '--batch_size=8', '--micro_batch_size=4',
       '--eval_windows=4', '--log_every=1', '--device=cpu', '--dtype=fp32', '--compile=false']


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A data_dir with a tiny corpus for every source that the configs name."""
    folder = tmp_path_factory.mktemp('toys')
    names = set()
    for name in TRUE_SCALE:
        this = plan(f'config/{name}.py')
        names |= {*this.cfg.val_data, *this.cfg.replay_data, *this.mixture.sources}
    for seed, name in enumerate(sorted(names)):
        write_corpus(make_documents('abcdefghij', seed, n=20), name, folder, val=0.3)
    return folder


@pytest.fixture
def two_steps(toys, monkeypatch):
    """two_steps(name, *argv) -> folder of the config's toy run, stopped in its second step."""
    taken, real_batch = [], data.Mixture.batch

    def batch(self, g):
        taken.append(1)
        if len(taken) == 4:                         # two in each step
            os.kill(os.getpid(), signal.SIGTERM)
        return real_batch(self, g)
    monkeypatch.setattr(data.Mixture, 'batch', batch)

    def run(name, *argv):
        out = toys / 'out' / name
        if not out.exists():
            taken.clear()
            monkeypatch.setattr(processes, 'received', [])
            folders = [f'--data_dir={toys}', f'--out_dir={out}']
            assert train.main([f'config/{name}.py', *TOY, *folders, *argv]) == 0
        return out
    return run


OLD, NEW, AGAIN, NEVER_READ = 'old data', 'new data', 'the same data again', 'never trained on'
DATA = 'training data'
# What each validation set is to the run, by the papers. Toys of Pythia start from one on the Pile.
ROLES = {
    'domains_slim': {'pile': OLD, 'slimpajama': NEW},
    'infinite_slim': {'slimpajama': DATA},
    'pretrain_general': {'web': DATA, 'papers': DATA, 'encyclopedia': DATA, 'multilingual': DATA,
                         'code': DATA},
    'pretrain_pile': {'pile': DATA, 'slimpajama': NEVER_READ},
    'pretrain_pile_10b': {'pile': DATA, 'slimpajama': NEVER_READ},
    # QA data are new, though they stand in replay_data. Two steps of the old toy read 16 samples,
    # none of which was of the encyclopedia.
    'reuse_general_qa': {'web_hq': NEW, 'papers': AGAIN, 'encyclopedia': NEW, 'multilingual': AGAIN,
                         'code': AGAIN, 'qa/reasoning': NEW, 'qa/stem': NEW, 'qa/world': NEW},
    'rewarm_pile_german': {'pile': OLD, 'german': NEW},
    'rewarm_pile_slim': {'pile': OLD, 'slimpajama': NEW},
    'rewarm_pile_slim_10b': {'pile': OLD, 'slimpajama': NEW},
    'rewarm_pile_slim_1gpu': {'pile': OLD, 'slimpajama': NEW},
    'rewarm_pythia_slim': {'pile': OLD, 'slimpajama': NEW},
    'rewarm_splits': {'pile': OLD, 'slimpajama': NEW},
    'scratch_slim': {'pile': NEVER_READ, 'slimpajama': DATA},
    'union_pile_slim': {'pile': DATA, 'slimpajama': DATA},
}


@pytest.mark.parametrize('name', TRUE_SCALE)
def test_two_steps(name, two_steps):
    """The size is a toy's. Steps, rates, mixtures and where they switch are the paper's."""
    this, start = plan(f'config/{name}.py'), []
    if this.cfg.init_from:
        # a toy of the run that it starts from; for Pythia's weights, of the one on the Pile
        config = re.fullmatch(r'config/(\w+)\.py', this.cfg.init_from)
        upstream = config[1] if config else 'pretrain_pile'
        start = [f'--init_from={two_steps(upstream)}']
    out = two_steps(name, *start)

    state, rates = saved(out, 2), [(row['step'], row['lr']) for row in metrics(out, 'train')]
    mixes = [*state['progress']['mixes'], *state['stage']['mixes']]
    switches = [(first // this.cfg.batch_size, weights) for first, weights in this.mixes]
    assert [(first // 8, weights) for first, weights in mixes] == switches
    assert rates == [(1, this.lr(0)), (2, this.lr(1))]
    assert state['stage']['roles'] == ROLES[name]
    [first] = metrics(out, 'eval')
    assert list(first['val']) == this.cfg.val_data
