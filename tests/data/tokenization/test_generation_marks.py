"""Loss masks from a template's generation marks, which are checked against the assistant's messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_families import (
    MULTI,
    SINGLE,
    TEMPLATES,
    TOOLS,
    Family,
    assistant,
    chat,
    encode,
    marked,
    user,
)

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.documents import Message
from launcher.data.tokenization.encoder import Encoder
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
# The tool definitions, then each message as its role and BODY.
EACH = "{{ tools | tojson }}{% for m in messages %}{{ m.role }}:BODY{% endfor %}"
ONE_MARK = "{% generation %}" + EACH.replace("BODY", "{{ m.content }}") + "{% endgeneration %}"
CALLS_UNMARKED = (
    f"{{% if m.tool_calls %}}{CALLS}{{% elif m.role == 'assistant' %}}{MARKED}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
)
FIRST = MARKED.replace("m.content", "messages[0].content")
OTHER = "marks text that is not the assistant's as generated"
# The marked part begins after BEFORE.
CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}BEFORE{% generation %}HEADER{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEXT_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>"
    "{% if not loop.last %}<|im_start|>user\n{% endif %}{% endgeneration %}"
    "{% else %}{% if loop.first %}<|im_start|>user\n{% endif %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OUTSIDE = "marks text that the assistant does not say as generated"
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
        # There are as many marks as answers, and each contains an answer.
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
        (
            CHATML.replace("BEFORE", "").replace("HEADER", "<|im_start|>assistant\n"),
            MULTI,
            "marks the header of the assistant's turn",
            "messages[1]",
        ),
        (CHATML.replace("BEFORE", "<|im_start|>").replace("HEADER", "assistant\n"), SINGLE, "marks the header", "messages[1]"),
        (NEXT_HEADER, MULTI, "marks text after the assistant's end of turn", "messages[1]"),
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


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_marks_may_cover_reasoning_that_the_template_writes(family: Family, tmp_path: Path, opened: str) -> None:
    """The generation prompt may also open the reasoning."""
    tokenizer = family("chatml_marked")
    file = tmp_path / "marks.jinja"
    written = CHATML.replace("BEFORE", "<|im_start|>assistant\n").replace("HEADER", "<think>\n\n</think>\n\n")
    file.write_text(written.replace("<|im_start|>assistant\n{% endif %}", f"<|im_start|>assistant\n{opened}{{% endif %}}"))
    shown = marked(tokenizer, encode(tokenizer, chat(*MULTI), chat_template=str(file)))
    assert shown.count("<|im_start|>assistant\n⟦<think>\n\n</think>\n\n") == 2
    assert shown.count("<|im_end|>⟧") == 2


def test_control_tokens_that_the_tokenizer_splits_are_named(family: Family) -> None:
    template = TEMPLATES / "llama3.jinja"
    with pytest.raises(DataError, match=r"ends the assistant's turn with <\|eot_id\|>, which is not a token of this tokenizer"):
        encode(family("chatml_marked"), chat(*SINGLE), chat_template=str(template))
    encoder = Encoder(
        family("chatml_marked"), DataSection(sources=(Source(path="a"),), chat_template=str(TEMPLATES / "mistral.jinja"))
    )
    assert {"[INST]", "[/INST]"} <= set(encoder.split_tokens)
    assert Encoder(family("llama3"), DataSection(sources=(Source(path="a"),))).split_tokens == ()
