"""The frozen plan: the only file that the submit side hands to the workers.

`plan(config, facts)` is pure: `Facts` holds everything that it needs to know about the machine, the model and the data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.config.schema import RunConfig
from launcher.config.sections.evaluation import HELD_OUT
from launcher.plan.gpu_types import Price
from launcher.plan.run_dir import SCHEMA_VERSION

Outcome = Literal["isolated", "leaks", "not_causal", "other_logits", "unsupported", "unknown"]
# Number of trained tokens whose logits exist at a time, unless the settings or a GPU's memory decide otherwise.
LOSS_CHUNK_TOKENS = 1024


class Record(BaseModel):
    """A part of the plan: frozen, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class DeviceFacts(Record):
    """The devices of one node; `kind` is cuda or cpu, `memory_gib` is the memory of one device.

    `problem` is why GPUs that may exist are not counted, empty if nothing is wrong.
    """

    kind: str
    name: str
    count: int
    memory_gib: float | None = None
    host_memory_gib: float | None = None
    problem: str = ""


class IsolationVerdict(Record):
    """Whether packed documents in a row affect each other with one attention kernel and version of transformers.

    `not_causal` means that tokens see later ones, packed or not. `other_logits` means that the model's logits differ from those
    that training computes, a linear layer of the last hidden states. `unsupported` means that the architecture does not have the
    kernel. `unknown` means that no reduced model could be built, so the ranks probe the loaded model. `detail` is the reason, or
    the measured numbers.
    """

    outcome: Outcome
    kernel: str
    transformers: str
    detail: str = ""


class ModelFacts(Record):
    """The model's numbers for the planner; `path` and `tokenizer_path` are local folders, None before the download.

    `has_weights` is False for the folder of a run fetched from a mirror: its weights are in the checkpoints. `isolation` is None
    if nothing was probed yet.
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
    isolation: IsolationVerdict | None = None

    @property
    def model_type(self) -> str:
        """The name by which transformers finds the architecture."""
        return str(self.config.get("model_type"))


class DataFacts(Record):
    """Counts of a built data cache. Rows are packed rows; tokens exclude padding.

    `digest` is the digest of the arrays (tokens, masks, documents and rows) of the training split, "-", and the digest of the
    held-out split. `chat_template` is the text of data.chat_template, None if the tokenizer's own template was used.
    `turn_end_ids` are the tokens at which the model learns to stop. `columns` are those of documents that only some data have.
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
    columns: tuple[str, ...] = ()
    chat_template: str | None = None
    turn_end_ids: tuple[int, ...] = ()

    def contents(self) -> dict[str, Any]:
        """Return the fields that identify the data, without the folder of the cache."""
        return self.model_dump(exclude={"cache_dir", "chat_template", "turn_end_ids"})

    @property
    def truncated_frac(self) -> float:
        """The share of the training documents' tokens that was cut off because documents were longer than a row."""
        return self.truncated_tokens / max(1, self.num_tokens + self.truncated_tokens)


class Origin(Record):
    """A checkpoint from which another run took its initial weights; `plan_digest` identifies the plan that saved it."""

    run_name: str
    run_dir: str
    step: int
    plan_digest: str
    wandb_id: str


class Lineage(Origin):
    """The checkpoint of a run's initial weights, and the checkpoints it descends from, oldest last."""

    ancestors: tuple[Origin, ...] = ()


class Provenance(Record):
    """The command, versions and commit that made the plan; `created_at` is UTC in ISO form.

    `overrides` are the words of the command line, the run's file first.
    """

    created_at: str
    overrides: tuple[str, ...] = ()
    launcher_version: str
    git_commit: str | None = None
    git_dirty: bool | None = None
    python: str
    packages: dict[str, str]

    @property
    def run_file(self) -> str | None:
        """The run's file as named on the command line; None without one."""
        return next((word for word in self.overrides[:1] if "=" not in word and not word.startswith(("-", "+", "~"))), None)


class Facts(Record):
    """The inputs of the planner besides the settings; relative paths start at `working_dir`, and ~ is `home_dir`."""

    working_dir: str
    home_dir: str = "~"
    device: DeviceFacts
    model: ModelFacts
    data: DataFacts | None
    eval_sets: dict[str, DataFacts] = {}
    provenance: Provenance
    lineage: Lineage | None = None


class Topology(Record):
    """Nodes, ranks, the kind of device (cuda or cpu) and the collective backend (nccl or gloo).

    `sequence_ranks` is the number of consecutive ranks of a node that share the same rows, `expert_ranks` the number of ranks
    that share the same experts. What divides rows counts `data_ranks`. What partitions states or costs money counts all ranks.
    """

    nodes: int
    ranks_per_node: int
    world_size: int
    device: str
    backend: str
    sequence_ranks: Literal[1] = 1
    expert_ranks: Literal[1] = 1

    @property
    def data_ranks(self) -> int:
        """The number of groups of ranks with different rows."""
        return self.world_size // self.sequence_ranks

    def data_rank(self, rank: int) -> int:
        """Return the number, from 0, of the group of a rank."""
        return rank // self.sequence_ranks


