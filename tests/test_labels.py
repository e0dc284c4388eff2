"""Labels: names, numbers and choices, read alike in all rows."""

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from test_data import all_of, recipe_for, write_rows
from transformers.utils.logging import get_logger

from hf_ptune.data import load_rows
from hf_ptune.errors import RecipeError
from hf_ptune.tasks import get_task


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    get_logger("hf_ptune").warning_once.cache_clear()  # what an earlier test was told is told again
    return caplog


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
@pytest.mark.parametrize(
    ("names", "values", "expected", "notice"),
    [
        (["1", "2", "3"], [1, 2], ["1", "2"], True),  # the values that are there decide nothing: all are names
        (["1", "2", "3"], [1, 2, 3], ["1", "2", "3"], False),  # 3 counts nothing
        (["1", "2", "3"], [0, 1, 2], ["1", "2", "3"], False),  # 0 is no name
        (["0", "1", "2"], [1, 2], ["1", "2"], False),  # both are one
        (["-1", "0", "1"], [-1, 0, 1], ["-1", "0", "1"], False),
        (["no", "yes"], [0, 1], ["no", "yes"], False),
    ],
)
def test_numbers_are_names_where_all_of_them_are(
    name: str,
    names: list[str],
    values: list[int],
    expected: list[str],
    notice: bool,
    tmp_path: Path,
    warned: pytest.LogCaptureFixture,
) -> None:
    rows = [{"text": str(n), "label": value} for n, value in enumerate(values * 4)]
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=write_rows(tmp_path, name, rows), labels=names))
    told = {row["text"]: row["label"] for row in all_of(found)}
    assert [told[str(n)] for n in range(len(rows))] == expected * 4
    assert ("are read as the names of classes" in warned.text) == notice


def test_classes_of_a_dataset_are_always_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "stars"
    folder.mkdir(parents=True)
    write_rows(folder, "train.jsonl", [{"text": "a", "label": 1 + n % 2} for n in range(8)])
    label = {"name": "label", "dtype": {"class_label": {"names": {"0": "1", "1": "2", "2": "3"}}}}
    features = [{"name": "text", "dtype": "string"}, label]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'dataset_info': {'features': features}})}---\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for labels in (None, ["3", "2", "1"]):
        found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=f"hub:{folder}", labels=labels))
        assert {row["label"] for row in all_of(found)} == ({"2", "3"} if labels is None else {"2", "1"})


@pytest.mark.parametrize("told", ["training", "held-out"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
@pytest.mark.parametrize(
    ("names", "values", "expected", "notice"),
    [
        (["1", "2", "3"], [1, 2], ["2", "3"], True),  # as the numbers of the file that tells the classes
        (["1", "2", "3"], [0, 1, 2], ["1", "2", "3"], False),
        (["1", "2", "3"], [1, 2, 3], ["1", "2", "3"], False),  # 3 counts nothing
        (["0", "1", "2"], [0, 1, 2], ["0", "1", "2"], False),
        (["no", "yes"], [0, 1], ["no", "yes"], False),
        (["no", "yes"], ["yes", "no"], ["yes", "no"], False),
    ],
)
def test_numbers_beside_a_file_that_tells_classes_count_them_too(
    told: str,
    name: str,
    names: list[str],
    values: list[Any],
    expected: list[str],
    notice: bool,
    tmp_path: Path,
    warned: pytest.LogCaptureFixture,
) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    classed = [{"text": f"c{n}", "label": n % len(names)} for n in range(9)]
    datasets.Dataset.from_list(classed, features=features).to_parquet(tmp_path / "classed.parquet")
    plain = write_rows(tmp_path, name, [{"text": str(n), "label": value} for n, value in enumerate(values * 4)])
    source, held_out = ("classed.parquet", plain) if told == "training" else (plain, "classed.parquet")
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, eval_source=held_out))
    by_text = {row["text"]: row["label"] for row in all_of(found)}
    assert [by_text[str(n)] for n in range(4 * len(values))] == expected * 4
    assert [by_text[f"c{n}"] for n in range(9)] == [names[n % len(names)] for n in range(9)]
    assert found.labels == names
    assert ("count the classes of" in warned.text) == notice


def test_numbers_that_are_none_of_the_classes_beside_them_stay_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2"])})
    rows = [{"text": f"c{n}", "label": n % 2} for n in range(4)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "e.parquet")
    source = write_rows(tmp_path, "r.jsonl", [{"text": str(n), "label": 1 + n % 3} for n in range(9)])
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, eval_source="e.parquet"))
    assert found.labels == ["1", "2", "3"] and {str(row["label"]) for row in found.held_out} == {"1", "2"}


