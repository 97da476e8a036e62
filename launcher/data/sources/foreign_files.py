"""Files that are not files of rows: identifies them by their first bytes or name, and says how to get rows out of them."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from launcher.data.sources.row_values import refuse

_UNPACK = "unpack it, or compress the file of rows with gzip or zstd"
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4")
# The kind of file by its suffix, and what to do.
_BY_SUFFIX = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), ("a workbook", "save its sheet as CSV in UTF-8, separated by commas")),
    **dict.fromkeys(_ARCHIVES, ("an archive, or compressed in another format", _UNPACK)),
    ".arrow": ("an Arrow file", "write it with datasets: Dataset.from_file(FILE).to_parquet(FILE)"),
    ".pkl": ("a pickle, which can run code when it is read", "write its rows as JSON Lines"),
    ".docx": ("a Word document", "save its text as .txt"),
    ".pdf": ("a PDF", "extract its text"),
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def refuse_foreign_content(head: bytes, name: str, kind: str) -> None:
    """Refuse a file whose first bytes show that it is not a file of rows of its kind. Raises DataError."""
    if head.startswith(b"version https://git-lfs"):
        refuse("the file is a Git LFS pointer instead of the rows", name, "run in its folder: git lfs pull")
    if kind in ("parquet", "txt"):
        return
    if head.startswith(_UTF16):
        refuse("the file is text in UTF-16, not in UTF-8", name, "save the file in UTF-8")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        remedy = "download the file again; addresses of files on the Hub contain /resolve/ instead of /blob/"
        refuse("the file is an HTML page instead of the rows", name, remedy)
    if kind in ("json", "jsonl") and start.split(b"\n", 1)[0].strip() == b"{":
        remedy = "write each object on one line (jq -c . FILE), or put all of them into one array"
        refuse("the file has a JSON object that spans several lines", name, remedy)


def refuse_unknown_kind(name: str, endings: str) -> NoReturn:
    """Refuse a file if neither its name nor its content shows its kind. Raises DataError."""
    path = Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    known = next((_BY_SUFFIX[suffix] for suffix in suffixes if suffix in _BY_SUFFIX), None)
    if known is not None:
        refuse(f"the file is {known[0]}, which the launcher does not read", name, known[1])
    if ".tsv" in suffixes:
        refuse_separator("\t", name)
    refuse("neither the name nor the content shows what kind of file this is", name, endings)


def refuse_other_separator(header: list[str], place: str) -> None:
    """Refuse a table whose first line is one cell that contains a separator other than commas. Raises DataError."""
    separator = next((one for one in _SEPARATORS if one in header[0]), None) if len(header) == 1 else None
    if separator is not None:
        refuse_separator(separator, place)


def refuse_separator(separator: str, place: str) -> NoReturn:
    """Refuse a table that uses a separator other than commas. Raises DataError."""
    written = {"\t": "\\t"}.get(separator, separator)
    remedy = (
        "save it with commas, as .csv; or write JSON Lines with pandas: "
        f"read_csv(FILE, sep='{written}').to_json('rows.jsonl', orient='records', lines=True)"
    )
    refuse(f"the columns of the table are separated by {_SEPARATORS[separator]}, not by commas", place, remedy)
