"""The proof of an attempt's first step: its losses, gradients, their reduction and the update, against references of their own.

The references share nothing with what trains: documents are read from the cache and computed alone, with plain attention and
torch's cross entropy; gradients are summed over ranks by a plain all-reduce; AdamW's formula is evaluated in fp64. Gradients,
weights and optimizer states are compared at sampled positions of every parameter. docs/proof.md says what that shows.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from launcher.checkpoint import zero3
from launcher.data.loader import MicroBatch, StepBatch
from launcher.data.split import Split
from launcher.distributed import gather_json
from launcher.errors import Problem, ProofError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.objectives import OBJECTIVES
from launcher.plan.quantities import list_first
from launcher.plan.steps import compute_learning_rate
from launcher.tracking.tracker import Tracker
from launcher.train.comparison import FACTOR, Deviation, compare, find_problems
from launcher.train.model import CausalLMLoss
from launcher.train.objectives import Objective
from launcher.train.parameter_samples import ParameterSamples
from launcher.train.reference_pass import backward_documents, read_row

EVENT = "proof"


class Tolerances(NamedTuple):
    """The largest relative errors that rounding explains; docs/proof.md shows measured ones.

    `losses` is that of a mean loss, to which a document of n trained tokens adds `of_token` / sqrt(n). `of_one` is that of one
    parameter's gradient, `gradients` and `reduction` those of the gradients of a kind.
    """

    losses: float
    of_token: float
    gradients: float
    of_one: float
    reduction: float


_HALF = Tolerances(losses=0.02, of_token=0.15, gradients=0.1, of_one=0.5, reduction=2**-7)
TOLERANCES = {"bf16": _HALF, "fp16": _HALF, "fp32": Tolerances(1e-4, 0.0, 1e-3, 1e-2, 1e-5)}
_UPDATE = 1e-5
# Relative errors of smaller mean losses mean little.
_SMALL_LOSS = 0.5
_FP32_ROUNDING = 2**-24

_FILES = "make sure that all nodes see the same files: launcher, run directory, data cache and checkpoints"
_KERNELS = (
    "set model.attention=sdpa, model.liger=false and model.compile=false one after the other: where the proof passes, that "
    "kernel is wrong on these GPUs with these versions"
)
_COLLECTIVES = (
    "remove settings of deepspeed that change communication; otherwise suspect the versions of DeepSpeed, NCCL and driver"
)
_OPTIMIZER = "set deepspeed.offload_optimizer=none; otherwise suspect the versions of DeepSpeed and torch"


class FirstStepProof:
    """Follows the first step of an attempt. Its methods are called in order, and are collective.

    Raises:
        ProofError: from each of them on all ranks, if any rank finds a problem.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        engine: Any,
        model: CausalLMLoss,
        samples: ParameterSamples,
        objective: Objective,
        split: Split,
    ) -> None:
        self._plan, self._engine, self._model = plan, engine, model
        self._samples, self._objective, self._split = samples, objective, split
        self._most, self._world_size = TOLERANCES[plan.config.model.dtype], plan.topology.world_size
        self._kinds: dict[str, list[int]] = {}
        ends = {id(layer.weight) for layer in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings())}
        for index, parameter in enumerate(samples.parameters.values()):
            of_shape = {1: "norms and biases", 3: "experts"}.get(len(parameter.ds_shape), "matrices")
            self._kinds.setdefault("embeddings" if id(parameter) in ends else of_shape, []).append(index)
        self._is_own = self._put_own((name, torch.ones(zero3.local_elements(p))) for name, p in samples.parameters.items()) > 0
        self._errors: dict[str, float] = {}
        self._omitted: list[str] = []
        self._seconds = 0.0

    def begin(self, batch: StepBatch, step: int) -> None:
        """Compare what the ranks are about to train, and compute the reference of the first micro-batch."""
        self._step = step
        self._rate = compute_learning_rate(self._plan.config.optim, step, self._plan.batch.max_steps or 1)
        with self._timed():
            self._check_agreement(batch)
            num_trained = float(self._sum_ranks(torch.tensor(self._check_inputs(batch), device=self._samples.device)))
            # Ranks with the same rows count them, too.
            self._scale = self._world_size / (num_trained or 1.0)
            self._before = self._read_states()
            self._reference = self._compute_reference(batch.micro[0])
            self._samples.begin()

    def check_first_pass(self, loss: Tensor) -> None:
        """Compare the weights that the first micro-batch computed with, its loss and its gradients, after its backward pass."""
        samples = self._samples
        with self._timed():
            # Quantized weights differ from the optimizer's.
            if not self._plan.deepspeed["zero_optimization"].get("zero_quantized_weights"):
                stored = samples.cast(self._sum_ranks(self._before[zero3.FP32]))
                differ = ~samples.weights.isnan() & (samples.weights != stored)
                self._require(self._name("the passes used other weights than the optimizer's", differ), _COLLECTIVES)
            if self._reference is None:
                return
            expected, expected_loss = self._reference
            actual, problems = float(loss.detach()), []
            self._errors["loss"] = abs(actual - expected_loss) / (abs(expected_loss) or 1.0)
            if not self._errors["loss"] <= self._most.losses:
                factor = actual / expected_loss if expected_loss else math.inf
                problems = [f"the loss of the first micro-batch is {factor:.2f} times that of its documents"]
            # Rounding may change the experts of a token.
            more = 2 if "experts" in self._kinds else 1
            # The first loss scales of fp16 are often too large.
            if torch.isfinite(expected).all():
                sums = compare(samples.gradients, expected, samples.owner)
                problems += self._judge("gradients", "gradients", sums, more * self._most.gradients, more * self._most.of_one)
            self._require(problems, _KERNELS)

    def check_gradients(self) -> None:
        """Compare the reduced gradients with their sum over the ranks, before the optimizer step."""
        samples, self._gradients = self._samples, None
        with self._timed():
            if self._plan.nvme_folder is not None:
                self._omitted.append("reduction and update (on NVMe)")
                return
            expected = self._sum_ranks(samples.gradients) / self._world_size
            self._norm, actual = self._read_gradients()
            if not math.isfinite(self._norm + float(expected.sum())):
                self._omitted.append("reduction and update (gradients are not finite)")
                return
            self._gradients = actual
            sums = self._sum_ranks(compare(actual, expected, samples.owner, self._is_own))
            most = self._most.reduction * math.sqrt(self._world_size)
            problems = self._judge("reduction", "after the reduction, gradients", sums, most, self._most.of_one)
            local = self._sum_ranks(compare(actual, samples.gradients, samples.owner, self._is_own))
            if problems and Deviation.of(local.sum(0)).rest < FACTOR < Deviation.of(sums.sum(0)).rest:
                problems = ["after the reduction, each rank has its own gradients, not their sum over the ranks"]
            self._require(problems, _COLLECTIVES)

    def check_update(self, tracker: Tracker) -> None:
        """Compare weights and moments after the optimizer step with AdamW's formula, and record the result of the proof."""
        self._samples.close()
        with self._timed():
            if self._gradients is None or not self._engine.was_step_applied():
                self._omitted += [] if self._gradients is None else ["update (the step was skipped)"]
            elif self._plan.config.optim.name != "adamw":
                self._omitted.append("update (the optimizer is not AdamW)")
            else:
                self._check_adamw(self._gradients)
        found = ", ".join(f"{name} within {error:.1g}" for name, error in self._errors.items())
        text = f"step {self._step + 1} agrees with its references: {found}; {self._seconds:.1f} s"
        if self._omitted:
            text += f"; not compared: {', '.join(self._omitted)}"
        tracker.event(EVENT, text, self._step, **self._errors, omitted=self._omitted, seconds=self._seconds)

    def _check_agreement(self, batch: StepBatch) -> None:
        own = {
            "step": self._step,
            "the learning rate": self._engine.optimizer.param_groups[0]["lr"],
            "the plan": self._plan.digest(),
            "rows": [row for micro in batch.micro for row in micro.row_ids],
        }
        of_ranks = gather_json(own)
        problems = [
            f"ranks disagree about {name}: {list_first([str(one[name]) for one in of_ranks], 4)}"
            for name in ("step", "the learning rate", "the plan")
            if len({one[name] for one in of_ranks}) > 1
        ]
        if not problems and not math.isclose(own["the learning rate"], self._rate):
            problems = [
                f"the learning rate is {own['the learning rate']:.4g}, and that of step {self._step + 1} {self._rate:.4g}"
            ]
        topology, owners = self._plan.topology, dict[int, list[int]]()
        for rank in range(0, len(of_ranks), topology.sequence_ranks):
            for row in of_ranks[rank]["rows"]:
                owners.setdefault(row, []).append(rank)
        expected = Counter(batch.row_ids)
        if wrong := [row for row in {**owners, **expected} if len(owners.get(row, [])) != expected[row]]:
            ranks = {row: " and ".join(map(str, owners.get(row, ["none"]))) for row in wrong}
            problems.append(f"rows are on the wrong ranks: {list_first([f'row {row} on {ranks[row]}' for row in wrong], 3)}")
        self._require(problems, _FILES)

    def _check_inputs(self, batch: StepBatch) -> int:
        """Compare this rank's rows with the cache; return the number of their trained tokens."""
        problems, num_trained = [], 0
        for micro in batch.micro:
            for number, row in enumerate(micro.row_ids):
                documents = read_row(self._split, row)
                expected = {
                    "tokens": (micro.input_ids, [one.ids for one in documents]),
                    "labels": (micro.labels, [one.labels for one in documents]),
                    "positions": (micro.position_ids, [np.arange(len(one.ids)) for one in documents]),
                }
                for name, (given, parts) in expected.items():
                    values = torch.from_numpy(np.concatenate(parts))
                    if num_wrong := int((given[number, : len(values)] != values).sum()):
                        problems.append(f"{num_wrong} of {len(values)} {name} of row {row} are not those of the data cache")
                num_trained += sum(one.num_trained for one in documents)
        self._require(problems, _FILES)
        return num_trained

    def _compute_reference(self, micro: MicroBatch) -> tuple[Tensor, float] | None:
        """Return the expected gradients and loss of a micro-batch, after comparing the losses of its documents."""
        config = self._model.hf.config.get_text_config()
        if not OBJECTIVES[self._plan.config.objective.name].is_nll:
            self._omitted.append("losses (the objective is not their likelihood)")
            return None
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in config.to_dict().items()):
            self._omitted.append("losses (the model has dropout)")
            return None
        documents = [one for row in micro.row_ids for one in read_row(self._split, row)]
        self._samples.begin()
        with zero3.dropped_gradients(self._engine):
            losses = backward_documents(
                self._engine, self._model, documents, micro.input_ids.numel(), self._scale, self._samples.device
            )
        of_tokens = self._objective.atom_losses(self._engine, micro, self._samples.device)
        counts = [one.num_trained for one in documents]
        problems, self._errors["documents"] = [], 0.0
        if len(of_tokens) != sum(counts):
            problems = [f"{len(of_tokens)} tokens of the first micro-batch have a loss, not {sum(counts)}"]
        else:
            for part, loss, count in zip(of_tokens.double().split(counts), losses, counts, strict=True):
                mean, expected = float(part.sum()) / (count or 1), loss / (count or 1)
                error = abs(mean - expected) / max(_SMALL_LOSS, expected)
                self._errors["documents"] = max(self._errors["documents"], error)
                if not error <= self._most.losses + self._most.of_token / math.sqrt(count or 1):
                    problems.append(f"the loss of a document of {count} trained tokens is {mean:.4f}, and alone {expected:.4f}")
        self._require(problems, _KERNELS)
        return self._samples.gradients, sum(losses) * self._scale

    def _check_adamw(self, gradients: Tensor) -> None:
        """Compare with AdamW as in Loshchilov and Hutter 2019, arXiv:1711.05101, after clipping to the global norm."""
        optim, clip, (beta1, beta2) = self._plan.config.optim, self._plan.config.train.grad_clip, self._plan.config.optim.betas
        samples, after, count = self._samples, self._read_states(), zero3.optimizer_step(self._engine)
        before = {key: value.double() for key, value in self._before.items()}
        loss_scale = float(self._engine.optimizer.loss_scale)
        clipped = max(1.0, (self._norm / loss_scale + 1e-6) / clip) if clip else 1.0
        gradient = gradients.double() / (loss_scale * clipped)
        first = beta1 * before["exp_avg"] + (1 - beta1) * gradient
        second = beta2 * before["exp_avg_sq"] + (1 - beta2) * gradient.square()
        problems = []
        for key, expected in (("exp_avg", first), ("exp_avg_sq", second)):
            sums = self._sum_ranks(compare(after[key], expected, samples.owner, self._is_own))
            problems += self._judge("moments", f"the optimizer's moments {key}", sums, _UPDATE, self._most.of_one)
        if problems and clip:
            used = (after["exp_avg"].double() - beta1 * before["exp_avg"]) / (1 - beta1)
            factor = Deviation.of(self._sum_ranks(compare(used, gradient, samples.owner, self._is_own)).sum(0)).factor
            problems.append(f"clipping to {clip:g} leaves gradients that are {factor:.2f} times the right ones")
        corrected = first / (1 - beta1**count) / (second.sqrt() / math.sqrt(1 - beta2**count) + optim.eps)
        decay = samples.spread([optim.weight_decay * (len(p.ds_shape) > 1) for p in samples.parameters.values()])
        parts = (corrected, first / (second.sqrt() + optim.eps), decay * before[zero3.FP32])
        change = after[zero3.FP32].double() - before[zero3.FP32]
        problems += [] if problems else self._check_change(change, *(-self._rate * part for part in parts))
        weights = self._put_own(zero3.local_weights(samples.parameters))
        problems += self._name("weights after the step are not the optimizer's", weights != samples.cast(after[zero3.FP32]))
        self._require(problems, _OPTIMIZER)

    def _check_change(self, change: Tensor, step: Tensor, uncorrected: Tensor, decay: Tensor) -> list[str]:
        """Compare the change of weights with a step and weight decay; `uncorrected` is a step without bias correction."""
        rounding = self._before[zero3.FP32].double() * _FP32_ROUNDING
        pairs = [(step, step), (step, decay), (decay, decay), (change, step), (change, decay)]
        pairs += [(rest, rest) for rest in (change - step - decay, change - uncorrected - decay, rounding)]
        sums = self._sum_ranks(torch.stack([(a * b * self._is_own).sum() for a, b in pairs]))
        ss, sd, dd, cs, cd, error, without, rounded = sums.tolist()
        norm = max(ss + 2 * sd + dd, torch.finfo(torch.float64).tiny)
        self._errors["update"] = math.sqrt(error / norm)
        if self._errors["update"] <= _UPDATE + 2 * math.sqrt(rounded / norm):
            return []
        if math.sqrt(without / norm) < FACTOR:
            return ["the moments have no bias correction"]
        # Least squares: change = x step + y decay.
        determinant = ss * dd - sd * sd
        x, y = ((cs * dd - cd * sd) / determinant, (cd * ss - cs * sd) / determinant) if determinant else (cs / ss, 1.0)
        problems = [f"weight decay is {y:.2f} times that of the plan"] if abs(y - 1) > FACTOR else []
        problems += [f"the learning rate is {x:.2f} times that of step {self._step + 1}"] if abs(x - 1) > FACTOR else []
        return problems or [f"the change of weights is wrong by {self._errors['update']:.2g} of its norm"]

    def _read_states(self) -> dict[str, Tensor]:
        """Return the samples of this rank's fp32 weights and optimizer states; before the first step, states are 0."""
        samples, engine = self._samples, self._engine
        values = {key: samples.zeros() for key in (zero3.FP32, *zero3.find_optimizer(engine).states)}
        layout = zero3.state_layout(engine, samples.parameters)
        for (name, key, _), part in zip(layout, zero3.local_states(engine, samples.parameters), strict=True):
            samples.put_own(values[key], name, part)
        return values

    def _read_gradients(self) -> tuple[float, Tensor]:
        """Return the norm of all reduced gradients, and the samples of this rank's partitions of them."""
        values, squares = self._samples.zeros(), torch.zeros((), dtype=torch.float64, device=self._samples.device)
        for name, parameter in self._samples.parameters.items():
            part = safe_get_local_grad(parameter)[: zero3.local_elements(parameter)]
            squares += torch.linalg.vector_norm(part, dtype=torch.float64).square()
            self._samples.put_own(values, name, part)
        return math.sqrt(float(self._sum_ranks(squares))), values

    def _put_own(self, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        values = self._samples.zeros()
        for name, part in parts:
            self._samples.put_own(values, name, part)
        return values

    def _sum_ranks(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    def _judge(self, name: str, what: str, sums: Tensor, most: float, most_of_one: float) -> list[str]:
        largest, problems = find_problems(what, sums, [*self._samples.parameters], self._kinds, most, most_of_one)
        self._errors[name] = max(largest, self._errors.get(name, 0.0))
        return problems

    def _name(self, problem: str, differ: Tensor) -> list[str]:
        """Return the problem with the parameters that it is about, if any sample differs."""
        names = [name for name, span in self._samples.spans.items() if differ[span].any()] if differ.any() else []
        return [f"{problem}: {list_first(names, 2)}"] if names else []

    def _require(self, problems: list[str], remedy: str) -> None:
        """Raise the problems of all ranks, if there are any. Collective."""
        ranks: dict[str, list[int]] = {}
        for rank, texts in enumerate(gather_json(problems[:3])):
            for text in texts:
                ranks.setdefault(text, []).append(rank)
        found = []
        for text, of in ranks.items():
            which = "all ranks" if len(of) == self._world_size else f"rank {list_first([*map(str, of)], 4)}"
            where, advice = f"step {self._step + 1}, {which}", f"{remedy}; train.proof=false trains without this check"
            found.append(Problem(f"the first step is wrong: {text}", where, remedy=advice))
        if found:
            raise ProofError(found[:4])

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
