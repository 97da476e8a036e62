"""The probe on two real ranks of a ZeRO-3 engine: a rank that computes slowly shows it, and the one that waits does not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from launcher.train.probe import Probe, representative

RANK = """
import json, math, os, sys, time
import deepspeed, torch
import torch._dynamo
import torch.distributed as dist
from datetime import timedelta
from transformers import AutoModelForCausalLM, LlamaConfig
from launcher.train.engine import import_muon
from launcher.train.extensions import lock_builds
from launcher.train.probe import OptimizerProbe, Probe, representative

rank, meeting = int(sys.argv[1]), sys.argv[2]
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
torch.set_num_threads(1)
lock_builds()
dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
deepspeed.init_distributed("gloo", verbose=False)
zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "steps_per_print": 2**31 - 1,
          "zero_optimization": {**zero, "stage3_max_reuse_distance": 0}}
llama = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
                    vocab_size=128, max_position_embeddings=64)
with deepspeed.zero.Init(config_dict_or_path=config):
    model = AutoModelForCausalLM.from_config(llama)
import_muon()
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
probe, optimizer_probe = Probe(model, torch.device("cpu")), OptimizerProbe(engine.basic_optimizer)
layer, calls = representative(model), []
plain = layer.forward
slow_s = 0.0

def forward(inputs):
    assert layer.weight.numel() == 64 * 96, "the weights are gathered"
    calls.append(inputs.shape)
    time.sleep(slow_s)
    return plain(inputs)

layer.forward = forward

def step(checkpointing=False):
    if checkpointing:
        model.gradient_checkpointing_enable()
    engine.train()
    calls.clear()
    ids = torch.randint(0, 128, (2, 16))
    began = time.perf_counter()
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    # As training does: the step is over for all together.
    dist.barrier()
    return {"step_s": time.perf_counter() - began, "per_token_s": probe.read(), "calls": len(calls),
            "optim_s": optimizer_probe.read()}

step()
found = {"usual": step()}
slow_s = 0.3 if rank else 0.0
found["slow"] = step()
found["recomputed"] = step(checkpointing=True)
slow_s = 0.0
# What one rank does outside of the layer makes the other wait, though not in the layer.
if rank:
    for module in model.model.layers[1].modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.register_forward_pre_hook(lambda *_: time.sleep(0.1))
found["elsewhere"] = step()
if rank:
    engine.basic_optimizer.register_step_pre_hook(lambda *_: time.sleep(0.3))
found["optimizer"] = step()
engine.eval()
with torch.no_grad():
    engine(input_ids=torch.zeros(2, 16, dtype=torch.int64), use_cache=False)
found["evaluated"] = probe.read()
print("FOUND" + json.dumps(found))
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    meeting = tmp_path_factory.mktemp("probe") / "meeting"
    command = [sys.executable, "-c", RANK]
    started = [subprocess.Popen([*command, str(rank), str(meeting)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in started]
    finally:
        for rank in started:
            rank.kill()
    return [json.loads(text.partition("FOUND")[2]) for text in said]


def test_only_the_rank_that_is_slow_shows_it(ranks: list[dict]) -> None:
    first, second = ranks
    assert all(rank["slow"]["step_s"] > 0.3 for rank in ranks), "both take as long for the step"
    # 32 tokens share the 0.3 s.
    assert second["slow"]["per_token_s"] > 0.3 / 32
    assert first["slow"]["per_token_s"] < 0.1 / 32


def test_recomputation_is_counted_as_the_work_that_it_is(ranks: list[dict]) -> None:
    first, second = ranks
    assert (second["slow"]["calls"], second["recomputed"]["calls"]) == (1, 2)
    assert 0.3 / 32 < second["recomputed"]["per_token_s"] < 0.5 / 32
    assert first["recomputed"]["per_token_s"] < 0.1 / 32


def test_no_collective_lies_in_what_is_timed(ranks: list[dict]) -> None:
    assert all(rank["elsewhere"]["step_s"] > 0.2 for rank in ranks)
    assert all(rank["elsewhere"]["per_token_s"] < 0.1 / 32 for rank in ranks), "nobody waits in the layer"
    assert all(rank["evaluated"] != rank["evaluated"] for rank in ranks), "evaluation is not training"


def test_only_the_rank_whose_optimizer_is_slow_shows_it(ranks: list[dict]) -> None:
    first, second = ranks
    assert all(rank["optimizer"]["step_s"] > 0.3 for rank in ranks)
    assert second["optimizer"]["optim_s"] > 0.3
    assert 0 < first["optimizer"]["optim_s"] < 0.1
    assert all(0 < rank["elsewhere"]["optim_s"] < 0.1 for rank in ranks)


def test_a_layer_that_is_called_by_keyword_is_timed_as_well() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    probe = Probe(model, torch.device("cpu"))
    layer(input=torch.zeros(2, 3, 4))
    assert probe.read() > 0


def test_the_largest_layer_of_the_middle_block_stands_for_all() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8 + i)) for i in range(3))
    model = nn.ModuleDict({"blocks": blocks, "few": nn.ModuleList([nn.Linear(99, 99)])})
    assert representative(model) is blocks[1][1]
    assert representative(nn.Linear(4, 4)) is None
