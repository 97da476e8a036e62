"""The reference of the first step's proof: each document alone, with plain attention and a plain loss, through the same weights.

Labels are made here from token ids and the cached mask. Nothing is shared with the loader, or with the loss that trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.data.split import Split
from launcher.train import attention
from launcher.train.model import CausalLMLoss

# What torch's cross entropy ignores.
_UNTRAINED = -100


@dataclass(frozen=True)
class RowDocument:
    """Token ids, and for each token whether it is predicted with a loss; both [length]."""

    ids: np.ndarray
    is_trained: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The next token at each position, or -100: int64 [length]."""
        following = np.where(self.is_trained[1:], self.ids[1:], _UNTRAINED)
        return np.append(following, _UNTRAINED)

    @property
    def num_trained(self) -> int:
        """The number of labels."""
        return int(self.is_trained[1:].sum())


def read_row(split: Split, row: int) -> list[RowDocument]:
    """Read the documents of a row from the cache."""
    offsets = split.docs[np.searchsorted(split.docs, split.rows[row]) : np.searchsorted(split.docs, split.rows[row + 1]) + 1]
    return [
        RowDocument(np.asarray(split.tokens[start:stop]).astype(np.int64), np.asarray(split.trained[start:stop]) != 0)
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


def backward_documents(
    engine: Any, model: CausalLMLoss, documents: Sequence[RowDocument], most_tokens: int, scale: float, device: torch.device
) -> list[float]:
    """Return the summed loss of each document, after the backward pass of their sum times `scale`. Collective.

    Documents of similar length are computed together, padded to at most `most_tokens`. Call it within `dropped_gradients`.
    """
    groups = _group_by_length([len(document.ids) for document in documents], most_tokens)
    num_passes = torch.tensor(len(groups), device=device)
    dist.all_reduce(num_passes, op=dist.ReduceOp.MAX)
    losses = [0.0] * len(documents)
    with _plain_kernels(model):
        for number in range(int(num_passes)):
            group = groups[number] if number < len(groups) else []
            shape = (max(1, len(group)), max((len(documents[index].ids) for index in group), default=1))
            ids, labels = np.zeros(shape, np.int64), np.full(shape, _UNTRAINED)
            for i, index in enumerate(group):
                length = len(documents[index].ids)
                ids[i, :length], labels[i, :length] = documents[index].ids, documents[index].labels
            positions = torch.arange(shape[1], device=device).expand(shape)
            of_tokens: Tensor = engine(
                torch.from_numpy(ids).to(device), positions, torch.from_numpy(labels).to(device), by_document=True
            )
            engine.backward(of_tokens.sum() * scale, scale_wrt_gas=False)
            parts = of_tokens.detach().split((labels != _UNTRAINED).sum(axis=1).tolist())
            for index, part in zip(group, parts, strict=False):
                losses[index] = float(part.double().sum())
    return losses


def _group_by_length(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: lengths[one]):
        if not groups or (len(groups[-1]) + 1) * lengths[index] > most_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


@contextmanager
def _plain_kernels(model: CausalLMLoss) -> Iterator[None]:
    kernel = attention.kernel_of(model.hf.config)
    model.hf.set_attn_implementation(attention.choose_plain_kernel(model.hf.config))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.hf.set_attn_implementation(kernel)
