"""Schedules against the closed forms of their papers, their checks, and their picture."""
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import schedules
from schedules import Phase, ScheduleError, build, first_below, table

PAPER = dict(steps=132366, peak=3e-4, min_lr=3e-5,
    warmup=0.01)        # Ibrahim et al. 2024, one 300B-token stage
PYTHIA = dict(steps=143000, peak=3e-4, min_lr=3e-5, warmup=1430)


def reference(name, t, T, peak, low, W, D):
    """The papers' formulas of t = 1 .. T, written down once more, one step at a time."""
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


FINITE = ['constant', 'cosine', 'cosine_clamped', 'linear', 'wsd']
INFINITE = ['infinite_cosine', 'infinite_inv_sqrt']


def test_every_schedule_has_its_closed_form_below():
    assert sorted(schedules.SCHEDULES) == sorted([*FINITE, *INFINITE, 'repeated_cosine'])


@st.composite
def settings_of(draw):
    T = draw(st.integers(2, 400))
    W = draw(st.integers(0, T - 1))
    D = draw(st.integers(1, T - W))
    peak = draw(st.floats(1e-7, 10))
    return dict(steps=T, warmup=W, decay=D, peak=peak, min_lr=peak * draw(st.floats(1e-3, 1)))


@pytest.mark.parametrize('name', FINITE)
@settings(max_examples=60, deadline=None)
@given(s=settings_of())
def test_every_step_is_the_closed_form(name, s):
    lr = build(name, **s)
    T, W = s['steps'], s['warmup']
    expected = [reference(name, t, T, s['peak'], s['min_lr'], W, s['decay']) for t in range(1, T + 1)]
    rates = np.array([lr(step) for step in range(T)])
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    low = s['peak'] if name == 'constant' else s['min_lr']
    assert (rates > 0).all() and (rates[W:] >= low * (1 - 1e-9)).all()
    assert rates.max() <= s['peak'] * (1 + 1e-9)
    if name != 'cosine_clamped':
        assert lr(T - 1) == pytest.approx(low, rel=1e-9)               # the end value
    assert lr(T) == lr(10 * T) == lr(T - 1) and isinstance(lr(0), float)
    if W:
        assert lr(W - 1) == pytest.approx(s['peak'], rel=1e-12)
    assert lr.phases[0].start == 0 and lr.phases[-1].end == T          # the phases tile the run ...
    for p, after in zip(lr.phases, lr.phases[1:]):
        assert p.end == after.start
    for p in lr.phases:                                                # ... and say their end rates
        assert p.end > p.start and (p.first, p.last) == (lr(p.start), lr(p.end - 1))


@pytest.mark.parametrize('name, values', [      # GPT-NeoX today, and GPT-NeoX v1.0 (which trained Pythia)
    ('cosine', {1430: 3.00e-4, 50000: 2.29e-4, 100000: 8.69e-5, 115139: 5.50e-5, 143000: 3.00e-5}),
    ('cosine_clamped', {1430: 3.00e-4, 50000: 2.22e-4, 100000: 6.60e-5, 115139: 3.00e-5, 143000: 3.00e-5}),
])
def test_values_of_pythia_410m(name, values):
    lr = build(name, **PYTHIA)
    assert {t: float(f'{lr(t - 1):.2e}') for t in values} == values


def test_the_clamped_cosine_reaches_its_floor_at_0_7952():
    lr = build('cosine_clamped', **PYTHIA)
    floor = lr.phases[-1]
    assert floor.name == 'floor' and floor.start == 115139     # the decay's last t = step + 1
    assert lr(115138) == 3e-5 < lr(115137)
    assert round((115139 - 1430) / 143000, 4) == 0.7952
    never = build('cosine_clamped', **{**PAPER, 'min_lr': 1e-9})        # too low a floor is never reached
    assert [p.name for p in never.phases] == ['warmup', 'decay'] and never(132365) > 1e-9


