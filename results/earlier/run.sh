#!/usr/bin/env bash
# Are earlier checkpoints easier to continue from? (Gupta et al. 2023, Figs. 7-9: steps 10,000,
# 27,000 and 143,000 of Pythia; here steps 70, 190 and 1,000 of 1,000)
# Three seeds; about 15 minutes on 2 CPU cores after warmup.
. "$(dirname "$0")/../common.sh"
here=results/earlier

pretrained
for s in $SEEDS; do
    for step in 70 190; do
        old=$(checkpoint pretrain_docs_seed$s $step)
        run from_step${step}_warmup0_seed$s config/rewarm_docs_code.py --seed=$s --replay=0 \
            --warmup=0 --init_from=$old
        run from_step${step}_warmup1_seed$s config/rewarm_docs_code.py --seed=$s --replay=0 \
            --warmup=0.01 --init_from=$old
    done
    on $s rewarm_warmup0 config/rewarm_docs_code.py --replay=0 --warmup=0
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    run scratch_code_seed$s config/scratch_code.py --seed=$s
done
wait

runs=$(each out/{from_step{70,190}_warmup{0,1},rewarm_warmup0,rewarm_replay0,scratch_code})
table table $runs
python eval.py plot $runs --out $here/forgetting.png \
    --labels 'from step 70, no warmup' 'from step 70, 1% warmup' \
        'from step 190, no warmup' 'from step 190, 1% warmup' \
        'from the last step, no warmup' 'from the last step, 1% warmup' 'from random weights'
