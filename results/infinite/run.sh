#!/usr/bin/env bash
# Infinite schedules against the cosine: on one dataset from random weights (Ibrahim et al. 2024,
# Fig. 9), on new data, and against the cosine repeated over three datasets (Fig. 10).
# Three seeds; about 39 minutes on 2 CPU cores after replay.
. "$(dirname "$0")/../common.sh"
here=results/infinite

pretrained
for s in $SEEDS; do
    for kind in infinite_cosine infinite_inv_sqrt; do
        run docs_${kind}_seed$s config/pretrain_docs.py --seed=$s --schedule=$kind
        on $s maths_$kind config/rewarm_docs_maths.py --replay=0 --schedule=$kind
    done
    on $s maths_replay0 config/rewarm_docs_maths.py --replay=0
done

for s in $SEEDS; do
    run splits_repeated_seed$s config/infinite_docs.py --seed=$s --schedule=repeated_cosine
    for kind in cosine inv_sqrt; do
        run splits_infinite_${kind}_seed$s config/infinite_docs.py --seed=$s \
            --schedule=infinite_$kind "$every_15"
    done
done
wait
# Released models: the rate falls over the last 15% of a part, while the main line continues with
# the next part.
for s in $SEEDS; do
    for kind in cosine inv_sqrt; do
        for part in 1 2 3; do
            release $kind $part $s
        done
    done
done
wait

one=$(each out/{pretrain_docs,docs_infinite_cosine,docs_infinite_inv_sqrt})
new=$(each out/maths_{replay0,infinite_cosine,infinite_inv_sqrt})
three=$(each out/splits_{repeated,infinite_{cosine,inv_sqrt}{,_release{1,2,3}}})
table table_one $one
table table_new $new
table table_three $three
python eval.py plot $one --out $here/one.png --labels 'cosine' 'infinite, cosine cooldown' \
    'infinite, inverse square root cooldown'
python eval.py plot $new --out $here/new.png --labels 'cosine' 'infinite, cosine cooldown' \
    'infinite, inverse square root cooldown'
python eval.py plot $(each out/splits_{repeated,infinite_cosine{,_release{1,2,3}}}) \
    --out $here/three.png --labels 'cosine, repeated for each part' 'infinite, main line' \
    'released after part 1' 'released after part 2' 'released after part 3'