def test_lengths_in_steps_or_as_a_fraction():
    assert build('cosine', **PAPER).phases[0].end == 1324               # 1% of 132,366, as in the paper
    for fraction, count in [(0.01, 1324), (0.5, 66183), (0, 0), (1, 1), (7.0, 7)]:
        lr = build('wsd', **{**PAPER, 'warmup': fraction, 'decay': 0.25})
        assert sum(p.end - p.start for p in lr.phases if p.name == 'warmup') == count
        assert lr.phases[-1].end - lr.phases[-1].start == round(132366 / 4)
    assert build('cosine', steps=1, peak=1.0, min_lr=0.1, warmup=0.01)(0) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_peak():
    for name in ('constant', 'wsd'):
        assert build(name, **{**PAPER, 'warmup': 0})(0) == 3e-4
    for name in ('cosine', 'cosine_clamped',
        'linear'):                 # at the peak but for one step of decay
        assert build(name, **{**PAPER, 'warmup': 0})(0) == pytest.approx(3e-4, rel=1e-5)


def test_knobs_of_other_schedules_are_left_aside():
    assert build('constant', **PAPER, decay=5, batch_size=3)(132365) == 3e-4
    assert build('constant', steps=10, peak=3e-5, min_lr=1)(9) == 3e-5   # takes no min_lr, so none is checked


def test_first_step_below_a_fraction_of_the_peak():
    T, W = 132366, 1324                                    # cosine: invert the formula for rate = peak / 5
    t = W + np.arccos(2 * (0.2 - 0.1) / 0.9 - 1) / np.pi * (T - W)
    assert first_below(build('cosine', **PAPER), 0.2) == int(np.ceil(t)) - 1
    assert first_below(build('wsd', **PAPER, decay=0.1), 0.999) > T * 0.9
    assert first_below(build('linear', **PAPER), 0.1) == T - 1          # min_lr itself, rounding and all
    assert first_below(build('cosine', **PAPER), 0.09) is None and first_below(build('constant', **PAPER),
        0.5) is None


@settings(max_examples=60, deadline=None)
@given(s=settings_of(), name=st.sampled_from(FINITE), fraction=st.floats(0.01, 0.99))
def test_first_below_by_search(s, name, fraction):
    lr = build(name, **s)
    rates = [lr(step) for step in range(s['steps'])]
    top = rates.index(max(rates))
    expected = [i for i in range(top + 1, len(rates)) if rates[i] <= fraction * rates[top] * (1 + 1e-9)]
    assert first_below(lr, fraction) == (expected[0] if expected else None)


@pytest.mark.parametrize('name', ['cosine', 'linear', 'wsd'])
def test_a_decay_to_zero_arrives_with_the_last_step(name):             # an end rate of Parmar et al., Table 8
    lr = build(name, steps=300, peak=3e-4, min_lr=0)
    assert lr(299) == 0 < lr(298) and (lr.rates[:-1] > 0).all()


@pytest.mark.parametrize('name, change, message', [
    ('cosine', dict(warmup=200000), "phase 'decay' would have -67,634"),
    ('cosine', dict(warmup=132366), 'at least one'),
    ('cosine', dict(warmup=-5), "'warmup' would have -5"),
    ('wsd', dict(warmup=0.5, decay=0.6), "'stable' would have -"),
    ('wsd', dict(decay=0), "'decay' needs at least one"), ('cosine', dict(min_lr=1e-3), 'rates out of order'),
    ('cosine_clamped', dict(min_lr=1e-3), 'rates out of order'),
    ('wsd', dict(min_lr=0, decay_shape='exponential'), 'is 0, expected 0 < rate'),
    ('repeated_cosine', dict(min_lr=0), 'is 0, expected 0 < rate'),     # steps that teach nothing, amid the run
    ('cosine_clamped', dict(min_lr=-1), 'rates out of order'),
    ('cosine_clamped', dict(warmup=200000), 'would have -'),
])
def test_an_impossible_schedule_says_why_and_shows_its_phases(name, change, message):
    with pytest.raises(ScheduleError) as error:
        build(name, **{**PAPER, 'decay': 0.1, **change})
    first, header, *rows = str(error.value).split('\n')
    assert message in first and name in first and header.split()[0] == 'phase'
    assert [row.split()[0] for row in rows][0] == 'warmup' and len(rows) >= 2


