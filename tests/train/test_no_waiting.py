"""The loop's own code queues work on the GPU during a step and never waits for it; timings are read at the end.

The decoder is a plain stack of layers, because waits inside transformers and DeepSpeed are not tested here.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from launcher.data.loader import IGNORED
from launcher.distributed import STOP_REASONS, pack_step
from launcher.train.loss import LossHead
from launcher.train.model import CausalLMLoss
from launcher.train.monitoring.rank_timing import LayerTimer
from launcher.train.monitoring.step_metrics import StepTimer

ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


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
