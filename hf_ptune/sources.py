"""Where rows come from: files, datasets of the Hub, and the corpus of the quickstart."""

import csv
import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from hf_ptune.errors import RecipeError, shorten
from hf_ptune.tasks.base import Row

HUB = "hub:"
_LONGEST_CELL = 2**31 - 1  # characters; the csv module stops at 131,072
_MIN_LINES = 25  # topics of fewer lines are too small to be held out


def read_file(path: Path) -> list[Row]:
    """Read a .jsonl, .json, .csv, .tsv or .parquet file.

    Cells of a .tsv file are taken as they stand, quotes among them, as those of GLUE have to be.

    Raises:
        RecipeError: the file is missing, broken, empty, or of another kind.
    """
    if path.suffix not in _READERS:
        raise RecipeError(f"{path}: expected a file that ends in {', '.join(_READERS)}, or {HUB}<id> of a dataset.")
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file; paths of data start at the recipe's folder.")
    rows = _READERS[path.suffix](path)
    if not rows:
        raise RecipeError(f"{path}: holds no rows.")
    return rows


@contextmanager
def _text_of(path: Path) -> Iterator[TextIO]:
    """A file of UTF-8, with or without a byte order mark.

    Raises:
        RecipeError: another encoding.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not in UTF-8 ({error}); convert it, as by iconv -t utf-8.") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with _text_of(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(f"{path}, line {number}: is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise RecipeError(f"{path}, line {number}: expected an object with named columns.")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    with _text_of(path) as file:
        try:
            rows: list[Row] = json.load(file)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path}: is no JSON: {error}; a file of a row a line ends in .jsonl.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(
            f"{path}: holds {shorten(rows, 60)}; expected a list of objects with named columns, one a row. Write it "
            "so, or a row a line in a .jsonl file."
        )
    return rows


def _read_csv(path: Path, **dialect: Any) -> list[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    rows: list[Row] = []
    with _text_of(path) as file:
        reader = csv.DictReader(file, **dialect)
        try:
            _check_header(path, reader.fieldnames or ())
            for row in reader:
                if any(row.pop(None, [])):  # type: ignore[call-overload]
                    raise RecipeError(
                        f"{path}, line {reader.line_num}: has more cells than the header; texts with "
                        'commas stand in quotes ("a, b").'
                        if not dialect
                        else f"{path}, line {reader.line_num}: has more cells than the header; texts hold no tabs."
                    )
                rows.append(row)
        except csv.Error as error:
            raise RecipeError(f"{path}, line {reader.line_num}: is no CSV: {error}") from error
    return rows


def _check_header(path: Path, names: Sequence[str]) -> None:
    """Refuse a header in which a name stands twice, or that other signs divide."""
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise RecipeError(f"{path}: its header has {twice[0]!r} more than once; expected a name of its own a column.")
    if len(names) == 1 and (found := next((sign for sign in ";\t|" if sign in names[0]), None)):
        wanted = "tabs divide those of .tsv, commas those of .csv"
        raise RecipeError(f"{path}: its header {shorten(names[0], 60)!r} is one cell, divided by {found!r}; {wanted}.")


def _read_tsv(path: Path) -> list[Row]:
    return _read_csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(f"{path}: is no Parquet: {error}") from error
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def read_hub(
    name: str, config: str | None, split: str, revision: str | None = None
) -> tuple[list[Row], dict[str, list[str]]]:
    """Read a split of a dataset, from the Hub or from the cache of an earlier run.

    Args:
        name: its id on the Hub.
        config: name of one of its configurations.
        split: name of the split; a slice such as "train[:100]" also.
        revision: a commit or branch.

    Returns:
        Rows, and the names of classes by column.

    Raises:
        RecipeError: it cannot be had, or has no such configuration or split.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = shorten(error.__cause__ or error)  # what generates a dataset says only that it could not
        raise RecipeError(
            f"data.source {HUB}{name} (config {config}, split {split}) cannot be loaded: {said}. It needs the network "
            f"once; without it, name a file ({', '.join(_READERS)})."
        ) from error
    return list(dataset), _class_names(dataset.features.to_dict())


def read_class_names(path: Path) -> dict[str, list[str]]:
    """The names of classes by column that `datasets` has written into a .parquet file; none of other files."""
    if path.suffix != ".parquet":
        return {}
    import pyarrow.parquet

    told = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface")
    features = json.loads(told).get("info", {}).get("features", {}) if told else {}
    return _class_names(features)


def _class_names(features: Mapping[str, Any], before: str = "") -> dict[str, list[str]]:
    """The names of classes by column, `a.b` for one inside another, of features as `datasets` writes them down."""
    found: dict[str, list[str]] = {}
    for column, feature in features.items():
        inner = _inside_lists(feature)
        if inner.get("_type") == "ClassLabel":
            found[before + column] = list(inner["names"])
        elif not isinstance(inner.get("_type"), str):
            found |= _class_names(inner, f"{before}{column}.")
    return found


def _inside_lists(feature: Any) -> Mapping[str, Any]:
    """What a list holds, or the feature itself where it is none."""
    while isinstance(feature, Mapping) and isinstance(feature.get("_type"), str) and "feature" in feature:
        feature = feature["feature"]
    return feature if isinstance(feature, Mapping) else {}


def read_label_names(path: Path) -> list[str] | dict[str, list[str]]:
    """Read a file of label names: a list in order of their numbers, or such a list by column.

    Raises:
        RecipeError: it is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as names of labels: {error}") from error
    lists = list(content.values()) if isinstance(content, dict) else [content]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
        raise RecipeError(
            f"{path}: expected a list of names in order of their numbers, or such a list by column. Write it so, or "
            "name the labels under data.labels."
        )
    found: list[str] | dict[str, list[str]] = content
    return found


def chatterbot_rows() -> list[Row]:
    """Opening lines of the English dialogues in the package chatterbot-corpus, labelled by their topic.

    Lines that differ in case or spacing only count once, under the first topic that has them; topics of
    fewer than 25 lines are left out.

    Raises:
        RecipeError: the package is not installed.
    """
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError("data.source 'chatterbot' needs chatterbot-corpus: pip install \"hf_ptune[quickstart]\".")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "english"
    topics: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for path in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            line = " ".join(str(conversation[0]).split())
            if line.lower() not in seen:
                seen.add(line.lower())
                topics[path.stem].append(line)
    return [
        {"text": line, "label": topic} for topic, lines in topics.items() if len(lines) >= _MIN_LINES for line in lines
    ]
