"""Functions for the ranks of the tests of initial weights, over gloo; tests/forked_ranks.py runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file
from train_ranks import meet
from transformers.integrations import HfDeepSpeedConfig

from launcher.checkpoint.initial_weights import stored_buffers
from launcher.config.sections.model import ModelSection
from launcher.plan.architecture import model_facts
from launcher.train.model import build_model


def read_own_parts(cases: list[tuple[str, str, str, int]]) -> list[tuple[int, int, list[str]]]:
    """Load models under ZeRO-3.

    Each case is a folder, a file of the expected weights, the model's dtype, and the ranks that share a copy with hpZ. Return for
    each this rank's total bytes read, its largest read, and the parameters and buffers that differ from the expected ones.
    Buffers are also compared in a model whose weights a checkpoint replaces.
    """
    meet()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    results = []
    preadv = os.preadv
    for folder, expected_file, dtype, hpz_ranks in cases:
        zero = {"stage": 3, "zero_hpz_partition_size": hpz_ranks}
        settings = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        partitioned = HfDeepSpeedConfig({**settings, "bf16": {"enabled": dtype == "bf16"}})
        read = [0]

        def count(*arguments: Any, read: list[int] = read) -> int:
            read.append(preadv(*arguments))
            return read[-1]

        os.preadv = count  # type: ignore[assignment]
        facts = model_facts(json.loads((Path(folder) / "config.json").read_text()), folder, folder, None)
        section = ModelSection(path=folder, dtype=dtype)
        model = build_model(section, facts, "cpu", 64)
        os.preadv = preadv  # type: ignore[assignment]
        for_checkpoint = build_model(section, facts, "cpu", 64, has_checkpoint=True)
        del partitioned
        expected = load_file(expected_file)
        differing = []
        for built in (model, for_checkpoint):
            buffers = stored_buffers(built.hf)
            differing += [name for name, buffer in buffers.items() if not torch.equal(buffer, expected[name])]
        for name, parameter in model.parameters_by_name().items():
            # As in a pass; GatheredParameters does not read hpZ's second copy.
            parameter.all_gather_coalesced([parameter]).wait()
            # Only without ZeRO-3 does transformers keep some routers in fp32.
            if not torch.equal(parameter.data, expected[name].to(parameter.dtype)):
                differing.append(name)
            parameter.partition()
        results.append((sum(read), max(read), differing))
    return results
