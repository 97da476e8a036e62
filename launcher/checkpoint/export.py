"""A checkpoint becomes a Hugging Face folder, without an engine, without GPUs and without the model in memory.

python -m launcher.checkpoint.export PLAN_JSON [--step N] [--dtype bf16] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from launcher.checkpoint import durable, store, tensor_file
from launcher.checkpoint.tensor_file import ShardSet, TensorSpec, as_bytes, tensor_key
from launcher.errors import CheckpointError, LauncherError, Problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

# 5 GB per file is what transformers and the hub use.
MAX_SHARD_BYTES = 5 * 10**9
# The exported weights are the very numbers that the engine computes with, so that only kernels and the order of sums differ.
# bf16 and fp16 round each result to 2^-9 and 2^-12 of its size; over tens of layers that moves logits by some 0.05, and
# KL ~ Var(difference) / 2 ~ 1e-3. A weight that is wrong, missing or in the wrong place costs tenths of a nat. In fp32
# the same reasoning gives 1e-9; the bound leaves room for TF32 matrix products.
MAX_MEAN_KL_LOW_PRECISION = 1e-2
MAX_MEAN_KL_FP32 = 1e-5

# Stands in every export: only a folder that has it is ever replaced.
MARKER = "export.json"

# The launcher's name of a dtype: torch's, safetensors' and config.json's.
_DTYPES = {
    "bf16": (torch.bfloat16, "BF16", "bfloat16"),
    "fp16": (torch.float16, "F16", "float16"),
    "fp32": (torch.float32, "F32", "float32"),
}
_BLOCK_ELEMENTS = 2**23
_KL_ROWS = 64
_MODEL_FILES = ("generation_config.json", "*.py")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
)


@dataclass(frozen=True)
class Parity:
    """How the exported model's logits differ from the trained engine's on the same tokens.

    `mean_kl` is KL(engine || export) in nats, averaged over `num_tokens`; `top1_agreement` is a fraction;
    `max_mean_kl` is the bound for the dtypes that were compared.
    """

    max_abs_diff: float
    mean_kl: float
    top1_agreement: float
    num_tokens: int
    max_mean_kl: float


@dataclass(frozen=True)
class Export:
    """A Hugging Face folder: where it is, its weight files, the parameters and bytes in them (tied ones count once).

    `parity` is None where nothing was compared.
    """

    path: Path
    step: int
    dtype: str
    files: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    parity: Parity | None


def export(
    checkpoint: Path,
    *,
    model: Path | Mapping[str, Any],
    tokenizer: Path | None,
    out: Path,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    parity: bool = True,
    parity_device: str = "cpu",
    trust_remote_code: bool = False,
) -> Export:
    """Write a checkpoint's weights as a folder that transformers and servers load; it takes the place of an earlier export.

    `model` is the base model's folder, or its config.json as a mapping; `tokenizer` is a folder; `dtype` is bf16, fp16 or
    fp32. Memory for the weights: two blocks of 8M elements, whatever the model's size. With `parity`, and where the
    checkpoint holds a probe, the folder is loaded (the whole model, on `parity_device`) and compared before it takes its
    place. Shards are read as they are: call `store.verify` first where they may be damaged.

    CheckpointError when the config describes another model than the checkpoint holds, when the comparison fails, and when
    `out` holds something else than an export; `out` is then as it was.
    """
    out = out.absolute()
    manifest, state = store.open_checkpoint(checkpoint).manifest, store.read_state(checkpoint)
    if out.exists() and not (out / MARKER).exists() and any(out.iterdir()):
        raise CheckpointError(
            "the folder to export to holds something else than an export",
            where=str(out),
            remedy="choose a folder that does not exist",
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _copy_side_files(model, tokenizer, partial)
        _write_config(model, state, dtype, partial, trust_remote_code)
        with ShardSet(checkpoint, manifest.world_size) as shards:
            files, num_bytes = _write_weights(shards, state, dtype, max_shard_bytes, partial)
        _write_json(partial / MARKER, {"step": manifest.step, "plan_digest": manifest.plan_digest, "dtype": dtype})
        compared = None
        if parity and (probe := read_probe(checkpoint)):
            compared = check_parity(partial, probe, dtype=dtype, device=parity_device, trust_remote_code=trust_remote_code)
            require_parity(compared)
        durable.fsync_directory(partial)
        durable.replace_directory(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    num_parameters = sum(math.prod(shape) for shape in state.parameters.values())
    return Export(out, manifest.step, dtype, files, num_parameters, num_bytes, compared)


def read_probe(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """The tokens and logits that were stored with a checkpoint, if any."""
    path = checkpoint / store.PROBE
    return load_file(path) if path.exists() else None


def check_parity(
    folder: Path, probe: Mapping[str, torch.Tensor], *, dtype: str, device: str = "cpu", trust_remote_code: bool = False
) -> Parity:
    """Load an exported folder with transformers in `dtype` and compare its logits with the engine's.

    `probe` holds `input_ids` [1, T], `position_ids` [1, T] and `logits` [1, T, V] in the dtype that the engine computed in.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=_DTYPES[dtype][0], attn_implementation="sdpa", trust_remote_code=trust_remote_code
    )
    model.to(device).eval()
    inputs = {key: probe[key].to(device) for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        # With a cache, transformers does not see from the position ids where packed documents begin.
        logits = model(**inputs, use_cache=False).logits[0]
    engine = probe["logits"][0]
    max_abs_diff = kl = agree = 0.0
    for ours, theirs in zip(engine.split(_KL_ROWS), logits.split(_KL_ROWS), strict=True):
        p, q = ours.to(device).double(), theirs.double()
        difference = (p - q).abs().max().item()
        max_abs_diff = difference if not difference <= max_abs_diff else max_abs_diff
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
    num_tokens = len(engine)
    both_fp32 = engine.dtype == torch.float32 and dtype == "fp32"
    bound = MAX_MEAN_KL_FP32 if both_fp32 else MAX_MEAN_KL_LOW_PRECISION
    return Parity(max_abs_diff, kl / num_tokens, agree / num_tokens, num_tokens, bound)


def require_parity(parity: Parity) -> None:
    """CheckpointError when the exported model is not the trained one (`MAX_MEAN_KL_*` say why these bounds)."""
    if not parity.mean_kl <= parity.max_mean_kl:  # a NaN fails as well
        raise CheckpointError(
            "the exported model does not compute what the trained one computed",
            value=(
                f"mean KL {parity.mean_kl:.3g} nats over {parity.num_tokens} tokens, rounding explains {parity.max_mean_kl:g}; "
                f"largest logit difference {parity.max_abs_diff:.3g}, same most likely token for {parity.top1_agreement:.1%}"
            ),
            remedy="verify the checkpoint, and export it in the dtype that it was trained in",
        )


def _write_config(model: Path | Mapping[str, Any], state: store.State, dtype: str, folder: Path, trust_remote_code: bool) -> None:
    """config.json, checked by building the model from it without memory: it must have the checkpoint's parameters."""
    config = dict(model) if isinstance(model, Mapping) else json.loads((model / "config.json").read_bytes())
    # The base may have been quantized; these weights are not.
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = _DTYPES[dtype][2]
    target = folder / "config.json"
    _write_json(target, config)
    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
        )
    if not config.get("architectures"):
        target.unlink()
        _write_json(target, config | {"architectures": [type(built).__name__]})
    tied = built.all_tied_weights_keys
    expected = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items() if name not in tied}
    held = state.parameters
    if differing := sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name)):
        first = differing[0]
        raise CheckpointError(
            f"the model's config and the checkpoint differ in {len(differing)} tensors",
            value=f"{first}: {held.get(first, 'absent')} in the checkpoint, {expected.get(first, 'absent')} by the config",
        )


