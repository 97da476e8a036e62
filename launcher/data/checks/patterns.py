"""Patterns of keys, passwords, addresses, telephone numbers and special tokens in text, and their redaction."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from launcher.security.redaction import FORMS


@dataclass(frozen=True, eq=False)
class TextPattern:
    """A pattern for one `kind` of text, used by the check `finding`. Every text with a match contains one of `literals`.

    Literals are in lower case, with 0 for every digit. Most texts contain none, and searching for literals takes a tenth of the
    time of the pattern. Each is a pair (gate, literal): a text with the literal also contains the gate, a rare short text or b"".
    """

    finding: str
    kind: str
    literals: tuple[tuple[bytes, bytes], ...]
    expression: str

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """The compiled expression. Compiled on demand, because compiling all of them takes longer than a short command may."""
        return re.compile(self.expression)


_E_MAIL = r"(?<![\w.+-])[\w.+-]{1,64}@(?!example\.)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
# With a country code, or in groups of three, three and four: numbers in a calculation have neither.
_ABROAD = r"\+(?<![\w+.-]\+)[1-9]\d{0,2}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}(?![\w-])"
_IN_GROUPS = r"(?<![\w+.-])(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-.]\d{4}(?![\w-])"
# With a trunk prefix and an area code before a slash or hyphen, as in Germany; opening hours have four digits each.
_TRUNK = (
    r"0(?<![\w+.,/-]0)(?!\d{3}-\d{4}(?!\d))(?=[1-9](?:[ /-]{0,3}\d){7})\d{2,4}"
    r"(?: ?/ ?|-)\d{3,8}(?:[ -]\d{2,5}){0,3}(?![\w/-]|[.,]\d)"
)
_CALLED = (
    r"[TtPpMmFf](?<!\w.)(?i:(?:(?<=t)(?:el(?:ephone|efon)?)|(?<=p)hone|(?<=m)obile?|(?<=f)ax)"
    rf"(?:(?: number| no)(?: is)?[.:]*|[.:]+|(?=[ \t][0(])))[ \t]?(?!{_IN_GROUPS}|{_TRUNK})"
    r"(?=[\d ()/.-]{0,16}\d{3})"
    r"(?=\(?\d(?:[ ()/.-]{0,3}\d){6})\(?\d{2,5}\)?[ /.-]{0,3}\d{2,8}(?:[ -]\d{2,5}){0,3}(?![\w/-]|[.,]\d)"
)
# Every number contains three consecutive digits, which few texts do.
_CALLED_LITERALS = (b"tel.", b"tel:", b"tel 0", b"tel (", b"phone", b"telefon", b"mobil", b"fax")
_QUOTED = (
    r"(?:[Aa](?i:pi_?key|ccess_?token|uth_?token)|[Ss](?i:ecret(?:_?key)?)|[Pp](?i:assword|asswd))(?i:"
    r"[\"']?\s*[:=]\s*[\"'])[^\s\"'<>{}$]{12,128}(?=[\"'])"
)
# Characters after a name in code. A template may write the end of a turn there: <|im_end|>, </s>, [/INST].
_CODE = r"[({$]|\[(?!/?[A-Z]+\])"
# Values without quotation marks, as in a shell, an .env file or a sentence, or short values: they mix letters and digits. In code
# and prose, names in this position may end in a number: module attributes, calls or algorithms.
_BARE = (
    r"(?:(?:[Aa](?i:pi|ccess|ccount|uth)|[Ss](?i:ecret)|[Pp](?i:rivate))[_ -]?(?i:key)|[Ss](?i:ecret)|[Pp](?i:assword|asswd)"
    r"|(?:[Aa](?i:ccess|uth|pi)|[Rr](?i:efresh)|[Ss](?i:ession))[_-]?(?i:token))(?i:"
    r"[\"']?(?:[ \t]{0,2}(?::=|[:=])|[ \t]is)[ \t]{0,2}[\"']?)"
    r"(?!(?i:sha|md|aes|rsa|base|utf|[bs]crypt|argon|oauth|https?)-?\d)"
    r"(?![A-Za-z_]+\d{0,2}(?![\w!#%&*+/=?@^~-])|[A-Za-z_]\w*\.[A-Za-z_])"
    r"(?=\S{0,127}?(?:[A-Za-z]\d|\d[A-Za-z]))"
    rf"[\w!#%&*+/=?@^~][\w!#$%&*+/=?@^~.-]{{7,127}}+(?!{_CODE}|[:|\\])"
)
_ASSIGNED_LITERALS = (
    *(b"passw", b"secret", b"_key", b"-key", b"_token", b"-token"),
    *(b"api key", b"access key", b"account key", b"auth key", b"private key"),
    *(b"apikey", b"accesskey", b"accountkey", b"authkey", b"privatekey"),
    *(b"apitoken", b"accesstoken", b"authtoken", b"refreshtoken", b"sessiontoken"),
)
_BEARER = (
    r"[Aa](?i:uthorization[\"']?\s{0,2}[:=]\s{0,2}[\"']?(?:bearer|basic|token))[ \t]+"
    rf"(?=[^\s\"']{{0,127}}?\d)[A-Za-z0-9._~+/-]{{16,2000}}+=*(?!{_CODE})"
)
# A literal's gate is the first of these that it contains: rare words, and rare characters, which are searched much faster.
_GATES = (b"000", b"key", b"token", b"_", b"@", b"+", b"z", b"j", b"x", b"w", b":", b"k")


PATTERNS = tuple(
    TextPattern(
        finding,
        kind,
        tuple(
            (b"000" if literal in _CALLED_LITERALS else next((gate for gate in _GATES if gate in literal), b""), literal)
            for literal in literals
        ),
        expression,
    )
    for finding, kind, literals, expression in (
        *(("secrets", form.kind, form.literals, form.pattern) for form in FORMS),
        ("secrets", "assigned secret", _ASSIGNED_LITERALS, f"{_QUOTED}|{_BARE}"),
        ("secrets", "credential of a request", (b"authorization",), _BEARER),
        ("personal_data", "e-mail address", (b"@",), _E_MAIL),
        ("personal_data", "telephone number", (b"+0",), _ABROAD),
        ("personal_data", "telephone number", (b"-0000", b".0000"), _IN_GROUPS),
        ("personal_data", "telephone number", (b"000/", b"000 /", b"000-000"), _TRUNK),
        ("personal_data", "telephone number", _CALLED_LITERALS, _CALLED),
    )
)
# Special tokens of other models: a tokenizer that does not know them splits them into plain text.
_FOREIGN = re.compile(
    r"<\|[A-Za-z][\w .-]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
_FOREIGN_LITERALS = (
    *("<|", "<｜", "<bos>", "<eos>", "<pad>", "<unk>", "<<sys>>", "<</sys>>", "inst]"),
    *("<start_of_turn>", "<end_of_turn>", "</start_of_turn>", "</end_of_turn>"),
)
_LITERALS = {
    gate: [(literal, p) for p in PATTERNS for own_gate, literal in p.literals if own_gate == gate] for gate in (b"", *_GATES)
}
_ALL_DIGITS_0 = bytes.maketrans(b"123456789", b"0" * 9)


def find_candidates(lower: bytes) -> tuple[TextPattern, ...]:
    """Return the patterns that may match a text, which is given in lower case and UTF-8."""
    data = lower.translate(_ALL_DIGITS_0)
    patterns = [pattern for gate, pairs in _LITERALS.items() if gate in data for literal, pattern in pairs if literal in data]
    return tuple(dict.fromkeys(patterns)) if patterns else ()


def find_matches(text: str, patterns: Iterable[TextPattern]) -> Iterator[tuple[TextPattern, re.Match[str]]]:
    """Yield each match in `text` with its pattern."""
    for pattern in patterns:
        for match in pattern.regex.finditer(text):
            yield pattern, match


def mask(pattern: TextPattern, match: re.Match[str]) -> str:
    """Return the displayable part of a match: its kind, first character and length."""
    return f"[{pattern.kind}: {match.group()[:1]}…, {len(match.group())} characters]"


def redact(parts: Sequence[str]) -> list[str]:
    """Return the parts of a text, redacted; a match that spans several parts is shown in the part where it begins."""
    full_text = "".join(parts)
    candidates = find_candidates(full_text.lower().encode())
    matches = sorted((*match.span(), mask(pattern, match)) for pattern, match in find_matches(full_text, candidates))
    texts, start = [], 0
    for part in parts:
        text, at, end = "", start, start + len(part)
        for first, last, masked in matches:
            if first < end and last > at:
                text += full_text[at:first] + (masked if first >= at else "[…]" if at == start else "")
                at = min(last, end)
        texts.append(text + full_text[at:end])
        start = end
    return texts


def may_hold_special_tokens(lower: str, known: Sequence[str]) -> bool:
    """Return False if a text, given in lower case, contains no special token."""
    in_angles, others, _ = _compile_special(tuple(known))
    return in_angles.search(lower) is not None or any([beginning in lower for beginning in others])  # noqa: C419


def special_tokens(text: str, known: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield the special tokens in `text`, each with True if it is one of `known`."""
    if known:
        for match in _compile_special(tuple(known))[2].finditer(text):
            yield match.group(), True
    for match in _FOREIGN.finditer(text):
        if match.group() not in known:
            yield match.group(), False


@functools.lru_cache(maxsize=8)
def _compile_special(known: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...], re.Pattern[str]]:
    """Return the beginnings of special tokens, in lower case, and a pattern for those that are `known`, longest first.

    The beginnings are a pattern for those with an angle bracket, and the others.
    """
    texts = {*(text.casefold()[:2] for text in known if text), *_FOREIGN_LITERALS}
    in_angles = sorted(re.escape(text[1:]) for text in texts if text[0] == "<")
    own = "|".join(re.escape(text) for text in sorted(known, key=len, reverse=True) if text)
    others = tuple(sorted(text for text in texts if text[0] != "<"))
    return re.compile(f"<(?:{'|'.join(in_angles)})"), others, re.compile(own)