class Batch(Record):
    """Rows per optimizer step and their split; global = micro x accumulation x data ranks."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    max_tokens_per_step: int
    tokens_per_step: int | None
    max_steps: int | None
    epochs: float | None

    @property
    def expected_tokens(self) -> int:
        """The tokens of an optimizer step over all ranks, without padding if the data are known."""
        return self.tokens_per_step or self.max_tokens_per_step


class Memory(Record):
    """Model states in GiB: `per_rank_gib` on the device, `host_per_node_gib` in main memory through offload.

    `device_gib` and `node_gib` are the memory of a device and the main memory of a node, None if unknown.
    """

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    per_rank_gib: float
    host_per_node_gib: float
    device_gib: float | None
    node_gib: float | None = None


class StageMemory(Record):
    """The memory that a stage of a step adds to states and buckets, in GiB per rank.

    `activations_gib` wait for the backward pass. `gathered_gib` are weights of all ranks that are temporarily on this one.
    `gradients_gib` are not reduced yet. `temporary_gib` is all memory that the stage frees before it ends.
    """

    name: str
    activations_gib: float
    gathered_gib: float
    gradients_gib: float
    temporary_gib: float

    @property
    def total_gib(self) -> float:
        return self.activations_gib + self.gathered_gib + self.gradients_gib + self.temporary_gib


class PeakMemory(Record):
    """The peak memory of a rank by part, in GiB: states and buckets always exist; of the stages, only the largest counts.

    `fragmentation_gib` and `runtime_gib` (CUDA and NCCL) are assumed unless `is_measured`: then a GPU of this type was measured.
    """

    states_gib: float
    buckets_gib: float
    stages: tuple[StageMemory, ...]
    fragmentation_gib: float
    runtime_gib: float
    peak_gib: float
    is_measured: bool

    @property
    def tensors_gib(self) -> float:
        """The peak of the tensors alone."""
        return self.states_gib + self.buckets_gib + self.largest.total_gib

    @property
    def largest(self) -> StageMemory:
        """The stage with the peak."""
        return max(self.stages, key=lambda stage: stage.total_gib)


class Saving(Record):
    """How checkpoints are written: in the background from a copy of the states in main memory, or while training waits."""

    background: bool
    host_gib_per_node: float
    note: str = ""


class Limits(Record):
    """The limits of a run over all of its attempts; None means no limit.

    `max_seconds` limits the time with machines. `max_gpu_seconds` limits the time of all GPUs together: as much as run.max_usd
    pays for at this plan's price.
    """

    max_seconds: float | None
    max_gpu_seconds: float | None = None


class LaunchPlan(Record):
    """All decisions of a run. Workers read nothing else. `eval_sets` has the data of eval.sets by name.

    `gpu_name` is the name or type of the GPUs, empty on CPUs. Three fields hold decisions:
    `checkpointing` the layers that recompute their activations (all, none or every N), `loss_chunk_tokens` the trained tokens
    whose logits exist at a time, and `liger` whether the ranks try Liger's kernels.
    """

    schema_version: Literal[4] = SCHEMA_VERSION
    run_name: str
    run_dir: str
    wandb_id: str
    config: RunConfig
    topology: Topology
    gpu_name: str = ""
    batch: Batch
    deepspeed: dict[str, Any]
    memory: Memory
    checkpointing: str
    loss_chunk_tokens: int
    liger: bool
    peak: PeakMemory
    checkpoint_bytes: int
    saving: Saving
    limits: Limits
    price: Price | None = None
    model: ModelFacts
    data: DataFacts | None
    eval_sets: dict[str, DataFacts] = {}
    provenance: Provenance
    lineage: Lineage | None = None

    @property
    def nvme_folder(self) -> Path | None:
        """The run's folder for states on a node's NVMe disk; None without such states."""
        zero = self.deepspeed.get("zero_optimization", {})
        parts = (zero.get(key, {}) for key in ("offload_optimizer", "offload_param"))
        return next((Path(part["nvme_path"]) for part in parts if "nvme_path" in part), None)

    @property
    def cache_dirs(self) -> tuple[str, ...]:
        """The folders of all data caches that the ranks read."""
        data = (self.data,) if self.data is not None else ()
        return tuple(one.cache_dir for one in (*data, *self.eval_sets.values()))

    def eval_rows_digest(self, name: str) -> str:
        """Return the digest of the rows of an evaluation set, empty if the plan has no set with that name."""
        if name == HELD_OUT:
            return "" if self.data is None else self.data.digest.rpartition("-")[2]
        return self.eval_sets[name].digest if name in self.eval_sets else ""

    def eval_sets_at(self, step: int) -> tuple[str, ...]:
        """Return the names of the sets whose loss is due after `step`; a run that stops there skips them before the last step."""
        skipped = () if self.data is not None and self.data.num_eval_rows else (HELD_OUT,)
        is_boundary = step in (0, self.batch.max_steps)
        return tuple(
            name
            for name, every in self.config.eval.intervals.items()
            if name not in skipped and (is_boundary or (every > 0 and step % every == 0))
        )

    def to_json(self) -> str:
        """Return the text of the plan's file."""
        return self.model_dump_json(indent=2) + "\n"

    def digest(self) -> str:
        """Return the hex digest of the plan's JSON, which every checkpoint records."""
        return digest_of(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LaunchPlan:
        """Read a plan's file. Raises OSError, and what `from_json` raises."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str | bytes) -> LaunchPlan:
        """Parse a plan of this schema version.

        Raises:
            ValueError: if it is not a plan, in one line that names the field.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem, *_ = error.errors(include_url=False, include_input=False)
            raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


def digest_of(text: str) -> str:
    """Return the hex digest of a plan from the text of its file."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
