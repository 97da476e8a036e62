"""The answer metrics."""

from __future__ import annotations

from time import monotonic

import pytest

from launcher.evaluate.metrics import METRICS, GeneratedAnswer, MetricOptions, first_label, without_thoughts


def score(metric: str, text: str, reference: str = "", **options: object) -> float:
    return METRICS[metric].score(GeneratedAnswer(text, True, 3), reference, MetricOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "metric, text, reference, expected",
    [
        ("exact_match", " The Eiffel Tower. ", "eiffel tower", 1),
        ("exact_match", "-5", "5", 0),
        ("exact_match", "A", "the", 0),
        ("exact_match", " ... ", "...", 1),
        ("exact_match", "Über  uns", "ÜBER UNS", 1),
        ("token_f1", "the cat sat down", "a cat sat", 2 * 2 / (3 + 2)),
        ("rouge_l", "police kill the gunman", "police killed the gunman", 0.75),
        ("rouge_l", "", "word", 0),
        ("numeric", "so 5 + 7 = 12 apples", "5+7=<<5+7=12>>12\n#### 12", 1),
        ("numeric", "#### 1,234\nand then 99", "#### 1234.0", 1),
        ("numeric", "The answer is 7, not 8.", "7", 1),
        ("numeric", "minus: −7", "-7", 1),
        ("numeric", "none", "7", 0),
        ("numeric", "about 1,23", "23", 0),
        ("numeric", "at 10:30", "30", 0),
        ("numeric", "So it is:\n\n- 42", "42", 1),
        ("numeric", "2^10", "2", 0),
        ("numeric", "\\frac{-3}{4}", "-3/4", 1),
        ("numeric", "1" + ",000" * 1440, "1", 0),
        ("numeric", "a probability of .5", "0.5", 1),
        ("numeric", "about 1e3", "1000", 1),
        ("numeric", "1e99999999999999999999", "7", 0),
        ("numeric", "0.5", "1/2", 1),
        ("numeric", "3 \\times 10^{8}", "300,000,000", 1),
        ("numeric", "12 m^2 of H2O", "12", 1),
        ("numeric", "-$5", "5", 0),
        ("numeric", "答案是４２", "42", 1),
        ("exact_match", "东京。", "东京", 1),
        ("token_f1", "东京是日本的首都", "东京是日本首都", 14 / 15),
        ("valid_json", 'Here:\n```json\n{"a": 1}\n```', "", 1),
        ("valid_json", '{"a": NaN}', "", 0),
        ("valid_json", "[" * 100_000, "", 0),
        ("field_f1", '{"a": "The X", "b": [2, 1]}', '{"b": [1, 2.0], "a": "x"}', 1),
        ("field_f1", '{"a": 1, "b": 2}', '{"a": 1, "c": 2}', 0.5),
        ("field_f1", "no", '{"a": 1}', 0),
        ("field_f1", '{"a": 1, "b": ' + "9" * 400 + "}", '{"a": 1}', 2 / 3),
        ("field_f1", "9007199254740993", "9007199254740992", 0),
        ("no_repetition", "one two three four five", "", 1),
        ("no_repetition", "a b c d a b c d a b c d", "", 4 / 9),
    ],
)
def test_scores(metric: str, text: str, reference: str, expected: float) -> None:
    assert score(metric, text, reference) == pytest.approx(expected)


def test_an_answer_that_was_cut_has_not_stopped() -> None:
    assert METRICS["stopped"].score(GeneratedAnswer("x", False, 9), "", MetricOptions()) == 0
    assert METRICS["stopped"].score(GeneratedAnswer("x", True, 9), "", MetricOptions()) == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I think it is very bad", 1),
        ('{"label":"very bad"}', 1),
        ("Very bad—do not see it", 1),
        ("good, not very bad", 0),
        ("bad", 0),
    ],
)
def test_the_first_label_that_is_named_counts(text: str, expected: float) -> None:
    assert score("label_accuracy", text, "very bad", labels=("good", "bad", "very bad")) == expected


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The answer is A.", "A"),
        ("a) because a cat is no dog", "A"),
        ("(A) or B", "A"),
        ("It is a B.", "B"),
        ("cat", "The cat"),
        ("a dog", None),
    ],
)
def test_an_article_may_be_a_label(text: str, label: str | None) -> None:
    assert first_label(text, ("B", "The cat", "A")) == label


def test_deep_json_ends_no_evaluation() -> None:
    # Some depths exceed the parser's limit, others only the recursion limit of the scoring.
    for depth in range(800, 1_000):
        text = "[" * depth + "]" * depth
        assert score("field_f1", text, '{"a": 1}') == 0


def test_a_regular_expression() -> None:
    assert score("regex", "Order 66 sent", pattern=r"order \d+") == 0
    assert score("regex", "Order 66 sent", pattern=r"(?i)order \d+") == 1
    boxed = r"\\boxed\{(?P<answer>[^}]*)\}"
    assert score("regex", r"first \boxed{3}, then \boxed{4}", r"\boxed{4}", pattern=boxed) == 1
    assert score("regex", r"\boxed{4}", "4", pattern=boxed) == 1
    assert score("regex", "4", "4", pattern=boxed) == 0


@pytest.mark.parametrize(
    "metric, reference, part",
    [
        ("numeric", "none", "no number"),
        ("numeric", "at 10:30", "a time, a date, a power or a decimal comma"),
        ("numeric", "2024-01-05", "a time, a date"),
        ("numeric", "4,5", "a decimal comma"),
        ("field_f1", "x", "not JSON"),
        ("label_accuracy", "neutral", "none of the labels good, bad"),
    ],
)
def test_references_that_a_metric_cannot_use(metric: str, reference: str, part: str) -> None:
    options = MetricOptions(labels=("good", "bad"))
    assert part in METRICS[metric].reference_problem(reference, options)
    assert METRICS[metric].reference_problem('{"good": 1}', options) == ""
    assert METRICS["numeric"].reference_problem("3, 4/5", options) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n\n</think>\n\nBlue 42", "Blue 42"),
        ("Is it 7? No.\n</think>\n42", "42"),
        ("[THINK]It is 7.[/THINK]42", "42"),
        ("<think>It is", ""),
        ("I think it is 42", "I think it is 42"),
    ],
)
def test_thoughts_are_not_part_of_an_answer(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer


def test_endless_thoughts_are_repetitions() -> None:
    text = "<think>" + "wait no, let me think. " * 200
    assert METRICS["no_repetition"].with_thoughts
    assert score("no_repetition", text) < 0.02


@pytest.mark.parametrize("text", ["9" * 60_000, "1/" * 30_000, "1 " * 30_000])
def test_long_answers_are_read_at_once(text: str) -> None:
    began = monotonic()
    score("numeric", f"{text}x 10", "10")
    assert monotonic() - began < 10
