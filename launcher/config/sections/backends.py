"""The table of cluster sections: the settings class of each backend."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from launcher.config.sections.cluster import ClusterSection, LocalSection
from launcher.config.sections.ray import RaySection
from launcher.config.sections.slurm import SlurmSection
from launcher.config.sections.static import StaticSection

# By `cluster.kind`. The classes that submit are in launcher.clusters.backends.BACKENDS.
SECTIONS: dict[str, type[ClusterSection]] = {
    "local": LocalSection,
    "slurm": SlurmSection,
    "ray": RaySection,
    "static": StaticSection,
}

if TYPE_CHECKING:
    AnyCluster = ClusterSection
else:
    AnyCluster = Annotated[functools.reduce(operator.or_, SECTIONS.values()), Field(discriminator="kind")]


def choose_kind(value: Any) -> Any:
    """Return the section with its kind; a section without a kind is for this machine."""
    return {"kind": "local", **value} if isinstance(value, dict) else value
