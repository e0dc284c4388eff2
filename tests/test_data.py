"""Rows: reading, splitting, and what the model gets."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_ptune.data import load_rows, split_rows, take_rows
from hf_ptune.errors import RecipeError
from hf_ptune.recipe import make_recipe
from hf_ptune.sources import chatterbot_rows, read_file
from hf_ptune.tasks.question_answering import QuestionAnswering
from hf_ptune.tasks.token_classification import TokenClassification


def words_tokenizer(words: str = "a b c d e f g h") -> PreTrainedTokenizerFast:
    """A tokenizer of whole words in brackets; "xy" is cut into two tokens."""
    vocabulary = {
        w: n for n, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "x", "##y", *words.split(), "[MASK]"])
    }
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        mask_token="[MASK]",
    )


def recipe_for(folder: Path, task: str, **data: Any) -> Any:
    content = {"base": "b", "task": task, "method": "bitfit", "output_dir": "o", "data": data}
    return make_recipe(content, folder=folder)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """A file of rows, by the ending of its name; CSV has lists as pandas writes them."""
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    elif name.endswith(".csv"):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    return name


def all_of(rows: Any) -> list[dict[str, Any]]:
    return [*rows.train, *rows.held_out, *rows.test]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"q": "a b", "topic": "x"}, {"q": 'c, "d"\ne', "topic": "y"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "r.csv").write_text('q,topic\na b,x\n"c, ""d""\ne",y\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    (tmp_path / "r.json").write_text(json.dumps(rows, indent=1))
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert read_file(tmp_path / f"r.{kind}") == rows, kind


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    (tmp_path / "r.tsv").write_text('sentence\tlabel\n"quoted" it begins\t1\n"never closed\t0\n')
    assert read_file(tmp_path / "r.tsv") == [
        {"sentence": '"quoted" it begins', "label": "1"},
        {"sentence": '"never closed', "label": "0"},
    ]
    (tmp_path / "t.tsv").write_text("tokens\ttags\n" + '["a", "b"]\t["O", "B-X"]\n' * 4)
    assert load_rows(recipe_for(tmp_path, "TOKEN_CLS", source="t.tsv")).train[0]["tokens"] == ["a", "b"]


def test_columns_and_files(tmp_path: Path) -> None:
    rows = [{"q": f"line {n}", "topic": "xy"[n % 2]} for n in range(8)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": "a", "topic": "z"}))
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source="r.jsonl", columns={"text": "q", "label": "topic"}))
    assert found.labels == ["x", "y"] and (len(found.train), len(found.held_out)) == (6, 2)
    assert found.train[0].keys() == {"text", "label"}
    columns = {"text": "q", "label": "topic"}
    mistakes = [
        ({"source": "r.jsonl"}, "row 1: has no column 'text' for text; it has q, topic"),
        ({"source": "r.jsonl", "columns": {"texts": "q"}}, "names the role 'texts'"),
        ({"source": "none.jsonl"}, "there is no such file"),
        ({"source": "r.txt"}, "expected a file that ends in .jsonl, .json, .csv, .tsv, .parquet"),
        (
            {"source": "r.jsonl", "eval_source": "e.jsonl", "columns": columns},
            "add such rows, or name all labels under data.labels",
        ),
        ({"source": "e.jsonl", "eval_source": "e.jsonl", "columns": columns}, "one label only"),
        ({"source": "e.jsonl", "columns": columns}, "holds out 0 of 1 rows"),
        (
            {"source": "r.jsonl", "eval_split": "test", "columns": columns},
            "data.eval_split is 'test', but r.jsonl is no dataset of the Hub. Name one, or a file, by",
        ),
        (
            {"source": "r.jsonl", "test_source": "r.jsonl", "test_config": "sst2", "columns": columns},
            "data.test_config is 'sst2', but r.jsonl is no dataset of the Hub. Name one, or a file, by",
        ),
        ({"source": "chatterbot", "columns": columns}, "needs neither columns"),
    ]
    for data, message in mistakes:
        with pytest.raises(RecipeError) as caught:
            load_rows(recipe_for(tmp_path, "SEQ_CLS", **data))
        assert message in str(caught.value)


def test_columns_of_every_form(tmp_path: Path) -> None:
    row = {"a": "x", "b": "y", "in": {"texts": ["r", "s"]}, "n": 0, "t": "p"}
    (tmp_path / "r.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    columns = {"text": "{t} {a}", "choices": ["a", "b"], "label": "n"}
    found = load_rows(recipe_for(tmp_path, "MULTIPLE_CHOICE", source="r.jsonl", columns=columns))
    assert found.train[0] == {"text": "p x", "choices": ["x", "y"], "label": 0} and found.labels == []
    columns = {"prompt": "a", "references": "in.texts"}
    found = load_rows(recipe_for(tmp_path, "CAUSAL_LM", source="r.jsonl", columns=columns))
    assert found.train[0] == {"prompt": "x", "references": ["r", "s"]}
    for columns, message in [
        ({"prompt": "a", "references": "in.text"}, "has no column 'in.text' for references; it has a, b, in, n, t"),
        ({"prompt": "{z}", "answer": "a"}, "has no column '{z}' for prompt"),
        ({"prompt": "a", "answer": ["a", "z"]}, "has no column ['a', 'z'] for answer"),
        ({"instruction": "a", "output": "b", "input": "z"}, "has no column 'z' for input"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_rows(recipe_for(tmp_path, "CAUSAL_LM", source="r.jsonl", columns=columns))
        assert message in str(caught.value)


def test_a_column_is_found_by_the_whole_of_its_name(tmp_path: Path) -> None:
    """A point may be part of a name, inside a column too, and so may braces."""
    row = {"a": {"b.c": "x", "d": {"e": "y"}}, "{t}": "z", "t": "p"}
    source = write_rows(tmp_path, "r.jsonl", [row] * 4)
    for column, text in (("a.b.c", "x"), ("a.d.e", "y"), ("{t}", "z"), ("{t}!", "p!")):
        columns: dict[str, Any] = {"prompt": column, "answer": "t"}
        recipe = recipe_for(tmp_path, "CAUSAL_LM", source=source, columns=columns, where={column: text})
        assert all_of(load_rows(recipe))[0]["prompt"] == text
    with pytest.raises(RecipeError, match="has no column 'a.b.e' for prompt"):
        load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=source, columns={"prompt": "a.b.e", "answer": "t"}))


def test_labels_have_the_names_that_are_given(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": n % 2, "other": "high"} for n in range(8)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.jsonl").write_text(json.dumps({"tokens": ["a", "b"], "tags": [2, "O"]}))
    names: dict[str, Any] = {"label": ["no", "yes", "perhaps"], "tags": ["O", "B-X", "I-X"]}

    def labelled(task: str = "SEQ_CLS", **data: Any) -> Any:
        return load_rows(recipe_for(tmp_path, task, **({"source": "r.jsonl"} | data)))

    assert labelled().labels == ["0", "1"]
    found = labelled(labels=names["label"])
    assert found.labels == names["label"] and {r["label"] for r in found.train} == {"no", "yes"}
    (tmp_path / "names.json").write_text(json.dumps(names["label"]))
    assert labelled(labels="names.json") == found
    (tmp_path / "labels.json").write_text(json.dumps(names))
    assert labelled() == found
    assert labelled("TOKEN_CLS", source="t.jsonl", eval_source="t.jsonl").train[0]["tags"] == ["I-X", "O"]
    for data, message in [
        ({"labels": ["no"]}, "row 2: has the label 1; expected a number below 1 or one of no"),
        ({"labels": names["label"], "columns": {"label": "other"}}, "row 1: has the label 'high'; expected a number"),
        ({"labels": "none.json"}, "cannot be read as names of labels"),
        ({"labels": "r.jsonl"}, "cannot be read as names of labels"),
    ]:
        with pytest.raises(RecipeError, match=message):
            labelled(**data)
    (tmp_path / "labels.json").write_text('{"label": "no"}')
    with pytest.raises(RecipeError, match="expected a list of names in order of their numbers"):
        labelled()


def test_names_beside_the_rows_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": n % 2, "prompt": "a", "answer": "b"} for n in range(8)]
    source = write_rows(tmp_path, "r.jsonl", rows)
    (tmp_path / "labels.json").write_text('{"0": "cat"}')  # of a detector, say
    assert len(all_of(load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=source)))) == 8
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, labels=["n", "y"])).labels == ["n", "y"]
    with pytest.raises(RecipeError, match="labels.json: expected a list .*or name the labels under data.labels"):
        load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source))
    (tmp_path / "labels.json").write_text('["no", "yes"]', encoding="utf-8-sig")
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source)).labels == ["no", "yes"]


def test_fewer_rows_and_test_rows(tmp_path: Path) -> None:
    rows = [{"text": str(n), "label": "ab"[n % 2]} for n in range(40)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings: dict[str, Any] = {"source": "r.jsonl", "test_source": "r.jsonl", "limit": 6, "eval_limit": 3}
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", **settings))
    assert (len(found.train), len(found.held_out), len(found.test)) == (6, 3, 3)
    assert not {r["text"] for r in found.train} & {r["text"] for r in found.held_out}
    order = [int(r["text"]) for r in found.train]
    assert order == sorted(order) != list(range(6))
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", **settings)) == found
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", **(settings | {"split_seed": 1}))) != found


def test_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "pairs"  # load_dataset reads a folder as it reads a repository
    folder.mkdir(parents=True)
    for split, count in (("train", 8), ("validation", 4), ("test", 2)):
        rows = [{"s1": f"a {n}", "s2": "b", "label": n % 2} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    label = {"name": "label", "dtype": {"class_label": {"names": {"0": "yes it is", "1": "no"}}}}
    features = [{"name": "s1", "dtype": "string"}, {"name": "s2", "dtype": "string"}, label]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'dataset_info': {'features': features}})}---\n")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    columns = {"text": "s1", "text_pair": "s2"}
    settings: dict[str, Any] = {"source": f"hub:{folder}", "columns": columns}
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", **settings, eval_split="validation", test_split="test"))
    assert (len(found.train), len(found.held_out), len(found.test)) == (8, 4, 2)
    assert found.labels == ["yes it is", "no"] and found.train[1] == {"text": "a 1", "text_pair": "b", "label": "no"}
    for data in ({"split": "none"}, {"source": "hub:owner/nothing-of-that-name"}):
        with pytest.raises(RecipeError, match=r"cannot be loaded: .* It needs the network once"):
            load_rows(recipe_for(tmp_path, "SEQ_CLS", **(settings | data)))


@pytest.mark.parametrize("option", ["config", "revision", "split"])
def test_what_only_a_dataset_of_the_hub_has_is_refused_beside_files(option: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path, "r.jsonl", [{"text": "a", "label": n % 2} for n in range(8)])
    for data in ({"source": source, "eval_source": source}, {"source": "chatterbot"}):
        with pytest.raises(
            RecipeError, match=rf"data.{option} is 'x', .*, but no source .*data.{option}: (null|train)"
        ):
            load_rows(recipe_for(tmp_path, "SEQ_CLS", **data, **{option: "x"}))
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, split="train")).train


def test_a_configuration_is_of_the_dataset_that_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[Any, ...]] = []

    def read_hub(*asked: Any) -> Any:
        read.append(asked)
        return [{"text": "a", "label": n % 2} for n in range(8)], {}

    monkeypatch.setattr("hf_ptune.data.read_hub", read_hub)
    part: dict[str, Any] = {"config": "sst2", "revision": "abc"}
    settings = part | {"source": "hub:glue", "eval_source": "hub:other", "test_split": "test"}
    load_rows(recipe_for(tmp_path, "SEQ_CLS", **settings))
    assert read == [("glue", "sst2", "train", "abc"), ("other", None, "train", None), ("glue", "sst2", "test", "abc")]
    read.clear()
    source = write_rows(tmp_path, "r.jsonl", [{"text": "a", "label": n % 2} for n in range(8)])
    load_rows(recipe_for(tmp_path, "SEQ_CLS", **part, source=source, eval_source="hub:glue", split="test"))
    assert read == [("glue", "sst2", "test", "abc")]
    read.clear()
    settings = settings | {"eval_config": "plain", "eval_split": "dev", "test_split": None, "test_config": "ax"}
    load_rows(recipe_for(tmp_path, "SEQ_CLS", **settings))
    assert read == [("glue", "sst2", "train", "abc"), ("other", "plain", "dev", None), ("glue", "ax", "train", "abc")]


def test_broken_files(tmp_path: Path) -> None:
    for name, text, message in [
        ("a.jsonl", '{"a": 1}\n{', "line 2: is no JSON"),
        ("b.jsonl", "[1]", "line 1: expected an object"),
        ("c.jsonl", "", "holds no rows"),
        ("d.parquet", "no", "is no Parquet"),
        ("e.json", '{"a": 1}\n{"a": 2}', "is no JSON.*a row a line ends in .jsonl"),
        ("f.json", '{"data": [{"a": 1}]}', "holds .*expected a list of objects"),
        ("g.json", "[1]", "expected a list of objects"),
        ("h.json", "[]", "holds no rows"),
        ("i.tsv", "a\tb\nc\td\te\n", "has more cells than the header; texts hold no tabs"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_file(tmp_path / name)
    (tmp_path / "t.jsonl").write_text('{"tokens": ["a"], "tags": ["O", "O"]}')
    with pytest.raises(RecipeError, match="has 1 tokens and 2 tags"):
        load_rows(recipe_for(tmp_path, "TOKEN_CLS", source="t.jsonl"))


def test_chatterbot_topics() -> None:
    rows = chatterbot_rows()
    assert Counter(r["label"] for r in rows) == {
        "ai": 61,
        "coding": 96,
        "emotion": 48,
        "literature": 29,
        "psychology": 62,
        "trivia": 261,
    }
    assert len({r["text"].lower() for r in rows}) == len(rows)


def test_the_split_is_stratified_and_fixed() -> None:
    rows = [{"text": str(n), "label": "a" if n < 40 else "b"} for n in range(60)]
    train, held = split_rows(rows, 0.25, 3, by="label")
    assert Counter(r["label"] for r in held) == {"a": 10, "b": 5}
    assert sorted(int(r["text"]) for r in train + held) == list(range(60))
    assert split_rows(rows, 0.25, 3, by="label") == (train, held) != split_rows(rows, 0.25, 4, by="label")


@pytest.mark.parametrize("seed", range(4))
def test_a_rare_label_stands_wherever_the_split_puts_it(seed: int, tmp_path: Path) -> None:
    rows = [{"tokens": ["a"], "tags": ["B-EVENT" if n == 5 else "B-X"]} for n in range(12)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for further in ({}, {"limit": 2}):
        found = load_rows(recipe_for(tmp_path, "TOKEN_CLS", source="r.jsonl", split_seed=seed, **further))
        assert found.labels == ["B-EVENT", "B-X"]
    for kept in ({"eval_source": "r.jsonl", "limit": 2}, {"labels": ["B-X", "B-EVENT"], "limit": 2}):
        load_rows(recipe_for(tmp_path, "TOKEN_CLS", source="r.jsonl", split_seed=seed, **kept))


def test_rows_are_drawn_from_every_class() -> None:
    rows = [{"text": str(n), "label": "abc"[0 if n < 90 else 1 if n < 98 else 2]} for n in range(100)]
    for seed in range(5):
        drawn = take_rows(rows, 20, seed, by="label")
        counts = Counter(r["label"] for r in drawn)
        assert sum(counts.values()) == 20 and min(counts.values()) >= 1 and counts["a"] >= 17
        assert len({r["label"] for r in take_rows(rows, 3, seed, by="label")}) == 3
        assert [int(r["text"]) for r in drawn] == sorted(int(r["text"]) for r in drawn)
        assert len(take_rows(rows, 2, seed, by="label")) == 2
    assert take_rows(rows, 20, 0, by="label") != take_rows(rows, 20, 1, by="label")


@pytest.mark.parametrize("values", [(True, False), ("true", "false"), ("True", "False"), ("TRUE", " false")])
@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_true_is_true_in_every_file(values: tuple[Any, Any], name: str, tmp_path: Path) -> None:
    rows = [{"text": str(n), "label": "xy"[n // 2 % 2], "ok": values[n % 2]} for n in range(16)]
    source = write_rows(tmp_path, name, rows)
    for asked in (True, False):
        found = all_of(load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, where={"ok": asked})))
        assert len(found) == 8 and all(int(r["text"]) % 2 != asked for r in found)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet"])
@pytest.mark.parametrize("values", [(1, 2), (1.0, 2.0), (1.5, 1.0)])
def test_a_number_is_the_same_however_it_is_written(values: tuple[float, float], name: str, tmp_path: Path) -> None:
    rows = [{"text": str(n), "label": "xy"[n // 2 % 2], "s": values[n % 2]} for n in range(16)]
    source = write_rows(tmp_path, name, rows)
    for asked in [v for v in (1, 1.0, 2, 2.0, 1.5) if v in values]:
        found = all_of(load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, where={"s": asked})))
        assert len(found) == 8 and all(values[int(r["text"]) % 2] == asked for r in found)


def test_texts_of_digits_are_no_numbers(tmp_path: Path) -> None:
    rows = [{"text": str(n), "label": "xy"[n // 2 % 2], "v": ["1.10", "1.1", "01", "1"][n // 8]} for n in range(32)]
    source = write_rows(tmp_path, "r.csv", rows)
    for asked in (1.1, "1.10", "1.1", "01", 1, "1"):
        found = all_of(load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, where={"v": asked})))
        assert len(found) == 8 and len({int(r["text"]) // 8 for r in found}) == 1


def test_rows_are_asked_by_columns_that_there_are(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "xy"[n % 2], "in": {"kind": "k"}} for n in range(8)]
    rows[1]["seldom"] = 1
    source = write_rows(tmp_path, "r.jsonl", rows)
    for column in ("kind", "in.kinds"):
        with pytest.raises(RecipeError) as caught:
            load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, where={"in.kind": "k", column: "k"}))
        assert f"has no column {column!r}, which data.where names; it has text, label, in, seldom" in str(caught.value)
    with pytest.raises(RecipeError, match="no row has {'seldom': 2}, as data.where asks"):
        load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, where={"seldom": 2}))
    assert len(all_of(load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, where={"in.kind": "k"})))) == 8


@pytest.mark.parametrize("of_old", [False, True])
def test_classes_of_a_parquet_file_have_their_names(of_old: bool, tmp_path: Path) -> None:
    """As `datasets` writes them, one or a list, now and as it did before."""
    classes = datasets.ClassLabel(names=["O", "B-X"])
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "tokens": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "tags": datasets.List(classes),
        }
    )
    rows = [{"text": f"a {n}", "tokens": ["a", "b"], "label": n % 2, "tags": [n % 2, 0]} for n in range(8)]
    path = tmp_path / "r.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    if of_old:
        table = pyarrow.parquet.read_table(path)
        told = table.schema.metadata[b"huggingface"].replace(b'"_type": "List"', b'"length": -1, "_type": "Sequence"')
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": told}), path)
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=path.name))
    assert found.labels == ["no", "yes"] and {r["label"] for r in all_of(found)} == {"no", "yes"}
    found = load_rows(recipe_for(tmp_path, "TOKEN_CLS", source=path.name))
    assert found.labels == ["O", "B-X"] and {tuple(r["tags"]) for r in all_of(found)} == {("O", "O"), ("B-X", "O")}
    (tmp_path / "labels.json").write_text(json.dumps({"label": ["false", "true"]}))  # comes first, as ever
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=path.name)).labels == ["false", "true"]


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("of_old", [False, True])
def test_classes_inside_a_column_have_their_names(
    hub: bool, of_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kind = datasets.ClassLabel(names=["no", "yes"])
    words = {"w": datasets.List(datasets.Value("string")), "t": datasets.List(datasets.ClassLabel(names=["O", "B-X"]))}
    features = datasets.Features({"in": {"text": datasets.Value("string"), "of": {"kind": kind}}, "words": words})
    inner = [{"text": f"a {n}", "of": {"kind": n % 2}} for n in range(8)]
    rows = [{"in": row, "words": {"w": ["a", "b"], "t": [1, 0]}} for row in inner]
    path = tmp_path / "rows" / "train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    if of_old:  # a list of several columns
        table = pyarrow.parquet.read_table(path)
        told = json.loads(table.schema.metadata[b"huggingface"])
        plain = {name: feature["feature"] for name, feature in told["info"]["features"]["words"].items()}
        told["info"]["features"]["words"] = {"feature": plain, "_type": "Sequence"}
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(told)}), path)
    source = f"hub:{path.parent}" if hub else "rows/train.parquet"
    columns = {"text": "in.text", "label": "in.of.kind"}
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, columns=columns))
    assert found.labels == ["no", "yes"] and {r["label"] for r in all_of(found)} == {"no", "yes"}
    columns = {"tokens": "words.w", "tags": "words.t"}
    found = load_rows(recipe_for(tmp_path, "TOKEN_CLS", source=source, columns=columns))
    assert found.labels == ["O", "B-X"] and {tuple(r["tags"]) for r in all_of(found)} == {("B-X", "O")}


WORDS = [(["a", "b"], ["B-X", "O"]), (["c d", "e"], ["O", "B-X"]), (["[", "f"], ["O", "O"]), (["g"], ["B-X"])]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet", "r.csv"])
@pytest.mark.parametrize("write", [json.dumps, str])
def test_lists_that_are_written_as_text(name: str, write: Any, tmp_path: Path) -> None:
    rows = [{"tokens": write(tokens), "tags": write(tags)} for tokens, tags in WORDS]
    found = all_of(load_rows(recipe_for(tmp_path, "TOKEN_CLS", source=write_rows(tmp_path, name, rows))))
    assert sorted((r["tokens"], r["tags"]) for r in found) == sorted(WORDS)
    rows = [{"text": "a", "choices": write(["b", "c"]), "label": 1}] * 4
    found = all_of(load_rows(recipe_for(tmp_path, "MULTIPLE_CHOICE", source=write_rows(tmp_path, name, rows))))
    assert found[0]["choices"] == ["b", "c"]
    rows = [{"context": "a b", "question": "q", "answers": write({"text": ["b"], "answer_start": [2]})}] * 4
    found = all_of(load_rows(recipe_for(tmp_path, "QUESTION_ANS", source=write_rows(tmp_path, name, rows))))
    assert found[0]["answers"] == {"text": ["b"], "answer_start": [2]}


@pytest.mark.parametrize(
    ("tokens", "tags", "expected"),
    [
        ("a [1] b", "O O B-X", ["a", "[1]", "b"]),
        ("[1] and [2]", "O O B-X", ["[1]", "and", "[2]"]),
        ('["a" is odd]', "O O B-X", ['["a"', "is", "odd]"]),
        ('["a" is odd]', ["O", "O", "B-X"], ['["a"', "is", "odd]"]),
        ('["a b", "c"]', ["O", "O", "B-X"], ['["a', 'b",', '"c"]']),
        ('["a b", "c"]', ["O", "B-X"], ["a b", "c"]),
        (["a", "b"], '["O", "B-X"]', ["a", "b"]),
    ],
)
def test_a_sentence_stays_what_it_is(tokens: Any, tags: Any, expected: list[str]) -> None:
    row = TokenClassification().check_row({"tokens": tokens, "tags": tags}, "here")
    assert row["tokens"] == expected and row["tags"][-1] == "B-X" and set(row["tags"][:-1]) == {"O"}


@pytest.mark.parametrize(
    ("tokens", "tags", "message"),
    [
        ('["a", "b"]', ["O", "B-X"], "tokens are .* which may be a list or 2 words; write them as a list"),
        ('["a", "b"]', "O B-X", "tokens are .* which may be a list or 2 words; write them as a list"),
        ('["a b", "c"]', '["O", "O", "B-X"]', "has 2 tokens and 3 tags"),
        ("['a' 'b']", "['O' 'B-X']", "here: tags holds .* which is no list in JSON"),
    ],
)
def test_sentences_that_may_be_lists(tokens: Any, tags: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TokenClassification().check_row({"tokens": tokens, "tags": tags}, "here")


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet", "r.csv"])
def test_rows_without_an_answer(name: str, tmp_path: Path) -> None:
    def answers(told: list[Any], columns: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        rows = [{"context": "in 1990", "question": str(n)} | row for n, row in enumerate(told)]
        recipe = recipe_for(tmp_path, "QUESTION_ANS", source=write_rows(tmp_path, name, rows), columns=columns)
        found = all_of(load_rows(replace(recipe, task_options=options)))
        return [row["answers"] for row in sorted(found, key=lambda row: str(row["question"]))]

    none, year = {"text": [], "answer_start": []}, {"text": ["1990"], "answer_start": [3]}
    two = {"answers": ["answer", "start"]}
    told = [{"answer": None, "start": None}, {"answer": 1990, "start": 3}] * 2
    assert answers(told, two, unanswerable=True) == [none, year] * 2
    whole = [{"answers": None}, {"answers": {"text": ["1990"], "answer_start": [3]}}] * 2
    assert answers(whole, {}, unanswerable=True) == [none, year] * 2
    for rows, columns in ((told, two), (whole, {})):
        with pytest.raises(RecipeError, match="row 1: has no answer; set task_options.unanswerable to true"):
            answers(rows, columns)


@pytest.mark.parametrize(
    "answers", [None, [], "", {"text": None, "answer_start": None}, [None, None], ["", ""], [" ", 0]]
)
def test_answers_that_are_none(answers: Any, tmp_path: Path) -> None:
    rows = [{"context": "a b", "question": "q", "answers": answers}] * 4
    recipe = recipe_for(tmp_path, "QUESTION_ANS", source=write_rows(tmp_path, "r.jsonl", rows))
    found = load_rows(replace(recipe, task_options={"unanswerable": True}))
    assert all(row["answers"] == {"text": [], "answer_start": []} for row in all_of(found))
    rows = [{"context": "a b", "question": "q"}] * 4
    recipe = replace(recipe, data=replace(recipe.data, source=write_rows(tmp_path, "n.jsonl", rows)))
    with pytest.raises(RecipeError, match="row 1: has no column 'answers'"):
        load_rows(replace(recipe, task_options={"unanswerable": True}))


@pytest.mark.parametrize(("value", "text"), [(1990, "1990"), (1990.0, "1990"), (2.5, "2.5"), ("1990", "1990")])
def test_answers_that_are_numbers(value: Any, text: str) -> None:
    row = {"context": f"in {text}", "question": "q", "answers": [value, 3]}
    assert QuestionAnswering().check_row(row, "here")["answers"] == {"text": [text], "answer_start": [3]}
    row["answers"] = {"text": [value], "answer_start": [2]}
    with pytest.raises(RecipeError, match="is not at character 2"):
        QuestionAnswering().check_row(row, "here")
