from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from launcher.config.data import DataSection
from launcher.data.build import build
from launcher.data.report import render, report


def test_the_report_counts_and_shows_the_masks(section: Callable[..., DataSection], tokenizer_dir: Path) -> None:
    facts = build(section(eval_fraction=0.2), str(tokenizer_dir))
    numbers = report(facts, str(tokenizer_dir), num_examples=2)
    assert json.loads(json.dumps(numbers)) == numbers
    assert sum(bin_["documents"] for bin_ in numbers["length_histogram"]) == numbers["documents"] == facts.num_docs
    assert numbers["documents_with_turn_end"] + facts.truncated_docs >= facts.num_docs
    assert numbers["trained_frac"] == facts.num_trained_tokens / facts.num_tokens
    assert numbers["held_out"]["documents"] + facts.num_docs == 200
    for example in numbers["examples"]:
        assert [part["trained"] for part in example] in ([False, True, False], [False, True])
        assert example[0]["text"].endswith("<|im_start|>assistant\n")
        assert example[1]["text"].startswith("0")
    text = render(numbers)
    assert text.count("⟦0") == 2
    assert text.count("⟦") == text.count("⟧")
    assert f"{facts.num_rows:,}" in text
    assert f"{facts.num_trained_tokens:,}" in text
