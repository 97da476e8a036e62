"""Functions for the ranks of the tests in this folder, over gloo; tests/forked_ranks.py runs them."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch._dynamo  # a lazy import of it inside zero.Init fails
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.llama import modeling_llama

from launcher import distributed
from launcher.checkpoint import store, zero3
from launcher.checkpoint.initial_weights import stored_buffers
from launcher.config.sections.cluster import LocalSection
from launcher.config.sections.model import ModelSection
from launcher.config.sections.slurm import SlurmSection
from launcher.distributed import RankInfo, gather_json, rank0_broadcast, run_on_all_ranks
from launcher.errors import ConfigError, DamagedCheckpoint, LauncherError
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.train.engine import build_engine, import_muon
from launcher.train.finish import has_time_to_save
from launcher.train.isolation import require_isolation
from launcher.train.model import build_model
from launcher.train.monitoring.step_metrics import LayerTimer, representative_layer
from launcher.train.resume import agree_on_start_point, load_newest_intact

CPU = torch.device("cpu")


def meet() -> int:
    """Join the other ranks and return the rank of this one."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{os.environ['RENDEZVOUS']}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    return rank


def build_models(cases: list[tuple[str, bool]]) -> tuple[list[str | None], list[int]]:
    """Build the model in each folder under ZeRO-3. Each case is a folder and whether a checkpoint exists.

    Return for each case the problem, or None if the model was built, and the bytes counted during loading.
    """
    meet()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    settings = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    partitioned = HfDeepSpeedConfig(settings)
    refusals: list[str | None] = []
    loaded: list[int] = []

    def count(num_bytes: int) -> None:
        loaded[-1] += num_bytes

    for folder, has_checkpoint in cases:
        loaded.append(0)
        facts = model_facts(json.loads((Path(folder) / "config.json").read_text()), folder, folder, None)
        try:
            model = ModelSection(path=folder, dtype="fp32")
            make_progress = lambda activity, total: count  # noqa: E731
            build_model(model, facts, "cpu", 64, make_progress=make_progress, has_checkpoint=has_checkpoint)
        except ConfigError as error:
            refusals.append(error.problems[0].message)
        else:
            refusals.append(None)
    del partitioned
    return refusals, loaded


def begin(cases: list[tuple[str, int, bool]]) -> list[Any]:
    """Agree on a start point for each case (run directory as seen by this rank, its agent's restart count, whether to load).

    Loading is faked: both ranks verify the checkpoint's digests, as `shards.load` does. Return for each case the step, path
    and restart count, or the loaded step and the messages to the user, or the error.
    """
    rank = meet()

    def load(path: Path) -> str:
        problems_of_ranks: list[Any] = [None, None]
        dist.all_gather_object(problems_of_ranks, store.verify(path))
        if problems := list(dict.fromkeys([*problems_of_ranks[0], *problems_of_ranks[1]])):
            raise DamagedCheckpoint(problems)
        return path.name

    outcomes: list[Any] = []
    for root, restart, loads in cases:
        run, rank_info, messages = RunDir(Path(root)), RankInfo(rank, rank, 2, 2, restart), []
        try:
            start = agree_on_start_point(run, rank_info, CPU)
            at = start.checkpoint
            if loads:
                at, name = load_newest_intact(run, rank_info, at, load, messages.append)
                assert name == at.path.name
                outcomes.append([at.step, messages])
            else:
                outcomes.append([at and at.step, at and str(at.path), start.num_restarts])
        except LauncherError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