@pytest.mark.parametrize('change, message', [
    (dict(warmup=1.5), 'found 1.5'), (dict(warmup=-0.1), 'found -0.1'),
    (dict(warmup=float('nan')), 'found nan'), (dict(warmup=1e15), 'found 1000000'),
    (dict(steps=0), 'found 0'), (dict(steps=2.5), 'found 2.5'), (dict(steps=10**12), 'steps must'),
    (dict(peak=0), 'above 0'), (dict(peak=-1), 'above 0'), (dict(peak=float('inf')), 'above 0'),
    (dict(min_lr=float('nan')), 'above 0'),
])
def test_impossible_values(change, message):
    with pytest.raises(ScheduleError, match=message):
        build('cosine', **{**PAPER, **change})


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ScheduleError, match="did you mean 'cosine'.*wsd"):
        build('cosin', **PAPER)


@pytest.mark.parametrize('phases, message', [
    ([Phase('a', 500, lambda u: 1 - u / 2), Phase('b', 500, lambda u: 0.4)],
    "jumps .* where phase 'b' begins"),
    ([Phase('a', 5, lambda u: 1 - u / 2), Phase('none', 0, lambda u: 9), Phase('b', 995, lambda u: 0.4)],
    "'b' begins"),
    ([Phase('a', 1000, lambda u: np.where(u < 0.4, 1, 0.5))], "jumps inside phase 'a', after step 398"),
    ([Phase('a', 1000, lambda u: 1 - u)], 'rate at step 999 is 0'),
    ([Phase('a', 1000, lambda u: u - 0.5)], 'step 0 '),
    ([Phase('a', 1000, lambda u: np.where(u == 0.5, np.nan, 1))], 'step 499 is nan'),
    ([Phase('a', 1000, lambda u: 1 + u)], 'step 0 is 1.001'),
    ([Phase('a', 999, lambda u: 1)], 'fill 999 of 1,000'),
])
def test_a_wrong_new_schedule_is_caught_before_training(monkeypatch, phases, message):
    monkeypatch.setitem(schedules.SCHEDULES, 'mine', lambda steps, peak: phases)
    with pytest.raises(ScheduleError, match=message) as error:
        build('mine', steps=1000, peak=1.0)
    assert 'first lr' in str(error.value)


@pytest.mark.parametrize('curve',
    [lambda u: 1 - 0.9 * np.sqrt(u), lambda u: 0.1 ** u, lambda u: 1 / np.sqrt(1 + 10 * u)])
def test_a_right_new_schedule_is_one_function_and_one_entry(monkeypatch, curve):
    monkeypatch.setitem(schedules.SCHEDULES, 'mine', lambda steps, peak, extra: [Phase('a', steps, curve)])
    assert build('mine', steps=1000, peak=1.0, extra=1, other=2)(499) == pytest.approx(float(curve(0.5)))


def test_checking_every_step_of_a_paper_run_is_quick():
    start = time.perf_counter()
    build('cosine', **PAPER)
    assert time.perf_counter() - start < 3              # takes about 0.01 s; only a loop in Python would show


def test_table():
    lines = table(build('cosine_clamped', **PYTHIA)).split('\n')
    assert [line.split() for line in lines[1:]] == [
        ['warmup', '0', '1,430', '1,430', '2.098e-07', '3.000e-04'],
        ['decay', '1,430', '115,139', '113,709', '3.000e-04', '3.000e-05'],
        ['floor', '115,139', '143,000', '27,861', '3.000e-05', '3.000e-05']]


