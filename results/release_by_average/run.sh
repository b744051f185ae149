#!/usr/bin/env bash
# The main line of an infinite schedule, released by averaging its checkpoints (WSM, Tian et al.
# 2025) and by annealing (Ibrahim et al. 2024). An anneal costs 45 steps more, an average nothing.
# Three seeds; about 3 minutes on 2 CPU cores after infinite.
. "$(dirname "$0")/../common.sh"
here=results/release_by_average

for s in $SEEDS; do
    run splits_infinite_cosine_seed$s config/infinite_docs.py --seed=$s \
        --schedule=infinite_cosine "$every_15"
done
wait
for s in $SEEDS; do
    for part in 1 2 3; do
        release cosine $part $s
    done
done
wait

# The rate is constant over the last 120 steps of each part. Averages are over the last 45 and 90.
for s in $SEEDS; do
    for part in 1 2 3; do
        end=$((300 * part))
        for length in 45 90; do
            for weights in mean 1-sqrt ema; do
                merge splits_average${part}_${weights/1-/}${length}_seed$s average \
                    out/splits_infinite_cosine_seed$s --weights $weights \
                    --steps $(seq $((end - length)) 15 $end)
            done
        done
    done
done
wait

runs=$(each out/splits_infinite_cosine{,_release{1,2,3}} \
    out/splits_average{1,2,3}_{mean,sqrt,ema}{45,90})
table table $runs
terms() {
    echo splits_infinite_cosine_release$1 splits_infinite_cosine@$((300 * $1)) \
        splits_average$1_{ema,mean,sqrt}{45,90}
}
python -m results.dots docs $runs --out $here/releases.png \
    --labels 'annealed over 45 steps' 'main line as it is' \
        'EMA, 45 steps' 'EMA, 90 steps' 'mean, 45 steps' 'mean, 90 steps' \
        '1-sqrt, 45 steps' '1-sqrt, 90 steps' \
    --panel 'after part 1' $(terms 1) --panel 'after part 2' $(terms 2) \
    --panel 'after part 3' $(terms 3)
