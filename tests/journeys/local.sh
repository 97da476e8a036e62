#!/usr/bin/env bash
# One machine: prepare 20,000 chats, train, kill and resume a run, and load its export with transformers.
. "$(dirname "$0")/common.sh"

step "settings come from the wheel" launcher plan --info searchpath
says "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/launcher/conf"
[ -z "$(ls -A | grep -v output)" ] || fail "looking at settings leaves files"
step "version" launcher --version
says deepspeed
refused "a misspelled verb" "did you mean train?" launcher trian
python "$here/make_chats.py" 20000 >chats.jsonl

# The other commands read the file that this one writes.
short=(data.max_length=256 data.workers=2 data.eval_max_rows=4 train.global_batch_size=4 train.max_steps=12 eval.every=100)
step "init" launcher init --data chats.jsonl --model tiny "${short[@]}" checkpoint.save_every=3 tracking.mode=offline
says "launcher train chats.yaml"
refused "init again" "overwrites nothing" launcher init --data chats.jsonl --model tiny
step "doctor" launcher doctor chats.yaml
says "all-reduce"
step "data" python -m launcher data chats.yaml
says "20,000"
step "data, cached" launcher data chats.yaml --show 2 --html data.html
step "an experiment" launcher config experiment=llama3_8b_one_node data.path=chats.jsonl
says "model: llama3_1_8b"
step "a sweep" launcher plan -m chats.yaml optim.lr=1e-5,2e-5
[ "$(grep -c '^run ' output)" = 2 ] || fail "not two runs"
refused "two machines without a name" "run.name is needed" env NNODES=2 NODE_RANK=0 MASTER_ADDR=127.0.0.1 \
  launcher train chats.yaml +cluster=static
step "plan" python -m launcher plan chats.yaml
says "chats.yaml; data.sources[0].path is $PWD/chats.jsonl"
refused "a misspelled name" "did you mean tiny?" launcher plan chats.yaml model=tinny
step "train" python -m launcher chats.yaml run.name=first
launcher config first >first.yaml
step "plan of a run's settings" launcher plan first.yaml
says "first in runs/first"
step "status" launcher status first
says completed
step "watch until the end" launcher status first --watch
refused "cancel of a completed run" "the run is not running" launcher cancel first
refused "resume of a completed run" "train.max_steps" launcher resume first
step "logs" launcher logs first
! grep -q "Loading weights" output || fail "bars of transformers in the log"
step "report" launcher report first --html report.html
step "dashboard, shown" launcher dashboard first --dry-run
says "Launcher: first"
refused "dashboard without a login" "there is no login for Weights & Biases" launcher dashboard first
step "why a step" launcher why first 12 --no-scores
says "chats.jsonl:"
step "documents by their losses" launcher data --scored first --split held_out
says "likely mislabeled"
step "drift" launcher drift first chats.jsonl --no-likelihood
says "The prompts are like the training prompts"
step "evaluate" launcher evaluate first evaluate.max_prompts=2 evaluate.max_new_tokens=4
says "No baseline was evaluated"
refused "a run is no file of settings" "launcher config first > next.yaml" launcher plan first
refused "drill without a fault" "kill-rank" launcher drill --fault kil first

step "train, detached" launcher train chats.yaml run.name=killed export.enabled=false --detach
step "kill rank 1" python "$here/kill_rank.py" runs/killed 1 4
wait_for 300 has_state killed failed
step "status of a killed run" launcher status killed
says "rank 1: killed by SIGKILL"
step "resume" python -m launcher resume killed
step "checkpoints" launcher checkpoints killed --verify
python "$here/compare_losses.py" runs/first runs/killed
step "export" launcher export killed --step 9 --dtype bf16 --out my-model
step "load with transformers" python -c '
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("my-model")
tokenizer = AutoTokenizer.from_pretrained("my-model")
model.generate(**tokenizer("The pump", return_tensors="pt"), max_new_tokens=2)'
step "list" launcher ls
step "compare two runs" launcher diff first killed
says "export.enabled"
step "report of two runs" launcher report first killed --html both.html
step "compare with a file" launcher diff first first.yaml
refused "remove without a question" "there is no terminal to ask on" launcher rm killed
step "remove a run" launcher rm killed --yes
[ ! -e runs/killed ] || fail "the run is still there"
step "look at the cache" launcher clean --dry-run
says "in all"
step "schema" launcher schema
step "completion" bash -c 'eval "$(launcher completion bash)" && complete -p launcher'
