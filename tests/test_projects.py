"""projects/: every method trains, and resumes after a crash as if there had been none."""
import importlib
import inspect
import itertools
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import configurator
import data
import eval
import train
from configurator import UserError
from conftest import crash, ends_well, make_documents, metrics, plain, ROOT, same_run, saved, stage
from corpora.shards import write_corpus
from corpora.tokenizer import load_tokenizer
from model import cross_entropy, freeze, GPTNeoX, GPTNeoXConfig, rotary_tables
from projects import bert2bert, blocks, distil, ewc, gem, hyperclone, longer, lora, new_tokens
from support import checkpoints

from results import bits, positions

pytestmark = pytest.mark.usefixtures('fast', 'one_thread')

# Every method, with options that make it do something in a tiny run.
METHODS = {'projects.ewc:EWC': ['--ewc=10', '--l2=0.1', '--fisher_windows=5'],
           'projects.distil:Distil': ['--distil=0.1', '--teacher=out/a'],
           'projects.finetune_checkpoints:FineTune': ['--test_documents=3'],
           'projects.gem:GEM': ['--memory=20', '--memory_batch=4'],
           'projects.longer:Longer': ['--block_size=64', '--stretch=ntk'],
           'projects.lora:LoRA': ['--lora_rank=3'],
           'projects.numeracy:Numeracy': [],
           'projects.probe:Probe': ["--probes={'both': ['old', 'new']}", '--probe_windows=6',
                                    '--supervised=true']}


def find(name):
    module, cls = name.split(':')
    return getattr(importlib.import_module(module), cls)


@pytest.fixture
def second(config):
    """second('b'): a stage on new data after the run a."""
    ends_well(config('a'))

    def write(name, **changes):
        knobs = dict(init_from='a.py', replay_data={'old': 1.0}, replay=0.25, eval_every=4,
                     save_every=3)
        return stage(config, name, **knobs | changes)
    return write


def test_every_method_is_tried():
    found = set()
    for path in (ROOT / 'projects').glob('[!_]*.py'):
        module = importlib.import_module(f'projects.{path.stem}')
        found |= {f'{module.__name__}:{name}' for name, value in vars(module).items()
                  if inspect.isclass(value) and issubclass(value, train.Method)
                  and value.__module__ == module.__name__}
    assert found == set(METHODS)


@pytest.mark.parametrize('name', METHODS)
def test_a_method_trains_and_resumes(second, monkeypatch, name):
    Method, options = find(name), METHODS[name]
    ends_well(second('b'), *options, method=Method)
    ends_well(second('plain'))
    assert metrics('out/b') != metrics('out/plain')
    argv = [second('c'), *options]
    crash(argv, random.randint(4, 11), monkeypatch, Method)
    ends_well(*argv, method=Method)
    same_run('out/b', 'out/c', 12)


def recipes():
    """{the name of its Method: a recipe of the README}."""
    page = (ROOT / 'projects/README.md').read_text()
    texts = re.findall(r'```python\n(.*?)```', page, re.S)
    return {re.search(r'class (\w+)\(train.Method\)', text)[1]: text for text in texts}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe('ZLoss'): the Method of a recipe, from a file of its own."""
    def load(name):
        Path(tmp_path, f'mine_{name}.py').write_text(recipes()[name])
        monkeypatch.syspath_prepend(tmp_path)
        return getattr(importlib.import_module(f'mine_{name}'), name)
    return load


@pytest.mark.parametrize('name', recipes())
def test_the_recipes_of_the_readme_run(second, recipe, name, monkeypatch):
    assert len([line for line in recipes()[name].splitlines() if line.strip()]) <= 16
    ends_well(second('b'), method=recipe(name))
    ends_well(second('plain'))
    assert metrics('out/b') != metrics('out/plain')
    argv = [second('c')]
    crash(argv, random.randint(4, 11), monkeypatch, recipe(name))
    ends_well(*argv, method=recipe(name))
    same_run('out/b', 'out/c', 12)


def test_another_optimizer(second, recipe):
    """The step of SGD with Nesterov's momentum, by hand."""
    knobs = dict(schedule='constant', warmup=0, weight_decay=0.0, grad_clip=0.0, save_every=1)
    ends_well(second('b', max_steps=2, **knobs), '--log_every=1', method=recipe('Momentum'))
    before, after = saved('out/b', 1), saved('out/b', 2)
    assert after['optimizer']['kind'] == 'SGD'
    assert after['optimizer']['moments'].keys() == before['model']['weights'].keys()
    for name, old in before['model']['weights'].items():
        first, second_ = (state['optimizer']['moments'][name]['momentum_buffer']
                          for state in (before, after))
        gradient = second_ - 0.9 * first
        expected = old - 2e-3 * (gradient + 0.9 * second_)
        torch.testing.assert_close(after['model']['weights'][name], expected)


