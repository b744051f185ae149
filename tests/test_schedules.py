"""schedules.py against the closed forms of the papers, its checks, and its picture."""
import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import schedules
import train
from configurator import UserError
from schedules import Phase, table

PAPER = dict(steps=132_366, peak=3e-4, min_lr=3e-5, warmup=0.01)    # Ibrahim et al., 300B tokens
PYTHIA = dict(steps=143_000, peak=3e-4, min_lr=3e-5, warmup=1430)
IBRAHIM = dict(steps=132_366, peak=3e-4, constant_lr=1.65e-4, min_lr=3e-5)      # infinite, 405M


def build(name, **knobs):
    """The schedule of that name. Knobs that are not given have the defaults of train.py."""
    return schedules.build(name, **vars(train.Config()) | knobs)


INFINITE = ['infinite_cosine', 'infinite_inv_sqrt']
FINITE = [name for name in schedules.SCHEDULES if name not in (*INFINITE, 'repeated_cosine')]


# ------------------------------------------------------------------------------
# Closed forms: the papers' formulas of t = 1, ..., T, written down once more, one step at a time.
# A schedule of your own needs one too: add it to reference().

def reference(name, t, T, peak, low, W, D, **_):
    if t <= W:
        return peak * t / W
    if name == 'constant':
        return peak
    if name == 'cosine':
        return low + (peak - low) / 2 * (1 + np.cos(np.pi * (t - W) / (T - W)))
    if name == 'cosine_clamped':
        return max(low, 0.5 * peak * (1 + np.cos(np.pi * (t - W) / T)))
    if name == 'linear':
        return (peak * (T - t) + low * (t - W)) / (T - W)
    if name == 'wsd':
        return peak if t <= T - D else (peak * (T - t) + low * (t - T + D)) / D
    raise AssertionError(f'{name} has no closed form here. Add it.')


def infinite_reference(name, t, T, peak, low, W, C, A, middle, timescale):
    if t <= W:
        return peak * t / W
    u = (t - W) / (C - W)
    if t <= C and name == 'infinite_cosine':
        return middle + (peak - middle) * np.cos(np.pi * u / 2)**2
    if t <= C:
        part = ((1 + timescale * u)**-0.5 - 1) / ((1 + timescale)**-0.5 - 1)
        return peak + (middle - peak) * part
    return middle * (low / middle)**(max(t - A, 0) / (T - A))


@st.composite
def lengths_and_rates(draw):
    T = draw(st.integers(2, 300))
    W = draw(st.integers(0, T - 1))
    peak = draw(st.floats(1e-7, 10))
    return dict(T=T, W=W, D=draw(st.integers(1, T - W)), peak=peak,
                low=peak * draw(st.floats(1e-3, 1)))


def run_of(name, s):
    return build(name, steps=s['T'], peak=s['peak'], min_lr=s['low'], warmup=s['W'], decay=s['D'])


@pytest.mark.parametrize('name', FINITE)
@settings(max_examples=40, deadline=None)
@given(s=lengths_and_rates())
def test_every_step_is_the_closed_form(name, s):
    lr = run_of(name, s)
    T, W = s['T'], s['W']
    has_end = 'min_lr' in inspect.signature(schedules.SCHEDULES[name]).parameters
    low = s['low'] if has_end else 0
    expected = [reference(name, t, **s) for t in range(1, T + 1)]
    rates = np.array([lr(step) for step in range(T)])
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    assert (rates > 0).all() and (rates[W:] >= low * (1 - 1e-9)).all()
    assert rates.max() <= s['peak'] * (1 + 1e-9)
    if has_end and name != 'cosine_clamped':
        assert rates[-1] == pytest.approx(low, rel=1e-9)
    assert lr(T) == lr(10 * T) == rates[-1] and type(lr(0)) is float

    # the phases cover the run and know their first and last rates
    assert [p.start for p in lr.phases] == [0, *(p.end for p in lr.phases[:-1])]
    assert lr.phases[-1].end == T
    for phase in lr.phases:
        assert (phase.first, phase.last) == (lr(phase.start), lr(phase.end - 1))


