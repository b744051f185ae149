"""The main line of an infinite schedule: three parts of `docs`, one after another, never annealed.

    python train.py config/infinite_docs.py

For 2 CPU cores, 3 minutes. Expect 1.56 nats per byte on docs, and 1.51 for a model that is released
from the last milestone. The baseline --schedule=repeated_cosine --warmup=3 reaches 1.52.

The rate cools down to constant_lr during the first part and stays there. Each milestone is a
checkpoint from which a model can be released: config/README.md has the commands. Ibrahim et al.
2024, section 7.4.
"""
base = 'config/pretrain_docs.py'
out_dir = 'out/infinite_docs'

train_data = {'docs/1of3': 1}
switches = [{'step': 300, 'train_data': {'docs/2of3': 1}},
            {'step': 600, 'train_data': {'docs/3of3': 1}}]
val_data = ['docs']
max_steps = 900

schedule = 'infinite_cosine'
constant_lr = 1.65e-3               # midway between peak and end, like the paper's 1.65e-4
warmup = 3                          # 1% of a part
cooldown = 180                      # 60% of the first part
anneal = 900                        # never
milestones = [255, 555, 855]        # 85% of each part, where a release begins to anneal

eval_every = 50
