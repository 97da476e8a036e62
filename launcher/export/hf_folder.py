"""Export a checkpoint as a Hugging Face folder, without an engine, without GPUs and without the model in memory.

Either one process does everything (`export`), or all ranks do at the end of a run: rank 0 calls `begin_export`, every rank
`write_rank_files`, and rank 0 `complete_export`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint import store
from launcher.checkpoint.safetensors_io import ShardSet, TensorSpec
from launcher.checkpoint.state import read_state
from launcher.errors import CheckpointError, ConfigError, Problem
from launcher.export import weights
from launcher.export.hub import TOKENIZER_FILES
from launcher.export.weights import StoredNames, find_stored_names, stores_as_is, try_to_find_stored_names
from launcher.hardware import available_bytes
from launcher.models import remote_code
from launcher.models.found_model import GENERATION_CONFIG, link_problems, read_generation_config, read_stop_ids
from launcher.runs import atomic_files, json_records
from launcher.runs.run_records import EXPORT_RECORD, ExportRecord
from launcher.tracking.progress import MakeProgress, ignore_progress

if TYPE_CHECKING:
    from launcher.export.parity import LogitParity

CARD = "README.md"
# A StoredNames record in the unfinished folder.
_STORED = ".stored.json"

# Memory that loading needs, relative to the bytes of the weights.
_LOADING_FACTOR = 1.2
_MODEL_FILES = (GENERATION_CONFIG, "LICENSE*", "NOTICE*")
_CODE_FILES = ("*.py",)
_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates")


@dataclass(frozen=True)
class ExportTask:
    """Source, target and settings of an export.

    `model` is the base model's folder, or its config.json as a mapping. `tokenizer` is a folder; `chat_template` is the text of a
    template that replaces the tokenizer's own. With `trust_remote_code`, the Python files of `model` must have `code_digest`, or
    owners whom this user trusts. Generation also stops at `turn_end_ids`. `dtype` is bf16, fp16 or fp32. With `check`,
    the model that transformers builds from its config is compared with the checkpoint, and transformers loads the folder.
    """

    checkpoint: Path
    model: Path | Mapping[str, Any]
    tokenizer: Path | None
    out: Path
    dtype: str = "bf16"
    max_file_bytes: int = weights.MAX_FILE_BYTES
    trust_remote_code: bool = False
    code_digest: str | None = None
    check: bool = True
    chat_template: str | None = None
    turn_end_ids: tuple[int, ...] = ()

    @property
    def added_stop_ids(self) -> tuple[int, ...]:
        """Return those of `turn_end_ids` at which the base model does not stop generation."""
        return tuple(i for i in self.turn_end_ids if i not in read_stop_ids(self.model))

    @property
    def runs_code(self) -> bool:
        """Whether transformers may run the code of the base model; without its folder there is none that is pinned."""
        return self.trust_remote_code and isinstance(self.model, Path)

    @property
    def partial(self) -> Path:
        """Path of the unfinished folder; the same on every rank."""
        return self.out.with_name(f".{self.out.name}.partial")


@dataclass(frozen=True)
class ExportedFolder:
    """An exported Hugging Face folder, its weight files, and their parameters and bytes (tied weights count once).

    `num_compared` tensors match the engine's weights by digest; 0 if the checkpoint has no digests. `loaded` is true if
    transformers loaded the folder; otherwise `not_loaded` says why. `parity` is None if no logits were compared. Generation stops
    at `added_stop_ids`, but the base model's does not. Unless `has_original_names`, its tensors have the names that transformers
    gives them, not those of the original model's files.
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
    has_original_names: bool = True


RenderCard = Callable[[ExportedFolder], str]


def export(task: ExportTask, card: RenderCard | None = None, make_progress: MakeProgress = ignore_progress) -> ExportedFolder:
    """Write a checkpoint as a folder that transformers and servers load, in place of an earlier export.

    The weights take a few MiB of memory for any model size; `task.check` loads the complete model at the end. Shards are not
    verified: call `verify_checkpoint` first. Raises CheckpointError if the config describes another model, a weight differs from
    the engine's, the check fails, or `out` holds files that are not an export; `out` stays as it was.
    """
    try:
        begin_export(task)
        write_rank_files(task, 0, 1, make_progress)
        return complete_export(task, card)
    finally:
        shutil.rmtree(task.partial, ignore_errors=True)


def describe_names(exported: ExportedFolder) -> str:
    """Return a message about tensors that do not have the names of the original model's files; empty if they have them."""
    if exported.has_original_names:
        return ""
    return "the tensors have transformers' names, because it is not known how the original files of this architecture store them"


def describe_added_stop_ids(exported: ExportedFolder) -> str:
    """Describe the added stop tokens for the user."""
    ids = ", ".join(map(str, exported.added_stop_ids))
    return (
        f"generation also stops at token {ids}, which ends turns in the data (generation_config.json); the base model's did not"
    )


