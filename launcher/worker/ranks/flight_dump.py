"""Summarizes a rank's dump from torch's flight recorder: the recent collectives that help to explain a hang.

For each rank torch writes a pickle of hundreds of KiB. `torchfrtrace` reads it with `pickle.load`, which can run code. This
module loads no classes, and only the agent that started the rank reads its pickle. The agents of other nodes read the summary.
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
# Completed collectives in a summary. A rank whose calls diverged from its peers' has completed only a few since then.
_NUM_COMPLETED = 8
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


@dataclass(frozen=True)
class GroupSummary:
    """What a rank has called in a process group: the number of the last collective, and the ones that help to explain a hang.

    These are the oldest collective that has not completed, and the last completed ones. `members` holds the first and last rank
    of each range of ranks in the group; gloo does not report members.
    """

    last_number: int
    collectives: tuple[Collective, ...]
    members: tuple[tuple[int, int], ...] = ()

    @property
    def ranks(self) -> frozenset[int]:
        """The members, one by one."""
        return frozenset(rank for first, last in self.members for rank in range(first, last + 1))


# What one rank has called, keyed by process group (`0 (default_pg)`).
RankSummary = dict[str, GroupSummary]


class _PlainData(pickle.Unpickler):
    """Loads only numbers, text, lists and dicts: a pickle can run code only through a class or function that it names."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a flight recorder names {module}.{name}")


def summarize_dump(content: bytes) -> RankSummary | None:
    """Return the summary of what a rank has recorded, or None if it is not a complete record that torch wrote."""
    # torch writes the pickle in pieces; a complete one ends with a period.
    if len(content) > MAX_BYTES or not content.endswith(b"."):
        return None
    try:
        record = _PlainData(io.BytesIO(content)).load()
        entries: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for entry in record["entries"]:
            if not entry["is_p2p"]:
                entries[_group(*entry["process_group"])].append(entry)
        members = {
            _group(pg["name"], pg["desc"]): join_ranges(sorted(map(int, json.loads(pg["ranks"]))))
            for pg in record.get("pg_config", {}).values()
            if pg["name"]
        }
        return {group: _summarize(of_group, members.get(group, ())) for group, of_group in entries.items()}
    # Damaged pickles raise almost anything.
    except Exception:
        return None


def join_ranges(ranks: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the first and last number of each range in sorted numbers."""
    ranges: list[tuple[int, int]] = []
    for rank in ranks:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1] = (ranges[-1][0], rank)
        else:
            ranges.append((rank, rank))
    return tuple(ranges)


def _summarize(entries: Sequence[Mapping[str, Any]], members: tuple[tuple[int, int], ...]) -> GroupSummary:
    completed = [entry for entry in entries if _is_completed(entry)][-_NUM_COMPLETED:]
    pending = min((entry for entry in entries if not _is_completed(entry)), key=_number, default=None)
    kept = [*completed, *(() if pending is None else (pending,))]
    return GroupSummary(max(map(_number, entries)), tuple(map(_collective, kept)), members)


def _is_completed(entry: Mapping[str, Any]) -> bool:
    return bool(entry["retired"]) or entry["state"] == "completed"


def _number(entry: Mapping[str, Any]) -> int:
    return int(entry["collective_seq_id"])


def _group(name: str, description: str) -> str:
    return f"{name} ({description})" if description not in ("", "undefined") else str(name)


def _collective(entry: Mapping[str, Any]) -> Collective:
    return Collective(
        number=_number(entry),
        name=_name(str(entry["profiling_name"])),
        num_bytes=max(
            (_num_bytes(entry[f"{side}_sizes"], entry[f"{side}_dtypes"]) for side in ("input", "output")),
            key=lambda size: -1 if size is None else size,
        ),
        is_completed=_is_completed(entry),
        called_at_ns=int(entry["time_created_ns"]),
    )


def _name(profiling_name: str) -> str:
    """Return a collective's name without library prefix and torch's internal variants: `nccl:_all_gather_base` is all_gather."""
    name = profiling_name.partition(":")[2] or profiling_name
    name = name.lower().removesuffix("_coalesced").removesuffix("_into_tensor").removesuffix("_tensor").strip("_")
    return name.removesuffix("_base").removesuffix("_single")


def _num_bytes(sizes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> int | None:
    if len(sizes) != len(dtypes) or not all(dtype in _BYTES for dtype in dtypes):
        return None
    return sum(math.prod(size) * _BYTES[dtype] for size, dtype in zip(sizes, dtypes, strict=True))
