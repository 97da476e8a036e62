"""The settings for machines that all run the same command; and which of them this machine is, by settings and variables. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
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
        """Return the settings for a plan, with the number of machines, even if it is unknown which of them this is."""
        nodes = _read_value("nodes", self, environ, self.model_fields_set)
        return self.for_plan(int(self.nodes if nodes is None else nodes))

    def for_plan(self, nodes: int) -> StaticSection:
        """Return the settings that are the same on every machine and in every start."""
        changes: dict[str, Any] = {"nodes": nodes, **dict.fromkeys(PER_START)}
        return self.model_copy(update=changes)


# torchrun's default.
DEFAULT_PORT = 29500


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
# The variables that give each value, with a function that reads a variable's text and may look at other variables. The first
# one that is set counts: those of scripts around torchrun, which RunPod, Azure ML and Kubeflow set too; torchrun's own (PET_);
# then each provider's. Those of Open MPI and Slurm may be left over from the program that started a provider's agent. WORLD_SIZE
# and RANK count machines in a PyTorchJob, but processes elsewhere. docs/static.md links their documentation.
VARIABLES: dict[str, dict[str, Callable[[str, Mapping[str, str]], str | int]]] = {
    "nodes": {
        "NNODES": _read_number,
        "PET_NNODES": _read_number,
        # SageMaker: a JSON list of host names.
        "SM_HOSTS": lambda text, _: len(json.loads(text)),
        "AZUREML_NODE_COUNT": _read_number,
        # RunPod.
        "NUM_NODES": _read_number,
        "SKYPILOT_NUM_NODES": _read_number,
        "OMPI_COMM_WORLD_SIZE": _read_number,
        "SLURM_STEP_NUM_NODES": _read_number,
        "WORLD_SIZE": _read_number,
    },
    "node_rank": {
        "NODE_RANK": _read_number,
        "PET_NODE_RANK": _read_number,
        "SM_CURRENT_HOST": lambda text, environ: json.loads(environ.get("SM_HOSTS", "")).index(text),
        "SKYPILOT_NODE_RANK": _read_number,
        "OMPI_COMM_WORLD_RANK": _read_number,
        "SLURM_NODEID": _read_number,
        "RANK": _read_number,
    },
    "master_addr": {
        "MASTER_ADDR": _read_text,
        "PET_MASTER_ADDR": _read_text,
        "PRIMARY_ADDR": _read_text,
        "SM_HOSTS": lambda text, _: str(json.loads(text)[0]),
        "AZ_BATCHAI_MPI_MASTER_NODE": _read_text,
        # An endpoint such as 10.0.0.4:6000.
        "AZ_BATCH_MASTER_NODE": lambda text, _: text.strip().partition(":")[0],
        "SKYPILOT_NODE_IPS": lambda text, _: text.split()[0],
        "SLURM_STEP_NODELIST": lambda text, _: _FIRST_NODE.sub(r"\1\2\3", text.strip(), count=1),
    },
    "master_port": {"MASTER_PORT": _read_number, "PET_MASTER_PORT": _read_number, "PRIMARY_PORT": _read_number},
}

# Variables that reveal several processes on one machine, and the largest value with one process.
ONE_PER_NODE = {"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "OMPI_COMM_WORLD_LOCAL_SIZE": 1, "SLURM_LOCALID": 0}


def _read_value(key: str, section: StaticSection, environ: Mapping[str, str], chosen: Collection[str]) -> str | int | None:
    """Return the value of the setting, else of the first variable that is set, else None."""
    if key in chosen and (value := getattr(section, key)) is not None:
        return value
    for name, read in VARIABLES[key].items():
        if text := environ.get(name, "").strip():
            try:
                return read(text, environ)
            except (ValueError, LookupError, TypeError):
                raise ConfigError(f"{name} cannot be read", where=name, value=text, remedy="correct or unset it") from None
    return None


def identify(section: StaticSection, environ: Mapping[str, str], chosen: Collection[str]) -> NodeIdentity:
    """Return which machine this is, or raise ConfigError; `chosen` are settings of the command, which precede variables.

    If nothing gives the number of machines, `section` does, for example that of a continued plan.
    """
    problems = [
        Problem("this command was started several times on one machine", name, value, "start it once on each machine")
        for name, most in ONE_PER_NODE.items()
        if (value := environ.get(name, "")).isdecimal() and int(value) > most
    ]
    given, node, address, port = (_read_value(key, section, environ, chosen) for key in VARIABLES)
    nodes = int(section.nodes if given is None else given)
    if given is None and nodes == 1 and node:
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
    return NodeIdentity(int(node or 0), nodes, None if address is None else str(address), int(port or DEFAULT_PORT))
