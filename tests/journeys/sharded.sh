#!/usr/bin/env bash
# A model folder with several safetensors files and an index: train, export, and refuse it if a file is missing.
. "$(dirname "$0")/common.sh"

python "$here/make_chats.py" 500 >chats.jsonl
step "data" python -m launcher data model=tiny data=jsonl data.path=chats.jsonl data.max_length=128
python "$here/make_sharded_model.py" my-model
[ "$(ls my-model/*.safetensors | wc -l)" -gt 2 ] || fail "the model has too few files"
own=(model.path=./my-model model.name=mine data=jsonl data.path=chats.jsonl data.max_length=128)
run=("${own[@]}" train.global_batch_size=4 train.max_steps=3 eval.sample=false tracking=none)

step "train" python -m launcher "${run[@]}" run.name=sharded
step "load with transformers" python -c '
from transformers import AutoModelForCausalLM
import torch
before, after = (AutoModelForCausalLM.from_pretrained(path) for path in ("my-model", "runs/sharded/export"))
largest = max((a - b).abs().max().item() for a, b in zip(before.parameters(), after.parameters(), strict=True))
assert 0 < largest < 0.01, largest'
mv "$(ls my-model/*.safetensors | tail -1)" .
refused "a file is missing" "my-model" python -m launcher "${run[@]}" run.name=incomplete
[ ! -e runs/incomplete ] || fail "a refused run leaves a directory"