@pytest.mark.parametrize('name', INFINITE)
@settings(max_examples=40, deadline=None)
@given(draw=st.data(), T=st.integers(4, 300), peak=st.floats(1e-7, 10), share=st.floats(1e-3, 1),
       part=st.floats(1e-2, 1), timescale=st.floats(0.1, 50))
def test_every_step_of_an_infinite_schedule_is_the_closed_form(name, draw, T, peak, share, part,
                                                               timescale):
    C, A = sorted(draw.draw(st.lists(st.integers(2, T - 1), min_size=2, max_size=2)))
    W = draw.draw(st.integers(0, C - 1))
    middle, low = peak * share, peak * share * part
    lr = build(name, steps=T, peak=peak, constant_lr=middle, min_lr=low, warmup=W, cooldown=C,
               anneal=A, timescale=timescale)
    expected = [infinite_reference(name, t, T, peak, low, W, C, A, middle, timescale)
                for t in range(1, T + 1)]
    np.testing.assert_allclose(lr.rates, expected, rtol=1e-7)
    assert [p.name for p in lr.phases if p.start >= C] == (
        ['constant', 'anneal'] if A > C else ['anneal'])


@pytest.mark.parametrize('name, values', [      # GPT-NeoX today, and v1.0, which trained Pythia
    ('cosine', {1430: 3.00e-4, 50000: 2.29e-4, 100000: 8.69e-5, 115139: 5.50e-5, 143000: 3.00e-5}),
    ('cosine_clamped', {1430: 3.00e-4, 50000: 2.22e-4, 100000: 6.60e-5, 115139: 3.00e-5,
                        143000: 3.00e-5}),
])
def test_the_rates_of_pythia_410m(name, values):
    lr = build(name, **PYTHIA)
    assert {t: float(f'{lr(t - 1):.2e}') for t in values} == values


def test_the_clamped_cosine_reaches_its_floor_at_0_7952():
    lr = build('cosine_clamped', **PYTHIA)
    floor = lr.phases[-1]
    assert floor.name == 'floor' and floor.start == 115_139
    assert round((floor.start - 1430) / 143_000, 4) == 0.7952
    assert lr(115_138) == 3e-5 < lr(115_137)
    never = build('cosine_clamped', **PAPER | {'min_lr': 1e-9})     # a floor below its last rate
    assert [p.name for p in never.phases] == ['warmup', 'decay'] and never(132_365) > 1e-9


def test_infinite_schedules_take_the_values_of_the_authors():
    """There 60% and 25% are lengths that begin after 1% of warmup."""
    cos, inv = (build(name, **IBRAHIM, cooldown=0.61, anneal=0.86) for name in INFINITE)
    for fraction, a, b in [(0.05, 2.985e-4, 2.564e-4), (0.10, 2.926e-4, 2.290e-4),
                           (0.20, 2.693e-4, 2.014e-4), (0.30, 2.360e-4, 1.867e-4),
                           (0.50, 1.759e-4, 1.706e-4), (0.61, 1.65e-4, 1.65e-4),
                           (0.849, 1.65e-4, 1.65e-4), (0.90, 1.014e-4, 1.014e-4),
                           (0.95, 5.515e-5, 5.515e-5), (1.0, 3e-5, 3e-5)]:
        step = round(fraction * IBRAHIM['steps']) - 1
        assert cos(step) == pytest.approx(a, rel=5e-4)
        assert inv(step) == pytest.approx(b, rel=5e-4)
    ends = [phase.end for phase in build('infinite_cosine', **IBRAHIM).phases]
    assert ends == [1_324, 79_420, 112_511, 132_366]        # of the paper's runs: 1, 60 and 85%


def test_a_main_line_never_anneals_and_its_branches_continue_it():
    T = IBRAHIM | {'steps': 1000}
    fractions = build('infinite_cosine', **T)
    steps = build('infinite_cosine', **T, warmup=10, cooldown=600, anneal=850)
    assert (fractions.rates == steps.rates).all()
    line = build('infinite_cosine', **T, anneal=1000)
    assert [p.name for p in line.phases] == ['warmup', 'cooldown', 'constant']
    assert line(999) == 1.65e-4 and (line.rates[:850] == fractions.rates[:850]).all()
    onward = build('infinite_cosine', **T, warmup=0, cooldown=0, anneal=1000)
    assert set(onward.rates) == {1.65e-4}                   # the next dataset is not re-warmed


