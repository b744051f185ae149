#!/usr/bin/env bash
# How much to replay, under a weak and under a strong shift (Ibrahim et al. 2024, Table 2 and Figs. 4, 5 and 7).
# Three seeds; about 35 minutes on 2 CPU cores after first_curve.
. "$(dirname "$0")/../common.sh"
here=results/replay
sets="--val_data=['docs', 'maths']"

pretrained
for s in $SEEDS; do
    for x in 0 0.005 0.01 0.05 0.1 0.5; do
        on $s maths_replay$(python -c "print(f'{100 * $x:g}')") config/rewarm_docs_maths.py --replay=$x
    done
    for x in 0 0.01 0.05 0.1 0.25 0.5; do
        on $s rewarm_replay$(python -c "print(f'{100 * $x:g}')") config/rewarm_docs_code.py --replay=$x
    done
    on $s maths_constant config/rewarm_docs_maths.py --replay=0 $constant
    on $s constant_replay0 config/constant_docs_code.py --replay=0
    run scratch_maths_seed$s config/scratch_code.py --seed=$s --train_data="{'maths': 1}" "$sets" --max_steps=300
    run scratch_code_seed$s config/scratch_code.py --seed=$s
    run union_docs_maths_seed$s config/union_docs_code.py --seed=$s --train_data="{'docs': 10, 'maths': 3}" "$sets" --max_steps=1300
    run union_docs_code_seed$s config/union_docs_code.py --seed=$s
done
wait

weak=$(each out/maths_replay{0,0.5,1,5,10,50} out/{maths_constant,scratch_maths,union_docs_maths})
strong=$(each out/rewarm_replay{0,1,5,10,25,50} out/{constant_replay0,scratch_code,union_docs_code})
python eval.py table $weak --claims $here/claims_weak.txt --out $here/table_weak.md
python eval.py table $strong --claims $here/claims_strong.txt --out $here/table_strong.md
python eval.py table $(each out/{maths,rewarm}_replay0) --claims $here/claims_shift.txt --out $here/table_shift.md
python eval.py plot $(each out/maths_replay{0,1,5,10,50} out/{maths_constant,union_docs_maths}) --plane docs maths --out $here/plane_weak.png
python eval.py plot $(each out/rewarm_replay{0,1,5,10,25,50} out/{constant_replay0,union_docs_code}) --plane docs code --out $here/plane_strong.png
python eval.py plot $(each out/maths_replay{0,1,5,50}) --out $here/forgetting_weak.png
python eval.py plot $(each out/rewarm_replay{0,1,5,50}) --out $here/forgetting_strong.png
