"""Learning-rate schedules: a schedule is a list of phases, a phase is a formula with its source.

    python schedules.py config/x.py [--key=value] [--out x.png]     # plots the schedule of a config

Symbols are those of the papers: t = 1, 2, ..., T counts optimizer steps (t = step + 1, so the first
step trains at a positive rate and step T - 1 at the end value), W = warmup steps, and inside a
phase u = steps done in it / its length runs over (0, 1].

Sources: Gupta et al. 2023, arXiv:2308.04014; Ibrahim et al. 2024, arXiv:2403.08763; Hu et al. 2024
(MiniCPM), arXiv:2404.06395; Parmar et al. 2024, arXiv:2407.07263.
"""
import argparse
import inspect
import math
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

from configurator import UserError, did_you_mean, load, require

# length in steps; curve(u in (0, 1]) -> learning rate, also for arrays u
Phase = namedtuple('Phase', 'name length curve')


# To add a schedule, write a function that returns its phases and name it in SCHEDULES below. Its
# arguments are knobs of the config, where their defaults stand, except for steps (max_steps) and
# peak (learning_rate). A new knob is a new field of Config in train.py.

def in_steps(length, steps):
    """A length in steps (1, 2, ...), or as a fraction of the run (0 < x < 1) -> whole steps."""
    if 0 < length < 1:
        return round(length * steps)
    require(length == int(length), f'{length} is neither whole steps nor a fraction below 1')
    return int(length)


def ramp(peak, W):
    """Linear warmup from 0: eta = peak t / W (Ibrahim et al., eq. 1). Once more is re-warming."""
    return Phase('warmup', W, lambda u: peak * u)


def constant(steps, peak, warmup):
    """eta = peak after warmup. With warmup = 0: the `no re-warming` baseline of Ibrahim et al."""
    W = in_steps(warmup, steps)
    return [ramp(peak, W), Phase('constant', steps - W, lambda u: peak)]


def cosine(steps, peak, min_lr, warmup):
    """eta = min_lr + (peak - min_lr)/2 (1 + cos(pi (t - W)/(T - W)))  (Ibrahim et al., eq. 2).

    Parmar et al.: peak = the final rate of the old run, min_lr = peak/100, warmup = 0.
    """
    W = in_steps(warmup, steps)
    return [ramp(peak, W), Phase('decay', steps - W, lambda u: half_cosine(peak, min_lr, u))]


def half_cosine(start, end, u):
    return end + (start - end) / 2 * (1 + np.cos(np.pi * u))


def cosine_clamped(steps, peak, min_lr, warmup):
    """eta = max(min_lr, peak/2 (1 + cos(pi (t - W)/T)))   (GPT-NeoX v1: Pythia and Gupta et al.).

    The cosine aims at 0, not at min_lr, and is cut off there. With min_lr = peak/10 it arrives at
    (t - W)/T = arccos(-0.8)/pi = 0.7952 and stays: Pythia spent its last 58B tokens at min_lr.
    """
    # D: the steps from the peak to min_lr. peak/2 (1 + cos(pi D/T)) = min_lr, solved for D
    W = in_steps(warmup, steps)
    arrival = np.arccos(np.clip(2 * min_lr / peak - 1, -1, 1)) / np.pi          # D / T
    D = max(1, math.ceil(arrival * steps))
    D = min(D, steps - W)                               # a run may end before it arrives

    def decay(u):
        return np.maximum(min_lr, peak / 2 * (1 + np.cos(np.pi * u * D / steps)))

    phases = [ramp(peak, W), Phase('decay', D, decay)]
    if W + D < steps:
        phases.append(Phase('floor', steps - W - D, lambda u: min_lr))
    return phases


def linear(steps, peak, min_lr, warmup):
    """eta = peak + (min_lr - peak) (t - W)/(T - W). GPT-NeoX aims at 0 and clips at min_lr."""
    W = in_steps(warmup, steps)
    return [ramp(peak, W), Phase('decay', steps - W, lambda u: peak + (min_lr - peak) * u)]


