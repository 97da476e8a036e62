"""What is known of the workers that Ray Train has started together."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import Problem
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
