"""All settings of a run: `RunConfig` with its sections, which launcher/config/sections/ defines, and the backends' sections.

Pure: nothing here reads disk, network, environment or devices. Checks that do, such as whether a path exists, are in
launcher.facts and launcher.plan.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from launcher.config.sections.cluster import ClusterSection, LocalSection
from launcher.config.sections.data import DataSection
from launcher.config.sections.evaluation import HELD_OUT, EvalSection, EvaluateSection
from launcher.config.sections.fields import SettingsSection
from launcher.config.sections.model import ModelSection
from launcher.config.sections.ray import RaySection
from launcher.config.sections.run import CostsSection, RunSection, TrackingSection
from launcher.config.sections.slurm import SlurmSection
from launcher.config.sections.static import StaticSection
from launcher.config.sections.train import CheckpointSection, DeepSpeedSection, ExportSection, OptimSection, TrainSection

# By `cluster.kind`. The classes that submit are in launcher.clusters.backends.BACKENDS.
SECTIONS: dict[str, type[ClusterSection]] = {
    "local": LocalSection,
    "slurm": SlurmSection,
    "ray": RaySection,
    "static": StaticSection,
}

if TYPE_CHECKING:
    AnyCluster = ClusterSection
else:
    AnyCluster = Annotated[functools.reduce(operator.or_, SECTIONS.values()), Field(discriminator="kind")]


def choose_kind(value: Any) -> Any:
    """Return the section with its kind; a section without a kind is for this machine."""
    return {"kind": "local", **value} if isinstance(value, dict) else value


class RunConfig(SettingsSection):
    """All settings of a run, resolved and checked."""

    run: RunSection = Field(default_factory=RunSection)
    model: ModelSection
    data: DataSection
    optim: OptimSection = Field(default_factory=OptimSection)
    train: TrainSection
    eval: EvalSection = Field(default_factory=EvalSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    export: ExportSection = Field(default_factory=ExportSection)
    deepspeed: DeepSpeedSection = Field(default_factory=DeepSpeedSection)
    cluster: Annotated[AnyCluster, BeforeValidator(choose_kind)] = Field(default_factory=LocalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    costs: CostsSection = Field(default_factory=CostsSection)

    @model_validator(mode="after")
    def _check_limits_and_sets(self) -> RunConfig:
        if self.run.max_usd is not None and self.cluster.price_per_gpu_hour is None:
            raise ValueError("run.max_usd needs the price of a GPU hour; set cluster.price_per_gpu_hour")
        sets = (HELD_OUT, *(one.name for one in self.eval.all_sets))
        if self.checkpoint.best_set not in sets:
            raise ValueError(f"checkpoint.best_set names no evaluation set; set it to {' or '.join(sets)}")
        return self