def geometric(start, end, u):
    """start (end/start)^u, which falls by the same factor every step."""
    return start ** (1 - u) * end ** u


# from 1 to 0 over u
DECAYS = {
    'linear': lambda u: 1 - u,
    'cosine': lambda u: (1 + np.cos(np.pi * u)) / 2,
    '1-sqrt': lambda u: 1 - np.sqrt(u),                 # Haegele et al. 2024, arXiv:2405.18392
}


def wsd(steps, peak, min_lr, warmup, decay, decay_shape):
    """Warmup-stable-decay (Hu et al.): eta = min_lr + (peak - min_lr) f(u) over the last `decay`.

    decay_shape: f of DECAYS, or 'exponential' for eta = peak (min_lr/peak)^u. The stable part fixes
    no budget: branch from any checkpoint of it, with a decay of its own.
    """
    require(decay_shape in (*DECAYS, 'exponential'), f'decay_shape is {decay_shape!r}, but must be '
            f'one of {", ".join(DECAYS)}, exponential')
    W, D = in_steps(warmup, steps), in_steps(decay, steps)

    def fall(u):
        if decay_shape == 'exponential':
            return geometric(peak, min_lr, u)
        return min_lr + (peak - min_lr) * DECAYS[decay_shape](u)

    return [ramp(peak, W), Phase('stable', steps - W - D, lambda u: peak),
            Phase('decay', D, fall)]


# What both infinite schedules share; they differ in `cool`.
def infinite(cool, steps, peak, min_lr, constant_lr, warmup, cooldown, anneal):
    """Warmup, cooldown by the curve `cool`, constant, anneal (Ibrahim et al., section 7).

    cooldown and anneal say where the cooldown ends and where the anneal begins: a step, or a
    fraction of the run. The next dataset continues from before the anneal, at the constant rate, so
    it needs no re-warming. A main line that others branch off has anneal = steps and never anneals.
    """
    W, C, A = in_steps(warmup, steps), in_steps(cooldown, steps), in_steps(anneal, steps)
    phases = [ramp(peak, W), Phase('cooldown', C - W, cool),
              Phase('constant', A - C, lambda u: constant_lr)]
    if A != steps:
        phases.append(Phase('anneal', steps - A, lambda u: geometric(constant_lr, min_lr, u)))
    return phases


def infinite_cosine(steps, peak, min_lr, constant_lr, warmup, cooldown, anneal):
    """Cosine-Inf: eta = constant_lr + (peak - constant_lr)/2 (1 + cos(pi u)) in the cooldown."""
    def cool(u):
        return half_cosine(peak, constant_lr, u)
    return infinite(cool, steps, peak, min_lr, constant_lr, warmup, cooldown, anneal)


def infinite_inv_sqrt(steps, peak, min_lr, constant_lr, warmup, cooldown, anneal, timescale):
    """InvSqrt-Inf: in the cooldown eta = peak + (constant_lr - peak) h(u)/h(1).

    h(u) = 1/sqrt(1 + timescale u) - 1.
    """
    def h(u):
        return 1 / np.sqrt(1 + timescale * u) - 1

    def cool(u):
        return peak + (constant_lr - peak) * h(u) / h(1)
    return infinite(cool, steps, peak, min_lr, constant_lr, warmup, cooldown, anneal)


def repeated_cosine(steps, peak, min_lr, warmup, repeats):
    """The cosine once for each of `repeats` datasets of equal length, re-warmed from min_lr.

    The baseline of the infinite schedules (Ibrahim et al., Fig. 10). warmup is of one dataset.
    """
    phases, bounds = [], [round(i * steps / repeats) for i in range(repeats + 1)]
    for start, end in zip(bounds, bounds[1:]):
        warm, decay = cosine(end - start, peak, min_lr, warmup)
        if phases:
            warm = Phase('warmup', warm.length, lambda u: min_lr + (peak - min_lr) * u)
        phases += [warm, decay]
    return phases


