"""A table of runs at their start and at their end, with the values that a project logs.

    python -m results.logged out/a_seed1 out/b_seed1 ... --out x.md
                             [--picture x.png --show docs 'old probe' --labels 'run a' 'run b']

Every cell is `start -> end`. The details go into x.json beside it. The picture has a panel for each
of the values to show: a validation set means the loss on it.
"""
import argparse
import json
import sys
from pathlib import Path

import eval
from configurator import UserError, require
from support import pictures, record
from support.files import write_whole


def table(groups):
    """The Markdown of {name: [Run of a seed, ...]}."""
    runs = [run for seeds in groups.values() for run in seeds]
    sets = pictures.all_sets(runs)
    own = {name: None for run in runs for name in run.evals[-1]
           if name not in record.RESERVED}           # a dict keeps their order
    rows = [['run', 'seeds', *(f'loss on {name}' for name in sets), *own]]
    for row_name, seeds in groups.items():
        columns = [[(run.losses(name)[0], run.final(name)) for run in seeds if name in run.sets]
                   for name in sets]
        columns += [[(run.evals[0].get(name), run.evals[-1].get(name)) for run in seeds]
                    for name in own]
        cells = []
        for pairs in columns:
            start, end = [eval.spread([pair[i] for pair in pairs]) for i in (0, 1)]
            cells.append(f'{start} → {end}')
        rows.append([row_name, str(len(seeds)), *cells])
    return '\n'.join(eval.markdown(rows))


def details(groups):
    """What a table was made of: eval.summary, and the first and the last of each logged value."""
    rows = eval.summary(groups)
    runs = [run for seeds in groups.values() for run in seeds]
    for row, run in zip(rows, runs):
        row['logged'] = {name: [entry.get(name) for entry in run.evals]
                         for name in run.evals[-1] if name not in record.RESERVED}
    return rows


def draw(groups, names, labels, out):
    """A panel for each name, a line for each row: the mean over its seeds, step by step."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    width = max(3.1 * len(names), 7.5)                      # inches; the legend needs room
    fig, axes = plt.subplots(1, len(names), figsize=(width, 3.3), squeeze=False,
                             layout='constrained')
    texts = pictures.legend(groups, labels)
    for ax, name in zip(axes[0], names):
        for (row_name, seeds), (color, style) in zip(groups.items(), pictures.STYLES):
            entries = [run.evals for run in seeds]
            steps = [entry['step'] for entry in entries[0]]
            require(all(name in entry or name in entry['val'] for entry in entries[0]),
                    f'--show {name}: {row_name} has not logged it')
            values = [[entry['val'][name]['loss'] if name in entry['val'] else entry[name]
                       for entry in evals] for evals in entries]
            mean = [sum(column) / len(column) for column in zip(*values)]
            ax.plot(steps, mean, color=color, ls=style, marker='o', ms=4, label=texts[row_name])
        ax.set_title(f'loss on {name}' if name in seeds[0].sets else name, fontsize=11)
        ax.set_xlabel('steps')
        pictures.plain_axes(ax)
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc='outside lower center', ncols=3, frameon=False)
    pictures.save_figure(fig, out)


def main(argv):
    parser = argparse.ArgumentParser(prog='results.logged', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--out', required=True)
    parser.add_argument('--picture', help='x.png')
    parser.add_argument('--show', nargs='+', default=[], help='the panels of the picture')
    parser.add_argument('--labels', nargs='+', default=(), help='names of the rows, in their order')
    args = parser.parse_args(argv)
    require(args.out.endswith('.md'), f'--out {args.out}: expected a name that ends in .md')
    groups, path = eval.by_seed(args.runs), Path(args.out)
    text = table(groups)
    print(text)
    write_whole(path, f'{text}\n'.encode())
    whole = json.dumps(details(groups), indent=1) + '\n'
    write_whole(path.with_suffix('.json'), whole.encode())
    if args.picture:
        require(args.show, '--picture needs --show: the values to draw.')
        draw(groups, args.show, args.labels, args.picture)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.logged: {error}')