def test_another_optimizer_takes_no_moments_of_adamw(second, recipe, fails):
    fails(second('b', keep_optimizer=True), method=recipe('Momentum'),
          says=['the moments are of AdamW, but this run has SGD'])


def test_replayed_rows_are_read_and_not_learned(second, recipe):
    Method, path = recipe('NewRowsOnly'), second('b')
    cfg, _ = configurator.load(Method.Config, [path])
    _, model = eval.load_run('out/a')
    x, y = torch.randint(200, (2, 4, 32))
    loss, values = Method(cfg).objective(model, x, y, ['new', 'old', 'new', 'old'])
    torch.testing.assert_close(loss, model(x[::2], y[::2])[1])
    assert values == {'new rows': 0.5}
    loss, _ = Method(cfg).objective(model, x, y, ['old'] * 4)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())

    # in a run, the sources are those of the rows
    ends_well(path, method=Method)
    old = [row['samples']['old'] for row in metrics('out/b', 'train')]
    for row, before, now in zip(metrics('out/b', 'train'), [0, *old], old):
        assert row['new rows'] == 1 - (now - before) / 4


# ------------------------------------------------------------------------------
# Penalties

def distance(run, other):
    ours, theirs = saved(run, 12)['model']['weights'], saved(other, 20)['model']['weights']
    return sum((ours[name] - theirs[name]).square().sum().item() for name in theirs)


@pytest.mark.parametrize('option', ['--ewc=1e6', '--l2=10'])
def test_penalties_keep_weights_near_the_start(second, option):
    ends_well(second('plain'))
    ends_well(second('b'), option, '--fisher_windows=5', method=ewc.EWC)
    assert distance('out/b', 'out/a') < 0.7 * distance('out/plain', 'out/a')
    first, *_, last = metrics('out/b', 'train')
    assert first['penalty'] == 0 < last['penalty']


def test_the_fisher_information_is_the_mean_square_of_gradients(second):
    cfg, _ = configurator.load(ewc.Knobs, [second('b'), '--fisher_windows=3'])
    _, model = eval.load_run('out/a')
    found = ewc.EWC(cfg).fisher_information(model)
    windows = data.open_source(cfg, 'old', 'train', key=cfg.seed).read([0, 1, 2])
    squares = []
    for tokens in torch.from_numpy(windows).long():
        model.zero_grad()
        logits, _ = model(tokens[None, :-1])
        cross_entropy(logits, tokens[None, 1:]).backward()
        squares.append(model.embed_out.weight.grad.square())
    torch.testing.assert_close(found['embed_out.weight'], sum(squares) / 3)


# ------------------------------------------------------------------------------
# Larger models