SCHEDULES = {'constant': constant, 'cosine': cosine, 'cosine_clamped': cosine_clamped,
             'linear': linear, 'wsd': wsd, 'infinite_cosine': infinite_cosine,
             'infinite_inv_sqrt': infinite_inv_sqrt, 'repeated_cosine': repeated_cosine}


# ------------------------------------------------------------------------------
# A schedule of a run: every step evaluated and checked before training starts

# A phase as it is run: steps start .. end - 1, and the rates of the first and the last of them.
PhaseRun = namedtuple('PhaseRun', 'name start end first last')


class Schedule:
    """lr(step) -> learning rate of a 0-based step; past the end, the last one.

    rates: those of all steps, float64 [T]. phases: [PhaseRun, ...].
    """

    def __init__(self, phases):
        self.phases, rates_of_phases, start = [], [], 0
        for name, length, curve in phases:
            if length > 0:
                rates = np.broadcast_to(curve(np.arange(1, length + 1) / length), length)
                self.phases.append(PhaseRun(name, start, start + length, float(rates[0]),
                                            float(rates[-1])))
                rates_of_phases.append(rates)
                start += length
        self.rates = np.concatenate(rates_of_phases)

    def __call__(self, step):
        return float(self.rates[min(step, len(self.rates) - 1)])

    def first_below(self, fraction):
        """The first step after the peak whose rate is at most a fraction of the peak, or None.

        Parmar et al. switch the data mixture at a fifth. A warmup passes that rate too, but before.
        """
        top = int(self.rates.argmax())
        highest = self.rates[top] * (1 + 1e-9)          # rounding is no reason to wait a step
        below = np.flatnonzero(self.rates[top + 1:] <= fraction * highest)
        return top + 1 + int(below[0]) if len(below) else None


def of(cfg):
    """The schedule of a config: lr(step) -> learning rate."""
    return build(cfg.schedule, steps=cfg.max_steps, peak=cfg.learning_rate, **vars(cfg))


def build(name, **knobs):
    """The schedule of that name as a checked lr(step).

    knobs: steps (T), peak, and min_lr, warmup, decay, ... as the schedule takes them. Others are
    left aside, so that a whole config may be given.
    """
    require(name in SCHEDULES, f'there is no schedule {name!r}.{did_you_mean(name, SCHEDULES)} '
            f'There are {", ".join(SCHEDULES)}.')
    knobs = {knob: value for knob, value in knobs.items() if knob in knobs_of(name)}
    steps, peak = knobs['steps'], knobs['peak']
    require(1 <= steps <= 10**8, f'max_steps must be 1 to 100,000,000, not {steps}')
    require(0 < peak < math.inf, f'learning_rate must be above 0, not {peak:g}')
    # a schedule that does not take one of these rates ends at its peak, or stays there
    min_lr, constant_lr = knobs.get('min_lr', peak), knobs.get('constant_lr', peak)
    require(0 <= min_lr <= constant_lr <= peak, f'schedule {name!r}: rates must rise from min_lr '
            f'{min_lr:g} over constant_lr {constant_lr:g} to learning_rate {peak:g}')
    require(all(abs(knobs.get(k, 0)) <= 10**8 for k in ('warmup', 'decay', 'cooldown', 'anneal')),
            f'schedule {name!r}: a length is above 100,000,000 steps')
    require(1 <= knobs.get('repeats', 1) <= min(steps, 1000), f'repeats must be 1 to 1,000 and at '
            f'most max_steps = {steps}, not {knobs.get("repeats")}')

    phases = SCHEDULES[name](**knobs)
    check_lengths(name, phases, steps)
    lr = Schedule(phases)
    check_rates(name, phases, lr, peak, min_lr)
    return lr


