#!/usr/bin/env bash
# Does LoRA learn less and forget less (Biderman et al. 2024)? And layers that are frozen or added
# (LLaMA Pro)? One seed and 200 steps; about 8 minutes on 2 CPU cores after the old model.
SEEDS=${SEEDS:-1}
. "$(dirname "$0")/../../common.sh"
here=results/projects/lora
code='config/rewarm_docs_code.py'
short='--max_steps=200 --eval_every=100'
lower="['gpt_neox.embed_in.*', 'gpt_neox.layers.[01].*']"
# all but the layers that block expansion has added
old="['gpt_neox.embed_in.*', 'gpt_neox.layers.[0134].*', 'gpt_neox.final_layer_norm.*', \
'embed_out.*']"

pretrained
for s in $SEEDS; do
    on $s short_replay0 $code $short --replay=0
    on $s short_replay5 $code $short
    for rank in 4 16 64; do
        program='-m projects.lora' on $s lora_r$rank $code $short --replay=0 --lora_rank=$rank \
            --learning_rate=1e-2 --min_lr=1e-3
    done
    # a third of the rate, for 1e-2 is too high for this rank
    program='-m projects.lora' on $s lora_r64_low $code $short --replay=0 --lora_rank=64
    on $s freeze_lower $code $short --replay=0 --freeze="$lower"
    python -m projects.blocks out/pretrain_docs_seed$s out/blocks_seed$s.pt --every 2
    run blocks_seed$s $code $short --replay=0 --freeze="$old" --seed=$s \
        --init_from=out/blocks_seed$s.pt
done
wait

runs=$(each out/{lora_r4,lora_r16,lora_r64,lora_r64_low} \
    out/{short_replay0,short_replay5,freeze_lower,blocks})
table table $runs
# without the rate that is too high
python -m results.plane docs code --out $here/plane.png \
    $(each out/{freeze_lower,lora_r64_low,lora_r4,lora_r16,blocks,short_replay0,short_replay5}) \
    --labels 'half frozen' 'LoRA 64' 'LoRA 4' 'LoRA 16' 'new layers' 'no replay' '5% replay'
