"""Findings of the data checks (findings.json in the cache): counts, examples, and whether the settings of a run accept them.

No torch, no transformers: the submit side reads the findings before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.config.sections.data import ChecksSection
from launcher.errors import DataError, Problem

FILE = "findings.json"
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class CheckText:
    """The texts of a check: `title` names the documents, `meaning` is the effect on training, `remedy` the fix."""

    title: str
    meaning: str
    remedy: str


_REPEATED = "The model sees them more often than other documents"
_KEEP_FIRST = "set the check to drop: it keeps one copy, in the source of which the mixture takes the largest share"
_MEMORIZED = "A model can repeat what it was trained on"

# Each check, by its name in data.checks.
CHECKS = {
    "bad_rows": CheckText(
        "rows that cannot be used, and are left out",
        "The model trains on less data than the files contain",
        "repair the rows; without data.checks.bad_rows=drop, all of them are listed",
    ),
    "no_trained_token": CheckText(
        "documents without a trained token in the part that fits a row",
        "They add nothing to the loss",
        "give the rows an answer; if it is cut off, raise data.max_length; remove a source without answers from data.sources",
    ),
    "truncated": CheckText(
        "documents that are cut off because they are longer than a row",
        "The model does not see how they end, and may learn to stop early or never",
        "raise data.max_length, or set data.long_documents to split",
    ),
    "dropped": CheckText(
        "documents that are left out",
        "The model trains on less data than the sources contain, and not on a representative sample",
        "for long documents raise data.max_length, or set data.long_documents to split; otherwise repair the rows",
    ),
    "unsure_border": CheckText(
        "documents whose trained part begins or ends inside a token",
        "The loss mask cannot separate the trained text from the rest",
        "begin a completion with the space before its first word, or with a whole word",
    ),
    "no_turn_end": CheckText(
        "documents that train no end-of-turn token",
        "A model trained on them may not stop after its answer",
        "if documents are cut off, raise data.max_length, or set data.long_documents to split or drop; otherwise use a chat "
        "template that ends the assistant's turn with a special token (data.chat_template=FILE)",
    ),
    "held_out_in_train": CheckText(
        "held-out documents that are also in the training split, ignoring case, white space and punctuation",
        "The evaluation loss is too low",
        "remove them from one of the two files, or set the check to drop, which removes them from training",
    ),
    "near_held_out_in_train": CheckText(
        "held-out documents that are nearly identical to a training document",
        "The evaluation loss may be too low",
        "look at the examples; to remove the similar documents from training, set the check to drop",
    ),
    "held_out_prompt_in_train": CheckText(
        "held-out documents whose prompt is also in the training split, with another answer",
        "The evaluation shows how well the model knows these prompts, not how well it answers others",
        "keep all answers to a prompt in one of the two splits (data.eval_fraction does so), or set the check to drop, which "
        "removes the training documents with these prompts",
    ),
    "similar_prompt_in_train": CheckText(
        "held-out documents whose prompt differs from a training prompt only in its numbers",
        "The evaluation shows how well the model fills in these templates, and may say little about other questions",
        "look at the examples; evaluate on questions of another form (data.eval_path)",
    ),
    "not_compared": CheckText(
        "documents that were not compared with all possible near duplicates",
        "Near duplicates between the training and the held-out split may be missed: too many rows share a template",
        "compare some of these rows by eye",
    ),
    "empty_answer": CheckText(
        "documents with an empty answer",
        "The model learns to answer with nothing",
        "write the answers",
    ),
    "exact_duplicate": CheckText(
        "training documents that repeat an earlier one, ignoring case, white space and punctuation",
        _REPEATED,
        _KEEP_FIRST,
    ),
    "near_duplicate": CheckText(
        "training documents that are nearly identical to an earlier one",
        _REPEATED,
        f"look at the examples; {_KEEP_FIRST}",
    ),
    "broken_encoding": CheckText(
        "documents with wrongly decoded text",
        "The model learns to write such characters",
        "save the source in UTF-8, or repair it with ftfy",
    ),
    "special_token_in_text": CheckText(
        "documents whose text contains special tokens",
        "They can end a turn too early, or teach the model to write another model's tokens as text",
        "remove them from the rows: the chat template writes the special tokens",
    ),
    "split_control_token": CheckText(
        "conversations with control tokens of the chat template that this tokenizer splits into several tokens",
        "The model reads them as text. Some models were trained this way; for others, the template belongs to another tokenizer",
        "look at the examples; use the model's own chat template (data.chat_template=null), or one with tokens of this tokenizer",
    ),
    "role_order": CheckText(
        "conversations whose roles are out of order",
        "A chat template may refuse them, or write them in a form that never occurs at inference",
        "begin with the user, alternate user and assistant, and end with the assistant",
    ),
    "repetitive_answer": CheckText(
        "documents with an answer that repeats itself",
        "The model learns to repeat itself",
        "look at the examples, and remove the rows if the repetition is a fault",
    ),
    "long_answer": CheckText(
        "documents with a very long answer",
        "The loss weights every token equally, so long answers dominate it",
        "look at the examples",
    ),
    "secrets": CheckText(
        "documents with text that looks like a key or a password",
        _MEMORIZED,
        "replace keys and passwords with made-up ones",
    ),
    "personal_data": CheckText(
        "documents with text that looks like an e-mail address or a telephone number",
        _MEMORIZED,
        "replace them with made-up ones if they belong to real people",
    ),
    "few_examples": CheckText(
        "documents to train on, fewer than usual",
        "The model may hardly change, or memorize them",
        "add documents, and hold some out to see whether they are enough",
    ),
}

# If these are accepted, their documents are not trained.
_NOT_TRAINED = ("bad_rows", "no_trained_token", "dropped")

# Documents in both splits; drop removes the training documents.
LEAKS = ("held_out_in_train", "near_held_out_in_train", "held_out_prompt_in_train")
# Checks that look at the held-out documents.
OF_HELD_OUT = (*LEAKS, "similar_prompt_in_train")
# Checks that accept a share of the documents.
LIMITS = {**dict.fromkeys(OF_HELD_OUT, 0.01), "truncated": 0.2, "dropped": 0.2, "bad_rows": 0.05}
# A model that sees more documents without an end of turn than with one hardly learns to stop.
MAX_SHARE_WITHOUT_TURN_END = 0.5


@dataclass(frozen=True)
class CheckHit:
    """A check that a document failed. `detail` contains no secret; `others` are the indices of similar documents."""

    finding: str
    detail: str
    others: tuple[int, ...] = ()


# Each with the index of its document.
Hits = list[tuple[int, CheckHit]]


@dataclass(frozen=True)
class Example:
    """A place (file:line) and the text that the check found there, with secrets redacted."""

    where: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """`count` of `total` documents that a check found; `sources` counts them by source name.

    `highest_share` is the largest share in any one source, among the documents that the check looks at.
    """

    name: str
    count: int
    total: int
    sources: Mapping[str, int]
    examples: tuple[Example, ...]
    highest_share: float = 0.0

    @property
    def title(self) -> str:
        return CHECKS[self.name].title

    @property
    def share(self) -> float:
        return self.count / max(1, self.total)

    @property
    def setting(self) -> str | None:
        """The setting that decides about it; None if it only informs."""
        return f"data.checks.{self.name}" if self.name in ChecksSection.model_fields else None


@dataclass(frozen=True)
class JudgedFinding:
    """A finding under the settings of a run: `action` is keep, drop or fail; if it is `fatal`, the run is refused.

    `limit` is the share above which fail refuses it.
    """

    finding: Finding
    action: str
    fatal: bool
    limit: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the finding with its texts, share, setting and action, for `--json`."""
        text = CHECKS[self.finding.name]
        return {
            **asdict(self.finding),
            "examples": [asdict(example) for example in self.finding.examples],
            "title": text.title,
            "meaning": text.meaning,
            "share": self.finding.share,
            "setting": self.finding.setting,
            "action": self.action,
            "fatal": self.fatal,
            "limit": self.limit,
            "accepted_by": _get_accepting_setting(self.finding),
            "remedy": text.remedy,
        }


