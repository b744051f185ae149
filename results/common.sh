# What every run.sh here begins with. Runs are written to out/, what they print to out/NAME.log, and
# their command to out/NAME.done once they are finished. The questions share runs: a finished one
# is skipped and an interrupted one is resumed, so a script can be stopped and started again at any
# time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p out
export OMP_NUM_THREADS=1            # two runs on one thread each are faster than one run on two
SEEDS=${SEEDS:-1 2 3}
MORE=${MORE-4 5}                    # further seeds of runs on which three seeds do not decide

# all_seeds COMMAND...: with all of them
all_seeds() {
    SEEDS="$SEEDS $MORE" "$@"
}

# finished NAME COMMAND...: whether the same command made out/NAME, and no config has changed since
finished() {
    [[ -e out/$1 && -e out/$1.done && $(< "out/$1.done") == "${*:2}" ]] &&
        [[ -z $(find config -newer "out/$1.done") ]]
}

# background NAME COMMAND...: make out/NAME, two at a time
background() {
    if finished "$@"; then return; fi
    while (($(jobs -rp | wc -l) >= ${AT_ONCE:-2})); do sleep 0.2; done
    {
        if "${@:2}" > "out/$1.log" 2>&1; then
            echo "${*:2}" > "out/$1.done"
            echo "$1"
        else
            tail -n 5 "out/$1.log"
            kill $$
        fi
    } &
}

# run NAME CONFIG --key=value...: train into out/NAME, in the background. With
# program='-m projects.ewc' before it, by that project.
run() {
    background "$1" python ${program:-train.py} "${@:2}" --out_dir="out/$1"
}

# the old model of every question; the milestones are Pythia's steps 10,000 and 27,000 of 143,000
pretrained() {
    for s in $SEEDS; do
        run pretrain_docs_seed$s config/pretrain_docs.py --seed=$s --milestones='[70, 190]'
    done
    wait
}

# on SEED NAME CONFIG --key=value...: a stage that starts from the old model of that seed
on() {
    run "$2_seed$1" "${@:3}" --init_from=out/pretrain_docs_seed$1 --seed=$1
}

# checkpoint RUN STEP: the path of a checkpoint that a run keeps
checkpoint() {
    printf 'out/%s/ckpt_%08d.pt' $1 $2
}

# release KIND PART SEED: from the main line of an infinite schedule, the rate falls over the last
# 15% of a part
release() {
    local anneal=$((300 * $2 - 45)) main=splits_infinite_$1
    run ${main}_release$2_seed$3 config/infinite_docs.py --seed=$3 --schedule=infinite_$1 \
        --branch_from=$(checkpoint ${main}_seed$3 $anneal) --anneal=$anneal \
        --max_steps=$((300 * $2)) --train_data="{'docs/$2of3': 1}" --switches='[]' \
        --milestones='[]'
}
# the checkpoints of a main line that are kept: for releases and for averages
every_15="--milestones=[$(seq -s, 210 15 300), $(seq -s, 510 15 600), $(seq -s, 810 15 900)]"

# each out/a out/b: the folders of all seeds
each() {
    for s in $SEEDS; do echo "${@/%/_seed$s}"; done
}

# merge NAME COMMAND MODEL...: merged weights into out/NAME, by projects/merge.py, in the background
merge() {
    local words=(python -m projects.merge "${@:2}" --out "out/$1")
    finished "$1" "${words[@]}" || rm -rf "out/$1"    # merge.py does not write over a folder
    background "$1" "${words[@]}"
}

# table NAME RUN...: NAME.md and NAME.json, with verdicts on the claims; table_x has claims_x.txt
table() {
    python eval.py table "${@:2}" --out $here/$1.md
    { echo; python -m results.claims $here/${1/table/claims}.txt "${@:2}"; } | tee -a $here/$1.md
}

constant='--schedule=constant --learning_rate=3e-4 --warmup=0'      # the old run's final rate
half='--learning_rate=1.5e-3 --min_lr=1.5e-4'
double='--learning_rate=6e-3 --min_lr=6e-4'
# the stage of Parmar et al.: its blend with QA data, and its decay after a re-warming
qa="{'docs': 0.9, 'examples': 0.1}"
rewarm='--learning_rate=3e-3 --min_lr=3e-5 --warmup=0.01'
