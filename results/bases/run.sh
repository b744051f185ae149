#!/usr/bin/env bash
# Does the old model's own schedule decide how much it will forget? (Watts et al. 2026,
# arXiv:2605.02105; loss potential: Wang et al. 2025, arXiv:2505.07796) The same stage on `code`
# from old models whose rate never fell, fell over the last 10 or 20%, fell by a cosine, or fell by
# a cosine from twice the peak. Those with a decay end at a tenth of their peak.
# Three seeds; about 32 minutes on 2 CPU cores after first_curve.
. "$(dirname "$0")/../common.sh"
here=results/bases

pretrained
for s in $SEEDS; do
    run pretrain_wsd0_seed$s config/pretrain_docs.py --seed=$s --schedule=constant \
        --milestones='[800, 900]'
    run pretrain_peak6e-3_seed$s config/pretrain_docs.py --seed=$s $double
done
wait
# the models with a decay branch off the one without
for s in $SEEDS; do
    run pretrain_wsd10_seed$s config/pretrain_docs.py --seed=$s --schedule=wsd --decay=0.1 \
        --branch_from=$(checkpoint pretrain_wsd0_seed$s 900)
    run pretrain_wsd20_seed$s config/pretrain_docs.py --seed=$s --schedule=wsd --decay=0.2 \
        --branch_from=$(checkpoint pretrain_wsd0_seed$s 800)
done
wait
for s in $SEEDS; do
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    for base in wsd0 wsd10 wsd20 peak6e-3; do
        run code_from_${base}_seed$s config/rewarm_docs_code.py --seed=$s --replay=0 \
            --init_from=out/pretrain_${base}_seed$s
    done
done
wait

runs=$(each out/code_from_{wsd0,wsd10,wsd20} out/rewarm_replay0 out/code_from_peak6e-3)
table table $runs
python eval.py plot $runs --out $here/forgetting.png \
    --labels 'old model: no decay' 'old model: decay over the last 10%' \
        'old model: decay over the last 20%' 'old model: cosine' 'old model: cosine, twice the peak'
