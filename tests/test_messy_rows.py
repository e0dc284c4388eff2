"""Rows as files have them: numbers for names, empty cells, lists in CSV, other encodings, and what is too long."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_data import recipe_for, words_tokenizer, write_rows
from test_train import ROWS, write_base
from tokenizers_of import tokenizer_of

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.cloze import ClozeCollator
from hf_ptune.data import load_rows
from hf_ptune.errors import GuardError, RecipeError
from hf_ptune.recipe import make_recipe
from hf_ptune.row_checks import check_features, check_lengths
from hf_ptune.tasks import Task, get_task
from hf_ptune.tasks.causal_lm import CausalLM
from hf_ptune.tasks.masked_lm import MaskedLM
from hf_ptune.tasks.multiple_choice import MultipleChoice
from hf_ptune.tasks.question_answering import QuestionAnswering
from hf_ptune.tasks.sequence_classification import SequenceClassification
from hf_ptune.tasks.token_classification import TokenClassification
from hf_ptune.train import run


def write(folder: Path, name: str, rows: Any) -> str:
    text = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return name


def said(folder: Path, task: str, **data: Any) -> str:
    """What is said against rows."""
    with pytest.raises(RecipeError) as caught:
        load_rows(recipe_for(folder, task, **data))
    return str(caught.value)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (["1", "2", "3"], [0, 1, 2], ["1", "2", "3"]),  # numbers count the names, digits or not
        (["1", "2", "3"], [1, 2, 3], ["1", "2", "3"]),  # 3 can only be a name
        (["1", "2", "3"], ["1", "2", "3"], ["1", "2", "3"]),  # text is a name
        (["no", "yes"], [0.0, 1.0, 1.0], ["no", "yes", "yes"]),
        (["no", "yes"], [False, True, True], ["no", "yes", "yes"]),
        (["False", "True"], [False, True, True], ["False", "True", "True"]),
    ],
)
def test_numbers_count_the_names(names: list[str], values: list[Any], expected: list[str], tmp_path: Path) -> None:
    source = write(tmp_path, "r.jsonl", [{"text": str(n), "label": v} for n, v in enumerate(values * 4)])
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, labels=names))
    told = {row["text"]: row["label"] for row in found.train + found.held_out}
    assert [told[str(n)] for n in range(12)] == expected * 4


def test_files_that_lack_a_class_are_read_like_the_others(tmp_path: Path) -> None:
    train = write(tmp_path, "t.jsonl", [{"text": str(n), "label": n} for n in (1, 2, 3, 4, 5)])
    held_out = write(tmp_path, "e.jsonl", [{"text": "4", "label": 4}, {"text": "1", "label": 1}])
    names = list("12345")
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=train, eval_source=held_out, labels=names))
    assert all(r["label"] == r["text"] for r in found.train + found.held_out)


@pytest.mark.parametrize("names", [["0.5", "1.0", "2.0"], None])
def test_numbers_with_points_are_classes_where_they_are_named(names: list[str] | None, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": v} for v in (0.5, 1.0, 2.0, 1.0)]
    source = write(tmp_path, "r.jsonl", rows * 4)
    if names is None:
        assert "has the label 0.5" in said(tmp_path, "SEQ_CLS", source=source)
    else:
        found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, labels=names))
        assert {r["label"] for r in found.train} == set(names)


@pytest.mark.parametrize(
    ("cells", "names", "expected"),
    [
        (["0.0", "1.0"], ["neg", "pos"], {"neg", "pos"}),
        (["0.0", "1.0"], None, {"0", "1"}),
        (["0.5", "1.0"], ["0.5", "1.0"], {"0.5", "1.0"}),
        (["1.10", "1.9"], ["1.10", "1.9"], {"1.10", "1.9"}),
        (["False", "True"], ["no", "yes"], {"no", "yes"}),
        (["True", "False"], None, {"True", "False"}),
    ],
)
def test_numbers_and_truths_in_csv_are_what_they_are_elsewhere(
    cells: list[str], names: list[str] | None, expected: set[str], tmp_path: Path
) -> None:
    source = write(tmp_path, "r.csv", "text,label\n" + "".join(f"a,{cell}\n" for cell in cells * 4))
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, labels=names))
    assert {str(r["label"]) for r in found.train} == expected


def test_numbers_to_be_predicted_are_no_classes_in_csv_either(tmp_path: Path) -> None:
    source = write(tmp_path, "r.csv", "text,label\n" + "a,0.2\nb,3.0\n" * 4)
    assert "has the label 0.2" in said(tmp_path, "SEQ_CLS", source=source)


def test_headers_that_name_no_columns_are_refused(tmp_path: Path) -> None:
    for name, text, message in (
        ("twice.csv", "text,text,label\na,b,x\n", "has 'text' more than once"),
        ("semicolon.csv", "text;label\na;x\n", "is one cell, divided by ';'"),
        ("tabs.csv", "text\tlabel\na\tx\n", "tabs divide those of .tsv"),
    ):
        assert message in said(tmp_path, "SEQ_CLS", source=write(tmp_path, name, text))


def test_a_number_that_is_no_choice_s_name_counts_the_choices() -> None:
    row = {"text": "a", "choices": ["1", "2", "0"]}
    assert MultipleChoice().check_row(row | {"label": 1}, "here")["label"] == 1
    assert MultipleChoice().check_row(row | {"label": "1"}, "here")["label"] == 0
    assert MultipleChoice().check_row(row | {"label": 2.0}, "here")["label"] == 2
    assert MultipleChoice().check_row({"text": "a", "choices": [10, 20], "label": 20}, "here")["label"] == 1
    assert MultipleChoice().check_row({"text": "a", "choices": [1.5, 2.5], "label": 2.5}, "here")["label"] == 1


def test_whole_numbers_are_one_label_however_they_are_written(tmp_path: Path) -> None:
    train = write(tmp_path, "t.csv", "text,label\na,0\nb,1\nc,1\n")
    held_out = write(tmp_path, "e.jsonl", [{"text": "d", "label": 1.0}])
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=train, eval_source=held_out)).labels == ["0", "1"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.5, r"row 1: has the label 2.5; expected the name or number of a class.*regression"),
        (float("nan"), "row 1: column 'label' is empty"),
        (None, "row 1: column 'label' is empty; fill it"),
        ("", "row 1: a label is empty"),
        (["x", "y"], r"row 1: the label is \['x', 'y'\]; expected one"),
    ],
)
def test_labels_that_are_none(value: Any, message: str, tmp_path: Path) -> None:
    source = write(tmp_path, "r.jsonl", [{"text": "a", "label": value}, {"text": "b", "label": "x"}])
    with pytest.raises(RecipeError, match=message):
        load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source))


def test_tags_that_are_numbers_want_names(tmp_path: Path) -> None:
    source = write(tmp_path, "r.jsonl", [{"tokens": ["a", "b"], "tags": [0, 3]}] * 4)
    assert "the tags are numbers (0, 3)" in said(tmp_path, "TOKEN_CLS", source=source)
    for outside in "Oo":
        source = write(tmp_path, "o.jsonl", [{"tokens": ["a", "b"], "tags": [outside, outside]}] * 4)
        assert f"no tag but '{outside}'" in said(tmp_path, "TOKEN_CLS", source=source)


def test_an_empty_cell_is_no_data(tmp_path: Path) -> None:
    rows = [{"p": "a", "r1": "b", "r2": "c", "r3": gap} for gap in (None, "", float("nan"), "d")]
    source = write(tmp_path, "g.jsonl", rows)
    columns = {"prompt": "p", "references": ["r1", "r2", "r3"]}
    found = load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=source, columns=columns))
    assert sorted(len(r["references"]) for r in found.train + found.held_out) == [2, 2, 2, 3]
    for row, task in [
        ({"prompt": "a", "references": [None]}, CausalLM()),
        ({"prompt": "a", "answer": ""}, CausalLM()),
        ({"text": "a", "choices": ["x", None], "label": 0}, MultipleChoice()),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, TokenClassification()),
        ({"sub_label": "a", "obj_label": " ", "template": "[X] is [Y]"}, MaskedLM()),
    ]:
        with pytest.raises(RecipeError, match=r"here: .*(empty|without gaps)"):
            task.check_row(row, "here")


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet"])
def test_a_text_of_several_columns_needs_them_all(name: str, tmp_path: Path) -> None:
    def asked(columns: dict[str, Any], **row: Any) -> str:
        rows = [{"title": "a", "body": "b", "label": "xy"[n % 2]} | row for n in range(4)]
        source = write_rows(tmp_path, name, rows)
        return said(tmp_path, task, source=source, columns=columns)

    task, columns = "SEQ_CLS", {"text": "{title}: {body}"}
    message = "row 1: column 'body' is empty, which '{title}: {body}' names; fill it, or take the row out."
    assert message in asked(columns, body=None)
    assert "row 1: column '{title}: {body}' is empty; fill it" in asked(columns, title=None, body=None)
    # of what a row may lack too
    task, columns = "CAUSAL_LM", {"instruction": "title", "output": "label", "input": "{body} {note}"}
    assert "row 1: column 'note' is empty, which '{body} {note}' names" in asked(columns, note=None)


def test_empty_cells_are_empty_texts_beside_others(tmp_path: Path) -> None:
    rows = [{"title": "", "body": "b", "label": "xy"[n % 2]} for n in range(8)]
    source, columns = write_rows(tmp_path, "t.csv", rows), {"text": "{title}: {body}"}
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, columns=columns))
    assert found.train[0]["text"] == ": b"
    source = write_rows(tmp_path, "e.csv", [row | {"body": ""} for row in rows])
    assert "row 1: column '{title}: {body}' is empty; fill it" in said(
        tmp_path, "SEQ_CLS", source=source, columns=columns
    )


def test_what_is_empty_inside_a_column_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, "r.jsonl", [{"in": {"title": None}, "body": "b", "label": "x"}])
    columns = {"text": "{in[title]} {body}"}
    assert "column 'in[title]' is empty, which" in said(tmp_path, "SEQ_CLS", source=source, columns=columns)
    source = write(tmp_path, "t.jsonl", [{"title": "", "body": "b", "label": "xy"[n % 2]} for n in range(8)])
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source, columns={"text": "{title} {body}"}))
    assert found.train[0]["text"] == " b"  # an empty text that is written as such is one


def test_a_role_is_of_all_rows_or_of_none(tmp_path: Path) -> None:
    pairs = write(tmp_path, "p.jsonl", [{"text": "a", "text_pair": "b", "label": n % 2} for n in range(8)])
    single = write(tmp_path, "s.jsonl", [{"text": "a", "hypothesis": "b", "label": 1}])
    message = said(tmp_path, "SEQ_CLS", source=pairs, eval_source=single)
    assert message.startswith("training rows have a text_pair, but some held-out rows have none")
    rows = [{"tokens": ["a"], "tags": ["B-X"], "predicate_index": n} for n in (0, None, 0, 0)]
    assert "have a predicate_index, but some" in said(tmp_path, "TOKEN_CLS", source=write(tmp_path, "t.jsonl", rows))
    rows = [{"instruction": "a", "input": text, "output": "b"} for text in ("", None, "c", "d")]
    source = write(tmp_path, "i.jsonl", rows)
    for column in ("input", "{input}"):
        columns = {"instruction": "instruction", "input": column, "output": "output"}
        assert len(load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=source, columns=columns)).train) == 3


@pytest.mark.parametrize(
    ("task", "row", "columns", "message"),
    [
        ("SEQ_CLS", {"text": {"a": 1}}, {}, "column 'text' holds {'a': 1} for text; expected text. Name a text inside"),
        ("SEQ_CLS", {"text": {"a": 1}}, {}, "under data.columns.text, such as 'text.a'"),
        ("SEQ_CLS", {"text": ["a", "b"]}, {}, "holds ['a', 'b'] for text; expected text. Write it as text"),
        ("SEQ_CLS", {"a": "b", "c": "d"}, {"text": ["a", "c"]}, "for text; expected text. Name one column"),
        ("SEQ_CLS", {"a": "b", "c": "d"}, {"text": ["a", "c"]}, "or a text such as '{a} {c}'"),
        ("SEQ_CLS", {"a": {"b": 1}}, {"text": "{a}: {a}"}, "column '{a}: {a}' is to write {'b': 1}; expected text in"),
        ("SEQ_CLS", {"text": "a", "text_pair": ["b"]}, {}, "column 'text_pair' holds ['b'] for text_pair"),
        ("SEQ_CLS", {"text": "a", "label": {"x": 1}}, {}, "column 'label' holds {'x': 1} for label"),
        ("MULTIPLE_CHOICE", {"text": "a", "choices": ["b", {"c": 1}], "label": 0}, {}, "text or a list of texts"),
        ("MULTIPLE_CHOICE", {"text": "a", "choices": ["b", "c"], "label": [0]}, {}, "holds [0] for label"),
        ("TOKEN_CLS", {"tokens": [["a"]], "tags": ["O"]}, {}, "column 'tokens' holds [['a']] for tokens"),
        ("CAUSAL_LM", {"prompt": "a", "references": [["b"]]}, {}, "column 'references' holds [['b']]"),
        ("CAUSAL_LM", {"prompt": {"a": 1}, "answer": "b"}, {}, "column 'prompt' holds {'a': 1}"),
        ("CAUSAL_LM", {"instruction": ["a"], "output": "b"}, {}, "column 'instruction' holds ['a']"),
        ("QUESTION_ANS", {"context": ["a"], "question": "b", "answers": {}}, {}, "column 'context' holds ['a']"),
        ("MASKED_LM", {"text": ["a"]}, {}, "column 'text' holds ['a']"),
    ],
)
def test_lists_and_objects_are_no_text(
    task: str, row: dict[str, Any], columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = [{"label": "x"} | row] * 2 if task == "SEQ_CLS" else [row] * 2
    found = said(tmp_path, task, source=write(tmp_path, "r.jsonl", rows), columns=columns)
    assert message in found and "row 1: " in found


def test_lists_where_a_task_reads_them(tmp_path: Path) -> None:
    rows = [{"prompt": [["a", "b", 1], ["c", "d", True]], "answer": ["e", "f"]}] * 4
    found = load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=write(tmp_path, "g.jsonl", rows)))
    assert found.train[0]["prompt"] == "a : b : 1 | c : d : True" and found.train[0]["references"] == ["e", "f"]
    rows = [{"in": {"a": ["b"], "n": 2, "t": True}, "label": "xy"[n % 2]} for n in range(8)]
    columns = {"text": "{in[a][0]} {in[n]:02d} {in[t]}"}
    found = load_rows(recipe_for(tmp_path, "SEQ_CLS", source=write(tmp_path, "i.jsonl", rows), columns=columns))
    assert found.train[0]["text"] == "b 02 True"
    rows = [{"text": value, "label": "xy"[n % 2]} for n, value in enumerate([1, True, 0.5, "a"] * 2)]
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=write(tmp_path, "n.jsonl", rows))).train[0]["text"] == 1


def test_a_text_that_no_row_has(tmp_path: Path) -> None:
    rows = [{"text": text, "label": "xy"[n % 2]} for n, text in enumerate(["", " "] * 4)]
    assert "column 'text' is empty in every row; fill it" in said(
        tmp_path, "SEQ_CLS", source=write(tmp_path, "r.jsonl", rows)
    )
    columns = {"prompt": "p", "answer": "a"}
    source = write(tmp_path, "p.csv", "p,a\n" + ",b\n" * 4)
    message = said(tmp_path, "CAUSAL_LM", source=source, columns=columns)
    assert "p.csv: column 'p' is empty in every row" in message and "under data.columns.prompt" in message
    source = write(tmp_path, "some.jsonl", [*rows, {"text": "a", "label": "x"}])
    load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source))


def test_each_label_is_named_once(tmp_path: Path) -> None:
    source = write(tmp_path, "r.jsonl", [{"text": "a", "label": "pn"[n % 2]} for n in range(8)])
    assert "'p' is there more than once; expected each once" in said(
        tmp_path, "SEQ_CLS", source=source, labels=["p", "p", "n"]
    )
    (tmp_path / "labels.json").write_text('["n", "p", "n"]')
    assert "'n' is there more than once" in said(tmp_path, "SEQ_CLS", source=source)


def test_lists_in_cells(tmp_path: Path) -> None:
    rows = (
        '"[""EU"", ""rejects""]","[""B-ORG"", ""O""]"\n'
        + "\"['EU', 'rejects']\",\"['B-ORG', 'O']\"\nEU rejects,B-ORG O\n"
    )
    source = write(tmp_path, "r.csv", "tokens,tags\n" + rows)
    found = load_rows(recipe_for(tmp_path, "TOKEN_CLS", source=source))
    assert all(r == {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]} for r in found.train + found.held_out)
    source = write(tmp_path, "a.csv", "tokens,tags\n\"['EU' 'rejects']\",\"['B-ORG' 'O']\"\n")
    assert "which is no list in JSON" in said(tmp_path, "TOKEN_CLS", source=source)
    source = write(tmp_path, "g.csv", 'prompt,references\na,"[""x y"", ""z""]"\nb,"[1] is a text"\nc,"[1] and [2]"\n')
    found = load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=source))
    told = {r["prompt"]: r["references"] for r in found.train + found.held_out}
    assert told == {"a": ["x y", "z"], "b": ["[1] is a text"], "c": ["[1] and [2]"]}
    told = [{"prompt": "a", "references": text} for text in ("[1, 2]", '{"name": "A"}', '["x"]')] * 2
    found = load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=write(tmp_path, "t.jsonl", told)))
    assert {r["references"][0] for r in found.train + found.held_out} == {"[1, 2]", '{"name": "A"}', '["x"]'}
    source = write(tmp_path, "q.csv", "prompt,references\n" + 'a,"[""the dogs\' \'home\'"", ""b""]"\n' * 4)
    found = load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=source))
    assert found.train[0]["references"] == ["the dogs' 'home'", "b"]
    assert CausalLM().check_row({"prompt": "a", "answer": "", "references": ["x"]}, "here")["references"] == ["x"]
    assert CausalLM().check_row({"prompt": "a", "answer": ["b", "c"]}, "here")["references"] == ["b", "c"]


def test_questions_in_csv(tmp_path: Path) -> None:
    columns = {"answers": ["answer", "start"]}
    source = write(tmp_path, "q.csv", "context,question,answer,start\n" + "a b,what,b,2\n" * 4)
    printed = write(
        tmp_path, "p.csv", "context,question,answers\n" + "a b,what,\"{'text': ['b'], 'answer_start': [2]}\"\n" * 4
    )
    for found in (
        load_rows(recipe_for(tmp_path, "QUESTION_ANS", source=source, columns=columns)),
        load_rows(recipe_for(tmp_path, "QUESTION_ANS", source=printed)),
    ):
        assert found.train[0]["answers"] == {"text": ["b"], "answer_start": [2]}
    for start in ("x", "", -1, None, 0.5):
        row = {"context": "a b", "question": "q", "answers": {"text": ["b"], "answer_start": [start]}}
        with pytest.raises(RecipeError, match=r"answer_start is .*; expected a character's number"):
            QuestionAnswering().check_row(row, "here")


def test_files_of_another_making(tmp_path: Path) -> None:
    source = write(tmp_path, "bom.csv", "\ufefftext,label\r\n" + "a,x\r\nb,y\r\n" * 4)
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source)).labels == ["x", "y"]
    source = write(tmp_path, "more.csv", "text,label\nwell, then,pos\n")
    assert "line 2: has more cells than the header" in said(tmp_path, "SEQ_CLS", source=source)
    source = write(tmp_path, "comma.csv", "text,label\n" + "a,x,\nb,y,\n" * 4)
    assert load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source)).labels == ["x", "y"]
    (tmp_path / "gbk.csv").write_bytes("text,label\n好,x\n".encode("gbk"))
    assert "is not in UTF-8" in said(tmp_path, "SEQ_CLS", source="gbk.csv")
    source = write(tmp_path, "long.csv", f"text,label\n{'a ' * 100_000},x\n" + "a,x\n" + "b,y\n" * 4)
    assert len(load_rows(recipe_for(tmp_path, "SEQ_CLS", source=source)).train) == 5
    source = write(tmp_path, "w.jsonl", [{"text": "a", "label": "x", "k": "q"}, {"text": None, "label": "y", "k": "p"}])
    assert "row 2: column 'text' is empty" in said(tmp_path, "SEQ_CLS", source=source, where={"k": "p"})


def test_an_unknown_tokenizer_of_bleu() -> None:
    pytest.importorskip("sacrebleu")
    with pytest.raises(RecipeError, match="bleu_tokenize is 'chinese'; expected one of"):
        CausalLM(bleu_tokenize="chinese")


def test_words_keep_their_spaces() -> None:
    """Byte-level tokenizers hold a word's space in its token: a word alone is another token than in a text."""
    tokenizer = tokenizer_of("bytes")
    row = {"tokens": ["hello", "worlds", "hello"], "tags": ["B-X", "I-X", "O"]}
    feature = TokenClassification().encode([row], tokenizer, ["B-X", "I-X", "O"])[0]
    assert feature["input_ids"] == tokenizer("hello worlds hello")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert {w: tokens[place] for place, w in feature["words"].items()}[2] == "Ġhello"
    labelled = {place: feature["labels"][place] for place in feature["words"]}
    assert [labelled[place] for place in sorted(labelled)] == [0, 1, 2]
    windows = TokenClassification(max_length=5, stride=0).encode([row], tokenizer, ["B-X", "I-X", "O"])
    assert sorted(w for f in windows for w in f["words"].values()) == [0, 1, 2] and len(windows) > 1
    for text in ("我在20年", "สวัสดี"):
        characters = {"tokens": list(text), "tags": ["O"] * len(text)}
        ids = TokenClassification().encode([characters], tokenizer, ["O"])[0]["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("outside", ["O", "o"])
def test_words_outside_are_not_told(outside: str) -> None:
    tokenizer, labels = tokenizer_of("bytes"), [outside, f"{'B' if outside == 'O' else 'b'}-X"]
    model = build("bert", "TOKEN_CLS", num_labels=2, vocab_size=len(tokenizer), id2label=dict(enumerate(labels)))
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([9e9, 0.0]))
    row = {"tokens": ["hello", "worlds"], "tags": labels}
    assert TokenClassification().ask(model, tokenizer, [row])[0].answer == "nothing"


