"""What is known of the workers that Ray Train has started together."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import fitted
from launcher.worker.checks import network
from launcher.worker.ray.node_checks import Checks
from launcher.worker.ray.watchdog import Liveness
from launcher.worker.watchdog import describe

# From the word to kill a rank to the end of waiting for it: one that hangs in the kernel does not end.
_KILLED_S = 15.0


@dataclass(frozen=True)
class Member:
    """A worker: its rank in the group, the node it is on by Ray's name and id, and where the others reach it."""

    rank: int
    local_rank: int
    node: str
    node_id: str
    address: str
    port: int


@dataclass
class Group:
    """The workers that Ray Train has started together, by their rank in it; those in `trains` train, in the order of their own
    ranks, and the others stay idle.
    """

    id: str
    size: int
    liveness: Liveness
    members: dict[int, Member] = field(default_factory=dict)
    trains: tuple[int, ...] = ()
    # Its nodes that failed a check before, and those of them without which fewer ranks train.
    unfit: set[str] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)
    plan_path: str = ""
    marker: str = ""
    tried_at: float = -math.inf
    opened_at: float | None = None
    checks: Checks = field(default_factory=Checks)
    ended: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    hung: dict[int, str] = field(default_factory=dict)
    hung_at: float = math.inf
    failed_at: float | None = None
    drained: bool = False
    resizing: bool = False
    asked_at: float | None = None
    saves: bool = True
    saved: list[dict[str, Any]] = field(default_factory=list)
    verdict: dict[str, Any] | None = None
    came_at: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def is_complete(self) -> bool:
        return len(self.members) == self.size

    @property
    def training(self) -> list[Member]:
        """The workers that train, in the order of their ranks."""
        return [self.members[rank] for rank in self.trains]

    @property
    def heads(self) -> list[Member]:
        """The first worker of each node that trains, who checks it."""
        first: dict[str, Member] = {}
        for member in self.training:
            first.setdefault(member.node_id, member)
        return list(first.values())

    def choose(self, planned: LaunchPlan, unfit: Collection[str]) -> LaunchPlan:
        """Let as many workers train as the global batch divides over; their plan.

        None of them is on the nodes in `unfit`, as long as enough are left: a check may have failed for a moment.

        Raises:
            ConfigError: where it divides over none.
        """
        self.unfit = {member.node for member in self.members.values()} & set(unfit)
        well = [rank for rank, member in sorted(self.members.items()) if member.node not in self.unfit]
        enough = len(well) >= (planned.config.cluster.fewest_workers or 1)
        able = well if enough else [*well, *sorted(self.members.keys() - set(well))]
        plan = self._fitted(planned, able)
        self.trains = tuple(sorted(able[: plan.topology.world_size]))
        if self.unfit and enough and self._fitted(planned, self.members).topology.world_size > len(self.trains):
            self.missed = self.unfit
        return plan

    def _fitted(self, planned: LaunchPlan, ranks: Iterable[int]) -> LaunchPlan:
        per_node = Counter(self.members[rank].node_id for rank in ranks)
        return fitted(planned, per_node.total(), max(per_node.values()))

    def look_for_hangs(self) -> list[str]:
        """Find workers that say nothing any more, and ranks that train and do not go on; what there is to be said of them."""
        at_work, now = self._at_work, time.monotonic()
        silent = self.liveness.silent(at_work)
        who = {rank: f"the worker of rank {self.trains.index(rank)} on {self.members[rank].node}" for rank in silent}
        found = [
            f"no word for {silent[rank]:.0f} s from {who[rank]}: it hangs or is cut off" for rank in silent.keys() - self.lost
        ]
        self.lost = set(silent)
        others = at_work - self.lost
        # As long as the other ranks go on, that worker's rank does so too.
        if self.lost and others and self.liveness.are_still(others):
            self.failed_at = now
            found.append(f"the other ranks wait for {' and '.join(who.values())}: the run goes on without")
        if self.hung:
            # The others wait for one that was killed, and are not judged.
            if (still := sorted(self.hung.keys() & at_work)) and now - self.hung_at > _KILLED_S:
                self.failed_at = now
                which = " and ".join(f"rank {self.trains.index(rank)} on {self.members[rank].node}" for rank in still)
                found.append(f"{which} was killed and does not end, as what hangs in the kernel: the run goes on without")
            return found
        for rank, (beat, seconds, why) in self.liveness.hung(at_work).items():
            self.hung_at = now
            self.hung[rank] = describe(beat, seconds, why, self.members[rank].node)
            found.append(self.hung[rank])
        return found

    @property
    def is_over(self) -> bool:
        """True where no rank is waited for any more: of those that have not ended the workers are lost, and for too long."""
        return not self._at_work or (self._at_work <= self.lost and self.liveness.are_still(self._at_work))

    @property
    def phases(self) -> set[str]:
        """What the ranks at work are doing; of those whose workers are silent nothing is known."""
        return self.liveness.phases(self._at_work - self.liveness.silent(self._at_work).keys())

    def composition(self, attempt: int) -> tuple[str, str]:
        """Who trains, and who is paid for and does not: the kind of an event and its text."""
        ranks, idle = len(self.trains), self.size - len(self.trains)
        said = f"attempt {attempt} begins with {ranks} rank{'s' * (ranks > 1)}"
        said += f", {idle} worker{'s' * (idle > 1)} idle" if idle else ""
        said += f" on {', '.join(dict.fromkeys(member.node for member in self.training))}"
        again = self.unfit & {member.node for member in self.training}
        for bad, how in ((self.unfit - again, "without"), (again, "for want of others with")):
            said += (
                f", {how} {', '.join(sorted(bad))}, unfit before: mend it, or take it away with `ray drain-node`" if bad else ""
            )
        said += ", for which the run saves first" if self.unfit else ""
        said += "; it is tried again later" if self.missed else ""
        return "alert" if self.unfit else "info", said

    @property
    def _at_work(self) -> set[int]:
        return set(self.trains) - self.ended


def require_private(head: Member, allowed: bool) -> None:
    """Refuse to let ranks meet where the whole internet can reach them, unless that is allowed.

    Raises:
        ConfigError: with the node and its address.
    """
    if network.is_public(head.address) and not allowed:
        where = f"{head.node} at {head.address}"
        raise ConfigError(f"the ranks would meet at an address that the whole internet can reach: {where}; set cluster.interface")
