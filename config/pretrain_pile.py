"""The old model at true scale: pre-train a 410M GPT-NeoX on the Pile, as in Ibrahim et al. 2024.

    torchrun --nproc_per_node=8 train.py config/pretrain_pile.py

For a node of 8 large GPUs or more; 300 billion tokens, 8e20 FLOPs. Expect a validation loss of 2.17
nats per token of the GPT-NeoX-20B tokenizer (Table 3, 405M).

config/rewarm_pile_slim.py continues this run. Released Pythia-410M weights are another way to get
such a model; see config/rewarm_pythia_slim.py.
"""
out_dir = 'out/pretrain_pile'

# "Both" are Gupta et al. 2023 and Ibrahim et al. 2024.
pythia = '410m'                      # both: 24 layers x 1024, 16 heads, rotary on a quarter
block_size = 2048                   # both
vocab_size = 50304                  # both: GPT-NeoX-20B's 50,277 tokens, to a multiple of 128

train_data = {'pile': 1.0}
val_data = ['pile', 'slimpajama']

batch_size = 1104                   # x 2048 = 2,260,992 tokens (Ibrahim et al.: 46 nodes x 6 x 4)
micro_batch_size = 23               # 48 micro-batches make a batch: 6 on each of 8 GPUs
max_steps = 132366                  # 299.3B tokens (Ibrahim et al.)
schedule = 'cosine'                 # ends at min_lr; Gupta et al. and Pythia: 'cosine_clamped'
learning_rate = 3e-4                # both, and Pythia-410M
min_lr = 3e-5                       # both: a tenth
warmup = 0.01                       # both; 1,324 steps

eval_every = 100                    # Ibrahim et al., with 10 batches of validation data
eval_windows = 11040
save_every = 400                    # Ibrahim et al.
compile = True
