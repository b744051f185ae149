#!/usr/bin/env bash
# Does replay need the old data, or may the old model write them (arXiv 2605.26097)? Three seeds;
# about 20 minutes on 2 CPU cores after replay, half of them to sample the text.
. "$(dirname "$0")/../common.sh"
here=results/self_replay

pretrained
for s in $SEEDS; do
    # 25% of 500 steps of 16 windows of 256 tokens are 512,000
    [ -e data/self_docs_seed$s/train_00000.bin ] ||
        python -m projects.self_replay out/pretrain_docs_seed$s --name=self_docs_seed$s \
            --tokens=520000 --seed=$s > $here/own_text_seed$s.txt
    for percent in 5 25; do
        on $s self_replay$percent config/rewarm_docs_code.py --replay=$percent/100 \
            --replay_data="{'self_docs_seed$s': 1}"
    done
    for percent in 0 5 25; do
        on $s rewarm_replay$percent config/rewarm_docs_code.py --replay=$percent/100
    done
done
wait

runs=$(each out/rewarm_replay{0,5,25} out/self_replay{5,25})
labels=('no replay' '5% real text' '25% real text' '5% own text' '25% own text')
table table $runs
python -m results.plane docs code --out $here/plane.png $runs --labels "${labels[@]}"
