#!/usr/bin/env bash
# Can the losses of a run be predicted before it is paid for? (Wang et al. 2025) A law is fitted to
# 18 runs, of which 15 belong to first_curve and replay. It predicts 10 others, and only then are
# they trained. After replay, about 20 minutes on 2 CPU cores: a run takes 2.4, the two fits 2.
. "$(dirname "$0")/../common.sh"
here=results/predict
code=config/rewarm_docs_code.py

# the runs that the law is fitted to
pretrained
for s in $SEEDS; do
    for percent in 0 5 25; do
        on $s rewarm_replay$percent $code --replay=$percent/100
    done
    for percent in 0 5; do
        on $s constant_replay$percent config/constant_docs_code.py --replay=$percent/100
    done
done
on 1 rewarm_replay50 $code --replay=50/100
on 1 rewarm_replay0_peak1.5e-3 $code --replay=0 $half
on 1 constant1e-3_replay10 $code --schedule=constant --learning_rate=1e-3 --replay=10/100
wait
fitted="$(each out/rewarm_replay{0,5,25} out/constant_replay{0,5}) out/rewarm_replay50_seed1
    out/rewarm_replay0_peak1.5e-3_seed1 out/constant1e-3_replay10_seed1"
python -m results.law fit $fitted --out $here/law.json
python -m results.law fit $fitted --out $here/law_printed.json --form printed

# for_all COMMAND: COMMAND NAME --key=value... for each run that the law has not seen
for_all() {
    $1 wsd5 --schedule=wsd --decay=0.2
    $1 infinite5 --schedule=infinite_inv_sqrt --constant_lr=1e-3
    $1 linear10 --schedule=linear --learning_rate=2e-3 --min_lr=2e-4 --replay=10/100
    $1 replay1 --replay=1/100
    $1 replay15 --replay=15/100
    $1 short5 --max_steps=250
    $1 long5 --max_steps=800
    $1 peak1e-3_0 --learning_rate=1e-3 --min_lr=1e-4 --replay=0
    $1 constant6e-4_5 --schedule=constant --learning_rate=6e-4
    $1 peak6e-3_5 $double
}

predicted() {
    python -m results.law predict $here/law.json $code --seed=1 "${@:2}" \
        --init_from=out/pretrain_docs_seed1 --out_dir=out/held_$1_seed1 \
        --save $here/predictions.json
}

trained() {
    on 1 held_$1 $code "${@:2}"
}

for_all predicted
for_all trained
wait

held=$(for name in wsd5 infinite5 linear10 replay1 replay15 short5 long5 peak1e-3_0 \
    constant6e-4_5 peak6e-3_5; do echo out/held_${name}_seed1; done)
labels=('stable, then decay (WSD), 5%' 'infinite schedule, 5%' 'linear, peak 2e-3, 10%'
    'cosine, 1% replay' 'cosine, 15% replay' 'half as long, 5%' '1.6 times as long, 5%'
    'a third of the peak, none' 'constant 6e-4, 5%' 'twice the peak, 5%')
python -m results.law_check $here/law.json $held --fitted $fitted --labels "${labels[@]}" \
    --out $here/errors.md --picture $here/curves.png
python -m results.law_check $here/law_printed.json $held --fitted $fitted \
    --labels "${labels[@]}" --out $here/errors_printed.md --picture $here/curves_printed.png
python -m results.law advise $here/law.json $code --init_from=out/pretrain_docs_seed1 \
    --weights docs=1 code=1 --out $here/plane.png
