#!/usr/bin/env bash
# Reuse, don't retrain (Parmar et al. 2024): when the few valuable data come (Table 4), where the rate ends (Table 8),
# where the data switch (Table 9), with and without re-warming. Loss on held-out `examples` stands for the paper's mean of
# four benchmarks. Three seeds; about 25 minutes on 2 CPU cores after first_curve.

. "$(dirname "$0")/../common.sh"
here=results/reuse
rewarm='--learning_rate=3e-3 --min_lr=3e-5 --warmup=0.01'
qa="{'docs': 0.9, 'examples': 0.1}"

pretrained
for s in $SEEDS; do
    for rewarmed in '' _rewarmed; do
        on $s reuse_general$rewarmed config/reuse_docs_examples.py --switches='[]' ${rewarmed:+$rewarm}
        on $s reuse_qa_throughout$rewarmed config/reuse_docs_examples.py --switches='[]' --train_data="$qa" ${rewarmed:+$rewarm}
        on $s reuse_qa_late$rewarmed config/reuse_docs_examples.py ${rewarmed:+$rewarm}
    done
    # As many examples as reuse_qa_late takes, but spread over the whole stage, or first.
    on $s reuse_qa_spread config/reuse_docs_examples.py --switches='[]' --train_data="{'docs': 1 - 0.1 * 87 / 300, 'examples': 0.1 * 87 / 300}"
    on $s reuse_qa_first config/reuse_docs_examples.py --train_data="$qa" --switches="[{'step': 87, 'train_data': {'docs': 1}}]"
    on $s reuse_end_tenth config/reuse_docs_examples.py --min_lr=3e-5
    on $s reuse_end_zero config/reuse_docs_examples.py --min_lr=0
    for k in 2 10 50; do
        on $s reuse_switch_1_$k config/reuse_docs_examples.py --switches="[{'lr': 1/$k, 'train_data': $qa}]"
    done
done
wait

order=$(each out/reuse_{general,qa_throughout,qa_late}{,_rewarmed} out/reuse_qa_{spread,first})
ends=$(each out/reuse_{end_tenth,qa_late,end_zero})
switch=$(each out/reuse_{qa_throughout,switch_1_2,qa_late,switch_1_10,switch_1_50})
python eval.py table $order --claims $here/claims_order.txt --out $here/table_order.md
python eval.py table $ends --claims $here/claims_ends.txt --out $here/table_ends.md
python eval.py table $switch --claims $here/claims_switch.txt --out $here/table_switch.md
python eval.py plot $(each out/reuse_{general,qa_throughout,qa_late,qa_late_rewarmed}) --out $here/curves.png
