"""Finds the collective in which a hung run waits, from what torch's flight recorder has recorded on each rank."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Completed collectives that are kept. A rank whose calls diverged from its peers' has completed only a few since then.
_NUM_COMPLETED = 8
_MAX_NAMED = 4
# Collectives whose sizes differ between ranks.
_UNEVEN = ("gather", "scatter", "all_to_all", "alltoall")


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has called: its number in its process group, its name, and the elements of its larger side."""

    number: int
    name: str
    num_elements: int
    is_completed: bool
    called_at_ns: int

    @property
    def title(self) -> str:
        return f"{self.name} of {self.num_elements} elements"

    @property
    def kind(self) -> tuple[str, int]:
        """A key that differs between ranks only if they have called different collectives."""
        return self.name, 0 if self.name.startswith(_UNEVEN) else self.num_elements


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
                # `nccl:_all_gather_base`
                name = entry["profiling_name"].rpartition(":")[2].strip("_").lower()
                num_elements = max(sum(map(math.prod, entry[sizes])) for sizes in ("input_sizes", "output_sizes"))
                is_completed = bool(entry["retired"]) or entry["state"] == "completed"
                collective = Collective(entry["collective_seq_id"], name, num_elements, is_completed, entry["time_created_ns"])
                calls[_group(*entry["process_group"])].append(collective)
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
    return f"{name} ({description})" if description not in ("", "undefined") else name


@dataclass(frozen=True)
class _HungCollective:
    """A process group's oldest collective that has not completed, with the ranks grouped by what is known about them.

    `others` are ranks that called a different collective; `unknown` are ranks without a record.
    """

    group: str
    collective: Collective
    waiting: frozenset[int]
    missing: frozenset[int]
    unknown: frozenset[int]
    others: Mapping[int, Collective]


def explain_hang(calls: Mapping[int, Calls], members: Members, world_size: int, hosts: Sequence[str]) -> str:
    """Return a clause that names the collective for which ranks wait and the ranks that hold it up; empty if no rank waits.

    If ranks wait in several process groups, it is the one whose missing ranks wait in no other group: the others are
    consequences. `hosts` are the nodes in rank order.
    """
    groups = {group for of_rank in calls.values() for group in of_rank}
    hung = [one for group in groups if (one := _find_in_group(group, calls, members.get(group, ()), world_size)) is not None]
    if not hung:
        return ""
    waiting = {rank for one in hung for rank in one.waiting}

    def order(one: _HungCollective) -> tuple[bool, bool, int]:
        has_culprit = bool(one.others or one.unknown or one.missing)
        return bool(one.missing & waiting), not has_culprit, one.collective.called_at_ns

    first = min(hung, key=order)

    def name(ranks: Iterable[int]) -> str:
        return _name_ranks(sorted(ranks), hosts, world_size)

    causes = [f"{name([rank])} has called {other.title} instead" for rank, other in sorted(first.others.items())[:_MAX_NAMED]]
    if first.missing:
        causes.append(f"{name(first.missing)} {'has' if len(first.missing) == 1 else 'have'} not called it")
    if first.unknown:
        causes.append(f"{name(first.unknown)} left no record")
    if not causes:
        causes.append("all have called it, and none completes it: the network or a GPU hangs")
    title = f"collective {first.collective.number} of process group {first.group}, {first.collective.title}"
    verb = "waits" if len(first.waiting) == 1 else "wait"
    return f"{name(first.waiting)} {verb} in {title}; {'; '.join(causes)}"


def _find_in_group(group: str, all_calls: Mapping[int, Calls], members: Iterable[int], world_size: int) -> _HungCollective | None:
    calls = {rank: of_rank[group] for rank, of_rank in sorted(all_calls.items()) if group in of_rank}
    number = min((one.number for of_rank in calls.values() for one in of_rank if not one.is_completed), default=None)
    if number is None:
        return None
    called = {rank: one for rank, of_rank in calls.items() for one in of_rank if one.number == number}
    counts = Counter(one.kind for one in called.values())
    # The collective that differs from the majority is the mistake.
    incomplete = [one for one in called.values() if not one.is_completed]
    expected = max(incomplete, key=lambda one: (counts[one.kind], -one.called_at_ns))
    others = {rank: one for rank, one in called.items() if one.kind != expected.kind}
    waiting = frozenset(rank for rank, one in called.items() if not one.is_completed and rank not in others)
    # Without members, all ranks are in the first group, and a rank is in any group that it has used.
    expected_ranks = frozenset(members or (range(world_size) if group.partition(" ")[0] == "0" else calls))
    last = {rank: max(one.number for one in of_rank) for rank, of_rank in calls.items()}
    missing = frozenset(rank for rank in expected_ranks & all_calls.keys() if last.get(rank, -1) < number)
    return _HungCollective(group, expected, waiting, missing, expected_ranks - all_calls.keys(), others)


def _name_ranks(ranks: Sequence[int], hosts: Sequence[str], world_size: int) -> str:
    """Return `rank 3 on n2` or `ranks 0-6, 8 on n1, n2`; without the node if there is only one."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][-1] == rank - 1:
            ranges[-1][1:] = [rank]
        else:
            ranges.append([rank])
    numbers = ["-".join(map(str, one)) for one in ranges]
    nodes = [*dict.fromkeys(hosts[rank * len(hosts) // world_size] for rank in ranks)] if len(set(hosts)) > 1 else []
    numbers, nodes = ([*names[:_MAX_NAMED], "..."] if len(names) > _MAX_NAMED else names for names in (numbers, nodes))
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(numbers)}" + (f" on {', '.join(nodes)}" if nodes else "")
