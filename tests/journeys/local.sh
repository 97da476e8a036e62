#!/usr/bin/env bash
# One machine: prepare 20,000 chats, train, kill and resume a run, and load its export with transformers.
# Each verb runs once; tests/cli and tests/config cover its other uses and its refusals.
. "$(dirname "$0")/common.sh"

step "settings come from the wheel" python -c "from launcher.config.command_line import conf_dir; print(conf_dir())"
says "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/launcher/conf"
[ -z "$(ls -A | grep -v output)" ] || fail "looking at settings leaves files"
step "version" launcher --version
says deepspeed
python "$here/make_chats.py" 20000 >chats.jsonl

# The other commands read the file that this one writes.
short=(data.max_length=256 data.workers=2 data.eval_max_rows=4 train.global_batch_size=4 train.max_steps=12 eval.every=100)
step "init" launcher init --data chats.jsonl --model tiny "${short[@]}" checkpoint.save_every=3 tracking.mode=offline
says "launcher train chats.yaml"
step "doctor" launcher doctor chats.yaml
says "all-reduce"
step "data" python -m launcher data chats.yaml --show 2 --html data.html
says "20,000"
step "an experiment" launcher config experiment=llama3_8b_one_node data.path=chats.jsonl
says "name: llama3_1_8b"
step "plan" python -m launcher plan chats.yaml
says "chats.yaml"
step "train" python -m launcher chats.yaml run.name=first
step "watch until the end" launcher status first --watch
says completed
step "logs" launcher logs first
! grep -q "Loading weights" output || fail "bars of transformers in the log"
step "report" launcher report first --html report.html
step "dashboard, shown" launcher dashboard first --dry-run
says "Launcher: first"
step "why a step" env PYTHONPROFILEIMPORTTIME=1 launcher why first 12 --no-scores
says "chats.jsonl:"
grep -qE '\| +transformers$' output || fail "the output lacks the imports"
! grep -qE '\| +torch$' output || fail "a tokenizer is loaded with torch"
step "documents by their losses" launcher data --scored first --split held_out
says "likely mislabeled"
step "drift" launcher drift first chats.jsonl
says "The prompts are like the training prompts"
step "evaluate" launcher evaluate first evaluate.max_prompts=2 evaluate.max_new_tokens=4
says "there is no base model to compare with"
refused "drill without a fault" "kill-rank" launcher drill --fault kil first

step "train, detached" launcher train chats.yaml run.name=killed tracking=none export.enabled=false --detach
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
refused "remove without a question" "there is no terminal to ask on" launcher rm killed
step "remove a run" launcher rm killed --yes
[ ! -e runs/killed ] || fail "the run is still there"
step "look at the cache" launcher clean --dry-run
says "in all"
step "schema" launcher schema