def test_repeated_cosine_is_the_cosine_once_for_each_dataset():
    rates = dict(peak=3e-4, min_lr=3e-5, warmup=0.01)
    lr = build('repeated_cosine', steps=3000, **rates, repeats=3)
    once = build('cosine', steps=1000, **rates)
    assert (lr.rates[:1000] == once.rates).all()
    assert (lr.rates[1010:2000] == once.rates[10:]).all()
    u = np.arange(1, 11) / 10
    assert lr.rates[2000:2010] == pytest.approx(3e-5 + 2.7e-4 * u)      # re-warmed from min_lr
    assert build('repeated_cosine', steps=1001, **rates).phases[-1].end == 1001
    assert (build('repeated_cosine', steps=1000, **rates, repeats=1).rates == once.rates).all()


@pytest.mark.parametrize('shape, f', [
    ('linear', lambda u: 0.1 + 0.9 * (1 - u)), ('1-sqrt', lambda u: 1 - 0.9 * u**0.5),
    ('cosine', lambda u: 0.55 + 0.45 * np.cos(np.pi * u)), ('exponential', lambda u: 10 ** -u)])
def test_the_shapes_of_a_final_decay(shape, f):
    lr = build('wsd', steps=1000, peak=1.0, min_lr=0.1, warmup=10, decay=200, decay_shape=shape)
    assert lr.rates[800:] == pytest.approx(f(np.arange(1, 201) / 200))
    assert set(lr.rates[10:800]) == {1.0}


def test_lengths_are_steps_or_fractions_of_the_run():
    assert build('cosine', **PAPER).phases[0].end == 1324       # 1% of 132,366, as in the paper
    for length, steps in [(0.01, 1324), (0.5, 66_183), (0, 0), (1, 1), (7.0, 7)]:
        lr = build('wsd', **PAPER | {'warmup': length, 'decay': 0.25})
        assert sum(p.end - p.start for p in lr.phases if p.name == 'warmup') == steps
        assert lr.phases[-1].end - lr.phases[-1].start == round(132_366 / 4)
    assert build('cosine', steps=1, peak=1.0, min_lr=0.1, warmup=0.01)(0) == pytest.approx(0.1)


def test_without_warmup_a_run_starts_at_its_peak():
    """This holds because the schedules of this file decay slowly: in the first of 132,366 steps by
    less than 1e-5. It says nothing of one that falls at once."""
    for name in FINITE:
        lr = build(name, **PAPER | {'warmup': 0})
        assert lr(0) == pytest.approx(3e-4, rel=1e-5)           # less one step of decay


def test_knobs_of_other_schedules_are_left_aside():
    assert build('constant', **PAPER, decay=5, batch_size=3)(132_365) == 3e-4


@pytest.mark.parametrize('name', ['cosine', 'linear', 'wsd'])
def test_a_decay_to_zero_arrives_with_the_last_step(name):     # as in Parmar et al., Table 8
    lr = build(name, steps=300, peak=3e-4, min_lr=0)
    assert lr(299) == 0 < lr(298) and (lr.rates[:-1] > 0).all()


# ------------------------------------------------------------------------------
# The first step below a fraction of the peak

@settings(max_examples=60, deadline=None)
@given(s=lengths_and_rates(), name=st.sampled_from(FINITE), fraction=st.floats(0.01, 0.99))
def test_first_below_is_what_a_search_finds(s, name, fraction):
    lr = run_of(name, s)
    rates = lr.rates.tolist()
    top = rates.index(max(rates))
    low = fraction * rates[top] * (1 + 1e-9)
    expected = [step for step in range(top + 1, len(rates)) if rates[step] <= low]
    assert lr.first_below(fraction) == (expected[0] if expected else None)


