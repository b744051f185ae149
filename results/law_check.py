"""Compares the predictions of a law with finished runs that it was not fitted to.

    python -m results.law_check law.json out/c_seed1 out/d_seed1 ... --fitted out/a_seed1 ...
                                [--out x.md] [--picture x.png] [--labels 'half the peak' ...]

Two baselines know no law: the final loss of the nearest fitted run, and the D-CPT law, which knows
the shares of the data but no learning rate. They come from the fitted runs, which are named again.
Runs with a peak rate or a share of replay outside of what was fitted are counted apart.
"""
import argparse
import json
import sys

import numpy as np

import eval
from configurator import UserError, require
from support.files import write_whole
from results import law_pictures
from results.law import STARTS, check_alike, logs, outside, predict, read_law, read_runs, search

# {column of a table: its name}. curve is the root mean square over all evaluations.
COLUMNS = {'law': 'law', 'curve': 'law, all steps', 'nearest': 'nearest run', 'dcpt': 'D-CPT'}


def nearest(fitted, stage):
    """The fitted run whose peak rate, replay (plus 1%) and length differ least.

    By the product of the three factors; of several runs, the one that starts at the nearest loss.
    """
    def distance(run):
        factors = [run.peak / stage.peak, run.steps / stage.steps,
                   (run.share + 0.01) / (stage.share + 0.01)]
        starts = [abs(run.start[name] - stage.start[name]) for name in run.start]
        return round(float(np.abs(np.log(factors)).sum()), 6), sum(starts)
    return min(fitted, key=distance)


DCPT = {'E0': (1e-3, 2), 'B': (1e-4, 3), 'eta': (1e-3, 5), 'beta': (1e-3, 3), 'C': (1e-6, 3),
        'eps': (1e-4, 2), 'gamma': (1e-3, 5)}


def dcpt(D, r, E0, B, eta, beta, C, eps, gamma):
    """L/L(0) = E + B r^eta / D^beta + C / (r + eps)^gamma after D steps, for one size of model
    (Que et al. 2024, arXiv:2406.01375). r: the share of the data that a validation set is of."""
    return E0 + B * r**eta / D**beta + C / (r + eps) ** gamma


def own_share(stage, name):
    return stage.share if stage.roles[name] == 'old' else 1 - stage.share


def fit_dcpt(fitted, name):
    """{parameter: value} from all evaluations of all fitted runs."""
    D = np.concatenate([stage.at[1:] for stage in fitted]).astype(float)
    r = np.repeat([own_share(stage, name) for stage in fitted],
                  [len(stage.at) - 1 for stage in fitted])
    seen = logs(fitted, name)
    return search(DCPT, STARTS, lambda values: np.log(dcpt(D, r, **values)) - seen)[0]


def compare(law, stages, fitted):
    """[{run, set, end, predicted, low, high, ...}, ...] with the errors in percent of COLUMNS."""
    rows = []
    by_share = {name: fit_dcpt(fitted, name) for name in law['sets']}
    for stage in stages:
        near, far = nearest(fitted, stage), outside(law, stage)
        for name, found in predict(law, stage).items():
            share = own_share(stage, name)
            finals = {'law': found['final'], 'nearest': near.losses[name][-1],
                      'dcpt': stage.start[name] * dcpt(stage.steps, share, **by_share[name])}
            end = float(stage.losses[name][-1])
            curve = found['curve'][stage.at[1:]] / stage.losses[name][1:] - 1
            row = {'run': stage.name, 'set': name, 'role': stage.roles[name], 'end': end,
                   'predicted': found['final'], 'low': found['low'], 'high': found['high'],
                   'curve': 100 * float(np.sqrt(np.mean(curve**2))), 'nearest_run': near.name,
                   'is_inside': not {'peak', 'share'} & set(far)}
            rows.append(row | {key: 100 * (final / end - 1) for key, final in finals.items()})
    return rows


def table(rows, names):
    """Errors as Markdown: a row for each run of {run: its name}, and below their median and worst.

    Runs outside of the fitted peaks and shares are counted apart.
    """
    sets = list(dict.fromkeys(row['set'] for row in rows))
    lines = [['error of the final loss', *(f'{name}: {text}' for name in sets
                                           for text in COLUMNS.values())]]
    for run, text in names.items():
        found = {row['set']: row for row in rows if row['run'] == run}
        lines.append([text, *(f'{found[name][key]:+.1f}%' for name in sets for key in COLUMNS)])
    inside = [row for row in rows if row['is_inside']]
    for members, where in ((inside, ' within the fitted peaks and shares'), (rows, '')):
        runs = len({row['run'] for row in members})
        for word, of in (('median', np.median), ('worst', np.max)):
            line = [f'{word} of the {runs}{where}']
            for name in sets:
                for key in COLUMNS:
                    errors = [abs(row[key]) for row in members if row['set'] == name]
                    line.append(f'{of(errors):.1f}%' if errors else '–')
            lines.append(line)
    hits = sum(row['low'] <= row['end'] <= row['high'] for row in rows)
    return '\n'.join([*eval.markdown(lines), '', f'{hits} of {len(rows)} final losses lie in their '
                      '95% intervals.'])


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('law')
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--fitted', nargs='+', required=True, help='the runs of the law')
    parser.add_argument('--labels', nargs='+', help='names of the runs, in their order')
    parser.add_argument('--out', help='a table (.md); its values go into a .json beside it')
    parser.add_argument('--picture', help='curves and predictions (.png)')
    args = parser.parse_args(argv)
    law, stages, fitted = read_law(args.law), read_runs(args.runs), read_runs(args.fitted)
    known = {run['name'] for run in law['runs']}
    require({stage.name for stage in fitted} == known, '--fitted: name the runs of the law')
    for stage in stages:
        check_alike(stage, law['alike'])
    both = known & {stage.name for stage in stages}
    require(not both, f'the law was fitted to {", ".join(sorted(both))}')
    labels = args.labels or [stage.name for stage in stages]
    require(len(labels) == len(stages), f'--labels: {len(labels)} labels for {len(stages)} runs')

    rows = compare(law, stages, fitted)
    names = {stage.name: label for stage, label in zip(stages, labels)}
    text = table(rows, names)
    print('\n'.join([text, *(f'{names[stage.name]}: {note}' for stage in stages
                             for note in outside(law, stage).values())]))
    if args.out:
        write_whole(args.out, (text + '\n').encode())
        name = args.out.removesuffix('.md') + '.json'
        write_whole(name, (json.dumps(rows, indent=1) + '\n').encode())
    if args.picture:
        law_pictures.curves([(names[stage.name], stage, predict(law, stage)) for stage in stages],
                            args.picture)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.law_check: {error}')
