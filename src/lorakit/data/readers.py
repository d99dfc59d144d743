"""Rows from JSONL, JSON, CSV or Parquet files, a folder of them, or a dataset of the hub.

Local files are read by plain readers that know the line they stand on. The `Dataset` handed on knows nothing of
files; when a row turns out bad, `locate` reads the files again and counts, so the happy path carries no line numbers.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.core.hub import hub_at_hand
from lorakit.core.jsontext import JsonFault, parse_json
from lorakit.core.lazy import need
from lorakit.errors import DataError, did_you_mean, listing, looked_in

if TYPE_CHECKING:
    from datasets import Dataset

Table = Any  # pyarrow.Table, which ships no types
Record = tuple[str, dict[str, Any]]  # where in the file, as "line 3", and what stands there
Where = Callable[[Sequence[int]], list[str]]  # rows counted from 0 -> their places in the user's words

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation", "test": "test"}  # fmt: skip


def load(
    source_or_rows: str | Path | Dataset | Iterable[Mapping[str, Any]], split: str | None
) -> tuple[str, Dataset, Where]:
    """Return a name, the rows and a way to name their places, for a source or for rows held in memory."""
    if isinstance(source_or_rows, (str, Path)):
        source = str(source_or_rows)
        return source, read_rows(source, split), partial(locate, source, split)
    is_dataset = isinstance(source_or_rows, need("datasets", "train").Dataset)
    rows = source_or_rows if is_dataset else from_records(source_or_rows)
    return "rows in memory", rows, lambda numbers: [f"row {number + 1}" for number in numbers]


def check_there(source: str, split: str | None = None) -> None:
    """Raise `DataError` where a local source is not there or not of a kind that can be read."""
    if _path(source).exists() or _looks_local(source):
        data_files(source, split)


def read_rows(source: str, split: str | None = None) -> Dataset:
    """Read every row of a file, a folder or a hub dataset; `split` chooses among those of a folder or of the hub.

    Raises `DataError` when nothing is there, nothing is in it, a line is malformed or a column mixes types.
    """
    try:
        is_local = _path(source).exists() or _looks_local(source)
        files = data_files(source, split) if is_local else []
        rows = _dataset([_table(file) for file in files], files) if is_local else _from_hub(source, split)
    except OSError as error:  # no permission, a folder named like a file, a disk that fails
        raise DataError(f"{error.filename or source}: cannot be read: {error.strerror or error}") from error
    if len(rows) == 0:
        raise DataError(f"{source}: the dataset is empty; at least one row is needed")
    return rows


def from_records(records: Iterable[Mapping[str, Any]]) -> Dataset:
    """Turn rows held in memory into a `Dataset` whose columns are the union of their keys."""
    table = _columns_to_table([(f"row {number}", dict(row)) for number, row in enumerate(records, 1)])
    if table.num_rows == 0:
        raise DataError("the dataset is empty; at least one row is needed")
    return _dataset([table], [])


def locate(source: str, split: str | None, rows: Sequence[int]) -> list[str]:
    """Name file and line of the given rows (counted from 0) of `read_rows(source, split)`."""
    if not _path(source).exists():
        return [f"{source} row {row + 1}" for row in rows]
    wanted, found, count = set(rows), dict[int, str](), 0
    for file in data_files(source, split):
        for place, _ in _records(file):
            if count in wanted:
                found[count] = f"{file} {place}"
            count += 1
    return [found[row] for row in rows]


def data_files(source: str, split: str | None) -> list[Path]:
    """List the data files behind a local source, in a fixed order, refusing to mix train with test."""
    path = _path(source)
    known = ", ".join(_READERS)
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{source}: no such file or folder{did_you_mean(path.name, near)}{looked_in(path)}")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{source} is not a regular file; give a file of rows ({known}) or a folder of them")
    if path.is_file():
        if path.suffix not in _READERS:
            raise DataError(
                f"{source}: cannot read '{path.suffix or 'a file without suffix'}'; expected one of {known}"
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and not _hidden(file.relative_to(path)))
    named = defaultdict(list)
    for file in files:
        named[SPLITS.get(re.split(r"[-_.]", file.stem)[0], file.stem)].append(file)
    if not files:
        raise DataError(f"{source}: the folder holds no data files; expected {known}")
    if split is not None:
        files = named.get(SPLITS.get(split, split), [])
        if not files:
            raise DataError(f"{source}: no file of split '{split}'; found {sorted(named)}{did_you_mean(split, named)}")
    elif len(named.keys() & set(SPLITS.values())) > 1:
        raise DataError(f"{source}: the folder holds {sorted(named)}; name one file or choose a split")
    return files


def _path(source: str) -> Path:
    return Path(source).expanduser()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _looks_local(source: str) -> bool:
    return Path(source).suffix in _READERS or source.startswith((".", "/", "~")) or source.endswith("/")


def _from_hub(source: str, split: str | None) -> Dataset:
    datasets = need("datasets", "train")
    try:
        with hub_at_hand():
            found = datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        near = did_you_mean(source, [p.name for p in Path().iterdir() if not _hidden(p)])
        raise DataError(
            f"'{source}' is neither a local file or folder (looked in {Path.cwd()}{near}) nor a dataset the hub could "
            f"give: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        ) from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise DataError(f"{source}: the dataset has the splits {sorted(found)}; choose one")
        found = next(iter(found.values()))
    rows: Dataset = found
    return rows


def _dataset(tables: list[Table], files: list[Path]) -> Dataset:
    datasets, pa = need("datasets", "train"), need("pyarrow", "train")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        names = listing([str(file) for file in files])
        raise DataError(f"these files do not hold the same columns ({error}):\n{names}") from error
    rows: Dataset = datasets.Dataset(table)
    return rows


def _table(file: Path) -> Table:
    if file.suffix == ".parquet":  # keeps class names, which live in the file's schema
        return _read_parquet(file)
    return _columns_to_table([(f"{file} {place}", row) for place, row in _records(file)])


def _columns_to_table(records: list[Record]) -> Table:
    pa = need("pyarrow", "train")
    names = dict.fromkeys(name for _, row in records for name in row)
    try:
        return pa.table({name: pa.array([row.get(name) for _, row in records]) for name in names})
    except UnicodeEncodeError as error:
        broken = [f"{place}: {field}" for place, row in records for field in _broken(row)]
        raise DataError(
            "these texts hold half a character (a lone surrogate such as \\ud83d without its second half); write it "
            f"whole or take it out:\n{listing(broken or [str(error)])}"
        ) from error
    except OverflowError as error:
        large = [f"{place}: '{field}'" for place, row in records for field in _too_large(row, "")]
        raise DataError(
            f"an integer must fit into 64 bits; write a larger one as a string:\n{listing(large or [str(error)])}"
        ) from error
    except pa.ArrowException as error:
        mixed = [f"{records[i][0]}: {what}" for i, what in _mixed([row for _, row in records])]
        raise DataError(f"a column must hold one type of value:\n{listing(mixed or [str(error)])}") from error


def _mixed(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Find the values whose type is not the usual one of their field, e.g. of `messages[].content`."""
    seen: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(rows):
        for field, kind in _kinds(row, ""):
            seen[field][kind].append(i)
    found = []
    for field, kinds in seen.items():
        usual = max(kinds, key=lambda kind: len(kinds[kind]))
        for kind in kinds.keys() - {usual}:
            found += [(i, f"'{field}' is {kind}, but {usual} in {len(kinds[usual])} rows") for i in kinds[kind]]
    return sorted(found)


