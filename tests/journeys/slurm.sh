#!/usr/bin/env bash
# Two nodes of a Slurm cluster: show the batch script, submit, cancel, and resume to completion.
. "$(dirname "$0")/common.sh"

python "$here/make_chats.py" 500 >chats.jsonl
run=(model=tiny data=jsonl data.path=chats.jsonl data.max_length=128 train.global_batch_size=4 checkpoint.save_every=5
  eval.at_start=false eval.sample=false export.enabled=false tracking=none
  +cluster=slurm cluster.nodes=2 cluster.ranks_per_node=1 cluster.exclusive=false cluster.time=10:00)

step "data" python -m launcher data "${run[@]}"
step "plan" python -m launcher plan --script "${run[@]}"
says "#SBATCH --nodes=2"
step "submit" python -m launcher "${run[@]}" run.name=journey train.max_steps=100000
says "python -m launcher cancel"
wait_for 300 has_reached journey 6
step "status" launcher status journey
says "running"
step "list" launcher ls
step "cancel" launcher cancel journey
wait_for 300 has_state journey cancelled
step "resume" launcher resume journey train.max_steps="$(($(field journey step) + 4))" --follow
has_state journey completed || fail "the run is not completed"
step "logs" launcher logs journey --rank 1
step "checkpoints" launcher checkpoints journey --verify
