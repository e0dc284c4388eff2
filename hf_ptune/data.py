"""Rows for training: read, brought under their roles, labels named, split."""

import contextlib
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

from hf_ptune.cells import read_cell
from hf_ptune.errors import RecipeError, shorten
from hf_ptune.labels import Part, name_labels
from hf_ptune.recipe import Column, DataRecipe, Recipe
from hf_ptune.sources import HUB, chatterbot_rows, read_class_names, read_file, read_hub, read_label_names
from hf_ptune.tasks import Row, Task
from hf_ptune.tasks.base import missing

_DECIMAL = re.compile(r"-?\d+\.\d+")
_LABELS_FILE = "labels.json"  # beside a file of rows


@dataclass(frozen=True)
class Rows:
    """Rows by role, and the names of their labels in order of their numbers; none where the head has no names."""

    train: list[Row]
    held_out: list[Row]
    labels: list[str]
    test: list[Row] = field(default_factory=list)


def load_rows(recipe: Recipe) -> Rows:
    """Read a recipe's rows and hold some out.

    Args:
        recipe: names source, columns and split.

    Raises:
        RecipeError: a file or column is missing, or held-out rows have labels that no training row has.
    """
    data, task = recipe.data, recipe.build_task()
    _check_hub_options(data)
    if data.source == "chatterbot":
        if recipe.task != "SEQ_CLS" or data.columns or data.eval_source:
            raise RecipeError(
                "data.source 'chatterbot' is for task SEQ_CLS and needs neither columns nor eval_source; "
                "remove them, or name a file."
            )
        rows = chatterbot_rows()
        parts = [Part(rows, places=[f"chatterbot, row {n}" for n in range(1, len(rows) + 1)], place="chatterbot")]
    else:
        parts = [_read(recipe, task, data.source, data.split)]
    parts.append(_read_further(recipe, task, "eval"))
    parts.append(_read_further(recipe, task, "test"))
    parts = _checked(parts, task, data.columns)
    if task.label_role is not None:
        parts = name_labels(parts, task.label_role, task.known_labels())
    train, held_out, test = (part.rows for part in parts)
    labels = parts[0].names or task.label_names(train)  # of all rows: a split or limit may leave a rare one out
    if not held_out:
        train, held_out = split_rows(train, data.eval_fraction, data.split_seed, task.group_role)
    train, held_out, test = (
        take_rows(part, limit, data.split_seed, task.group_role)
        for part, limit in ((train, data.limit), (held_out, data.eval_limit), (test, data.eval_limit))
    )
    for role in task.everywhere:
        _check_everywhere(role, [("training", train), ("held-out", held_out), ("test", test)])
    task.check_labels(labels)
    if not parts[0].names:
        task.check_labels(task.label_names(train))
    for part, what in ((held_out, "held-out"), (test, "test")):
        if unknown := sorted(set(task.label_names(part)) - set(labels)):
            raise RecipeError(
                f"{what} rows have the labels {unknown[:5]}, which no training row has; add such rows, or name all "
                "labels under data.labels."
            )
    return Rows(train, held_out, labels, test)


def _check_hub_options(data: DataRecipe) -> None:
    """Refuse what only datasets of the Hub have where there are none."""
    if any(s and s.startswith(HUB) for s in (data.source, data.eval_source, data.test_source)):
        return
    for option, unset in (("config", None), ("revision", None), ("split", "train")):
        if (value := getattr(data, option)) != unset:
            raise RecipeError(
                f"data.{option} is {value!r}, which datasets of the Hub have, but no source begins with {HUB}. Name "
                f"one as {HUB}<id>, or take it out by data.{option}: {unset or 'null'}."
            )


def _checked(parts: Sequence[Part], task: Task, columns: Mapping[str, Column]) -> list[Part]:
    """Rows of all parts as the task checks them, together."""
    rows = [row for part in parts for row in part.rows]
    ready = iter(task.check_rows(rows, [where for part in parts for where in part.places]))
    parts = [replace(part, rows=[next(ready) for _ in part.rows]) for part in parts]
    for part in parts:
        _check_filled(part, task, columns)
    return parts


def _check_everywhere(role: str, parts: Sequence[tuple[str, list[Row]]]) -> None:
    """Refuse rows of which some have a role that changes what is asked, and others have not."""
    having, lacking = ([what for what, rows in parts if any((role in r) is has for r in rows)] for has in (True, False))
    if having and lacking:
        raise RecipeError(
            f"{having[0]} rows have a {role}, but some {lacking[0]} rows have none; give it to all, or to none. "
            f"Where a file names the column otherwise, name it under data.columns.{role}."
        )


