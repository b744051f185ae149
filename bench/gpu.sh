#!/usr/bin/env bash
# All that only a GPU can tell, in one call of under 9 minutes on an H100 or H200: are the kernels' results right there,
# how near are they to what the machine allows, and how fast is a training step beside those of others.
#
#     bash bench/gpu.sh [folder for the figures, default: results]
#
# Needs PyTorch with CUDA, and transformers; litgpt is compared where it is installed (pip install litgpt).
# Writes gpu_check.txt, gpu_kernels.json and gpu_step_{410m,160m,1.4b}.json. A part that fails or runs out of time does
# not stop the next, but wrong results stop all. The exit code is 1 if any part failed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-results}
mkdir -p "$folder"
python=${PYTHON:-python}
failed=0

part() {                                                # part SECONDS COMMAND...: at most that long
    local began=$SECONDS
    echo "== ${*:2}"
    timeout --kill-after=5 "$@" || { echo "== failed, exit code $?"; failed=1; }
    echo "== $((SECONDS - began)) s"
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || true

part 70 "$python" bench/kernels.py --check --model 410m | tee "$folder/gpu_check.txt"
if grep -q 'WRONG\|== failed' "$folder/gpu_check.txt"; then exit 1; fi

step=("$python" bench/train_step.py --block=2048 --rounds=7 --steps=1)
part 200 "${step[@]}" --model=410m --batch=16 --accumulation=4 --out="$folder/gpu_step_410m.json"
part 70 "$python" bench/kernels.py --model 410m 1.4b --out="$folder/gpu_kernels.json"
part 85 "${step[@]}" --model=160m --batch=16 --accumulation=4 --out="$folder/gpu_step_160m.json" \
    --contenders=ours+compile,transformers+compile,litgpt+compile
part 105 "${step[@]}" --model=1.4b --batch=8 --accumulation=4 --out="$folder/gpu_step_1.4b.json" \
    --contenders=ours+compile,transformers+compile
exit $failed
