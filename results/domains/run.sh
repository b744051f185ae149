#!/usr/bin/env bash
# One domain after another, or all of them mixed? (Ibrahim et al. 2024, appendix A.1)
# Three seeds; about 7 minutes on 2 CPU cores after first_curve.
. "$(dirname "$0")/../common.sh"
here=results/domains

pretrained
for s in $SEEDS; do
    on $s domains_one_by_one config/domains_maths.py
    on $s domains_mixed config/domains_maths.py --train_data="{'maths': 1}" --switches='[]'
done
wait

runs=$(each out/domains_{one_by_one,mixed})
table table $runs
python eval.py plot $runs --out $here/forgetting.png \
    --labels 'one package after another' 'all packages mixed'
