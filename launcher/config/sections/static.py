"""The settings for machines that all run the same command, no matter what starts it; and which of them this machine is.

Settings and providers' variables say how many machines there are, which one this is, and where they meet. Pure: the environment
is an argument.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from launcher.config.sections.cluster import ManagedSection
from launcher.config.sections.fields import Count, PositiveInt, matching, number_as_text
from launcher.errors import ConfigError, Problem

# Settings that differ between the machines of a run, or that apply to a single start; they are not part of a plan.
PER_START = ("node_rank", "master_addr", "master_port")

Host = Annotated[
    str,
    BeforeValidator(number_as_text),
    matching(r"[A-Za-z0-9:][\w.:-]{0,252}", "is not a host; write a name or an address such as 10.0.0.1, without a port"),
]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class StaticSection(ManagedSection):
    """Machines that all run the same command: Kubernetes, SageMaker, Azure ML, RunPod, mpirun, ssh."""

    kind: Literal["static"] = Field("static", description="The backend that starts the workers.")
    nodes: PositiveInt = Field(1, description="Number of machines. Unset: NNODES or the provider's variable, else 1.")
    node_rank: Count | None = Field(
        None, description="Index of this machine, from 0. Unset: NODE_RANK or the provider's variable."
    )
    master_addr: Host | None = Field(
        None, description="Name or address of node 0 on the private network. Unset: MASTER_ADDR or the provider's variable."
    )
    master_port: Port | None = Field(
        None,
        description="Port of node 0 that the others connect to. Unset: MASTER_PORT or the provider's variable, else 29500.",
    )

    unnamed_node: ClassVar[str] = "this machine"
    bad_node_remedy: ClassVar[str] = "repair or replace the machine, then repeat the command on every machine"
    runs_on_every_node: ClassVar[bool] = True
    # A person or the provider starts the command again.
    continues_by_itself: ClassVar[bool] = False

    @property
    def is_followed(self) -> bool:
        return True

    def completed(self, environ: Mapping[str, str]) -> StaticSection:
        return self.for_plan(count_nodes(self, environ, self.model_fields_set))

    def for_plan(self, nodes: int) -> StaticSection:
        """Return the settings that are the same on every machine and in every start."""
        changes: dict[str, Any] = {"nodes": nodes, **dict.fromkeys(PER_START)}
        return self.model_copy(update=changes)


# torchrun's default.
DEFAULT_PORT = 29500
NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT = "nodes", "node_rank", "master_addr", "master_port"


@dataclass(frozen=True)
class NodeIdentity:
    """This machine is number `node` of `nodes`; they meet at `address` and `port`. `address` is None for a single machine."""

    node: int
    nodes: int
    address: str | None
    port: int

    @property
    def is_head(self) -> bool:
        return self.node == 0

    @property
    def label(self) -> str:
        return f"node {self.node} of {self.nodes}"


@dataclass(frozen=True)
class Variable:
    """A variable that gives one of the four values; `read` gets its text and the environment, and raises ValueError.

    A `fallback` counts only if nothing else gives the value: it may mean something else, or name a machine in another way.
    """

    gives: str
    name: str
    read: Callable[[str, Mapping[str, str]], str | int]
    fallback: bool = False


def _read_number(text: str, _: Mapping[str, str]) -> int:
    # torchrun's PET_NNODES may be a range MIN:MAX, which must not vary.
    low, _colon, high = text.partition(":")
    if not low.strip().isdecimal() or high not in ("", low):
        raise ValueError
    return int(low)


def _read_text(text: str, _: Mapping[str, str]) -> str:
    return text.strip()


# A Slurm list, such as n[1-3,7]-ib,m2: what comes before, in and after the first brackets names the first host, n1-ib.
_FIRST_NODE = re.compile(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?.*")
# The first fallback that is set is used. The variables' documentation is linked in docs/static.md.
VARIABLES: tuple[Variable, ...] = (
    # Used by scripts around torchrun; RunPod, Azure ML and Kubeflow set them too.
    Variable(NODES, "NNODES", _read_number),
    Variable(NODE_RANK, "NODE_RANK", _read_number),
    Variable(MASTER_ADDR, "MASTER_ADDR", _read_text),
    Variable(MASTER_PORT, "MASTER_PORT", _read_number),
    # torchrun's own options as variables; Kubeflow's Trainer sets them, and PyTorchJob with nprocPerNode or an elastic policy.
    Variable(NODES, "PET_NNODES", _read_number),
    Variable(NODE_RANK, "PET_NODE_RANK", _read_number),
    Variable(MASTER_ADDR, "PET_MASTER_ADDR", _read_text),
    Variable(MASTER_PORT, "PET_MASTER_PORT", _read_number),
    # SageMaker: a JSON list of host names.
    Variable(NODES, "SM_HOSTS", lambda text, _: len(json.loads(text))),
    Variable(NODE_RANK, "SM_CURRENT_HOST", lambda text, environ: json.loads(environ.get("SM_HOSTS", "")).index(text)),
    Variable(MASTER_ADDR, "SM_HOSTS", lambda text, _: str(json.loads(text)[0]), fallback=True),
    # Azure ML; the second address is an endpoint such as 10.0.0.4:6000.
    Variable(NODES, "AZUREML_NODE_COUNT", _read_number),
    Variable(MASTER_ADDR, "AZ_BATCHAI_MPI_MASTER_NODE", _read_text, fallback=True),
    Variable(MASTER_ADDR, "AZ_BATCH_MASTER_NODE", lambda text, _: text.strip().partition(":")[0], fallback=True),
    # RunPod.
    Variable(NODES, "NUM_NODES", _read_number),
    Variable(MASTER_ADDR, "PRIMARY_ADDR", _read_text),
    Variable(MASTER_PORT, "PRIMARY_PORT", _read_number),
    Variable(NODES, "SKYPILOT_NUM_NODES", _read_number),
    Variable(NODE_RANK, "SKYPILOT_NODE_RANK", _read_number),
    Variable(MASTER_ADDR, "SKYPILOT_NODE_IPS", lambda text, _: text.split()[0], fallback=True),
    # With one process per node. Both may be left over from the program that started a provider's agent.
    Variable(NODES, "OMPI_COMM_WORLD_SIZE", _read_number, fallback=True),
    Variable(NODE_RANK, "OMPI_COMM_WORLD_RANK", _read_number, fallback=True),
    Variable(NODES, "SLURM_STEP_NUM_NODES", _read_number, fallback=True),
    Variable(NODE_RANK, "SLURM_NODEID", _read_number, fallback=True),
    Variable(
        MASTER_ADDR, "SLURM_STEP_NODELIST", lambda text, _: _FIRST_NODE.sub(r"\1\2\3", text.strip(), count=1), fallback=True
    ),
    # Set in a PyTorchJob's pods. Elsewhere they count processes, so they come last and never contradict other values.
    Variable(NODES, "WORLD_SIZE", _read_number, fallback=True),
    Variable(NODE_RANK, "RANK", _read_number, fallback=True),
)

# Variables that reveal several processes on one machine, and the largest value with one process.
ONE_PER_NODE = {"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "OMPI_COMM_WORLD_LOCAL_SIZE": 1, "SLURM_LOCALID": 0}


def count_nodes(section: StaticSection, environ: Mapping[str, str], chosen: Collection[str]) -> int:
    """Return the number of machines, even if it is unknown which of them this is; the arguments are those of `identify`.

    Raises:
        ConfigError: if two values contradict each other, or one cannot be read.
    """
    problems: list[Problem] = []
    values = _read_values((NODES,), section, environ, chosen, problems)
    if problems:
        raise ConfigError(problems)
    return int(values.get(NODES, section.nodes))


def identify(section: StaticSection, environ: Mapping[str, str], chosen: Collection[str]) -> NodeIdentity:
    """Return which machine this is; `chosen` are the names of the settings that the command sets.

    If nothing gives the number of machines, `section` does, for example that of a continued plan.

    Raises:
        ConfigError: with everything that is missing, contradictory or unreadable.
    """
    problems = [
        Problem("this command was started several times on one machine", name, value, "start it once on each machine")
        for name, most in ONE_PER_NODE.items()
        if (value := environ.get(name, "")).isdecimal() and int(value) > most
    ]
    values = _read_values((NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT), section, environ, chosen, problems)
    nodes, node, address = int(values.get(NODES, section.nodes)), values.get(NODE_RANK), values.get(MASTER_ADDR)
    if NODES not in values and nodes == 1 and node:
        problems.append(Problem("the number of machines is unknown", "cluster.nodes", f"this is node {node}", "set NNODES"))
    elif node is None and nodes > 1:
        remedy = f"set NODE_RANK on each machine, from 0 to {nodes - 1}"
        problems.append(Problem("the index of this machine is unknown", "cluster.node_rank", f"{nodes} machines", remedy))
    elif node is not None and int(node) >= nodes:
        remedy = f"number the machines from 0 to {nodes - 1}"
        problems.append(Problem(f"there is no node {node} among {nodes}", "cluster.node_rank", str(node), remedy))
    if nodes > 1 and not address:
        remedy = "set MASTER_ADDR on each machine to the private address of node 0"
        problems.append(Problem("the address of node 0 is unknown", "cluster.master_addr", remedy=remedy))
    if problems:
        raise ConfigError(problems)
    port = int(values.get(MASTER_PORT, DEFAULT_PORT))
    return NodeIdentity(int(node or 0), nodes, None if address is None else str(address), port)


def _read_values(
    keys: Iterable[str], section: StaticSection, environ: Mapping[str, str], chosen: Collection[str], problems: list[Problem]
) -> dict[str, str | int]:
    """Return the given values of `keys`, settings first; add contradictions and unreadable values to `problems`."""
    values: dict[str, str | int] = {}
    for key in keys:
        sources: list[tuple[str, str | int]] = []
        if key in chosen and (value := getattr(section, key)) is not None:
            sources.append((f"cluster.{key}", value))
        for variable in sorted((one for one in VARIABLES if one.gives == key), key=lambda one: one.fallback):
            text = environ.get(variable.name, "")
            if not text.strip() or (variable.fallback and sources):
                continue
            try:
                sources.append((variable.name, variable.read(text, environ)))
            except (ValueError, LookupError, TypeError):
                problems.append(Problem(f"{variable.name} cannot be read", variable.name, text, "correct or unset it"))
        for name, value in sources:
            if value != sources[0][1]:
                pair = f"{sources[0][0]}={sources[0][1]}, {name}={value}"
                problems.append(Problem(f"two values for {key} contradict each other", f"cluster.{key}", pair, f"unset {name}"))
        if sources:
            values[key] = sources[0][1]
    return values