@pytest.mark.parametrize("words", [["我", "在", "家"], ["hello", "worlds", "hello"]])
def test_tags_are_told_as_they_are_measured(words: list[str]) -> None:
    tokenizer, labels = tokenizer_of("bytes"), ["B-Y", "B-X", "I-X"]
    config = {"num_labels": 3, "vocab_size": len(tokenizer), "id2label": dict(enumerate(labels))}
    model = build("bert", "TOKEN_CLS", **config)
    row = {"tokens": words, "tags": ["B-X", "I-X", "B-Y"]}
    task = TokenClassification()
    feature = task.encode([row], tokenizer, labels, held_out=True)[0]
    with torch.no_grad():
        numbers = model(torch.tensor([feature["input_ids"]])).logits[0].argmax(-1).tolist()
    told = {word: labels[numbers[place]] for place, word in feature["words"].items()}
    said = ", ".join(f"{words[n]}: {tag}" for n, tag in told.items())
    answer = task.ask(model, tokenizer, [row])[0]
    assert answer.answer == said and answer.truth == "B-X I-X B-Y"
    assert answer.question == ("我在家" if words[0] == "我" else "hello worlds hello")


def test_a_long_predicate_leaves_room() -> None:
    tokenizer = words_tokenizer()
    row = {"tokens": ["a", "x" + "y" * 20], "tags": ["O", "B-V"], "predicate_index": 1}
    tokenizer.backend_tokenizer.model.unk_token = "[UNK]"
    with pytest.raises(RecipeError, match="leaves no room for a sentence beside"):
        TokenClassification(max_length=5).encode([row], tokenizer, ["B-V", "O"])


