"""Draws where runs end: the loss on new data against the loss on old data.

    python -m results.plane OLD NEW RUN RUN ... --out x.png [--labels 'no replay' '5% replay' ...]

The runs of one name, of all seeds, are one point with a standard deviation each way. A star is an
old model before it was continued; where there are several, dotted lines lead to what became of
each. Other lines join points that differ in the share of replay alone, or in how strongly a project
acts: in the values of knobs of its own.
"""
import argparse
import sys
from collections import namedtuple
from dataclasses import fields

import numpy as np

import eval
import train
from configurator import UserError, require
from support import pictures

Point = namedtuple('Point', 'text end deviation start family')
# The knobs that must be equal for two points to be joined by a line.
FAMILY = ('train_data', 'replay_data', 'switches', 'schedule', 'learning_rate', 'min_lr', 'warmup',
          'max_steps', 'freeze', 'init_from', 'merged')


def find_points(groups, old, new, labels):
    """[Point, ...] of {name: [Run of a seed, ...]}. end, deviation, start: pairs of losses."""
    points = []
    for name, text in pictures.legend(groups, labels, 18).items():
        seeds = groups[name]
        for run in seeds:
            require({old, new} <= set(run.sets), f'{run.name} was not evaluated on {old} and {new}')
        ends = np.array([[run.final(old), run.final(new)] for run in seeds])        # (seeds, 2)
        starts = np.array([[run.losses(old)[0], run.losses(new)[0]] for run in seeds])
        deviation = ends.std(0, ddof=1) if len(seeds) > 1 else np.zeros(2)
        start = tuple(starts.mean(0).round(3)) if seeds[0].derived['parent'] else None
        config, known = seeds[0].config, {knob.name for knob in fields(train.Config)}
        own = sorted(knob for knob, value in config.items() if value and knob not in known)
        family = str([start, own, *(config.get(knob) or None for knob in FAMILY)])
        points.append(Point(text, ends.mean(0), deviation, start, family))
    return points


def plane(groups, old, new, out, labels=()):
    """Draw the plane of {name: [Run of a seed, ...]} as a PNG."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    points = find_points(groups, old, new, labels)
    starts = {point.start for point in points if point.start}
    fig, ax = plt.subplots(figsize=(6.8, 5.2), layout='constrained')
    # a colour for each family; a point is a mark on a cross of standard deviations
    for i, family in enumerate(dict.fromkeys(point.family for point in points)):
        color = pictures.STYLES[i % len(pictures.STYLES)][0]
        members = [point for point in points if point.family == family]
        ax.plot(*zip(*(point.end for point in members)), color=color, lw=1)
        for point in members:
            (x, y), (dx, dy) = point.end, point.deviation
            ax.plot([x - dx, x + dx, x, x, x], [y, y, y, y - dy, y + dy], color=color, lw=1)
            ax.plot(x, y, 'o' if point.start else 's', color=color, ms=6)
            if point.start and len(starts) > 1:
                ax.plot(*zip(point.start, point.end), color='0.6', ls=':', lw=1, zorder=0)
    for start in starts:
        ax.plot(*start, '*', color='0.3', ms=12)

    fig.supxlabel('star: an old model; circle: continued from it; square: trained from random '
                  'weights', fontsize=9, color='0.3')
    ax.set(xlabel=f'loss on old data: {old} (nats per token)',
           ylabel=f'loss on new data: {new} (nats per token)',
           title='Lower left is better: little forgotten, much learned')
    pictures.plain_axes(ax)
    add_labels(fig, ax, points)
    pictures.save_figure(fig, out)


def add_labels(fig, ax, points):
    """Name every point where its label covers the fewest lines, points and other labels."""
    from matplotlib.transforms import Bbox
    ax.margins(0.12)
    fig.draw_without_rendering()                        # from here on, pixels are known
    taken = []
    for line in ax.lines:
        path = line.get_path().interpolated(20).transformed(ax.transData)
        taken += [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in path.vertices]
    places = [(x, y, far) for far in (6, 18) for y in (1, -1, 0) for x in (1, -1, 0) if x or y]
    for point in points:
        tried = []
        for x, y, far in places:
            text = ax.annotate(point.text, point.end, (far * x, far * y),
                               textcoords='offset points', ha=('center', 'left', 'right')[x],
                               va=('center', 'bottom', 'top')[y], fontsize=8.5)
            box = text.get_window_extent()
            is_cut = ax.bbox.count_contains(box.corners()) < 4
            tried.append((box.count_overlaps(taken) + 1000 * is_cut, len(tried), text))
        for _, _, text in sorted(tried)[1:]:
            text.remove()
        taken += [min(tried)[2].get_window_extent()] * 100      # to cover a label is worst


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('old')
    parser.add_argument('new')
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--out', required=True)
    parser.add_argument('--labels', nargs='+', default=(), help='names of the rows, in their order')
    args = parser.parse_args(argv)
    plane(eval.by_seed(args.runs), args.old, args.new, args.out, args.labels)
    print(args.out)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.plane: {error}')