def test_first_below_by_formula():
    T, W = 132_366, 1324                        # solve the cosine for rate = peak / 5
    t = W + np.arccos(2 * (0.2 - 0.1) / 0.9 - 1) / np.pi * (T - W)
    cosine = build('cosine', **PAPER)
    assert cosine.first_below(0.2) == int(np.ceil(t)) - 1
    assert build('wsd', **PAPER, decay=0.1).first_below(0.999) > T * 0.9
    assert build('linear', **PAPER).first_below(0.1) == T - 1      # min_lr, rounding and all
    assert cosine.first_below(0.09) is None
    assert build('constant', **PAPER).first_below(0.5) is None


def test_the_cosine_of_parmar_reaches_its_switch_points():
    """From the old final rate to a hundredth of it, without warmup."""
    lr = build('cosine', steps=63_578, peak=4.5e-5, min_lr=4.5e-7, warmup=0)
    for part, fraction in ((2, 0.503), (5, 0.711), (10, 0.805), (50, 0.936)):
        assert lr.first_below(1 / part) / 63_578 == pytest.approx(fraction, abs=6e-4)


# ------------------------------------------------------------------------------
# What is refused

@pytest.mark.parametrize('name, change, message', [
    ('cosine', dict(warmup=200_000), "'decay' would have -67,634 of 132,366 steps"),
    ('cosine', dict(warmup=132_366), "'decay' needs at least one step"),
    ('cosine', dict(warmup=-5), "'warmup' would have -5"),
    ('cosine_clamped', dict(warmup=200_000), "'decay' would have -67,634"),
    ('wsd', dict(warmup=0.5, decay=0.6), "'stable' would have -"),
    ('wsd', dict(decay=0), "'decay' needs at least one step"),
    ('infinite_cosine', dict(warmup=0.7), "'cooldown' would have -"),
    ('infinite_cosine', dict(cooldown=0.9), "'constant' would have -"),
    ('infinite_cosine', dict(anneal=200_000), "'anneal' would have -"),
    ('infinite_cosine', dict(constant_lr=4e-4), 'rates must rise'),
    ('infinite_cosine', dict(constant_lr=2e-5), 'rates must rise'),
    ('cosine', dict(min_lr=1e-3), 'rates must rise'),
    ('cosine', dict(min_lr=-1), 'rates must rise'),
    ('cosine', dict(min_lr=float('nan')), 'rates must rise'),
    ('cosine', dict(warmup=1.5), '1.5 is neither whole steps nor a fraction'),
    ('cosine', dict(warmup=-0.1), '-0.1 is neither'),
    ('cosine', dict(warmup=float('nan')), 'length is above'),
    ('cosine', dict(warmup=1e15), 'length is above'),
    ('cosine', dict(steps=0), 'max_steps must be 1 to'),
    ('cosine', dict(steps=10**12), 'max_steps must be 1 to'),
    ('cosine', dict(peak=0), 'learning_rate must be above 0'),
    ('cosine', dict(peak=-1), 'learning_rate must be above 0'),
    ('cosine', dict(peak=float('inf')), 'learning_rate must be above 0'),
    ('repeated_cosine', dict(repeats=0), 'repeats must be 1 to 1,000'),
    ('repeated_cosine', dict(repeats=-1), 'repeats must be 1 to 1,000'),
    ('repeated_cosine', dict(repeats=10**9), 'repeats must be 1 to 1,000'),
    ('wsd', dict(decay_shape='sqrt'), 'one of linear, cosine, 1-sqrt, exponential'),
    ('cosin', {}, r"Did you mean 'cosine'\?.*wsd"),
])
def test_an_impossible_schedule_gets_one_message(name, change, message):
    knobs = PAPER | {'decay': 0.1, 'constant_lr': 1.65e-4} | change
    with pytest.raises(UserError, match=message) as error:
        build(name, **knobs)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, change, message', [
    ('wsd', dict(decay_shape='exponential'), 'is 0, but must be above 0'),
    ('repeated_cosine', dict(repeats=3), 'is 0, but must be above 0'),
    ('repeated_cosine', dict(warmup=0, min_lr=3e-5), "jumps .* where phase 'decay' begins"),
])
def test_impossible_rates_are_shown_with_the_phases(name, change, message):
    with pytest.raises(UserError, match=message) as error:
        build(name, **PAPER | {'min_lr': 0} | change)
    assert 'first lr' in str(error.value)


