"""From the Pile to SlimPajama, re-warmed and re-decayed: the weak shift of Gupta et al. 2023 and Ibrahim et al. 2024.

    torchrun --nproc_per_node=8 train.py config/rewarm_pile_slim.py

Starts from config/pretrain_pile.py, or from released weights: --init_from=weights/pythia-410m (Gupta et al.). For a
node of 8 large GPUs or more. Expect, at the end (Ibrahim et al., Table 2, 405M): Pile 2.23, SlimPajama 2.51; without
replay 2.44 and 2.50. Those are tokens of GPT-NeoX-20B: bring shards of them (`paths`); `data.py prepare` makes bytes.
"""
out_dir = 'out/rewarm_pile_slim'
init_from = 'config/pretrain_pile.py'

block_size = 2048

train_data = {'slimpajama': 1.0}    # sampled in proportion to tokens (Ibrahim et al., Table 1)
replay_data = {'pile': 1.0}
replay = 0.05                       # Ibrahim et al.: enough here (Table 2: 0, 0.5, 1, 5, 10, 50%); Gupta et al.: 0
val_data = ['pile', 'slimpajama']

batch_size = 1104                   # x 2048 = 2,260,992 tokens; both papers
micro_batch_size = 23
max_steps = 132366                  # 299.3B tokens (Ibrahim et al.); Gupta et al.: 131,296 (297B)
schedule = 'cosine'                 # Ibrahim et al. eqs. 1-2; Gupta et al.: 'cosine_clamped'
learning_rate = 3e-4                # both: the peak of pre-training
min_lr = 3e-5                       # both: a tenth
warmup = 0.01                       # both: 1,324 steps; 0 to 2% make no lasting difference (Gupta et al., Fig. 1)
keep_optimizer = False              # both start with fresh moments

eval_every = 100
eval_windows = 11040
save_every = 400
milestones = [22114, 44229, 88457]  # 50, 100 and 200 billion tokens, the points the papers' figures speak of
compile = True
