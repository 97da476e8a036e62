"""Compare the plan's peak memory with measurements on the CPU: bare models at real size, and the engine at reduced width.

    python benchmarks/memory_plan.py [--only bare|engine] [--skip-large]

Bare models use fake tensors (bare_memory.py); the engine runs 1, 2 or 4 ranks over gloo (memory_ranks.py). The constants in
launcher/plan/sizing come from the configurations marked "fit", so only the errors of the others are meaningful.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import bare_memory
import yaml
from sides import RESULTS, record

from launcher.config.compose import compose_one, conf_dir
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan, Provenance
from launcher.plan.planner import plan, sizing_inputs
from launcher.plan.sizing.combinations import build_combination, estimate_combination

HERE = Path(__file__).resolve().parent
_TIMEOUT_S = 600
_MIB = 2**20
# Small chunks of the loss, so that the other parts of the memory matter.
_CHUNK_TOKENS = 64
_SOURCE = (
    "From the functions of `launcher/plan/sizing` and `launcher.train.engine.build_engine`, called from Python. Tensors only: "
    "Liger's kernels and the memory that CUDA, NCCL and fragmentation add are not measured here."
)


@dataclass(frozen=True)
class Case:
    """A configuration of a bare model (preset, tokens, recomputed layers) or of an engine (overrides)."""

    name: str
    is_fit: bool
    preset: str = ""
    tokens: int = 0
    checkpointing: str = "none"
    dtype: str = "bf16"
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A case's measured bytes and the plan's estimate."""

    case: Case
    measured: float
    planned: float

    @property
    def error(self) -> float:
        """The relative error of the plan, positive if the estimate is too high."""
        return self.planned / self.measured - 1


def _bare(preset: str, tokens: int, checkpointing: str, dtype: str = "bf16", fit: bool = False) -> Case:
    name = f"{preset}, {tokens:,} tokens, {dtype}, recomputed: {checkpointing}"
    return Case(name, fit, preset, tokens, checkpointing, dtype)


def _engine(name: str, *overrides: str, fit: bool = False) -> Case:
    return Case(f"engine: {name}", fit, overrides=overrides)


_MOE = ("num_experts=8", "num_experts_per_tok=2", "moe_intermediate_size=512", "decoder_sparse_step=1", "norm_topk_prob=true")
_LARGE = ("llama3_1_70b", "qwen2_5_72b")
BARE = (
    _bare("llama3_1_8b", 4096, "all", fit=True),
    _bare("llama3_1_8b", 8192, "none", fit=True),
    _bare("qwen3_0_6b", 8192, "every 2", fit=True),
    _bare("olmo2_7b", 8192, "none", fit=True),
    _bare("gemma3_1b", 4096, "all", fit=True),
    _bare("phi4", 4096, "none", fit=True),
    _bare("qwen3_30b_a3b", 8192, "all", fit=True),
    _bare("llama3_1_8b", 16384, "every 2"),
    _bare("llama3_1_8b", 4096, "none", "fp32"),
    _bare("mistral_small_24b", 8192, "all"),
    _bare("mistral_small_24b", 4096, "every 4"),
    _bare("llama3_1_70b", 4096, "all"),
    _bare("llama3_1_70b", 8192, "every 2"),
    _bare("olmoe_1b_7b", 8192, "none"),
    _bare("qwen3_30b_a3b", 4096, "none"),
    _bare("qwen2_5_7b", 8192, "none"),
    _bare("gemma3_1b", 16384, "none"),
    _bare("smollm3_3b", 4096, "every 3"),
)
ENGINE = (
    _engine("2 ranks", fit=True),
    _engine("2 ranks, all layers recomputed", "model.activation_checkpointing=all", "data.max_length=1024", fit=True),
    _engine("2 ranks, no accumulation", "train.global_batch_size=2", fit=True),
    _engine("4 ranks, tied head", "cluster.ranks_per_node=4", "model.config.tie_word_embeddings=true", fit=True),
    _engine("2 ranks, longer rows", "data.max_length=1024", fit=True),
    _engine(
        "2 ranks, 2 rows, every 2", "train.micro_batch_size=2", "data.max_length=512", "model.activation_checkpointing=every 2"
    ),
    _engine("4 ranks, wider", "cluster.ranks_per_node=4", "model.config.hidden_size=768", "model.config.intermediate_size=2304"),
    _engine("2 ranks, fp32", "model.dtype=fp32", "data.max_length=512", fit=True),
    _engine("2 ranks, deeper, large vocabulary", "model.config.num_hidden_layers=10", "model.config.vocab_size=24576"),
    _engine("1 rank", "cluster.ranks_per_node=1"),
    _engine("2 ranks, experts", "model.config.model_type=qwen3_moe", *(f"++model.config.{one}" for one in _MOE), fit=True),
)
# Small buckets, so that the other parts of the memory matter.
_SHARED = (
    *("model=tiny", "data=jsonl", "data.path=rows.jsonl", "train.epochs=null", "train.max_steps=3", "model.dtype=bf16"),
    *("data.max_length=256", "train.global_batch_size=8", "train.micro_batch_size=1"),
    *("cluster.ranks_per_node=2", "model.attention=sdpa", "model.activation_checkpointing=none", "model.config.vocab_size=8192"),
    *("model.config.hidden_size=512", "model.config.head_dim=64", "model.config.num_attention_heads=8"),
    *("model.config.num_key_value_heads=4", "model.config.intermediate_size=1536", "model.config.num_hidden_layers=6"),
    "model.config.tie_word_embeddings=false",
    "+deepspeed.extra.zero_optimization.reduce_bucket_size=1000000",
    "+deepspeed.extra.zero_optimization.stage3_prefetch_bucket_size=1000000",
    "+deepspeed.extra.zero_optimization.stage3_max_live_parameters=4000000",
    "+deepspeed.extra.zero_optimization.stage3_max_reuse_distance=4000000",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("bare", "engine"))
    parser.add_argument("--skip-large", action="store_true", help="leave out the models of 70 billion parameters")
    options = parser.parse_args()
    results = []
    for case in (*BARE, *ENGINE):
        is_bare = bool(case.preset)
        if options.only == ("engine" if is_bare else "bare") or (options.skip_large and case.preset in _LARGE):
            continue
        result = _measure_bare(case) if is_bare else _measure_engine(case)
        print(_row(result), flush=True)
        results.append(result)
    table = _table(results)
    if options.only or options.skip_large:
        print("\n".join(table))
        return
    command = "`python benchmarks/memory_plan.py`"
    record(RESULTS, "memory plan", f"memory plan, {len(results)} configurations", _SOURCE, command, table)


