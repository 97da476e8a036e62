"""What the training loop does between steps, with fake components.

Two real ranks agree on whether there is time for a save.

The loop's own code queues work on the GPU during a step and never waits for it; timings are read at the end.

The decoder is a plain stack of layers, because waits inside transformers and DeepSpeed are not tested here.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import hand_made
import pytest
import torch
from forked_ranks import RankServer
from plan_fixtures import DATA, PlanOf
from torch import Tensor, nn

from launcher.data.loader import IGNORED
from launcher.distributed import STOP_REASONS, RankInfo, pack_step
from launcher.errors import DivergedError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.tracker import RateLimit
from launcher.train import finish
from launcher.train.held_out_loss import Evaluation, ForgettingCheck, SetLoss
from launcher.train.loop import TrainingLoop
from launcher.train.loss import LossHead
from launcher.train.model import CausalLMLoss
from launcher.train.monitoring.step_metrics import LayerTimer, StepTimer

ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


class FakeLoop(TrainingLoop):
    """A loop with fake components in which DeepSpeed skips the steps in `skipped`; records alerts and saves."""

    def __init__(self, plan: LaunchPlan, max_steps: int, skipped: set[int], cancelled_at: int | None = None) -> None:
        self.saved: list[int] = []
        self.recorded: list[tuple[str, float]] = []
        self.is_cancelled = cancelled_at is not None
        self.alerts: list[tuple[int | None, str]] = []
        tracker = SimpleNamespace(event=self._event, summary=lambda values: None)
        parts = SimpleNamespace(
            engine=SimpleNamespace(was_step_applied=lambda: self.step not in skipped),
            meter=SimpleNamespace(skipped_steps=0),
            status=SimpleNamespace(write_state=lambda state, step: None),
            monitor=SimpleNamespace(start_training=lambda step: None),
            evaluator=SimpleNamespace(evaluate=self._evaluate, total_s=0.0),
            checkpointer=SimpleNamespace(saved_step=cancelled_at or None, record_evaluation=self._record_evaluation),
            max_steps=max_steps,
        )
        run_context = SimpleNamespace(plan=plan, tracker=tracker, run_dir=RunDir(Path("run")), rank_info=RankInfo(0, 0, 1, 1))
        super().__init__(run_context, parts, lambda: None)  # type: ignore[arg-type]
        self.step = cancelled_at or 0

    def _event(self, kind: str, text: str, step: int | None, **fields: object) -> None:
        self.alerts.append((step, text))

    def _record_evaluation(self, path: Path, loss: float) -> None:
        self.recorded.append((path.name, loss))

    def _evaluate(self, step: int, stop: object, names: tuple[str, ...]) -> Evaluation | None:
        return None

    def is_cancelled_before_training(self) -> bool:
        return self.is_cancelled

    def train_step(self) -> None:
        self.step += 1
        self.count_skipped_step()

    def evaluate(self, when: str, is_last: bool = False) -> None:
        """Evaluate nothing, in no time."""

    def save(self) -> None:
        self.saved.append(self.step)

    def save_and_wait(self, is_run_complete: bool = False) -> Path:
        self.saved.append(self.step)
        return Path()


def run(plan: LaunchPlan, max_steps: int, skipped: set[int]) -> FakeLoop:
    loop = FakeLoop(plan, max_steps, skipped)
    loop.run_to_end()
    return loop


@pytest.mark.parametrize(
    ("step", "newest"), [(0, "there is no checkpoint"), (5, "the newest checkpoint is of step 5")], ids=["first", "resumed"]
)
def test_a_run_that_is_cancelled_before_training_trains_no_step(plan_of: PlanOf, step: int, newest: str) -> None:
    loop = FakeLoop(plan_of("checkpoint.save_every=5"), 20, skipped=set(), cancelled_at=step)
    outcome = loop.run_to_end()
    assert (outcome.state, outcome.step, loop.step, loop.saved) == ("cancelled", step, step, [])
    assert outcome.message == f"stopped before training had begun; {newest}"
    assert outcome.checkpoint == (Path(f"run/checkpoints/step-{step:08d}") if step else None)


def test_a_save_due_at_a_skipped_step_happens_at_the_next_applied_step(plan_of: PlanOf) -> None:
    loop = run(plan_of("checkpoint.save_every=5", "model.dtype=bf16"), 20, skipped={10, 11})
    assert loop.saved == [5, 12, 15, 20]


def test_skipped_steps_raise_an_alert_except_in_fp16_which_finds_its_loss_scale_by_them(plan_of: PlanOf) -> None:
    alerts = run(plan_of("model.dtype=bf16"), 10, skipped={3, 7}).alerts
    assert [step for step, _ in alerts] == [3, 7]
    assert alerts[1][1].startswith("the gradients are not finite: this step was skipped, 2 so far; ")
    assert run(plan_of("model.dtype=fp16"), 10, skipped={3, 7}).alerts == []


def test_alerts_on_skipped_steps_are_of_one_kind_for_the_rate_limit(plan_of: PlanOf) -> None:
    alerts = run(plan_of("model.dtype=bf16"), 10, skipped={3, 7}).alerts
    limit = RateLimit()
    assert [limit.admit(text) for _, text in alerts] == [True, False]


def test_too_many_skipped_steps_in_a_row_end_training(plan_of: PlanOf) -> None:
    with pytest.raises(DivergedError, match="the gradients of 4 steps in a row are not finite"):
        run(plan_of("model.dtype=bf16"), 10, skipped={3, 4, 5, 6})


class EvaluatedLoop(FakeLoop):
    """A fake loop whose held-out evaluations return `losses`, by step."""

    def __init__(self, plan: LaunchPlan, max_steps: int, losses: dict[int, float]) -> None:
        super().__init__(plan, max_steps, skipped=set())
        self.losses = losses
        self.evaluated: list[int] = []
        self.parts.monitor.reached_limit = lambda: ""  # type: ignore[method-assign]
        self.run.rank_info = None  # type: ignore[misc]
        self.run.tracker.log = lambda step, metrics: None  # type: ignore[method-assign]
        self.run.tracker.summary = lambda values: None  # type: ignore[method-assign]

    def _evaluate(self, step: int, stop: object, names: tuple[str, ...]) -> Evaluation | None:
        if not names:
            return None
        assert names == ("held_out",)
        self.evaluated.append(step)
        return Evaluation(step, (SetLoss("held_out", self.losses[step], 10, {}),), 0.1)

    def evaluate(self, when: str, is_last: bool = False) -> None:
        TrainingLoop.evaluate(self, when, is_last)


def test_training_ends_where_the_loss_no_longer_falls(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "rank0_broadcast", lambda rank_info, problem, action: action())
    settings = ("eval.every=2", "eval.stop_after=2", "eval.at_start=true", "train.max_steps=20")
    losses = {0: 4.0, 2: 3.0, 4: 3.5, 6: 2.5, 8: 2.6, 10: 2.5}
    loop = EvaluatedLoop(plan_of(*settings), 20, losses)
    outcome = loop.run_to_end()
    assert (outcome.state, outcome.step) == ("completed", 10)
    ended = "10 steps; eval.stop_after: the loss on held_out has not fallen below 2.5000 (step 6) in 2 evaluations"
    assert outcome.message == f"{ended}; that step is not kept (see checkpoint.keep_best), so the last weights are used"
    assert loop.evaluated == [0, 2, 4, 6, 8, 10]
    assert loop.saved == [10]

    resumed = EvaluatedLoop(plan_of(*settings), 20, {8: 2.6, 10: 2.5})
    resumed.evaluations.early_stopping.restore(loop.evaluations.early_stopping.state() | {"num_without_improvement": 0})
    resumed.step = 6
    assert resumed.run_to_end().step == 10

    # The restored count is discarded if it was for other rows.
    other = EvaluatedLoop(plan_of(*settings), 20, {8: 2.6, 10: 2.5, 12: 2.4, 14: 2.6, 16: 2.6})
    other.evaluations.early_stopping.restore(loop.evaluations.early_stopping.state() | {"rows": "others"})
    other.step = 6
    assert other.run_to_end().step == 16


@pytest.mark.parametrize(("step", "evaluated"), [(4, [4, 6]), (5, [6]), (6, [6])], ids=["due", "not due", "last"])
def test_an_evaluation_that_a_preemption_skipped_is_made_after_the_resume(
    plan_of: PlanOf, step: int, evaluated: list[int]
) -> None:
    losses = {4: 2.0, 6: 1.0}
    stopped = EvaluatedLoop(plan_of("eval.every=4", "train.max_steps=6"), 6, losses)
    stopped.parts.meter.tokens = 0
    stopped.step = 4
    assert stopped._build_state()["is_evaluated"] is False
    stopped.evaluate("at step 4")
    assert stopped._build_state()["is_evaluated"] is True
    for is_missing in (True, False):
        resumed = EvaluatedLoop(plan_of("eval.every=4", "train.max_steps=6"), 6, losses)
        resumed.step, resumed.evaluations.is_missing = step, is_missing
        resumed.run_to_end()
        assert resumed.evaluated == (evaluated if is_missing else [6])
        assert resumed.recorded == [], "no checkpoint of these steps was loaded"


@pytest.mark.parametrize(("step", "saved"), [(4, [6]), (6, [6])], ids=["due", "last"])
def test_an_evaluation_made_after_a_resume_is_recorded_for_the_checkpoint_instead_of_saved_again(
    plan_of: PlanOf, step: int, saved: list[int]
) -> None:
    plan = plan_of("eval.every=4", "train.max_steps=6", "eval.stop_after=2", "checkpoint.keep_best=1", "checkpoint.save_every=0")
    resumed = EvaluatedLoop(plan, 6, {4: 1.0, 6: 2.0})
    resumed.step = resumed.parts.checkpointer.saved_step = step
    resumed.evaluations.is_missing = True
    resumed.run_to_end()
    assert resumed.recorded == [(f"step-{step:08d}", {4: 1.0, 6: 2.0}[step])]
    assert resumed.saved == saved, "step 5 is none of the best"


def test_early_stopping_saves_the_best_weights_and_uses_them(
    plan_of: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "rank0_broadcast", lambda rank_info, problem, action: action())
    settings = ("eval.every=2", "eval.stop_after=2", "checkpoint.keep_best=1", "checkpoint.save_every=8")
    loop = EvaluatedLoop(plan_of(*settings), 20, {0: 4.0, 2: 3.0, 4: 3.5, 6: 2.5, 8: 2.6, 10: 2.5})
    loop.run.run_dir = RunDir(tmp_path)  # type: ignore[misc]
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)
    outcome = loop.run_to_end()
    # The improved steps (2 and 6), save_every (8), and the last step (10).
    assert loop.saved == [2, 6, 8, 10]
    assert outcome.checkpoint == tmp_path / "checkpoints" / "step-00000006"
    assert outcome.message.endswith("; the weights of step 6 are used")


def test_without_stop_after_all_steps_are_trained(plan_of: PlanOf) -> None:
    loop = EvaluatedLoop(plan_of("eval.every=2", "train.max_steps=6"), 6, {0: 1.0, 2: 2.0, 4: 3.0, 6: 4.0})
    assert loop.run_to_end().message == "6 steps"


def test_ranks_save_before_stopping_only_where_all_have_time(rank_server: RankServer, tmp_path: Path) -> None:
    first, second = rank_server.values("train_ranks:judge_saves", [[], []], tmp_path)
    assert first == second
    assert {name for name, fits in first.items() if not fits} == {
        *("long", "waited", "one is slow", "one has waited", "one was not asked"),
    }
    assert len(first) == 12


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(31, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = self.embedding(input_ids) + position_ids.unsqueeze(-1)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


class Model(nn.Module):
    """The part of a Hugging Face model that CausalLMLoss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.head = Decoder(), LossHead(8, 31, bias=False)

    def get_decoder(self) -> Decoder:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def get_output_embeddings(self) -> LossHead:
        return self.head


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_a_step_never_synchronises_with_the_gpu(kind: str) -> None:
    torch.manual_seed(0)
    device, on_gpu = torch.device(kind), kind == "cuda"
    model = CausalLMLoss(Model(), flatten=False).to(device)
    timer, probe = StepTimer(device), LayerTimer(model, device)
    ids, positions = torch.randint(0, 31, (2, 16)), torch.arange(16).repeat(2, 1)
    labels = torch.where(torch.arange(16) % 2 == 0, ids.roll(-1, 1), IGNORED)
    rows = [tensor.pin_memory() if on_gpu else tensor for tensor in (ids, positions, labels)]

    def step() -> Tensor:
        timer.begin()
        summed = torch.zeros((), dtype=torch.float32, device=device)
        for _ in range(2):
            with timer.part("fwd_bwd"):
                inputs = (tensor.to(device, non_blocking=True) for tensor in rows[:2])
                loss = model(*inputs, rows[2], 0.5)
                loss.backward()
                summed += loss.detach()
        return pack_step(summed, "preempted", [0.5], device)

    expected = step().tolist()
    probe.read()
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        summed = step()
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    assert summed.tolist() == pytest.approx(expected, rel=1e-4)
    assert summed.tolist()[1:] == [float(reason == "preempted") for reason in STOP_REASONS] + [0.5]
    times = timer.read()
    assert 0 < times["time/fwd_bwd_s"] <= times["time/step_s"]
    assert math.isfinite(per_token := probe.read())
    assert per_token > 0


