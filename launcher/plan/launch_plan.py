"""The frozen plan: the one file that crosses from the submit side to the workers.

`plan(config, facts)` is pure. Whatever it needs to know about the machine, the model and the data is
gathered before and comes in as `Facts`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.config.schema import RunConfig
from launcher.plan.gpus import Price
from launcher.plan.migrations import SCHEMA_VERSION, migrate


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class DeviceFacts(Record):
    """The accelerators of one node; `kind` is cuda or cpu, `memory_gib` is one device's."""

    kind: str
    name: str
    count: int
    memory_gib: float | None = None
    host_memory_gib: float | None = None


class ModelFacts(Record):
    """What the planner needs of a model; `path` and `tokenizer_path` are local folders or None before download.

    `has_weights` is False for the folder of a run that was fetched from a mirror: its weights are in the checkpoints.
    """

    path: str | None
    tokenizer_path: str | None
    has_weights: bool = True
    num_params: int
    num_params_exact: bool
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    config: dict[str, Any]


class DataFacts(Record):
    """Counts of a built data cache. Rows are packed rows; tokens count no padding.

    `digest` is that of the arrays (tokens, masks, documents and rows) of the training split, "-", and that of the held-out split.
    `chat_template` is the text of data.chat_template, None where the tokenizer's own template was used; `turn_end_ids` are the
    tokens at which the model learns to stop.
    """

    cache_dir: str
    num_rows: int
    num_docs: int
    num_tokens: int
    num_trained_tokens: int
    num_eval_rows: int
    num_eval_tokens: int
    truncated_docs: int
    truncated_tokens: int
    padding_frac: float
    digest: str = ""
    chat_template: str | None = None
    turn_end_ids: tuple[int, ...] = ()

    def contents(self) -> dict[str, Any]:
        """What tells this data from other data, wherever the cache lies."""
        return self.model_dump(exclude={"cache_dir", "chat_template", "turn_end_ids"})

    @property
    def truncated_frac(self) -> float:
        """Of all tokens of the training documents, those that were cut off: documents longer than a row lose their rest."""
        return self.truncated_tokens / max(1, self.num_tokens + self.truncated_tokens)


class Origin(Record):
    """A checkpoint whose weights another run began with; `plan_digest` is that of the plan that saved it."""

    run_name: str
    run_dir: str
    step: int
    plan_digest: str
    wandb_id: str


class Lineage(Origin):
    """Where a run's initial weights came from, and where those had come from; the oldest is last."""

    ancestors: tuple[Origin, ...] = ()


class Provenance(Record):
    """Where this plan came from; `created_at` is UTC in ISO form."""

    created_at: str
    overrides: tuple[str, ...] = ()
    launcher_version: str
    git_commit: str | None = None
    git_dirty: bool | None = None
    python: str
    packages: dict[str, str]


class Facts(Record):
    """What the planner cannot decide; relative paths are meant from `working_dir`, and ~ is `home_dir`."""

    working_dir: str
    home_dir: str = "~"
    device: DeviceFacts
    model: ModelFacts
    data: DataFacts | None
    provenance: Provenance
    lineage: Lineage | None = None


class Topology(Record):
    nodes: int
    ranks_per_node: int
    world_size: int
    device: str
    backend: str


class Batch(Record):
    """Rows per optimizer step and their split; global = micro x accumulation x world size."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    max_tokens_per_step: int
    tokens_per_step: int | None
    max_steps: int | None
    epochs: float | None


class Memory(Record):
    """Model states in GiB. `per_rank` lies on the device, `host_per_node` in main memory through offload.

    `device_gib` and `node_gib` are what a device and a node's main memory have, where that is known.
    """

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    per_rank_gib: float
    host_per_node_gib: float
    device_gib: float | None
    node_gib: float | None = None


class Saving(Record):
    """How checkpoints are written: while training waits, or in the background from a copy of the states in main memory."""

    background: bool
    host_gib_per_node: float
    note: str = ""


class Limits(Record):
    """When a run must end by itself, over all of its attempts; None where nothing limits it.

    `max_seconds` with machines, whatever their number; `max_gpu_seconds` on all GPUs together, which is what run.max_usd buys
    where no attempt before had another price than this plan's.
    """

    max_seconds: float | None
    max_gpu_seconds: float | None = None


class LaunchPlan(Record):
    """Everything decided. Workers read this and nothing else."""

    schema_version: int = SCHEMA_VERSION
    run_name: str
    run_dir: str
    wandb_id: str
    config: RunConfig
    topology: Topology
    batch: Batch
    deepspeed: dict[str, Any]
    memory: Memory
    checkpoint_bytes: int
    saving: Saving
    limits: Limits
    price: Price | None = None
    model: ModelFacts
    data: DataFacts | None
    provenance: Provenance
    lineage: Lineage | None = None

    @property
    def nvme_folder(self) -> Path | None:
        """The run's own folder for states on a node's NVMe disk, where it has any there."""
        zero = self.deepspeed.get("zero_optimization", {})
        parts = (zero.get(key, {}) for key in ("offload_optimizer", "offload_param"))
        return next((Path(part["nvme_path"]) for part in parts if "nvme_path" in part), None)

    def evaluates_at(self, step: int) -> bool:
        """Whether the held-out loss is measured after a step, unless training stops there before the last one."""
        every = self.config.eval.every
        due = step == self.batch.max_steps or (every > 0 and step % every == 0)
        return due and self.data is not None and self.data.num_eval_rows > 0

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def digest(self) -> str:
        """Hex digest of the plan's JSON; stands in every checkpoint."""
        return digest_of(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LaunchPlan:
        """Read a plan's file. Raises OSError, and what `from_json` raises."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str | bytes) -> LaunchPlan:
        """Parse a plan of this schema version or an earlier one.

        Raises:
            ValueError: where it is no plan, in one line that names the field.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("the text holds no JSON object")
        try:
            return cls.model_validate_json(json.dumps(migrate(values)))
        except ValidationError as error:
            first, *_ = error.errors(include_url=False, include_input=False)
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def digest_of(text: str) -> str:
    """The digest of a plan from the text of its file."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
