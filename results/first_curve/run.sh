#!/usr/bin/env bash
# The first forgetting curve and its baselines, three seeds each. About 40 minutes on 2 CPU cores. A run that is finished
# is skipped, one that was cut off goes on, so this may be stopped and started at will.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1            # two runs side by side on a thread each beat one run on two

for s in 1 2 3; do
    echo config/pretrain_docs.py --out_dir=out/pretrain_docs_seed$s --seed=$s
    echo config/scratch_code.py --out_dir=out/scratch_code_seed$s --seed=$s
done | xargs -P 2 -L 1 python train.py

for s in 1 2 3; do
    old=out/pretrain_docs_seed$s
    echo config/rewarm_docs_code.py --out_dir=out/rewarm_replay0_seed$s --init_from=$old --seed=$s --replay=0
    echo config/rewarm_docs_code.py --out_dir=out/rewarm_replay5_seed$s --init_from=$old --seed=$s
    echo config/constant_docs_code.py --out_dir=out/constant_replay5_seed$s --init_from=$old --seed=$s
    echo config/constant_docs_code.py --out_dir=out/constant_replay0_seed$s --init_from=$old --seed=$s --replay=0
done | xargs -P 2 -L 1 python train.py

for s in 1 2 3; do
    echo config/union_docs_code.py --out_dir=out/union_docs_code_seed$s --seed=$s
done | xargs -P 2 -L 1 python train.py

here=results/first_curve
python eval.py table out/{pretrain_docs,rewarm_replay0,rewarm_replay5,constant_replay0,constant_replay5,scratch_code,union_docs_code}_seed? \
    --out $here/table.md
python eval.py plot out/{rewarm_replay0,rewarm_replay5,constant_replay5}_seed? --out $here/forgetting.png
