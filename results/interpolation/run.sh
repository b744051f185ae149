#!/usr/bin/env bash
# Interpolation between the old and the new model (WiSE-FT, Wortsman et al. 2022) against 1, 5 and
# 25% replay: all are trained once. Three seeds; about 3 minutes on 2 CPU cores after replay.
. "$(dirname "$0")/../common.sh"
here=results/interpolation

pretrained
for s in $SEEDS; do
    for percent in 0 1 5 25; do
        on $s rewarm_replay$percent config/rewarm_docs_code.py --replay=$percent/100
    done
done
wait

# between takes the share of replay and the amounts: 0 is the old model, 1 the new one
between() {
    for amount in "${@:2}"; do
        for s in $SEEDS; do
            merge interpolate_replay$1_${amount}_seed$s interpolate out/pretrain_docs_seed$s \
                out/rewarm_replay$1_seed$s --amount $amount
        done
    done
}
between 0 0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1
between 5 0 0.2 0.4 0.6 0.8 1
wait

trained=$(each out/rewarm_replay{0,1,5,25})
merged=$(each out/interpolate_replay0_{0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1} \
    out/interpolate_replay5_{0,0.2,0.4,0.6,0.8,1})
table table $trained $merged
python -m results.plane docs code --out $here/plane.png $trained $merged \
    --labels 'no replay' '1% replay' '5% replay' '25% replay' \
        '' '' '0.2' '' '0.4 of the way' '' '0.6' '' '0.8' '' '' \
        '' '' '0.4 of the way' '0.6' '0.8' ''