Findings = tuple[Finding, ...]


def write(folder: str | Path, findings: Findings) -> None:
    """Write findings.json into the folder of a cache."""
    Path(folder, FILE).write_text(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1), "utf-8")


def read(folder: str | Path) -> Findings:
    """Return the findings of the cache in `folder`."""
    rows = json.loads(Path(folder, FILE).read_bytes())
    return tuple(Finding(**{**row, "examples": tuple(Example(**example) for example in row["examples"])}) for row in rows)


def judge(findings: Findings, checks: ChecksSection) -> tuple[JudgedFinding, ...]:
    """Judge each finding by the settings `checks`; findings that refuse the run come first."""
    judged = []
    for finding in findings:
        action, limit = get_action(finding.name, checks), LIMITS.get(finding.name, 0.0)
        if finding.name == "no_trained_token" and action == "drop":
            # Nothing would be left of a source.
            is_fatal = finding.highest_share == 1
        elif finding.name == "bad_rows":
            is_fatal = finding.share > limit and checks.dropped == "fail"
        elif finding.name == "no_turn_end":
            limit = MAX_SHARE_WITHOUT_TURN_END
            is_fatal = action == "fail" and finding.highest_share > limit
        else:
            is_fatal = action == "fail" and finding.share > limit
        judged.append(JudgedFinding(finding, action, is_fatal, limit))
    return tuple(sorted(judged, key=lambda one: not one.fatal))


def get_action(name: str, checks: ChecksSection) -> str:
    """Return what happens to the documents that the check `name` finds: keep, drop or fail."""
    return str(getattr(checks, name, "drop" if name == "unsure_border" else "keep"))


def problems(findings: Findings, checks: ChecksSection) -> list[Problem]:
    """Return the findings that the settings do not accept, each with its places and the setting that accepts it."""
    refused = []
    for finding in (one.finding for one in judge(findings, checks) if one.fatal):
        text = CHECKS[finding.name]
        trained = "on the others" if finding.name in _NOT_TRAINED else "on them anyway"
        # A small share of all documents may be all documents of one source.
        highest = f", {share_text(finding.highest_share)} of one source" if finding.highest_share > finding.share else ""
        refused.append(
            Problem(
                f"{finding.count:,} of {finding.total:,} ({share_text(finding.share)}{highest}): {text.title}. {text.meaning}",
                where="; ".join(example.where for example in finding.examples),
                value="; ".join(example.detail for example in finding.examples),
                remedy=f"{text.remedy}; to train {trained}: {_get_accepting_setting(finding)}",
            )
        )
    return refused


def refuse(findings: Findings, checks: ChecksSection) -> None:
    """Refuse a run whose data has findings that the settings do not accept. Raises DataError with `problems`."""
    if refused := problems(findings, checks):
        raise DataError(refused)


def share_text(share: float) -> str:
    """Format a share above 0 in percent, never as 0.0%."""
    return f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def _get_accepting_setting(finding: Finding) -> str:
    """Return the setting with which a fatal finding no longer refuses the run."""
    return "data.checks.dropped=keep" if finding.name == "bad_rows" else f"{finding.setting}=keep"