def test_what_is_cut_is_said(warned: pytest.LogCaptureFixture) -> None:
    tokenizer = words_tokenizer()
    row = {"context": "a b c d e f g h", "question": "q", "answers": {"text": ["b c d e f g"], "answer_start": [2]}}
    task = QuestionAnswering(max_length=8, stride=1)
    features = task.encode([task.check_row(row, "here")], tokenizer, [])
    assert all(f["start_positions"] == f["null"] for f in features)
    assert "1 of 1 training rows: no window of 8 tokens holds the first answer whole, and none is" in warned.text
    short = QuestionAnswering(max_length=32, max_answer_length=5)
    shorter = row | {"answers": {"text": ["b c d e f"], "answer_start": [2]}}
    for held_out, said in ((False, "training rows: the first"), (True, "held-out rows: every")):
        short.encode([short.check_row(one, "here") for one in (row, shorter)], tokenizer, [], held_out)
        assert f"1 of 2 {said} answer has more than task_options.max_answer_length=5" in warned.text
    CausalLM(max_length=4).encode([{"prompt": "a b c", "references": ["d e"]}], tokenizer, [])
    assert "1 of 1 rows are longer than data.max_length=4" in warned.text


def test_of_several_answers_the_first_is_learned_and_any_is_right(warned: pytest.LogCaptureFixture) -> None:
    tokenizer = words_tokenizer()
    answers = {"text": ["b c d e f g", "h"], "answer_start": [2, 14]}
    row = {"context": "a b c d e f g h", "question": "q", "answers": answers}
    for task, said in (
        (QuestionAnswering(max_length=8, stride=1), "1 of 1 training rows: no window of 8 tokens holds the first"),
        (QuestionAnswering(max_length=32, max_answer_length=5), "1 of 1 training rows: the first answer has more than"),
    ):
        checked = [task.check_row(row, "here")]
        warned.clear()
        task.encode(checked, tokenizer, [], held_out=True)
        assert not warned.text
        task.encode(checked, tokenizer, [])
        assert said in warned.text
    longer = row | {"answers": {"text": ["b c d e f g", "a b c d e f"], "answer_start": [2, 0]}}
    QuestionAnswering(max_length=8, stride=1).encode([task.check_row(longer, "here")], tokenizer, [], held_out=True)
    assert "1 of 1 held-out rows: no window of 8 tokens holds any answer whole. Raise" in warned.text


