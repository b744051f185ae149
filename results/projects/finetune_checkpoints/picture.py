"""Draws scores against the length of pre-training, before and after fine-tuning.

    python -m results.projects.finetune_checkpoints.picture --out x.png out/names_from70_seed1 ...

Runs are named TASK_fromSTEP_seedN.
"""
import re
import sys
from pathlib import Path

import eval
from configurator import UserError, require

TITLES = {'names': 'docstring → name of its function', 'answers': 'doctest → what it prints'}
# what to draw of an evaluation, and its label
ROWS = {'right bytes': (lambda entry: 100 * entry['right bytes'], 'right bytes of answers (%)'),
        'docs': (lambda entry: entry['val']['docs']['loss'], 'loss on docs (nats per byte)')}


def draw(folders, out):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    tasks = {}                                              # {task: [(step, Run), ...]}
    for folder in folders:
        match = re.match(r'(\w+)_from(\d+)', Path(folder).name)
        require(match, f'{folder}: expected a name such as names_from70_seed1')
        tasks.setdefault(match[1], []).append((int(match[2]), eval.Run(folder)))

    fig, axes = plt.subplots(2, len(tasks), figsize=(7.6, 5.6), sharex=True, sharey='row',
                             squeeze=False, layout='constrained')
    for column, (task, runs) in enumerate(tasks.items()):
        runs.sort(key=lambda pair: pair[0])
        steps = [step for step, _ in runs]
        for ax, (value, label) in zip(axes[:, column], ROWS.values()):
            untouched = [value(run.evals[0]) for _, run in runs]
            tuned = [value(run.evals[-1]) for _, run in runs]
            ax.plot(steps, tuned, 'o-', color='#D55E00', label='after fine-tuning')
            ax.plot(steps, untouched, 's--', color='#0072B2', label='checkpoint as it is')
            eval.plain_axes(ax)
            if column == 0:
                ax.set_ylabel(label)
        axes[0, column].set_title(TITLES.get(task, task), fontsize=11)
        axes[1, column].set_xlabel('steps of pre-training')
    for ax in axes[:, 0]:
        ax.set_ylim(0, None)                                # of the whole row
    axes[0, 0].legend(frameon=False)
    eval.save_figure(fig, out)


if __name__ == '__main__':
    try:
        at = sys.argv.index('--out')
        draw(sys.argv[1:at] + sys.argv[at + 2:], sys.argv[at + 1])
    except (UserError, OSError, ValueError, IndexError) as error:
        sys.exit(f'picture: {error}')
