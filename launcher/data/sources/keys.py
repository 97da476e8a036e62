"""Row keys that no format reads: counted for the report, or refused if they mark a row for another kind of training. Pure.

The names are those of TRL (dataset types), OpenAI (preference files), LLaMA-Factory, ms-swift and axolotl (dataset formats).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NoReturn

from launcher.data.sources.formats import FORMATS
from launcher.data.sources.row_values import Row, find_value, from_json, refuse, safe_excerpt

NUM_KEYS_SHOWN = 20

# Keys of rows for preference training: TRL, axolotl, LLaMA-Factory, torchtune; OpenAI; the worse answer alone (ms-swift).
_PAIRS = (
    *(("chosen", "rejected"), ("preferred_output", "non_preferred_output")),
    *(("rejected_response",), ("rejected_messages",)),
)
# Keys for whether the answer is good: TRL and ms-swift; LLaMA-Factory.
_VERDICT_KEYS = ("label", "kto_tag")
_MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
_OTHER_TRAINING = frozenset((*(key for pair in _PAIRS for key in pair), *_VERDICT_KEYS, *_MEDIA_KEYS))


@dataclass(frozen=True, slots=True)
class RowKeys:
    """The keys that are read from a source's rows, by the rows' own names; `format` is "" if it is not known yet."""

    format: str
    read: frozenset[str]
    ignored: frozenset[str]
    chat_keys: tuple[str, ...]
    # Keys that hold either text or a list of messages.
    turn_keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, format: str, columns: Mapping[str, str], ignored: tuple[str, ...]) -> RowKeys:
        """Create it from `columns` (format's key to row's key) and the keys `ignored` that are deliberately left unread."""
        own_names = [columns.get(key, key) for key in FORMATS[format].keys] if format else [*columns.values()]
        # If the key is within an object, the object is a key of the row.
        read = frozenset((*own_names, *(name.split(".")[0] for name in own_names))) - frozenset(ignored)

        def name_own(keys: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(own for key in keys if (own := columns.get(key, key)) in read)

        chat_keys, turn_keys = (FORMATS[format].chat_keys, FORMATS[format].turn_keys) if format else ((), ())
        return cls(format, read, frozenset(ignored), name_own(chat_keys), name_own(turn_keys))

    def check(self, row: Row, where: str, counts: Counter[str]) -> Row:
        """Count each unread, non-empty key of the row and of its messages in `counts`.

        Return the row without the ignored keys, with the JSON text of its messages parsed.

        Raises:
            DataError: for keys of another kind of training, unless they are deliberately ignored.
        """
        unread: Set[str] = row.keys() - self.read
        present = [key for key in self.chat_keys if find_value(row, key) is not None]
        if len(present) > 1:
            unread = unread | {present[1]}
        if unread:
            self._refuse_other_training(row, unread - self.ignored, where)
            counts.update(key for key in unread if not _is_empty(find_value(row, key)))
        if present:
            items = from_json(find_value(row, present[0]))
            self._check_messages(items, present[0], where, counts)
            row = row if items is row.get(present[0]) else {**row, present[0]: items}
        for key in self.turn_keys:
            if isinstance(items := find_value(row, key), list):
                self._check_messages(items, key, where, counts)
        return {key: value for key, value in row.items() if key not in self.ignored} if self.ignored else row

    def _check_messages(self, items: Any, key: str, where: str, counts: Counter[str]) -> None:
        """Check the keys of messages; the format handles anything except a list of objects."""
        known = FORMATS[self.format].message_keys
        unread = set()
        for i, item in enumerate(items if isinstance(items, list) else ()):
            if not isinstance(item, dict):
                continue
            if not item.keys() <= known:
                others = {other for other in item.keys() - known if not _is_empty(item[other])}
                _refuse_media(item, others - self.ignored, f"{key}[{i}]", where)
                unread |= {f"{key}[].{other}" for other in others}
        counts.update(unread)

    def _refuse_other_training(self, row: Row, keys: Set[str], where: str) -> None:
        if keys.isdisjoint(_OTHER_TRAINING):
            return
        for pair in _PAIRS:
            if {*pair} <= keys and all(isinstance(row[key], str | list | dict) and from_json(row[key]) for key in pair):
                problem = "the row holds a better and a worse answer, as for DPO; the launcher trains on one answer per row"
                _refuse(problem, where, pair, "to train on one of them, name it in the source's columns")
        if self.format not in ("", "text"):
            # Tables may hold false as text; 0 may be a class label.
            for key in (key for key in _VERDICT_KEYS if key in keys and str(row[key]).lower() == "false"):
                problem = f"{key}: false marks the answer as bad, as for KTO; the launcher would train on it as a good answer"
                _refuse(problem, where, (key,), "remove such rows")
        _refuse_media(row, keys, "the row", where)


def _refuse(problem: str, where: str, keys: Sequence[str], remedy: str) -> NoReturn:
    ignored = f"ignored_keys: [{', '.join(keys)}]"
    refuse(problem, where, f"{remedy}; to train on the row as if it had no such key, set the source's {ignored} in data.sources")


def _refuse_media(holder: Row, keys: Set[str], key_path: str, where: str) -> None:
    if media := [key for key in _MEDIA_KEYS if key in keys and _is_media(holder[key])]:
        problem = f"{key_path} has {' and '.join(media)}; the launcher trains on text only"
        _refuse(problem, where, media, "remove such rows")


def _is_empty(value: Any) -> bool:
    """Return True for a value without content; text tables hold empty lists and objects as JSON text."""
    return value is None or value in ("[]", "{}") or (isinstance(value, str | bytes | list | dict) and not value)


def _is_media(value: Any) -> bool:
    """Return True for bytes, paths or addresses; numbers and flags only describe media."""
    value = from_json(value)
    if isinstance(value, list | dict):
        return any(map(_is_media, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | bytes) and bool(value)


def redact_keys(counts: Counter[str]) -> dict[str, int]:
    """Return the counts by those excerpts of the keys that the report may show."""
    safe: Counter[str] = Counter()
    for key, count in counts.items():
        safe[safe_excerpt(key)] += count
    return dict(safe)


def rank_keys(counts: Counter[str]) -> dict[str, Any]:
    """Return the most frequent keys with their counts, and the number of other keys.

    Sorted by frequency, then by name, so that a cache does not depend on the order of sets.
    """
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return {"unread_keys": dict(ranked[:NUM_KEYS_SHOWN]), "num_other_unread_keys": len(ranked[NUM_KEYS_SHOWN:])}