def test_names_of_one_number_have_one_order() -> None:
    """Whatever the order of a set, which differs between processes."""
    names = ["0" * zeros + "1" for zeros in range(8)]
    rows = [{"text": "a", "label": name} for name in (*names, "10", "2")]
    assert get_task("SEQ_CLS")().label_names(rows) == [*sorted(names), "2", "10"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_spaces_around_a_label_are_none_of_it(kind: str, tmp_path: Path) -> None:
    separator = "," if kind == "csv" else "\t"
    lines = [f"a{separator}{label}" for label in (" pos", "pos", "neg ", "neg")] * 4
    (tmp_path / f"r.{kind}").write_text("\n".join([f"text{separator}label", *lines]))
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=f"r.{kind}")).labels == ["neg", "pos"]
    (tmp_path / "gap.csv").write_text("text,label\na,x\nb, \n")
    with pytest.raises(RecipeError, match="row 2: a label is empty"):
        load_rows(recipe_for(tmp_path, "SEQ_CLS", source="gap.csv"))


def chosen(folder: Path, name: str, rows: list[tuple[Any, list[Any]]], **data: Any) -> list[int]:
    """Which choice each row's label is."""
    told = [{"text": str(n), "choices": choices, "label": label} for n, (label, choices) in enumerate(rows)]
    if name.endswith(".csv"):
        told = [
            {"text": row["text"], "label": row["label"]} | {f"c{n}": c for n, c in enumerate(row["choices"])}
            for row in told
        ]
        data["columns"] = {"choices": [f"c{n}" for n in range(len(rows[0][1]))]}
    source = write_rows(folder, name, told)
    found = load_rows(recipe_for(folder, "MULTIPLE_CHOICE", **({"source": source} | data)))
    by_text = {row["text"]: row["label"] for row in all_of(found)}
    return [by_text[str(n)] for n in range(len(rows))]


@pytest.mark.parametrize(
    ("name", "rows", "expected", "notice"),
    [
        ("r.csv", [("1", ["1", "2", "9"]), ("1", ["4", "5", "6"])], [1, 1], ""),  # 1 is no choice of the second row
        ("r.csv", [("1", ["1", "2", "9"]), ("9", ["1", "2", "9"])], [0, 2], ""),  # 9 is no number of three
        ("r.csv", [("2", ["1", "2", "9"]), ("1", ["1", "2", "9"])], [1, 0], "are taken as choices"),
        ("r.csv", [("0", ["0", "1", "2"]), ("1", ["0", "1", "2"])], [0, 1], ""),
        ("r.csv", [("A", ["B", "A", "O"]), ("C", ["B", "A", "O"])], [0, 2], ""),
        ("r.csv", [("c", ["a", "b", "c"]), ("1", ["d", "e", "f"]), ("B", ["d", "e", "f"])], [2, 1, 1], ""),
        ("r.csv", [(" b", ["a", " b"]), ("a ", ["a", " b"])], [1, 0], ""),
        ("r.jsonl", [(1, [1, 5, 7]), (5, [1, 5, 7])], [0, 1], ""),
        ("r.jsonl", [(1, [1, 5, 7]), (1, [4, 5, 6])], [1, 1], ""),
        ("r.jsonl", [(1, [1, 2, 7]), (2, [1, 2, 7])], [1, 2], "are taken as numbers from 0"),
        ("r.parquet", [("1", ["1", "2", "9"]), ("1", ["4", "5", "6"])], [1, 1], ""),
    ],
)
def test_labels_of_choices_are_read_alike(
    name: str, rows: Any, expected: list[int], notice: str, tmp_path: Path, warned: pytest.LogCaptureFixture
) -> None:
    assert chosen(tmp_path, name, rows, eval_fraction=0.5) == expected
    assert notice in warned.text and ("are taken as" in warned.text) == bool(notice)


def test_held_out_choices_are_read_like_those_of_training(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path, "e.jsonl", [{"text": "a", "choices": ["4", "5", "6"], "label": "1"}])
    rows = [("1", ["1", "2", "9"]), ("2", ["1", "2", "9"])]
    assert chosen(tmp_path, "r.jsonl", rows, eval_source=held_out) == [1, 2]


def test_labels_of_several_kinds_that_may_mean_several_choices(tmp_path: Path) -> None:
    rows = [("1", ["1", "2", "9"]), ("f", ["d", "e", "f"]), ("0", ["d", "e", "f"])]
    with pytest.raises(RecipeError) as caught:
        chosen(tmp_path, "r.csv", rows)
    said = str(caught.value)
    assert "r.csv, row 1: the label is '1', which may be choice '1' or '2'" in said and "Write all labels" in said
