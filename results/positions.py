"""Draws the loss by position in the window, at the first and at the last step of several runs.

    python -m results.positions SET RUN RUN ... --out x.png [--labels ...]

SET is a validation set. The runs are those of projects/longer.py, which records these losses.
"""
import argparse
import sys

import numpy as np

import eval
from configurator import UserError, require
from support import pictures


def draw(groups, dataset, out, labels=()):
    """Draw {name: [Run of a seed, ...]} as a PNG; of several seeds, the mean."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    texts = pictures.legend(groups, labels)
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout='constrained')
    for ax, when, title in zip(axes, (0, -1), ('before the first step', 'after the last step')):
        for (name, runs), (color, style) in zip(groups.items(), pictures.STYLES):
            found = [run.evals[when].get('by_position', {}).get(dataset) for run in runs]
            require(all(found), f'{name}: no losses by position on {dataset!r}. Train it with '
                    'projects.longer.')
            losses = np.mean(found, axis=0)                                     # (parts)
            centres = (np.arange(len(losses)) + 0.5) * runs[0].config['block_size'] / len(losses)
            ax.plot(centres, losses, color=color, ls=style, label=texts[name])
        ax.set(title=title, xlabel='position in the window (tokens)')
        pictures.plain_axes(ax)
    axes[0].set_ylabel(f'loss on {dataset} (nats per token)')
    axes[1].legend(frameon=False, fontsize=8.5)
    pictures.save_figure(fig, out)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dataset')
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--out', required=True)
    parser.add_argument('--labels', nargs='+', default=(), help='names of the rows, in their order')
    args = parser.parse_args(argv)
    draw(eval.by_seed(args.runs), args.dataset, args.out, args.labels)
    print(args.out)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.positions: {error}')
