"""Published settings and defaults: what they fill, and that everything they say is understood."""

from pathlib import Path
from typing import Any

import pytest
from families import METHODS
from test_train import write_base, write_recipe
from transformers import TrainingArguments

from hf_ptune import PTuneConfig, train
from hf_ptune.arguments import make_arguments
from hf_ptune.cards import RunFacts
from hf_ptune.cli import main
from hf_ptune.defaults import defaults_of
from hf_ptune.errors import RecipeError
from hf_ptune.methods import get_method
from hf_ptune.presets import preset, preset_names
from hf_ptune.recipe import make_recipe

SILENT: dict[str, Any] = {"task": "SEQ_CLS", "data": {"source": "rows.jsonl"}, "output_dir": "runs/here"}


@pytest.mark.parametrize("name", preset_names())
def test_what_a_preset_says_is_understood(name: str, tmp_path: Path) -> None:
    found = preset(name)
    PTuneConfig(method=found.method, **found.options)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **found.training)
    assert arguments.learning_rate == found.training["learning_rate"]
    assert {"optim", "lr_scheduler_type", "warmup_steps", "weight_decay"} <= set(found.training)
    assert found.source and name.count("/") == 2
    recipe = make_recipe(SILENT | {"preset": name})
    assert (recipe.method, recipe.base, recipe.training) == (found.method, found.base, found.training)
    assert recipe.learning_rate_decay == found.learning_rate_decay


# read in the authors' scripts by hand: learning rate, tokens, batch, epochs or steps, rows' length
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("p_tuning_v2/rte/roberta-large", (5e-3, 128, 32, 100, 128)),
        ("p_tuning_v2/boolq/bert-large", (5e-3, 40, 32, 100, 128)),
        ("p_tuning_v2/conll03/roberta-large", (3e-2, 11, 16, 30, 152)),
        ("p_tuning_v2/squad_v2/roberta-large", (5e-3, 8, 8, 10, 384)),
        ("prefix_tuning/webnlg/gpt2-medium", (5e-5, 5, 5, 5, None)),
        ("prefix_tuning/xsum/bart-large", (5e-5, 200, 16, 30, None)),
        ("prompt_tuning/superglue/t5-xxl", (0.3, 100, 32, 30_000, None)),
        ("p_tuning/fewglue_wsc/albert-xxlarge", (1e-4, 2, 16, 3500, 128)),
    ],
)
def test_numbers_of_the_sources(name: str, numbers: tuple[Any, ...]) -> None:
    found = preset(name)
    length = found.training.get("max_steps", found.training.get("num_train_epochs"))
    batch = found.training["per_device_train_batch_size"]
    rate, tokens = found.training["learning_rate"], found.options["num_virtual_tokens"]
    assert (rate, tokens, batch, length, found.max_length) == numbers


