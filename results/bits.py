"""Losses in bits per byte: the unit in which runs with different tokenizers can be compared.

    python -m results.bits RUN RUN ... --out x.md

A row shows every validation set at the start and at the end. Runs of one name, of all seeds, are
one row.
"""
import argparse
import sys

import eval
from configurator import UserError
from support import pictures
from support.files import write_whole


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--out', required=True)
    args = parser.parse_args(argv)
    groups = eval.by_seed(args.runs)
    sets = pictures.all_sets([run for runs in groups.values() for run in runs])
    rows = [['bits per byte', *(f'{name}, {when}' for name in sets for when in ('start', 'end'))]]
    for name, runs in groups.items():
        cells = [eval.spread([run.evals[when]['val'][dataset]['bpb'] for run in runs])
                 for dataset in sets for when in (0, -1)]
        rows.append([name, *cells])
    text = '\n'.join(eval.markdown(rows))
    print(text)
    write_whole(args.out, f'{text}\n'.encode())


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f'results.bits: {error}')