def share_without_pickles() -> list[Any]:
    """Return what the ranks exchange, including each other's failures. Reading a pickle would end the rank."""
    from torch.distributed import distributed_c10d

    def refuse(*_: Any) -> None:
        raise SystemExit("a pickle was read")

    distributed_c10d._unpickler = refuse  # type: ignore[assignment]
    rank = meet()
    info = RankInfo(rank, rank, 2, 1)

    def fail() -> None:
        raise DamagedCheckpoint("é is damaged", where="x", value="1", remedy="repair it")

    def fail_on_one() -> int:
        if rank == 1:
            raise OSError(5, "Input/output error", "/disk")
        return rank

    outcomes: list[Any] = [gather_json({"rank": rank, "text": "a" * rank}), rank0_broadcast(info, "", lambda: ["é", rank])]
    for action in (
        lambda: rank0_broadcast(info, "", fail),
        lambda: rank0_broadcast(info, "not read", lambda: Path("/gone/away").read_text()),
        lambda: rank0_broadcast(info, "not computed", lambda: 1 / 0),
        lambda: gather_json({"ranks": {rank}} if rank == 0 else rank),
        lambda: run_on_all_ranks(CPU, "not written", fail_on_one),
        lambda: run_on_all_ranks(CPU, "not written", fail),
    ):
        try:
            action()
        except LauncherError as error:
            outcomes.append([type(error).__name__, [[p.message, p.where, p.value, p.remedy] for p in error.problems]])
        except TypeError as error:
            outcomes.append(str(error))
    return outcomes


def measure_link() -> tuple[float, float, float]:
    """Return the measured bandwidth, the seconds it took, and the bandwidth when ranks measure different (faked) times."""
    rank = meet()
    started = time.perf_counter()
    measured = distributed.measure_bus_bandwidth(CPU)
    cost_s = time.perf_counter() - started
    times = iter([9.0, *([1e-3, 9.0, 2e-3] if rank == 0 else [1e-3, 4e-3, 5e-3])])
    distributed._time_all_reduce = lambda buffer: next(times)
    return measured, cost_s, distributed.measure_bus_bandwidth(CPU)


def judge_saves() -> dict[str, bool]:
    """Return whether there is time to save, for cases where the ranks have different information."""
    rank = meet()
    slurm, local = SlurmSection(signal_lead_seconds=60), LocalSection()
    cases = {
        "short": (slurm, "preempted", 0, 50.0),
        "long": (slurm, "preempted", 0, 70.0),
        "waited": (slurm, "preempted", 20, 50.0),
        "waited and short": (slurm, "preempted", 20, 30.0),
        "one is slow": (slurm, "preempted", 0, 70.0 if rank else 1.0),
        "one has waited": (slurm, "preempted", 0 if rank else 40, 30.0),
        "one was not asked": (slurm, "preempted", None if rank else 40, 30.0),
        "nobody was asked": (slurm, "preempted", None, 50.0),
        "never saved": (slurm, "preempted", 50, None),
        "cancelled": (slurm, "cancelled", 1000, 1000.0),
        "limit": (slurm, "limit", 1000, 1000.0),
        "local": (local, "preempted", 1000, 1000.0),
    }
    fits = {}
    for name, (cluster, reason, ago, save_s) in cases.items():
        asked_at = None if ago is None else time.monotonic() - ago
        fits[name] = has_time_to_save(cluster, reason, asked_at, save_s, CPU)
    return fits


def probe_engine() -> dict[str, Any]:
    """Return this rank's timer readings under a ZeRO-3 engine while rank 1 is slow in different parts of a step."""
    rank = meet()
    deepspeed.init_distributed("gloo", verbose=False)
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
    }
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": {**zero, "stage3_max_reuse_distance": 0},
    }
    llama = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
    )
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = AutoModelForCausalLM.from_config(llama)
    import_muon()
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    probe = LayerTimer(model, torch.device("cpu"))
    layer, calls = representative_layer(model), []
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
        # Ranks end the step together, as in training.
        dist.barrier()
        return {
            "step_s": time.perf_counter() - began,
            "per_token_s": probe.read(),
            "calls": len(calls),
        }

    step()
    measured_by_case = {"usual": step()}
    slow_s = 0.3 if rank else 0.0
    measured_by_case["slow"] = step()
    measured_by_case["recomputed"] = step(checkpointing=True)
    slow_s = 0.0
    # Time that one rank spends outside the timed layer makes the other wait, but not in that layer.
    if rank:
        for module in model.model.layers[1].modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    measured_by_case["elsewhere"] = step()
    engine.eval()
    with torch.no_grad():
        engine(input_ids=torch.zeros(2, 16, dtype=torch.int64), use_cache=False)
    measured_by_case["evaluated"] = probe.read()
    # A rank that exits early would break the other's last collective.
    dist.barrier()
    return measured_by_case


