"""A checkpoint becomes a Hugging Face folder, without an engine, without GPUs and without the model in memory.

One process makes it (`export`), or all ranks do at the end of a run: rank 0 begins, every rank writes its share of the
weight files, rank 0 completes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import atomic_files
from launcher.checkpoint import generation, store
from launcher.checkpoint.safetensors_io import ShardSet
from launcher.checkpoint.state import State, read_state
from launcher.errors import CheckpointError
from launcher.export import weights
from launcher.plan.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from launcher.export.parity import LogitParity

# Stands in every export: only a folder that has it is ever replaced.
MARKER = "export.json"
CARD = "README.md"

# What loading takes above the weights themselves.
_LOADING_FACTOR = 1.2
_MODEL_FILES = (generation.FILE, "*.py", "LICENSE*", "NOTICE*")
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
)
_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates")


@dataclass(frozen=True)
class ExportTask:
    """What is exported from where to where.

    `model` is the base model's folder, or its config.json as a mapping; `tokenizer` is a folder, and `chat_template` the text
    of a template that takes the place of its own ones. At `turn_end_ids` generations of the folder stop, too. `dtype` is bf16,
    fp16 or fp32. `check` says whether transformers builds the model from its config before, and loads the folder after, the
    writing.
    """

    checkpoint: Path
    model: Path | Mapping[str, Any]
    tokenizer: Path | None
    out: Path
    dtype: str = "bf16"
    max_file_bytes: int = weights.MAX_FILE_BYTES
    trust_remote_code: bool = False
    check: bool = True
    chat_template: str | None = None
    turn_end_ids: tuple[int, ...] = ()

    @property
    def added_stop_ids(self) -> tuple[int, ...]:
        """Those of `turn_end_ids` at which the base model's generations do not stop."""
        return tuple(i for i in self.turn_end_ids if i not in generation.read_stop_ids(self.model))

    @property
    def partial(self) -> Path:
        """Where the folder is made before it takes its place; the same on every rank."""
        return self.out.with_name(f".{self.out.name}.partial")


@dataclass(frozen=True)
class ExportedFolder:
    """A Hugging Face folder: where it is, its weight files, the parameters and bytes in them (tied ones count once).

    `num_compared` tensors were found to be those that the engine computed with, by their digests; 0 where the checkpoint
    has none. `loaded`: transformers loaded the folder; `not_loaded` says why not. `parity` is None where no logits were
    compared. `added_stop_ids` are tokens at which its generations stop and the base model's did not.
    """

    path: Path
    step: int
    dtype: str
    files: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    num_tensors: int
    num_compared: int
    loaded: bool = False
    not_loaded: str = "not asked for"
    parity: LogitParity | None = None
    added_stop_ids: tuple[int, ...] = ()


RenderCard = Callable[[ExportedFolder], str]


def export(task: ExportTask, card: RenderCard | None = None) -> ExportedFolder:
    """Write a checkpoint's weights as a folder that transformers and servers load; it takes the place of an earlier export.

    Memory for the weights: a few MiB, whatever the model's size; `task.check` loads the whole model when all is written.
    Shards are read as they are: call `verify_checkpoint` first.

    CheckpointError when the config describes another model than the checkpoint holds, when a weight is not the engine's,
    when the check fails, and when `out` holds something else than an export; `out` is then as it was.
    """
    try:
        begin_export(task)
        write_rank_files(task, 0, 1)
        return complete_export(task, card)
    finally:
        shutil.rmtree(task.partial, ignore_errors=True)


def find_chat_template(plan: LaunchPlan) -> str | None:
    """The text of the template that the run's data was rendered with; None where it was the tokenizer's own.

    CheckpointError where the plan does not hold it and its file is gone.
    """
    if plan.data is not None and plan.data.chat_template is not None:
        return plan.data.chat_template
    file = plan.config.data.chat_template
    if file is None:
        return None
    # Earlier versions of the launcher wrote its name alone into a plan.
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "the chat template that the run was trained with cannot be read, and its plan holds no copy",
            where="data.chat_template",
            value=file,
            remedy="put the file there again: without it the exported folder would make other prompts of a conversation",
        ) from error


def describe_added_stop_ids(made: ExportedFolder) -> str:
    """What is told of stop tokens that were added."""
    ids = ", ".join(map(str, made.added_stop_ids))
    return (
        f"generations stop at token {ids} too, with which the data ends turns (generation_config.json); the base model's did not"
    )


def verify_checkpoint(task: ExportTask) -> None:
    """CheckpointError where a file is damaged that `write_rank_files` would not find out about.

    The digests of the weights cover every byte that is exported in the engine's own dtype; the moments, which are twice as
    large as the weights, need not be read then.
    """
    manifest = store.open_checkpoint(task.checkpoint).manifest
    names = set(manifest.files)
    with ShardSet(task.checkpoint, manifest.world_size) as shards:
        engine = weights.read_engine_weights(shards)
    if engine is not None and engine.dtype == task.dtype:
        names -= {store.shard_name(rank) for rank in range(manifest.world_size)}
    if problems := store.verify_files(task.checkpoint, manifest, sorted(names)):
        raise CheckpointError(problems)