@pytest.mark.parametrize(
    ("name", "row", "long"),
    [
        ("SEQ_CLS", {"text": "a b c", "label": "x"}, {"text": "a b c d e", "label": "x"}),
        ("MULTIPLE_CHOICE", {"text": "a", "choices": ["b", "c"], "label": 0}, {"text": "a b c", "choices": ["b", "c"]}),
        ("SEQ_2_SEQ_LM", {"text": "a", "target": "b"}, {"text": "a b c d e", "target": "a b c d e"}),
        ("MASKED_LM", {"text": "a b"}, {"text": "a b c d e"}),
    ],
)
def test_cut_rows_are_counted(
    name: str, row: dict[str, Any], long: dict[str, Any], warned: pytest.LogCaptureFixture
) -> None:
    tokenizer = words_tokenizer()
    targets = {"max_target_length": 6} if name == "SEQ_2_SEQ_LM" else {}
    task: Task = get_task(name)(max_length=6, **targets)
    rows = [task.check_row(r, "here") for r in (row, row | long, row)]
    features = task.encode(rows, tokenizer, ["x"])
    check_lengths(task, tokenizer, features[:1], "training")
    assert not warned.text
    check_lengths(task, tokenizer, features, "training")
    assert "1 of 3 training rows reach data.max_length=6: what is longer was cut there; raise data" in warned.text
    assert ("1 of 3 training targets reach task_options.max_target_length=6" in warned.text) == bool(targets)


