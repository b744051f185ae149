#!/usr/bin/env bash
# How long to warm up: 0, 0.5, 1 or 2% of the stage?
# (Gupta et al. 2023, Fig. 1; Ibrahim et al. 2024, Fig. 3)
# Three seeds; about 11 minutes on 2 CPU cores after first_curve.
. "$(dirname "$0")/../common.sh"
here=results/warmup

pretrained
for s in $SEEDS; do
    on $s rewarm_warmup0 config/rewarm_docs_code.py --replay=0 --warmup=0
    on $s rewarm_warmup0.5 config/rewarm_docs_code.py --replay=0 --warmup=0.005
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    on $s rewarm_warmup2 config/rewarm_docs_code.py --replay=0 --warmup=0.02
done
wait

runs=$(each out/{rewarm_warmup0,rewarm_warmup0.5,rewarm_replay0,rewarm_warmup2})
table table $runs
python eval.py plot $runs --out $here/forgetting.png \
    --labels 'no warmup' '0.5% warmup' '1% warmup' '2% warmup'
