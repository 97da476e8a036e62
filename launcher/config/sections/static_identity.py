"""Determines which machine this is, how many there are, and where they meet, from settings and from providers' variables.

Pure: the environment is an argument.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import ConfigError, Problem

if TYPE_CHECKING:
    from launcher.config.sections.static import StaticSection

# torchrun's default.
DEFAULT_PORT = 29500
NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT = "nodes", "node_rank", "master_addr", "master_port"
_WHERE = "environment"


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


Reader = Callable[[str, Mapping[str, str]], str | int]


@dataclass(frozen=True)
class Variable:
    """A variable that provides one of the four values. `docs` is the page that describes it.

    A `fallback` counts only if nothing else provides the value: it may mean something else, or name a machine in another way.
    """

    gives: str
    name: str
    read: Reader
    docs: str
    fallback: bool = False


def _number(text: str, _: Mapping[str, str]) -> int:
    if not text.strip().isdecimal():
        raise ValueError("is not a whole number")
    return int(text)


def _fixed_number(text: str, environ: Mapping[str, str]) -> int:
    """Parse a number of machines; torchrun's PET_NNODES may be a range MIN:MAX, which must not vary."""
    low, colon, high = text.partition(":")
    if colon and low != high:
        raise ValueError("is a range; the number of machines must be fixed")
    return _number(low, environ)


def _text(text: str, _: Mapping[str, str]) -> str:
    return text.strip()


def _host_of_endpoint(text: str, _: Mapping[str, str]) -> str:
    """Return the host of an endpoint such as 10.0.0.4:6000."""
    return text.strip().rpartition(":")[0] or text.strip()


def _json_hosts(text: str) -> list[str]:
    try:
        hosts = json.loads(text)
    except ValueError:
        raise ValueError("is not a JSON list of hosts") from None
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, str) for host in hosts):
        raise ValueError("is not a JSON list of hosts")
    return hosts


def _index_in_hosts(text: str, environ: Mapping[str, str]) -> int:
    hosts = _json_hosts(environ.get("SM_HOSTS", ""))
    if text not in hosts:
        raise ValueError(f"is not one of SM_HOSTS ({', '.join(hosts)})")
    return hosts.index(text)


def _first_line(text: str, _: Mapping[str, str]) -> str:
    return text.split()[0]


