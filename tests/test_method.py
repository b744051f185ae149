"""What a project may replace in train.py, tried with one method that replaces all of it."""
import fnmatch
import random
from dataclasses import dataclass

import pytest
import torch
from conftest import crash, ends_well, metrics, plain, same_run, saved, stage

import configurator
import data
import eval
import train
from support import checkpoints, record

pytestmark = pytest.mark.usefixtures('fast', 'one_thread')
EXAMPLE = 'test_method:Example'


@dataclass
class Knobs(train.Config):
    pull: float = 0.0                   # weight of the squared distance to the start
    until: float = 9.0                  # loss on old data above which replay is doubled


class Example(train.Method):
    """Pulled to where it started, slower in the embeddings, more replay while it forgets."""
    Config = Knobs
    Parent = train.Method

    def start(self, model, saved):
        self.begin = saved['begin'] if saved else {n: p.detach().clone()
                                                   for n, p in model.named_parameters()}
        self.replay = saved['replay'] if saved else self.cfg.replay

    def parameter_groups(self, model):
        groups = super().parameter_groups(model)
        slow = [entry for entry in groups[0]['params'] if 'embed' in entry[0]]
        groups[0]['params'] = [entry for entry in groups[0]['params'] if 'embed' not in entry[0]]
        return [*groups, {'params': slow, 'weight_decay': self.cfg.weight_decay, 'lr_factor': 0.25}]

    def objective(self, model, x, y, sources):
        loss, values = super().objective(model, x, y, sources)
        distance = sum(((p - self.begin[n])**2).sum() for n, p in model.named_parameters())
        replayed = sources.count('old') / len(sources)
        return loss + self.cfg.pull * distance, {'distance': distance, 'first': x[0, 0].float(),
                                                 'replayed': replayed}

    def change_gradients(self, model, step, batches):
        return {'clock': step, 'rows': sum(len(x) for x, _, _ in batches)}

    def after_evaluation(self, step, val):
        if val['old']['loss'] > self.cfg.until:
            self.replay = min(0.8, 2 * self.replay)
        mixed = data.mix_weights(self.cfg.train_data, self.cfg.replay_data, self.replay)
        return {'share': self.replay}, mixed

    def state_dict(self):
        return {'begin': self.begin, 'replay': self.replay}


@pytest.fixture
def second(config):
    """second('b', ...): a stage on new data after the run a."""
    ends_well(config('a'))

    def write(name, **changes):
        knobs = dict(init_from='a.py', replay_data={'old': 1.0}, replay=0.1, eval_every=3)
        return stage(config, name, **knobs | changes)
    return write


def test_a_method_that_replaces_nothing_changes_nothing(second):
    class Nothing(train.Method):
        Parent = train.Method
    ends_well(second('b'))
    ends_well(second('c'), method=Nothing)
    same_run('out/b', 'out/c', 12)


def test_the_objective_is_minimized_and_its_values_are_means(second):
    pull = 10**random.uniform(-2, 0)
    ends_well(second('b', micro_batch_size=1), f'--pull={pull}', method=Example)
    rows = metrics('out/b', 'train')
    assert rows[0]['distance'] == 0 and rows[1]['distance'] > 0
    shares = [row['share'] for row in metrics('out/b', 'eval')]
    assert shares == [0.1] * 5
    # the distance grows less under a stronger pull
    ends_well(second('c'), f'--pull={100 * pull}', method=Example)
    assert metrics('out/c', 'train')[-1]['distance'] < rows[-1]['distance']
    # the mean over micro-steps of what each saw first
    cfg = configurator.load(Knobs, ['b.py'])[0]
    source = data.open_source(cfg, 'new', 'train', key=cfg.seed)
    old = data.open_source(cfg, 'old', 'train', key=1337)
    mixture = data.Mixture({'new': source, 'old': old},
                           [(0, data.mix_weights(cfg.train_data, cfg.replay_data, 0.1))])
    for row in rows:
        x, _, sources = mixture.batch(range(4 * (row['step'] - 1), 4 * row['step']))
        assert row['first'] == pytest.approx(x[:, 0].mean())
        assert row['replayed'] == sources.count('old') / 4
        assert row['clock'] == row['step'] - 1 and row['rows'] == 4


