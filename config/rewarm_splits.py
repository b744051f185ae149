"""Update after update: the Pile, then three splits of SlimPajama, each with 5% replay of the past.

    torchrun --nproc_per_node=8 train.py config/rewarm_splits.py

For a node of 8 large GPUs or more, 8e20 FLOPs after config/pretrain_pile.py. No loss to expect is
known: the settings are published by the authors of Ibrahim et al. 2024, but the paper may not
report the runs.

This is one run. It keeps Adam's moments at a boundary, and from an earlier split it replays the 5%
that it has not read. The authors instead start every split with fresh moments and replay from the
first window. That takes three runs, here the first two; the third is like the second, with the
weights below.

    --out_dir=out/splits_1 --schedule=cosine --max_steps=44229 --switches="[]" --milestones="[]"
    --out_dir=out/splits_2 --schedule=cosine --max_steps=44229 --switches="[]" --milestones="[]" \
--init_from=out/splits_1 --train_data="{'slimpajama/2': 1}" \
--replay_data="{'pile': 3.81, 'slimpajama/1': 1.19}"

With --continue_data=true, the second and the third run replay what the earlier runs have not read.
"""
base = 'config/rewarm_pile_slim.py'
out_dir = 'out/rewarm_splits'

_split = 44229                      # 100.0B tokens
replay = 0.05                       # throughout
continue_data = False               # replay the Pile from its first window, as pre-training read it
train_data = {'slimpajama/1': 1}
# Weights in replay_data are relative; here they are percent of all samples.
replay_data = {'pile': 5}
switches = [{'step': _split, 'train_data': {'slimpajama/2': 1},
             'replay_data': {'pile': 3.81, 'slimpajama/1': 1.19}},
            {'step': 2 * _split, 'train_data': {'slimpajama/3': 1},
             'replay_data': {'pile': 3.09, 'slimpajama/1': 0.96, 'slimpajama/2': 0.95}}]
max_steps = 3 * _split

schedule = 'repeated_cosine'        # re-warmed at every split
repeats = 3
warmup = 0.01                       # 1% of a split: 442 steps
milestones = [_split, 2 * _split]
