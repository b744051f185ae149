#!/usr/bin/env bash
# Makes everything in results/ in about 3.5 hours on 2 CPU cores. Later questions use runs of
# earlier ones.
questions='first_curve replay self_replay predict peaks same_data warmup earlier infinite domains
reuse interpolation release_by_average late_average headline'
for question in $questions; do
    "$(dirname "$0")/$question/run.sh" || exit
done
