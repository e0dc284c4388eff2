"""The cards in model_cards/: one a recipe that was run, remade from the facts of its run, and their snippets run."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_ptune.cards import CARD_NAME, CURVES_NAME, RunFacts, make_card
from hf_ptune.recipe import read_recipe
from hf_ptune.train import run

ROOT = Path(__file__).parents[1]
CARDS = sorted(p.name for p in (ROOT / "model_cards").iterdir() if p.is_dir())  # of recipes that have been run
every_card = pytest.mark.parametrize("name", CARDS)


def test_every_card_has_a_recipe() -> None:
    assert "quickstart" in CARDS and set(CARDS) <= {p.stem for p in (ROOT / "recipes").glob("*.yaml")}


@every_card
def test_a_card_is_what_its_facts_make(name: str) -> None:
    folder = ROOT / "model_cards" / name
    assert (folder / CURVES_NAME).is_file()
    assert str(make_card(RunFacts.load(folder), f"user/{name}", CURVES_NAME)) == (folder / CARD_NAME).read_text()


@every_card
def test_a_card_and_its_recipe_say_the_same(name: str) -> None:
    facts, recipe = RunFacts.load(ROOT / "model_cards" / name), read_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert (facts.method, facts.task, facts.base) == (recipe.method, recipe.task, recipe.card.base or recipe.base)
    assert facts.options == recipe.options
    for key, value in facts.hyperparameters.items():
        assert recipe.training.get(key, value) == value, key


@every_card
def test_the_snippet_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--training.max_steps=1", "--training.use_cpu=true", f"--output_dir={tmp_path / name}"]
    folder = run(read_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)).folder
    text = ModelCard.load(ROOT / "model_cards" / name / CARD_NAME).text
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace(f"user/{name}", str(folder))
    capsys.readouterr()
    exec(snippet, {})
    assert "score" in capsys.readouterr().out
