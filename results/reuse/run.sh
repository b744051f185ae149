#!/usr/bin/env bash
# Reuse, don't retrain (Parmar et al. 2024): when should the few valuable data come (Table 4), where
# should the learning rate end (Table 8), when should the mixture switch (Table 9), with and without
# re-warming? The loss on held-out `examples` stands for the paper's mean of four benchmarks.
# Three seeds; about 25 minutes on 2 CPU cores after first_curve.
. "$(dirname "$0")/../common.sh"
here=results/reuse
config=config/reuse_docs_examples.py

pretrained
for s in $SEEDS; do
    on $s reuse_general $config --switches='[]'
    on $s reuse_qa_throughout $config --switches='[]' --train_data="$qa"
    on $s reuse_qa_late $config
    on $s reuse_qa_late_rewarmed $config $rewarm
    # as many examples as reuse_qa_late reads, but spread over the whole stage, or at its beginning
    on $s reuse_qa_spread $config --switches='[]' \
        --train_data="{'docs': 1 - 0.1 * 87 / 300, 'examples': 0.1 * 87 / 300}"
    on $s reuse_qa_first $config --train_data="$qa" \
        --switches="[{'step': 87, 'train_data': {'docs': 1}}]"
    on $s reuse_end_tenth $config --min_lr=3e-5
    on $s reuse_end_zero $config --min_lr=0
    for k in 2 10 50; do
        on $s reuse_switch_1_$k $config --switches="[{'lr_below': 1/$k, 'train_data': $qa}]"
    done
done
wait

table table_order \
    $(each out/reuse_{general,qa_{throughout,late,late_rewarmed,spread,first}})
table table_ends $(each out/reuse_{end_tenth,qa_late,end_zero})
table table_switch $(each out/reuse_{qa_throughout,switch_1_2,qa_late,switch_1_10,switch_1_50})
python eval.py plot $(each out/reuse_{general,qa_throughout,qa_late,qa_late_rewarmed}) \
    --out $here/curves.png \
    --labels 'no QA data' 'QA data throughout' 'QA data late' 'QA data late, re-warmed'
