"""One domain after another: the packages in `maths` in turn, each in proportion to its text.

    python train.py config/domains_maths.py

For 2 CPU cores, 1 to 2 minutes after config/pretrain_docs.py. Expect 1.43 nats per byte on maths
and 1.67 on docs; the mixture (config/rewarm_docs_maths.py --replay=0) reaches 1.37 and 1.63.
Ibrahim et al. 2024, appendix A.1, also find that the mixture works better.
"""
base = 'config/rewarm_docs_maths.py'
out_dir = 'out/domains_maths'

# matplotlib has 1.2, networkx 1.6 and sympy 3.0 of the 5.9 million tokens of `maths`
train_data = {'maths/matplotlib': 1}
switches = [{'step': 60, 'train_data': {'maths/networkx': 1}},
            {'step': 143, 'train_data': {'maths/sympy': 1}}]
replay_data = {}
replay = 0
val_data = ['docs', 'maths', 'maths/matplotlib', 'maths/networkx', 'maths/sympy']
eval_every = 25