def knobs_of(name):
    """The arguments of a schedule. steps is the knob max_steps, and peak is learning_rate."""
    return inspect.signature(SCHEDULES[name]).parameters


def check_lengths(name, phases, steps):
    for phase in phases:
        require(phase.length >= 0, f'schedule {name!r}: phase {phase.name!r} would have '
                f'{phase.length:,} of {steps:,} steps. Shorten the others or raise max_steps.')
    total = sum(phase.length for phase in phases)
    require(total == steps, f'schedule {name!r}: the phases cover {total:,} of {steps:,} steps. '
            'They must cover all of them.')
    require(phases[-1].length > 0, f'schedule {name!r}: phase {phases[-1].name!r} needs at least '
            'one step. Shorten the others.')


def check_rates(name, phases, lr, peak, min_lr):
    """Every rate lies in (0, peak], and none jumps where a phase begins. A last rate may be 0."""
    is_good = (lr.rates > 0) & (lr.rates <= peak * (1 + 1e-9))                  # NaN is not
    is_good[-1] |= lr.rates[-1] == min_lr
    wrong = np.flatnonzero(~is_good)
    if len(wrong):
        raise UserError(f'schedule {name!r}: the rate at step {wrong[0]:,} is '
                        f'{lr.rates[wrong[0]]:g}, but must be above 0 and at most {peak:g}.\n'
                        f'{table(lr)}')
    curves = [phase.curve for phase in phases if phase.length > 0]
    for phase, curve in zip(lr.phases[1:], curves[1:]):
        before, after = lr.rates[phase.start - 1], float(curve(0.0))
        require(math.isclose(before, after, rel_tol=1e-6), f'schedule {name!r}: the rate jumps '
                f'from {before:g} to {after:g} where phase {phase.name!r} begins.\n{table(lr)}')


def table(lr):
    """The phases: first step, step after the last, number of steps, first and last rate."""
    rows = [('phase', 'from step', 'to step', 'steps', 'first lr', 'last lr')]
    for p in lr.phases:
        rows.append((p.name, f'{p.start:,}', f'{p.end:,}', f'{p.end - p.start:,}', f'{p.first:.3e}',
                     f'{p.last:.3e}'))
    return '\n'.join('  '.join([f'{row[0]:<10}'] + [f'{cell:>11}' for cell in row[1:]])
                     for row in rows)


# ------------------------------------------------------------------------------
# python schedules.py config/x.py

def draw(lr, title, out):
    """The rate over the steps, with its phases shaded, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4), layout='constrained')
    steps, top = len(lr.rates), lr.rates.max()
    for i, phase in enumerate(lr.phases):
        ax.axvspan(phase.start, phase.end, color='0.9' if i % 2 else '0.97', lw=0)
        is_short = phase.end - phase.start < steps / 9
        middle = max((phase.start + phase.end) / 2, steps / 70)     # right of the axis
        ax.text(middle, 1.04 * top, phase.name, ha='center', rotation=90 if is_short else 0)
    ax.plot(np.arange(1, steps + 1), lr.rates, color='#0072B2', lw=2)
    ax.set(xlabel='optimizer step t', ylabel='learning rate', xlim=(0, steps), ylim=(0, 1.3 * top))
    ax.set_title(title, fontsize=9, wrap=True, parse_math=False)
    ax.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    ax.xaxis.set_major_formatter('{x:,.0f}')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=150)
    plt.close(fig)


def main(argv):
    from train import Config                            # the knobs; train.py imports this file
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='out/schedule.png')
    args, words = parser.parse_known_args(argv)
    try:
        cfg, _ = load(Config, words)
        lr = of(cfg)
        print(table(lr))
        draw(lr, f'{cfg.schedule}  {" ".join(words)}', args.out)
        print(args.out)
    except (UserError, OSError, ValueError) as error:
        print(f'schedules.py: {error}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