def verify_checkpoint(task: ExportTask, make_progress: MakeProgress = ignore_progress) -> None:
    """Verify the checkpoint files whose damage `write_rank_files` would not detect.

    An export in the engine's dtype compares every byte that it writes with digests. Then the shards, including the optimizer
    states, need not be read. Raises CheckpointError if a file is damaged.
    """
    manifest = store.open_checkpoint(task.checkpoint).manifest
    names = set(manifest.files)
    with ShardSet(task.checkpoint, manifest.world_size) as shards:
        engine = weights.read_engine_weights(shards)
    if engine is not None and engine.dtype == task.dtype:
        names -= {store.shard_name(rank) for rank in range(manifest.world_size)}
    on_read = make_progress("verifying the checkpoint", sum(manifest.files[name].size for name in names))
    if problems := store.verify_files(task.checkpoint, manifest, sorted(names), on_read=on_read):
        raise CheckpointError(problems)


def begin_export(task: ExportTask) -> None:
    """Create the unfinished folder with all but weights, index and card. Raises CheckpointError."""
    state = read_state(task.checkpoint)
    if task.out.exists() and not (task.out / EXPORT_RECORD).exists() and any(task.out.iterdir()):
        raise CheckpointError(
            "the export folder holds files that are not an export",
            where=str(task.out),
            remedy="choose a folder that does not exist",
        )
    model = _folder_to_load(task, task.model) if isinstance(task.model, Path) else task.model
    shutil.rmtree(task.partial, ignore_errors=True)
    task.partial.mkdir(parents=True)
    _copy_side_files(task, model)
    _write_config(task, model, {**state.parameters, **{buffer.name: buffer.shape for buffer in _read_buffers(task)}})


def write_rank_files(task: ExportTask, rank: int, world_size: int, make_progress: MakeProgress = ignore_progress) -> None:
    """Write this rank's part of the weight files; call it on every rank after `begin_export`, with the same task."""
    manifest, planned = store.open_checkpoint(task.checkpoint).manifest, _file_layout(task)
    own_files = list(planned.files)[rank::world_size]
    num_bytes = sum(spec.num_bytes for name in own_files for spec in planned.tensors(name))
    on_write = make_progress("writing the Hugging Face folder", num_bytes)
    with ShardSet(task.checkpoint, manifest.world_size) as shards:
        weights.write_files(shards, weights.read_engine_weights(shards), planned, own_files, task.partial, on_write)


def complete_export(task: ExportTask, card: RenderCard | None = None, device: str = "cpu") -> ExportedFolder:
    """Add index and card, check the folder on `device`, and rename it into place; call it when all ranks have written."""
    manifest, planned = store.open_checkpoint(task.checkpoint).manifest, _file_layout(task)
    weights.write_index(planned, task.partial)
    has_original_names = _read_stored_names(task).are_original
    (task.partial / _STORED).unlink()
    with ShardSet(task.checkpoint, manifest.world_size) as shards:
        has_digests = weights.read_engine_weights(shards) is not None
    num_tensors = sum(map(len, planned.files.values()))
    exported = ExportedFolder(
        path=task.out,
        step=manifest.step,
        dtype=task.dtype,
        files=tuple(planned.files),
        num_parameters=planned.num_parameters,
        num_bytes=planned.num_bytes,
        num_tensors=num_tensors,
        num_compared=num_tensors if has_digests else 0,
        added_stop_ids=task.added_stop_ids,
        has_original_names=has_original_names,
    )
    exported = _check_loading(task, exported, device) if task.check else exported
    record = ExportRecord(exported.step, manifest.plan_digest, exported.dtype, exported.num_compared)
    json_records.write(task.partial / EXPORT_RECORD, record)
    if card is not None:
        atomic_files.write_text(task.partial / CARD, card(exported))
    atomic_files.fsync_path(task.partial)
    atomic_files.replace_directory(task.partial, task.out)
    return exported


def _check_loading(task: ExportTask, exported: ExportedFolder, device: str) -> ExportedFolder:
    from launcher.export import parity

    needed, free = exported.num_bytes * _LOADING_FACTOR, available_bytes()
    if needed > free:
        return replace(
            exported, not_loaded=f"loading needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
        )
    reference_logits, logit_parity = parity.read_reference_logits(task.checkpoint), None
    dtype = parity.choose_dtype(reference_logits, task.dtype)
    folder = _folder_to_load(task, task.partial)
    model = parity.load_exported(folder, dtype=dtype, device=device, trust_remote_code=task.runs_code)
    if reference_logits is None:
        parity.require_finite(model)
    else:
        logit_parity = parity.check_parity(model, reference_logits, dtype=dtype)
        parity.require_parity(logit_parity)
    return replace(exported, loaded=True, not_loaded="", parity=logit_parity)


