"""What is known of the workers that Ray Train has started together."""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import ConfigError, Problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import resized
from launcher.worker.node_check import NodeReport


@dataclass(frozen=True)
class Member:
    """A worker: its rank, the node it is on by Ray's name and id, and where the others reach it."""

    rank: int
    local_rank: int
    node: str
    node_id: str
    address: str
    port: int


@dataclass
class Group:
    """The workers that Ray Train has started together; `active` of them train."""

    id: str
    size: int
    members: dict[int, Member] = field(default_factory=dict)
    active: int = 0
    plan_path: str = ""
    marker: str = ""
    tried_at: float = -math.inf
    opened_at: float | None = None
    reports: dict[int, NodeReport] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    failed_at: float | None = None
    drained: bool = False
    resizing: bool = False
    asked_at: float | None = None
    saves: bool = True
    saved: list[dict[str, Any]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    verdict: dict[str, Any] | None = None
    came_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def heads(self) -> list[Member]:
        """The first worker of each node that trains, who checks it."""
        first: dict[str, Member] = {}
        for rank in range(self.active):
            first.setdefault(self.members[rank].node_id, self.members[rank])
        return list(first.values())


def plan_for(planned: LaunchPlan, group: Group) -> LaunchPlan:
    """The plan for the most ranks that the global batch divides over, at most one for each worker.

    Raises:
        ConfigError: where it divides over none.
    """
    per_node = Counter(member.node_id for member in group.members.values())
    for ranks in range(group.size, 0, -1):
        if ranks == planned.topology.world_size:
            return planned
        with suppress(ConfigError):
            return resized(planned, ranks, min(ranks, max(per_node.values())))
    raise ConfigError(f"the global batch divides over none of the numbers up to {group.size} workers", where="cluster.workers")