def _read_further(recipe: Recipe, task: Task, which: str) -> Part:
    """Rows of another source, or of another split or configuration of the same dataset; none where none is named.

    Args:
        recipe: names them.
        task: reads them.
        which: "eval" or "test".
    """
    data = recipe.data
    own, split, config = (getattr(data, f"{which}_{name}") for name in ("source", "split", "config"))
    if own is None and split is None and config is None:
        return Part([])
    source = own or data.source
    if not source.startswith(HUB) and (own is None or config is not None):
        option, value = ("split", split) if config is None else ("config", config)
        raise RecipeError(
            f"data.{which}_{option} is {value!r}, but {source} is no dataset of the Hub. Name one, or a file, by "
            f"data.{which}_source, or take the {option} out by data.{which}_{option}: null."
        )
    return _read(recipe, task, source, split or data.split, config)


def _read(recipe: Recipe, task: Task, source: str, split: str, own_config: str | None = None) -> Part:
    """Rows by role, with labels as they stand there."""
    columns = recipe.data.columns
    if wrong := sorted(set(columns) - set(task.roles())):
        raise RecipeError(f"data.columns names the role {wrong[0]!r}; {recipe.task} has {', '.join(task.roles())}.")
    told = recipe.data.labels
    if source.startswith(HUB):
        place = f"{source} {split}"
        other = source != recipe.data.source and recipe.data.source.startswith(HUB)
        config, revision = (None, None) if other else (recipe.data.config, recipe.data.revision)
        found, classes = read_hub(source.removeprefix(HUB), own_config or config, split, revision)
    else:
        place = str(recipe.folder / source)
        found = read_file(recipe.folder / source)
        classes = read_class_names(recipe.folder / source)
        beside = Path(source).with_name(_LABELS_FILE)
        if told is None and task.label_role is not None and (recipe.folder / beside).is_file():
            told = str(beside)
    named = read_label_names(recipe.folder / told) if isinstance(told, str) else classes if told is None else told
    numbered = _wanted(found, recipe.data.where, place)
    places = [f"{place}, row {n}" for n, _ in numbered]
    cells = source.endswith((".csv", ".tsv"))
    rows = [_by_role(row, task, columns, at, cells) for (_, row), at in zip(numbered, places, strict=True)]
    column = columns.get(task.label_role, task.label_role) if task.label_role else None
    names = named if isinstance(named, list) else named.get(column, []) if isinstance(column, str) else []
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"{place}: the names of its labels are {shorten(names)}, of which {twice[0]!r} is there more than once; "
            "expected each once, in order of the numbers. Name them anew under data.labels."
        )
    return Part(rows, list(names), places, isinstance(column, str) and column in classes, place)


def _wanted(rows: Sequence[Row], wanted: Mapping[str, Any], place: str) -> list[tuple[int, Row]]:
    """Rows that have what is wanted of them, and their numbers from 1.

    Raises:
        RecipeError: no row has it, or one of its columns.
    """
    for column in wanted:
        if not any(_has(row, column) for row in rows):
            there = dict.fromkeys(str(name) for row in rows for name in row)
            raise RecipeError(
                f"{place}: has no column {column!r}, which data.where names; it has {', '.join(there)}. Name one of "
                "them, or take it out."
            )
    found = [
        (n, row)
        for n, row in enumerate(rows, 1)
        if all(_is_same(_value(row, column, f"{place}, row {n}"), value) for column, value in wanted.items())
    ]
    if wanted and not found:
        raise RecipeError(f"{place}: no row has {dict(wanted)}, as data.where asks.")
    return found


def _is_same(cell: Any, wanted: Any) -> bool:
    """Whether a cell holds a value; files write truths as true or True, and whole numbers as 1 or 1.0."""
    if isinstance(cell, bool) or isinstance(wanted, bool):
        return str(cell).strip().lower() == str(wanted).strip().lower()
    if isinstance(wanted, (int, float)):
        cell, wanted = (int(v) if isinstance(v, float) and v.is_integer() else v for v in (_decimal(cell), wanted))
    return str(cell) == str(wanted)