def _file_layout(task: ExportTask) -> weights.FileLayout:
    parameters, stored = read_state(task.checkpoint).parameters, _read_stored_names(task).tensors
    return weights.plan_files(parameters, task.dtype, task.max_file_bytes, _read_buffers(task), stored)


def _read_stored_names(task: ExportTask) -> StoredNames:
    return json_records.read(StoredNames, task.partial / _STORED)


def _read_buffers(task: ExportTask) -> list[TensorSpec]:
    with ShardSet(task.checkpoint, store.open_checkpoint(task.checkpoint).manifest.world_size) as shards:
        return shards.buffers()


def _folder_to_load(task: ExportTask, folder: Path) -> Path:
    """Return the folder from which transformers may load `folder`, with the base model's code."""
    code = task.model if isinstance(task.model, Path) else None
    try:
        return remote_code.folder_to_load(folder, task.runs_code, task.code_digest, code)
    except ConfigError as error:
        raise CheckpointError(error.problems) from error


def _write_config(task: ExportTask, model: Path | Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Write the config.json of a base model, and how its weight files store the `saved` tensors if they do it differently."""
    config = dict(model) if isinstance(model, Mapping) else json.loads((model / "config.json").read_bytes())
    # The base model may have been quantized, but these weights are not; nor do they have the base model's file names.
    for key in ("quantization_config", "torch_dtype", "transformers_weights", *(() if task.runs_code else ("auto_map",))):
        config.pop(key, None)
    further = f".layers.{config.get('num_hidden_layers')}."
    if config.get("num_nextn_predict_layers") and not any(further in name for name in saved):
        # The layers that only predict further tokens are not trained.
        config["num_nextn_predict_layers"] = 0
    config["dtype"] = weights.DTYPES[task.dtype][1]
    target = task.partial / "config.json"
    atomic_files.write_json(target, config)
    stored = task.partial / _STORED
    if task.check or not config.get("architectures"):
        # These import torch.
        from launcher.export.parity import build_on_meta, require_same_tensors

        built = build_on_meta(_folder_to_load(task, task.partial), task.runs_code)
        require_same_tensors(built, saved)
        atomic_files.write_json(target, config | {"architectures": [type(built).__name__]})
        json_records.write(stored, find_stored_names(built, saved))
    elif stores_as_is(task.model, saved):
        json_records.write(stored, StoredNames({}, are_original=True))
    else:
        try_to_find_stored_names(_folder_to_load(task, task.partial), task.runs_code, saved, stored)


def _copy_side_files(task: ExportTask, model: Path | Mapping[str, Any]) -> None:
    """Copy the files that belong to the base model and its tokenizer; `model` is the folder of the code, if there is one."""
    by_folder: list[tuple[Path, tuple[str, ...]]] = []
    if isinstance(task.model, Path) and isinstance(model, Path):
        by_folder += [(task.model, _MODEL_FILES), (model, _CODE_FILES)]
    if task.tokenizer is not None:
        templates = () if task.chat_template is not None else _TEMPLATE_FILES
        by_folder.append((task.tokenizer, (*TOKENIZER_FILES, *templates)))
    paths, problems = list[Path](), list[Problem]()
    for folder, patterns in by_folder:
        if not folder.is_dir():
            raise CheckpointError("a folder that the export copies files from no longer exists", where=str(folder))
        matching = [path for pattern in patterns for path in folder.glob(pattern)]
        paths += matching
        problems += link_problems(folder, matching)
    if problems:
        raise CheckpointError(problems)
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, task.partial / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, task.partial / path.name)
    if (task.partial / "tokenizer.json").is_file():
        # Where mistral-common is installed, this file would replace the chat template of the run.
        (task.partial / "tekken.json").unlink(missing_ok=True)
    if not task.runs_code:
        _remove_key(task.partial / "tokenizer_config.json", "auto_map")
    if task.chat_template is not None:
        atomic_files.write_text(task.partial / "chat_template.jinja", task.chat_template)
        _remove_key(task.partial / "tokenizer_config.json", "chat_template")
    if task.added_stop_ids:
        settings = {
            **read_generation_config(task.model),
            "eos_token_id": [*read_stop_ids(task.model), *task.added_stop_ids],
        }
        # With this key, transformers 4 replaces the settings by those of config.json.
        settings.pop("_from_model_config", None)
        atomic_files.write_json(task.partial / GENERATION_CONFIG, settings)


def _remove_key(settings: Path, key: str) -> None:
    # A damaged file is copied as it is.
    with suppress(OSError, ValueError):
        content = json.loads(settings.read_bytes())
        if isinstance(content, dict) and key in content:
            del content[key]
            atomic_files.write_json(settings, content)
