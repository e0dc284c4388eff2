"""Rows for training: read, split, tokenised, and the collator that pads them."""

import csv
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from hf_ptune.errors import RecipeError
from hf_ptune.recipe import Recipe

Row = dict[str, Any]
IGNORED = -100  # label of a position that has no loss
# task -> roles a row must have, roles it may have
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SEQ_CLS": (("text", "label"), ("text_pair",)),
    "TOKEN_CLS": (("tokens", "tags"), ()),
    "CAUSAL_LM": (("prompt", "answer"), ()),
}
_MIN_LINES = 25  # topics of fewer lines are too small to be held out


@dataclass(frozen=True)
class Rows:
    """Rows by role, and the names of their labels in order of their numbers; none for language models."""

    train: list[Row]
    held_out: list[Row]
    labels: list[str]


def load_rows(recipe: Recipe) -> Rows:
    """Read a recipe's rows and hold some out.

    Args:
        recipe: names source, columns and split.

    Raises:
        RecipeError: a file or column is missing, or held-out rows have labels that no training row has.
    """
    data = recipe.data
    if data.source == "chatterbot":
        if recipe.task != "SEQ_CLS" or data.columns or data.eval_source:
            raise RecipeError(
                "data.source 'chatterbot' is for task SEQ_CLS and needs neither columns nor eval_source; "
                "remove them, or name a file."
            )
        rows = chatterbot_rows()
    else:
        rows = _read(recipe, data.source)
    if data.eval_source:
        train, held_out = rows, _read(recipe, data.eval_source)
    else:
        by = "label" if recipe.task == "SEQ_CLS" else None
        train, held_out = split_rows(rows, data.eval_fraction, data.split_seed, by)
    labels = label_names(train, recipe.task)
    if recipe.task == "SEQ_CLS" and len(labels) < 2:
        raise RecipeError(f"the training rows have one label only, {labels[0]!r}; classification needs two or more.")
    if unknown := sorted(set(label_names(held_out, recipe.task)) - set(labels)):
        raise RecipeError(f"held-out rows have the labels {unknown[:5]}, which no training row has; add such rows.")
    return Rows(train, held_out, labels)


def read_file(path: Path) -> list[Row]:
    """Read a .jsonl, .csv or .parquet file.

    Raises:
        RecipeError: the file is missing, broken, empty, or of another kind.
    """
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise RecipeError(f"{path}: expected a file that ends in {', '.join(readers)}.")
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file; paths of data start at the recipe's folder.")
    rows = readers[path.suffix](path)
    if not rows:
        raise RecipeError(f"{path}: holds no rows.")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(f"{path}: is no Parquet: {error}") from error
    return rows


def _read(recipe: Recipe, source: str) -> list[Row]:
    path = recipe.folder / source
    needed, possible = ROLES[recipe.task]
    columns = recipe.data.columns
    if wrong := sorted(set(columns) - set(needed + possible)):
        raise RecipeError(
            f"data.columns names the role {wrong[0]!r}; {recipe.task} has {', '.join(needed + possible)}."
        )
    # an optional role is read only where the recipe names it or its column has the role's own name
    return [_by_role(row, needed, possible, columns, f"{path}, row {n}") for n, row in enumerate(read_file(path), 1)]


def _by_role(row: Row, needed: Sequence[str], possible: Sequence[str], columns: Mapping[str, str], where: str) -> Row:
    found: Row = {}
    for role in (*needed, *possible):
        column = columns.get(role, role)
        value = row.get(column)
        if value is None:
            if role in possible and role not in columns:
                continue
            raise RecipeError(
                f"{where}: has no column {column!r} for {role}; it has {', '.join(map(str, row))}. "
                f"Name the column under data.columns.{role}."
            )
        found[role] = value
    for role in ("tokens", "tags"):
        if isinstance(found.get(role), str):
            found[role] = found[role].split()  # CSV has no lists
    if "tokens" in found and len(found["tokens"]) != len(found["tags"]):
        raise RecipeError(
            f"{where}: has {len(found['tokens'])} tokens and {len(found['tags'])} tags; expected as many."
        )
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
    groups: dict[Any, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        groups[row[by] if by else None].append(n)
    generator = random.Random(seed)
    held: set[int] = set()
    for numbers in groups.values():
        held.update(generator.sample(numbers, round(len(numbers) * fraction)))
    if not held or len(held) == len(rows):
        raise RecipeError(
            f"eval_fraction={fraction} holds out {len(held)} of {len(rows)} rows; give more rows or another fraction."
        )
    return [r for n, r in enumerate(rows) if n not in held], [r for n, r in enumerate(rows) if n in held]


def label_names(rows: Sequence[Row], task: str) -> list[str]:
    """Names of the labels in rows, sorted; none for language models."""
    if task == "SEQ_CLS":
        return sorted({str(row["label"]) for row in rows})
    if task == "TOKEN_CLS":
        return sorted({str(tag) for row in rows for tag in row["tags"]})
    return []


def encode_rows(
    rows: Sequence[Row], task: str, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int
) -> list[Row]:
    """Turn rows into what the model takes: ids `[T]`, mask `[T]`, and labels (a number, or `[T]`).

    Args:
        rows: rows by role.
        task: a key of `ROLES`.
        tokenizer: the base's; a fast one for TOKEN_CLS.
        labels: their names.
        max_length: T at most.

    Raises:
        RecipeError: TOKEN_CLS without a fast tokenizer.
    """
    number = {name: n for n, name in enumerate(labels)}
    if task == "SEQ_CLS":
        return [
            dict(tokenizer(str(row["text"]), row.get("text_pair"), truncation=True, max_length=max_length))
            | {"labels": number[str(row["label"])]}
            for row in rows
        ]
    if task == "TOKEN_CLS":
        if not tokenizer.is_fast:
            raise RecipeError(f"{type(tokenizer).__name__} does not tell which word a token is of; use a fast one.")
        return [_encode_tags(row, tokenizer, number, max_length) for row in rows]
    return [_encode_answer(row, tokenizer, max_length) for row in rows]


def _encode_tags(row: Row, tokenizer: PreTrainedTokenizerBase, number: Mapping[str, int], max_length: int) -> Row:
    encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
    words = encoded.word_ids()
    # a word's first token bears its tag
    labels = [
        IGNORED if word is None or word == previous else number[str(row["tags"][word])]
        for word, previous in zip(words, [None, *words], strict=False)
    ]
    return dict(encoded) | {"labels": labels}


def _encode_answer(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    # without its closing special tokens, so that the answer follows as it will when generating
    prompt: list[int] = tokenizer(str(row["prompt"]))["input_ids"]
    while prompt and tokenizer.eos_token_id is not None and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    answer: list[int] = tokenizer(str(row["answer"]), add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    answer = answer[:max_length]
    prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]  # the end of a long prompt is kept
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}


def make_collator(task: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The collator that pads encoded rows of a task to `[B, T]`, on the tokenizer's own side."""
    collators = {
        "SEQ_CLS": DataCollatorWithPadding,
        "TOKEN_CLS": DataCollatorForTokenClassification,
        "CAUSAL_LM": DataCollatorForSeq2Seq,
    }
    return collators[task](tokenizer)