def test_the_recipe_s_own_keys_win() -> None:
    given = {"preset": "p_tuning_v2/rte/roberta-large", "base": "roberta-base", "method": "p_tuning_v2"}
    given |= {"options": {"num_virtual_tokens": 16}, "training": {"learning_rate": "1e-3"}}
    recipe = make_recipe(SILENT | given | {"data": {"source": "rows.jsonl", "max_length": 64}})
    assert recipe.base == "roberta-base" and recipe.data.max_length == 64
    published = {"prompt_tuning_init": "RANDOM", "prefix_dropout": 0.1, "backbone_dropout": True}
    published |= {"pooling": "cls", "head_states": "last", "head_window": "token"}
    assert recipe.options == {"num_virtual_tokens": 16} | published
    assert recipe.training["learning_rate"] == 1e-3 and recipe.training["num_train_epochs"] == 100
    falls = {"preset": "p_tuning_v2/conll05/roberta-large"}
    assert make_recipe(SILENT | falls).learning_rate_decay == 0.95
    assert make_recipe(SILENT | falls).training["lr_scheduler_type"] == "constant"
    assert make_recipe(SILENT | falls | {"learning_rate_decay": 0.9}).learning_rate_decay == 0.9
    linear = make_recipe(SILENT | falls | {"training": {"lr_scheduler_type": "linear"}})
    assert linear.learning_rate_decay is None and linear.training["lr_scheduler_type"] == "linear"
    same = make_recipe(SILENT | falls | {"training": {"lr_scheduler_type": "constant"}})
    assert same.learning_rate_decay == 0.95
    assert make_recipe(SILENT | {"preset": "p_tuning/lama/roberta-large"}).learning_rate_decay == 0.98
    epochs = {"preset": "prompt_tuning/superglue/t5-base", "training": {"num_train_epochs": 2}}
    assert "max_steps" not in make_recipe(SILENT | epochs).training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"preset": "p_tuning_v2/rte/roberta"},
            "no preset 'p_tuning_v2/rte/roberta'; did you mean p_tuning_v2/rte/rob",
        ),
        ({"preset": "?"}, "hf-ptune presets lists them"),
        ({"preset": 3}, "x.yaml: preset is 3; expected a name"),
        (
            {"preset": "p_tuning_v2/rte/roberta-large", "method": "bitfit"},
            "the preset .* is for p_tuning_v2; leave one",
        ),
        ({"preset": "p_tuning_v2/rte/roberta-large", "training": [1]}, "training is .* expected"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(SILENT | change, "x.yaml")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_defaults(method: str, tmp_path: Path) -> None:
    found = defaults_of(method)
    config = PTuneConfig(method=method, **found.options)
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **found.training).learning_rate > 0
    named = {"num_virtual_tokens", "prompt_tuning_init", "prefix_dropout"}
    assert get_method(method).kind is None or named <= set(found.options)
    assert {"learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"} <= set(found.training)
    assert found.source and config.method == method
    assert defaults_of("somebody's").training == {}


def test_defaults_fill_a_silent_recipe(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    short = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    content = write_recipe(tmp_path, "SEQ_CLS", base, "prompt_tuning", options={}, training=short)
    arguments = make_arguments(make_recipe(content, folder=tmp_path))
    assert arguments.learning_rate == defaults_of("prompt_tuning").training["learning_rate"]
    content["training"] = short | {"learning_rate": 0.5}
    assert make_arguments(make_recipe(content, folder=tmp_path)).learning_rate == 0.5
    outcome = train.run(make_recipe(content, folder=tmp_path))
    assert PTuneConfig.from_pretrained(outcome.folder).prompt_tuning_init == "RANDOM"


def test_language_models_start_otherwise() -> None:
    assert defaults_of("prompt_tuning", "CAUSAL_LM").options["prompt_tuning_init"] == "SAMPLE_VOCAB"
    assert defaults_of("prompt_tuning", "SEQ_CLS") == defaults_of("prompt_tuning")
    assert defaults_of("bitfit", "CAUSAL_LM") == defaults_of("bitfit")
    assert defaults_of("p_tuning_v2", "TOKEN_CLS").training["learning_rate"] == 8e-2
    assert defaults_of("prompt_tuning", "TOKEN_CLS") == defaults_of("prompt_tuning")


def test_heads_over_decoders_start_otherwise(tmp_path: Path) -> None:
    found = defaults_of("p_tuning_v2", "SEQ_CLS", causal=True)
    assert found.training == defaults_of("p_tuning_v2").training | {"learning_rate": 2e-2}
    assert defaults_of("p_tuning_v2", "TOKEN_CLS", causal=True).training == found.training
    assert defaults_of("p_tuning_v2", "CAUSAL_LM", causal=True) == defaults_of("p_tuning_v2", "CAUSAL_LM")
    assert defaults_of("p_tuning_v2", "SEQ_CLS", epochs=9, causal=True).options == found.options
    assert defaults_of("prompt_tuning", "SEQ_CLS", causal=True).training["learning_rate"] == 1e-2
    behind_mlp = defaults_of("prefix_tuning", "SEQ_CLS", causal=True)
    assert (behind_mlp.training["learning_rate"], behind_mlp.head_learning_rate) == (1e-4, 2e-2)
    assert defaults_of("bitfit", "SEQ_CLS", causal=True) == defaults_of("bitfit")
    base = write_base(tmp_path / "base", "llama", "SEQ_CLS")
    short = {"max_steps": 4, "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    content = write_recipe(tmp_path, "SEQ_CLS", base, "p_tuning_v2", options={}, training=short)
    outcome = train.run(make_recipe(content, folder=tmp_path))
    assert PTuneConfig.from_pretrained(outcome.folder).prompt_tuning_init == "SAMPLE_VOCAB"
    assert "| `learning_rate` | 0.02 |" in (outcome.folder / "README.md").read_text()
    rates = [e["learning_rate"] for e in RunFacts.load(outcome.folder).history if "learning_rate" in e]
    assert rates[-2:] == pytest.approx([2e-2 * 2 / 3, 2e-2 / 3]), "what the optimizer had"


def test_rows_of_two_texts_start_otherwise() -> None:
    one, two = defaults_of("p_tuning_v2", "SEQ_CLS"), defaults_of("p_tuning_v2", "SEQ_CLS", pairs=True)
    assert two.options == one.options | {"head_states": "auto_pairs"} and "BoolQ" in two.source
    assert two.training == one.training | {"learning_rate": 2e-2}
    assert defaults_of("p_tuning", pairs=True).training == defaults_of("p_tuning").training
    assert defaults_of("p_tuning", pairs=True).options["head_states"] == "auto_pairs"
    assert defaults_of("prompt_tuning", pairs=True).training["learning_rate"] == 3e-2
    assert defaults_of("bitfit", "SEQ_CLS", pairs=True) == defaults_of("bitfit")
    recipe = make_recipe(SILENT | {"preset": "p_tuning/fewglue_cb/albert-xxlarge"})
    assert train.make_config(recipe, pairs=True).head_states == "last"


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*preset_names(), *METHODS))
    assert "THUDM/P-tuning-v2, run_script" in printed
    assert "rows of two texts are classified" in printed and "head_states=auto_pairs" in printed
    assert "a head reads a decoder" in printed and "prompt_tuning_init=AUTO" in printed


