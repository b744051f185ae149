#!/usr/bin/env bash
# How high to re-warm: to half, all or twice the peak of pre-training, or not at all, or train from
# scratch? (Gupta et al. 2023, Figs. 2-4; Ibrahim et al. 2024, Fig. 4)
# Three seeds; about 11 minutes on 2 CPU cores after replay.
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

strong=$(each out/rewarm_replay0{_peak1.5e-3,,_peak6e-3} out/{constant_replay0,scratch_code})
weak=$(each out/{maths_replay0{_peak1.5e-3,,_peak6e-3},maths_constant})
table table_strong $strong
table table_weak $weak
python eval.py plot $strong --out $here/forgetting_strong.png \
    --labels 'half the old peak' 'the old peak' 'twice the old peak' 'constant low rate' \
        'from random weights'
python eval.py plot $weak --out $here/forgetting_weak.png \
    --labels 'half the old peak' 'the old peak' 'twice the old peak' 'constant low rate'
