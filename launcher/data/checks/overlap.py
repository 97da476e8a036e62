"""Faults of documents beside others: duplicates in training, and held-out documents that stand there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from launcher.config.data import ChecksSection
from launcher.data.checks import minhash
from launcher.data.checks.inspection import CheckHit

# Above every estimate of a similarity.
_EXACT = 2.0
_NOT_COMPARED = "it agrees in part with too many others"


def find_duplicates(
    contents: np.ndarray,
    tasks: np.ndarray,
    signatures: Sequence[np.ndarray | None],
    training: np.ndarray,
    checks: ChecksSection,
) -> list[tuple[int, CheckHit]]:
    """Duplicates among the documents with the numbers `training`, as (document, hit): of several alike the first one is none.

    `contents` and `tasks` are uint64 [documents]. The hits of one check stand in the order of `training`.
    """
    _, first, group = np.unique(tasks[training], return_index=True, return_inverse=True)
    before = training[first][group]
    same = np.flatnonzero(before != training)
    hits = [(int(training[i]), CheckHit("exact_duplicate", _alike(_EXACT), (int(before[i]),))) for i in same.tolist()]
    signed = _signed(signatures, _Copies(contents, training).firsts)
    slots = _stacked(signatures, signed)
    firsts = np.arange(len(signed))
    for a, b, _ in minhash.find_near_pairs(slots, checks.near_duplicate_threshold):
        np.minimum.at(firsts, b, a)
    near = np.flatnonzero(firsts < np.arange(len(signed)))
    shares = (slots[near] == slots[firsts[near]]).mean(axis=1)
    alike = zip(signed[near].tolist(), signed[firsts[near]].tolist(), shares.tolist(), strict=True)
    return [*hits, *((document, CheckHit("near_duplicate", _alike(share), (other,))) for document, other, share in alike)]


def find_leaks(contents: np.ndarray, training: np.ndarray, inside: np.ndarray) -> list[tuple[int, CheckHit]]:
    """The held-out documents with the numbers `inside` that stand in training, as (document, hit).

    `others` of a hit are all such documents among those with the numbers `training`; `contents` is uint64 [documents].
    """
    copies = _Copies(contents, training)
    places = copies.places(contents[inside])
    return [
        (document, CheckHit("held_out_in_train", _alike(_EXACT), tuple(copies.at(place).tolist())))
        for document, place in zip(inside.tolist(), places.tolist(), strict=True)
        if place >= 0
    ]


def find_near_leaks(
    contents: np.ndarray,
    signatures: Sequence[np.ndarray | None],
    training: np.ndarray,
    inside: np.ndarray,
    checks: ChecksSection,
) -> list[tuple[int, CheckHit]]:
    """As `leaks`, those that are nearly the same as one in training; and the documents that were not compared with all.

    Of those nearly the same, each is one of some hit's `others` where they are to be dropped; to be told of, the first ones
    are enough.
    """
    copies = _Copies(contents, training)
    signed, apart = _signed(signatures, copies.firsts), _signed(signatures, inside)
    if not len(signed) or not len(apart):
        return []
    found, missed = _near(_stacked(signatures, signed), _stacked(signatures, apart), signed, apart, checks)
    hits = [(i, CheckHit("not_compared", _NOT_COMPARED)) for i in missed.tolist()]
    for document in sorted(found):
        near = {other: share for other, share in found[document].items() if contents[other] != contents[document]}
        if near:
            others = np.concatenate([copies.at(place) for place in copies.places(contents[list(near)]).tolist()])
            hits.append((document, CheckHit("near_held_out_in_train", _alike(max(near.values())), tuple(others.tolist()))))
    return hits


class _Copies:
    """Documents by what they say; `firsts` are the first of each content, in the order of `documents`."""

    def __init__(self, contents: np.ndarray, documents: np.ndarray) -> None:
        self._unique, first, group = np.unique(contents[documents], return_index=True, return_inverse=True)
        self.firsts = documents[np.sort(first)]
        self._documents = documents[np.argsort(group, kind="stable")]
        self._ends = np.cumsum(np.bincount(group, minlength=len(self._unique)))

    def places(self, contents: np.ndarray) -> np.ndarray:
        """The place of each of `contents`, -1 where no document says it."""
        places = np.searchsorted(self._unique, contents)
        known = places < len(self._unique)
        known[known] = self._unique[places[known]] == contents[known]
        return np.where(known, places, -1)

    def at(self, place: int) -> np.ndarray:
        """All documents of the content at a place."""
        return self._documents[self._ends[place - 1] if place else 0 : self._ends[place]]


def _alike(similarity: float) -> str:
    return "the same as" if similarity == _EXACT else f"{similarity:.0%} the same as"


def _near(
    slots: np.ndarray, apart: np.ndarray, training: np.ndarray, inside: np.ndarray, checks: ChecksSection
) -> tuple[dict[int, dict[int, float]], np.ndarray]:
    """Of each held-out document the training documents found, and the documents that were not compared with all that might be
    alike; `slots` and `apart` are the signatures of the documents with the numbers `training` and `inside`."""
    alike: dict[int, dict[int, float]] = defaultdict(dict)
    found = np.zeros(len(training), dtype=bool)

    def note(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        found[b] = True
        for document, other, share in zip(inside[a].tolist(), training[b].tolist(), similarity.tolist(), strict=True):
            alike[document][other] = share

    missed = inside[minhash.find_near_pairs_between(apart, slots, checks.near_duplicate_threshold, minhash.REACH_ACROSS, note)]
    if checks.near_held_out_in_train == "drop":
        # A held-out document was compared until some were found that are like it.
        rest = np.flatnonzero(~found)
        also = minhash.find_near_pairs_between(
            slots[rest],
            apart,
            checks.near_duplicate_threshold,
            minhash.REACH,
            lambda a, b, similarity: note(b, rest[a], similarity),
        )
        missed = np.concatenate([missed, training[rest[also]]])
    return alike, missed


def _signed(signatures: Sequence[np.ndarray | None], documents: np.ndarray) -> np.ndarray:
    """Those of `documents` that are long enough to be nearly the same as another."""
    return np.asarray([i for i in documents.tolist() if signatures[i] is not None], dtype=np.int64)


def _stacked(signatures: Sequence[np.ndarray | None], documents: np.ndarray) -> np.ndarray:
    rows = [row for i in documents.tolist() if (row := signatures[i]) is not None]
    return np.stack(rows) if rows else np.empty((0, minhash.NUM_SLOTS), dtype=np.uint16)
