"""Documents that are the same or nearly the same, by hashes and MinHash signatures (Broder 1997).

A signature stands for the set of a text's windows of WINDOW_BYTES bytes, about three words: that works for languages without
spaces too. Candidates for a pair agree in one band of their signatures (locality-sensitive hashing); the share of equal slots
then estimates the Jaccard similarity of the two sets, with a standard error of 0.035 at 0.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rensa
import xxhash

NUM_SLOTS = 128
WINDOW_BYTES = 16
# Two shorter texts that differ in one word are not much alike; equal ones are found by their hash.
MIN_WINDOWS = 64
# A pair at the threshold becomes a candidate with this probability.
RECALL = 0.99
# Documents of one band's group are compared with so many that follow; larger groups are chained.
REACH = 8
# Between two sets, a document is compared with so many of a group at a time, until one is found that is like it.
REACH_ACROSS = 512
# In rows of one template many documents agree that are not alike: as many pairs as a build has time for.
MOST_PAIRS_ACROSS = 1 << 28

_SEED = 7
_CHUNK = 1 << 16
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))


def normalize(text: str) -> str:
    """Return `text` in one case, with single spaces."""
    return " ".join(text.casefold().split())


def content_hash(data: bytes) -> int:
    """64 bits that equal texts share."""
    return xxhash.xxh3_64_intdigest(data)


def signatures(texts: Sequence[bytes]) -> list[np.ndarray | None]:
    """uint16 [NUM_SLOTS] of each normalised text in UTF-8; None where it is too short to be nearly the same as another."""
    found: list[np.ndarray | None] = [None] * len(texts)
    places = [i for i, text in enumerate(texts) if len(text) - WINDOW_BYTES + 1 >= MIN_WINDOWS]
    if not places:
        return found
    # All texts at once: one by one, numpy's calls would take longer than its work.
    data = b"".join([texts[i] for i in places])
    ends = np.cumsum([len(texts[i]) for i in places])
    num_windows = len(data) - WINDOW_BYTES + 1
    # Every position's eight bytes as one integer, and the eight after it.
    head, tail = (np.ndarray((num_windows,), "<u8", data, offset, (1,)) for offset in (0, WINDOW_BYTES - 8))
    windows = head * _MIX[0]
    windows ^= windows >> np.uint64(32)
    windows += tail
    windows *= _MIX[1]
    windows ^= windows >> np.uint64(29)
    # Those that reach into the next text belong to none.
    within = np.ones(num_windows, dtype=bool)
    within[(ends[:-1, None] - np.arange(1, WINDOW_BYTES)).ravel()] = False
    offsets = [0, *(ends - np.arange(1, len(ends) + 1) * (WINDOW_BYTES - 1)).tolist()]
    slots = rensa.RMinHash.digest_matrix_from_flat_token_hashes(windows[within], offsets, NUM_SLOTS, _SEED)
    # The lower half of a slot tells two values apart as well, in half the memory.
    for i, row in zip(places, np.asarray(slots.to_rows(), dtype=np.uint32).astype(np.uint16), strict=True):
        found[i] = row
    return found


def find_near_pairs(signatures: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs (a, b, similarity) with a < b and an estimated similarity of at least `threshold`; a pair may come again.

    `signatures` is uint16 [documents, NUM_SLOTS].
    """
    for band in _bands(threshold):
        keys = _keys(signatures, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for distance in range(1, REACH + 1):
            at = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(at):
                break
            for some in np.array_split(at, -(-len(at) // _CHUNK)):
                yield _alike(signatures, order[some], signatures, order[some + distance], threshold)


def find_near_pairs_between(
    left: np.ndarray,
    right: np.ndarray,
    threshold: float,
    reach: int,
    on_pairs: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
) -> np.ndarray:
    """Call `on_pairs` with pairs (a, b, similarity) as near_pairs gives them, of a row of `left` and a row of `right`.

    A row of `left` is compared with `reach` others of a group, and with more of them until one is found that is like it; of
    a great many about the first `reach` are told. Returns the rows of `left` that may be like one and were not compared with
    all: none, unless there were more than MOST_PAIRS_ACROSS pairs to look at.
    """
    num_found = np.zeros(len(left), dtype=np.int64)
    pairs_left = MOST_PAIRS_ACROSS
    for band in _bands(threshold):
        keys, wanted = _keys(right, band), _keys(left, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first, end = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, side="right")
        asked = np.flatnonzero((first < end) & (num_found < reach))
        step = reach
        while len(asked):
            counts = np.minimum(end[asked] - first[asked], step)
            for some in np.array_split(np.arange(len(asked)), max(1, int(counts.sum()) // _CHUNK)):
                num, rows = counts[some], asked[some]
                pairs_left -= int(num.sum())
                if pairs_left < 0:
                    return np.flatnonzero(num_found == 0)
                steps = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
                near = _alike(left, np.repeat(rows, num), right, order[np.repeat(first[rows], num) + steps], threshold)
                np.add.at(num_found, near[0], 1)
                on_pairs(*near)
            first[asked] += counts
            step = REACH_ACROSS
            asked = asked[(first[asked] < end[asked]) & (num_found[asked] == 0)]
    return np.empty(0, dtype=np.int64)


def _bands(threshold: float) -> Iterator[slice]:
    rows = _rows_per_band(threshold)
    return (slice(start, start + rows) for start in range(0, NUM_SLOTS - rows + 1, rows))


def _keys(signatures: np.ndarray, band: slice) -> np.ndarray:
    """uint64 [documents] that are equal where the slots of the band are."""
    keys = np.zeros(len(signatures), dtype=np.uint64)
    for slot in signatures[:, band].T:
        keys = (keys ^ slot) * _MIX[0]
        keys ^= keys >> np.uint64(31)
    return keys


def _alike(
    left: np.ndarray, a: np.ndarray, right: np.ndarray, b: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    similarity = (left[a] == right[b]).mean(axis=1)
    near = similarity >= threshold
    return a[near], b[near], similarity[near]


def _rows_per_band(threshold: float) -> int:
    """The most slots in a band with which a pair at the threshold still becomes a candidate."""
    return next(r for r in range(16, 0, -1) if 1 - (1 - threshold**r) ** (NUM_SLOTS // r) >= RECALL or r == 1)
