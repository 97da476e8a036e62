"""What is wrong with the documents of a data cache: counts and places, and what the settings say about them.

`findings.json` lies in the cache and holds what was found; whether a finding stops a run is told from the settings that the
run has now. No torch, no transformers: the submit side reads it before anything is started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.config.data import ChecksSection
from launcher.errors import DataError, Problem

FILE = "findings.json"
NUM_EXAMPLES = 3

# Each check by its name in data.checks: what was found, and what a person does about it.
TITLES = {
    "no_trained_token": "documents without a trained token within a row",
    "unsure_border": "documents whose trained part does not begin and end between two tokens",
    "no_turn_end": "documents that train no end of turn",
    "held_out_in_train": "held-out documents that also stand in training, but for case and white space",
    "near_held_out_in_train": "held-out documents that are nearly the same as one in training",
    "not_compared": "documents that were not compared with all that may be nearly the same",
    "empty_answer": "answers that are empty or white space",
    "exact_duplicate": "documents that stand in training before, but for case and white space",
    "near_duplicate": "documents that are nearly the same as one before them",
    "broken_encoding": "documents whose text was decoded wrongly",
    "special_token_in_text": "documents whose text holds special tokens",
    "role_order": "conversations whose roles are out of order",
    "repetitive_answer": "answers that repeat themselves",
    "long_answer": "very long answers",
    "secrets": "documents with what looks like a key or a password",
    "personal_data": "documents with what looks like an e-mail address or a telephone number",
    "few_examples": "documents to train on, which is few",
}
REMEDIES = {
    "no_trained_token": (
        "give them an answer, raise data.max_length where it is cut off, or take a source without any out of data.sources"
    ),
    "unsure_border": "let a completion begin with the space before its first word, or a word of its own",
    "no_turn_end": (
        "where it is cut off, raise data.max_length, or data.long_documents=split or drop; "
        "else use a chat template that ends the assistant's turn with a special token (data.chat_template=FILE)"
    ),
    "held_out_in_train": "take them out of one of the two files; drop takes them out of training",
    "near_held_out_in_train": "look at the examples; drop takes what is nearly the same out of training",
    "not_compared": "look at what is alike by eye, or raise data.checks.near_duplicate_threshold, with which fewer may be",
    "empty_answer": "write the answers",
    "exact_duplicate": "drop keeps the first of each, in the source of which the mixture takes most",
    "near_duplicate": "look at the examples; drop keeps the first of each, in the source of which the mixture takes most",
    "broken_encoding": "save the source in UTF-8, or repair it with ftfy",
    "special_token_in_text": "rows hold text alone: the template writes the special tokens",
    "role_order": "begin with the user, take turns, and end with the assistant",
    "repetitive_answer": "look at the examples",
    "long_answer": "look at the examples; data.checks.long_answer_tokens is the limit",
    "secrets": "replace them: a model repeats what it was trained on",
    "personal_data": "replace them, if they belong to people",
    "few_examples": "add examples, and hold some out to see whether they suffice",
}

# What accepts a fatal finding, where that is not keep, and what is then trained on, where that is not all as it is.
_ACCEPTED_BY = {"unsure_border": "drop"}
_THE_OTHERS = ("unsure_border", "no_trained_token")

# What stands on both sides: a share of the held-out documents is accepted, and training loses what is dropped.
LEAKS = ("held_out_in_train", "near_held_out_in_train")
# A model that has seen more documents without an end of turn than with one hardly learns to stop.
MOST_WITHOUT_TURN_END = 0.5


@dataclass(frozen=True)
class Example:
    """A place, as file:line, and what stands there, without any secret."""

    where: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """`count` of `total` documents that a check has hit; `sources` counts them by the source's name.

    `highest_share` is that of the source in which most documents are hit, in proportion to all that the check looks at.
    """

    name: str
    count: int
    total: int
    sources: Mapping[str, int]
    examples: tuple[Example, ...]
    highest_share: float = 0.0

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def share(self) -> float:
        return self.count / max(1, self.total)

    @property
    def setting(self) -> str:
        return f"data.checks.{self.name}"


@dataclass(frozen=True)
class JudgedFinding:
    """A finding under the settings of a run: its `action` is keep, drop or fail; `fatal`: the run is refused."""

    finding: Finding
    action: str
    fatal: bool

    def to_json(self) -> dict[str, Any]:
        """For programs: the finding with title, share, action, setting and remedy."""
        name = self.finding.name
        return {
            **asdict(self.finding),
            "examples": [asdict(example) for example in self.finding.examples],
            "title": self.finding.title,
            "share": self.finding.share,
            "setting": self.finding.setting,
            "action": self.action,
            "fatal": self.fatal,
            "accepted_by": _accepted_by(self.finding),
            "remedy": REMEDIES[name],
        }


Findings = tuple[Finding, ...]


def write(folder: str | Path, findings: Findings) -> None:
    """Write findings.json into the folder of a cache."""
    Path(folder, FILE).write_text(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1), "utf-8")


def read(folder: str | Path) -> Findings:
    """The findings of the cache in `folder`."""
    rows = json.loads(Path(folder, FILE).read_bytes())
    return tuple(Finding(**{**row, "examples": tuple(Example(**example) for example in row["examples"])}) for row in rows)


def judge(findings: Findings, checks: ChecksSection) -> tuple[JudgedFinding, ...]:
    """What each finding means under `checks`; those that refuse the run stand first."""
    judged = [
        JudgedFinding(finding, action := getattr(checks, finding.name), _is_fatal(finding, action, checks))
        for finding in findings
    ]
    return tuple(sorted(judged, key=lambda one: not one.fatal))


def _is_fatal(finding: Finding, action: str, checks: ChecksSection) -> bool:
    share, limit = finding.share, 0.0
    if finding.name in LEAKS:
        limit = checks.max_held_out_in_train
    elif finding.name == "no_turn_end":
        share, limit = finding.highest_share, MOST_WITHOUT_TURN_END
    elif finding.name == "no_trained_token" and action == "drop":
        # Nothing would be left of a source.
        return finding.highest_share == 1
    return action == "fail" and share > limit


def refuse(findings: Findings, checks: ChecksSection) -> None:
    """Stop a run whose data has a finding that the settings do not accept.

    Raises:
        DataError: with each such finding, where it stands, and the flag that accepts it.
    """
    if problems := [_problem(one.finding) for one in judge(findings, checks) if one.fatal]:
        raise DataError(problems)


def share_text(share: float) -> str:
    """A share above 0 in percent, which is never told as none."""
    return f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def _accepted_by(finding: Finding) -> str:
    """The flag with which a fatal finding refuses no run."""
    return f"{finding.setting}={_ACCEPTED_BY.get(finding.name, 'keep')}"


def _problem(finding: Finding) -> Problem:
    trained = "the others" if finding.name in _THE_OTHERS else "it as it is"
    accepted = f"to train on {trained}: {_accepted_by(finding)}"
    # What is little of all may be the whole of a source.
    most = f", {share_text(finding.highest_share)} of one source" if finding.highest_share > finding.share else ""
    return Problem(
        f"{finding.count:,} of {finding.total:,} ({share_text(finding.share)}{most}): {finding.title}",
        where="; ".join(example.where for example in finding.examples),
        value="; ".join(example.detail for example in finding.examples),
        remedy=f"{REMEDIES[finding.name]}; {accepted}",
    )