def _write_weights(
    shards: ShardSet, state: store.State, dtype: str, max_shard_bytes: int, folder: Path
) -> tuple[tuple[str, ...], int]:
    """The weight files and, where there are several, their index; returns file names and bytes of tensors."""
    specs = {name: TensorSpec(name, _DTYPES[dtype][1], shape) for name, shape in state.parameters.items()}
    split = split_state_dict_into_shards_factory(
        {name: spec.num_bytes for name, spec in specs.items()},
        get_storage_size=lambda num_bytes: num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        chosen = [specs[name] for name in names]
        tensor_file.write(folder / file, chosen, _cast(shards, chosen, _DTYPES[dtype][0]), {"format": "pt"})
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    if split.is_sharded:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    return tuple(split.filename_to_tensors), num_bytes


def _cast(shards: ShardSet, specs: Sequence[TensorSpec], dtype: torch.dtype) -> Iterator[memoryview]:
    fp32 = torch.empty(_BLOCK_ELEMENTS, dtype=torch.float32)
    for spec in specs:
        num_elements = math.prod(spec.shape)
        for start in range(0, num_elements, _BLOCK_ELEMENTS):
            block = fp32[: num_elements - start]
            shards.read_into(tensor_key(spec.name, "fp32"), num_elements, start, as_bytes(block))
            yield as_bytes(block.to(dtype))


def _copy_side_files(model: Path | Mapping[str, Any], tokenizer: Path | None, folder: Path) -> None:
    found = [] if isinstance(model, Mapping) else [path for pattern in _MODEL_FILES for path in model.glob(pattern)]
    if tokenizer is not None:
        found += [path for pattern in _TOKENIZER_FILES for path in tokenizer.glob(pattern)]
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    durable.write_file(path, [(json.dumps(content, indent=2) + "\n").encode()])


def export_run(plan_path: Path, *, step: int | None, dtype: str, out: Path | None, parity: bool = True) -> Export:
    """Verify and export one checkpoint of a run: the latest unless `step` is given, to the run's `export` unless `out` is.

    CheckpointError when there is no such checkpoint, when it is damaged, and as `export` says.
    """
    try:
        plan = LaunchPlan.load(plan_path)
    except ValueError as error:
        raise CheckpointError("this is not a launch plan that can be read", where=str(plan_path), value=str(error)) from error
    # Where the plan lies now, not where it was made: a run may have been moved.
    run_dir = RunDir(plan_path.absolute().parent)
    checkpoint = store.latest(run_dir.checkpoints) if step is None else store.at_step(run_dir.checkpoints, step)
    if problems := store.verify(checkpoint.path):
        raise CheckpointError(problems)
    return export(
        checkpoint.path,
        model=Path(plan.model.path) if plan.model.path else plan.model.config,
        tokenizer=Path(plan.model.tokenizer_path) if plan.model.tokenizer_path else None,
        out=out or run_dir.export,
        dtype=dtype,
        parity=parity,
        trust_remote_code=plan.config.model.trust_remote_code,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.checkpoint.export", description="Export a checkpoint as a Hugging Face folder."
    )
    parser.add_argument("plan", type=Path, metavar="PLAN_JSON", help="the run's plan.json")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16", help="type of the written weights")
    parser.add_argument("--out", type=Path, help="folder to write (default: export/ in the run directory)")
    parser.add_argument(
        "--no-parity", action="store_true", help="do not load the folder for the comparison with the trained model"
    )
    arguments = parser.parse_args(argv)
    try:
        exported = export_run(
            arguments.plan, step=arguments.step, dtype=arguments.dtype, out=arguments.out, parity=not arguments.no_parity
        )
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        failed = Problem(
            "the export could not be read or written", where=str(error.filename or ""), value=error.strerror or str(error)
        )
        print(failed, file=sys.stderr)
        return CheckpointError.exit_code
    print(f"exported step {exported.step} to {exported.path}")
    size = f"{exported.num_bytes:,} bytes in {len(exported.files)} file(s)"
    print(f"  {exported.num_parameters:,} parameters in {exported.dtype}, {size}")
    if (parity := exported.parity) is None:
        print("  parity with the trained model: not checked")
    else:
        print(
            f"  parity with the trained model over {parity.num_tokens} tokens: mean KL {parity.mean_kl:.2e} nats "
            f"(at most {parity.max_mean_kl:g}), same top token {parity.top1_agreement:.1%}, "
            f"largest logit difference {parity.max_abs_diff:.3g}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
