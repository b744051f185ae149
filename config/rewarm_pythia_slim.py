"""Released Pythia-410M on SlimPajama, re-warmed, without replay (Gupta et al. 2023).

    hf download EleutherAI/pythia-410m --local-dir weights/pythia-410m
    torchrun --nproc_per_node=8 train.py config/rewarm_pythia_slim.py

For a node of 8 large GPUs or more, 8e20 FLOPs. The paper has curves and no table: expect the loss
on the Pile to climb from about 2.2 to about 2.5 nats per token, and the loss on SlimPajama to fall
below its start. Its other runs, each with an --out_dir of its own:

    --warmup=0                                             Fig. 1: 0, 0.005, 0.01, 0.02; first 50B
    --learning_rate=1.5e-4 --min_lr=1.5e-5                 Figs. 2-4: 1.5e-4, 3e-4, 6e-4, to a tenth
    --schedule=constant --learning_rate=3e-5 --warmup=0    Figs. 2-4: Pythia's final rate throughout
    --init_from= --pythia=410m --vocab_size=50304 --old_data="[]"  Figs. 2, 3: from scratch
    --train_data="{'pile': 1}"                             Figs. 5, 6: the Pile again, same peaks
    --init_from=weights/pythia-410m-step10000 --warmup=0   Figs. 7-9: warmup 0 and 0.01

Figs. 7-9 start from steps 10,000, 27,000 and 143,000, which are revisions of the same repository:

    hf download EleutherAI/pythia-410m --revision step10000 \
--local-dir weights/pythia-410m-step10000
"""
base = 'config/rewarm_pile_slim.py'
out_dir = 'out/rewarm_pythia_slim'
# Step 143,000. The name of one of the authors' runs suggests pythia-410m-deduped instead.
init_from = 'weights/pythia-410m'

# Table 1 has LLaMA's weights, which are not in proportion to tokens: CommonCrawl's 153B tokens are
# read 1.3 times.
train_data = {'slimpajama/commoncrawl': 67, 'slimpajama/c4': 15, 'slimpajama/github': 4.5,
              'slimpajama/book': 4.5, 'slimpajama/wikipedia': 4.5, 'slimpajama/arxiv': 2.5,
              'slimpajama/stackexchange': 2}
replay_data = {}
replay = 0                          # none in this paper

max_steps = 131296                  # 296.86B tokens, all of Table 1; the figures end at 240B
schedule = 'cosine_clamped'         # GPT-NeoX before August 2023: at min_lr from 239B tokens on
old_data = ['pile']                 # what the weights were trained on, for the columns of the table
milestones = [22114, 106148]        # 50 and 240 billion tokens
