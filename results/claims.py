"""Puts the claims of a paper to the test on runs, and prints a verdict on each.

    python -m results.claims results/warmup/claims.txt out/a_seed1 out/a_seed2 out/b_seed1 ...

A line of a claims file is a formula and a sentence. Lines that begin with # are comments. Two more
fields make it a row of the table in results/README.md: what the paper found, and whether runs of
this size could show it.

    code: rewarm_replay5 < constant_replay5 | Re-warming adapts better. | by 0.1 | yes

    SET: TERM < TERM < ...      the loss on SET is lower for the left row than for the right one
    SET: TERM ~0.02 TERM        the two losses differ by at most 0.02
    SET                         a validation set, or `average`: the mean over all sets of a run
    TERM                        ROW or ROW@WHEN, as in `2 * a@rise`, `b@50` or `c + 0.02`
    ROW                         a row of the table: the runs of one name, of all seeds
    WHEN                        a step, or start, peak, best, end, rise (end minus start)

Runs of the same seed are compared with each other: they start from the same old model and read the
same windows. The mean of their differences has a 95% interval, by Student's t, and is_above()
decides by it. With one seed there is no interval, and nothing is decided.
"""
import re
import sys
from pathlib import Path

import numpy as np

import eval
from configurator import UserError, require

RULE = ('A claim holds when the whole 95% interval of its paired differences lies on its side '
        "(Student's t over the seeds). It does not hold when the whole interval lies on the other "
        'side. Otherwise, and with one seed, it is not decided.')
# 97.5% points of Student's t for 2, 3, ... 10 seeds, that is for 1, 2, ... 9 degrees of freedom
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(differences):
    """(low, high): the 95% interval of the mean of paired differences, one of each seed."""
    n = len(differences)
    if n < 2:
        return -np.inf, np.inf
    require(n <= 10, f'{n} seeds: STUDENT_T ends at 10. Add its next values.')
    half = STUDENT_T[n - 2] * np.std(differences, ddof=1) / np.sqrt(n)
    return np.mean(differences) - half, np.mean(differences) + half


def is_above(limit, differences):
    """Whether the mean is above a limit: True, False, or None when it is not decided."""
    low, high = interval(differences)
    if low > limit:
        return True
    return False if high < limit else None


def holds(relation, differences):
    """Whether left < right or left ~x right, from right minus left: True, False or None."""
    if relation == '<':
        return is_above(0, differences)
    margin = float(relation[1:])
    inside = [is_above(-margin, differences), is_above(-margin, [-d for d in differences])]
    if False in inside:
        return False
    return None if None in inside else True


def shown(differences):
    """'0.200, 95% interval 0.150 to 0.250, 3 seeds'"""
    mean = f'{np.mean(differences):.3f}'
    if len(differences) == 1:
        return f'{mean}, one seed'
    low, high = interval(differences)
    return f'{mean}, 95% interval {low:.3f} to {high:.3f}, {len(differences)} seeds'


def read_claims(path):
    """The lines of a claims file."""
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith('#')]


def fields(line):
    """[formula, sentence], or with what the paper found and whether our scale could show it."""
    found = [field.strip() for field in line.split('|')]
    require(len(found) in (2, 4) and all(found), 'expected SET: TERM < TERM | sentence, or with '
            '| what the paper found | whether this scale could show it')
    return found


def loss_at(run, dataset, when):
    losses = run.losses(dataset)
    named = {'start': losses[0], 'peak': max(losses), 'best': min(losses), 'end': losses[-1],
             'rise': losses[-1] - losses[0]}
    by_step = {str(row['step']): loss for row, loss in zip(run.evals, losses)}
    require(when in named | by_step, f'@{when} is neither a step at which {run.name} was evaluated '
            f'nor one of {", ".join(named)}')
    return (named | by_step)[when]


def values_of(term, dataset, groups):
    """{seed: value} of a term such as '2 * row@rise + 0.01'."""
    match = re.fullmatch(r'(?:([\d.]+) \* )?([^\s@]+)(?:@(\w+))?(?: ([+-]) ([\d.]+))?', term)
    require(match, f'{term!r} is not a term')
    factor, row, when, sign, offset = match.groups()
    require(row in groups, f'there is no row {row!r}, but {", ".join(groups)}')
    values = {}
    for run in groups[row]:
        sets = run.sets if dataset == 'average' else [dataset]
        require(set(sets) <= set(run.sets), f'{run.name} was not evaluated on {dataset!r}')
        loss = np.mean([loss_at(run, name, when or 'end') for name in sets])
        values[run.config['seed']] = float(factor or 1) * loss + float(f'{sign or ""}{offset or 0}')
    return values


def compare(formula, groups):
    """(set, {term: {seed: value}}, [(relation, its differences, one of each seed), ...])"""
    dataset, _, comparison = formula.partition(':')
    terms = re.split(r'\s+(<|~[\d.]+)\s+', comparison.strip())      # every second is a relation
    relations, terms = terms[1::2], terms[0::2]
    require(relations, 'expected SET: TERM < TERM | sentence')
    values = {term: values_of(term, dataset, groups) for term in terms}

    found = []
    for relation, a, b in zip(relations, terms, terms[1:]):
        left, right = values[a], values[b]
        by = [right[seed] - left[seed] for seed in sorted(left.keys() & right.keys())]
        require(by, f'{a} and {b} have no seed in common')
        found.append((relation, by))
    return dataset, values, found


def answer(found):
    """The verdict on the comparisons of a claim."""
    answers = [holds(relation, by) for relation, by in found]
    if False in answers:
        return 'Does not hold'
    return 'Not decided' if None in answers else 'Holds'


def verdict(line, groups):
    """The verdict on a claim as a line of Markdown, with its numbers in brackets."""
    formula, sentence = fields(line)[:2]
    dataset, values, found = compare(formula, groups)
    text, *others = [f'{term} {np.mean(list(v.values())):.3f}' for term, v in values.items()]
    for term, (relation, by) in zip(others, found):
        text += f' {relation[0]} {term} (by {shown(by)})'
    return f'- **{answer(found)}.** {sentence} [{dataset}: {text}]'


def main(argv):
    require(len(argv) > 1 and not argv[0].startswith('-'), __doc__)
    groups = eval.by_seed(argv[1:])
    print(f'{RULE}\n')
    for line in read_claims(argv[0]):
        try:
            print(verdict(line, groups))
        except UserError as error:
            raise UserError(f'{argv[0]}: {line!r}: {error}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.claims: {error}')