def evaluation(step: int, loss: float, name: str = "forgetting") -> Evaluation:
    return Evaluation(step, (SetLoss(name, loss, 100, {}),), 1.0)


def plan_of(folder: Path, rows: str = "1", **settings: object) -> LaunchPlan:
    values = {**hand_made.SETTINGS, "eval": {"forgetting": True, **settings}}
    return hand_made.plan(folder, values, eval_sets={"forgetting": DATA.model_copy(update={"digest": rows})})


def test_a_loss_far_above_that_before_training_is_an_alert(tmp_path: Path) -> None:
    check = ForgettingCheck(RunDir(tmp_path), plan_of(tmp_path))
    assert check.find_rise(evaluation(0, 2.0)) is None
    assert check.find_rise(evaluation(10, 2.09)) is None
    assert check.find_rise(evaluation(20, 9.0, "support")) is None
    alert = check.find_rise(evaluation(20, 2.5))
    assert alert is not None
    assert alert.startswith(
        "the model is forgetting: the loss on general text is 2.5000, 25% above its value before training (2.0000)"
    )


def test_after_a_resume_the_loss_before_training_is_read_from_the_metrics(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "a")
    run = hand_made.run(plan)
    assert ForgettingCheck(run, plan).find_rise(evaluation(20, 2.5)) is None
    log = JsonlTracker(run, 1)
    log.log(0, {"eval/forgetting/loss": 2.0})
    log.log(10, {"eval/forgetting/loss": 2.01})
    assert ForgettingCheck(run, plan).find_rise(evaluation(20, 2.5)) is not None
    assert ForgettingCheck(None, plan).find_rise(evaluation(20, 2.5)) is None
    other = plan_of(tmp_path / "a", rows="2")
    assert ForgettingCheck(run, other).find_rise(evaluation(20, 2.5)) is None, "the loss before training is of other rows"
