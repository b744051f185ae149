#!/usr/bin/env bash
# Few valuable data, late or spread over the stage: under the usual decay to a hundredth, and with
# averages of checkpoints in its place (CMA and CDMA, Luo et al. 2026, arXiv:2511.18903).
# Three seeds; about 10 minutes on 2 CPU cores after reuse.
. "$(dirname "$0")/../common.sh"
here=results/late_average
config=config/reuse_docs_examples.py

late="--switches=[{'step': 213, 'train_data': {'docs': 0.9, 'examples': 0.1}}]"
# as many examples, over the whole stage
spread=(--switches='[]' --train_data="{'docs': 1 - 0.1 * 87 / 300, 'examples': 0.1 * 87 / 300}")
milestones="--milestones=[$(seq -s, 225 15 285)]"

pretrained
for s in $SEEDS; do
    on $s reuse_qa_late $config
    on $s reuse_qa_spread $config "${spread[@]}"
    on $s reuse_qa_late_constant $config "$late" --schedule=constant "$milestones"
    on $s reuse_qa_spread_constant $config "${spread[@]}" --schedule=constant "$milestones"
    on $s reuse_qa_late_moderate $config "$late" --min_lr=1e-4 "$milestones"
    on $s reuse_qa_spread_moderate $config "${spread[@]}" --min_lr=1e-4 "$milestones"
done
wait
for s in $SEEDS; do
    for run in reuse_qa_{late,spread}_{constant,moderate}; do
        merge ${run}_mean_seed$s average out/${run}_seed$s --steps $(seq 225 15 300)
        merge ${run}_mean30_seed$s average out/${run}_seed$s --steps 270 285 300
    done
done
wait

runs=$(each out/reuse_qa_{late,spread}{,_{constant,moderate}{,_mean,_mean30}})
table table $runs
for dataset in examples docs; do
    python -m results.dots $dataset $runs --out $here/$dataset.png --zero reuse_qa_spread \
        --labels 'decay to a hundredth' 'decay to a third' 'its mean of 75 steps' \
            'its mean of 30 steps' 'constant rate' 'its mean of 75 steps' 'its mean of 30 steps' \
        --panel 'examples over 300 steps' reuse_qa_spread{,_{moderate,constant}{,_mean,_mean30}} \
        --panel 'examples in the last 87 steps' \
            reuse_qa_late{,_{moderate,constant}{,_mean,_mean30}}
done