def test_rows_without_text_are_told(warned: pytest.LogCaptureFixture) -> None:
    task, tokenizer = SequenceClassification(), words_tokenizer()
    rows = [{"text": text, "label": "x"} for text in ("a b", "", " ", "[UNK]")]
    check_lengths(task, tokenizer, task.encode(rows, tokenizer, ["x"]), "training")
    assert "2 of 4 training rows have no text (row 2 of those that were drawn" in warned.text


def test_answers_that_cannot_be_written_whole_are_counted(warned: pytest.LogCaptureFixture) -> None:
    tokenizer = words_tokenizer()
    rows = [{"prompt": "a", "references": [r, "a b c d e"]} for r in ("a b", "a b c", "a b c d")]
    model = get_ptune_model(build("gpt2"), PTuneConfig(num_virtual_tokens=2))
    told = "2 of 3 held-out rows have no reference of at most task_options.max_new_tokens=2"
    for generate in (False, True):
        task = CausalLM(generate=generate, max_new_tokens=2)
        features = task.encode([task.check_row(r, "here") for r in rows], tokenizer, [], held_out=True)
        check_features(model, task, tokenizer, features)
        assert told not in warned.text
        check_features(model, task, tokenizer, features, held_out=True)
        assert (told in warned.text) is generate
    assert "training rows have no reference" not in warned.text


