#!/usr/bin/env bash
# The first forgetting curve and its baselines, three seeds each. About 40 minutes on 2 CPU cores.
. "$(dirname "$0")/../common.sh"
here=results/first_curve

pretrained
for s in $SEEDS; do
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    on $s rewarm_replay5 config/rewarm_docs_code.py
    on $s constant_replay0 config/constant_docs_code.py --replay=0
    on $s constant_replay5 config/constant_docs_code.py
    run scratch_code_seed$s config/scratch_code.py --seed=$s
    run union_docs_code_seed$s config/union_docs_code.py --seed=$s
done
wait

python eval.py table $(each out/{pretrain_docs,rewarm_replay0,rewarm_replay5,constant_replay0,constant_replay5,scratch_code,union_docs_code}) \
    --claims $here/claims.txt --out $here/table.md
python eval.py plot $(each out/{rewarm_replay0,rewarm_replay5,constant_replay5}) --out $here/forgetting.png
