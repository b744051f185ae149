#!/usr/bin/env bash
# Can the losses of a run be predicted before it is paid for? (Wang et al. 2025) A law is fitted to
# 18 runs, of which 15 belong to first_curve and replay. It predicts 10 others, and only then are
# they trained. A second law is fitted to all 28 and predicts 5 more. After replay, about 30 minutes
# on 2 CPU cores: a run of 500 steps takes 2.4 minutes, the fits take 3.
. "$(dirname "$0")/../common.sh"
here=results/predict
code=config/rewarm_docs_code.py

# the runs that the first law is fitted to
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
python -m results.law fit $fitted --form recovery --out $here/law.json
python -m results.law fit $fitted --form printed --out $here/law_printed.json

# first COMMAND: COMMAND SEED NAME --key=value... for each run that this law has not seen
first() {
    $1 1 held_wsd5 --schedule=wsd --decay=0.2
    $1 1 held_infinite5 --schedule=infinite_inv_sqrt --constant_lr=1e-3
    $1 1 held_linear10 --schedule=linear --learning_rate=2e-3 --min_lr=2e-4 --replay=10/100
    $1 1 held_replay1 --replay=1/100
    $1 1 held_replay15 --replay=15/100
    $1 1 held_short5 --max_steps=250
    $1 1 held_long5 --max_steps=800
    $1 1 held_peak1e-3_0 --learning_rate=1e-3 --min_lr=1e-4 --replay=0
    $1 1 held_constant6e-4_5 --schedule=constant --learning_rate=6e-4
    $1 1 held_peak6e-3_5 $double
}

# second COMMAND: likewise for the second law
second() {
    $1 1 again_wsd10 --schedule=wsd --decay=0.3 --max_steps=400 --replay=10/100 \
        --learning_rate=2e-3 --min_lr=2e-4
    $1 1 again_cosine2 --max_steps=650 --replay=2/100
    $1 1 again_infinite30 --schedule=infinite_cosine --constant_lr=8e-4 --max_steps=300 \
        --replay=30/100 --learning_rate=2e-3 --min_lr=2e-4
    $1 1 again_linear0 --schedule=linear --max_steps=350 --replay=0
    $1 2 again_cosine8 --max_steps=400 --replay=8/100
}

# predict SEED NAME --key=value...: by $law, into $said
predict() {
    python -m results.law predict $here/$law.json $code "${@:3}" --seed=$1 \
        --init_from=out/pretrain_docs_seed$1 --out_dir=out/$2_seed$1 --save $here/$said.json
}

train() {
    on $1 $2 $code "${@:3}"
}

folder() {
    echo out/$2_seed$1
}

law=law said=predictions first predict
first train
wait
held=$(first folder)
labels=('WSD, 5% replay' 'infinite schedule, 5% replay' 'linear, peak 2e-3, 10% replay'
    'cosine, 1% replay' 'cosine, 15% replay' 'half as long, 5% replay'
    '1.6 times as long, 5% replay' 'a third of the peak, no replay' 'constant 6e-4, 5% replay'
    'twice the peak, 5% replay')
python -m results.law_check $here/law.json $held --fitted $fitted --labels "${labels[@]}" \
    --out $here/errors.md --picture $here/curves.png
python -m results.law_check $here/law_printed.json $held --fitted $fitted \
    --labels "${labels[@]}" --out $here/errors_printed.md

python -m results.law fit $fitted $held --out $here/law_second.json
law=law_second said=predictions_second second predict
second train
wait
labels=('WSD, 400 steps, peak 2e-3, 10% replay' 'cosine, 650 steps, 2% replay'
    'infinite schedule, 300 steps, peak 2e-3, 30% replay' 'linear, 350 steps, no replay'
    'cosine, 400 steps, 8% replay, another seed')
python -m results.law_check $here/law_second.json $(second folder) --fitted $fitted $held \
    --labels "${labels[@]}" --out $here/errors_second.md --picture $here/curves_second.png
python -m results.law advise $here/law_second.json $code --init_from=out/pretrain_docs_seed1 \
    --weights docs=1 code=1 --out $here/plane.png
