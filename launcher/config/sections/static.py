"""The settings for machines that all run the same command, no matter what starts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from launcher.config.sections.cluster import ManagedSection
from launcher.config.sections.fields import Count, PositiveInt, matching, number_as_text
from launcher.config.sections.static_identity import count_nodes

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

    @property
    def runs_on_every_node(self) -> bool:
        return True

    @property
    def is_followed(self) -> bool:
        return True

    @property
    def continues_by_itself(self) -> bool:
        """False: a person or the provider starts the command again."""
        return False

    def completed(self, environ: Mapping[str, str]) -> StaticSection:
        return self.for_plan(count_nodes(self, environ, self.model_fields_set))

    def for_plan(self, nodes: int) -> StaticSection:
        """Return the settings that are the same on every machine and in every start."""
        changes: dict[str, Any] = {"nodes": nodes, **dict.fromkeys(PER_START)}
        return self.model_copy(update=changes)
