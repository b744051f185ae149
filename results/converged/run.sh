#!/usr/bin/env bash
# What turns when the old model has learnt for longer? Four times as long, 4,000 steps (18 tokens a
# parameter) in place of 1,000, and from there the stages whose claims did not hold for an old model
# that was still learning: the same data again, replay against the union, earlier checkpoints,
# valuable data late. Three seeds (five where replay has five); about 90 minutes on 2 CPU cores
# after replay, same_data, earlier and reuse.
. "$(dirname "$0")/../common.sh"
here=results/converged

# on_long SEED NAME CONFIG --key=value...: a stage from the old model of 4,000 steps
on_long() {
    run "long_$2_seed$1" "${@:3}" --init_from=out/long_pretrain_seed$1 --seed=$1
}

# on_both SEED NAME CONFIG --key=value...: the same stage from both old models
on_both() {
    on "$@"
    on_long "$@"
}

all_seeds pretrained
for s in $SEEDS $MORE; do
    on $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    on $s rewarm_replay50 config/rewarm_docs_code.py --replay=50/100
    run union_docs_code_seed$s config/union_docs_code.py --seed=$s
done
for s in $SEEDS; do
    run long_pretrain_seed$s config/pretrain_docs.py --seed=$s --max_steps=4000 \
        --milestones='[280, 760]'
    run long_union_docs_code_seed$s config/union_docs_code.py --seed=$s --max_steps=4500 \
        --train_data="{'docs': 8, 'code': 1}"
done
wait
for s in $SEEDS; do
    on_both $s docs_peak3e-3 config/rewarm_docs_docs.py
    on_both $s docs_constant config/rewarm_docs_docs.py $constant
    on_long $s rewarm_replay0 config/rewarm_docs_code.py --replay=0
    on_long $s rewarm_replay50 config/rewarm_docs_code.py --replay=50/100
    # a fifth of pre-training, as Pythia's step 27,000 is
    run from_step190_warmup1_seed$s config/rewarm_docs_code.py --seed=$s --replay=0 \
        --init_from=$(checkpoint pretrain_docs_seed$s 190)
    run long_from_step760_seed$s config/rewarm_docs_code.py --seed=$s --replay=0 \
        --init_from=$(checkpoint long_pretrain_seed$s 760)
    on_both $s reuse_general config/reuse_docs_examples.py --switches='[]'
    on_both $s reuse_qa_throughout config/reuse_docs_examples.py --switches='[]' --train_data="$qa"
    on_both $s reuse_qa_late config/reuse_docs_examples.py
    on_both $s reuse_qa_late_rewarmed config/reuse_docs_examples.py $rewarm
done
wait

short="$(each out/docs_{peak3e-3,constant})
    $(all_seeds each out/{rewarm_replay{0,50},union_docs_code})
    $(each out/{from_step190_warmup1,reuse_{general,qa_throughout,qa_late,qa_late_rewarmed}})"
long=$(each out/long_{docs_{peak3e-3,constant},rewarm_replay{0,50},union_docs_code} \
    out/long_{from_step760,reuse_{general,qa_throughout,qa_late,qa_late_rewarmed}})
table table_short $short
table table_long $long
python -m results.turns $here/claims_{short,long}.txt --runs $short $long \
    --labels 'old model of 1,000 steps' 'old model of 4,000 steps' --out $here/turns.png
