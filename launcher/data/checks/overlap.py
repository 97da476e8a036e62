"""Compares documents with each other: duplicates in the training split, and held-out documents that leak into it.

Equal documents have equal hashes of their comparable texts; nearly equal ones have similar MinHash signatures (Broder 1997). A
signature represents the set of all windows of WINDOW_BYTES bytes of a text, about three words, so it also works for languages
without spaces. Two documents with one equal band of their signatures are candidates (locality-sensitive hashing); the share of
equal slots then estimates the Jaccard similarity of the two sets, with a standard error of 0.035 at 0.8.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import rensa
import xxhash

from launcher.data.checks.findings import CheckHit, Hits

NUM_SLOTS = 128
# Estimated Jaccard similarity at which two documents count as nearly identical.
THRESHOLD = 0.8
WINDOW_BYTES = 16
# Shorter texts that differ in one word do not count as similar; equal texts are found by their hash.
MIN_WINDOWS = 64
# A pair at the threshold becomes a candidate with this probability.
RECALL = 0.99
# The largest number of slots per band for which a pair at the threshold is a candidate with probability RECALL.
ROWS_PER_BAND = next(r for r in range(16, 0, -1) if 1 - (1 - THRESHOLD**r) ** (NUM_SLOTS // r) >= RECALL)
# Each document is compared with this many of the next documents that share a band; larger groups are chained.
REACH = 8
# Between two sets, a document is compared with this many candidates at a time, until a similar one is found.
REACH_ACROSS = 512
# Maximum number of pairs that a build has time for: rows of one template have many candidates that are not similar.
MAX_PAIRS_ACROSS = 1 << 28

_PUNCTUATION = b".,;:!?'\"`\t\n\r"
_WITHOUT_PUNCTUATION = bytes.maketrans(_PUNCTUATION, b" " * len(_PUNCTUATION))
_SIGN = re.compile(rb"([-+*/=<>])")
# Zero-width characters: soft hyphen, joiners, direction marks, variation selectors, byte order mark, tags.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e01ef]"
)
# Quotation marks, dashes and other punctuation beyond ASCII: Latin-1, general, Chinese and Japanese, Arabic, Indic.
_OTHER_PUNCTUATION = re.compile(
    "[\u0085\u00a0\u00a1\u00ab\u00b7\u00bb\u00bf\u060c\u061b\u061f\u06d4\u0964\u0965"
    "\u2000-\u200a\u2010-\u2029\u202f-\u205f\u3000-\u3003\u3008-\u3011\u3014-\u301f\u30fb]"
)

_SEED = 7
_CHUNK = 1 << 16
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))

# The signature of each document; None for a text that is too short.
Signatures = Sequence[np.ndarray | None]
# Marks equal documents; estimates are at most 1.
_EXACT = 2.0


def normalize(text: str) -> str:
    """Return `text` in one case, with single spaces."""
    return " ".join(text.casefold().split())


def make_comparable(text: str) -> bytes:
    """Return a text in UTF-8, normalized for comparison: NFKC, without invisible characters, punctuation, spaces around signs.

    Punctuation becomes a space, so that 1.5 does not become 15. Arithmetic signs and brackets stay.
    """
    if not text:
        return b""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
        text = _OTHER_PUNCTUATION.sub(" ", _INVISIBLE.sub("", text))
    data = text.encode().translate(_WITHOUT_PUNCTUATION)
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return b"".join(map(bytes.strip, _SIGN.split(data)))


def hash_content(data: bytes) -> int:
    """Return a 64-bit hash."""
    return xxhash.xxh3_64_intdigest(data)


def compute_signatures(texts: Sequence[bytes]) -> list[np.ndarray | None]:
    """Return the signature uint16 [NUM_SLOTS] of each normalized text in UTF-8; None for a text with too few windows."""
    rows: list[np.ndarray | None] = [None] * len(texts)
    long_enough = [i for i, text in enumerate(texts) if len(text) - WINDOW_BYTES + 1 >= MIN_WINDOWS]
    if not long_enough:
        return rows
    # Process all texts at once; one by one, the overhead of the numpy calls would dominate.
    data = b"".join([texts[i] for i in long_enough])
    ends = np.cumsum([len(texts[i]) for i in long_enough])
    num_windows = len(data) - WINDOW_BYTES + 1
    # The first and the last eight bytes of the window at every position, as integers.
    head, tail = (np.ndarray((num_windows,), "<u8", data, offset, (1,)) for offset in (0, WINDOW_BYTES - 8))
    windows = head * _MIX[0]
    windows ^= windows >> np.uint64(32)
    windows += tail
    windows *= _MIX[1]
    windows ^= windows >> np.uint64(29)
    # Windows that reach into the next text belong to neither text.
    within = np.ones(num_windows, dtype=bool)
    within[(ends[:-1, None] - np.arange(1, WINDOW_BYTES)).ravel()] = False
    offsets = [0, *(ends - np.arange(1, len(ends) + 1) * (WINDOW_BYTES - 1)).tolist()]
    slots = rensa.RMinHash.digest_matrix_from_flat_token_hashes(windows[within], offsets, NUM_SLOTS, _SEED)
    # The lower half of a slot distinguishes values just as well, in half the memory.
    for i, row in zip(long_enough, np.asarray(slots.to_rows(), dtype=np.uint32).astype(np.uint16), strict=True):
        rows[i] = row
    return rows


# Documents


def find_duplicates(
    contents: np.ndarray,
    tasks: np.ndarray,
    signatures: Signatures,
    training: np.ndarray,
) -> Hits:
    """Find duplicates among the documents `training`; the first of several copies does not count.

    `contents` and `tasks` are uint64 [documents], `training` indices. The hits of each check are in the order of `training`.
    """
    _, first, group = np.unique(tasks[training], return_index=True, return_inverse=True)
    originals = training[first][group]
    copies = np.flatnonzero(originals != training)
    hits = [(int(training[i]), CheckHit("exact_duplicate", _describe(_EXACT), (int(originals[i]),))) for i in copies.tolist()]
    signed, slots = _select_signed(signatures, _Copies(contents, training).firsts)
    firsts = np.arange(len(signed))
    for a, b, _ in find_near_pairs(slots):
        np.minimum.at(firsts, b, a)
    near = np.flatnonzero(firsts < np.arange(len(signed)))
    shares = (slots[near] == slots[firsts[near]]).mean(axis=1)
    pairs = zip(signed[near].tolist(), signed[firsts[near]].tolist(), shares.tolist(), strict=True)
    return [*hits, *((document, CheckHit("near_duplicate", _describe(share), (other,))) for document, other, share in pairs)]


def find_leaks(contents: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> Hits:
    """Find the documents `held_out` that are also among the documents `training`.

    `others` of a hit are all copies in `training`; `contents` is uint64 [documents], the other arguments are indices.
    """
    copies = _Copies(contents, training)
    return copies.make_hits("held_out_in_train", _describe(_EXACT), held_out, copies.find_groups(contents[held_out]))


def find_prompt_leaks(
    contents: np.ndarray, prompts: np.ndarray, forms: np.ndarray, training: np.ndarray, held_out: np.ndarray
) -> Hits:
    """Find the documents `held_out` whose prompt occurs in documents `training` with another answer.

    If no such document has the same prompt, one may have it with other numbers: see `forms`. In the hashes `prompts` and `forms`,
    uint64 [documents], 0 means none. `others` of a hit are all training documents with the prompt.
    """
    held_out = held_out[_Copies(contents, training).find_groups(contents[held_out]) < 0]
    hits = []
    for finding, detail, hashes in (
        ("held_out_prompt_in_train", "the prompt of", prompts),
        ("similar_prompt_in_train", "apart from numbers, the prompt of", forms),
    ):
        copies = _Copies(hashes, training)
        groups = np.where(hashes[held_out] != 0, copies.find_groups(hashes[held_out]), -1)
        hits += copies.make_hits(finding, detail, held_out, groups)
        held_out = held_out[groups < 0]
    return hits


def find_near_leaks(
    contents: np.ndarray,
    signatures: Signatures,
    training: np.ndarray,
    held_out: np.ndarray,
    is_dropped: bool,
) -> Hits:
    """Like `find_leaks`, for nearly identical documents; also report the documents that were not compared with all others.

    With `is_dropped`, `others` of the hits contain all similar training documents; otherwise only the first ones.
    """
    copies = _Copies(contents, training)
    train_signed, train_slots = _select_signed(signatures, copies.firsts)
    held_out_signed, held_out_slots = _select_signed(signatures, held_out)
    if not len(train_signed) or not len(held_out_signed):
        return []
    # The similar training documents of each held-out document.
    similar: dict[int, dict[int, float]] = defaultdict(dict)
    is_similar = np.zeros(len(train_signed), dtype=bool)

    def add_pairs(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        is_similar[b] = True
        documents, others = held_out_signed[a].tolist(), train_signed[b].tolist()
        for document, other, share in zip(documents, others, similarity.tolist(), strict=True):
            similar[document][other] = share

    missed = held_out_signed[find_near_pairs_between(held_out_slots, train_slots, REACH_ACROSS, add_pairs)]
    if is_dropped:
        # A held-out document is compared only until a similar one is found, so compare the rest from the other side.
        rest = np.flatnonzero(~is_similar)
        not_compared = find_near_pairs_between(
            train_slots[rest], held_out_slots, REACH, lambda a, b, similarity: add_pairs(b, rest[a], similarity)
        )
        missed = np.concatenate([missed, train_signed[rest[not_compared]]])
    hits = [(i, CheckHit("not_compared", "too many other documents are partly the same")) for i in missed.tolist()]
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

    def make_hits(self, finding: str, detail: str, documents: np.ndarray, groups: np.ndarray) -> Hits:
        """Return a hit, with all documents of its group, for each of `documents` with a group."""
        return [
            (document, CheckHit(finding, detail, tuple(self.list_group(group).tolist())))
            for document, group in zip(documents.tolist(), groups.tolist(), strict=True)
            if group >= 0
        ]


def _describe(similarity: float) -> str:
    return "the same as" if similarity == _EXACT else f"{similarity:.0%} the same as"


def _select_signed(signatures: Signatures, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return those of `documents` that have a signature, and their signatures, uint16 [documents, NUM_SLOTS]."""
    rows = {i: row for i in documents.tolist() if (row := signatures[i]) is not None}
    slots = np.stack([*rows.values()]) if rows else np.empty((0, NUM_SLOTS), dtype=np.uint16)
    return np.asarray([*rows], dtype=np.int64), slots


