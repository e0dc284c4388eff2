"""The cards in model_cards/, of the small variants of recipes: remade from the facts of their runs, and compared."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_ptune import PTuneConfig
from hf_ptune.cards import CARD_NAME, CURVES_NAME, RunFacts, make_card
from hf_ptune.recipe import Recipe, read_recipe
from hf_ptune.tasks import get_task
from hf_ptune.train import run

ROOT = Path(__file__).parents[1]
CARDS = sorted(p.name for p in (ROOT / "model_cards").iterdir() if p.is_dir())
every_card = pytest.mark.parametrize("name", CARDS)


def recipe_of(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a card's run followed."""
    path = ROOT / "recipes" / f"{name}.yaml"
    small = "variants" in yaml.safe_load(path.read_text())
    return read_recipe(path, [*(["--variant=small"] if small else []), *overrides])


def test_every_recipe_has_a_card() -> None:
    assert {p.stem for p in (ROOT / "recipes").glob("*.yaml")} == set(CARDS)


@every_card
def test_a_card_is_what_its_facts_make(name: str) -> None:
    folder = ROOT / "model_cards" / name
    assert (folder / CURVES_NAME).is_file()
    assert str(make_card(RunFacts.load(folder), f"user/{name}", CURVES_NAME)) == (folder / CARD_NAME).read_text()


@every_card
def test_a_card_and_its_recipe_say_the_same(name: str) -> None:
    facts, recipe = RunFacts.load(ROOT / "model_cards" / name), recipe_of(name)
    task = get_task(recipe.task)
    assert (facts.method, facts.task, facts.base) == (recipe.method, task.model_task, recipe.card.base or recipe.base)
    assert {k: facts.options.get(k, getattr(PTuneConfig(), k)) for k in recipe.options} == recipe.options
    assert facts.datasets == recipe.card.datasets and facts.languages == recipe.card.languages
    for key, value in facts.hyperparameters.items():
        assert recipe.training.get(key, value) == value, key
    told = (facts.hyperparameters.get(f"{part}_learning_rate") for part in ("backbone", "head"))
    assert tuple(told) == recipe.rates()


def test_the_snippet_of_the_quickstart_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the others run in test_recipes.py, on a tiny base."""
    overrides = ["--training.max_steps=1", "--training.use_cpu=true", f"--output_dir={tmp_path / 'quickstart'}"]
    folder = run(recipe_of("quickstart", overrides)).folder
    text = ModelCard.load(ROOT / "model_cards" / "quickstart" / CARD_NAME).text
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace("user/quickstart", str(folder))
    capsys.readouterr()
    exec(snippet, {})
    assert "score" in capsys.readouterr().out
