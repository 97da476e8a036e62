"""Finds the collective in which a hung run waits, from what torch's flight recorder has recorded on each rank."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.plan.quantities import format_size

# Completed collectives that are kept. A rank whose calls diverged from its peers' has completed only a few since then.
_NUM_COMPLETED = 8
_MAX_NODES = 4
# Collectives whose sizes differ between ranks.
_UNEVEN = ("gather", "scatter", "all_to_all", "alltoall")
_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "Float8_e4m3fn", "Float8_e5m2"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long"), 8),
}


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has called: its number in its process group, its name, and its bytes, None if unknown."""

    number: int
    name: str
    num_bytes: int | None
    is_completed: bool
    called_at_ns: int


# For each process group (`0 (default_pg)`): a rank's last completed collectives, and its first and last that have not completed.
Calls = dict[str, tuple[Collective, ...]]
# The ranks of each process group; gloo does not report them.
Members = dict[str, tuple[int, ...]]


def read_dump(content: bytes) -> tuple[Calls, Members] | None:
    """Return what a dump of the run's own rank shows, or None if it is not a complete one."""
    # torch writes the pickle in pieces; a complete one ends with a period.
    if not content.endswith(b"."):
        return None
    calls: dict[str, list[Collective]] = defaultdict(list)
    try:
        dump = pickle.loads(content)  # noqa: S301
        for entry in dump["entries"]:
            if not entry["is_p2p"]:
                calls[_group(*entry["process_group"])].append(_collective(entry))
        groups = [group for group in dump.get("pg_config", {}).values() if group["name"]]
        members = {_group(group["name"], group["desc"]): tuple(map(int, json.loads(group["ranks"]))) for group in groups}
    # Damaged pickles raise almost anything.
    except Exception:
        return None
    kept = {}
    for group, of_group in calls.items():
        completed, pending = ([one for one in of_group if one.is_completed is state] for state in (True, False))
        kept[group] = (*completed[-_NUM_COMPLETED:], *pending[:1], *pending[1:][-1:])
    return kept, members


def _group(name: str, description: str) -> str:
    return f"{name} ({description})" if description not in ("", "undefined") else str(name)


def _collective(entry: Mapping[str, Any]) -> Collective:
    sizes = []
    for side in ("input", "output"):
        pairs = list(zip(entry[f"{side}_sizes"], entry[f"{side}_dtypes"], strict=True))
        sizes.append(-1 if any(dtype not in _BYTES for _, dtype in pairs) else sum(math.prod(n) * _BYTES[d] for n, d in pairs))
    # `nccl:_all_gather_base` and torch's other variants are all_gather.
    name = str(entry["profiling_name"]).rpartition(":")[2].lower().removesuffix("_coalesced").removesuffix("_into_tensor")
    name = name.removesuffix("_tensor").strip("_").removesuffix("_base").removesuffix("_single")
    is_completed = bool(entry["retired"]) or entry["state"] == "completed"
    num_bytes = None if max(sizes) < 0 else max(sizes)
    return Collective(int(entry["collective_seq_id"]), name, num_bytes, is_completed, int(entry["time_created_ns"]))


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


def find_hung_collective(calls: Mapping[int, Calls], members: Members, world_size: int) -> HungCollective | None:
    """Return the collective for which the ranks wait, or None if no rank waits in one.

    If ranks wait in several process groups, this is the one whose missing ranks wait in no other group: the others are
    consequences.
    """
    groups = sorted({group for of_rank in calls.values() for group in of_rank})
    hung = [one for group in groups if (one := _find_in_group(group, calls, members.get(group, ()), world_size)) is not None]
    waiting = {rank for one in hung for rank in one.waiting}

    def order(one: HungCollective) -> tuple[bool, bool, int]:
        has_culprit = bool(one.others or one.unknown or one.missing)
        return bool(one.missing & waiting), not has_culprit, one.collective.called_at_ns

    return min(hung, key=order, default=None)


def _find_in_group(group: str, all_calls: Mapping[int, Calls], members: Iterable[int], world_size: int) -> HungCollective | None:
    calls = {rank: of_rank[group] for rank, of_rank in sorted(all_calls.items()) if group in of_rank}
    number = min((one.number for of_rank in calls.values() for one in of_rank if not one.is_completed), default=None)
    if number is None:
        return None
    called = {rank: one for rank, of_rank in calls.items() for one in of_rank if one.number == number}
    counts = Counter(map(_kind, called.values()))
    # The collective that differs from the majority is the mistake.
    incomplete = [one for one in called.values() if not one.is_completed]
    expected = max(incomplete, key=lambda one: (counts[_kind(one)], -one.called_at_ns))
    others = {rank: one for rank, one in called.items() if _kind(one) != _kind(expected)}
    waiting = frozenset(rank for rank, one in called.items() if not one.is_completed and rank not in others)
    # Without members, all ranks are in the first group, and a rank is in any group that it has used.
    expected_ranks = frozenset(members or (range(world_size) if group.partition(" ")[0] == "0" else calls))
    last = {rank: max(one.number for one in of_rank) for rank, of_rank in calls.items()}
    missing = frozenset(rank for rank in expected_ranks & all_calls.keys() if last.get(rank, -1) < number)
    return HungCollective(group, expected, waiting, missing, expected_ranks - all_calls.keys(), others)


def _kind(collective: Collective) -> tuple[str, int | None]:
    """Return a key that differs between ranks only if they have called different collectives."""
    return collective.name, None if collective.name in _UNEVEN else collective.num_bytes


def describe(hung: HungCollective, hosts: Sequence[str] = (), world_size: int = 0) -> str:
    """Return a clause for messages; `hosts` are the nodes in rank order."""

    def ranks(of: Iterable[int]) -> str:
        return _describe_ranks(sorted(of), hosts if len(set(hosts)) > 1 else (), world_size)

    causes = [f"{ranks([rank])} has called {_call(one)} instead" for rank, one in sorted(hung.others.items())[:_MAX_NODES]]
    if hung.missing:
        causes.append(f"{ranks(hung.missing)} {'has' if len(hung.missing) == 1 else 'have'} not called it")
    if hung.unknown:
        causes.append(f"{ranks(hung.unknown)} left no record")
    if not causes:
        causes.append("all have called it, and none completes it: the network or a GPU hangs")
    title = f"collective {hung.collective.number} of process group {hung.group}, {_call(hung.collective)}"
    verb = "waits" if len(hung.waiting) == 1 else "wait"
    return f"{ranks(hung.waiting)} {verb} in {title}; {'; '.join(causes)}"


def _call(collective: Collective) -> str:
    return collective.name if collective.num_bytes is None else f"{collective.name} of {format_size(collective.num_bytes)}"


def _describe_ranks(ranks: Sequence[int], hosts: Sequence[str], world_size: int) -> str:
    """Describe ranks, by node if there are several: `rank 3 on n2`, `ranks 0-6, 8 on n1`."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank * len(hosts) // max(world_size, 1)] if hosts else ""].append(rank)
    parts = []
    for host, own in by_host.items():
        ranges: list[list[int]] = []
        for rank in own:
            if ranges and ranges[-1][1] == rank - 1:
                ranges[-1][1] = rank
            else:
                ranges.append([rank, rank])
        numbers = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
        parts.append(f"{'rank' if len(own) == 1 else 'ranks'} {numbers}" + (f" on {host}" if host else ""))
    more = len(parts) - _MAX_NODES
    return ", ".join(parts[:_MAX_NODES]) + (f" and those on {more} more nodes" if more > 0 else "")
