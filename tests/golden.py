"""Are two runs the same, bit for bit?

    python tests/golden.py RUN_A RUN_B

Compares all that was logged (losses, norms, rates, counts; not the speed) and the newest checkpoint
of both: weights and Adam's moments. Prints what differs, and exits with 1 when anything does. Runs
of one config on one machine are the same; so is a run before and after a change of the code that
does not change what is computed.
"""
import json
import sys
from itertools import zip_longest
from pathlib import Path

import torch


def logged(folder):
    """The rows of metrics.jsonl, without the run's id, its first row, and what the clock measured.
    """
    rows = [json.loads(line) for line in Path(folder, 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ('run', 'tokens_per_s')}
            for row in rows if row['event'] != 'start']


def tensors(folder):
    """{name: tensor} of the newest checkpoint: weights, moments and steps of the optimizer."""
    path = max(Path(folder).glob('ckpt_????????.pt'))
    state = torch.load(path, map_location='cpu', weights_only=True)
    found = {f'{path.name} {name}': weight for name, weight in state['model']['weights'].items()}
    for parameter, moments in state['optimizer']['moments'].items():
        found |= {f'{path.name} {key} of {parameter}': moment for key, moment in moments.items()
                  if torch.is_tensor(moment)}
    return found


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def differences(a, b):
    """Lines that say what differs between two run folders."""
    for row_a, row_b in zip_longest(logged(a), logged(b)):
        if repr(row_a) != repr(row_b):              # as text: NaN equals NaN
            yield f'logged\n  {row_a}\n  {row_b}'
    in_a, in_b = tensors(a), tensors(b)
    for name in sorted(in_a.keys() | in_b.keys()):
        if name not in in_a or name not in in_b:
            yield f'{name} is only in {a if name in in_a else b}'
        elif in_a[name].shape != in_b[name].shape or in_a[name].dtype != in_b[name].dtype:
            yield f'{name} has another shape or type'
        elif bits(in_a[name]) != bits(in_b[name]):
            off = (in_a[name].double() - in_b[name].double()).abs().max()
            yield f'{name} differs by up to {off:.3g}'


def main(a, b):
    found = list(differences(a, b))
    print('\n'.join(found) or f'{a} and {b} are the same, bit for bit')
    return bool(found)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
