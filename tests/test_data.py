"""Rows: reading, splitting, and what the model gets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_ptune.data import load_rows, split_rows
from hf_ptune.errors import RecipeError
from hf_ptune.recipe import make_recipe
from hf_ptune.sources import chatterbot_rows, read_file


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


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": "a b", "topic": "x"}, {"q": 'c, "d"\ne', "topic": "y"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "r.csv").write_text('q,topic\na b,x\n"c, ""d""\ne",y\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert read_file(tmp_path / "r.jsonl") == read_file(tmp_path / "r.csv") == read_file(tmp_path / "r.parquet") == rows


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
        ({"source": "r.txt"}, "expected a file that ends in .jsonl, .csv, .parquet"),
        ({"source": "r.jsonl", "eval_source": "e.jsonl", "columns": columns}, "have the labels ['z']"),
        ({"source": "e.jsonl", "eval_source": "e.jsonl", "columns": columns}, "one label only"),
        ({"source": "e.jsonl", "columns": columns}, "holds out 0 of 1 rows"),
        ({"source": "chatterbot", "columns": columns}, "needs neither columns"),
    ]
    for data, message in mistakes:
        with pytest.raises(RecipeError) as caught:
            load_rows(recipe_for(tmp_path, "SEQ_CLS", **data))
        assert message in str(caught.value)


def test_broken_files(tmp_path: Path) -> None:
    for name, text, message in [
        ("a.jsonl", '{"a": 1}\n{', "line 2: is no JSON"),
        ("b.jsonl", "[1]", "line 1: expected an object"),
        ("c.jsonl", "", "holds no rows"),
        ("d.parquet", "no", "is no Parquet"),
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
