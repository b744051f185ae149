"""Pre-train the 10B model of Ibrahim et al. 2024 on the Pile (section 6.4, Tables 4 and 14).

    torchrun --nproc_per_node=8 train.py config/pretrain_pile_10b.py

For a node of 8 GPUs with 80 GB each, or several such nodes; 2e22 FLOPs, 1,590 hours on a node of
H100s at 40% of their peak. Expect 1.75 nats per token (Table 4).

Every GPU of a node has an eighth of the model, and layers are computed again in the backward pass.
`python bench/plan.py config/pretrain_pile_10b.py --world_size=8` works out the GB of each GPU:
weights 4.8, Adam moments 9.6, gradients 5.8, gathered by fsdp 3.9, activations 16.6, weights in
bf16 0.5, work in a layer 5.2; peak 46.5. A checkpoint takes 115.7 GB of disk and, on the way there,
of CPU memory in the first process.

config/README.md has the command for several nodes. Four have 32 GPUs, which do not divide the
paper's batch; the first line below takes the same tokens in a batch 1.4% larger. The second does
not compute layers again: 66.8 GB. Then the baselines from scratch, on the new data and the union:

    --batch_size=1120 --max_steps=130475
    --micro_batch_size=2 --checkpoint_activations=false
    --out_dir=out/scratch_slim_10b --train_data="{'slimpajama': 1}"
    --out_dir=out/union_pile_slim_10b --max_steps=264732 \
--train_data="{'pile': 0.5, 'slimpajama': 0.5}"

config/rewarm_pile_slim_10b.py continues this run.
"""
base = 'config/pretrain_pile.py'
out_dir = 'out/pretrain_pile_10b'

pythia = ''                          # not a Pythia size
hidden_size = 4608
num_hidden_layers = 36
num_attention_heads = 36
vocab_size = 50688                  # a multiple of 128 x 6, for matrices split over 6 GPUs

parallel = 'fsdp'
checkpoint_activations = True
micro_batch_size = 6
learning_rate = 1.2e-4              # Table 14; the text of section 6.4 says 3e-4, as for 405M
min_lr = 1.2e-5
