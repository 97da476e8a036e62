"""Where a run executes: the settings of every backend, and those of backends that continue a run automatically."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from launcher.config.sections.fields import Count, Flag, Name, Positive, PositiveInt, SettingsSection, matching

Interface = Annotated[
    str, matching(r"[A-Za-z0-9][\w.-]{0,14}", "is not the name of a network interface; write a name such as ib0")
]


class ClusterSection(SettingsSection):
    """Where the run executes."""

    kind: str = Field(description="The backend that starts the workers.")
    nodes: PositiveInt = Field(1, description="Number of machines.")
    ranks_per_node: PositiveInt | None = Field(None, description="Ranks on each machine. Unset: one per GPU, or 2 without GPUs.")
    gpu_type: Name | None = Field(None, description="GPU model for the plan, such as H100-80GB. Unset: that of this machine.")
    price_per_gpu_hour: Positive | None = Field(
        None,
        description=(
            "Price in US dollars per hour of one GPU, or of one rank on CPUs, from which costs are computed. Unset: a typical "
            "price of the GPU type, which the plan shows."
        ),
    )
    max_restarts: Count = Field(
        0, description="How often the node agents restart all ranks on the same machines after a rank fails."
    )
    timeout_minutes: Positive = Field(30.0, description="Minutes after which a collective that has not completed fails the run.")
    stall_seconds: Count = Field(
        600,
        description=(
            "Seconds without progress after which the node agent records a rank's stacks and kills the rank; 0 turns this "
            "off. In training, each micro-batch is progress. While a checkpoint is saved, the limit is at least "
            "cluster.timeout_minutes, unless the process is stopped. While the model loads, a rank that is stopped or hangs in "
            "the kernel must read nothing for this long; other ranks count as stalled only if no rank of any node reads for "
            "this long, and at least 300 seconds."
        ),
    )
    stop_grace_seconds: Positive = Field(600.0, description="Seconds that a stopped run may take to save before it is killed.")

    # The setting that determines `save_lead_s`, if a backend has one.
    save_lead_setting: ClassVar[str] = ""
    # The node that reports show for an attempt without a recorded node.
    unnamed_node: ClassVar[str] = "-"
    # Remedies for a node with too few GPUs, other GPUs or too little memory.
    gpus_remedy: ClassVar[str] = "give the node all of its GPUs"
    gpu_kind_remedy: ClassVar[str] = "use nodes of the planned kind"
    memory_remedy: ClassVar[str] = "give the node, or its container, more"

    # Whether the run executes on the machine of the command, and on no other.
    is_this_machine: ClassVar[bool] = False
    # Whether each machine runs the same command, which stays active for the whole attempt.
    runs_on_every_node: ClassVar[bool] = False
    # Whether the backend starts another attempt after a failed one.
    continues_by_itself: ClassVar[bool] = False

    @classmethod
    def of(cls, section: ClusterSection) -> Self:
        """Return `section` typed as this class, for a backend that only receives sections of its own class."""
        assert isinstance(section, cls)
        return section

    @property
    def is_followed(self) -> bool:
        """True if the command that starts a run follows it by default."""
        return False

    @property
    def uses_own_python(self) -> bool:
        """True if the ranks run in this Python, so that the packages installed here are those that the ranks have."""
        return True

    @property
    def has_unknown_gpus(self) -> bool:
        """True if the GPUs of the nodes may differ from those that `Cluster.device` has detected."""
        return False

    @property
    def forwards_environment(self) -> bool:
        """True if ranks inherit the environment of the submitting command, including API keys."""
        return True

    @property
    def netrc_problem(self) -> str | None:
        """Why ranks may not see the ~/.netrc of the submitting user; None if they do."""
        return None

    @property
    def save_lead_s(self) -> float | None:
        """Seconds before the end of the allocation at which the run saves; None if the allocation has no end."""
        return None

    def completed(self, environ: Mapping[str, str]) -> ClusterSection:
        """Return the settings for a plan, completed from the command's environment. Raises ConfigError if they contradict."""
        return self

    @property
    def fewest_nodes(self) -> int | None:
        """The minimum number of nodes that the run continues with; None if it needs all."""
        return None


class LocalSection(ClusterSection):
    """This machine."""

    kind: Literal["local"] = Field("local", description="The backend that starts the workers.")

    unnamed_node: ClassVar[str] = "this machine"
    is_this_machine: ClassVar[bool] = True

    @property
    def is_followed(self) -> bool:
        return True


class ManagedSection(ClusterSection):
    """Nodes that can be lost: how they are checked, and how often a run continues by itself after a failure."""

    interface: Interface | None = Field(
        None, description="Network interface between nodes. Unset: the one that routes to the other nodes, never loopback."
    )
    node_checks: Flag = Field(True, description="Check every node of the allocation before the model is loaded.")
    max_infrastructure_failures: Count = Field(
        10,
        description=(
            "Number of lost nodes, killed processes and failed node checks after which the run still continues automatically. A "
            "newer checkpoint resets the count."
        ),
    )
    max_failures: Count = Field(
        2,
        description=(
            "Number of failures of the training itself after which the run still continues automatically. A newer checkpoint "
            "resets the count."
        ),
    )

    # The remedy if a bad node ended a run.
    bad_node_remedy: ClassVar[str] = "repair the node or remove it from the cluster"
    continues_by_itself: ClassVar[bool] = True

    @property
    def leaves_out_bad_nodes(self) -> bool:
        """True if the next attempt avoids nodes that failed their checks."""
        return False
