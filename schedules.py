"""Learning-rate schedules: every one a list of phases, each phase a curve with its equation and source.

    python schedules.py config/x.py [--key=value] [--out FILE.png]      draws the schedule of a config

Symbols are those of the papers: t = 1, 2, ..., T counts optimizer steps (t = step + 1, so the first step
trains at a positive rate and step T - 1 at the end value), W = warmup steps, and inside a phase
u = steps done in it / its length runs over (0, 1].

Sources: Gupta et al. 2023, arXiv:2308.04014; Ibrahim et al. 2024, arXiv:2403.08763; Hu et al. 2024
(MiniCPM), arXiv:2404.06395; Parmar et al. 2024, arXiv:2407.07263.
"""

import difflib
import inspect
import math
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

Phase = namedtuple('Phase', 'name length curve')      # length in steps; curve(u in (0, 1]) -> learning rate
Row = namedtuple('Row', 'name start end first last')  # a phase as run: steps start .. end - 1, its end rates


class ScheduleError(ValueError):
    """A schedule that cannot be right; the message ends with its phase table."""


# To add a schedule, write a function that returns its phases, and name it in SCHEDULES. Its arguments are
# knobs of the config, but for steps (= max_steps) and peak (= learning_rate).

def in_steps(length, steps):
    """A phase length, given in steps (1, 2, ...) or as a fraction of the run (0 < x < 1) -> whole steps."""
    if 0 < length < 1:
        return round(length * steps)
    if not float(length).is_integer() or abs(length) > 10**8:
        raise ScheduleError(f'a phase length is in whole steps or a fraction below 1, found {length}')
    return int(length)


def ramp(peak, W):
    """Linear warmup from 0: eta = peak * t / W (Ibrahim et al. eq. 1). Starting it again is re-warming."""
    return Phase('warmup', W, lambda u: peak * u)


def constant(steps, peak, warmup=0):
    """eta = peak after warmup; without one, the `no re-warming` baseline of Ibrahim et al.."""
    W = in_steps(warmup, steps)
    return [ramp(peak, W), Phase('constant', steps - W, lambda u: peak)]


def cosine(steps, peak, min_lr, warmup=0):
    """eta = min_lr + (peak - min_lr)/2 * (1 + cos(pi*(t - W)/(T - W)))  (Ibrahim et al. eq. 2; NeoX now).

    Parmar et al.: peak = the old run's final rate, min_lr = peak/100, warmup = 0.
    """
    W = in_steps(warmup, steps)
    return [ramp(peak, W),
            Phase('decay', steps - W, lambda u: min_lr + (peak - min_lr) / 2 * (1 + np.cos(np.pi * u)))]


def cosine_clamped(steps, peak, min_lr, warmup=0):
    """eta = max(min_lr, peak/2 * (1 + cos(pi * (t - W)/T)))   (GPT-NeoX v1: Pythia and Gupta et al.).

    The cosine aims at 0, not at min_lr, and is cut off there. With min_lr = peak/10 it arrives at
    (t - W)/T = arccos(-0.8)/pi = 0.7952 and stays: Pythia spent its last 58B tokens at min_lr.
    """
    W = in_steps(warmup, steps)
    to_floor = math.ceil(np.arccos(np.clip(2 * min_lr / peak - 1, -1, 1)) / np.pi * steps)
    D = max(1, min(to_floor, steps - W))
    decay = Phase('decay', D, lambda u: np.maximum(min_lr, peak / 2 * (1 + np.cos(np.pi * u * D / steps))))
    floor = Phase('floor', steps - W - D, lambda u: min_lr)
    return [ramp(peak, W), decay, floor] if floor.length else [ramp(peak, W), decay]


def linear(steps, peak, min_lr, warmup=0):
    """eta = peak + (min_lr - peak) * (t - W)/(T - W); NeoX's `linear` aims at 0 and clips at min_lr."""
    W = in_steps(warmup, steps)
    return [ramp(peak, W), Phase('decay', steps - W, lambda u: peak + (min_lr - peak) * u)]


DECAYS = {      # from 1 to 0 over u
    'linear': lambda u: 1 - u,
    'cosine': lambda u: (1 + np.cos(np.pi * u)) / 2,
    '1-sqrt': lambda u: 1 - np.sqrt(u)}                     # Haegele et al. 2024, arXiv:2405.18392


def wsd(steps, peak, min_lr, warmup=0, decay=0.1, decay_shape='linear'):
    """Warmup-stable-decay (Hu et al.): eta = min_lr + (peak - min_lr) * f(u) over the last `decay` steps.

    decay_shape: f of DECAYS, or 'exponential': eta = peak * (min_lr/peak)^u. The stable part fixes no budget:
    branch from any checkpoint of it, with a decay of its own.
    """
    W, D = in_steps(warmup, steps), in_steps(decay, steps)
    if decay_shape not in (*DECAYS, 'exponential'):
        raise ScheduleError(f'decay_shape is {decay_shape!r}; there are: {", ".join(DECAYS)}, exponential')
    f = DECAYS.get(decay_shape)
    fall = (lambda u: min_lr + (peak - min_lr) * f(u)) if f else (lambda u: geometric(peak, min_lr, u))
    return [ramp(peak, W), Phase('stable', steps - W - D, lambda u: peak), Phase('decay', D, fall)]


