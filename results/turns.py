"""Draws the differences of claims under two or more conditions: which of them turn?

    python -m results.turns a/claims_old.txt a/claims_new.txt --runs out/x_seed1 out/y_seed1 ...
        --labels 'the old way' 'the new way' --out a/turns.png

The claims files have the same sentences in the same order, and formulas of one comparison (see
results/claims.py). A claim has a dot and its 95% interval for every file: right of the line it is
as the paper says, left of it the other way round, and across it not decided.
"""
import argparse
import re
import sys
import textwrap

import numpy as np

import eval
from configurator import UserError, require
from support import pictures
from results.claims import compare, fields, interval, read_claims


def find_differences(claims_file, groups):
    """{sentence without its source: the differences of each seed}"""
    found = {}
    for line in read_claims(claims_file):
        formula, sentence = fields(line)[:2]
        _, _, comparisons = compare(formula, groups)
        require(len(comparisons) == 1 and comparisons[0][0] == '<', f'{claims_file}: {formula!r}: '
                'a claim to draw compares two terms, as in SET: TERM < TERM')
        found[re.sub(r' \(.*\)\.$', '.', sentence)] = np.array(comparisons[0][1])
    return found


def turns(conditions, labels, out):
    """Draw [{sentence: differences}, ...], one dict for each label, as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    sentences = list(conditions[0])
    require(sentences, 'there is no claim in the first file')
    require(all(list(condition) == sentences for condition in conditions),
            'the claims files differ in their sentences or in their order')
    require(len(labels) == len(conditions), f'{len(labels)} labels for {len(conditions)} files')

    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.55 * len(sentences)), layout='constrained')
    ax.axvline(0, color='0.3', lw=1)
    gap = 0.5 / len(conditions)
    for i, (condition, label) in enumerate(zip(conditions, labels)):
        color = pictures.STYLES[i][0]
        rows = np.arange(len(sentences)) + gap * (i - (len(conditions) - 1) / 2)
        for y, by in zip(rows, condition.values()):
            if len(by) > 1:
                ax.plot(interval(by), (y, y), color=color, lw=2)
        means = [by.mean() for by in condition.values()]
        ax.plot(means, rows, 'o', color=color, ms=7, label=label)
    ax.set_yticks(range(len(sentences)), [textwrap.fill(s, 52) for s in sentences], fontsize=9)
    ax.invert_yaxis()                                           # the first claim on top
    pictures.plain_axes(ax, grid='x')
    above = dict(y=1.01, fontsize=9, transform=ax.get_xaxis_transform())
    ax.text(0, s='the other way round  \u2190  ', ha='right', **above)
    ax.text(0, s='  \u2192  as the papers say', ha='left', **above)
    ax.set_xlabel('difference in nats per token: the mean of the seeds and its 95% interval\n'
                  '(across zero: not decided)', fontsize=9)
    ax.legend(loc='lower center', bbox_to_anchor=(0.5, 1.03), ncol=len(labels), frameon=False)
    pictures.save_figure(fig, out)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('claims', nargs='+', help='claims files')
    parser.add_argument('--runs', nargs='+', required=True)
    parser.add_argument('--labels', nargs='+', required=True, help='one for each claims file')
    parser.add_argument('--out', required=True)
    args = parser.parse_args(argv)
    groups = eval.by_seed(args.runs)
    turns([find_differences(file, groups) for file in args.claims], args.labels, args.out)
    print(args.out)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.turns: {error}')
