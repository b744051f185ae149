"""Predicts a forgetting curve before the run is paid for, by a law fitted to finished runs.

    python -m results.law fit out/a_seed1 out/a_seed2 out/b_seed1 ... --out law.json
    python -m results.law predict law.json config/x.py --key=value ... [--out x.png]
    python -m results.law advise law.json config/x.py ... [--weights docs=1 code=2] [--out x.png]

predict draws the curve of a config and prints the final losses with an interval. advise looks for
the replay and the peak rate with the least weighted loss, and draws all that it tried. law_check.py
compares predictions with finished runs.

After Wang et al. 2025 (arXiv:2505.07796). The loss on a validation set follows from the learning
rates: from their sum S1, and from how far they have fallen, S2. Old and new sets have laws of their
own, since replay enters them differently. The law predicts the change since step 0:

    L(t) = L(0) (1 + change(S1, S2, t, r))      t: steps, r: share of replay

The user has the old model, so L(0) can be measured. The change is relative because old models of
several seeds that start on new data with a higher loss also end with one. A law holds for one
old model (or seeds of it), one pair of datasets, one batch size and one list of validation windows.
Fit runs that differ in all that will differ later: in schedule, peak rate, replay, and length.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

import configurator
import eval
import schedules
import train
from configurator import UserError, require
from corpora.tokenizer import import_optional
from support import checks, record
from support.files import write_whole
from results import law_pictures


# ------------------------------------------------------------------------------
# The law

def areas(rates, momentum):
    """S1 and S2 after 0, 1, ..., T steps, both [T + 1], from the learning rates [T].

    S1 is the sum of the rates. S2 is the sum of m_i over the steps i, where m_i = momentum m_{i-1}
    + (eta_{i-1} - eta_i): negative while the rate is up, and back near 0 after a decay. Here it is
    multiplied by 1 - momentum, so the paper's C is ours times that. The rate before the first step
    counts as 0, as in the paper for old models with an unknown last rate.
    """
    drops = np.concatenate(([0.0], rates[:-1])) - rates
    moving, S2 = 0.0, [0.0]
    for drop in drops:
        moving = momentum * moving + drop
        S2.append(S2[-1] + moving)
    return np.concatenate(([0.0], np.cumsum(rates))), (1 - momentum) * np.array(S2)


def growth(x, beta):
    """(1 - (1 + x)^-beta) / beta: the paper's shift term, whose B is ours over beta.

    It levels off for beta > 0, is log(1 + x) at 0, and grows like a power of x for beta < 0.
    """
    if abs(beta) < 1e-6:
        return np.log1p(x)
    return -np.expm1(-beta * np.log1p(x)) / beta


def old_printed(S1, S2, t, r, A, alpha, S_pt, C, a1, B, E, beta, a2):
    """Change on old data as printed: eq. 4 with the replay factors of eq. 8."""
    learned = A * ((S_pt + S1) ** -alpha - S_pt ** -alpha)
    shift = B * growth(E * S1, beta) * (1 - np.exp(-a2 * (1 - r)))
    return learned - C * S2 * np.exp(a1 * r) + shift


def new_printed(S1, S2, t, r, A, alpha, S_pt, C, a1, B, E, beta, a2):
    """Change on new data as printed: eq. 4 with the replay factors of eq. 8."""
    learned = A * ((S_pt + S1) ** -alpha - S_pt ** -alpha)
    shift = B * growth(E * S1, beta) * (np.exp(a2 * (1 - r)) - 1)
    return learned - C * S2 * np.exp(a1 * r) - shift


def old_recovery(S1, S2, t, r, C, a1, B, E, beta, R, K):
    """Change on old data: the shift forgets, and replay brings back.

    The printed factor is smooth in r, but here 5% replay prevents half of the forgetting. So the
    area of the replayed samples, r S1, has a term of its own. The first term of eq. 4 is left out:
    with one old model, it cannot be told apart from the shift.
    """
    shift = B * growth(E * S1, beta) - R * np.log1p(K * r * S1)
    return -C * S2 * np.exp(a1 * r) + (1 - r) * shift


def new_recovery(S1, S2, t, r, C, a1, B, E, beta, h):
    """Change on new data: eq. 4 without its first term, and with (1 - r)^h as replay factor."""
    return -C * S2 * np.exp(a1 * r) - B * growth(E * S1, beta) * (1 - r) ** h


def old_steps(S1, S2, t, r, C, a1, B, E, beta, R, K, G, tau):
    """old_recovery, and what the model still learns: more with more steps t, whatever their rate.

    So it has no limit of rate 0, and holds for rates like those that were fitted.
    """
    return old_recovery(S1, S2, t, r, C, a1, B, E, beta, R, K) - G * np.log1p(t / tau)


def new_steps(S1, S2, t, r, C, a1, B, E, beta, h, p):
    """new_recovery, where S1 becomes S1^(1-p) times (t steps of a rate of 1e-3)^p: ten times the
    rate does not learn as much as ten times the steps."""
    return new_recovery(S1 ** (1 - p) * (1e-3 * t) ** p, S2, t, r, C, a1, B, E, beta, h)


# name: {role of a set: its form}. In results/predict the printed form misses the old loss by 6%,
# recovery misses runs of another length by 4%, and steps was found after that.
FORMS = {'steps': {'old': old_steps, 'new': new_steps},
         'recovery': {'old': old_recovery, 'new': new_recovery},
         'printed': {'old': old_printed, 'new': new_printed}}


# ------------------------------------------------------------------------------
# What is known of a run, and of a config that has not been run

class Stage:
    """config, rates [T], share of replay, peak, steps, and area: S1 at the end."""

    def __init__(self, name, config):
        require(not config['switches'] and not config['branch_from'], f'{name}: a law knows '
                'neither switches nor branch_from. Take stages with one mixture.')
        require(config['replay'] <= 1, f'{name}: replay is {config["replay"]}. It is a share.')
        lr = schedules.build(config['schedule'], steps=config['max_steps'],
                             peak=config['learning_rate'], **config)
        self.name, self.config, self.rates = name, config, lr.rates
        self.share, self.steps = config['replay'], len(lr.rates)
        self.peak, self.area = float(lr.rates.max()), float(lr.rates.sum())


class Finished(Stage):
    """A run: also its row (name without seed), and at, the steps of its evaluations.

    roles: {set: old or new}; losses: {set: losses at these steps}; start: {set: L(0)}.
    """

    def __init__(self, run, row):
        super().__init__(run.name, run.config)
        self.row, self.at = row, np.array([line['step'] for line in run.evals])
        require(self.at[0] == 0 and self.at[-1] == self.steps, f'{run.name} was not evaluated at '
                'step 0 and at its last step. A law needs both.')
        require(run.old and run.new, f'{run.name} has not both old and new validation sets')
        self.roles = dict.fromkeys(run.old, 'old') | dict.fromkeys(run.new, 'new')
        self.losses = {name: np.array(run.losses(name)) for name in self.roles}
        require(all(np.isfinite(losses).all() for losses in self.losses.values()),
                f'{run.name} has losses that are not finite')
        self.start = {name: losses[0] for name, losses in self.losses.items()}


def read_runs(folders):
    return [Finished(run, row) for row, runs in eval.by_seed(folders).items() for run in runs]


# Knobs in which all runs of a law agree. A config that has not been run inherits the last two.
ALIKE = ('val_data', 'eval_windows', 'train_data', 'batch_size', 'block_size', 'vocab_size',
         'hidden_size')


def check_alike(stage, alike, knobs=ALIKE):
    for knob in knobs:
        require(stage.config[knob] == alike[knob], f'{knob} is {stage.config[knob]!r} in '
                f'{stage.name}, but {alike[knob]!r} in the other runs of the law. Fit another law.')


# ------------------------------------------------------------------------------
# Fit

# Where parameters are looked for. Those that are positive are searched on a log scale.
RANGES = {'A': (1e-4, 30), 'alpha': (0.05, 3), 'S_pt': (0.05, 10), 'C': (1e-4, 1e4),
          'a1': (-20, 20), 'B': (1e-4, 100), 'E': (1, 1e6), 'beta': (-1, 3), 'a2': (1e-3, 50),
          'R': (1e-4, 3), 'K': (1, 1e5), 'h': (0.01, 5), 'G': (1e-4, 1), 'tau': (1, 1e4),
          'p': (0, 1)}
MOMENTA = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)       # the paper's 0.999 is for 10,000s of steps
HUBER = 1e-3                                        # in log loss (Hoffmann et al. 2022)
STARTS = 12                                         # the best of 100 times as many


def fit(stages, form='steps'):
    """The law of these runs, as plain values for a JSON file."""
    first = stages[0]
    for stage in stages:
        check_alike(stage, first.config)
        require(stage.roles == first.roles, f'{stage.name} and {first.name} differ in what is old '
                'and what is new')
    law = {'form': form, 'alike': {knob: first.config[knob] for knob in ALIKE}, 'sets': {}}
    for name, role in first.roles.items():
        function = FORMS[form][role]
        check_enough(stages, function)
        fits = {momentum: fit_set(function, stages, name, momentum) for momentum in MOMENTA}
        momentum = min(fits, key=lambda momentum: fits[momentum][1])
        values, cost = fits[momentum]
        law['sets'][name] = {
            'role': role, 'momentum': momentum, 'cost': cost, 'parameters': values,
            'left_out': leave_out(function, stages, name, momentum)}
    law['runs'] = [{'name': stage.name, 'row': stage.row, 'peak': stage.peak, 'share': stage.share,
                    'steps': stage.steps, 'area': stage.area, 'start': stage.start,
                    'end': {name: losses[-1] for name, losses in stage.losses.items()}}
                   for stage in stages]
    return law


def check_enough(stages, function):
    rows = {stage.row for stage in stages}
    evaluations = sum(len(stage.at) - 1 for stage in stages)
    needed = 2 * len(parameters_of(function))
    require(len(rows) >= 4 and evaluations >= needed, f'{len(rows)} different runs with '
            f'{evaluations} evaluations are too few for {needed // 2} parameters. Fit 4 runs or '
            f'more that differ in schedule, peak or replay, with {needed} evaluations or more.')


def parameters_of(function):
    """The names of the arguments that are fitted: those with a range."""
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    return [name for name in names if name in RANGES]


def fit_set(function, stages, name, momentum, starts=STARTS):
    """({parameter: value}, cost) on a validation set, over all evaluations of all runs."""
    points = []
    for stage in stages:
        S1, S2 = areas(stage.rates, momentum)
        t, share = np.arange(stage.steps + 1), np.full(stage.steps + 1, stage.share)
        points.append(np.stack((S1, S2, t, share))[:, stage.at[1:]])
    points = np.concatenate(points, axis=1)                                     # (4, evaluations)
    seen = logs(stages, name)
    ranges = {name: RANGES[name] for name in parameters_of(function)}
    return search(ranges, starts, lambda values:
                  np.log(np.maximum(1 + function(*points, **values), 0.01)) - seen)


def logs(stages, name):
    """log(L(t) / L(0)) at all evaluations after step 0, of all runs."""
    return np.concatenate([np.log(stage.losses[name][1:] / stage.start[name]) for stage in stages])


def search(ranges, starts, residuals):
    """The parameters with the least Huber loss of residuals({parameter: value}), and that loss.

    ranges: {parameter: (lowest, highest)}. From many random starts, of which the best are improved
    (Hoffmann et al. 2022, approach 3).
    """
    names, bounds = list(ranges), np.array(list(ranges.values()), float).T      # (2, parameters)
    is_log = bounds[0] > 0
    bounds[:, is_log] = np.log(bounds[:, is_log])

    def named(x):
        values = x.copy()
        values[is_log] = np.exp(x[is_log])
        return dict(zip(names, values.tolist()))

    def cost(x):
        errors = np.abs(residuals(named(x))) / HUBER
        return np.where(errors < 1, errors**2 / 2, errors - 0.5).sum()

    tries = np.random.default_rng(0).uniform(*bounds, (100 * starts, len(names)))
    optimize = import_optional('scipy.optimize')
    fits = [optimize.least_squares(lambda x: residuals(named(x)), x, bounds=bounds, loss='huber',
                                   f_scale=HUBER)
            for x in sorted(tries, key=cost)[:starts]]
    best = min(fits, key=lambda found: found.cost)
    return named(best.x), float(best.cost)


def leave_out(function, stages, name, momentum):
    """{run: the error of its final loss in log, when no seed of it is among the fitted runs}."""
    errors = {}
    for row in dict.fromkeys(stage.row for stage in stages):
        rest = [stage for stage in stages if stage.row != row]
        values, _ = fit_set(function, rest, name, momentum, starts=STARTS // 3)
        for stage in stages:
            if stage.row == row:
                curve = follow(function, values, stage, name, momentum)
                errors[stage.name] = math.log(curve[-1] / stage.losses[name][-1])
    return errors


# ------------------------------------------------------------------------------
# Predict

def follow(function, values, stage, name, momentum):
    """The predicted loss on a set after 0, 1, ..., T steps, [T + 1]."""
    S1, S2 = areas(stage.rates, momentum)
    change = function(S1, S2, np.arange(stage.steps + 1), stage.share, **values)
    return stage.start[name] * np.maximum(1 + change, 0.01)


def predict(law, stage):
    """{set: {curve [T + 1], final, low, high}}. low to high is the 95% interval of the final loss.

    It is Student's t on the errors of the runs that were left out. All seeds of a run were left out
    together, so they count as one.
    """
    predictions = {}
    rows = {run['row'] for run in law['runs']}
    t = float(import_optional('scipy.stats').t.ppf(0.975, len(rows) - 1))
    for name, fitted in law['sets'].items():
        function = FORMS[law['form']][fitted['role']]
        curve = follow(function, fitted['parameters'], stage, name, fitted['momentum'])
        deviation = math.sqrt(np.mean(np.square(list(fitted['left_out'].values()))))
        factor, final = math.exp(t * deviation), float(curve[-1])
        predictions[name] = {'curve': curve, 'final': final, 'low': final / factor,
                             'high': final * factor}
    return predictions


def outside(law, stage):
    """{quantity: sentence} of a stage that lies outside of what was fitted: where, and how far."""
    found = {}
    for key, words in (('peak', 'peak rate'), ('share', 'share of replay'),
                       ('area', 'sum of the rates'), ('steps', 'number of steps')):
        fitted = [run[key] for run in law['runs']]
        lowest = min(fitted) if key in ('peak', 'share') else 0
        found[key] = beyond(words, getattr(stage, key), lowest, max(fitted))
    for name in law['sets']:
        fitted = [run['start'][name] for run in law['runs']]
        found[name] = beyond(f'loss on {name} at step 0', stage.start[name], 0.99 * min(fitted),
                             1.01 * max(fitted))
    return {key: sentence for key, sentence in found.items() if sentence}


def beyond(words, value, low, high):
    if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9):
        return None
    edge = low if value < low else high
    return (f'NOTE: the {words} is {value:.4g}, outside of the fitted {low:.4g} to {high:.4g}: '
            f'{value / edge:.2g} times the nearest.')


def read_config(law, words, start):
    """A config that has not been run, as a Stage that starts from these losses {set: L(0)}."""
    cfg, origin = configurator.load(train.Config, words)
    checks.check_knobs(cfg, origin)
    stage = Stage(' '.join(words), vars(cfg))
    check_alike(stage, law['alike'], ALIKE[:4])
    stage.start = start or start_of(cfg.init_from, list(law['sets']))
    return stage


def start_of(init_from, names):
    """{set: the last loss of the old model}, a run folder or the config of one."""
    folder = init_from
    if folder.endswith('.py'):
        folder = configurator.load(train.Config, [folder])[0].out_dir
    is_run = record.read_config(folder) is not None
    run = eval.Run(folder) if is_run else None
    require(run and set(names) <= set(run.sets), f'the losses of the old model {init_from!r} are '
            f'not known. Measure them and add --start {" ".join(f"{n}=1.5" for n in names)}')
    return {name: run.final(name) for name in names}


# ------------------------------------------------------------------------------
# Advise

RATES = ('learning_rate', 'min_lr', 'constant_lr')


def advise(law, stage, weights):
    """[(weighted loss, Stage, predictions), ...] over the fitted peaks and shares of replay."""
    peaks, shares = ([run[key] for run in law['runs']] for key in ('peak', 'share'))
    tried = []
    for peak in np.geomspace(min(peaks), max(peaks), 7):
        for share in min(shares) + np.ptp(shares) * np.linspace(0, 1, 21) ** 2:     # dense near 0
            config = dict(stage.config, replay=float(share))
            for knob in RATES:                              # the schedule keeps its shape
                config[knob] = stage.config[knob] * float(peak / stage.peak)
            option = Stage(stage.name, config)
            option.start = stage.start
            predictions = predict(law, option)
            losses = [predictions[name]['final'] * weight for name, weight in weights.items()]
            tried.append((sum(losses) / sum(weights.values()), option, predictions))
    return tried


# ------------------------------------------------------------------------------
# Commands

def fit_command(args, words):
    law = fit(read_runs(words), args.form)
    write_whole(args.out, (json.dumps(law, indent=1) + '\n').encode())
    for name, fitted in law['sets'].items():
        shown = ', '.join(f'{key} {value:.4g}' for key, value in fitted['parameters'].items())
        print(f'{name} ({fitted["role"]} data): momentum {fitted["momentum"]}, {shown}')
    rows = [['error of the final loss, left out of the fit', *law['sets']]]
    for run in law['runs']:
        errors = [fitted['left_out'][run['name']] for fitted in law['sets'].values()]
        rows.append([run['name'], *(f'{100 * error:+.1f}%' for error in errors)])
    print('\n'.join(eval.markdown(rows)))


def predict_command(args, words):
    law = read_law(args.law)
    stage = read_config(law, words, values_of(args.start, law, '--start'))
    predictions = predict(law, stage)
    report(law, stage, predictions)
    if args.save:
        save(args.save, stage, predictions)
    if args.out:
        law_pictures.curves([(stage.name, stage, predictions)], args.out)


def advise_command(args, words):
    law = read_law(args.law)
    weights = values_of(args.weights, law, '--weights') or dict.fromkeys(law['sets'], 1.0)
    require(min(weights.values()) >= 0 < sum(weights.values()), '--weights: none may be negative, '
            'and one must be above 0')
    stage = read_config(law, words, values_of(args.start, law, '--start'))
    tried = advise(law, stage, weights)
    loss, best, predictions = min(tried, key=lambda option: option[0])
    knobs = ' '.join(f'--{knob}={best.config[knob]:.3g}' for knob in ('replay', *RATES))
    print(f'least weighted loss {loss:.3f}: {knobs}')
    report(law, best, predictions)
    shares = [run['share'] for run in law['runs']]
    if best.share in (min(shares), max(shares)):
        print(f'NOTE: {100 * best.share:.3g}% is at the edge of the fitted shares of replay.')
    if args.out:
        law_pictures.plane(law, [option[1:] for option in tried], best, args.out)


def report(law, stage, predictions):
    rows = [['set', 'step 0', 'predicted end', '95% interval']]
    for name, found in predictions.items():
        rows.append([name, f'{stage.start[name]:.3f}', f'{found["final"]:.3f}',
                     f'{found["low"]:.3f} to {found["high"]:.3f}'])
    print('\n'.join([*eval.markdown(rows), *outside(law, stage).values()]))


def save(path, stage, predictions):
    """Add the predicted losses at the evaluations of a stage to a JSON file."""
    steps = [*range(0, stage.steps, stage.config['eval_every']), stage.steps]
    saved = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    entry = {'config': stage.name, 'start': stage.start, 'steps': steps, 'sets': {}}
    for name, found in predictions.items():
        curve = [round(float(found['curve'][step]), 5) for step in steps]
        entry['sets'][name] = found | {'curve': curve}
    saved[Path(stage.config['out_dir']).name] = entry
    write_whole(path, (json.dumps(saved, indent=1) + '\n').encode())


def read_law(path):
    try:
        law = json.loads(Path(path).read_text())
        law['form'], law['sets'], law['runs']
        return law
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is not a law. Make one with: python -m results.law fit')


def values_of(words, law, option):
    """{set: value} of words such as docs=1.46, one for each set of a law; None without words."""
    try:
        values = {word.partition('=')[0]: float(word.partition('=')[2]) for word in words or ()}
    except ValueError:
        values = {'': 0}
    require(not words or set(values) == set(law['sets']), f'{option} takes a number for each of '
            f'{", ".join(law["sets"])}, such as {" ".join(f"{name}=1.5" for name in law["sets"])}')
    return values or None


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    fitting = commands.add_parser('fit')
    fitting.add_argument('--out', required=True, help='a JSON file')
    fitting.add_argument('--form', choices=FORMS, default='steps')
    for name in ('predict', 'advise'):
        command = commands.add_parser(name)
        command.add_argument('law')
        command.add_argument('--start', nargs='+', help='losses of the old model: docs=1.46 ...')
        command.add_argument('--out', help='a picture (.png)')
        if name == 'predict':
            command.add_argument('--save', help='add the prediction to this JSON file')
        else:
            command.add_argument('--weights', nargs='+', help='docs=1 code=2; equal without it')
    args, words = parser.parse_known_args(argv)
    {'fit': fit_command, 'predict': predict_command, 'advise': advise_command}[args.command](
        args, words)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.law: {error}')