def _kinds(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if field and value is not None:
        yield field, kind_of(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _kinds(item, f"{field}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item, f"{field}[]")


def _too_large(value: Any, field: str) -> Iterator[str]:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield field
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _too_large(item, f"{field}.{key}".lstrip("."))
    for item in value if isinstance(value, list) else ():
        yield from _too_large(item, f"{field}[]")


def _broken(row: dict[str, Any]) -> Iterator[str]:
    """Name the columns of a row whose text, however deep, cannot be written as UTF-8."""
    for key, value in row.items():
        try:
            json.dumps([key, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            yield ascii(key)


def kind_of(value: object) -> str:
    """Name a JSON value's type in the words of an error message."""
    if value is None:
        return "null"
    names = ((bool, "a boolean"), ((int, float), "a number"), (str, "a string"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _records(file: Path) -> Iterator[Record]:
    try:
        yield from _READERS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}{_first_other(file)}: not UTF-8 text; convert the file to UTF-8") from error


def _first_other(file: Path) -> str:
    """Return the number of the first line that is not UTF-8, which a decoder that reads in blocks does not know."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f" line {number}"
    return ""


def _read_jsonl(file: Path) -> Iterator[Record]:
    bad = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except JsonFault as fault:
                bad.append(f"{file} line {number}: {fault.what}{_at(fault, line)}")
                continue
            if isinstance(row, dict):
                yield f"line {number}", row
            else:
                bad.append(f"{file} line {number}: is {kind_of(row)}")
    if bad:
        raise DataError(f"each line must be one JSON object, as {{...}}:\n{listing(bad)}")


def _at(fault: JsonFault, text: str) -> str:
    """Return the column of a fault, and whether the text ends there before it is whole."""
    if fault.column is None:
        return ""
    ends = not text.endswith("\n") and (fault.what.startswith("Unterminated") or fault.offset >= len(text.rstrip()))
    return f" at column {fault.column}" + ("; the file ends there, so it looks cut off" if ends else "")


def _read_json(file: Path) -> Iterator[Record]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    try:
        rows = parse_json(text)
    except JsonFault as fault:
        line = "" if fault.line is None else f" line {fault.line}"
        raise DataError(f"{file}{line}: {fault.what}{_at(fault, text)}") from fault
    places = [f"entry {number}" for number in range(1, len(rows) + 1)]
    bad = [
        f"{file} {place}: is {kind_of(row)}"
        for place, row in zip(places, rows, strict=True)
        if not isinstance(row, dict)
    ]
    if bad:
        raise DataError(f"each entry must be one JSON object, as {{...}}:\n{listing(bad)}")
    yield from zip(places, rows, strict=True)


def _read_csv(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for row in reader:
                line = f"line {reader.line_num}"
                if None in row:
                    raise DataError(f"{file} {line}: more cells than columns; quote cells that hold commas")
                yield line, row
        except csv.Error as error:
            raise DataError(
                f"{file} line {reader.reader.line_num}: {error}; look for a quote that is never closed, or keep longer "
                "texts as JSONL"
            ) from error


def _read_parquet(file: Path) -> Table:
    parquet = need("pyarrow.parquet", "train")
    try:
        return parquet.read_table(file)
    except need("pyarrow", "train").ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from error


def _parquet_records(file: Path) -> Iterator[Record]:
    for number, row in enumerate(_read_parquet(file).to_pylist(), 1):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _parquet_records,
}
