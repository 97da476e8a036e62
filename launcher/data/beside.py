"""Faults of documents beside others: duplicates in training, and held-out documents that stand there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from launcher.config.data import ChecksSection
from launcher.data import duplicates
from launcher.data.quality import Hit

# Above every estimate of a similarity.
_EXACT = 2.0
_NOT_COMPARED = "it agrees in part with too many others"


def across(
    contents: np.ndarray,
    tasks: np.ndarray,
    signatures: Sequence[np.ndarray | None],
    held_out: np.ndarray,
    checks: ChecksSection,
) -> list[tuple[int, Hit]]:
    """Faults of documents beside others, as (document, hit): duplicates in training, and held-out documents that stand there.

    `contents` and `tasks` are uint64 [documents], `held_out` bool [documents]. `others` of a held-out document's hit are
    training documents. Of those nearly the same, each is one of some hit's `others` where they are to be dropped; to be told
    of, the first ones are enough.
    """
    training, inside = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    _, first, group = np.unique(tasks[training], return_index=True, return_inverse=True)
    before = training[first][group]
    again = np.flatnonzero(before != training)
    hits = [(int(training[i]), Hit("exact_duplicate", _alike(_EXACT), (int(before[i]),))) for i in again.tolist()]
    unique, first, group = np.unique(contents[training], return_index=True, return_inverse=True)
    originals = training[first]
    earlier, leaks, not_compared = _near(signatures, held_out, np.sort(np.concatenate([originals, inside])), checks)
    hits += [(i, Hit("not_compared", _NOT_COMPARED)) for i in not_compared.tolist()]
    hits += [(i, Hit("near_duplicate", _alike(alike), (other,))) for i, (other, alike) in sorted(earlier.items())]
    # All copies of an original, by its place among the unique ones.
    copies = training[np.argsort(group, kind="stable")]
    ends = np.cumsum(np.bincount(group, minlength=len(unique)))

    def copies_of(documents: Iterable[int]) -> tuple[int, ...]:
        places = np.searchsorted(unique, contents[list(documents)]).tolist()
        return tuple(np.concatenate([copies[ends[p - 1] if p else 0 : ends[p]] for p in places]).tolist())

    at = np.searchsorted(unique, contents[inside])
    for document, place in zip(inside.tolist(), at.tolist(), strict=True):
        near = dict(leaks.get(document, {}))
        if place < len(unique) and unique[place] == contents[document]:
            same = int(originals[place])
            near.pop(same, None)
            hits.append((document, Hit("held_out_in_train", _alike(_EXACT), copies_of([same]))))
        if near:
            hits.append((document, Hit("near_held_out_in_train", _alike(max(near.values())), copies_of(near))))
    return hits


def _alike(similarity: float) -> str:
    return "the same as" if similarity == _EXACT else f"{similarity:.0%} the same as"


def _near(
    signatures: Sequence[np.ndarray | None], held_out: np.ndarray, candidates: np.ndarray, checks: ChecksSection
) -> tuple[dict[int, tuple[int, float]], dict[int, dict[int, float]], np.ndarray]:
    """Near pairs of `candidates`: of a training document its earlier one, of a held-out one the training documents found, and
    the documents that were not compared with all that might be alike."""
    signed = np.asarray([i for i in candidates.tolist() if signatures[i] is not None], dtype=np.int64)
    training, inside = signed[~held_out[signed]], signed[held_out[signed]]
    slots, apart = (_stacked([signatures[i] for i in some.tolist()]) for some in (training, inside))
    firsts = np.arange(len(training))
    for a, b, _ in duplicates.near_pairs(slots, checks.near_duplicate_threshold):
        np.minimum.at(firsts, b, a)
    again = np.flatnonzero(firsts < np.arange(len(training)))
    alike = (slots[again] == slots[firsts[again]]).mean(axis=1)
    earlier = dict(zip(training[again].tolist(), zip(training[firsts[again]].tolist(), alike.tolist(), strict=True), strict=True))
    leaks: dict[int, dict[int, float]] = defaultdict(dict)
    found = np.zeros(len(training), dtype=bool)

    def note(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        found[b] = True
        for document, other, share in zip(inside[a].tolist(), training[b].tolist(), similarity.tolist(), strict=True):
            leaks[document][other] = share

    missed = inside[duplicates.near_in(apart, slots, checks.near_duplicate_threshold, duplicates.REACH_ACROSS, note)]
    if checks.near_held_out_in_train == "drop":
        # A held-out document was compared until some were found that are like it.
        rest = np.flatnonzero(~found)
        also = duplicates.near_in(
            slots[rest],
            apart,
            checks.near_duplicate_threshold,
            duplicates.REACH,
            lambda a, b, similarity: note(b, rest[a], similarity),
        )
        missed = np.concatenate([missed, training[rest[also]]])
    return earlier, leaks, missed


def _stacked(signatures: Sequence[np.ndarray | None]) -> np.ndarray:
    rows = [signature for signature in signatures if signature is not None]
    return np.stack(rows) if rows else np.empty((0, duplicates.NUM_SLOTS), dtype=np.uint16)
