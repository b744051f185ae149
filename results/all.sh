#!/usr/bin/env bash
# Makes everything in results/ in about 7 hours on 2 CPU cores (AT_ONCE=8 uses eight). Later
# questions use runs of earlier ones.
questions='first_curve bases replay self_replay predict interpolation peaks same_data warmup earlier
infinite release_by_average domains reuse late_average converged headline'
for question in $questions; do
    "$(dirname "$0")/$question/run.sh" || exit
done