def _decimal(cell: Any) -> Any:
    """The number that a text such as 1.0 tells; else the cell as it is: 1.10 is a name, as of a version."""
    told = isinstance(cell, str) and _DECIMAL.fullmatch(cell) and str(float(cell)) == cell
    return float(cell) if told else cell


def _check_filled(part: Part, task: Task, columns: Mapping[str, Column]) -> None:
    """Refuse rows of which none has a word in a text that all of them need."""
    for role in dict.fromkeys(role for form in task.forms for role in form):
        if part.rows and all(isinstance(text := row.get(role), str) and not text.strip() for row in part.rows):
            raise RecipeError(
                f"{part.place}: column {columns.get(role, role)!r} is empty in every row; fill it, or name the column "
                f"of {role} under data.columns.{role}."
            )


def _is_text(value: Any, most: int) -> bool:
    """Whether a value is text, or lists of text, at most so many in each other."""
    if isinstance(value, (list, tuple)):
        return most > 0 and all(_is_text(v, most - 1) for v in value)
    return not isinstance(value, (Mapping, bytes))


def _by_role(row: Row, task: Task, columns: Mapping[str, Column], where: str, cells: bool) -> Row:
    # a role is read where the recipe names its column, or a column has the role's own name
    values = {role: _value(row, columns.get(role, role), where, cells) for role in task.roles()}
    values |= {
        role: blank
        for role, blank in task.blanks.items()
        if missing(values[role]) and _has(row, columns.get(role, role))
    }
    found = {
        role: _of_cell(value, role, task, f"{where}: {role}") if cells else value
        for role, value in values.items()
        if not missing(value) and not (value == "" and role in task.possible and role not in task.everywhere)
    }
    named = [[role for role in form if role in columns] for form in task.forms]
    lacking = [[role for role in form if role not in found] for form in task.forms]
    _, _, absent = min((len(gaps), -len(told), gaps) for gaps, told in zip(lacking, named, strict=True))
    absent += [
        role
        for role, column in columns.items()
        if role in task.possible and role not in found and (role in task.everywhere or not _has(row, column))
    ]
    if absent:
        column = columns.get(absent[0], absent[0])
        if _has(row, column):
            raise RecipeError(f"{where}: column {column!r} is empty; fill it, or take the row out.")
        raise RecipeError(
            f"{where}: has no column {column!r} for {absent[0]}; "
            f"it has {', '.join(map(str, row))}. Name the column under data.columns.{absent[0]}."
        )
    _choose_form(found, task, columns)
    for role in (r for r in found if r not in task.objects):
        most = task.depths.get(role, int(role in task.lists))
        if not _is_text(found[role], most):
            raise RecipeError(
                f"{where}: column {columns.get(role, role)!r} holds {shorten(found[role], 60)} for {role}; expected "
                f"text{' or a list of texts' if most else ''}. {_cure(columns.get(role, role), found[role], role)}"
            )
    return found


def _of_cell(value: Any, role: str, task: Task, where: str) -> Any:
    """What a cell of CSV tells: a list where the role holds some, and a label without the spaces around it."""
    if role in task.lists:
        return read_cell(value, role in task.objects, where)
    if role != task.label_role or not isinstance(value, str):
        return value
    # pandas writes whole numbers beside missing ones as 1.0, and truths as True
    text = value.strip()
    return {"True": True, "False": False}.get(text, _decimal(text))


def _choose_form(found: dict[str, Any], task: Task, columns: Mapping[str, Column]) -> None:
    """Of the forms that a row has whole keep the one that the recipe names, else the first, and what goes with it."""
    complete = [form for form in task.forms if all(role in found for role in form)]
    chosen = max(complete, key=lambda form: sum(role in columns for role in form))
    kept = {role for form in task.forms if set(form) & set(chosen) for role in form}
    for role in {role for form in task.forms for role in form} - kept:
        found.pop(role, None)


def _cure(column: Column, value: Any, role: str) -> str:
    """How a text is told that stands inside a value, or in several columns."""
    there = f"under data.columns.{role}"
    if isinstance(column, list):
        return f"Name one column {there}, or a text such as {' '.join(f'{{{c}}}' for c in column)!r}."
    if isinstance(value, Mapping) and value and "{" not in column:
        return f"Name a text inside it {there}, such as {f'{column}.{next(iter(value))}'!r}."
    return f"Write it as text, or name another column {there}."


