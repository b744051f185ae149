"""One infinite schedule over three random splits of SlimPajama, 100B tokens each.

    torchrun --nproc_per_node=8 train.py config/infinite_slim.py

For a node of 8 large GPUs or more, 8e20 FLOPs. Expect all schedules to end at about the same loss
(Ibrahim et al. 2024, Fig. 10, which has curves and no table).

The main line cools down to constant_lr in the first split and stays there, without re-warming. To
release a model, branch off at a milestone and anneal over the last 15% of the split. For the
first and the second split:

    --branch_from=out/infinite_slim/ckpt_00037595.pt --anneal=37595 --max_steps=44229 \
--out_dir=out/infinite_slim_1 --switches="[]" --milestones="[]"
    --branch_from=out/infinite_slim/ckpt_00081824.pt --anneal=81824 --max_steps=88458 \
--out_dir=out/infinite_slim_2 --switches="[]" --milestones="[]" --train_data="{'slimpajama/2': 1}"

The other cooldown, and the baseline that re-warms at every split:

    --out_dir=out/infinite_slim_inv_sqrt --schedule=infinite_inv_sqrt
    --out_dir=out/repeated_slim --schedule=repeated_cosine

For one dataset of 300B tokens (Fig. 9) see config/scratch_slim.py.
"""
base = 'config/pretrain_pile.py'
out_dir = 'out/infinite_slim'

_split = 44229                      # 100.0B tokens
train_data = {'slimpajama/1': 1}
switches = [{'step': _split, 'train_data': {'slimpajama/2': 1}},
            {'step': 2 * _split, 'train_data': {'slimpajama/3': 1}}]
val_data = ['slimpajama']
max_steps = 3 * _split

schedule = 'infinite_cosine'
learning_rate = 3e-4
constant_lr = 1.65e-4               # midway between peak and end
min_lr = 3e-5
warmup = 442                        # 1% of a split; the repeated cosine uses it too
cooldown = 26537                    # 60% of the first split
anneal = 3 * _split                 # never, on the main line
# 85% of each split. Here the main line also reads the last 15%; whether the authors' main line does
# is not established.
milestones = [37595, _split + 37595, 2 * _split + 37595]
