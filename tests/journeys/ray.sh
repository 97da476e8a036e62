#!/usr/bin/env bash
# A run on its own Ray on this machine: train with one worker and export.
. "$(dirname "$0")/common.sh"

python "$here/make_chats.py" 500 >chats.jsonl
run=(model=tiny data=jsonl data.path=chats.jsonl data.max_length=128 train.global_batch_size=4 eval.at_start=false
  eval.sample=false tracking=none)

step "train" python -m launcher "${run[@]}" +cluster=ray cluster.ranks_per_node=1 run.name=journey train.max_steps=3
step "status" launcher status journey
says completed
step "load with transformers" python -c '
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("runs/journey/export")'
