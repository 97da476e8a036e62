"""The settings of Ray."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from launcher.config.sections.cluster import ManagedSection
from launcher.config.sections.fields import Name, Positive, PositiveInt, Text, matching, number_as_text

Address = Annotated[
    str,
    matching(
        r"auto|(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][\w.-]*):\d{1,5}|https?://[\w.:\[\]-]+(/[\w./-]*)?",
        "is not the address of a Ray cluster; write auto, host:port, or http://host:8265 for its Jobs API, without credentials",
    ),
]
VariableName = Annotated[str, matching(r"[A-Za-z_]\w*", "is not the name of a variable")]
VariableValue = Annotated[str, BeforeValidator(number_as_text), Text]


class RaySection(ManagedSection):
    """Ray Train, on a running cluster or on one that the run starts on this machine."""

    kind: Literal["ray"] = Field("ray", description="The backend that starts the workers.")
    address: Address | None = Field(
        None,
        description=(
            "The cluster: auto (the one that this machine belongs to), host:port, or http://host:8265 for its Jobs API, which "
            "runs the driver on the cluster. Unset: start a Ray cluster on this machine for this run only."
        ),
    )
    python: Text = Field("python", description="Python that runs the driver on a cluster with an HTTP address.")
    min_nodes: PositiveInt | None = Field(
        None,
        description=(
            "Minimum number of nodes with which the run continues when nodes are lost or unfit; it trains on the largest number "
            "whose ranks divide the batch, and grows again when nodes return. No other job may use the cluster, because all "
            "resources of a node count, used or not. Unset: all nodes."
        ),
    )
    resources_per_rank: dict[Text, Positive] = Field(
        default_factory=dict,
        description="Additional resources per rank, such as {CPU: 8}. Unset: Ray's default, only the GPU or one CPU.",
    )
    accelerator_type: Name | None = Field(None, description="Ray's name for the GPU model that nodes must have, such as H100.")
    label_selector: dict[Text, Text] = Field(
        default_factory=dict,
        description="Labels that nodes must have, such as {ray.io/market-type: spot}, in Ray's syntax: value, !value, in(a,b).",
    )
    placement_minutes: Positive = Field(
        30.0, description="Minutes that the cluster may take to provide the nodes, at the start and after a loss."
    )
    env: dict[VariableName, VariableValue] = Field(
        default_factory=dict, description="Environment variables of the ranks, such as NCCL_IB_HCA. Never secrets."
    )

    gpu_kind_remedy: ClassVar[str] = "choose the nodes with cluster.accelerator_type"

    @property
    def fewest_nodes(self) -> int | None:
        return self.min_nodes

    @property
    def is_followed(self) -> bool:
        return self.address is None

    @property
    def has_unknown_gpus(self) -> bool:
        return self.address is not None and self.gpu_type is None

    @property
    def uses_own_python(self) -> bool:
        # The nodes of the cluster that this machine belongs to share its environment: Ray requires equal Pythons.
        return self.address in (None, "auto")

    @property
    def forwards_environment(self) -> bool:
        return not self.is_http

    @property
    def netrc_problem(self) -> str | None:
        return None if self.address is None else "the W&B login of this machine's netrc does not reach Ray's nodes"

    @property
    def leaves_out_bad_nodes(self) -> bool:
        """True for an elastic run: it continues with the other nodes."""
        return self.min_nodes is not None and self.min_nodes < self.nodes

    def node_resources(self, device: str, num_ranks: int) -> dict[str, float]:
        """Return the resources of a node with `num_ranks` ranks on `device` (cuda or cpu)."""
        of_rank = {**({"GPU": 1.0} if device == "cuda" else {}), **self.resources_per_rank} or {"CPU": 1.0}
        return {name: amount * num_ranks for name, amount in of_rank.items()}

    @property
    def is_http(self) -> bool:
        """True if the driver runs on the cluster, as a job."""
        return self.address is not None and self.address.startswith(("http://", "https://"))