def any_model(**changes):
    """A model of random weights, LayerNorms and biases among them."""
    shape = dict(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
                 max_position_embeddings=16, rotary_pct=0.5)
    model = GPTNeoX(GPTNeoXConfig(**shape | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def logits(model):
    return model(torch.arange(32).view(2, 16))[0].detach()


@pytest.mark.parametrize('parallel', [True, False])
@pytest.mark.parametrize('noise', [None, 0])
def test_a_clone_computes_the_same(parallel, noise):
    model = any_model(use_parallel_residual=parallel, intermediate_size=40)
    wide = hyperclone.clone(model, noise)
    assert wide.config.hidden_size == 48 and wide.config.intermediate_size == 80
    torch.testing.assert_close(logits(wide), logits(model), atol=1e-4, rtol=0)
    w = wide.gpt_neox['layers'][1].mlp.dense_h_to_4h.weight
    assert (w[:40, :24] - w[40:, :24]).abs().max() > (0 if noise is None else 0.1) - 1e-9
    assert noise is not None or torch.equal(w[:40, :24], w[40:, 24:])


@pytest.mark.parametrize('noise, alike', [([], True), (['--noise=10'], False)])
def test_without_noise_the_halves_of_a_clone_stay_alike(second, noise, alike):
    path = second('b')
    hyperclone.main(['out/a', 'out/wide.pt', *noise])
    ends_well(path, '--init_from=out/wide.pt')
    before, after = metrics('out/a', 'eval')[-1]['val'], metrics('out/b', 'eval')[0]['val']
    assert after['old']['loss'] == pytest.approx(before['old']['loss'], abs=1e-4)
    w = saved('out/b', 12)['model']['weights']['gpt_neox.embed_in.weight']
    assert torch.allclose(w[:, :32], w[:, 32:], atol=1e-4) == alike
    assert eval.Run('out/b').old == ['old']


@pytest.mark.parametrize('width', [24, 40, 48])
def test_copied_units_keep_the_function(monkeypatch, width):
    """Up to the LayerNorms, which weigh units by their copies."""
    model = any_model()
    assert (logits(bert2bert.widen(model, width)) - logits(model)).std() < logits(model).std()
    monkeypatch.setattr(bert2bert, 'draw', lambda old, new, generator: torch.cat(
        (torch.arange(old), torch.randperm(old)[:new - old])))
    if width in (24, 48):                               # then all have equally many copies
        wide = bert2bert.widen(model, width)
        torch.testing.assert_close(logits(wide), logits(model), atol=1e-4, rtol=0)


def test_advanced_units_come_from_the_layer_above():
    model = any_model()
    fpi, aki = (bert2bert.widen(model, 48, kind, seed=3).gpt_neox.layers for kind in ('fpi', 'aki'))
    for name, p in fpi[1].named_parameters():
        rows = len(p) // 2
        own, other = aki[1].get_parameter(name), fpi[2].get_parameter(name)
        assert torch.equal(own, torch.cat((p[:rows], other[rows:]))) and not torch.equal(own, p)
    assert plain(aki[2].state_dict()) == plain(fpi[2].state_dict())     # nothing is above

    # where all layers are equal, the layer above is no other
    for layer in model.gpt_neox.layers:
        layer.load_state_dict(model.gpt_neox.layers[0].state_dict())
    wide = [plain(bert2bert.widen(model, 40, kind).state_dict()) for kind in ('fpi', 'aki')]
    assert wide[0] == wide[1]


def test_a_stack_runs_the_layers_again():
    model = any_model()
    deep = bert2bert.stack(model, 8)
    cos, sin = model.cos[:16], model.sin[:16]
    x = model.gpt_neox.embed_in(torch.arange(32).view(2, 16))
    for i in (0, 1, 2, 0, 1, 2, 1, 2):
        x = model.gpt_neox['layers'][i](x, cos, sin)
    expected = model.embed_out(model.gpt_neox.final_layer_norm(x))
    torch.testing.assert_close(logits(deep), expected)


def test_a_grown_model_starts_a_stage(second):
    path = second('b')
    bert2bert.main(['out/a', 'out/grown.pt', '--width=aki', '--hidden_size=48', '--layers=3'])
    ends_well(path, '--init_from=out/grown.pt')
    shape = saved('out/b', 12)['model']['shape']
    assert (shape['hidden_size'], shape['num_hidden_layers'], shape['num_attention_heads']) == (
        48, 3, 3)


@pytest.mark.parametrize('options, words', [
    (['--hidden_size=40'], 'multiple of the head size 16'), (['--hidden_size=16'], 'at least 32'),
    (['--layers=0'], 'but the model has 1')])
def test_what_cannot_be_grown(second, options, words):
    second('b')
    with pytest.raises(UserError, match=words):
        bert2bert.main(['out/a', 'out/grown.pt', *options])
    for main in (bert2bert.main, hyperclone.main):
        with pytest.raises(UserError, match='there is no checkpoint'):
            main(['out/nowhere', 'out/grown.pt'])


# ------------------------------------------------------------------------------
# Self-distillation

def hidden(model, x):
    cos, sin = model.cos[:x.shape[1]], model.sin[:x.shape[1]]
    h = model.gpt_neox.embed_in(x)
    for layer in model.gpt_neox.layers:
        h = layer(h, cos, sin)
    return model.gpt_neox.final_layer_norm(h)


def test_the_distance_to_the_teacher(second):
    ends_well(second('t'))
    cfg, _ = configurator.load(distil.Knobs, [second('b'), '--teacher=out/t', '--distil=3'])
    _, student = eval.load_run('out/a')
    _, teacher = eval.load_run('out/t')
    x, y = torch.randint(200, (2, 3, 32))
    expected = (hidden(student, x) - hidden(teacher, x)).square().sum() / 96
    method = distil.Distil(cfg)
    method.start(student, None)
    loss, values = method.objective(student, x, y, ['new'] * 3)
    torch.testing.assert_close(values['distance'], expected)
    torch.testing.assert_close(loss, student(x, y)[1] + 3 * expected)


def test_the_teacher_is_in_the_checkpoint(second, monkeypatch):
    ends_well(second('t'))
    argv = [second('b'), '--teacher=out/t']
    crash(argv, 8, monkeypatch, distil.Distil)
    shutil.rmtree('out/t')
    ends_well(*argv, method=distil.Distil)


def test_teachers_that_do_not_fit(second, config, fails):
    path = second('b')
    for knobs, words in ((dict(vocab_size=512), 'another vocabulary, of 512 rows and 384 here'),
                         (dict(hidden_size=48), 'another shape: hidden_size'),
                         (dict(use_parallel_residual=False), 'use_parallel_residual')):
        shutil.rmtree('out/t', ignore_errors=True)
        ends_well(config('t', **knobs))
        fails(path, '--teacher=out/t', says=[words], method=distil.Distil)
    state, model = eval.load_run('out/a')
    other = {**state, 'history': {**state['history'], 'tokenizer': 5}}
    checkpoints.save_weights('out/other.pt', model, other)
    fails(path, '--teacher=out/other.pt', says=['another tokenizer'], method=distil.Distil)
    fails(path, '--teacher=out/nowhere', says=['there is no checkpoint'], method=distil.Distil)


# LoRA and block expansion

def test_lora_changes_only_its_matrices_and_by_its_rank(second):
    r, scale = random.randint(1, 5), random.uniform(0.5, 3)
    ends_well(second('b'), f'--lora_rank={r}', f'--lora_scale={scale}', method=lora.LoRA)
    before, end = saved('out/a')['model']['weights'], saved('out/b', 12)
    released = end['model']['weights']
    assert list(released) == list(before)
    for name, old in before.items():
        if '.weight' in name and ('attention.' in name or 'mlp.' in name):
            part = name.replace('.weight', '.parametrizations.weight')
            trained = end['optimizer']['trained']
            A, B = trained[f'{part}.0.A'], trained[f'{part}.0.B']
            assert torch.equal(trained[f'{part}.original'], old)
            torch.testing.assert_close(released[name], old + scale * (B @ A))
            change = released[name].double() - old.double()
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == r
        else:
            assert torch.equal(released[name], old), name
    # no adapter is needed to evaluate what was saved
    _, plain_model = eval.load_run('out/b')
    cfg = configurator.load(train.Config, ['b.py'])[0]
    source = data.open_source(cfg, 'new', 'val')
    tokens = torch.from_numpy(source.read(data.val_windows(source, cfg.eval_windows)))
    _, loss = plain_model(tokens[:, :-1], tokens[:, 1:])
    row = metrics('out/b', 'eval')[-1]['val']['new']
    assert loss.item() == pytest.approx(row['loss'], rel=1e-5)


@pytest.mark.parametrize('method, options', [('projects.lora:LoRA', ['--lora_rank=3']), (
    'projects.longer:Longer', ['--block_size=64', '--stretch=interpolate'])])
def test_two_processes_train_as_one(second, forked, method, options):
    for world in (1, 2):
        argv = [second(f'b{world}'), *options]
        assert forked(argv, world, method=method)[0] == [0] * world
    for one, two in zip(metrics('out/b1'), metrics('out/b2')):
        if one['event'] == 'train':
            assert one['loss'] == pytest.approx(two['loss'], rel=1e-4)
        for name, losses in one.get('by_position', {}).items():
            assert losses == pytest.approx(two['by_position'][name], rel=1e-3)


def test_bad_lora(second, fails):
    path = second('b')
    fails(path, '--lora_rank=33', says=['lora_rank = 33', '1 to 32'], method=lora.LoRA)
    fails(path, '--lora_rank=0', says=['lora_rank = 0'], method=lora.LoRA)
    fails(path, "--lora_modules=['*.mpl.*']", says=['matches no linear layer'], method=lora.LoRA)
    assert not Path('out/b').exists()


def random_model(**shape):
    shape = dict(vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                 max_position_embeddings=32) | shape
    model = GPTNeoX(GPTNeoXConfig(**shape))
    for p in model.parameters():                        # biases too
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize('every, layers', [(1, 8), (2, 6), (3, 5), (4, 5)])
@pytest.mark.parametrize('parallel', [True, False])
def test_expanded_blocks_compute_the_same(every, layers, parallel):
    model = random_model(use_parallel_residual=parallel)
    deeper, frozen = blocks.expand(model, every)
    assert deeper.config.num_hidden_layers == layers
    idx = torch.randint(300, (2, 32))
    assert torch.equal(deeper(idx)[0], model(idx)[0])
    freeze(deeper, frozen)
    trained = {name.split('.')[2] for name, p in deeper.named_parameters() if p.requires_grad}
    assert trained == {str((every + 1) * (i + 1) - 1) for i in range(4 // every)}


def test_only_expanded_blocks_are_trained(second, capsys):
    path = second('b')
    blocks.main(['out/a', 'out/blocks.pt', '--every', '1'])
    freeze = re.search('--(freeze=.*)', capsys.readouterr().out)[0].replace('"', '')
    ends_well(path, '--init_from=out/blocks.pt', freeze)
    before = torch.load('out/blocks.pt')['model']['weights']
    after = saved('out/b', 12)['model']['weights']
    for name in after:
        assert torch.equal(before[name], after[name]) != name.startswith('gpt_neox.layers.1.')
    val = metrics('out/b', 'eval')[0]['val']
    assert val == {name: {key: pytest.approx(x, rel=1e-6) for key, x in row.items()}
                   for name, row in metrics('out/a', 'eval')[-1]['val'].items()}
    with pytest.raises(UserError, match='--every 2: expected 1 to 1'):
        blocks.main(['out/a', 'out/x.pt', '--every', '2'])


# ------------------------------------------------------------------------------
# GEM

def nearest(g, references):
    """The projection by trying every set of constraints that may hold with equality."""
    found = []
    for size in range(len(references) + 1):
        for active in itertools.combinations(range(len(references)), size):
            R = references[list(active)]
            point = g - R.T @ torch.linalg.lstsq(R.T, g[:, None]).solution[:, 0] if active else g
            if (references @ point).min() >= -1e-9:
                found.append(((point - g).norm().item(), point))
    return min(found, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize('K', [1, 2, 3])
def test_the_projection_is_the_nearest_allowed_gradient(K):
    for _ in range(20):
        references = torch.randn(K, 6, dtype=torch.float64)
        g = torch.randn(6, dtype=torch.float64)
        torch.testing.assert_close(gem.project(g, references), nearest(g, references),
                                   atol=1e-6, rtol=1e-6)


class Watched(gem.GEM):
    """Logs how the gradient that AdamW gets agrees with the old data."""

    def change_gradients(self, model, step, batches):
        values = super().change_gradients(model, step, batches)
        parameters = [p for p in model.parameters() if p.grad is not None]
        g = gem.flat(p.grad for p in parameters)
        agrees = [torch.cosine_similarity(g, self.reference(model, parameters, memory, step), 0)
                  for memory in self.memories]
        return values | {'after': min(agrees).item()}


@pytest.mark.parametrize('several', [False, True])
def test_no_gradient_opposes_the_old_data(second, corpora, several):
    knobs = {'replay_data': {'old': 1.0}, 'replay': 0.0, 'learning_rate': 1e-2}
    path, options = second('b', **knobs), ['--memory_batch=4']
    if several:
        Path('d').mkdir()
        for name in ('old', 'new'):
            Path('d', name).symlink_to(corpora / name)
        write_corpus(make_documents('uvwxyz', 3), 'more', 'd')
        path = second('b', **knobs | {'replay_data': {'old': 1.0, 'more': 1.0}, 'data_dir': 'd'})
        options.append('--gem=true')
    ends_well(path, *options, method=Watched)
    rows = metrics('out/b', 'train')
    assert rows[-1]['projected'] > 0 and min(row['cosine'] for row in rows) < 0
    assert all(row['after'] > -1e-4 for row in rows)
    assert all(row['samples'].get('new') == 4 * row['step'] for row in rows)


@pytest.mark.parametrize('options', [[], ['--memory=6', '--micro_batch_size=1']])
def test_two_processes_project_as_one(second, forked, options):
    runs = {}
    for world in (1, 2):
        argv = [second(f'b{world}', replay=0.0), '--memory_batch=4', *options]
        assert forked(argv, world, method='projects.gem:GEM')[0] == [0] * world
        runs[world] = metrics(f'out/b{world}', 'train')
    for one, two in zip(runs[1], runs[2]):
        assert one['cosine'] == pytest.approx(two['cosine'], abs=2e-3)
        assert one['projected'] == two['projected'] and one['loss'] == pytest.approx(two['loss'],
                                                                                     rel=1e-3)


class Scaler(torch.amp.GradScaler):
    """That of fp16, whose scale here is a power of two, which changes no bit of float32."""
    calls = 0

    def __init__(self, device, enabled):
        super().__init__(device, init_scale=2.0**10)

    def scale(self, loss):
        Scaler.calls += 1
        return super().scale(loss)


def test_gradients_of_old_data_are_scaled_as_all_are(second, monkeypatch):
    ends_well(second('b'), '--memory_batch=4', method=gem.GEM)
    monkeypatch.setattr(torch.amp, 'GradScaler', Scaler)
    ends_well(second('c'), '--memory_batch=4', method=gem.GEM)
    assert metrics('out/b') == metrics('out/c') and Scaler.calls == 2 * 12


def test_a_gradient_of_old_data_that_overflows_projects_nothing(second, monkeypatch):
    monkeypatch.setattr(gem.GEM, 'reference', lambda self, model, parameters, memory, step:
                        torch.full((sum(p.numel() for p in parameters),), float('-inf')))
    ends_well(second('b'), method=gem.GEM)
    ends_well(second('plain'))
    assert plain(saved('out/b', 12)['model']) == plain(saved('out/plain', 12)['model'])
    assert metrics('out/b', 'train')[-1]['projected'] == 0


def test_bad_gem(second, fails):
    fails(second('b', replay_data={}, replay=0.0), says=['replay_data must name'], method=gem.GEM)
    fails(second('b'), '--memory_batch=0', says=['memory_batch = 0'], method=gem.GEM)


# ------------------------------------------------------------------------------
# Longer windows

def test_stretched_positions():
    base, factor = random.uniform(5e3, 2e4), random.choice([2.0, 4.0])
    old = GPTNeoXConfig(hidden_size=64, num_attention_heads=2, rotary_emb_base=base,
                        max_position_embeddings=64)
    for ours, theirs in zip(longer.rotary_tables(old, 1.0), rotary_tables(old)):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    for ours, theirs in zip(longer.rotary_tables(old, factor), rotary_tables(old)):
        torch.testing.assert_close(ours[::int(factor)], theirs[:64 // int(factor)], atol=2e-5,
                                   rtol=0)


@pytest.mark.parametrize('stretch', ['none', 'ntk', 'base', 'interpolate'])
def test_longer_windows(second, stretch):
    ends_well(second('b'), '--block_size=64', f'--stretch={stretch}', '--rotary_base=5e4',
              method=longer.Longer)
    end = saved('out/b', 12)
    base = {'ntk': 10000 * 2**(4 / 2), 'base': 5e4}.get(stretch, 10000)    # 4 rotary dims
    assert end['model']['shape']['rotary_emb_base'] == pytest.approx(base)
    assert end['model']['shape']['max_position_embeddings'] == 64
    for row in metrics('out/b', 'eval'):
        for name, losses in row['by_position'].items():
            assert len(losses) == 16
            assert np.mean(losses) == pytest.approx(row['val'][name]['loss'], rel=1e-4)
    if stretch == 'ntk':
        # the slowest dimension turns half as far, the fastest as far as before
        new, old = (1 / b ** (torch.arange(0, 4, 2) / 4) for b in (base, 10000))
        torch.testing.assert_close(new / old, torch.tensor([1, 0.5]))
        positions.main(['old', 'out/b', '--out', 'x.png'])
        assert Path('x.png').read_bytes()[:4] == b'\x89PNG'
        ends_well(second('plain'))
        with pytest.raises(UserError, match="plain: no losses by position on 'old'"):
            positions.main(['old', 'out/plain', '--out', 'y.png'])


def test_bad_stretches(second, fails):
    for option, words in (('--stretch=yarn', "stretch = 'yarn': expected one of 'none', 'ntk'"),
                          ('--stretch=base', 'rotary_base'), ('--buckets=7', 'buckets = 7'),
                          ('--factor=0.5', 'factor = 0.5')):
        fails(second('b'), option, says=[words], method=longer.Longer)


# ------------------------------------------------------------------------------
# New tokens

def naive_merges(text, count):
    """[(left, right), ...] up to the first tie, where either order is right."""
    words = [[bytes([b]) for b in word.encode()] for word in new_tokens.WORDS.findall(text)]
    found = []
    for _ in range(count):
        pairs = Counter()
        for word in words:
            pairs.update(zip(word, word[1:]))
        ((left, right), most), (_, second_most) = pairs.most_common(2)
        if most == second_most:
            break
        found.append((left, right))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i:i + 2] = [left + right]
                i += 1
    return found


def test_merges_are_the_most_frequent_pairs():
    draw, theirs = random.Random(), []
    while len(theirs) < 3:
        words = [''.join(draw.choices('abä_\n', k=draw.randint(1, 7))) for _ in range(30)]
        text = ' '.join(draw.choices(words, weights=range(1, 31), k=800))
        theirs = naive_merges(text, 12)
    pieces = new_tokens.bytes_of(new_tokens.learn_merges(text, 12))
    assert [pieces[257 + i] for i in range(len(theirs))] == [a + b for a, b in theirs]


@pytest.fixture
def grown(second, corpora):
    """out/tokens, made of the run a with 20 tokens of 'new'."""
    second('b')
    argv = ['out/a', 'out/tokens', '--learn_from', 'new', '--tokens', '20', '--data_dir',
            str(corpora)]
    new_tokens.main(argv)
    return argv


def test_new_tokens_say_the_same_text_in_fewer_ids(grown, corpora):
    tokenizer = load_tokenizer('out/tokens/new')
    assert tokenizer.vocab_size == 277 and tokenizer.eot == 256
    for name in ('old', 'new'):
        for split in ('train', 'val'):
            old = data.open_shard(data.find_shards(name, split, corpora)[0])
            new = data.open_shard(data.find_shards(name, split, 'out/tokens')[0])
            bytes_ = load_tokenizer('bytes')
            assert tokenizer.decode(new.tokens) == bytes_.decode(old.tokens)
            assert (new.tokens == 256).sum() == (old.tokens == 256).sum()
            assert new.text_bytes == old.text_bytes and new.tokenizer != old.tokenizer
            assert new.count < 0.8 * old.count or name == 'old'
    library = pytest.importorskip('tokenizers').Tokenizer.from_file('out/tokens/new/tokenizer.json')
    text = 'KLMNOPQRST' + ' an other, text\n\n  KLM'
    assert library.encode(text).ids == tokenizer.encode(text).tolist()
    assert library.token_to_id('<|endoftext|>') == 256


def test_new_rows(grown):
    old = saved('out/a')['model']['weights']
    tokenizer = load_tokenizer('out/tokens/new')
    for rows in ('mean', 'random'):
        state = torch.load(f'out/tokens/{rows}.pt')
        assert state['model']['shape']['vocab_size'] == 384
        for name, tensor in state['model']['weights'].items():
            if 'embed' not in name:
                assert torch.equal(tensor, old[name])
                continue
            assert torch.equal(tensor[:257], old[name][:257])
            for i in range(257, 277):
                mean = sum(old[name][b] for b in tokenizer.bytes_of[i])
                mean = mean / len(tokenizer.bytes_of[i])
                assert torch.allclose(tensor[i], mean, atol=1e-6) == (rows == 'mean')


def test_a_run_with_new_tokens(grown, second, capsys):
    ends_well(second('b'), '--init_from=out/tokens/mean.pt', '--data_dir=out/tokens')
    ends_well(second('c'), '--init_from=out/tokens/random.pt', '--data_dir=out/tokens')
    capsys.readouterr()
    bits.main(['out/b', 'out/c', '--out', 'bits.md'])
    row = metrics('out/b', 'eval')[-1]['val']['new']
    assert f'{row["bpb"]:.3f}' in Path('bits.md').read_text()
    assert eval.Run('out/b').old == ['old']
    assert eval.main(['sample', 'out/b', '--tokens', '5', '--samples', '1']) is None


def test_tokens_that_are_known_already(grown):
    with pytest.raises(UserError, match='knows longer tokens already'):
        new_tokens.main(['out/tokens/mean.pt', 'out/again', *grown[2:]])
    with pytest.raises(UserError, match='out/tokens already exists'):
        new_tokens.main(grown)
    with pytest.raises(UserError, match='not made of bytes'):
        new_tokens.main(['out/a', 'out/again', *grown[2:-1], 'out/tokens'])
    with pytest.raises(UserError, match='--tokens 0'):
        new_tokens.main(['out/a', 'out/again', *grown[2:], '--tokens', '0'])
    assert not Path('out/again').exists()