def test_groups_have_rates_of_their_own(second):
    one_step = dict(max_steps=1, schedule='constant', warmup=0, weight_decay=0.0)
    ends_well(second('b', **one_step), method=Example)
    before, after = saved('out/a')['model']['weights'], saved('out/b', 1)['model']['weights']
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    # the first step of AdamW is the learning rate, whatever the gradient
    assert moved['embed_out.weight'] == pytest.approx(2e-3 / 4, rel=1e-3)
    assert moved['gpt_neox.layers.0.attention.dense.weight'] == pytest.approx(2e-3, rel=1e-3)
    names = list(saved('out/b', 1)['optimizer']['moments'])
    assert sorted(names) == sorted(after)


@pytest.mark.parametrize('world', [1, 2])
def test_state_and_mixture_survive_kills(second, forked, world):
    argv = [second('b', save_every=2), '--pull=0.1', '--until=0']
    assert forked(argv, world, method=EXAMPLE)[0] == [0] * world
    shares = [row['share'] for row in metrics('out/b', 'eval')]
    assert shares == [0.2, 0.4, 0.8, 0.8, 0.8]
    samples = [row['samples']['old'] for row in metrics('out/b', 'train')]
    assert samples == [round(4 * 0.2 * t) for t in (1, 2, 3)] + [
        samples[2] + round(4 * 0.4 * t) for t in (1, 2, 3)] + samples[6:]

    again = [second('c', save_every=2), *argv[1:]]
    for _ in range(6):
        event = random.choice(['batch', 'update', 'evaluate', 'replace', 'save'])
        forked(again, world, at=(event, random.randint(1, 5)), rank=random.randrange(world),
               method=EXAMPLE)
    assert forked(again, world, method=EXAMPLE)[0] == [0] * world
    same_run('out/b', 'out/c', 12)
    assert saved('out/b', 12)['progress'] == saved('out/c', 12)['progress']


def test_two_processes_log_what_one_does(second, forked):
    argv = ['--pull=0.1', '--until=0']
    assert forked([second('b', micro_batch_size=1), *argv], method=EXAMPLE)[0] == [0]
    assert forked([second('c', micro_batch_size=1), *argv], 2, method=EXAMPLE)[0] == [0, 0]
    for one, two in zip(metrics('out/b'), metrics('out/c')):
        assert one.keys() == two.keys()
        for key in one.keys() - {'val', 'samples', 'event', 'rows'}:
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


@pytest.mark.pictures
def test_logged_values_have_panels(second, monkeypatch):
    import matplotlib.figure
    labels = []
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda fig, *args, **kwargs:
                        labels.extend(ax.get_ylabel() for ax in fig.axes))
    ends_well(second('b'), method=Example)
    assert [label for label in labels if label] == ['validation loss (nats per token)',
                                                    'learning rate', 'clock', 'distance', 'first',
                                                    'replayed', 'rows', 'share']


def test_help_has_the_knobs_of_the_project(capsys):
    ends_well('--help', method=Example)
    out = capsys.readouterr().out
    assert 'pull: float = 0.0' in out and 'learning_rate: float' in out and 'with one method' in out


def test_bad_knobs_of_a_project(second, fails):
    fails(second('b'), '--pul=1', says=["'pull'"], method=Example)
    fails(second('b'), '--pull=x', says=['float'], method=Example)
    fails(second('b'), '--pull=1', says=['pull'])

    @dataclass
    class Clash(train.Config):
        seed: int = 3
    fails(second('b'), says=['seed', 'exist'],
          method=type('Other', (train.Method,), {'Config': Clash}))


