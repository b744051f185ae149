"""The pictures of law.py and law_check.py: predicted curves, and the plane of what advise tried."""
import textwrap

import numpy as np

from support import pictures


def curves(panels, out):
    """Predicted losses as dashed lines, with an interval at the end; what came out as solid lines.

    panels: [(title, stage, predictions), ...]. A stage with losses is a finished run.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    across = min(5, len(panels))
    down = -(-len(panels) // across)
    fig, axes = plt.subplots(down, across, figsize=(1.4 + 2.2 * max(across, 2), 0.9 + 2.3 * down),
                             sharey=True, squeeze=False, layout='constrained')
    for ax, (title, stage, predictions) in zip(axes.flat, panels):
        for (color, _), (name, found) in zip(pictures.STYLES, predictions.items()):
            steps = np.arange(stage.steps + 1)
            ax.plot(steps, found['curve'], color=color, ls='--', lw=1.5, label=f'{name}, predicted')
            ax.plot([stage.steps] * 2, [found['low'], found['high']], color=color, lw=5, alpha=0.3,
                    solid_capstyle='butt')
            if hasattr(stage, 'losses'):
                ax.plot(stage.at, stage.losses[name], color=color, lw=1.5, marker='o', ms=3.5,
                        label=f'{name}, measured')
        ax.set_title(textwrap.fill(title, 26 if across > 1 else 60), fontsize=9, parse_math=False)
        ax.set_xlim(0, None)
        pictures.plain_axes(ax)
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel('validation loss\n(nats per token)')
    fig.supxlabel('training steps        broad bar: 95% interval of the final loss', fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc='outside upper center', ncols=len(labels), frameon=False)
    pictures.save_figure(fig, out)


def plane(law, tried, best, out):
    """Predicted ends as loss on new data against loss on old data: a line for each peak rate.

    tried: [(stage, predictions), ...]; best: the stage that gets a star.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    by_role = {}
    for name, fitted in law['sets'].items():
        by_role.setdefault(fitted['role'], name)
    old, new = by_role['old'], by_role['new']
    lines = {}
    for stage, predictions in tried:
        end = [predictions[name]['final'] for name in (old, new)]
        lines.setdefault(stage.peak, []).append((*end, stage.share))
        if stage is best:
            star = end

    fig, ax = plt.subplots(figsize=(7.2, 5.2), layout='constrained')
    for i, (peak, points) in enumerate(lines.items()):
        x, y, shares = np.array(points).T
        ax.plot(x, y, color=plt.cm.viridis(i / len(lines)), lw=1.5, marker='.',
                label=f'{peak:.2g}')
        # the shares are named below the line of the highest peak
        if i == len(lines) - 1:
            for j in (0, len(x) // 2, -1):
                ax.annotate(f'{100 * shares[j]:.2g}% replay', (x[j], y[j]), (-6, -6), fontsize=8.5,
                            textcoords='offset points', ha='right', va='top')
    ax.plot(*star, '*', color='#D55E00', ms=16, zorder=5, label='best')
    ax.legend(title='peak rate', frameon=False, fontsize=8.5)
    ax.margins(0.12)
    ax.set(xlabel=f'predicted final loss on old data: {old} (nats per token)',
           ylabel=f'predicted final loss on new data: {new} (nats per token)',
           title='Lower left is better: little forgotten, much learned')
    pictures.plain_axes(ax)
    pictures.save_figure(fig, out)
