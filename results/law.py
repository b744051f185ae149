"""Predicts a forgetting curve before the run is paid for: a law fitted to runs that are finished.

    python -m results.law fit out/a_seed1 out/a_seed2 out/b_seed1 ... --out law.json
    python -m results.law predict law.json config/x.py --key=value ... [--out x.png]
    python -m results.law advise law.json config/x.py ... --weights docs=1 code=2 [--out x.png]
    python -m results.law test law.json out/c_seed1 out/d_seed1 ... [--out x.png]

After Wang et al. 2025 (arXiv:2505.07796). The loss on a validation set follows from the learning
rates alone: from their sum S1, and from how far they have fallen, S2 (see areas). Old and new
sets have laws of their own, since replay enters them differently (FORMS).

What a law predicts is the change since step 0, relative to the loss there:

    L(t) = L(0) (1 + change(S1, S2, r))         r: share of replay

The user has the old model, so L(0) can be measured. Old models of other seeds differ in it, and a
worse start on new data leads to a worse end, by about the same factor. A law holds for one old
model (or seeds of it), one pair of datasets, one batch size and one validation set.
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


# ------------------------------------------------------------------------------
# The law

def areas(rates, momentum):
    """S1 and S2 after 0, 1, ..., T steps, both [T + 1], of the learning rates [T].

    S1 is the sum of the rates. S2 = sum of m_i over the steps i, with m_i = momentum m_{i-1} +
    (eta_{i-1} - eta_i): positive after a decay, negative while a rate is up (Wang et al., section
    3). As for an old model whose last rate is not known, the rate before the first step is 0. S2
    is returned times (1 - momentum), which makes it a rate: the paper's C is C (1 - momentum) here.
    """
    drops = np.concatenate(([0.0], rates[:-1])) - rates
    moving, S2 = 0.0, [0.0]
    for drop in drops:
        moving = momentum * moving + drop
        S2.append(S2[-1] + moving)
    return np.concatenate(([0.0], np.cumsum(rates))), (1 - momentum) * np.array(S2)


def growth(x, beta):
    """(1 - (1 + x)^-beta) / beta: the paper's shift term, whose B is B/beta here.

    It levels off for beta > 0, is log(1 + x) at 0, and keeps growing as a power for beta < 0.
    """
    if abs(beta) < 1e-6:
        return np.log1p(x)
    return -np.expm1(-beta * np.log1p(x)) / beta


def old_printed(S1, S2, r, A, alpha, S_pt, C, a1, B, E, beta, a2):
    """Change on old data: eq. 4 with the replay factors of eq. 8, as printed."""
    learned = A * ((S_pt + S1) ** -alpha - S_pt ** -alpha)
    shift = B * growth(E * S1, beta) * (1 - np.exp(-a2 * (1 - r)))
    return learned - C * S2 * np.exp(a1 * r) + shift


def new_printed(S1, S2, r, A, alpha, S_pt, C, a1, B, E, beta, a2):
    """Change on new data: eq. 4 with the replay factors of eq. 8, as printed."""
    learned = A * ((S_pt + S1) ** -alpha - S_pt ** -alpha)
    shift = B * growth(E * S1, beta) * (np.exp(a2 * (1 - r)) - 1)
    return learned - C * S2 * np.exp(a1 * r) - shift


def old_recovery(S1, S2, r, C, a1, B, E, beta, R, K):
    """Change on old data: what the shift forgets, replay brings back.

    The printed factor is smooth near r = 0, but 5% replay prevents half of the forgetting here.
    So a term of its own grows with the area r S1 of the replayed samples. The paper's first term
    (A) is left out: with one old model, it cannot be told apart from the shift.
    """
    shift = B * growth(E * S1, beta) - R * np.log1p(K * r * S1)
    return -C * S2 * np.exp(a1 * r) + (1 - r) * shift


def new_recovery(S1, S2, r, C, a1, B, E, beta, h):
    """Change on new data: eq. 4 without A, and with the replay factor (1 - r)^h."""
    return -C * S2 * np.exp(a1 * r) - B * growth(E * S1, beta) * (1 - r) ** h


# name: (on old data, on new data)
FORMS = {'recovery': (old_recovery, new_recovery), 'printed': (old_printed, new_printed)}

# Where fits look for a parameter. Those that are positive are searched on a log scale.
RANGES = {'A': (1e-4, 3), 'alpha': (0.05, 3), 'S_pt': (0.05, 10), 'C': (1e-4, 1e3), 'a1': (-5, 5),
          'B': (1e-4, 10), 'E': (1, 1e4), 'beta': (-1, 3), 'a2': (0.01, 20), 'R': (1e-4, 3),
          'K': (1, 1e5), 'h': (0.01, 5)}
STARTS = 12                                         # of a fit, the best of 100 times as many
MOMENTA = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)       # the paper's 0.999 is for 10,000s of steps
HUBER = 1e-3                                        # in log loss, as Hoffmann et al. 2022


def parameters_of(form):
    return form.__code__.co_varnames[3:form.__code__.co_argcount]


# ------------------------------------------------------------------------------
# Stages: what a law has to know of a run, or of a config that has not been run

class Stage:
    """config: {knob: value}; rates [T]; peak, share, steps, area (S1 at the end)."""

    def __init__(self, name, config):
        require(not config['switches'] and not config['branch_from'], f'{name}: a law follows one '
                'mixture from an old model on. It knows neither switches nor branch_from.')
        lr = schedules.build(config['schedule'], steps=config['max_steps'],
                             peak=config['learning_rate'], **config)
        self.name, self.config, self.rates = name, config, lr.rates
        self.share, self.steps = config['replay'], len(lr.rates)
        self.peak, self.area = lr.rates.max(), lr.rates.sum()


def read_runs(folders):
    """Run folders -> [Stage, ...] with row (name without seed), at (evaluated steps), start and
    losses ({set: loss at step 0}, {set: losses at those steps})."""
    stages = []
    for row, runs in eval.by_seed(folders).items():
        for run in runs:
            stage = Stage(run.name, run.config)
            stage.row, stage.run = row, run
            stage.at = np.array([e['step'] for e in run.evals])
            require(stage.at[0] == 0 and stage.at[-1] == stage.steps, f'{run.name} was not '
                    'evaluated at its first and last step. A law needs whole runs.')
            require(run.old and run.new, f'{run.name} has no old or no new validation set. A law '
                    'is about a stage that goes on with new data.')
            stage.losses = {name: np.array(run.losses(name)) for name in run.old + run.new}
            require(all(np.isfinite(losses).all() for losses in stage.losses.values()),
                    f'{run.name} has losses that are not finite')
            stage.start = {name: losses[0] for name, losses in stage.losses.items()}
            stages.append(stage)
    return stages


# Knobs in which all runs of a law agree. A config that has not been run inherits the last two.
ALIKE = ('val_data', 'eval_windows', 'train_data', 'batch_size', 'block_size', 'vocab_size',
         'hidden_size')


def check_alike(stage, knobs, name):
    for knob, value in knobs.items():
        require(stage.config[knob] == value, f'{knob} is {stage.config[knob]!r} in {stage.name} '
                f'and {value!r} in {name}. A law holds for one of them: fit another one.')


# ------------------------------------------------------------------------------
# Fit

def change(law, stage):
    """{set: the change since step 0 after 0, 1, ..., T steps, [T + 1]} that a law predicts."""
    changes = {}
    for name, fitted in law['sets'].items():
        form = FORMS[law['form']][fitted['role'] == 'new']
        S1, S2 = areas(stage.rates, fitted['momentum'])
        changes[name] = form(S1, S2, stage.share, **fitted['parameters'])
    return changes


def search(residuals, names, starts, first=()):
    """The parameters with the least Huber loss of residuals(values), and that loss.

    As approach 3 of Hoffmann et al. 2022: from many random starts, of which the best are improved.
    first: values to start from too.
    """
    optimize = import_scipy()
    is_log = np.array([RANGES[name][0] > 0 for name in names])
    bounds = np.array([RANGES[name] for name in names], float).T                # (2, parameters)
    bounds[:, is_log] = np.log(bounds[:, is_log])

    def values_of(x):
        return np.where(is_log, np.exp(np.where(is_log, x, 0)), x)

    def cost(x):
        z = np.abs(residuals(values_of(x))) / HUBER
        return np.where(z < 1, z**2 / 2, z - 0.5).sum()

    tries = np.random.default_rng(0).uniform(*bounds, (100 * starts, len(names)))
    tries = sorted(tries, key=cost)[:starts]
    for values in first:
        tries.append(np.where(is_log, np.log(np.where(is_log, values, 1)), values))
    fits = []
    for x in tries:
        x = np.clip(x, bounds[0] + 1e-6, bounds[1] - 1e-6)
        fits.append(optimize.least_squares(lambda x: residuals(values_of(x)), x, bounds=bounds,
                                           loss='huber', f_scale=HUBER))
    best = min(fits, key=lambda fit: fit.cost)
    return values_of(best.x), best.cost


def fit_set(form, stages, name, momentum, starts, first=()):
    """(values, cost) of a form on one validation set, from all evaluations of all stages."""
    inputs = []
    for stage in stages:
        S1, S2 = areas(stage.rates, momentum)
        at = stage.at[1:]
        inputs.append([S1[at], S2[at], np.full(len(at), stage.share)])
    S1, S2, share = np.concatenate(inputs, axis=1)                              # (evaluations,)
    seen = np.concatenate([np.log(s.losses[name][1:] / s.start[name]) for s in stages])

    def residuals(values):
        return np.log(np.maximum(1 + form(S1, S2, share, *values), 0.01)) - seen

    return search(residuals, parameters_of(form), starts, first)


def fit(stages, form='recovery', starts=STARTS):
    """The law of these stages, as plain values for a JSON file."""
    check_enough(stages, form)
    law = {'form': form, 'alike': {knob: stages[0].config[knob] for knob in ALIKE}, 'sets': {}}
    for role, names in (('old', stages[0].run.old), ('new', stages[0].run.new)):
        function = FORMS[form][role == 'new']
        for name in names:
            fits = {m: fit_set(function, stages, name, m, starts) for m in MOMENTA}
            momentum = min(fits, key=lambda m: fits[m][1])
            values = fits[momentum][0]
            law['sets'][name] = {
                'role': role, 'momentum': momentum, 'cost': fits[momentum][1],
                'parameters': dict(zip(parameters_of(function), values.tolist())),
                'dcpt': fit_dcpt(stages, name, role, starts),
                'left_out': leave_out(function, stages, name, momentum, values, starts)}
    law['runs'] = [{'name': s.name, 'row': s.row, 'peak': s.peak, 'share': s.share,
                    'steps': s.steps, 'area': s.area, 'start': s.start,
                    'end': {name: s.losses[name][-1] for name in law['sets']}} for s in stages]
    return law


def check_enough(stages, form):
    for stage in stages[1:]:
        check_alike(stage, {knob: stages[0].config[knob] for knob in ALIKE}, stages[0].name)
        require((stage.run.old, stage.run.new) == (stages[0].run.old, stages[0].run.new),
                f'{stage.name} and {stages[0].name} differ in what is old and what is new')
    rows = {stage.row for stage in stages}
    evaluations = sum(len(stage.at) - 1 for stage in stages)
    needed = max(len(parameters_of(function)) for function in FORMS[form])
    require(len(rows) >= 4 and evaluations > 2 * needed, f'{len(rows)} different runs with '
            f'{evaluations} evaluations are too few for {needed} parameters. Take 4 runs or more '
            f'that differ in peak, schedule and replay, with more than {2 * needed} evaluations.')


def leave_out(form, stages, name, momentum, values, starts):
    """{run: error of its final loss, in log, when it and the other seeds of it are not fitted}."""
    errors = {}
    for row in dict.fromkeys(stage.row for stage in stages):
        rest = [stage for stage in stages if stage.row != row]
        found, _ = fit_set(form, rest, name, momentum, max(1, starts // 3), [values])
        for stage in stages:
            if stage.row == row:
                S1, S2 = areas(stage.rates, momentum)
                end = max(1 + form(S1[-1], S2[-1], stage.share, *found), 0.01)
                errors[stage.name] = math.log(end * stage.start[name] / stage.losses[name][-1])
    return errors


def interval(law, name):
    """Half of the 95% interval of a final loss, in log: Student's t on the errors of left-out runs.

    Runs that differ in the seed alone were left out together and count as one."""
    errors = law['sets'][name]['left_out'].values()
    rows = {run['row'] for run in law['runs']}
    deviation = math.sqrt(np.mean(np.square(list(errors))))
    return float(import_scipy('stats').t.ppf(0.975, len(rows) - 1)) * deviation


# ------------------------------------------------------------------------------
# Baselines

def dcpt(D, r, E0, A, eta, gamma, P, eps, delta):
    """Loss over L(0) after D steps, by the D-CPT law with the model's size fixed (Que et al. 2024,
    arXiv:2406.01375): E + B r^eta / D^beta + C / (r + eps)^gamma. r: the share of the set's data.
    """
    return E0 + A * r**eta / D**gamma + P / (r + eps) ** delta


DCPT_RANGES = {'E0': (1e-3, 2), 'eta': (1e-3, 5), 'gamma': (1e-3, 3), 'P': (1e-6, 3),
               'eps': (1e-4, 2), 'delta': (1e-3, 5)}
RANGES.update(DCPT_RANGES)


def fit_dcpt(stages, name, role, starts):
    D, r, seen = [], [], []
    for stage in stages:
        D.extend(stage.at[1:])
        r.extend([own_share(stage, role)] * (len(stage.at) - 1))
        seen.extend(np.log(stage.losses[name][1:] / stage.start[name]))
    D, r, seen = np.array(D, float), np.array(r), np.array(seen)

    def residuals(values):
        return np.log(dcpt(D, r, *values)) - seen

    names = dcpt.__code__.co_varnames[2:dcpt.__code__.co_argcount]
    return search(residuals, names, starts)[0].tolist()


def own_share(stage, role):
    """The share of the samples that come from the data of an old or new set."""
    return stage.share if role == 'old' else 1 - stage.share


def nearest(law, stage):
    """The fitted run whose peak rate, replay (plus 1%) and length differ by the smallest factors,
    multiplied. Of several, the one that starts at the nearest loss."""
    def distance(run):
        factors = [run['peak'] / stage.peak, (run['share'] + 0.01) / (stage.share + 0.01),
                   run['steps'] / stage.steps]
        start = sum(abs(run['start'][name] - stage.start[name]) for name in law['sets'])
        return round(float(np.abs(np.log(factors)).sum()), 9), start
    return min(law['runs'], key=distance)


# ------------------------------------------------------------------------------
# Predict

def predict(law, stage):
    """{set: {'curve': [T + 1], 'final', 'low', 'high'}} of a stage with a start."""
    predictions = {}
    for name, relative in change(law, stage).items():
        curve = stage.start[name] * np.maximum(1 + relative, 0.01)
        spread = math.exp(interval(law, name))
        predictions[name] = {'curve': curve, 'final': float(curve[-1]),
                             'low': float(curve[-1] / spread), 'high': float(curve[-1] * spread)}
    return predictions


def outside(law, stage):
    """Sentences that say where a stage lies outside of what was fitted, and by how far."""
    notes = []
    quantities = [('peak rate', 'peak', stage.peak), ('share of replay', 'share', stage.share),
                  ('sum of rates', 'area', stage.area), ('number of steps', 'steps', stage.steps)]
    for words, key, value in quantities:
        fitted = [run[key] for run in law['runs']]
        notes.append(beyond(words, value, min(fitted) if key != 'steps' else 0, max(fitted)))
    for name in law['sets']:
        fitted = [run['start'][name] for run in law['runs']]
        margin = 0.01 * min(fitted)
        notes.append(beyond(f'loss on {name} at step 0', stage.start[name], min(fitted) - margin,
                            max(fitted) + margin))
    return [note for note in notes if note]


def beyond(words, value, low, high):
    if value < low * (1 - 1e-9) or value > high * (1 + 1e-9):
        edge = low if value < low else high
        times = f', {value / edge:.2f} times the edge' if edge else ''
        return (f'NOTE: the {words} is {value:.4g}. The fitted runs cover {low:.4g} to '
                f'{high:.4g}{times}.')


def read_config(law, words, start):
    """A config that has not been run, as a Stage with the losses of its old model."""
    cfg, _ = configurator.load(train.Config, words)
    stage = Stage(' '.join(words), vars(cfg))
    for knob in ALIKE[:4]:
        require(stage.config[knob] == law['alike'][knob], f'{knob} is {stage.config[knob]!r} in '
                f'{words[0]} and {law["alike"][knob]!r} in the runs of the law. Fit another one.')
    stage.start = start or start_of(cfg.init_from, law['sets'])
    return stage


def start_of(init_from, names):
    """{set: the last loss of the old model, a run folder or the config of one}."""
    folder = init_from
    if folder.endswith('.py'):
        folder = configurator.load(train.Config, [folder])[0].out_dir
    try:
        run = eval.Run(folder)
    except UserError:
        run = None
    require(run and set(names) <= set(run.sets), f'the losses of the old model {init_from!r} on '
            f'{", ".join(names)} are not known. Measure them, and add --start '
            f'{" ".join(f"{name}=1.5" for name in names)}')
    return {name: run.final(name) for name in names}


def import_scipy(part='optimize'):
    try:
        import importlib
        return importlib.import_module(f'scipy.{part}')
    except ImportError:
        raise UserError('results.law needs scipy: pip install scipy')


# ------------------------------------------------------------------------------
# Commands

def run_fit(args, words):
    law = fit(read_runs(words), args.form)
    eval.data.write_whole(args.out, (json.dumps(law, indent=1) + '\n').encode())
    for name, fitted in law['sets'].items():
        shown = ', '.join(f'{key} {value:.4g}' for key, value in fitted['parameters'].items())
        print(f'{name} ({fitted["role"]} data): momentum {fitted["momentum"]}, {shown}')
        print(f'  95% of final losses within {100 * interval(law, name):.1f}%')
    rows = [['final loss, left out of the fit', *law['sets']]]
    for run in law['runs']:
        errors = [fitted['left_out'][run['name']] for fitted in law['sets'].values()]
        rows.append([run['name'], *(f'{100 * error:+.2f}%' for error in errors)])
    print('\n'.join(eval.markdown(rows)))


def run_predict(args, words):
    law = json.loads(Path(args.law).read_text())
    stage = read_config(law, words, args.start)
    predictions = predict(law, stage)
    rows = [['set', 'step 0', 'predicted end', '95% interval']]
    for name, p in predictions.items():
        rows.append([name, f'{stage.start[name]:.3f}', f'{p["final"]:.3f}',
                     f'{p["low"]:.3f} to {p["high"]:.3f}'])
    print('\n'.join([*eval.markdown(rows), *outside(law, stage)]))
    if args.save:
        save_prediction(args.save, stage, predictions)


def save_prediction(path, stage, predictions):
    """Add a prediction to a JSON file, as it was before the run: at the steps of its evaluations."""
    every = stage.config['eval_every']
    steps = [*range(0, stage.steps, every), stage.steps]
    saved = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    entry = {'config': stage.name, 'start': stage.start, 'steps': steps, 'sets': {}}
    for name, p in predictions.items():
        curve = [round(float(p['curve'][step]), 5) for step in steps]
        entry['sets'][name] = p | {'curve': curve}
    saved[Path(stage.config['out_dir']).name] = entry
    eval.data.write_whole(path, (json.dumps(saved, indent=1) + '\n').encode())


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    fitting = commands.add_parser('fit')
    fitting.add_argument('--form', choices=FORMS, default='recovery')
    fitting.add_argument('--out', required=True)
    predicting = commands.add_parser('predict')
    predicting.add_argument('law')
    predicting.add_argument('--start', nargs='+', type=pair)
    predicting.add_argument('--out')
    predicting.add_argument('--save')
    args, words = parser.parse_known_args(argv)
    {'fit': run_fit, 'predict': run_predict}[args.command](args, words)


def pair(text):
    name, _, value = text.partition('=')
    return name, float(value)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.law: {error}')