@pytest.mark.parametrize('phases, message', [
    ([Phase('a', 500, lambda u: 1 - u / 2), Phase('b', 500, lambda u: 0.4)],
     "jumps from 0.5 to 0.4 where phase 'b' begins"),
    ([Phase('a', 5, lambda u: 1 - u / 2), Phase('none', 0, lambda u: 9),
      Phase('b', 995, lambda u: 0.4)], "'b' begins"),
    ([Phase('a', 1000, lambda u: 1 - u)], 'rate at step 999 is 0'),
    ([Phase('a', 1000, lambda u: u - 0.5)], 'step 0 '),
    ([Phase('a', 1000, lambda u: np.where(u == 0.5, np.nan, 1))], 'step 499 is nan'),
    ([Phase('a', 1000, lambda u: 1 + u)], 'step 0 is 1.001'),
    ([Phase('a', 999, lambda u: 1)], 'cover 999 of 1,000'),
])
def test_a_mistake_in_a_new_schedule_is_found_before_training(monkeypatch, phases, message):
    monkeypatch.setitem(schedules.SCHEDULES, 'mine', lambda steps, peak: phases)
    with pytest.raises(UserError, match=message):
        build('mine', steps=1000, peak=1.0)


@pytest.mark.parametrize('curve', [lambda u: 1 - 0.9 * np.sqrt(u), lambda u: 0.1 ** u,
                                   lambda u: 1 / np.sqrt(1 + 10 * u)])
def test_a_new_schedule_is_one_function_and_one_entry(monkeypatch, curve):
    def mine(steps, peak, extra):
        return [Phase('a', steps, curve)]
    monkeypatch.setitem(schedules.SCHEDULES, 'mine', mine)
    lr = build('mine', steps=1000, peak=1.0, extra=1, other=2)
    assert lr(499) == pytest.approx(float(curve(0.5)))


# ------------------------------------------------------------------------------
# Table and picture

def test_the_table_of_phases():
    lines = table(build('cosine_clamped', **PYTHIA)).split('\n')
    assert [line.split() for line in lines[1:]] == [
        ['warmup', '0', '1,430', '1,430', '2.098e-07', '3.000e-04'],
        ['decay', '1,430', '115,139', '113,709', '3.000e-04', '3.000e-05'],
        ['floor', '115,139', '143,000', '27,861', '3.000e-05', '3.000e-05']]


def test_the_command_prints_and_draws_a_config(tmp_path, monkeypatch, capsys):
    from matplotlib.image import imread
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x.py').write_text("schedule = 'wsd'\nmax_steps = 1000\n")
    assert not schedules.main(['x.py', '--warmup=0.2'])
    printed = capsys.readouterr().out
    assert 'stable' in printed and '200' in printed and printed.endswith('out/schedule.png\n')
    picture = imread('out/schedule.png')
    assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, 4), axis=0)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'x.py']

    drawn = []
    monkeypatch.setattr(schedules, 'draw', lambda lr, title, out: drawn.append((title, out)))
    assert not schedules.main(['--out', 'b/a.png', 'x.py'])
    assert drawn == [('wsd  x.py', 'b/a.png')]


def test_the_command_ends_with_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x.py').write_text('')
    for argv, message in [(['x.py', '--warmup=2000'], "'decay' would have"),
                          (['--shedule=wsd'], 'unknown key'), (['none.py'], 'no config file'),
                          (['--schedule=repeated_cosine', '--repeats=0'], 'repeats must be'),
                          (['x.py', '--out', 'x.py/a.png'], 'x.py'), (['--out=a.abc'], 'abc')]:
        assert schedules.main(argv) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        schedules.main(['--help'])
    assert not ended.value.code and 'python schedules.py config/x.py' in capsys.readouterr().out
