"""An adapter that is there, measured on a recipe's rows: the figures are those of the run that left it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_train import write_base, write_recipe

from hf_ptune.cli import main
from hf_ptune.errors import AdapterFileError, RecipeError
from hf_ptune.evaluation import evaluate
from hf_ptune.recipe import make_recipe
from hf_ptune.train import run


def content(folder: Path, rows: str, family: str, **changes: Any) -> dict[str, Any]:
    """A recipe over a tiny base, with test rows."""
    base = write_base(folder / "base", family, changes.pop("base_task", rows))
    recipe = write_recipe(folder, rows, base) | changes
    recipe["training"] |= {"num_train_epochs": 2}
    return recipe | {"data": {"source": "rows.jsonl", "test_source": "rows.jsonl"}}


@pytest.mark.parametrize(
    ("task", "family", "method"),
    [
        ("SEQ_CLS", "bert", "p_tuning_v2"),
        ("TOKEN_CLS", "bert", "prefix_tuning"),
        ("CAUSAL_LM", "gpt2", "prompt_tuning"),
    ],
)
def test_figures_are_those_of_the_run(task: str, family: str, method: str, tmp_path: Path) -> None:
    recipe = make_recipe(content(tmp_path, task, family, method=method), folder=tmp_path)
    outcome = run(recipe)
    found = evaluate(recipe)
    assert found["held-out"] == pytest.approx(outcome.after, rel=1e-5)
    assert found["test"] == pytest.approx(outcome.test, rel=1e-5)
    other = make_recipe(content(tmp_path, task, family, output_dir=str(tmp_path / "other")), folder=tmp_path)
    assert evaluate(other, str(outcome.folder)) == found


def test_the_command_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = content(tmp_path, "SEQ_CLS", "bert")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    assert main(["evaluate", str(tmp_path / "r.yaml")]) == 2
    assert f"{tmp_path / 'out' / 'adapter'} is no folder; train the recipe first" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    capsys.readouterr()
    adapter = str(tmp_path / "out" / "adapter")
    assert main(["evaluate", str(tmp_path / "r.yaml"), "--data.limit=20", "--adapter", adapter]) == 0
    said = capsys.readouterr().out
    assert "held-out, 10 rows: loss " in said and "test, 40 rows: loss " in said and "accuracy" in said


def forget_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def test_an_adapter_without_a_tokenizer_is_measured_by_its_bases(tmp_path: Path) -> None:
    given = content(tmp_path, "SEQ_CLS", "bert")
    outcome = run(make_recipe(given, folder=tmp_path))
    damaged = outcome.folder / "tokenizer.json"
    whole = damaged.read_text()
    damaged.write_text(whole[:99])
    with pytest.raises(RecipeError, match="the tokenizer of .* cannot be read"):
        evaluate(make_recipe(given, folder=tmp_path))
    damaged.write_text(whole)
    forget_tokenizer(outcome.folder)
    assert evaluate(make_recipe(given, folder=tmp_path))["held-out"] == pytest.approx(outcome.after, rel=1e-5)
    forget_tokenizer(Path(given["base"]))
    with pytest.raises(RecipeError, match="has no tokenizer, and neither has its base"):
        evaluate(make_recipe(given, folder=tmp_path))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    given = content(tmp_path, "SEQ_CLS", "bert")
    run(make_recipe(given, folder=tmp_path))
    turned = given | {"data": given["data"] | {"labels": ["late", "early"]}}
    with pytest.raises(RecipeError, match=r"for the labels \['early', 'late'\], and the rows have \['late', 'early'\]"):
        evaluate(make_recipe(turned, folder=tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="holds no finished adapter: config.json, model.safetensors missing"):
        evaluate(make_recipe(given, folder=tmp_path), str(tmp_path / "empty"))
    with pytest.raises(RecipeError, match="holds a BertForSequenceClassification, and no adapter"):
        evaluate(make_recipe(given, folder=tmp_path), given["base"])


def test_an_adapter_of_another_template_is_refused(tmp_path: Path) -> None:
    kind = {"task": "CLOZE_MASKED_LM", "base_task": "MASKED_LM"}
    options = {"template": "[P2] {text} [MASK]", "verbalizer": {"early": "a", "late": "b"}}
    given = content(tmp_path, "SEQ_CLS", "bert", method="p_tuning", **kind, task_options=options, options={})
    run(make_recipe(given, folder=tmp_path))
    found = evaluate(make_recipe(given, folder=tmp_path))
    forget_tokenizer(tmp_path / "out" / "adapter")  # that of the base does not know the virtual tokens
    assert evaluate(make_recipe(given, folder=tmp_path)) == found
    other = given | {"task_options": options | {"template": "[P2] {text} b [MASK]"}}
    with pytest.raises(RecipeError, match="was trained with template '.P2. {text} .MASK.', and the recipe has"):
        evaluate(make_recipe(other, folder=tmp_path))
