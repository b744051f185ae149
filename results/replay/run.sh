#!/usr/bin/env bash
# How much to replay, under a weak and under a strong shift? (Ibrahim et al. 2024, Table 2 and
# Figs. 4, 5 and 7) Three seeds, and five for the comparison with training on both corpora, where
# three do not decide; about 59 minutes on 2 CPU cores after first_curve.
. "$(dirname "$0")/../common.sh"
here=results/replay
maths="--train_data={'maths': 1}"
union="--train_data={'docs': 10, 'maths': 3}"
sets="--val_data=['docs', 'maths']"

all_seeds pretrained
for s in $SEEDS $MORE; do
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    on $s rewarm_replay25 config/rewarm_docs_code.py --replay=25/100
    on $s rewarm_replay50 config/rewarm_docs_code.py --replay=50/100
    on $s constant_replay0 config/constant_docs_code.py --replay=0
    run union_docs_code_seed$s config/union_docs_code.py --seed=$s
done
for s in $SEEDS; do
    for percent in 0 0.5 1 5 10 50; do
        on $s maths_replay$percent config/rewarm_docs_maths.py --replay=$percent/100
    done
    for percent in 1 5 10; do
        on $s rewarm_replay$percent config/rewarm_docs_code.py --replay=$percent/100
    done
    on $s maths_constant config/rewarm_docs_maths.py --replay=0 $constant
    run scratch_maths_seed$s config/scratch_code.py --seed=$s "$maths" "$sets" --max_steps=300
    run scratch_code_seed$s config/scratch_code.py --seed=$s
    run union_docs_maths_seed$s config/union_docs_code.py --seed=$s "$union" "$sets" \
        --max_steps=1300
done
wait

table table_weak \
    $(each out/maths_replay{0,0.5,1,5,10,50} out/{maths_constant,scratch_maths,union_docs_maths})
table table_strong \
    $(each out/rewarm_replay{0,1,5,10,25,50} out/{constant_replay0,scratch_code,union_docs_code})
table table_union $(all_seeds each out/{rewarm_replay{0,25,50},constant_replay0,union_docs_code})
table table_shift $(each out/{maths,rewarm}_replay0)
python -m results.plane docs maths --out $here/plane_weak.png \
    $(each out/maths_replay{0,1,5,10,50} out/{maths_constant,union_docs_maths}) \
    --labels 'no replay' '1% replay' '5% replay' '10% replay' '50% replay' \
        'constant low rate, no replay' 'both corpora from the start'
python -m results.plane docs code --out $here/plane_strong.png \
    $(each out/rewarm_replay{0,1,5,10,25,50} out/{constant_replay0,union_docs_code}) \
    --labels 'no replay' '1% replay' '5% replay' '10% replay' '25% replay' '50% replay' \
        'constant low rate, no replay' 'both corpora from the start'
python eval.py plot $(each out/maths_replay{0,1,5,50}) --out $here/forgetting_weak.png \
    --labels 'no replay' '1% replay' '5% replay' '50% replay'
python eval.py plot $(each out/rewarm_replay{0,1,5,50}) --out $here/forgetting_strong.png \
    --labels 'no replay' '1% replay' '5% replay' '50% replay'