def test_a_run_of_a_project_is_not_resumed_without_it(second, fails, monkeypatch):
    class Silent(train.Method):
        """It has no knobs of its own, which could tell it from another."""
        Parent = train.Method

    crash([second('b'), '--save_every=1'], 5, monkeypatch, Silent)
    fails(second('b'), '--save_every=1', says=['the method', 'Silent', 'train:Method'])
    ends_well(second('b'), '--save_every=1', method=Silent)
    fails(second('b'), '--save_every=1', says=['the method', 'Silent'])     # nor is it finished
    fails(second('b'), '--max_steps=13', says=['max_steps', '12', '13'], method=Silent)


# ------------------------------------------------------------------------------
# Frozen parameters

@pytest.mark.parametrize('pattern', ['gpt_neox.embed_in.*', '*layers.0.*', '*.bias', 'embed_out*',
                                     '*.weight'])
@pytest.mark.parametrize('kernels', ['torch', 'auto'])
def test_frozen_parameters_stay(second, pattern, kernels):
    ends_well(second('b', freeze=[pattern], kernels=kernels))
    before, after = saved('out/a')['model']['weights'], saved('out/b', 12)['model']['weights']
    for name in after:
        assert torch.equal(before[name], after[name]) == fnmatch.fnmatchcase(name, pattern), name
    names = list(saved('out/b', 12)['optimizer']['moments'])
    assert names and not fnmatch.filter(names, pattern)


def test_two_processes_freeze_alike(second, forked):
    frozen = dict(freeze=['*embed_in*', '*.bias'])
    ends_well(second('b', **frozen))
    for name, parallel in (('c', 'ddp'), ('d', 'fsdp')):
        codes, err = forked([second(name, parallel=parallel, **frozen)], 2)
        assert codes == [0, 0], err
        for one, two in zip(metrics('out/b', 'train'), metrics(f'out/{name}', 'train')):
            assert one['loss'] == pytest.approx(two['loss'], rel=1e-5)


def test_moments_follow_the_names(second):
    """Under keep_optimizer, each parameter gets its own moments, however they are grouped."""
    frozen = ['*embed_in*', '*mlp*']
    ends_well(second('b', keep_optimizer=True, max_steps=1, warmup=0, freeze=frozen))
    before = saved('out/a')['optimizer']['moments']
    after = saved('out/b', 1)['optimizer']['moments']
    assert len(after) < len(before)
    for name, moments in after.items():
        moment, earlier = moments['exp_avg_sq'], before[name]['exp_avg_sq']
        assert (moment >= 0.949 * earlier).all() and moment.shape == earlier.shape


def test_what_cannot_be_frozen(second, fails):
    fails(second('b', freeze=['layers.0.*']), says=["'layers.0.*'", 'matches no parameter'])
    fails(second('b', freeze=['*']), says=['nothing to train'])
    ends_well(second('c', freeze=['*mlp*']))
    fails(second('d', keep_optimizer=True), '--init_from=out/c', says=['no moments of'])


# ------------------------------------------------------------------------------
# Checkpoints of weights alone

def test_weights_made_elsewhere_start_a_stage(second, fails):
    path = second('b')
    state, model = eval.load_run('out/a')
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    checkpoints.save_weights('out/grown/ckpt_00000000.pt', model, state)
    checkpoints.save_weights('out/bare.pt', model, {})
    ends_well(path, '--init_from=out/grown')
    ends_well(second('c'), '--init_from=out/bare.pt')
    same = [metrics(f'out/{run}', 'train')[0]['loss'] for run in 'bc']
    assert same[0] == pytest.approx(same[1], rel=0.1)
    assert eval.Run('out/b').old == eval.Run('out/c').old == ['old']        # c replays it
    ends_well(second('d', replay=0.0, replay_data={}), '--init_from=out/bare.pt')
    assert eval.Run('out/d').old == []
    fails(second('e'), '--init_from=', '--branch_from=out/grown', '--max_steps=40',
          says=['moments'])