def train_after_probe(plan_path: str, failing: str, persistence_threshold: int) -> dict[str, Any]:
    """Probe the isolation of packed documents, then train three steps on the same rows.

    If `failing` is not empty, that module raises in the model's own forward pass, after its weights are gathered. Return the
    probe's message and errors, the number of weights still gathered after it, and this rank's loss of each step.
    """
    rank, plan = meet(), LaunchPlan.load(plan_path)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    plan.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = persistence_threshold
    engine, model = build_engine(plan, RankInfo(rank, rank, 2, 2))
    is_own_pass, errors = False, list[str]()

    def watch(_module: Any, _arguments: Any) -> None:
        nonlocal is_own_pass
        is_own_pass = True

    def fail(module: Any, _arguments: Any) -> None:
        nonlocal is_own_pass
        if is_own_pass:
            is_own_pass = False
            errors.append(str([tuple(weight.shape) for weight in module.parameters(recurse=False)]))
            raise ValueError("You must specify another input")

    model.hf.register_forward_pre_hook(watch)
    if failing:
        model.hf.get_submodule(failing).register_forward_pre_hook(fail)
    message = require_isolation(plan, engine, model, CPU)
    num_gathered = sum(weight.ds_status is ZeroParamStatus.AVAILABLE and not weight.ds_persist for weight in model.parameters())
    is_own_pass = False
    ids = torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(rank))
    losses = []
    for _ in range(3):
        loss = engine(ids, torch.arange(16)[None], ids.roll(-1, dims=1), 1 / ids.numel())
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(float(loss))
    dist.barrier()
    return {"message": message, "errors": errors, "num_gathered": num_gathered, "losses": losses}


def train_with_layers(plan_path: str, packages: str = "", backend: str = "inductor") -> dict[str, Any]:
    """Train four steps on different packed rows; return the losses, last gradient norm, weights and compiled graphs.

    `packages` is a folder of optional packages; `backend` is that of torch.compile.
    """
    sys.path[:0] = filter(None, [packages])
    torch.compile = functools.partial(torch.compile, backend=backend)
    rank, plan = meet(), LaunchPlan.load(plan_path)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine, model = build_engine(plan, RankInfo(rank, rank, 2, 2))
    timer, generator = LayerTimer(model, CPU), torch.Generator().manual_seed(rank)
    losses = []
    for cut in (5, 9, 20, 31):
        ids = torch.randint(0, plan.model.vocab_size, (1, 48), generator=generator)
        positions = torch.cat([torch.arange(cut), torch.arange(48 - cut)])[None]
        loss = engine(ids, positions, ids.roll(-1, dims=1), 1 / ids.numel())
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        losses.append(float(loss))
    norm = float(engine.get_global_grad_norm())
    counters = torch._dynamo.utils.counters
    engine.eval()
    with torch.no_grad():
        evaluated = float(engine(ids, positions, ids.roll(-1, dims=1), 1 / ids.numel()))
    dist.barrier()
    return {
        "losses": [*losses, evaluated, norm],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": [str(reason) for reason in counters["graph_break"]],
        "has_own_speed": timer.read() > 0,
        "weights": {name: [str(one.dtype), list(one.ds_shape)] for name, one in model.parameters_by_name().items()},
    }


