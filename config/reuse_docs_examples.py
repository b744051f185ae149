"""Reuse, don't retrain: no re-warming, decay to a hundredth, and the valuable data late.

    python train.py config/reuse_docs_examples.py

For 2 CPU cores, 1 to 2 minutes after config/pretrain_docs.py. Expect 1.44 nats per byte on docs and
2.14 on examples; without examples (--switches="[]") 1.44 and 2.21.

This is the recipe of Parmar et al. 2024. `docs` plays the general blend. `examples`, questions to
Python with their answers, plays the QA data.
"""
out_dir = 'out/reuse_docs_examples'
init_from = 'config/pretrain_docs.py'

train_data = {'docs': 1.0}          # the general blend
# the QA blend, once the rate has fallen to a fifth
switches = [{'lr_below': 0.2, 'train_data': {'docs': 0.9, 'examples': 0.1}}]
val_data = ['docs', 'examples']

batch_size = 16
max_steps = 300
schedule = 'cosine'
learning_rate = 3e-4                # where pre-training ended
min_lr = 3e-6                       # a hundredth
warmup = 0                          # none

eval_every = 50
eval_windows = 128
