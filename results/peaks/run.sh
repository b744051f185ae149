#!/usr/bin/env bash
# How high to re-warm: half, as high as and twice the peak of pre-training, against its final rate and from scratch
# (Gupta et al. 2023, Figs. 2-4; Ibrahim et al. 2024, Fig. 4). Three seeds; about 10 minutes on 2 CPU cores after replay.
. "$(dirname "$0")/../common.sh"
here=results/peaks

pretrained
for s in $SEEDS; do
    on $s rewarm_replay0_peak1.5e-3 config/rewarm_docs_code.py --replay=0 $half
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    on $s rewarm_replay0_peak6e-3 config/rewarm_docs_code.py --replay=0 $double
    on $s constant_replay0 config/constant_docs_code.py --replay=0
    run scratch_code_seed$s config/scratch_code.py --seed=$s
    on $s maths_replay0_peak1.5e-3 config/rewarm_docs_maths.py --replay=0 $half
    on $s maths_replay0 config/rewarm_docs_maths.py --replay=0
    on $s maths_replay0_peak6e-3 config/rewarm_docs_maths.py --replay=0 $double
    on $s maths_constant config/rewarm_docs_maths.py --replay=0 $constant
done
wait

strong=$(each out/{rewarm_replay0_peak1.5e-3,rewarm_replay0,rewarm_replay0_peak6e-3,constant_replay0,scratch_code})
weak=$(each out/{maths_replay0_peak1.5e-3,maths_replay0,maths_replay0_peak6e-3,maths_constant})
python eval.py table $strong --claims $here/claims_strong.txt --out $here/table_strong.md
python eval.py table $weak --claims $here/claims_weak.txt --out $here/table_weak.md
python eval.py plot $strong --out $here/forgetting_strong.png
python eval.py plot $weak --out $here/forgetting_weak.png