def _measure_bare(case: Case) -> Measured:
    config = yaml.safe_load((conf_dir() / "model" / f"{case.preset}.yaml").read_text())["config"]
    arguments = (config, case.tokens, case.checkpointing, case.dtype, 1024)
    return Measured(case, bare_memory.measure(*arguments), bare_memory.predict(*arguments))


def _measure_engine(case: Case) -> Measured:
    planned = _plan(case.overrides)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(planned.to_json())
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={planned.topology.world_size}",
            "--standalone",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(
            [*command, str(HERE / "memory_ranks.py"), str(path)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=_TIMEOUT_S,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{case.name}: {done.stderr[-2000:]}")
    measured = json.loads(lines[-1])
    return Measured(case, max(measured.values()), planned.peak.tensors_gib * 2**30)


def _plan(overrides: tuple[str, ...]) -> LaunchPlan:
    keys = {one.partition("=")[0].lstrip("+") for one in overrides}
    shared = [one for one in _SHARED if one.partition("=")[0].lstrip("+") not in keys]
    config = compose_one([*shared, *overrides]).config
    assert config.model.config is not None
    facts = Facts(
        working_dir=str(HERE),
        device=DeviceFacts(kind="cpu", name="CPU", count=2),
        model=model_facts(config.model.config, None, None, None),
        data=None,
        provenance=Provenance(created_at="2026-01-01T00:00:00Z", launcher_version="", python="", packages={}),
    )
    planned = plan(config, facts)
    inputs = replace(sizing_inputs(planned), chunk_tokens=_CHUNK_TOKENS)
    combination = build_combination(inputs, planned.batch.micro_batch_size, planned.checkpointing)
    return planned.model_copy(update={"loss_chunk_tokens": _CHUNK_TOKENS, "peak": estimate_combination(inputs, combination).peak})


def _row(result: Measured) -> str:
    used = "fit" if result.case.is_fit else "test"
    sizes = " | ".join(f"{size / _MIB:,.0f}" for size in (result.measured, result.planned))
    return f"| {result.case.name} | {used} | {sizes} | {result.error:+.2%} |"


def _table(results: list[Measured]) -> list[str]:
    lines = ["| configuration | used for | measured, MiB | plan, MiB | error |", "|---|---|---|---|---|", *map(_row, results), ""]
    for label, chosen in (("fit", True), ("test", False)):
        if errors := [abs(result.error) for result in results if result.case.is_fit is chosen]:
            figures = f"median error {statistics.median(errors):.2%}, worst {max(errors):.2%}"
            lines.append(f"{len(errors)} configurations for the {label}: {figures}.")
    return lines


if __name__ == "__main__":
    main()
