"""The columns of an example: one table from row formats over the data cache to objectives. Pure.

To add a column, give it an entry with a default in `COLUMNS`. A row format sets its value in `Document.columns`, and an objective
that names it (launcher/plan/objectives.py) gets it in `StepBatch.documents` and `MicroBatch.columns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Column:
    """A value of each document, or of each token.

    With a `default`, the column is stored only if a document of the sources sets it; documents without a value get the default.
    """

    about: str
    dtype: Any
    default: Any = None
    is_per_token: bool = False


COLUMNS: dict[str, Column] = {
    "tokens": Column("token ids", np.uint32, is_per_token=True),
    "trained": Column("1 where the token is predicted with a loss; 0 at a document's first token", np.uint8, is_per_token=True),
    "source": Column("an index of data.sources; after the last: data.eval_path", np.uint16),
    "num_trained": Column("trained tokens", np.int32),
}
