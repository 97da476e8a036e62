"""Reads torch's flight recorder, the last collectives of each rank, and finds the collective that ranks of a hung run wait for.

torch writes a pickle for each rank; `torchfrtrace` reads them with `pickle.load`, which could run code. Here no class is loaded.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 64 * 2**20
_MAX_NODES = 4
# Sizes differ between ranks.
_UNEVEN = ("gather", "scatter", "all_to_all", "alltoall")
_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "Float8_e4m3fn", "Float8_e5m2"), 1),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Double", "Long"), 8),
}


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has called: its number in its process group, its name, and its bytes, None if unknown.

    `is_started` where a GPU has begun it; with gloo that is never known.
    """

    number: int
    name: str
    num_bytes: int | None
    is_completed: bool
    is_started: bool
    called_at_ns: int

    @property
    def kind(self) -> tuple[str, int | None]:
        """Differs between ranks only where they have called different collectives."""
        return self.name, None if self.name in _UNEVEN else self.num_bytes


@dataclass(frozen=True)
class RankDump:
    """What one rank has recorded: its collectives, and the members, by process group (`0 (default_pg)`)."""

    collectives: Mapping[str, Sequence[Collective]]
    members: Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class HungCollective:
    """The oldest collective of a process group that has not completed; ranks by what is known of them.

    `others` are ranks that have called another collective instead; `unknown` have left no record.
    """

    group: str
    collective: Collective
    waiting: frozenset[int]
    missing: frozenset[int]
    unknown: frozenset[int]
    not_started: frozenset[int]
    others: Mapping[int, Collective]


class _PlainData(pickle.Unpickler):
    """Loads numbers, text, lists and dicts alone: a pickle runs code only through a class or function that it names."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a flight recorder names {module}.{name}")


def parse_dump(content: bytes) -> RankDump | None:
    """Return what a rank has recorded; None where it is not a complete record that torch wrote."""
    if len(content) > MAX_BYTES:
        return None
    try:
        record = _PlainData(io.BytesIO(content)).load()
        collectives: dict[str, list[Collective]] = defaultdict(list)
        for entry in record["entries"]:
            if not entry["is_p2p"]:
                collectives[_group(*entry["process_group"])].append(_collective(entry))
        members = {
            _group(pg["name"], pg["desc"]): frozenset(map(int, json.loads(pg["ranks"])))
            for pg in record.get("pg_config", {}).values()
            if pg["name"]
        }
    # Damaged pickles raise almost anything.
    except Exception:
        return None
    return RankDump(collectives, members)


def _group(name: str, description: str) -> str:
    return f"{name} ({description})" if description not in ("", "undefined") else str(name)


def _collective(entry: Mapping[str, Any]) -> Collective:
    state = entry["state"]
    return Collective(
        number=int(entry["collective_seq_id"]),
        name=_name(str(entry["profiling_name"])),
        num_bytes=max(
            (_num_bytes(entry[f"{side}_sizes"], entry[f"{side}_dtypes"]) for side in ("input", "output")),
            key=lambda size: -1 if size is None else size,
        ),
        is_completed=bool(entry["retired"]) or state == "completed",
        is_started=state != "scheduled",
        called_at_ns=int(entry["time_created_ns"]),
    )


def _name(profiling_name: str) -> str:
    """Return the name of a collective without the library and torch's inner variants: `nccl:_all_gather_base` is all_gather."""
    name = profiling_name.partition(":")[2] or profiling_name
    name = name.lower().removesuffix("_coalesced").removesuffix("_into_tensor").removesuffix("_tensor").strip("_")
    return name.removesuffix("_base").removesuffix("_single")