def geometric(start, end, u):
    """start * (end/start)^u, which falls by the same factor every step."""
    return start ** (1 - u) * end ** u


def infinite(cool, steps, peak, min_lr, constant_lr, warmup, cooldown, anneal):
    # cooldown and anneal say where the cooldown ends and where the anneal begins: a step, or a fraction of the run.
    W, C, A = (in_steps(x, steps) for x in (warmup, cooldown, anneal))
    phases = [ramp(peak, W), Phase('cooldown', C - W, cool), Phase('constant', A - C, lambda u: constant_lr),
              Phase('anneal', steps - A, lambda u: geometric(constant_lr, min_lr, u))]
    return phases[:-1] if A == steps else phases            # a main line that others branch off never anneals


def infinite_cosine(steps, peak, min_lr, constant_lr, warmup=0.01, cooldown=0.6, anneal=0.85):
    """Warmup, cooldown, constant, anneal (Ibrahim et al. section 7, Cosine-Inf): no budget needs to be fixed.

    Cooldown: eta = constant_lr + (peak - constant_lr)/2 * (1 + cos(pi*u)). Anneal: constant_lr * (min_lr /
    constant_lr)^u, to release a model; the next dataset goes on from before it, so it needs no re-warming.
    """
    return infinite(lambda u: constant_lr + (peak - constant_lr) / 2 * (1 + np.cos(np.pi * u)),
                    steps, peak, min_lr, constant_lr, warmup, cooldown, anneal)


def infinite_inv_sqrt(steps, peak, min_lr, constant_lr, warmup=0.01, cooldown=0.6, anneal=0.85, timescale=10.0):
    """The same with eta = peak + (constant_lr - peak) * h(u)/h(1), h(u) = 1/sqrt(1 + timescale*u) - 1 (InvSqrt-Inf)."""
    def h(u):
        return 1 / np.sqrt(1 + timescale * u) - 1
    return infinite(lambda u: peak + (constant_lr - peak) * h(u) / h(1),
                    steps, peak, min_lr, constant_lr, warmup, cooldown, anneal)


def repeated_cosine(steps, peak, min_lr, warmup=0.01, repeats=3):
    """The cosine once for each of `repeats` datasets of equal length, re-warmed from min_lr at every boundary.

    The baseline of the infinite schedules (Ibrahim et al., Fig. 10). warmup: steps, or a fraction, of one dataset.
    """
    phases, bounds = [], [round(i * steps / repeats) for i in range(repeats + 1)]
    for start, end in zip(bounds, bounds[1:]):
        first, fall = cosine(end - start, peak, min_lr, warmup)
        phases += [first._replace(curve=lambda u: min_lr + (peak - min_lr) * u) if phases else first, fall]
    return phases


SCHEDULES = {'constant': constant, 'cosine': cosine, 'cosine_clamped': cosine_clamped, 'linear': linear,
             'wsd': wsd, 'infinite_cosine': infinite_cosine, 'infinite_inv_sqrt': infinite_inv_sqrt,
             'repeated_cosine': repeated_cosine}


class Schedule:
    """lr(step) -> learning rate of a 0-based step; beyond the end, the last one. `phases` holds its Rows."""

    def __init__(self, phases):
        self.phases, rates, end = [], [], 0
        for name, length, curve in phases:
            u = np.arange(1, length + 1) / length if length else np.empty(0)
            rates.append(np.broadcast_to(curve(u), u.shape).astype(float))
            first, last = rates[-1][[0, -1]] if len(u) else (math.nan, math.nan)
            self.phases.append(Row(name, end, end := end + length, float(first), float(last)))
        self.rates = np.concatenate(rates)          # every step, once: nothing can go wrong at step 100,000

    def __call__(self, step):
        return float(self.rates[min(step, len(self.rates) - 1)])


