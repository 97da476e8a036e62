"""Masks by the generation marks of a template, which are held against what the assistant says."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_families import (
    MULTI,
    SINGLE,
    TOOLS,
    Family,
    assistant,
    chat,
    encode,
    marked,
    user,
)

from launcher.data.sources import Message
from launcher.errors import DataError

MARKS_NO_END = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TWO_MARKS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %} -> {% generation %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


MARKED = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
CALLS = "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
# Each message as BODY, behind its role and the definitions of the tools.
EACH = "{{ tools | tojson }}{% for m in messages %}{{ m.role }}:BODY{% endfor %}"
ONE_MARK = "{% generation %}" + EACH.replace("BODY", "{{ m.content }}") + "{% endgeneration %}"
CALLS_UNMARKED = (
    f"{{% if m.tool_calls %}}{CALLS}{{% elif m.role == 'assistant' %}}{MARKED}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
)
FIRST = MARKED.replace("m.content", "messages[0].content")
OTHER = "marks text as generated that is not the assistant's"
OUTSIDE = "marks text as generated that the assistant does not say"
ECHO = (user("Say yes."), assistant("yes"), user("Say no."), assistant("no"))


@pytest.mark.parametrize(
    ("template", "messages", "words", "place"),
    [
        (EACH.replace("BODY", MARKED), SINGLE, OUTSIDE, "rows.jsonl:1"),
        (EACH.replace("BODY", MARKED), MULTI, OUTSIDE, "rows.jsonl:1"),
        (EACH.replace("BODY", MARKED), (*SINGLE, assistant("And?")), OUTSIDE, "rows.jsonl:1"),
        (
            EACH.replace("BODY", "{{ m.content }}{% if m.role == 'assistant' %}" + FIRST + "{% endif %}"),
            SINGLE,
            OTHER,
            "messages[1]",
        ),
        # As many marks as answers, each with the text of one in it.
        (ONE_MARK, SINGLE, "marks what the user says", "messages[0]"),
        (
            EACH.replace("BODY", f"{{% if m.role == 'user' %}}{MARKED}{{% else %}}{{{{ m.content }}}}{{% endif %}}"),
            ECHO,
            "marks what the user says",
            "messages[0]",
        ),
        (
            EACH.replace("BODY", "{{ m.content }}{% generation %}<|im_end|>{% endgeneration %}"),
            SINGLE,
            OUTSIDE,
            "rows.jsonl:1",
        ),
        (EACH.replace("BODY", CALLS_UNMARKED), TOOLS, "does not mark what the assistant says here", "messages[1]"),
        (
            EACH.replace(
                "BODY",
                "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}"
                "<|im_end|>{% endgeneration %}{{ m.tool_calls | tojson if m.tool_calls }}{% else %}{{ m.content }}{% endif %}",
            ),
            TOOLS,
            "marks only a part",
            "messages[1]",
        ),
    ],
)
def test_generation_marks_around_other_text_are_refused(
    family: Family, tmp_path: Path, template: str, messages: tuple[Message, ...], words: str, place: str
) -> None:
    file = tmp_path / "marks.jinja"
    file.write_text(template)
    with pytest.raises(DataError, match=words) as caught:
        encode(family("chatml_marked"), chat(*messages), chat_template=str(file))
    problem = caught.value.problems[0]
    assert problem.value == str(file)
    assert problem.where.endswith(place)
    assert "generation marks" in problem.remedy


def test_an_untrained_turn_needs_no_generation_marks(family: Family, tmp_path: Path) -> None:
    tokenizer = family("chatml_marked")
    file = tmp_path / "marks.jinja"
    answer = f"{{% if m.role == 'assistant' and loop.last %}}{MARKED}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    file.write_text(EACH.replace("BODY", answer))
    settings = {"chat_template": str(file)}
    expected = "nulluser:1+1?assistant:2user:And 2+2?assistant:⟦4<|im_end|>⟧"
    assert marked(tokenizer, encode(tokenizer, chat(*MULTI), train_on="last_turn", **settings)) == expected
    first_left_out = (MULTI[0], assistant("2", weight=0), *MULTI[2:])
    assert marked(tokenizer, encode(tokenizer, chat(*first_left_out), **settings)) == expected
    with pytest.raises(DataError, match="marks other parts of a message once a later one follows"):
        encode(tokenizer, chat(*MULTI), **settings)


def test_generation_marks_are_the_trained_spans(family: Family, tmp_path: Path) -> None:
    tokenizer = family("chatml_marked")
    file = tmp_path / "marks.jinja"
    file.write_text(MARKS_NO_END)
    encoded = encode(tokenizer, chat(*SINGLE), chat_template=str(file))
    assert marked(tokenizer, encoded) == "user:Hiassistant:⟦Hello.⟧<|im_end|>"
    assert encoded.turn_ends == ()
    file.write_text(TWO_MARKS)
    encoded = encode(tokenizer, chat(*MULTI), chat_template=str(file), train_on="last_turn")
    assert marked(tokenizer, encoded) == "user:1+1?assistant:2 -> <|im_end|>user:And 2+2?assistant:⟦4⟧ -> ⟦<|im_end|>⟧"
    assert len(encoded.turn_ends) == 1