def _num_bytes(sizes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> int | None:
    if len(sizes) != len(dtypes) or not all(dtype in _BYTES for dtype in dtypes):
        return None
    return sum(math.prod(size) * _BYTES[dtype] for size, dtype in zip(sizes, dtypes, strict=True))


def find_hung_collective(dumps: Mapping[int, RankDump], world_size: int) -> HungCollective | None:
    """Return the collective for which the ranks wait; None where no rank waits in one.

    Where ranks wait in several process groups, the one whose missing ranks wait in no other: the others are consequences.
    """
    hung = [one for group in _groups(dumps) if (one := _find_in_group(group, dumps, world_size)) is not None]
    waiting = {rank for one in hung for rank in one.waiting}

    def order(one: HungCollective) -> tuple[bool, bool, int]:
        has_culprit = bool(one.others or one.unknown or one.missing)
        return bool(one.missing & waiting), not has_culprit, one.collective.called_at_ns

    return min(hung, key=order, default=None)


def _groups(dumps: Mapping[int, RankDump]) -> list[str]:
    return sorted({group for dump in dumps.values() for group in dump.collectives})


def _find_in_group(group: str, dumps: Mapping[int, RankDump], world_size: int) -> HungCollective | None:
    calls = {rank: dump.collectives.get(group, ()) for rank, dump in dumps.items()}
    pending = [one for of_rank in calls.values() for one in of_rank if not one.is_completed]
    if not pending:
        return None
    number = min(one.number for one in pending)
    at_number = {rank: next((one for one in of_rank if one.number == number), None) for rank, of_rank in calls.items()}
    called = {rank: one for rank, one in at_number.items() if one is not None}
    kinds = [one.kind for one in called.values()]
    # What differs from most is the mistake.
    incomplete = [one for one in called.values() if not one.is_completed]
    expected = max(incomplete, key=lambda one: (kinds.count(one.kind), -one.called_at_ns))
    others = {rank: one for rank, one in called.items() if one.kind != expected.kind}
    waiting = frozenset(rank for rank, one in called.items() if not one.is_completed and rank not in others)
    behind = frozenset(rank for rank, of_rank in calls.items() if max((one.number for one in of_rank), default=0) < number)
    members = next((dump.members[group] for dump in dumps.values() if dump.members.get(group)), None)
    if members is None:
        # gloo does not tell the members of a group; all ranks are in the first one, and who has used another is in that.
        is_default = group.startswith("0 ") or group == "0"
        members = frozenset(range(world_size)) if is_default else frozenset(rank for rank, of_rank in calls.items() if of_rank)
    is_partly_started = any(called[rank].is_started for rank in waiting)
    not_started = frozenset(rank for rank in waiting if is_partly_started and not called[rank].is_started)
    unknown = members - dumps.keys()
    return HungCollective(group, expected, waiting, behind & members, unknown, not_started, others)


def describe(hung: HungCollective, hosts: Sequence[str] = (), world_size: int = 0) -> str:
    """Return one sentence part for messages; `hosts` are the nodes, in the order of their ranks."""

    def ranks(of: Iterable[int]) -> str:
        return _describe_ranks(sorted(of), hosts if len(set(hosts)) > 1 else (), world_size)

    causes = [
        f"{ranks([rank])} has called {_describe_call(one)} instead" for rank, one in sorted(hung.others.items())[:_MAX_NODES]
    ]
    if hung.missing:
        causes.append(f"{ranks(hung.missing)} {'has' if len(hung.missing) == 1 else 'have'} not called it")
    if hung.unknown:
        causes.append(f"{ranks(hung.unknown)} did not answer")
    if not causes and hung.not_started:
        causes.append(f"on {ranks(hung.not_started)} the GPU has not begun it")
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
    """Describe ranks, by node where there are several: `rank 3 on n2`, `ranks 0-6, 8 on n1`."""
    if not hosts:
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {_join_ranges(ranks)}"
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank * len(hosts) // max(world_size, 1)]].append(rank)
    parts = [f"{'rank' if len(own) == 1 else 'ranks'} {_join_ranges(own)} on {host}" for host, own in by_host.items()]
    more = len(parts) - _MAX_NODES
    return ", ".join(parts[:_MAX_NODES]) + (f" and those on {more} more nodes" if more > 0 else "")


def _join_ranges(ranks: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
