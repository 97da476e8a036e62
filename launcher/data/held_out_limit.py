"""Makes a data cache with fewer held-out rows from the full cache: implements data.eval_max_rows."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from launcher import atomic_files
from launcher.data import packing
from launcher.data.cache import cache_store
from launcher.data.cache.split import Split, write_split
from launcher.data.sources import origins
from launcher.data.sources.origins import DocumentOrigins
from launcher.plan.launch_plan import DataFacts


def limit_held_out(folder: Path, full: DataFacts, max_rows: int) -> None:
    """Fill the empty `folder` with the cache of `full`, keeping an evenly spaced choice of `max_rows` held-out rows.

    Nothing is read or tokenized again. Both caches have the same training split: links to the same files, if the storage
    supports links.

    Raises:
        DataError: if the cache of `full` is damaged, with the command that removes it.
    """
    whole, training = Split.open(full, held_out=True), Split.open(full)
    for split in (whole, training):
        # A file that both caches share is damaged in both.
        split.verify()
    chosen = packing.choose_evenly(whole.num_rows, max_rows)
    documents = np.concatenate([np.empty(0, np.int64), *(np.arange(whole.num_docs)[whole.row_docs(row)] for row in chosen)])
    report, origins_of = cache_store.read_report(full.cache_dir), DocumentOrigins.open(full.cache_dir, held_out=True)
    (folder / "eval").mkdir(mode=0o700)
    for name in cache_store.file_sizes(full.cache_dir):
        if "/" not in name and name != origins.TABLE:
            _link(Path(full.cache_dir) / name, folder / name)
    digest = _write_rows(folder / "eval", whole, chosen, documents)
    if origins_of is not None:
        origins.write_held_out(folder, Path(full.cache_dir), origins_of, documents)
    _count_unused(report, whole, origins_of, documents)
    report["num_eval_docs"] = len(documents)
    report["num_eval_trained_tokens"] = int(whole.row_labels[chosen].sum())
    changes = {
        "num_eval_rows": len(chosen),
        "num_eval_tokens": int(whole.row_lengths(chosen).sum()),
        "digest": f"{full.digest.split('-')[0]}-{digest}",
    }
    cache_store.finish(folder, full.model_copy(update=changes), report)


def _link(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
    atomic_files.fsync_file(target)


def _write_rows(folder: Path, whole: Split, chosen: np.ndarray, documents: np.ndarray) -> str:
    docs = np.concatenate([[0], np.cumsum((whole.docs[1:] - whole.docs[:-1])[documents])]).astype(np.int64)
    rows = np.concatenate([[0], np.cumsum(whole.row_lengths(chosen))]).astype(np.int64)
    return write_split(
        folder,
        (np.asarray(whole.tokens[whole.row_tokens(row)]) for row in chosen),
        (np.asarray(whole.trained[whole.row_tokens(row)]) for row in chosen),
        rows=rows,
        docs=docs,
        row_labels=np.asarray(whole.row_labels[chosen]),
        doc_source=np.asarray(whole.doc_source[documents]),
        row_sources=np.asarray(whole.row_sources[chosen]),
    )


def _count_unused(report: dict[str, Any], whole: Split, origins_of: DocumentOrigins | None, kept: np.ndarray) -> None:
    """Count, for each source, the documents of which no part is kept; parts of a split document have one origin."""
    is_kept = np.isin(np.arange(whole.num_docs), kept)
    for number, source in enumerate(report["sources"]):
        of_source = np.flatnonzero(whole.doc_source == number)
        ids = of_source if origins_of is None else origins_of.values[of_source]
        source["held_out_unused"] = len(np.unique(ids)) - len(np.unique(ids[is_kept[of_source]]))
