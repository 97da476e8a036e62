"""Finds the collective in which a hung run waits, from the flight recorder summaries of all ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from launcher.worker.ranks.flight_dump import Collective, GroupSummary, RankSummary, join_ranges

_MAX_NODES = 4
# Collectives whose sizes differ between ranks.
_UNEVEN = ("gather", "scatter", "all_to_all", "alltoall")


@dataclass(frozen=True)
class HungCollective:
    """A process group's oldest collective that has not completed, with the ranks grouped by what is known about them.

    `others` are ranks that called a different collective; `unknown` are ranks without a record.
    """

    group: str
    collective: Collective
    waiting: frozenset[int]
    missing: frozenset[int]
    unknown: frozenset[int]
    others: Mapping[int, Collective]


def find_hung_collective(summaries: Mapping[int, RankSummary], world_size: int) -> HungCollective | None:
    """Return the collective for which the ranks wait, or None if no rank waits in one.

    If ranks wait in several process groups, this is the one whose missing ranks wait in no other group: the others are
    consequences.
    """
    by_group: dict[str, dict[int, GroupSummary]] = defaultdict(dict)
    for rank, summary in sorted(summaries.items()):
        for group, in_group in summary.items():
            by_group[group][rank] = in_group
    hung = [
        one
        for group, of_group in sorted(by_group.items())
        if (one := _find_in_group(group, of_group, summaries.keys(), world_size)) is not None
    ]
    waiting = {rank for one in hung for rank in one.waiting}

    def order(one: HungCollective) -> tuple[bool, bool, int]:
        has_culprit = bool(one.others or one.unknown or one.missing)
        return bool(one.missing & waiting), not has_culprit, one.collective.called_at_ns

    return min(hung, key=order, default=None)


def _find_in_group(group: str, summaries: Mapping[int, GroupSummary], known: Set[int], world_size: int) -> HungCollective | None:
    """`summaries` holds the ranks that have used the group; `known` holds all ranks with a record."""
    pending = [one for of_rank in summaries.values() for one in of_rank.collectives if not one.is_completed]
    if not pending:
        return None
    number = min(one.number for one in pending)
    called = {
        rank: next(one for one in of_rank.collectives if one.number == number)
        for rank, of_rank in summaries.items()
        if any(one.number == number for one in of_rank.collectives)
    }
    counts = Counter(map(_kind, called.values()))
    # The collective that differs from the majority is the mistake.
    incomplete = [one for one in called.values() if not one.is_completed]
    expected = max(incomplete, key=lambda one: (counts[_kind(one)], -one.called_at_ns))
    others = {rank: one for rank, one in called.items() if _kind(one) != _kind(expected)}
    waiting = frozenset(rank for rank, one in called.items() if not one.is_completed and rank not in others)
    members = next((of_rank.ranks for of_rank in summaries.values() if of_rank.members), None)
    if members is None:
        # gloo does not report a group's members: all ranks are in the first group, and a rank is in any group that it has used.
        is_default = group.startswith("0 ") or group == "0"
        members = frozenset(range(world_size)) if is_default else frozenset(summaries)
    behind = frozenset(rank for rank in members & known if rank not in summaries or summaries[rank].last_number < number)
    return HungCollective(group, expected, waiting, behind, members - known, others)


def _kind(collective: Collective) -> tuple[str, int | None]:
    """Return a key that differs between ranks only if they have called different collectives."""
    return collective.name, None if collective.name in _UNEVEN else collective.num_bytes


def describe(hung: HungCollective, hosts: Sequence[str] = (), world_size: int = 0) -> str:
    """Return a clause for messages; `hosts` are the nodes in rank order."""

    def ranks(of: Iterable[int]) -> str:
        return _describe_ranks(sorted(of), hosts if len(set(hosts)) > 1 else (), world_size)

    causes = [
        f"{ranks([rank])} has called {_describe_call(one)} instead" for rank, one in sorted(hung.others.items())[:_MAX_NODES]
    ]
    if hung.missing:
        causes.append(f"{ranks(hung.missing)} {'has' if len(hung.missing) == 1 else 'have'} not called it")
    if hung.unknown:
        causes.append(f"{ranks(hung.unknown)} left no record")
    if not causes:
        causes.append("all have called it, and none completes it: the network or a GPU hangs")
    title = f"collective {hung.collective.number} of process group {hung.group}, {_describe_call(hung.collective)}"
    verb = "waits" if len(hung.waiting) == 1 else "wait"
    return f"{ranks(hung.waiting)} {verb} in {title}; {'; '.join(causes)}"


def _describe_call(collective: Collective) -> str:
    size = "" if collective.num_bytes is None else f" of {_describe_bytes(collective.num_bytes)}"
    return f"{collective.name}{size}"


def _describe_bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _describe_ranks(ranks: Sequence[int], hosts: Sequence[str], world_size: int) -> str:
    """Describe ranks, by node if there are several: `rank 3 on n2`, `ranks 0-6, 8 on n1`."""
    if not hosts:
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {_join(ranks)}"
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank * len(hosts) // max(world_size, 1)]].append(rank)
    parts = [f"{'rank' if len(own) == 1 else 'ranks'} {_join(own)} on {host}" for host, own in by_host.items()]
    more = len(parts) - _MAX_NODES
    return ", ".join(parts[:_MAX_NODES]) + (f" and those on {more} more nodes" if more > 0 else "")


def _join(ranks: Sequence[int]) -> str:
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in join_ranges(ranks))
