"""The objectives that `objective.name` can choose, and the columns that each needs. Plain data, no torch.

To add an objective: write a class as launcher/train/objectives.py does, a file in conf/objective/, and a row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveEntry:
    """Where the class of an objective is, as module:Class, and the columns of launcher/data/schema.py that it needs.

    `is_nll` says that the loss is the negative log-likelihood of the trained tokens, which the proof of the first step knows.
    """

    builder: str
    columns: tuple[str, ...] = ()
    is_nll: bool = False


OBJECTIVES: dict[str, ObjectiveEntry] = {"sft": ObjectiveEntry("launcher.train.objectives:SupervisedNll", is_nll=True)}