# Pairs of signatures


def find_near_pairs(signatures: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield pairs (a, b, similarity) of rows of `signatures` with a < b and at least THRESHOLD; pairs may repeat."""
    for band in _iterate_bands():
        keys = _hash_band(signatures, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for distance in range(1, REACH + 1):
            at = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(at):
                break
            for some in np.array_split(at, -(-len(at) // _CHUNK)):
                yield _select_similar(signatures, order[some], signatures, order[some + distance])


def find_near_pairs_between(
    left: np.ndarray,
    right: np.ndarray,
    reach: int,
    on_pairs: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
) -> np.ndarray:
    """Call `on_pairs` with pairs (a, b, similarity) as in `find_near_pairs`, of a row of `left` and a row of `right`.

    A row of `left` is compared with `reach` candidates of a band, then with more until a similar one is found. If very many rows
    are similar, about the first `reach` are reported. Returns the rows of `left` that were not compared with all candidates:
    none, unless there were more than MAX_PAIRS_ACROSS pairs.
    """
    num_similar = np.zeros(len(left), dtype=np.int64)
    pairs_left = MAX_PAIRS_ACROSS
    for band in _iterate_bands():
        keys, left_keys = _hash_band(right, band), _hash_band(left, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first, end = np.searchsorted(keys, left_keys), np.searchsorted(keys, left_keys, side="right")
        active = np.flatnonzero((first < end) & (num_similar < reach))
        step = reach
        while len(active):
            counts = np.minimum(end[active] - first[active], step)
            for some in np.array_split(np.arange(len(active)), max(1, int(counts.sum()) // _CHUNK)):
                num, rows = counts[some], active[some]
                pairs_left -= int(num.sum())
                if pairs_left < 0:
                    return np.flatnonzero(num_similar == 0)
                steps = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
                near = _select_similar(left, np.repeat(rows, num), right, order[np.repeat(first[rows], num) + steps])
                np.add.at(num_similar, near[0], 1)
                on_pairs(*near)
            first[active] += counts
            step = REACH_ACROSS
            active = active[(first[active] < end[active]) & (num_similar[active] == 0)]
    return np.empty(0, dtype=np.int64)


def _iterate_bands() -> Iterator[slice]:
    starts = range(0, NUM_SLOTS - ROWS_PER_BAND + 1, ROWS_PER_BAND)
    return (slice(start, start + ROWS_PER_BAND) for start in starts)


def _hash_band(signatures: np.ndarray, band: slice) -> np.ndarray:
    """Return uint64 [documents] keys that are equal if the slots of the band are."""
    keys = np.zeros(len(signatures), dtype=np.uint64)
    for slot in signatures[:, band].T:
        keys = (keys ^ slot) * _MIX[0]
        keys ^= keys >> np.uint64(31)
    return keys


def _select_similar(
    left: np.ndarray, a: np.ndarray, right: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    similarity = (left[a] == right[b]).mean(axis=1)
    near = similarity >= THRESHOLD
    return a[near], b[near], similarity[near]
