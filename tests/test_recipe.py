"""Recipes: what is read, and how each mistake is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_ptune.errors import RecipeError
from hf_ptune.recipe import make_recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD: dict[str, Any] = {
    "base": "some/base",
    "task": "SEQ_CLS",
    "method": "p_tuning_v2",
    "options": {"num_virtual_tokens": 4},
    "data": {"source": "rows.jsonl"},
    "training": {"max_steps": 2},
    "output_dir": "runs/here",
}


def test_the_repository_s_recipes_are_read() -> None:
    for path in RECIPES.glob("*.yaml"):
        assert read_recipe(path).folder == RECIPES


def test_paths_may_begin_in_the_user_s_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    data = {"source": "~/a.csv", "eval_source": "~/b.csv", "test_source": "~/c.csv", "labels": "~/d.json"}
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": "~/adapter"}
    changes = {"base": "~/base", "data": data, "output_dir": "~/out", "options": start}
    settings = {n: f"~/{n}.json" for n in ("deepspeed", "fsdp_config", "accelerator_config")}
    recipe = make_recipe(GOOD | changes | {"training": {"resume_from_checkpoint": "~/out/checkpoint-3"} | settings})
    assert (recipe.base, recipe.output_dir) == ("/home/me/base", "/home/me/out")
    assert (recipe.data.source, recipe.data.eval_source) == ("/home/me/a.csv", "/home/me/b.csv")
    assert (recipe.data.test_source, recipe.data.labels) == ("/home/me/c.csv", "/home/me/d.json")
    assert recipe.options["prompt_tuning_init_adapter"] == "/home/me/adapter"
    assert recipe.training["resume_from_checkpoint"] == "/home/me/out/checkpoint-3"
    assert all(recipe.training[name] == f"/home/me/{name}.json" for name in settings)
    kept = make_recipe(GOOD | {"data": {"source": "rows~.jsonl", "labels": ["~", "a"]}, "output_dir": "./~"})
    assert (kept.data.source, kept.data.labels, kept.output_dir) == ("rows~.jsonl", ["~", "a"], "./~")


def test_values_arrive_typed() -> None:
    recipe = make_recipe(GOOD | {"training": {"learning_rate": "1e-3", "num_train_epochs": 3, "bf16": False}})
    assert recipe.training == {"learning_rate": 1e-3, "num_train_epochs": 3.0, "bf16": False}
    assert recipe.data.source == "rows.jsonl" and recipe.options == {"num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methd": "bitfit"}, "x.yaml: unknown key methd; did you mean method?"),
        ({"learning_rate": 1}, "unknown key learning_rate; did you mean training.learning_rate?"),
        ({"num_virtual_tokens": 1}, "did you mean options.num_virtual_tokens?"),
        ({"method": "ptuning_v2"}, "unknown method 'ptuning_v2'; did you mean p_tuning_v2?"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat; did you mean training.learning_rate?"),
        ({"options": {"num_tokens": 1}}, "options.num_tokens; did you mean options.num_virtual_tokens?"),
        ({"options": {"base_config": {}}}, "unknown key options.base_config"),
        ({"training": {"max_steps": "many"}}, "training.max_steps is 'many' (str); expected int"),
        ({"training": {"max_steps": True}}, "training.max_steps is True (bool); expected int"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast' (str); expected float"),
        ({"options": {"layers": [0, "last"]}}, "options.layers is [0, 'last'] (list); expected list[int] or null"),
        ({"training": [1]}, "x.yaml: training is [1] (list); expected"),
        ({"data": {"columns": {}}}, "data.source is missing"),
        ({"data": {"source": "a.csv", "eval_fraction": 1.5}}, "data.eval_fraction is 1.5; expected between 0 and 1"),
        ({"data": {"source": "a.csv", "max_length": 0}}, "data.max_length is 0; expected 1 or more"),
        ({"task": "CLS"}, "task is 'CLS'; expected one of SEQ_CLS"),
        ({"task": "FEATURE_EXTRACTION"}, "task is 'FEATURE_EXTRACTION'; expected one of SEQ_CLS"),
        ({"data": {"source": "a.csv", "limit": 0}}, "data.limit is 0; expected 1 or more"),
        ({"data": {"source": "a.csv", "columns": {"text": 3}}}, "data.columns is {'text': 3} (keys and values)"),
        ({"task_options": {"stride": 3}}, "unknown key task_options.stride"),
        ({"base": None}, "base is None (nothing); expected str"),
        ({"output_dir": 3}, "output_dir is 3 (int); expected str"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(GOOD | change, "x.yaml")
    assert message in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match="method is missing; expected base, task, method"):
        make_recipe({k: v for k, v in GOOD.items() if k != "method"})


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    recipe = read_recipe(path, ["--training.learning_rate=1e-2", "--seed=7", "--options.layers=[0, 1]"])
    assert recipe.training == {"max_steps": 2, "learning_rate": 1e-2}
    assert recipe.seed == 7 and recipe.options["layers"] == [0, 1]
    for text in ("no", '"no"'):  # YAML reads the first as a truth value
        assert read_recipe(path, [f"--training.save_strategy={text}"]).training["save_strategy"] == "no"
    with pytest.raises(RecipeError, match="write the key False in quotes"):
        read_recipe(path, ["--task=CLOZE_MASKED_LM", "--task_options.verbalizer={no: bad, maybe: good}"]).build_task()
    for wrong in ("--seed", "seed=7", "--base.x=1", "--seed=[", "--traning.max_steps=1"):
        with pytest.raises(RecipeError, match=r"r\.yaml"):
            read_recipe(path, [wrong])


def test_a_variant_changes_values_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    content = GOOD | {
        "data": GOOD["data"] | {"eval_split": "validation", "limit": 7},
        "variants": {"small": {"base": "tiny", "data": {"limit": 3, "eval_split": None}, "task_options": None}},
    }
    path.write_text(yaml.safe_dump(content))
    plain, small = read_recipe(path), read_recipe(path, ["--seed=4", "--variant=small"])
    assert (plain.base, plain.data.limit, plain.data.eval_split) == (GOOD["base"], 7, "validation")
    assert (small.base, small.data.limit, small.data.eval_split, small.seed) == ("tiny", 3, None, 4)
    assert small.data.source == plain.data.source
    assert read_recipe(path, ["--data.limit=5", "--variant=small"]).data.limit == 5
    with pytest.raises(RecipeError, match="no variant 'smal'; expected one of those it has: small"):
        read_recipe(path, ["--variant=smal"])
    path.write_text(yaml.safe_dump(GOOD | {"variants": ["small"]}))
    with pytest.raises(RecipeError, match="variants holds list"):
        read_recipe(path)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    path = tmp_path / "r.yaml"
    for text in ("a: [", "- 1", ""):
        path.write_text(text)
        with pytest.raises(RecipeError, match="YAML|holds"):
            read_recipe(path)