def test_drawing_a_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / 'script.py'
    script.write_text("class Config:\n    schedule: str = 'cosine'\n    learning_rate: float = 3e-4\n"
                      "    min_lr: float = 3e-5\n"
                      "    warmup: float = 0.01\n    decay: float = 0.1\n    max_steps: int = 1000\n")
    (tmp_path / 'x.py').write_text("schedule = 'wsd'\n")
    assert not schedules.main(['x.py', '--warmup=0.2', '--out', 'a.png'], script)
    from matplotlib.image import imread
    picture = imread('a.png')
    assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, 4), axis=0)) > 10
    printed = capsys.readouterr().out
    assert 'stable' in printed and '200' in printed and 'a.png' in printed
    for argv in (['x.py', '--warmup=2000'], ['--shedule=wsd'], ['none.py'], ['--out']):
        assert schedules.main(argv, script) == 2
        assert capsys.readouterr().err


# --- infinite, repeated and the shapes of wsd -----------------------------------------------------------------

@pytest.mark.parametrize('name', INFINITE)
@settings(max_examples=60, deadline=None)
@given(st.integers(4, 400), st.data(), st.floats(1e-7, 10), st.floats(1e-3, 1), st.floats(1e-2, 1), st.floats(0.1, 50))
def test_every_step_of_an_infinite_schedule_is_the_closed_form(name, T, data, peak, share, part, timescale):
    C, A = sorted(data.draw(st.lists(st.integers(2, T - 1), min_size=2, max_size=2)))
    W = data.draw(st.integers(0, C - 1))
    mid = peak * share
    low = mid * part
    lr = build(name, steps=T, peak=peak, constant_lr=mid, min_lr=low, warmup=W, cooldown=C, anneal=A,
               timescale=timescale)
    for t in range(1, T + 1):
        u = (t - W) / (C - W)
        if t <= W:
            expected = peak * t / W
        elif t <= C and name == 'infinite_cosine':
            expected = mid + (peak - mid) * np.cos(np.pi * u / 2)**2
        elif t <= C:
            expected = peak + (mid - peak) * ((1 + timescale * u)**-0.5 - 1) / ((1 + timescale)**-0.5 - 1)
        else:
            expected = mid * (low / mid)**(max(t - A, 0) / (T - A))
        assert lr(t - 1) == pytest.approx(expected, rel=1e-7)
    assert lr(T - 1) == lr(T) == pytest.approx(low)


IBRAHIM = dict(steps=132_366, peak=3e-4, constant_lr=1.65e-4, min_lr=3e-5)      # their 405M runs


def test_infinite_schedules_take_the_authors_values():
    """Learning rates of the authors' own code, where 60% and 25% are lengths that begin after 1% of warmup."""
    cos, inv = (schedules.build(name, **IBRAHIM, cooldown=0.61, anneal=0.86) for name in INFINITE)
    for fraction, a, b in [(0.05, 2.985e-4, 2.564e-4), (0.10, 2.926e-4, 2.290e-4), (0.20, 2.693e-4, 2.014e-4),
                           (0.30, 2.360e-4, 1.867e-4), (0.50, 1.759e-4, 1.706e-4), (0.61, 1.65e-4, 1.65e-4),
                           (0.849, 1.65e-4, 1.65e-4), (0.90, 1.014e-4, 1.014e-4), (0.95, 5.515e-5, 5.515e-5),
                           (1.0, 3e-5, 3e-5)]:
        step = round(fraction * IBRAHIM['steps']) - 1
        assert cos(step) == pytest.approx(a, rel=5e-4) and inv(step) == pytest.approx(b, rel=5e-4)
    ends = schedules.build('infinite_cosine', **IBRAHIM).phases                     # of their runs: ends at 60% and 85%
    assert [p.end for p in ends] == [1_324, 79_420, 112_511, 132_366]


@pytest.mark.parametrize('name, shape', [('infinite_cosine', [3.00, 2.80, 2.32, 1.85, 1.65]),
                                         ('infinite_inv_sqrt', [3.00, 2.10, 1.86, 1.73, 1.65])])
