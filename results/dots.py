"""Draws how far losses lie from one of them: a dot with its interval for each, in panels.

    python -m results.dots SET RUN RUN ... --out x.png --labels 'annealed' 'averaged' ...
        --panel 'after part 1' TERM TERM ... [--panel ...] [--zero TERM]

A TERM is that of a claim (results/claims.py), such as a@300. The labels name the terms of every
panel, in their order. Differences are taken seed by seed from the first term of a panel, or from
--zero. A dot is their mean, a line its 95% interval, and small circles are the seeds.
"""
import argparse
import sys

import numpy as np

import eval
from configurator import UserError, require
from support import pictures
from results.claims import interval, values_of


def find_differences(groups, dataset, terms, zero):
    """[[term minus zero of each seed that has both], ...] in nats."""
    base, found = values_of(zero, dataset, groups), []
    for term in terms:
        values = values_of(term, dataset, groups)
        seeds = sorted(values.keys() & base.keys())
        require(seeds, f'{term} and {zero} have no seed in common')
        found.append(np.array([values[seed] - base[seed] for seed in seeds]))
    return found


def dots(groups, dataset, panels, labels, zero, out):
    """Draw the panels [(title, terms), ...] as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    found = []
    for title, *terms in panels:
        require(len(terms) == len(labels), f'panel {title!r} has {len(terms)} terms, but there '
                f'are {len(labels)} labels')
        found.append(find_differences(groups, dataset, terms, zero or terms[0]))

    size = 2 + 3 * len(panels), 1.2 + 0.42 * len(labels)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False,
                             layout='constrained')
    for ax, (title, *_), rows in zip(axes[0], panels, found):
        ax.axvline(0, color='0.4', ls=':', lw=1)
        for y, by in enumerate(rows):
            color = pictures.STYLES[0 if by.any() else 6][0]        # black: the zero itself
            if len(by) > 1:
                ax.plot(interval(by), (y, y), color=color, lw=1.5)
                ax.plot(by, np.full(len(by), y), 'o', mfc='white', mec='0.5', ms=4)
            ax.plot(by.mean(), y, 'o', color=color, ms=7)
        ax.set_title(title, fontsize=10)
        pictures.plain_axes(ax, grid='x')
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()                                   # the first row on top
    name = 'the mean over all sets' if dataset == 'average' else dataset
    fig.supxlabel(f'loss on {name}, minus that of the black dot (nats per token): left is better\n'
                  'blue: mean and 95% interval of the differences; small circles: the seeds',
                  fontsize=9, color='0.3')
    pictures.save_figure(fig, out)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', metavar='SET', help='a validation set, or average')
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--panel', nargs='+', action='append', required=True)
    parser.add_argument('--labels', nargs='+', required=True)
    parser.add_argument('--zero', help='a term for all panels')
    parser.add_argument('--out', required=True)
    args = parser.parse_args(argv)
    dots(eval.by_seed(args.runs), args.dataset, args.panel, args.labels, args.zero, args.out)
    print(args.out)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.dots: {error}')
