"""Represents prompts as vectors, and measures what they share with training prompts. Pure, and without torch."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from launcher.data.checks import minhash
from launcher.evaluate.drift.two_sample import Numbers, Vectors

Tokens = Sequence[int]

NEAR_DUPLICATE = 0.8
_NUM_DIMENSIONS = 4096
_MIX = 0x9E3779B97F4A7C15
# Number of characters of a text to inspect for its script.
_SCRIPT_CHARS = 400


class TokenWeights:
    """TF-IDF vectors of token ids: the weight of a token depends on how many training prompts contain it.

    Token ids share the dimensions of a vector by a hash. Tokens that all prompts contain, such as the chat template, have no
    weight.
    """

    def __init__(self, training: Sequence[Tokens]) -> None:
        self._num_prompts = len(training)
        self._counts = Counter(token for prompt in training for token in {*prompt})

    def vectors(self, prompts: Sequence[Tokens]) -> Vectors:
        """Return unit vectors, float32 [prompts, dimensions]; zeros for a prompt without weighted tokens."""
        vectors = np.zeros((len(prompts), _NUM_DIMENSIONS), dtype=np.float32)
        for row, prompt in zip(vectors, prompts, strict=True):
            for token, count in Counter(prompt).items():
                weight = np.log((1 + self._num_prompts) / (1 + self._counts[token])) * (1 + np.log(count))
                hashed = (token * _MIX) & 0xFFFF_FFFF_FFFF_FFFF
                row[(hashed >> 20) % _NUM_DIMENSIONS] += weight if hashed >> 63 else -weight
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.divide(vectors, lengths, out=vectors, where=lengths > 0)
        return vectors


def nearest_similarities(vectors: Vectors, others: Vectors, without_self: bool = False) -> Numbers:
    """Return the largest cosine of each vector with any of `others`; with `without_self`, both are the same vectors."""
    similarities = vectors @ others.T
    if without_self:
        np.fill_diagonal(similarities, -1)
    return np.asarray(similarities.max(axis=1), dtype=np.float64)


def unseen_share(prompts: Sequence[Tokens], training: Sequence[Tokens]) -> float:
    """Return the share of the tokens of `prompts` that occur in no prompt of `training`."""
    known = {token for prompt in training for token in prompt}
    tokens = [token for prompt in prompts for token in prompt]
    return sum(token not in known for token in tokens) / max(1, len(tokens))


def near_duplicate_share(prompts: Sequence[str], training: Sequence[str]) -> float:
    """Return the share of `prompts` that nearly equal a prompt of `training`; short prompts must be equal."""
    texts, others = ([minhash.make_comparable(minhash.normalize(text)) for text in side] for side in (prompts, training))
    known = {*others}
    near_duplicates = {i for i, text in enumerate(texts) if text in known}
    left, right = minhash.compute_signatures(texts), minhash.compute_signatures(others)
    left_at = [i for i, signature in enumerate(left) if signature is not None]
    right_signatures = [signature for signature in right if signature is not None]
    if left_at and right_signatures:
        signatures = np.stack([signature for signature in left if signature is not None])
        minhash.find_near_pairs_between(
            signatures,
            np.stack(right_signatures),
            NEAR_DUPLICATE,
            minhash.REACH,
            lambda a, _, __: near_duplicates.update(left_at[int(i)] for i in a),
        )
    return len(near_duplicates) / max(1, len(prompts))


def scripts(texts: Sequence[str]) -> dict[str, float]:
    """Return the share of texts by the script of most of their letters, such as Latin, most frequent first."""
    counts = Counter(_script(text) for text in texts)
    return {script: count / len(texts) for script, count in counts.most_common()}


def _script(text: str) -> str:
    names = Counter(unicodedata.name(char, "other").split()[0] for char in text[:_SCRIPT_CHARS] if char.isalpha())
    return names.most_common(1)[0][0].capitalize() if names else "No letters"