def test_shape_of_the_cooldown(name, shape):
    lr = schedules.build(name, **{**IBRAHIM, 'steps': 100_000}, warmup=1_000, cooldown=61_000)
    assert [lr(999 + round(u * 60_000)) * 1e4 for u in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(shape, abs=6e-3)


def test_infinite_ends_in_steps_are_those_in_fractions_and_a_main_line_never_anneals():
    fractions = schedules.build('infinite_cosine', **{**IBRAHIM, 'steps': 1000})
    steps = schedules.build('infinite_cosine', **{**IBRAHIM, 'steps': 1000}, warmup=10, cooldown=600, anneal=850)
    assert (fractions.rates == steps.rates).all()
    line = schedules.build('infinite_cosine', **{**IBRAHIM, 'steps': 1000}, anneal=1000)
    assert [p.name for p in line.phases] == ['warmup', 'cooldown', 'constant'] and line(999) == 1.65e-4
    assert (line.rates[:850] == fractions.rates[:850]).all()                # what a branch off it goes on from
    onward = schedules.build('infinite_cosine', **{**IBRAHIM, 'steps': 1000}, warmup=0, cooldown=0, anneal=1000)
    assert set(onward.rates) == {1.65e-4}                                   # the next dataset: no re-warming


@pytest.mark.parametrize('changes, says', [(dict(constant_lr=4e-4), 'out of order'), (dict(constant_lr=2e-5), 'order'),
                                           (dict(constant_lr=0.0), 'order'), (dict(cooldown=0.9), 'constant'),
                                           (dict(cooldown=5), 'cooldown'), (dict(anneal=2000), 'anneal')])
def test_infinite_schedules_that_cannot_be_right_show_their_table(changes, says):
    with pytest.raises(schedules.ScheduleError, match=says) as error:
        schedules.build('infinite_cosine', **{**IBRAHIM, 'steps': 1000, **changes})
    assert 'from step' in str(error.value)


def test_repeated_cosine_is_the_cosine_again_and_again():
    lr = schedules.build('repeated_cosine', steps=3000, peak=3e-4, min_lr=3e-5, warmup=0.01, repeats=3)
    once = schedules.build('cosine', steps=1000, peak=3e-4, min_lr=3e-5, warmup=0.01)
    assert (lr.rates[:1000] == once.rates).all() and (lr.rates[1010:2000] == once.rates[10:]).all()
    u = np.arange(1, 11) / 10
    assert lr.rates[2000:2010] == pytest.approx(3e-5 + 2.7e-4 * u)          # re-warmed from the old end
    uneven = schedules.build('repeated_cosine', steps=1001, peak=1, min_lr=0.1)
    assert uneven.phases[-1].end == 1001


@pytest.mark.parametrize('shape, f', [('linear', lambda u: 0.1 + 0.9 * (1 - u)), ('1-sqrt', lambda u: 1 - 0.9 * u**0.5),
                                      ('cosine', lambda u: 0.55 + 0.45 * np.cos(np.pi * u)),
                                      ('exponential', lambda u: 10 ** -u)])
def test_shapes_of_the_final_decay(shape, f):
    lr = schedules.build('wsd', steps=1000, peak=1.0, min_lr=0.1, warmup=10, decay=200, decay_shape=shape)
    assert lr.rates[800:] == pytest.approx(f(np.arange(1, 201) / 200)) and set(lr.rates[10:800]) == {1.0}
    with pytest.raises(schedules.ScheduleError, match='1-sqrt'):
        schedules.build('wsd', steps=1000, peak=1.0, min_lr=0.1, decay_shape='sqrt')


def test_cosine_of_parmar_reaches_its_switch_points():
    """From the old final rate to a hundredth, no warmup; halves, fifths, ... at the fractions that follow."""
    lr = schedules.build('cosine', steps=63_578, peak=4.5e-5, min_lr=4.5e-7, warmup=0)
    for part, fraction in ((2, 0.503), (5, 0.711), (10, 0.805), (50, 0.936)):
        assert schedules.first_below(lr, 1 / part) / 63_578 == pytest.approx(fraction, abs=6e-4)