@pytest.mark.parametrize("labels", [[0, 2, 10, 11], ["0", "2", "10", "11"]])
def test_whole_numbers_keep_their_order_as_labels(labels: list[Any]) -> None:
    task = SequenceClassification()
    assert task.label_names([{"text": "a", "label": n} for n in labels]) == ["0", "2", "10", "11"]
    assert task.label_names([{"text": "a", "label": n} for n in (*labels, "b")]) == ["0", "10", "11", "2", "b"]


@pytest.mark.parametrize(("most", "row"), [(1, {}), (2, {}), (2, {"text_pair": "a"}), (3, {"text_pair": "a"})])
def test_a_length_that_leaves_special_tokens_alone(most: int, row: dict[str, str]) -> None:
    tokenizer = words_tokenizer()
    task = SequenceClassification(max_length=most)
    model = get_ptune_model(build("bert", num_labels=2), PTuneConfig(num_virtual_tokens=3))
    with pytest.raises(RecipeError, match=f"max_length={most} leaves nothing but special tokens"):
        features = task.encode([{"text": "a", "label": "x"} | row], tokenizer, ["x", "y"])
        check_features(model, task, tokenizer, features)


CHAT = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]


@pytest.mark.parametrize("text", [json.dumps(CHAT), str(CHAT)])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_messages_in_cells(text: str, kind: str, tmp_path: Path) -> None:
    cell = '"' + text.replace('"', '""') + '"' if kind == "csv" else text
    write(tmp_path, f"m.{kind}", "messages\n" + f"{cell}\n" * 4)
    assert load_rows(recipe_for(tmp_path, "CAUSAL_LM", source=f"m.{kind}")).train[0]["messages"] == CHAT