def _first_of_node_list(text: str, _: Mapping[str, str]) -> str:
    """Return the first host of a Slurm list, such as n1 in n[1-3,7],m2."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", text.strip())
    if match is None:
        raise ValueError("is not a list of hosts")
    return "".join(part or "" for part in match.groups())


_TORCH = "https://docs.pytorch.org/docs/stable/elastic/run.html"
_KUBEFLOW = "https://github.com/kubeflow/training-operator/blob/v1.8.1/pkg/controller.v1/pytorch/envvar.go"
_SAGEMAKER = "https://github.com/aws/sagemaker-training-toolkit/blob/master/ENVIRONMENT_VARIABLES.md"
_AZURE = "https://learn.microsoft.com/azure/machine-learning/how-to-train-distributed-gpu"
_RUNPOD = "https://docs.runpod.io/instant-clusters/configuration"
_SKYPILOT = "https://docs.skypilot.co/en/stable/running-jobs/environment-variables.html"
_OPEN_MPI = "https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html"
_SLURM = "https://slurm.schedmd.com/srun.html"

# The first fallback that is set is used.
VARIABLES: tuple[Variable, ...] = (
    # Used by scripts around torchrun; RunPod, Azure ML and Kubeflow set them too.
    Variable(NODES, "NNODES", _fixed_number, _TORCH),
    Variable(NODE_RANK, "NODE_RANK", _number, _TORCH),
    Variable(MASTER_ADDR, "MASTER_ADDR", _text, _TORCH),
    Variable(MASTER_PORT, "MASTER_PORT", _number, _TORCH),
    # torchrun's own options as variables; Kubeflow's Trainer sets them, and PyTorchJob with nprocPerNode or an elastic policy.
    Variable(NODES, "PET_NNODES", _fixed_number, _TORCH),
    Variable(NODE_RANK, "PET_NODE_RANK", _number, _TORCH),
    Variable(MASTER_ADDR, "PET_MASTER_ADDR", _text, _TORCH),
    Variable(MASTER_PORT, "PET_MASTER_PORT", _number, _TORCH),
    Variable(NODES, "SM_HOSTS", lambda text, _: len(_json_hosts(text)), _SAGEMAKER),
    Variable(NODE_RANK, "SM_CURRENT_HOST", _index_in_hosts, _SAGEMAKER),
    Variable(MASTER_ADDR, "SM_HOSTS", lambda text, _: _json_hosts(text)[0], _SAGEMAKER, fallback=True),
    Variable(NODES, "AZUREML_NODE_COUNT", _number, _AZURE),
    Variable(MASTER_ADDR, "AZ_BATCHAI_MPI_MASTER_NODE", _text, _AZURE, fallback=True),
    Variable(MASTER_ADDR, "AZ_BATCH_MASTER_NODE", _host_of_endpoint, _AZURE, fallback=True),
    Variable(NODES, "NUM_NODES", _number, _RUNPOD),
    Variable(MASTER_ADDR, "PRIMARY_ADDR", _text, _RUNPOD),
    Variable(MASTER_PORT, "PRIMARY_PORT", _number, _RUNPOD),
    Variable(NODES, "SKYPILOT_NUM_NODES", _number, _SKYPILOT),
    Variable(NODE_RANK, "SKYPILOT_NODE_RANK", _number, _SKYPILOT),
    Variable(MASTER_ADDR, "SKYPILOT_NODE_IPS", _first_line, _SKYPILOT, fallback=True),
    # With one process per node, as ONE_PER_NODE requires. Both may be left over from the program that started a provider's agent.
    Variable(NODES, "OMPI_COMM_WORLD_SIZE", _number, _OPEN_MPI, fallback=True),
    Variable(NODE_RANK, "OMPI_COMM_WORLD_RANK", _number, _OPEN_MPI, fallback=True),
    Variable(NODES, "SLURM_STEP_NUM_NODES", _number, _SLURM, fallback=True),
    Variable(NODE_RANK, "SLURM_NODEID", _number, _SLURM, fallback=True),
    Variable(MASTER_ADDR, "SLURM_STEP_NODELIST", _first_of_node_list, _SLURM, fallback=True),
    # Set in a PyTorchJob's pods. Elsewhere they count processes, so they come last and never contradict other values.
    Variable(NODES, "WORLD_SIZE", _number, _KUBEFLOW, fallback=True),
    Variable(NODE_RANK, "RANK", _number, _KUBEFLOW, fallback=True),
)

# Variables that reveal several processes on one machine: the largest allowed value, and how to start only one process.
ONE_PER_NODE: tuple[tuple[str, int, str], ...] = (
    ("LOCAL_WORLD_SIZE", 1, "start it without torchrun, or with --nproc-per-node=1: the launcher starts a rank for each GPU"),
    ("LOCAL_RANK", 0, "start it once on each machine, in Azure ML with process_count_per_instance=1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", 1, "write: mpirun --map-by ppr:1:node ..."),
    ("SLURM_LOCALID", 0, "write: srun --ntasks-per-node=1 ..."),
)


def count_nodes(section: StaticSection, environ: Mapping[str, str], chosen: Collection[str]) -> int:
    """Return the number of machines, even if it is unknown which of them this is; the arguments are those of `identify`.

    Raises:
        ConfigError: if two values contradict each other, or one cannot be read.
    """
    problems: list[Problem] = []
    values = _values((NODES,), section, environ, chosen, problems)
    if problems:
        raise ConfigError(problems)
    return int(values.get(NODES, section.nodes))


def identify(section: StaticSection, environ: Mapping[str, str], chosen: Collection[str]) -> NodeIdentity:
    """Return which machine this is; `chosen` are the names of the settings that the command sets.

    If nothing provides the number of machines, `section` does, for example that of a continued plan.

    Raises:
        ConfigError: with everything that is missing, contradictory or unreadable.
    """
    problems = [*_several_processes(environ)]
    values = _values((NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT), section, environ, chosen, problems)
    nodes, node = int(values.get(NODES, section.nodes)), values.get(NODE_RANK)
    if NODES not in values and nodes == 1 and node:
        remedy = "set NNODES or cluster.nodes"
        problems.append(Problem("the number of machines is unknown", "cluster.nodes", f"this is node {node}", remedy))
        nodes = int(node) + 1
    if node is None and nodes > 1:
        remedy = f"set NODE_RANK or cluster.node_rank on each machine, from 0 to {nodes - 1}"
        problems.append(Problem("the index of this machine is unknown", "cluster.node_rank", f"{nodes} machines", remedy))
    if node is not None and int(node) >= nodes:
        remedy = f"number the machines from 0 to {nodes - 1}"
        problems.append(Problem(f"there is no node {node} among {nodes}", "cluster.node_rank", str(node), remedy))
    if nodes > 1 and not values.get(MASTER_ADDR):
        remedy = "set MASTER_ADDR or cluster.master_addr on each machine to the private address of node 0"
        problems.append(Problem("the address of node 0 is unknown", "cluster.master_addr", remedy=remedy))
    port = int(values.get(MASTER_PORT, DEFAULT_PORT))
    if not 1 <= port <= 65535:
        problems.append(Problem("this is not a port", "cluster.master_port", str(port), "choose one from 1024 to 65535"))
    if problems:
        raise ConfigError(problems)
    address = values.get(MASTER_ADDR)
    return NodeIdentity(int(node or 0), nodes, None if address is None else str(address), port)


def _values(
    keys: Sequence[str],
    section: StaticSection,
    environ: Mapping[str, str],
    chosen: Collection[str],
    problems: list[Problem],
) -> dict[str, str | int]:
    """Return the provided values of `keys`; add contradictions and unreadable values to `problems`."""
    values: dict[str, str | int] = {}
    for key in keys:
        sources = _sources(key, section, environ, chosen, problems)
        if not sources:
            continue
        (name, value), *others = sources
        values[key] = value
        for other, different in others:
            if different != value:
                remedy = f"unset {other}, or make both equal"
                problems.append(Problem(_disagreement(key, name, other), _WHERE, f"{name}={value}, {other}={different}", remedy))
    return values


def _sources(
    key: str, section: StaticSection, environ: Mapping[str, str], chosen: Collection[str], problems: list[Problem]
) -> list[tuple[str, str | int]]:
    """Return names and values of everything that provides `key`, settings first; fallbacks only if there is nothing else."""
    found: list[tuple[str, str | int]] = []
    if key in chosen and (value := getattr(section, key)) is not None:
        found.append((f"cluster.{key}", value))
    for fallback in (False, True):
        for variable in VARIABLES:
            text = environ.get(variable.name, "")
            if variable.gives != key or variable.fallback is not fallback or not text.strip() or (fallback and found):
                continue
            try:
                found.append((variable.name, variable.read(text, environ)))
            except ValueError as error:
                remedy = f"correct or unset it; it is described at {variable.docs}"
                problems.append(Problem(f"{variable.name} {error}", _WHERE, text, remedy))
    return found


def _disagreement(key: str, first: str, second: str) -> str:
    what = {
        NODES: "how many machines there are",
        NODE_RANK: "which of the machines this is",
        MASTER_ADDR: "the address of node 0",
        MASTER_PORT: "the port of node 0",
    }[key]
    return f"{first} and {second} contradict each other on {what}"


def _several_processes(environ: Mapping[str, str]) -> Iterator[Problem]:
    for name, most, remedy in ONE_PER_NODE:
        value = environ.get(name, "")
        if value.isdecimal() and int(value) > most:
            yield Problem("this command was started several times on one machine", _WHERE, f"{name}={value}", remedy)
