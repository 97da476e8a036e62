from __future__ import annotations

import pytest

from launcher.config.sections.data import ChecksSection
from launcher.data.checks.findings import Example, Finding, judge, refuse
from launcher.errors import DataError

LEAK = Finding("held_out_in_train", 3, 100, {"a": 3}, (Example("a.jsonl:7", "the same as a.jsonl:2"),))
SECRET = Finding("secrets", 1, 1000, {"a": 1}, (Example("a.jsonl:9", "[API key: s…, 40 characters]"),))
NO_END = Finding("no_turn_end", 50, 1000, {"a": 50}, (Example("a.jsonl:1", "no end of turn is trained"),), highest_share=0.6)


def test_the_settings_of_the_run_decide_what_is_fatal() -> None:
    judged = judge((SECRET, LEAK, NO_END), ChecksSection())
    assert [(one.finding.name, one.action, one.fatal) for one in judged] == [
        ("held_out_in_train", "fail", True),
        ("no_turn_end", "fail", True),
        ("secrets", "keep", False),
    ]
    lenient = ChecksSection(held_out_in_train="keep", no_turn_end="keep", secrets="fail")
    assert [(one.finding.name, one.fatal) for one in judge((LEAK, NO_END, SECRET), lenient)] == [
        ("secrets", True),
        ("held_out_in_train", False),
        ("no_turn_end", False),
    ]


def test_near_leaks_refuse_a_run_if_the_settings_say_fail() -> None:
    near = Finding("near_held_out_in_train", 3, 100, {"a": 3}, LEAK.examples)
    strict = ChecksSection(near_held_out_in_train="fail")
    for checks, fatal in ((ChecksSection(), False), (strict, True)):
        (judged,) = judge((near,), checks)
        assert judged.fatal is fatal


@pytest.mark.parametrize(("share", "fatal"), [(0.99, False), (1.0, True)])
def test_a_whole_source_without_a_trained_token_refuses_a_run(share: float, fatal: bool) -> None:
    (judged,) = judge((Finding("no_trained_token", 99, 200, {"a": 99}, LEAK.examples, share),), ChecksSection())
    assert judged.fatal is fatal


def test_a_refusal_names_the_places_and_the_setting_that_accepts_it() -> None:
    with pytest.raises(DataError) as caught:
        refuse((SECRET, LEAK, NO_END), ChecksSection())
    first, second = caught.value.problems
    assert first.message == (
        "3 of 100 (3.0%): held-out documents that are also in the training split, ignoring case, white space and punctuation. "
        "The evaluation loss is too low"
    )
    assert (first.where, first.value) == ("a.jsonl:7", "the same as a.jsonl:2")
    assert first.remedy.endswith("data.checks.held_out_in_train=keep")
    assert second.remedy.endswith("data.checks.no_turn_end=keep")
    refuse((SECRET, LEAK, NO_END), ChecksSection(held_out_in_train="keep", no_turn_end="keep"))
    refuse((), ChecksSection())