@pytest.mark.parametrize(
    ("columns", "own", "asked"),
    [
        ({}, {"prompt": "a", "answer": "b"}, "prompt"),
        ({}, {"prompt": "a", "prompt_id": "1"}, "messages"),
        ({"messages": "messages"}, {"prompt": "a", "answer": "b"}, "messages"),
        ({"prompt": "prompt", "answer": "answer"}, {"prompt": "a", "answer": "b"}, "prompt"),
        ({}, {"instruction": "a", "output": "b"}, "instruction"),
        ({"messages": "messages"}, {"instruction": "a", "output": "b", "references": ["z"]}, "messages"),
    ],
)
def test_a_row_of_several_forms_is_read_by_one(
    columns: dict[str, Any], own: dict[str, Any], asked: str, tmp_path: Path
) -> None:
    write(tmp_path, "m.jsonl", f"{json.dumps(own | {'messages': CHAT})}\n" * 4)
    row = load_rows(recipe_for(tmp_path, "CAUSAL_LM", source="m.jsonl", columns=columns)).train[0]
    assert [r for r in ("prompt", "instruction", "messages") if r in row] == [asked]
    assert row["references"] == (["d"] if asked == "messages" else ["b"])


def test_a_chat_template_without_an_end() -> None:
    tokenizer = words_tokenizer("user assistant a b c end")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant {% endif %}"
    feature = CausalLM().encode([{"instruction": "a ", "answer": "b", "references": ["b"]}], tokenizer, [])[0]
    assert tokenizer.decode(feature["input_ids"]) == "user a assistant b [SEP]"


@pytest.mark.parametrize("name", ["SEQ_CLS", "MULTIPLE_CHOICE", "MASKED_LM", "SEQ_2_SEQ_LM", "cloze"])
def test_batches_are_padded_behind_whatever_the_side(name: str) -> None:
    """Encoders count positions from a batch's first column: padding there would move every shorter row."""
    tokenizer = words_tokenizer()
    tokenizer.padding_side = "left"
    if name == "cloze":
        features = [tokenizer("a [MASK]") | {"labels": 0}, tokenizer("a b c [MASK]") | {"labels": 1}]
        batch = ClozeCollator(tokenizer, causal=False)([dict(f) for f in features])
        assert batch["logits_at"].tolist() == [2, 4]
    else:
        task: Task = get_task(name)()
        texts = ("a", "a b c")
        rows: list[dict[str, Any]] = {
            "SEQ_CLS": [{"text": t, "label": "x"} for t in texts],
            "MULTIPLE_CHOICE": [{"text": t, "choices": ["b", "c"], "label": 0} for t in texts],
            "MASKED_LM": [{"text": t} for t in texts],
            "SEQ_2_SEQ_LM": [{"text": t, "target": t} for t in texts],
        }[name]
        rows = [task.check_row(r, "here") for r in rows]
        batch = task.collator(tokenizer)(task.encode(rows, tokenizer, ["x"]))
        if name == "SEQ_2_SEQ_LM":
            assert (batch["labels"][0] == -100).tolist() == [False] * 3 + [True] * 2
    mask = batch["attention_mask"].reshape(-1, batch["attention_mask"].shape[-1])
    assert bool((mask.diff(dim=1) <= 0).all()) and bool((mask == 0).any())


