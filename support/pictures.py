"""Pictures of runs: forgetting curves, with the learning rate below.

Nobody needs this to understand a run.
"""
import io
import textwrap
from pathlib import Path

import numpy as np

import schedules
from configurator import require
from support.files import write_whole

# The colours of Okabe and Ito with a line style each: they differ in grey and for the colour-blind.
STYLES = [('#0072B2', '-'), ('#D55E00', '--'), ('#009E73', '-.'), ('#CC79A7', ':'),
          ('#E69F00', (0, (5, 1))), ('#56B4E9', (0, (3, 1, 1, 1))), ('#000000', (0, (1, 1))),
          ('#999999', '-')]
# What a set can be to a run, in the order in which pictures show them.
ROLES = ('old data', 'the same data again', 'new data', 'training data', 'never trained on')


def plot(groups, out, labels=(), notes=()):
    """Forgetting curves of {row: [Run of a seed, ...]}: a panel for each set, old sets first, and
    the rate below. What a project logs has panels of its own, below those. notes: sentences."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    runs = [seeds[0] for seeds in groups.values()]
    sets = all_sets(runs)
    require(sets, 'there is nothing to draw: val_data was empty')
    sets.sort(key=lambda name: ROLES.index(common_role(runs, name)))

    unit, xlabel = unit_of_tokens(max(run.evals[-1]['tokens'] for run in runs))
    logged = sorted({name for run in runs for name in run.logged()})
    width = min(4.6, max(3.2, 14 / len(sets)))              # inches of a panel
    fig = plt.figure(figsize=(width * len(sets) + 1, 4.8 + 1.2 * len(logged)), layout='constrained')
    grid = fig.add_gridspec(2 + len(logged), len(sets), height_ratios=[3] + [1] * (1 + len(logged)))
    handles = {}                                            # {row: line} for the legend
    first = None
    for column, name in enumerate(sets):
        first = fig.add_subplot(grid[0, column], sharex=first)
        handles = draw_set(first, groups, name, unit) | handles
        rate = fig.add_subplot(grid[1, column], sharex=first)
        draw_rates(rate, groups, name, unit)
        rate.set_xlabel('' if logged else xlabel)
        if column == 0:
            first.set_ylabel('validation loss (nats per token)')
            rate.set_ylabel('learning rate')
    for row, name in enumerate(logged, 2):
        ax = fig.add_subplot(grid[row, :], sharex=first)
        draw_logged(ax, groups, name, unit)
        ax.set(ylabel=name, xlabel=xlabel if name == logged[-1] else '')

    notes = list(notes)
    if any(starts_a_stage(run) for run in runs):
        notes.append('Dotted line: the loss when this stage of training began.')
    if any(len(seeds) > 1 for seeds in groups.values()):
        notes.append('Shaded: one standard deviation over the seeds.')
    wrapped = textwrap.fill('  '.join(notes), int(22 * width * len(sets)))
    fig.supxlabel(wrapped, fontsize=9, color='0.3', parse_math=False)
    if any(run.config.get('rehearse') for run in runs):
        fig.suptitle('REHEARSAL: a tiny model on built-in data. The losses mean nothing.')
    texts = legend(groups, labels)
    if len(groups) > 1:
        fig.legend(handles.values(), [texts[row] for row in handles], frameon=False,
                   loc='outside right center', fontsize=8.5, labelspacing=0.9)
    save_figure(fig, out)


def all_sets(runs):
    """The validation sets of all runs, in the order in which they appear."""
    return list(dict.fromkeys(name for run in runs for name in run.sets))


def styled(groups):
    """(row, seeds, colour, line style) of every row."""
    styles = STYLES * len(groups)
    return [(row, seeds, *style) for (row, seeds), style in zip(groups.items(), styles)]


def draw_set(ax, groups, name, unit):
    """The losses of all rows on a set -> {row: line}."""
    lines, shown = {}, []                                   # shown: losses that must be seen
    starts = {run.losses(name)[0] for seeds in groups.values() for run in seeds[:1]
              if name in run.sets}
    for row, seeds, color, style in styled(groups):
        seeds = [run for run in seeds if name in run.sets]
        if not seeds:
            continue
        tokens, loss, deviation = mean_curve(seeds, name)
        lines[row], = ax.plot(tokens / unit, loss, color=color, ls=style, lw=1.8)
        low, high = loss - deviation, loss + deviation
        ax.fill_between(tokens / unit, low, high, color=color, alpha=0.2, lw=0)
        if starts_a_stage(seeds[0]):
            its_color = '0.4' if len(starts) == 1 else color
            ax.axhline(loss[0], color=its_color, ls=':', lw=1, zorder=0)
        # the fall from random weights may leave through the top
        late = tokens >= (0 if seeds[0].derived['parent'] else tokens[-1] / 10)
        shown.extend([*low[late], *high[late]])
    shown = np.array(shown)[np.isfinite(shown)]
    if len(shown):
        margin = 0.08 * np.ptp(shown) or 0.1
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
    ax.set_title(panel_title(groups, name), fontsize=10, parse_math=False)
    ax.tick_params(labelbottom=False)
    plain_axes(ax)
    return lines


def draw_rates(ax, groups, name, unit):
    for _, seeds, color, style in styled(groups):
        if name in seeds[0].sets:
            tokens, rates = rates_of(seeds[0])
            ax.plot(tokens / unit, rates, color=color, ls=style, lw=1.5)
    ax.set_ylim(0, None)
    ax.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    plain_axes(ax)


def draw_logged(ax, groups, name, unit):
    for _, seeds, color, style in styled(groups):
        tokens, values = seeds[0].logged().get(name, ((), ()))
        ax.plot(np.divide(tokens, unit), values, color=color, ls=style, lw=1)
    plain_axes(ax)


def legend(groups, labels=(), width=30):
    """{name: text} of --labels, or of the knob `label`, or else the names of the runs."""
    if not labels:
        labels = [seeds[0].config['label'] or name for name, seeds in groups.items()]
    require(len(labels) == len(groups), f'--labels: there are {len(labels)} labels for '
            f'{len(groups)} rows ({", ".join(groups)})')
    return {name: textwrap.fill(label, width) for name, label in zip(groups, labels)}


def mean_curve(seeds, name):
    """Tokens, mean loss and standard deviation over the seeds, where all were evaluated."""
    curves = [dict(zip([row['tokens'] for row in run.evals], run.losses(name))) for run in seeds]
    tokens = sorted(set.intersection(*map(set, curves)))
    require(tokens, f'the seeds of {seeds[0].name} were never evaluated after the same tokens')
    losses = np.array([[curve[t] for t in tokens] for curve in curves])         # (seeds, points)
    deviation = losses.std(0, ddof=1) if len(seeds) > 1 else np.zeros(len(tokens))
    return np.array(tokens), losses.mean(0), deviation


def rates_of(run):
    """Tokens and learning rates of every step from the first evaluation to the last.

    They come from the schedule: the log has a few of them only.
    """
    config = run.config
    lr = schedules.build(config['schedule'], steps=config['max_steps'],
                         peak=config['learning_rate'], **config)
    steps = np.arange(run.evals[0]['step'], run.evals[-1]['step'] + 1)
    rates = lr.rates[np.minimum(steps, len(lr.rates) - 1)]
    return steps * run.derived['tokens_per_step'], rates


def unit_of_tokens(most):
    """(tokens in a unit, label of an axis) that keep tick labels short."""
    unit, label = 1, 'training tokens'
    for size, word in ((1e3, 'thousands'), (1e6, 'millions'), (1e9, 'billions')):
        if most >= size:
            unit, label = size, f'training tokens ({word})'
    return unit, label


def starts_a_stage(run):
    """Whether a run began a stage: from an old model, and not as a branch on the same data."""
    is_branch = bool(run.config['branch_from'])
    return run.has_start and bool(run.derived['parent']) and (bool(run.old) or not is_branch)


def common_role(runs, name):
    """What a set is to the runs of a picture: what comes first in ROLES of what it is to each."""
    roles = [run.roles[name] for run in runs if name in run.sets]
    return min(roles, key=ROLES.index)


def panel_title(groups, name):
    """The role of a set and its name; for a single run, how its loss has changed too."""
    runs = [seeds[0] for seeds in groups.values()]
    role, run = common_role(runs, name), runs[0]
    title = f'{role[0].upper()}{role[1:]}: {name}'
    if len(runs) > 1 or not starts_a_stage(run):
        return title
    if name in run.old:
        title += f' ({100 * run.share(name):.2g}% replay)'
    losses = run.losses(name)
    title += f'\n{losses[-1] - losses[0]:+.3f} nats since the start'
    if name in run.old:
        title += f' (peak {run.forgetting_peak(name):+.3f})'
    return title


def plain_axes(ax, grid='both'):
    """A light grid, and no frame at the top and right."""
    ax.grid(axis=grid, alpha=0.25)
    ax.spines[['top', 'right']].set_visible(False)


def save_figure(fig, out):
    """Write a PNG whole, never through a link."""
    import matplotlib.pyplot as plt
    require(str(out).endswith('.png'), f'--out {out}: expected a name that ends in .png')
    image = io.BytesIO()
    fig.savefig(image, dpi=130)
    plt.close(fig)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, image.getvalue())