def build_with_liger(site: str) -> dict[str, Any]:
    """Build a model under ZeRO-3 with the Liger stand-in in a folder; return why it is unused, and what it replaced."""
    meet()
    sys.path.insert(0, site)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    settings = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    partitioned = HfDeepSpeedConfig(settings)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64, num_attention_heads=4)
    section = ModelSection(init="random", config=config.to_dict(), tokenizer="./tokenizer", dtype="fp32")
    facts = model_facts(config.to_dict(), None, None, None)
    original = modeling_llama.LlamaRMSNorm
    model = build_model(section, facts, "cpu", chunk_tokens=16, uses_liger=True)
    del partitioned
    replaced = ["LlamaRMSNorm"] if modeling_llama.LlamaRMSNorm is not original else []
    replaced += ["forward"] if "_get_name" in vars(model.hf.model.norm) else []
    return {"problem": model.liger_problem, "replaced": replaced}


class TwoBranches(torch.nn.Module):
    """Two layers, of which each pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, inputs: torch.Tensor, branch: int) -> torch.Tensor:
        return self.branches[branch](inputs).square().sum()


def step_after_dropped_gradients(offloads: bool) -> tuple[list[bool], list[float]]:
    """Drop the gradients of the first branch, then train a step of the second.

    Return which branches changed their weights, and the gradient norms of this step and of one in an engine that dropped
    no gradients.
    """
    meet()
    deepspeed.init_distributed("gloo", verbose=False)
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offloads:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    import_muon()
    norms, changed = [], []
    for drops in (True, False):
        torch.manual_seed(3)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = TwoBranches()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        weights = [branch.weight for branch in model.branches]
        before = [safe_get_full_fp32_param(weight).clone() for weight in weights]
        inputs = torch.arange(8.0)[None]
        if drops:
            with zero3.dropped_gradients(engine):
                engine.backward(engine(inputs, 0), scale_wrt_gas=False)
        engine.backward(engine(inputs, 1), scale_wrt_gas=False)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        pairs = zip(before, weights, strict=True)
        changed = changed or [not torch.equal(old, safe_get_full_fp32_param(weight)) for old, weight in pairs]
        engine.destroy()
    dist.barrier()
    return changed, norms


def read_own_parts(cases: list[tuple[str, str, str, int]]) -> list[tuple[int, int, list[str]]]:
    """Load models under ZeRO-3.

    Each case is a folder, a file of the expected weights, the model's dtype, and the ranks that share a copy with hpZ. Return for
    each this rank's total bytes read, its largest read, and the parameters and buffers that differ from the expected ones.
    Buffers are also compared in a model whose weights a checkpoint replaces.
    """
    meet()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    results = []
    preadv = os.preadv
    for folder, expected_file, dtype, hpz_ranks in cases:
        zero = {"stage": 3, "zero_hpz_partition_size": hpz_ranks}
        settings = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        partitioned = HfDeepSpeedConfig({**settings, "bf16": {"enabled": dtype == "bf16"}})
        read = [0]

        def count(*arguments: Any, read: list[int] = read) -> int:
            read.append(preadv(*arguments))
            return read[-1]

        os.preadv = count  # type: ignore[assignment]
        facts = model_facts(json.loads((Path(folder) / "config.json").read_text()), folder, folder, None)
        section = ModelSection(path=folder, dtype=dtype)
        model = build_model(section, facts, "cpu", 64)
        os.preadv = preadv  # type: ignore[assignment]
        for_checkpoint = build_model(section, facts, "cpu", 64, has_checkpoint=True)
        del partitioned
        expected = load_file(expected_file)
        differing = []
        for built in (model, for_checkpoint):
            buffers = stored_buffers(built.hf)
            differing += [name for name, buffer in buffers.items() if not torch.equal(buffer, expected[name])]
        for name, parameter in model.parameters_by_name().items():
            # As in a pass; GatheredParameters does not read hpZ's second copy.
            parameter.all_gather_coalesced([parameter]).wait()
            # Only without ZeRO-3 does transformers keep some routers in fp32.
            if not torch.equal(parameter.data, expected[name].to(parameter.dtype)):
                differing.append(name)
            parameter.partition()
        results.append((sum(read), max(read), differing))
    return results