def _has(row: Row, column: Column) -> bool:
    """Whether a row has a column, filled or not: all of a list, and all that a text names."""
    if isinstance(column, list):
        return all(_has(row, c) for c in column)
    there, _ = _look_up(row, column)
    if not there and "{" in column:
        with contextlib.suppress(ValueError):
            return all(name in row for _, name, _, _ in Formatter().parse(column) if name is not None)
    return there


def _look_up(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Whether a row has a column by its name, or inside another one, and what it holds."""
    if column in row:
        return True, row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return _look_up(inner, rest) if rest and isinstance(inner, Mapping) else (False, None)


class _Texts(Formatter):
    """What fills a text with columns: a row's texts and numbers; its lists and objects are none.

    Args:
        cells: whether an empty text is an empty cell, as in CSV.
    """

    def __init__(self, cells: bool) -> None:
        self.cells = cells
        self.empty: list[str] = []
        self.blank: list[str] = []
        self.filled: list[str] = []

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        blank = self.cells and (value == "" or missing(value))  # CSV cannot tell an empty text from none
        empty = missing(value)
        (self.blank if blank else self.empty if empty else self.filled).append(field_name)
        return "" if empty else value, first

    def format_field(self, value: Any, format_spec: str) -> str:
        if not _is_text(value, 0):
            raise TypeError(shorten(value, 60))
        return str(super().format_field(value, format_spec))


def _value(row: Row, column: Column, where: str, cells: bool = False) -> Any:
    """What a row has in a column: `a`, `a.b` inside it, a text with `{a}`, or several columns as one list.

    Raises:
        RecipeError: a text with `{a}` is of a list or an object, or some of its columns are empty, and others are not.
    """
    if isinstance(column, list):
        return [_value(row, c, where, cells) for c in column] if _has(row, column) else None
    there, value = _look_up(row, column)
    if not there and "{" in column:
        texts = _Texts(cells)
        try:
            text = texts.vformat(column, (), row)
        except TypeError as error:
            raise RecipeError(
                f"{where}: column {column!r} is to write {error}; expected text in each column that it names. Name a "
                "text inside of it, such as {a[text]} or {a[0]}."
            ) from error
        except (KeyError, IndexError, ValueError, AttributeError):
            return None
        if texts.empty and texts.filled:
            raise RecipeError(
                f"{where}: column {texts.empty[0]!r} is empty, which {column!r} names; fill it, or take the row out."
            )
        return None if texts.empty or (texts.blank and not texts.filled) else text
    return value


def take_rows(rows: Sequence[Row], limit: int | None, seed: int, by: str | None = None) -> list[Row]:
    """Draw rows; groups keep their shares, and none is left out while the limit has room for one of each.

    Args:
        rows: all rows.
        limit: how many are drawn at most; all when unset.
        seed: seed of the choice.
        by: role whose values make the groups; one group when unset.

    Returns:
        Rows in the order they had.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    generator = random.Random(seed)
    ranked: list[tuple[float, float, int]] = []
    for numbers in _groups(rows, by):
        drawn = generator.sample(numbers, min(limit, len(numbers)))
        # the k-th of n stands in the middle of its n-th part, the first before all others
        ranked += [((k + 0.5) / len(numbers) if k else 0.0, generator.random(), n) for k, n in enumerate(drawn)]
    return [rows[n] for n in sorted(n for *_, n in sorted(ranked)[:limit])]


def _groups(rows: Sequence[Row], by: str | None) -> list[list[int]]:
    """Numbers of the rows that have the same value of a role."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        groups[row[by] if by else None].append(n)
    return list(groups.values())


def split_rows(rows: Sequence[Row], fraction: float, seed: int, by: str | None = None) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out ones.

    Args:
        rows: all rows.
        fraction: part that is held out, of every group.
        seed: seed of the choice.
        by: role whose values make the groups; one group when unset.

    Returns:
        Training rows and held-out rows, each in the order they had.

    Raises:
        RecipeError: one of the two would be empty.
    """
    generator = random.Random(seed)
    held: set[int] = set()
    for numbers in _groups(rows, by):
        held.update(generator.sample(numbers, round(len(numbers) * fraction)))
    if not held or len(held) == len(rows):
        raise RecipeError(
            f"eval_fraction={fraction} holds out {len(held)} of {len(rows)} rows; give more rows or another fraction."
        )
    return [r for n, r in enumerate(rows) if n not in held], [r for n, r in enumerate(rows) if n in held]
