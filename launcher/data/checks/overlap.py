"""Compares documents with each other: duplicates in the training split, and held-out documents that leak into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from launcher.data.checks import minhash
from launcher.data.checks.inspection import CheckHit

# Marks equal documents; estimates are at most 1.
_EXACT = 2.0
_NOT_COMPARED = "too many other documents are partly the same"
_SAME_PROMPT = {
    "held_out_prompt_in_train": "the prompt of",
    "similar_prompt_in_train": "apart from numbers, the prompt of",
}


def find_duplicates(
    contents: np.ndarray,
    tasks: np.ndarray,
    signatures: Sequence[np.ndarray | None],
    training: np.ndarray,
) -> list[tuple[int, CheckHit]]:
    """Find duplicates among the documents `training`, as (document, hit); the first of several copies does not count.

    `contents` and `tasks` are uint64 [documents], `training` indices. The hits of each check are in the order of `training`.
    """
    _, first, group = np.unique(tasks[training], return_index=True, return_inverse=True)
    originals = training[first][group]
    copies = np.flatnonzero(originals != training)
    hits = [(int(training[i]), CheckHit("exact_duplicate", _describe(_EXACT), (int(originals[i]),))) for i in copies.tolist()]
    signed = _signed(signatures, _Copies(contents, training).firsts)
    slots = _stacked(signatures, signed)
    firsts = np.arange(len(signed))
    for a, b, _ in minhash.find_near_pairs(slots):
        np.minimum.at(firsts, b, a)
    near = np.flatnonzero(firsts < np.arange(len(signed)))
    shares = (slots[near] == slots[firsts[near]]).mean(axis=1)
    pairs = zip(signed[near].tolist(), signed[firsts[near]].tolist(), shares.tolist(), strict=True)
    return [*hits, *((document, CheckHit("near_duplicate", _describe(share), (other,))) for document, other, share in pairs)]


def find_leaks(contents: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> list[tuple[int, CheckHit]]:
    """Find the documents `held_out` that are also among the documents `training`, as (document, hit).

    `others` of a hit are all copies in `training`; `contents` is uint64 [documents], the other arguments are indices.
    """
    copies = _Copies(contents, training)
    groups = copies.find_groups(contents[held_out])
    return [
        (document, CheckHit("held_out_in_train", _describe(_EXACT), tuple(copies.list_group(group).tolist())))
        for document, group in zip(held_out.tolist(), groups.tolist(), strict=True)
        if group >= 0
    ]


def find_prompt_leaks(
    contents: np.ndarray, prompts: np.ndarray, forms: np.ndarray, training: np.ndarray, held_out: np.ndarray
) -> list[tuple[int, CheckHit]]:
    """Find the documents `held_out` whose prompt occurs in documents `training` with another answer, as (document, hit).

    If no such document has the same prompt, one may have it with other numbers: see `forms`. In the hashes `prompts` and `forms`,
    uint64 [documents], 0 means none. `others` of a hit are all training documents with the prompt.
    """
    held_out = held_out[_Copies(contents, training).find_groups(contents[held_out]) < 0]
    hits = []
    for finding, hashes in (("held_out_prompt_in_train", prompts), ("similar_prompt_in_train", forms)):
        copies = _Copies(hashes, training)
        groups = np.where(hashes[held_out] != 0, copies.find_groups(hashes[held_out]), -1)
        hits += [
            (document, CheckHit(finding, _SAME_PROMPT[finding], tuple(copies.list_group(group).tolist())))
            for document, group in zip(held_out.tolist(), groups.tolist(), strict=True)
            if group >= 0
        ]
        held_out = held_out[groups < 0]
    return hits


def find_near_leaks(
    contents: np.ndarray,
    signatures: Sequence[np.ndarray | None],
    training: np.ndarray,
    held_out: np.ndarray,
    is_dropped: bool,
) -> list[tuple[int, CheckHit]]:
    """Like `find_leaks`, for nearly identical documents; also report the documents that were not compared with all others.

    With `is_dropped`, `others` of the hits contain all similar training documents; otherwise only the first ones.
    """
    copies = _Copies(contents, training)
    train_signed, held_out_signed = _signed(signatures, copies.firsts), _signed(signatures, held_out)
    if not len(train_signed) or not len(held_out_signed):
        return []
    train_slots, held_out_slots = _stacked(signatures, train_signed), _stacked(signatures, held_out_signed)
    similar, missed = _find_similar(train_slots, held_out_slots, train_signed, held_out_signed, is_dropped)
    hits = [(i, CheckHit("not_compared", _NOT_COMPARED)) for i in missed.tolist()]
    for document in sorted(similar):
        near = {other: share for other, share in similar[document].items() if contents[other] != contents[document]}
        if near:
            others = np.concatenate([copies.list_group(group) for group in copies.find_groups(contents[list(near)]).tolist()])
            hits.append((document, CheckHit("near_held_out_in_train", _describe(max(near.values())), tuple(others.tolist()))))
    return hits


class _Copies:
    """Documents grouped by content; `firsts` are the first of each group, in the order of `documents`."""

    def __init__(self, contents: np.ndarray, documents: np.ndarray) -> None:
        self._unique, first, group = np.unique(contents[documents], return_index=True, return_inverse=True)
        self.firsts = documents[np.sort(first)]
        self._documents = documents[np.argsort(group, kind="stable")]
        self._ends = np.cumsum(np.bincount(group, minlength=len(self._unique)))

    def find_groups(self, contents: np.ndarray) -> np.ndarray:
        """Return the group of each of `contents`, -1 for one without documents."""
        groups = np.searchsorted(self._unique, contents)
        known = groups < len(self._unique)
        known[known] = self._unique[groups[known]] == contents[known]
        return np.where(known, groups, -1)

    def list_group(self, group: int) -> np.ndarray:
        """Return all documents of a group."""
        return self._documents[self._ends[group - 1] if group else 0 : self._ends[group]]


def _describe(similarity: float) -> str:
    return "the same as" if similarity == _EXACT else f"{similarity:.0%} the same as"


def _find_similar(
    train_slots: np.ndarray, held_out_slots: np.ndarray, training: np.ndarray, held_out: np.ndarray, is_dropped: bool
) -> tuple[dict[int, dict[int, float]], np.ndarray]:
    """Return the similar training documents of each held-out document, and the documents that were not compared with all others.

    `train_slots` and `held_out_slots` are the signatures of the documents `training` and `held_out`.
    """
    similar: dict[int, dict[int, float]] = defaultdict(dict)
    is_similar = np.zeros(len(training), dtype=bool)

    def add_pairs(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        is_similar[b] = True
        for document, other, share in zip(held_out[a].tolist(), training[b].tolist(), similarity.tolist(), strict=True):
            similar[document][other] = share

    missed = held_out[minhash.find_near_pairs_between(held_out_slots, train_slots, minhash.REACH_ACROSS, add_pairs)]
    if is_dropped:
        # A held-out document is compared only until a similar one is found, so compare the rest from the other side.
        rest = np.flatnonzero(~is_similar)
        not_compared = minhash.find_near_pairs_between(
            train_slots[rest],
            held_out_slots,
            minhash.REACH,
            lambda a, b, similarity: add_pairs(b, rest[a], similarity),
        )
        missed = np.concatenate([missed, training[rest[not_compared]]])
    return similar, missed


def _signed(signatures: Sequence[np.ndarray | None], documents: np.ndarray) -> np.ndarray:
    """Return those of `documents` that have a signature."""
    return np.asarray([i for i in documents.tolist() if signatures[i] is not None], dtype=np.int64)


def _stacked(signatures: Sequence[np.ndarray | None], documents: np.ndarray) -> np.ndarray:
    rows = [row for i in documents.tolist() if (row := signatures[i]) is not None]
    return np.stack(rows) if rows else np.empty((0, minhash.NUM_SLOTS), dtype=np.uint16)
