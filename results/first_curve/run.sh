#!/usr/bin/env bash
# The first forgetting curve and its baselines.
# Three seeds, and five where re-warming and the constant rate tie; about 45 minutes on 2 CPU cores.
. "$(dirname "$0")/../common.sh"
here=results/first_curve

all_seeds pretrained
for s in $SEEDS $MORE; do
    on $s rewarm_replay5 config/rewarm_docs_code.py
    on $s constant_replay5 config/constant_docs_code.py
done
for s in $SEEDS; do
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    on $s constant_replay0 config/constant_docs_code.py --replay=0
    run scratch_code_seed$s config/scratch_code.py --seed=$s
    run union_docs_code_seed$s config/union_docs_code.py --seed=$s
done
wait

table table $(each out/{pretrain_docs,rewarm_replay{0,5},constant_replay{0,5}} \
    out/{scratch_code,union_docs_code})
table table_average $(all_seeds each out/{rewarm,constant}_replay5)
python eval.py plot $(each out/{rewarm_replay0,rewarm_replay5,constant_replay5}) \
    --out $here/forgetting.png \
    --labels 're-warmed, no replay' 're-warmed, 5% replay' 'constant low rate, 5% replay'