def begin_export(task: ExportTask) -> None:
    """Make the folder with everything but weights in it, beside its later place."""
    state = read_state(task.checkpoint)
    if task.out.exists() and not (task.out / MARKER).exists() and any(task.out.iterdir()):
        raise CheckpointError(
            "the folder to export to holds something else than an export",
            where=str(task.out),
            remedy="choose a folder that does not exist",
        )
    shutil.rmtree(task.partial, ignore_errors=True)
    task.partial.mkdir(parents=True)
    _copy_side_files(task)
    _write_config(task, state)


def write_rank_files(task: ExportTask, rank: int, world_size: int) -> None:
    """Write this rank's share of the weight files; every rank calls it after `begin_export`, with the same task."""
    manifest, planned = store.open_checkpoint(task.checkpoint).manifest, _layout(task)
    mine = list(planned.files)[rank::world_size]
    with ShardSet(task.checkpoint, manifest.world_size) as shards:
        weights.write_files(shards, weights.read_engine_weights(shards), planned, mine, task.partial)


def complete_export(task: ExportTask, card: RenderCard | None = None, device: str = "cpu") -> ExportedFolder:
    """Check the folder, on `device`, once all shares are written; add index and card, and move it into place."""
    manifest, planned = store.open_checkpoint(task.checkpoint).manifest, _layout(task)
    weights.write_index(planned, task.partial)
    with ShardSet(task.checkpoint, manifest.world_size) as shards:
        compared = weights.read_engine_weights(shards) is not None
    num_tensors = sum(map(len, planned.files.values()))
    made = ExportedFolder(
        path=task.out,
        step=manifest.step,
        dtype=task.dtype,
        files=tuple(planned.files),
        num_parameters=planned.num_parameters,
        num_bytes=planned.num_bytes,
        num_tensors=num_tensors,
        num_compared=num_tensors if compared else 0,
        added_stop_ids=task.added_stop_ids,
    )
    made = _checked(task, made, device) if task.check else made
    marker = {"step": made.step, "plan_digest": manifest.plan_digest, "dtype": made.dtype, "tensors_compared": made.num_compared}
    atomic_files.write_json(task.partial / MARKER, marker)
    if card is not None:
        atomic_files.write_text(task.partial / CARD, card(made))
    atomic_files.fsync_directory(task.partial)
    atomic_files.replace_directory(task.partial, task.out)
    return made


def _checked(task: ExportTask, made: ExportedFolder, device: str) -> ExportedFolder:
    from launcher.checkpoint.staging import available_bytes
    from launcher.export import parity

    needed, free = made.num_bytes * _LOADING_FACTOR, available_bytes()
    if needed > free:
        return replace(made, not_loaded=f"that takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free")
    model = parity.load_exported(task.partial, dtype=task.dtype, device=device, trust_remote_code=task.trust_remote_code)
    reference_logits, compared = parity.read_reference_logits(task.checkpoint), None
    if reference_logits is None:
        parity.require_finite(model)
    else:
        compared = parity.check_parity(model, reference_logits, dtype=task.dtype)
        parity.require_parity(compared)
    return replace(made, loaded=True, not_loaded="", parity=compared)


def _layout(task: ExportTask) -> weights.FileLayout:
    return weights.plan_files(read_state(task.checkpoint).parameters, task.dtype, task.max_file_bytes)


def _write_config(task: ExportTask, state: State) -> None:
    """config.json; checked against the checkpoint's parameters."""
    config = dict(task.model) if isinstance(task.model, Mapping) else json.loads((task.model / "config.json").read_bytes())
    # The base may have been quantized; these weights are not.
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = weights.DTYPES[task.dtype][1]
    target = task.partial / "config.json"
    atomic_files.write_json(target, config)
    if task.check or not config.get("architectures"):
        from launcher.export.parity import check_config

        built = check_config(task.partial, state, task.trust_remote_code)
        atomic_files.write_json(target, config | {"architectures": config.get("architectures") or [built]})


def _copy_side_files(task: ExportTask) -> None:
    found = [] if isinstance(task.model, Mapping) else [path for pattern in _MODEL_FILES for path in task.model.glob(pattern)]
    if task.tokenizer is not None:
        patterns = _TOKENIZER_FILES if task.chat_template is not None else (*_TOKENIZER_FILES, *_TEMPLATE_FILES)
        found += [path for pattern in patterns for path in task.tokenizer.glob(pattern)]
    for path in found:
        if path.is_dir():
            shutil.copytree(path, task.partial / path.name)
        else:
            shutil.copyfile(path, task.partial / path.name)
    if task.chat_template is not None:
        _write_chat_template(task.partial, task.chat_template)
    if task.added_stop_ids:
        settings = {
            **generation.read_generation_config(task.model),
            "eos_token_id": [*generation.read_stop_ids(task.model), *task.added_stop_ids],
        }
        atomic_files.write_json(task.partial / generation.FILE, settings)


def _write_chat_template(folder: Path, text: str) -> None:
    atomic_files.write_text(folder / "chat_template.jinja", text)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "chat_template" in (content := json.loads(settings.read_bytes())):
        del content["chat_template"]
        atomic_files.write_json(settings, content)
