#!/usr/bin/env bash
# Everything in results/, about 3 hours on 2 CPU cores; later folders use runs of earlier ones.
for question in first_curve replay peaks same_data warmup earlier infinite domains reuse headline; do
    "$(dirname "$0")/$question/run.sh" || exit
done
