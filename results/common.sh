# What every run.sh here begins with. A run that is finished is skipped and one that was cut off goes on, so a script may
# be stopped and started at will, and scripts share their runs: all lie in out/, with what they printed in out/NAME.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p out
export OMP_NUM_THREADS=1            # two runs side by side on a thread each beat one run on two
SEEDS=${SEEDS:-1 2 3}

run() {     # run NAME CONFIG --key=value...: trains into out/NAME in the background; waits while two others do
    while (($(jobs -rp | wc -l) >= 2)); do sleep 0.2; done
    (python train.py "${@:2}" --out_dir="out/$1" > "out/$1.log" 2>&1 && echo "$1" || { tail -n 5 "out/$1.log"; kill $$; }) &
}

pretrained() {      # the old model of every question; milestones: Pythia's 10,000 and 27,000 of 143,000 steps
    for s in $SEEDS; do run pretrain_docs_seed$s config/pretrain_docs.py --seed=$s --milestones='[70, 190]'; done
    wait
}

on() {      # on SEED NAME CONFIG --key=value...: a stage from the old model of that seed
    run "$2_seed$1" "${@:3}" --init_from=out/pretrain_docs_seed$1 --seed=$1
}

each() {    # each out/a out/b: the folders of all seeds
    for s in $SEEDS; do echo "${@/%/_seed$s}"; done
}

constant='--schedule=constant --learning_rate=3e-4 --warmup=0'      # the old run's final rate
half='--learning_rate=1.5e-3 --min_lr=1.5e-4'
double='--learning_rate=6e-3 --min_lr=6e-4'
