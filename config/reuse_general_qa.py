"""Reuse, don't retrain: no re-warming, decay to a hundredth, QA data below a fifth of the rate.

    torchrun --nproc_per_node=8 train.py config/reuse_general_qa.py

For a node of 8 GPUs with 80 GB each or several such nodes (12B parameters), 2e22 FLOPs, 2,069 hours
on a node of H100s at 40% of their peak. No loss to expect is known; the paper reports accuracy,
which rises from 48.9 to 56.1 (mean of four tasks). GB of a GPU, by bench/plan.py: weights 5.9, Adam
moments 11.8, gradients 7.0, gathered by fsdp 4.6, activations 24.7, weights in bf16 0.6, work in a
layer 7.2; peak 61.8. A checkpoint takes 142.2 GB of disk, and of CPU memory to save it.

This is the recipe of Parmar et al. 2024 on config/pretrain_general.py, or on weights of your own
with --init_from: 300B tokens, and 10% of the last 86.6B are QA. The paper's other runs, each with
an --out_dir of its own:

    --switches="[]"                                        Table 4: no QA
    --switches="[]" --replay=0.1                           Tables 4, 9: QA throughout
    --switches="[{'step': 52982, 'replay': 0.1}]"          Table 4: 250B tokens without, 50B with
    --switches="[{'lr_below': 0.5, 'replay': 0.1}]"              Table 9: 0.5, 0.2, 0.1, 0.02
    --min_lr=4.5e-6                                        Table 8: 4.5e-6, 4.5e-7, 0
    --learning_rate=4.5e-4 --warmup=0.01                   re-warming hurts; rates not established
    --max_steps=21192                                      100B tokens; for 1T: 211927

Tables 5 and 6 change train_data and replay_data; the comments below have these blends.
"""
out_dir = 'out/reuse_general_qa'
init_from = 'config/pretrain_general.py'

block_size = 4096

# The general blend in percent, read off the bars of Fig. 1 to 0.5. This is the authors' choice:
# more data from outside the web, and of the web only the best (web_hq). Table 5 compares it with
#   the blend of pre-training, also with web_hq in place of web
#   the blend of pre-training with multilingual at 5
#   no web: books 13, news 4.9, papers 16.2, encyclopedia 11.1, legal 2.3, finance 4.9, misc 18.1,
#           multilingual 15, code 15
train_data = {'web_hq': 12, 'books': 10.7, 'news': 4.1, 'papers': 13.5, 'encyclopedia': 9.2,
              'legal': 1.9, 'finance': 4.1, 'misc': 15, 'multilingual': 15, 'code': 15}
# The QA data stand in replay_data, because that group has a share of its own. Fig. 2, blend 3, in
# percent of the QA data; in the same order, Table 6 compares it with
#   blend 1: 9.2, 35.9, 4.8, 8.0, 42.5
#   blend 2: 8.0, 31.2, 11.4, 6.9, 42.8
replay_data = {'qa/chat': 9.3, 'qa/reasoning': 32.7, 'qa/stem': 11.0, 'qa/code': 6.6,
               'qa/world': 40.5}
replay = 0
# 10% QA. The 2.81B tokens of QA are read 3.1 times.
switches = [{'lr_below': 0.2, 'replay': 0.1}]
val_data = ['web_hq', 'papers', 'encyclopedia', 'multilingual', 'code', 'qa/reasoning', 'qa/stem',
            'qa/world']

batch_size = 1152                   # x 4096 = 4,718,592 tokens
micro_batch_size = 4
max_steps = 300 * 10**9 // (1152 * 4096)    # 63,578
schedule = 'cosine'
learning_rate = 4.5e-5              # where pre-training ended
min_lr = 4.5e-7                     # a hundredth
warmup = 0                          # none
keep_optimizer = False              # the paper: old or fresh moments make little difference

eval_every = 500
eval_windows = 4608
save_every = 1000
parallel = 'fsdp'
checkpoint_activations = True
compile = True
