#!/usr/bin/env bash
# Re-warming on the same data: how much of the loss comes from the learning rate alone?
# (Gupta et al. 2023, Figs. 5 and 6; Ibrahim et al. 2024, Fig. 8)
# Three seeds; about 9 minutes on 2 CPU cores after peaks.
. "$(dirname "$0")/../common.sh"
here=results/same_data

pretrained
for s in $SEEDS; do
    on $s docs_peak1.5e-3 config/rewarm_docs_docs.py $half
    on $s docs_peak3e-3 config/rewarm_docs_docs.py
    on $s docs_peak6e-3 config/rewarm_docs_docs.py $double
    on $s docs_constant config/rewarm_docs_docs.py $constant
    on $s maths_replay0 config/rewarm_docs_maths.py --replay=0
    on $s maths_replay0_peak6e-3 config/rewarm_docs_maths.py --replay=0 $double
done
wait

same=$(each out/{docs_peak1.5e-3,docs_peak3e-3,docs_peak6e-3,docs_constant})
table table $same $(each out/{maths_replay0,maths_replay0_peak6e-3})
python eval.py plot $same --out $here/curves.png \
    --labels 'half the old peak' 'the old peak' 'twice the old peak' 'constant low rate'
