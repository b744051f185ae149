#!/usr/bin/env bash
# Can losses be predicted before a run is paid for? (Wang et al. 2025) About 45 minutes on 2 CPU
# cores: 18 runs to fit a law to, of which 15 belong to first_curve and replay, and 10 to test it on,
# of 2.4 minutes each (250 to 800 steps). Fitting takes half a minute.
. "$(dirname "$0")/../common.sh"
here=results/predict

# what the law is fitted to
pretrained
for s in $SEEDS; do
    for percent in 0 5 25; do
        on $s rewarm_replay$percent config/rewarm_docs_code.py --replay=$percent/100
    done
    for percent in 0 5; do
        on $s constant_replay$percent config/constant_docs_code.py --replay=$percent/100
    done
done
code=config/rewarm_docs_code.py
on 1 rewarm_replay50 $code --replay=50/100
on 1 rewarm_replay0_peak1.5e-3 $code --replay=0 $half
on 1 constant1e-3_replay10 $code --schedule=constant --learning_rate=1e-3 --replay=10/100
wait
fitted="$(each out/rewarm_replay{0,5,25} out/constant_replay{0,5}) out/rewarm_replay50_seed1
    out/rewarm_replay0_peak1.5e-3_seed1 out/constant1e-3_replay10_seed1"
python -m results.law fit $fitted --out $here/law.json

# held NAME --key=value...: predict a run that the law has not seen, then train it
held() {
    python -m results.law predict $here/law.json $code --seed=1 "${@:2}" \
        --init_from=out/pretrain_docs_seed1 --out_dir=out/held_$1_seed1 \
        --save $here/predictions.json
}
held wsd5 --schedule=wsd --decay=0.2
held infinite5 --schedule=infinite_inv_sqrt --constant_lr=1e-3
held linear10 --schedule=linear --learning_rate=2e-3 --min_lr=2e-4 --replay=10/100
held replay1 --replay=1/100
held replay15 --replay=15/100
held short5 --max_steps=250
held long5 --max_steps=800
held peak1e-3_0 --learning_rate=1e-3 --min_lr=1e-4 --replay=0
held constant6e-4_5 --schedule=constant --learning_rate=6e-4
held peak6e-3_5 --learning_rate=6e-3 --min_lr=6e-4