def test_few_shot_presets_train_the_base_too() -> None:
    recipe = make_recipe(SILENT | {"preset": "p_tuning/fewglue_cb/albert-xxlarge"})
    assert recipe.options["train_backbone"] and recipe.rates() == (1e-5, None)


def test_a_template_says_how_many_tokens_it_places() -> None:
    verbalizer = {"no": "no", "yes": "yes"}
    chosen = {"task": "CLOZE_MASKED_LM", "preset": "p_tuning/fewglue_cb/albert-xxlarge"}
    for template, count in (("[P2] {text} [P1] [MASK]", 3), ("{text} [MASK]", 1)):
        recipe = make_recipe(SILENT | chosen | {"task_options": {"template": template, "verbalizer": verbalizer}})
        assert train.make_config(recipe, recipe.build_task().config_options()).num_virtual_tokens == count
    batch = recipe.training["per_device_train_batch_size"] * recipe.training["gradient_accumulation_steps"]
    assert batch == 16 and recipe.training["max_steps"] == 250


@pytest.mark.parametrize("name", preset_names())
def test_papers_read_the_first_token(name: str) -> None:
    assert preset(name).options["pooling"] == "cls"


def test_runs_of_few_epochs_start_without_the_base_s_dropout() -> None:
    def chosen(**content: Any) -> Any:
        recipe = make_recipe(SILENT | {"base": "b", "method": "p_tuning_v2"} | content)
        return train.make_config(recipe).backbone_dropout

    assert chosen() is False, "three epochs, as transformers has it"
    assert chosen(training={"num_train_epochs": 5}) is False
    assert chosen(training={"num_train_epochs": 5.5}) is True
    assert chosen(training={"num_train_epochs": 2, "max_steps": 100}) is True, "epochs are not known"
    assert chosen(options={"backbone_dropout": True}) is True
    assert chosen(options={"backbone_dropout": False}, training={"num_train_epochs": 50}) is False
    assert chosen(method="bitfit") is True
    assert chosen(method="prefix_tuning") is False
    assert chosen(preset="p_tuning_v2/wsc/roberta-large", training={"num_train_epochs": 2}) is True


def test_tags_read_the_last_layer_in_runs_of_many_epochs() -> None:
    def chosen(task: str, epochs: float | None) -> Any:
        return defaults_of("p_tuning_v2", task, epochs=epochs).options["head_states"]

    assert [chosen("TOKEN_CLS", n) for n in (None, 5, 6)] == ["auto", "auto", "last"]
    assert chosen("SEQ_CLS", 6) == "auto"
    assert defaults_of("p_tuning_v2", "SEQ_CLS", True, 6).options["head_states"] == "auto_pairs"