def build(name, **knobs):
    """The schedule of that name as a checked lr(step); see Schedule.

    knobs: steps (T), peak, and min_lr, warmup, decay, ... as the schedule takes them; the others are left
    aside, so a whole config may be given. Lengths are in steps or, below 1, a fraction of the run.
    ScheduleError, with the phase table: lengths that do not fill the run, rates out of order, not finite, not
    positive, or with a jump.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ScheduleError(f'no schedule {name!r}; did you mean {near!r}? There are: {", ".join(SCHEDULES)}')
    knobs = {k: knobs[k] for k in inspect.signature(SCHEDULES[name]).parameters if k in knobs}
    steps, peak, min_lr = knobs['steps'], knobs['peak'], knobs.get('min_lr', knobs['peak'])
    if not 1 <= steps <= 10**8 or steps != int(steps):
        raise ScheduleError(f'schedule {name!r}: steps must be whole, from 1 to 100,000,000; found {steps}')
    if not 0 < peak < math.inf or not math.isfinite(min_lr):
        raise ScheduleError(f'schedule {name!r}: rates must be above 0: peak {peak:g}, min_lr {min_lr:g}')
    phases = SCHEDULES[name](**knobs)
    lr = Schedule(phases)
    problem = check(phases, lr, steps, peak, min_lr, knobs.get('constant_lr', peak))
    if problem:
        raise ScheduleError(f'schedule {name!r}: {problem}\n{table(lr)}')
    lr.phases = [row for row in lr.phases if row.end > row.start]
    return lr


def check(phases, lr, steps, peak, min_lr, constant_lr):
    """What is wrong with a schedule, every step looked at, or None."""
    for phase in phases:
        if phase.length < 0:
            return (f'phase {phase.name!r} would have {phase.length:,} of {steps:,} steps; '
                    'give the phases fewer steps, or the run more (max_steps)')
    total = sum(phase.length for phase in phases)
    if total != steps or phases[-1].length == 0:
        return (f'the phases fill {total:,} of {steps:,} steps, the last of them {phases[-1].length:,}; '
                f'they must fill all, and {phases[-1].name!r} needs at least one: shorten the others')
    if not 0 <= min_lr <= constant_lr <= peak:
        named = '' if constant_lr == peak else f'constant_lr {constant_lr:g}, '
        return (f'rates out of order: found min_lr {min_lr:g}, {named}peak {peak:g}, expected 0 <= min_lr <= '
                f'{"constant_lr <= " if named else ""}peak')
    good = (lr.rates > 0) & (lr.rates <= peak * (1 + 1e-9))                             # NaN is bad too
    good[-1] |= lr.rates[-1] == min_lr                  # a decay to zero arrives with the last step
    bad = np.flatnonzero(~good)
    if len(bad):
        return f'the rate at step {bad[0]:,} is {lr.rates[bad[0]]:g}, expected 0 < rate <= peak {peak:g}'
    for phase, row in zip(phases, lr.phases):
        rates, before = lr.rates[row.start:row.end], lr.rates[max(row.start - 1, 0)]
        if phase.length and row.start and not math.isclose(phase.curve(0.0), before, rel_tol=1e-6):
            return f'the rate jumps from {before:g} to {phase.curve(0.0):g} where phase {phase.name!r} begins'
        leaps = np.abs(np.diff(rates))
        if phase.length > 100 and leaps.max() > max(np.ptp(rates) / 2, 1e-9 * peak):
            return f'the rate jumps inside phase {phase.name!r}, after step {row.start + leaps.argmax():,}'


def table(lr):
    """The phase table: first and end step (0-based, end left out), first and last rate of each phase."""
    rows = [('phase', 'from step', 'to step', 'steps', 'first lr', 'last lr')]
    rows += [(p.name, f'{p.start:,}', f'{p.end:,}', f'{p.end - p.start:,}', f'{p.first:.3e}', f'{p.last:.3e}')
             for p in lr.phases]
    return '\n'.join('  '.join([f'{row[0]:<10}'] + [f'{cell:>11}' for cell in row[1:]]) for row in rows)


def first_below(lr, fraction):
    """First step after the peak whose rate is <= fraction * peak, or None.

    Parmar et al. switch the data mixture at a fifth. Warming up passes that rate too, so it does not count.
    """
    top = int(lr.rates.argmax())
    below = np.flatnonzero(lr.rates[top + 1:] <= fraction * lr.rates[top] * (1 + 1e-9))
    return top + 1 + int(below[0]) if len(below) else None


def draw(lr, title, out):
    """The rate over the steps with its phases shaded, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4), layout='constrained')
    steps, top = len(lr.rates), lr.rates.max()
    for i, p in enumerate(lr.phases):
        ax.axvspan(p.start, p.end, color='0.9' if i % 2 else '0.97', lw=0)
        short = p.end - p.start < steps / 9
        ax.text((p.start + p.end) / 2, 1.04 * top, p.name, ha='center', rotation=90 * short)
    ax.plot(np.arange(1, steps + 1), lr.rates, color='#0072B2', lw=2)
    ax.set(xlabel='optimizer step t', ylabel='learning rate', xlim=(0, steps), ylim=(0, 1.3 * top))
    ax.set_title(title, fontsize=9, wrap=True, parse_math=False)
    ax.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    ax.xaxis.set_major_formatter('{x:,.0f}')
    fig.savefig(out, dpi=150)
    plt.close(fig)


def main(argv, script=Path(__file__).with_name('train.py')):
    import configurator
    argv, out = list(argv), 'schedule.png'
    if '--out' in argv[:-1]:                                # else the configurator says it knows no such key
        out = argv.pop(argv.index('--out') + 1)
        argv.remove('--out')
    try:
        values, _ = configurator.load(script, argv)
        lr = build(values['schedule'], steps=values['max_steps'], peak=values['learning_rate'], **values)
    except ValueError as problem:                           # ConfigError or ScheduleError
        print(problem, file=sys.stderr)
        return 2
    draw(lr, f"{values['schedule']}  {' '.join(argv)}", out)
    print(f'{table(lr)}\n-> {out}')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