def test_left_padded_rows_are_answered_like_others() -> None:
    torch.manual_seed(0)
    tokenizer = words_tokenizer()
    tokenizer.padding_side = "left"
    model = get_ptune_model(build("bert", num_labels=2), PTuneConfig(num_virtual_tokens=3)).double().eval()
    task = SequenceClassification()
    features = task.encode([{"text": t, "label": "x"} for t in ("a", "a b c d")], tokenizer, ["x", "y"])
    with torch.no_grad():
        both = model(**task.collator(tokenizer)(features)).logits
        alone = torch.cat([model(**task.collator(tokenizer)([f])).logits for f in features])
    assert torch.allclose(both, alone, atol=1e-12)


def test_the_longest_row_is_looked_at_before_training() -> None:
    tokenizer = words_tokenizer()
    tokenizer.model_max_length = 10**6
    model = get_ptune_model(build("bert", num_labels=2), PTuneConfig(num_virtual_tokens=3))
    room = model.backbone.config.max_position_embeddings
    task = SequenceClassification(max_length=10**6)
    rows = [{"text": "a", "label": "x"}] * 20 + [{"text": "a " * room, "label": "x"}]
    with pytest.raises(GuardError, match=f"sequences of {room + 2} tokens"):
        check_features(model, task, tokenizer, task.encode(rows, tokenizer, ["x", "y"]))
    check_features(model, task, tokenizer, task.encode(rows[:20], tokenizer, ["x", "y"]))
    tokenizer.backend_tokenizer.post_processor = None  # no special tokens
    empty = task.encode([{"text": "", "label": "x"}], tokenizer, ["x"])
    with pytest.raises(RecipeError, match="1 rows have no tokens"):
        check_features(model, task, tokenizer, empty)


def test_what_will_be_written_has_room_too() -> None:
    tokenizer = words_tokenizer()
    model = get_ptune_model(build("gpt2"), PTuneConfig(num_virtual_tokens=3))
    room = model.backbone.config.n_positions
    rows = [{"prompt": "a", "references": ["b"]}]
    for new, fits in ((room - 4, True), (room - 3, False)):  # 2 of the prompt, 3 virtual, and the last is not read
        task = CausalLM(generate=True, max_new_tokens=new)
        features = task.encode(rows, tokenizer, [], held_out=True)
        if fits:
            check_features(model, task, tokenizer, features, held_out=True)
        else:
            check_features(model, task, tokenizer, features)  # nothing is written for training rows
            with pytest.raises(GuardError, match=r"of them to be written\) and 3 virtual tokens make"):
                check_features(model, task, tokenizer, features, held_out=True)


@pytest.mark.parametrize("further", [0, 100])
def test_what_leaves_no_room_for_samples_is_not_cured_by_shorter_ones(further: int) -> None:
    tokenizer = words_tokenizer()
    model = get_ptune_model(build("gpt2"), PTuneConfig(num_virtual_tokens=3))
    task = CausalLM(generate=True, max_new_tokens=model.backbone.config.n_positions - 3 + further)
    features = task.encode([{"prompt": "a", "references": ["b"]}], tokenizer, [], held_out=True)
    with pytest.raises(GuardError) as caught:
        check_features(model, task, tokenizer, features, held_out=True)
    said = str(caught.value)
    assert ("Write fewer new tokens, or take" in said) == bool(further)
    assert ("Shorten the samples to 1 tokens" in said) == (not further) and "-" not in said


def test_an_answer_needs_a_token_to_stand_behind() -> None:
    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # no special tokens, as of GPT-2
    model = get_ptune_model(build("gpt2"), PTuneConfig(num_virtual_tokens=3))
    task = CausalLM()
    rows = [{"prompt": "a", "references": ["b"]}, {"prompt": "", "references": ["b"]}]
    check_features(model, task, tokenizer, task.encode(rows, tokenizer, []))
    features = task.encode(rows, tokenizer, [], held_out=True)
    with pytest.raises(RecipeError, match="held-out row 2 of 2 has an empty prompt.*fill it"):
        check_features(model, task, tokenizer, features, held_out=True)


def test_a_long_sentence_is_asked_in_windows(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", "TOKEN_CLS")
    rows = [ROWS["TOKEN_CLS"](n) for n in range(16)]
    rows = [{role: value * 40 for role, value in row.items() if role != "label"} for row in rows]
    content = {
        "base": base,
        "task": "TOKEN_CLS",
        "method": "p_tuning_v2",
        "options": {"num_virtual_tokens": 2},
        "data": {"source": write(tmp_path, "long.jsonl", rows), "max_length": 16},
        "training": {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True},
        "output_dir": str(tmp_path / "out"),
    }
    assert run(make_recipe(content, folder=tmp_path)).answers[0].answer
