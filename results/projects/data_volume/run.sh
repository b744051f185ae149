#!/usr/bin/env bash
# How much text does pre-training need? (Micheli et al. 2020, "On the importance of pre-training
# data volume for compact language models", arXiv:2010.03813)
# 500 steps on 1/256, 1/64, 1/16 and all of `docs`, then 40 steps on `maths`. 2,160 steps; 8
# minutes on 2 CPU cores. One seed; SEEDS='1 2 3' makes three.
SEEDS=${SEEDS:-1}
. "$(dirname "$0")/../../common.sh"
here=results/projects/data_volume
stage="config/pretrain_docs.py --eval_every=50"

python -m projects.data_volume --parts='[256, 64, 16]'
for s in $SEEDS; do
    for part in 1of256 1of64 1of16 ''; do
        run volume${part:+_$part}_seed$s $stage --max_steps=500 --seed=$s \
            "--train_data={'docs${part:+/$part}': 1}" "--val_data=['docs']"
    done
done
wait
for s in $SEEDS; do
    for part in 1of256 1of64 1of16 ''; do
        run volume${part:+_$part}_maths_seed$s $stage --max_steps=40 --seed=$s \
            "--train_data={'maths': 1}" "--val_data=['docs', 'maths']" \
            --init_from=out/volume${part:+_$part}_seed$s
    done
done
wait

pretrained_on=$(each out/volume{_1of256,_1of64,_1of16,})
table table $pretrained_on $(each out/volume{_1of256,_1of64,_1of16,}_maths)
python eval.py plot $pretrained_on --out $here/curves.png --labels '1/256 of docs, 46 kB' \
    '1/64, 150 kB' '1/16, 0.6 MB' 'all of docs, 9 MB'
