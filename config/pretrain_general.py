"""Pre-train a large model on 8 trillion tokens, the starting point of Parmar et al. 2024.

    torchrun --nproc_per_node=8 train.py config/pretrain_general.py

For nodes of 8 GPUs with 80 GB each, many of them: 6e23 FLOPs, 55,176 hours on one node of H100s at
40% of their peak. No loss to expect is known; the paper reports accuracy, 48.9 as the mean of four
tasks.

The model is sharded inside each node. GB of a GPU, as bench/plan.py works them out: weights 5.9,
Adam moments 11.8, gradients 7.0, gathered by fsdp 4.6, activations 24.7, weights in bf16 0.6, work
in a layer 7.2; peak 61.8. A checkpoint takes 142.2 GB of disk, and of CPU memory to save it.

Data, batch and learning rates are those of the paper. The model is not: theirs is a Nemotron-4 of
15B parameters (grouped-query attention, squared ReLU, 256k tokens), and Pythia's 12B stands in for
it. To start from your own weights instead, use config/reuse_general_qa.py --init_from=WEIGHTS.
"""
out_dir = 'out/pretrain_general'

pythia = '12b'
block_size = 4096
vocab_size = 50688                  # Pythia-12B

# Percent, read off the bars of Fig. 1 ("Pretraining") to 0.5.
train_data = {'web': 46.4, 'books': 3.2, 'news': 4.7, 'papers': 3.4, 'encyclopedia': 1.6,
              'legal': 0.9, 'finance': 1.1, 'misc': 8.9, 'multilingual': 15, 'code': 15}
val_data = ['web', 'papers', 'encyclopedia', 'multilingual', 'code']

batch_size = 1152                   # x 4096 = 4,718,592 tokens; the paper ramps up from 384 over
micro_batch_size = 4                # the first 5% of the tokens, which is left out here
max_steps = 8 * 10**12 // (1152 * 4096)
schedule = 'cosine'
learning_rate = 4.5e-4
min_lr = 4.5e-5
warmup = 16 * 10**9 // (1152 * 4096)        # 16B tokens

eval_every = 2000
eval_windows = 4608
save_every = 2000
parallel = 'fsdp'
checkpoint_activations = True
compile = True
