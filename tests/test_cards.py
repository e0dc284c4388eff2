"""Cards: what a run found out, said in a way that the Hub takes, and nothing of the machine it ran on."""

import ast
import json
import platform
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import batch, build
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers_of import tokenizer_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from hf_ptune import MemoryCallback, ModelCardCallback, PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.backbone import TASKS
from hf_ptune.cards import RunFacts, draw_curves, make_card, merge_seeds
from hf_ptune.cli import main
from hf_ptune.data import Rows
from hf_ptune.errors import PTuneError
from hf_ptune.facts import facts_of
from hf_ptune.methods import get_method, method_names
from hf_ptune.publishing import remake_card, save_tokenizer, write_repository
from hf_ptune.recipe import make_recipe
from hf_ptune.tasks.causal_lm import CausalLM
from hf_ptune.templates import virtual_tokens
from hf_ptune.train import card_facts

Wrap = Callable[..., PTunePreTrainedModel]


def trained(
    wrap: Wrap, folder: Path, *callbacks: Any, seed: int = 0, scores: tuple[float, ...] = (), **options: Any
) -> Trainer:
    """A short run with an evaluation every two steps; `scores` are what its evaluations find, else accuracies."""
    model = wrap("bert", "prefix_tuning", "SEQ_CLS", strong=False).float()
    rows = [{k: v[0] for k, v in batch("bert", rows=1).items()} for _ in range(8)]
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "learning_rate": 0.25,
    }
    held_out = options.pop("eval_dataset", rows)
    arguments = TrainingArguments(folder, report_to=[], use_cpu=True, seed=seed, **settings | options)
    told = iter(scores)

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": next(told) if scores else float((found.predictions.argmax(-1) == found.label_ids).mean())}

    run = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=held_out, compute_metrics=accuracy, callbacks=list(callbacks)
    )
    run.train()
    return run


def test_the_trainer_s_card_gives_way(wrap: Wrap, tmp_path: Path) -> None:
    callback = ModelCardCallback(
        datasets=["user/topics"], languages=["en"], license="mit", limits=["Short lines only."]
    )
    run = trained(wrap, tmp_path / "out", MemoryCallback(), callback)
    run.save_model()
    run.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert data["tags"] == ["hf_ptune", "prompt-learning", "prefix-tuning"] and data["library_name"] == "transformers"
    assert (data["pipeline_tag"], data["license"], data["language"]) == ("text-classification", "mit", ["en"])
    assert data["datasets"] == ["user/topics"]
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert {m["type"] for m in metrics} == {"accuracy", "loss"}
    paper = get_method("prefix_tuning").paper
    for expected in (paper, "Short lines only.", "| `learning_rate` | 0.25 |", "backbone"):
        assert expected in card.text, expected
    facts = RunFacts.load(tmp_path / "out")
    assert facts.metrics == callback.facts.metrics and facts.speed["step_time_s"] > 0
    assert facts.adapter_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["flattened"] and config["auto_map"]["AutoConfig"] == "modeling_hf_ptune.PTuneConfig"


def results(folder: Path) -> dict[str, float]:
    """The metrics of the model-index of a folder's card."""
    return {r.metric_type: r.metric_value for r in ModelCard.load(folder / "README.md").data.eval_results or []}


def test_a_card_has_the_metrics_of_the_best_model_where_that_is_kept(wrap: Wrap, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_strategy": "steps"}
    out = tmp_path / "out"
    run = trained(wrap, out, ModelCardCallback(), scores=(0.9, 0.5, 0.75), save_steps=2, **best)
    assert run.state.best_global_step == 2
    run.create_model_card()
    at_2 = next(e for e in run.state.log_history if e["step"] == 2 and "eval_loss" in e)
    assert results(out) == {"accuracy": 0.9, "loss": round(at_2["eval_loss"], 4)}
    run.evaluate()  # the best model once more, at the step that training ended at
    run.create_model_card()
    assert results(out)["accuracy"] == 0.75


@pytest.mark.parametrize("kept", [True, False])
def test_the_table_of_a_card_has_each_step_as_training_measured_it(kept: bool, wrap: Wrap, tmp_path: Path) -> None:
    """Neither the best model's numbers at the last step, nor that step twice; what was measured at its end alone."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_strategy": "steps"}
    run = trained(wrap, tmp_path, scores=(0.9, 0.5, 0.75), save_steps=2, **(best if kept else {}))
    run.evaluate()
    assert table(run, tmp_path) == [("2", "0.9"), ("4", "0.5")]
    run = trained(wrap, tmp_path, scores=(0.25, 0.5), eval_strategy="no")
    run.evaluate()
    assert table(run, tmp_path) == [("4", "0.25")]


class StopAtThree(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


def test_the_best_model_is_at_its_own_step_where_the_last_one_was_not_measured(wrap: Wrap, tmp_path: Path) -> None:
    """Also in what was measured of it on other rows, which training has not."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_strategy": "steps"}
    run = trained(wrap, tmp_path, StopAtThree(), scores=(0.9, 0.9, 0.75), save_steps=2, **best)
    assert run.state.global_step == 3
    run.evaluate()
    assert table(run, tmp_path) == [("2", "0.9")]
    run.evaluate({"other": run.eval_dataset})
    run.create_model_card()
    (row,) = RunFacts.load(tmp_path).history[-1:]
    assert row["eval_other_accuracy"] == 0.75 and (row["step"], row["epoch"]) == (2, 0.5)


def test_curves_show_each_step_as_training_measured_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[float, float]]] = {}

    def plot(axes: Any, x: Any, y: Any, label: str, **kwargs: Any) -> None:
        drawn[label] = list(zip(x, y, strict=True))

    monkeypatch.setattr("matplotlib.axes.Axes.plot", plot)
    measured = [(2, 0.9), (4, 0.5), (4, 0.9)]
    history: list[dict[str, float]] = [{"step": step, "eval_accuracy": value} for step, value in measured]
    history.insert(2, {"step": 4, "train_loss": 1.0, "total_flos": 1.0})
    draw_curves(RunFacts("p_tuning", "SEQ_CLS", history=history), tmp_path / "curves.png")
    assert drawn == {"eval_accuracy": [(2, 0.9), (4, 0.5)]}


def table(run: Trainer, folder: Path) -> list[tuple[str, str]]:
    """Step and accuracy of each row of the card's table."""
    run.create_model_card()
    lines = ModelCard.load(folder / "README.md").text.split("By epoch")[1].split("\n\n")[1].splitlines()
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [(row[names.index("step")], row[names.index("accuracy")]) for row in rows]


def test_a_card_has_the_metrics_of_every_dataset(wrap: Wrap, tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in batch("bert", rows=1).items()} for _ in range(4)]
    run = trained(wrap, tmp_path, scores=(0.1, 0.2, 0.3, 0.4), eval_dataset={"a": rows, "b": rows})
    run.create_model_card()
    found = results(tmp_path)
    assert found.keys() == {"a_loss", "a_accuracy", "b_loss", "b_accuracy"}
    assert (found["a_accuracy"], found["b_accuracy"]) == (0.3, 0.4)
    text = ModelCard.load(tmp_path / "README.md").text
    table = text.split("By epoch")[1].split("\n\n")[1].splitlines()
    assert [c.strip() for c in table[0].split("|")[1:-1]] == [
        *("epoch", "step", "train loss", "a_loss", "a_accuracy", "b_loss", "b_accuracy")
    ]
    assert len(table) == 4 and all(c.strip() for line in table[2:] for c in line.split("|")[1:-1])


@pytest.mark.parametrize("evaluated", ["no", "steps"])
def test_a_card_has_the_test_metrics_of_the_model_that_is_there(evaluated: str, wrap: Wrap, tmp_path: Path) -> None:
    """Those that were measured after training, with or without held-out rows; none of a model before that."""
    scores = (0.1, 0.2, 0.3) if evaluated == "steps" else (0.3,)
    run = trained(wrap, tmp_path, ModelCardCallback(), scores=scores, eval_strategy=evaluated)
    early = {"test_accuracy": 0.7, "epoch": 0.0, "step": 0}
    run.state.log_history.insert(0, dict(early))
    run.create_model_card()
    assert "test_accuracy" not in facts_of(run.model).metrics[0] if evaluated == "steps" else not results(tmp_path)
    run.evaluate(run.eval_dataset, metric_key_prefix="test")
    assert RunFacts.load(tmp_path).metrics[0]["test_accuracy"] == 0.3
    run.create_model_card()
    assert results(tmp_path)["accuracy"] == 0.3


def test_a_card_has_no_metrics_of_the_untrained_model(wrap: Wrap, tmp_path: Path) -> None:
    run = trained(wrap, tmp_path, eval_strategy="no", eval_on_start=True)
    run.create_model_card()
    assert not results(tmp_path) and "## Evaluation" not in (tmp_path / "README.md").read_text()


def size_rows(model: Any) -> tuple[str, str]:
    """Parameters of the adapter and of full fine-tuning, as the card has them."""
    text = make_card(facts_of(model)).text
    return tuple(re.search(rf"\| {row} \| ([\d,]+)", text)[1] for row in ("this adapter", "full fine-tuning"))


@pytest.mark.parametrize(("method", "options"), [("p_tuning_v2", {}), ("bitfit", {}), ("p_tuning_v2", {"whole": 1})])
def test_full_fine_tuning_trains_the_whole_base(method: str, options: dict[str, Any], wrap: Wrap) -> None:
    model = wrap("bert", method, "SEQ_CLS", train_backbone=bool(options))
    base = sum(p.numel() for p in model.backbone.parameters())
    assert size_rows(model)[1] == f"{base:,}"


def test_a_card_claims_a_commit_only_where_one_is_pinned() -> None:
    commit = "0123456789" * 4
    for revision, said in [(commit, "at the commit that the adapter was trained on (`012345678901`)"), ("v2", "`v2`")]:
        text = make_card(RunFacts("p_tuning", "CAUSAL_LM", base="user/base", base_revision=revision)).text
        assert said in text and ("at this commit only" in text) is (revision == commit)
    text = make_card(RunFacts("p_tuning", "CAUSAL_LM", base="user/base")).text
    assert "commit" not in text and "is fetched" not in text


def test_a_card_says_that_the_package_has_to_be_installed() -> None:
    text = make_card(RunFacts("p_tuning", "CAUSAL_LM")).text
    assert "Without the package" not in text
    assert "The line `import hf_ptune` can be left out where `trust_remote_code=True` is passed" in text
    assert "the package has to be installed all the same" in text


def test_a_fresh_adapter_is_not_said_to_be_trained(wrap: Wrap) -> None:
    facts = facts_of(wrap("bert", "p_tuning_v2", "SEQ_CLS"))
    assert "were trained" not in make_card(facts).text and "that train while the base stays frozen" in str(
        make_card(facts)
    )
    facts.seeds = [0]
    assert "that were trained while the base stayed frozen" in make_card(facts).text


def test_what_is_not_finite_is_no_result(tmp_path: Path) -> None:
    facts = RunFacts("p_tuning_v2", "SEQ_CLS", metrics=[{"loss": float("nan"), "accuracy": 0.5}])
    facts.history = [{"eval_loss": float("nan"), "eval_accuracy": 0.5, "step": 2, "epoch": 1.0}]
    facts.speed = {"step_time_s": float("inf")}
    card = make_card(facts)
    assert [r.metric_type for r in card.data.eval_results] == ["accuracy"] and "nan" not in str(card).lower()
    facts.save(tmp_path)
    assert str(make_card(RunFacts.load(tmp_path))) == str(card)


def test_local_data_goes_by_its_own_name(wrap: Wrap, tmp_path: Path) -> None:
    data = tmp_path / "lines"
    data.mkdir()
    names = ["data/train.jsonl", "/home/somebody/rows.csv", "../more/rows", r"C:\rows\test.txt", "user/topics"]
    card = make_card(RunFacts("p_tuning", "CAUSAL_LM", base="/home/somebody/base", datasets=names))
    assert card.data.datasets == ["user/topics"] and "somebody" not in str(card)
    assert "| data | train.jsonl, rows.csv, rows, test.txt, user/topics |" in card.text
    run = trained(wrap, tmp_path / "out", ModelCardCallback(datasets=[str(data)], base=str(tmp_path / "base")))
    assert RunFacts.load(tmp_path / "out").datasets == ["lines"]
    run.create_model_card()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_runs_of_a_card_have_the_same_data_and_metrics() -> None:
    def one(seed: int, data: str = "a/x", accuracy: float | None = 0.5) -> RunFacts:
        metrics = [] if accuracy is None else [{"accuracy": accuracy}]
        return RunFacts("p_tuning_v2", "SEQ_CLS", datasets=[data], seeds=[seed], metrics=metrics)

    with pytest.raises(PTuneError, match=r"one set of data; the runs have \['a/x'\] and \['b/y'\]"):
        merge_seeds([one(0), one(1, data="b/y")])
    with pytest.raises(PTuneError, match=r"run of seed \[1\] has no metrics"):
        merge_seeds([one(0), one(1, accuracy=None)])
    assert not merge_seeds([one(0, accuracy=None)]).metrics


def test_what_the_trainer_is_told_is_in_the_card(wrap: Wrap, tmp_path: Path) -> None:
    """As run_glue.py tells it; what ModelCardCallback was told comes first."""
    told = {"language": "en", "license": "mit", "dataset": "GLUE MRPC", "dataset_tags": "nyu-mll/glue", "tags": ["x"]}
    run = trained(wrap, tmp_path)
    run.create_model_card(model_name="My model", tasks="text-classification", finetuned_from="user/base", **told)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.language, data.license, data.datasets) == (["en"], "mit", ["nyu-mll/glue"])
    assert data.tags == ["hf_ptune", "prompt-learning", "prefix-tuning", "x"] and data.model_name == "My model"
    assert {r.dataset_name for r in data.eval_results} == {"GLUE MRPC"}
    text = (tmp_path / "README.md").read_text()
    assert "# My model\n" in text and "| data | GLUE MRPC |" in text
    run.add_callback(ModelCardCallback(datasets=["user/topics"], languages=["de"]))
    run.create_model_card(**told)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.language, data.license) == (["de"], "mit") and data.datasets == ["user/topics"]
    assert {r.dataset_name for r in data.eval_results} == {"user/topics"}


def test_the_results_of_a_card_name_data_and_base_as_the_trainer_is_told(wrap: Wrap, tmp_path: Path) -> None:
    """As run_glue.py tells it; a folder is no name of a base, and what the adapter itself names comes first."""
    told = {"dataset": "GLUE SST2", "dataset_tags": "glue", "dataset_args": "sst2"}
    rows = Dataset.from_dict({k: v.tolist() for k, v in batch("bert", rows=4).items()}, split="test")
    run = trained(wrap, tmp_path, eval_dataset=rows)
    run.create_model_card(finetuned_from="google-bert/bert-base-uncased", **told)
    data = ModelCard.load(tmp_path / "README.md").data
    assert {(r.dataset_type, r.dataset_name, r.dataset_args, r.dataset_split) for r in data.eval_results} == {
        ("glue", "GLUE SST2", "sst2", "test")
    }
    assert data.base_model == "google-bert/bert-base-uncased"
    assert "base of your own" not in (tmp_path / "README.md").read_text()
    run.create_model_card(finetuned_from=str(tmp_path), **told)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
    run.model.config.base_model_name_or_path = "user/base"
    run.create_model_card(finetuned_from="user/adapter", **told)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "user/base"
    run.add_callback(ModelCardCallback(datasets=["user/topics"]))
    run.create_model_card(**told)
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {(r.dataset_type, r.dataset_args) for r in found} == {("user/topics", None)}


def test_facts_know_the_split_that_was_measured(wrap: Wrap, tmp_path: Path) -> None:
    rows = {k: v.tolist() for k, v in batch("bert", rows=4).items()}
    for split in ("test", None):
        callback = ModelCardCallback()
        trained(wrap, tmp_path, callback, eval_dataset=Dataset.from_dict(rows, split=split))
        card = make_card(RunFacts.load(tmp_path))
        assert {r.dataset_split for r in card.data.eval_results} == {split or "validation"}


@pytest.mark.parametrize(
    ("given", "kept", "left_out"),
    [
        ({"max_steps": 2, "num_train_epochs": 5}, "max_steps", "num_train_epochs"),
        ({"max_steps": -1, "num_train_epochs": 1}, "num_train_epochs", "max_steps"),
    ],
)
def test_a_card_tells_what_ended_a_training(
    given: dict[str, Any], kept: str, left_out: str, wrap: Wrap, tmp_path: Path
) -> None:
    run = trained(wrap, tmp_path, ModelCardCallback(), **given)
    settings = facts_of(run.model).hyperparameters
    assert settings[kept] == given[kept] and left_out not in settings


@pytest.mark.parametrize(("norm", "told"), [(0.0, True), (0.5, True), (1.0, False)])
def test_a_card_tells_how_gradients_were_clipped(norm: float, told: bool, wrap: Wrap, tmp_path: Path) -> None:
    run = trained(wrap, tmp_path, ModelCardCallback(), max_grad_norm=norm, weight_decay=0.0, warmup_steps=0)
    settings = facts_of(run.model).hyperparameters
    assert settings.get("max_grad_norm") == (norm if told else None)
    assert not {"weight_decay", "warmup_steps", "gradient_checkpointing", "bf16"} & set(settings)
    assert ("| `max_grad_norm` |" in make_card(RunFacts.load(tmp_path)).text) == told


def test_a_trained_model_knows_its_run(wrap: Wrap, tmp_path: Path) -> None:
    """Whatever pushes it: the metrics of training, those measured afterwards, and what only the user knows."""
    run = trained(wrap, tmp_path / "out", ModelCardCallback(datasets=["user/topics"]), scores=(0.1, 0.2, 0.3))
    write_repository(run.model, tmp_path / "first", "user/adapter", tokenizer=NoTokenizer())
    assert results(tmp_path / "first")["accuracy"] == 0.2
    run.evaluate()
    write_repository(run.model, tmp_path / "second", "user/adapter", tokenizer=NoTokenizer())
    assert results(tmp_path / "second")["accuracy"] == 0.3
    text = (tmp_path / "second" / "README.md").read_text()
    assert "| data | user/topics |" in text and "| `learning_rate` | 0.25 |" in text


def test_facts_of_a_training_before_are_none_of_the_next(wrap: Wrap, tmp_path: Path) -> None:
    run = trained(wrap, tmp_path / "out", ModelCardCallback())
    assert facts_of(run.model).metrics
    run.remove_callback(ModelCardCallback)
    run.train()
    assert not facts_of(run.model).metrics and not facts_of(run.model).history


def test_a_model_that_is_loaded_and_pushed_again_keeps_the_facts_of_its_run(wrap: Wrap, tmp_path: Path) -> None:
    run = trained(wrap, tmp_path / "out", ModelCardCallback(license="mit"), scores=(0.1, 0.2))
    write_repository(run.model, tmp_path / "pushed", "user/adapter", tokenizer=NoTokenizer(), keep_encoder=True)
    loaded = type(run.model).from_pretrained(tmp_path / "pushed")
    vars(loaded)["_ptune_source"] = (str(tmp_path / "pushed"), {"revision": None})
    facts, first = facts_of(loaded), RunFacts.load(tmp_path / "pushed")
    assert (facts.metrics, facts.license, facts.seeds) == (first.metrics, "mit", [0])
    with torch.no_grad():
        next(loaded.prompt.parameters()).add_(1)
    assert not facts_of(loaded).metrics  # another model by now
    vars(loaded)["_ptune_source"] = (str(tmp_path / "gone"), {})
    assert not facts_of(loaded).metrics


def test_a_frozen_adapter_is_counted(wrap: Wrap) -> None:
    model = wrap("bert", "prefix_tuning", "SEQ_CLS")
    count = facts_of(model).parameters
    assert count == model.get_nb_trainable_parameters()[0] > 0
    assert facts_of(model.requires_grad_(False)).parameters == count


def test_other_models_keep_the_trainer_s_card(tmp_path: Path) -> None:
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    Trainer(build("bert").float(), arguments).create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "generated automatically" in text or "generated_from_trainer" in text
    assert "prompt-learning" not in text


def test_a_card_alone_leaves_the_reparameterisation(wrap: Wrap, tmp_path: Path) -> None:
    run = trained(wrap, tmp_path)
    run.save_model()
    before = load_file(tmp_path / "model.safetensors")
    run.create_model_card()
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)
    assert not PTuneConfig.from_pretrained(tmp_path).flattened
    run.create_model_card(keep_encoder=False)
    assert PTuneConfig.from_pretrained(tmp_path).flattened


def test_tags_of_datasets_are_told_beside_the_names_of_files(wrap: Wrap, tmp_path: Path) -> None:
    run = trained(wrap, tmp_path, ModelCardCallback(datasets=["rows.jsonl"]))
    run.create_model_card(dataset_tags="nyu-mll/glue")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.datasets == ["nyu-mll/glue"] and {r.dataset_name for r in data.eval_results} == {"rows.jsonl"}


def test_a_card_tells_the_batch_size_that_was_found(wrap: Wrap, tmp_path: Path) -> None:
    run = trained(wrap, tmp_path, auto_find_batch_size=True)
    run.state.train_batch_size = 1  # as where two rows have no room
    run.create_model_card()
    assert RunFacts.load(tmp_path).hyperparameters["per_device_train_batch_size"] == 1


def test_nothing_of_the_machine_is_told(wrap: Wrap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "USERNAME"):
        monkeypatch.setenv(name, "somebody-here")
    run = trained(wrap, tmp_path / "out", ModelCardCallback())
    run.create_model_card()
    for name in ("README.md", "run_facts.json"):
        text = (tmp_path / "out" / name).read_text()
        for secret in (str(tmp_path), str(Path.home()), platform.node(), "somebody-here"):
            assert secret not in text, (name, secret)


def test_the_results_of_a_card_tell_held_out_rows_from_test_rows() -> None:
    metrics = [{"loss": 1.0, "accuracy": 0.5, "test_loss": 2.0, "test_accuracy": 0.25}]
    data = make_card(RunFacts("p_tuning_v2", "SEQ_CLS", datasets=["PolyAI/banking77"], metrics=metrics)).data.to_dict()
    results = data["model-index"][0]["results"]
    assert [r["dataset"] for r in results] == [
        {"name": "PolyAI/banking77", "type": "PolyAI/banking77", "split": split} for split in ("validation", "test")
    ]
    assert [{m["type"]: m["value"] for m in r["metrics"]} for r in results] == [
        {"loss": 1.0, "accuracy": 0.5},
        {"loss": 2.0, "accuracy": 0.25},
    ]
    assert all(m["name"] == m["type"] for r in results for m in r["metrics"])


@pytest.mark.parametrize("method", method_names())
def test_every_method_has_a_card(method: str, wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("bert", method, "SEQ_CLS")
    model.config.base_model_name_or_path = "user/base"
    write_repository(model, tmp_path, "user/adapter", tokenizer=NoTokenizer())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "user/base" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert f"{model.get_nb_trainable_parameters()[0]:,}" in card.text
    assert ("prompt_tuning_init" in card.text) is (model.prompt is not None)


class NoTokenizer:
    def save_pretrained(self, folder: Any) -> None: ...


def test_a_card_is_made_again_from_its_facts(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("llama", "p_tuning")
    write_repository(model, tmp_path, "user/adapter", tokenizer=NoTokenizer())
    assert str(make_card(RunFacts.load(tmp_path), "user/adapter")) == (tmp_path / "README.md").read_text()


def test_a_card_made_again_leaves_what_its_old_one_was_a_link_to(tmp_path: Path) -> None:
    RunFacts("p_tuning", "CAUSAL_LM").save(tmp_path)
    (tmp_path / "blob").write_text("old")
    (tmp_path / "README.md").symlink_to("blob")
    assert main(["card", str(tmp_path)]) == 0
    assert (tmp_path / "blob").read_text() == "old" and "P-Tuning" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("pushed", [False, True])
def test_the_card_of_a_recipe_s_output_folder_is_that_of_its_adapter(
    pushed: bool, wrap: Wrap, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless a push has made the folder itself one of an adapter."""
    for seed in (0, 1):
        facts = RunFacts("p_tuning", "CAUSAL_LM", seeds=[seed], metrics=[{"loss": 1.0 + seed}], base_bytes=2048)
        folder = tmp_path / f"seed{seed}"
        write_repository(wrap("llama", "p_tuning"), folder / "adapter", "x", tokenizer=NoTokenizer(), facts=facts)
        if pushed:
            (folder / "model.safetensors").write_bytes((folder / "adapter" / "model.safetensors").read_bytes())
        RunFacts(**asdict(facts) | {"adapter_bytes": 7}).save(folder)
    before = (tmp_path / "seed0" / "adapter" / "README.md").read_text()
    assert main(["card", str(tmp_path / "seed0"), str(tmp_path / "seed1")]) == 0
    card = tmp_path / "seed0" / "README.md" if pushed else tmp_path / "seed0" / "adapter" / "README.md"
    assert capsys.readouterr().out.strip() == str(card)
    text = card.read_text()
    assert "1.5000 ± 0.7071" in text and "# seed0" in text and ("7 B" in text) == pushed
    assert ((tmp_path / "seed0" / "adapter" / "README.md").read_text() == before) == pushed


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk on which the system refuses to write further than a number of bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FACTS = RunFacts("p_tuning", "CAUSAL_LM", history=[{"step": n, "loss": 1.0 / n} for n in range(1, 60)])


@pytest.mark.parametrize(
    ("size", "write", "named"),
    [
        (100, FACTS.save, "run_facts.json"),
        (3000, lambda folder: remake_card(folder, []), "curves.png"),
        (1000, lambda folder: remake_card(replaced(folder, history=[]), []), "README.md"),
    ],
)
def test_a_full_disk_leaves_whole_files_and_is_told_with_their_names(
    size: int, write: Callable[[Path], Any], named: str, tmp_path: Path
) -> None:
    FACTS.save(tmp_path)
    remake_card(tmp_path, [])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OSError, match="File too large") as caught, no_file_above(size):
        write(tmp_path)
    assert Path(caught.value.filename) == tmp_path / named
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {*before} == {"run_facts.json", "README.md", "curves.png"}
    assert all(after[name] == content or name == "run_facts.json" for name, content in before.items())
    assert RunFacts.load(tmp_path) and not list(tmp_path.glob(".ptune-*"))


def replaced(folder: Path, **changes: Any) -> Path:
    with no_file_above(2**20):
        replace(FACTS, **changes).save(folder)
    return folder


def test_a_tokenizer_takes_the_place_of_an_older_one_as_a_whole(tmp_path: Path) -> None:
    words = tokenizer_of("wordpiece")
    save_tokenizer(words, tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(OSError, match="File too large") as caught, no_file_above(500):
        save_tokenizer(words, tmp_path)
    assert Path(caught.value.filename) == tmp_path and (tmp_path / "tokenizer.json").read_bytes() == before
    words.chat_template = {"default": "{{ messages }}", "short": "{{ messages[0] }}"}  # the second one in a subfolder
    for _ in range(2):
        save_tokenizer(words, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == words.chat_template
    assert not list(tmp_path.glob(".ptune-*"))


def test_weights_that_do_not_fit_on_the_disk_are_told_with_their_name(wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("llama", "p_tuning")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="File too large") as caught, no_file_above(6000):
        model.save_pretrained(tmp_path)
    assert Path(caught.value.filename) == tmp_path / "model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == before and not list(tmp_path.glob(".ptune-*"))


def test_no_value_breaks_the_table_of_settings() -> None:
    options = {
        "template": "[P4] Review: {text}\nSentiment: [MASK]",
        "verbalizer": {"good": ["great | fine"]},
        "prompt_tuning_init_text": "Classify:\n\n- pos\r\n- neg",
    }
    text = make_card(RunFacts("prompt_tuning", "MASKED_LM", options=options, datasets=["a|b"])).text
    table = text.split("## Training\n\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(options) + 1
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)
    assert "| `template` | [P4] Review: {text}<br>Sentiment: [MASK] |" in table


def test_seeds_are_summarised() -> None:
    runs = [
        RunFacts("p_tuning_v2", "SEQ_CLS", base="user/base", seeds=[n], metrics=[{"accuracy": value}])
        for n, value in enumerate((0.9, 0.92, 0.94))
    ]
    card = make_card(merge_seeds(runs))
    assert "| accuracy | 0.9200 ± 0.0200 |" in card.text and "0, 1, 2" in card.text
    assert card.data.eval_results[0].metric_value == 0.92
    runs[1].base = "user/other"
    with pytest.raises(PTuneError, match="one method, task and base"):
        merge_seeds(runs)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("t5", "SEQ_2_SEQ_LM"),
        ("bert", "QUESTION_ANS"),
        ("bert", "MULTIPLE_CHOICE"),
        ("bert", "MASKED_LM"),
        ("bert", "SEQ_CLS"),
        ("bert", "TOKEN_CLS"),
        ("llama", "CAUSAL_LM"),
    ],
)
def test_the_snippet_runs(family: str, task: str, wrap: Wrap, tmp_path: Path) -> None:
    """As printed, with the folder for the id."""
    model = wrap(family, "p_tuning_v2", task)
    write_repository(model, tmp_path / "adapter", "user/adapter", tokenizer=tokenizer_of("wordpiece"))
    text = ModelCard.load(tmp_path / "adapter" / "README.md").text
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace("user/adapter", str(tmp_path / "adapter"))
    exec(snippet, {})


def test_the_snippet_of_a_model_of_pairs_asks_with_a_pair(
    wrap: Wrap, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = facts_of(wrap("bert", "p_tuning_v2", "SEQ_CLS"))
    facts.example = {"text": "It rains.", "text_pair": "Is it dry?"}
    model = wrap("bert", "p_tuning_v2", "SEQ_CLS")
    write_repository(model, tmp_path, "user/adapter", tokenizer=tokenizer_of("wordpiece"), facts=facts)
    assert RunFacts.load(tmp_path).example == facts.example
    snippet = re.findall(r"```python\n(.*?)```", ModelCard.load(tmp_path / "README.md").text, re.DOTALL)[0]
    assert 'print(pipe({"text": "It rains.", "text_pair": "Is it dry?"}))' in snippet
    exec(snippet.replace("user/adapter", str(tmp_path)), {})
    assert "score" in capsys.readouterr().out


def test_facts_that_are_none_get_one_error(tmp_path: Path) -> None:
    with pytest.raises(PTuneError, match="ModelCardCallback"):
        RunFacts.load(tmp_path)
    for content in ("", "[]", '{"task": 1}', "{"):
        (tmp_path / "run_facts.json").write_text(content)
        with pytest.raises(PTuneError, match="no facts of a run"):
            RunFacts.load(tmp_path)


def test_values_that_json_lacks_are_dropped(tmp_path: Path) -> None:
    RunFacts("p_tuning", "CAUSAL_LM", history=[{"loss": float("nan"), "step": 1}]).save(tmp_path)
    assert RunFacts.load(tmp_path).history == [{"loss": None, "step": 1}]
    model = get_ptune_model(build("llama"), PTuneConfig(method="p_tuning", num_virtual_tokens=2))
    assert facts_of(model, tmp_path).task == "CAUSAL_LM" and torch.is_tensor(model.prompt())


def test_runs_of_a_card_differ_by_their_seeds_alone() -> None:
    def one(seed: int, rate: float = 0.1, loss: float | None = 1.0) -> RunFacts:
        metrics: Any = {"loss": loss, "accuracy": 0.5}
        settings = {"learning_rate": rate}
        return RunFacts("p_tuning_v2", "SEQ_CLS", hyperparameters=settings, seeds=[seed], metrics=[metrics])

    with pytest.raises(PTuneError, match=r"differ in learning_rate \(0.1 and 0.2\)"):
        merge_seeds([one(0), one(1, rate=0.2)])
    with pytest.raises(PTuneError, match=r"seeds \[0, 0\]; expected each once"):
        merge_seeds([one(0), one(0)])
    text = make_card(merge_seeds([one(0), one(1, loss=None)])).text  # one diverged
    assert "| accuracy | 0.5000 ± 0.0000 |" in text and "| loss |" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{}, {"base_revision": "b" * 40}, {"base_revision": "c" * 40}], r"base_revision \(b{40} and c{40}\)"),
        ([{"hardware": {"processes": 1}}, {"hardware": {"processes": 2}}], r"processes \(1 and 2\)"),
        ([{"base_revision": "b" * 40, "hardware": {"processes": 2}}, {}], None),  # of older facts they are not known
    ],
)
def test_runs_of_a_card_have_one_base_and_one_batch(changes: list[dict[str, Any]], said: str | None) -> None:
    """The loss of a batch is over all processes."""
    runs = [
        replace(RunFacts("p_tuning_v2", "SEQ_CLS", seeds=[n], metrics=[{"accuracy": 0.5}]), **change)
        for n, change in enumerate(changes)
    ]
    if said is None:
        assert merge_seeds(runs).seeds == [0, 1]
        return
    with pytest.raises(PTuneError, match=f"differ by their seeds alone; these differ in {said}"):
        merge_seeds(runs)


def test_facts_tell_what_a_prompt_started_from_and_what_ran_beside_it(tmp_path: Path) -> None:
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=2)
    get_ptune_model(build("bert"), config).save_pretrained(tmp_path / "earlier")
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path / "earlier")}
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=2, backbone_dropout=False, **start)
    told = facts_of(get_ptune_model(build("bert"), config), None).options
    assert told["backbone_dropout"] is False and told["prompt_tuning_init_adapter"] == "earlier"


def test_the_snippet_of_a_model_that_chats_sends_messages(
    wrap: Wrap, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pipeline writes them by the chat template; a text would get its special tokens twice."""
    words = tokenizer_of("wordpiece")
    words.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    model, task = wrap("llama", "p_tuning_v2"), CausalLM()
    row = task.check_row({"instruction": "hello", "output": "world"}, "row 1")
    facts = facts_of(model)
    facts.example = task.example(row, words)
    write_repository(model, tmp_path, "user/adapter", tokenizer=words, facts=facts)
    assert RunFacts.load(tmp_path).example == [{"role": "user", "content": "hello"}]
    snippet = re.findall(r"```python\n(.*?)```", ModelCard.load(tmp_path / "README.md").text, re.DOTALL)[0]
    assert 'print(pipe([{"role": "user", "content": "hello"}]))' in snippet
    exec(snippet.replace("user/adapter", str(tmp_path)), {})
    assert "'role': 'assistant'" in capsys.readouterr().out
    (tmp_path / "run_facts.json").write_text(json.dumps(asdict(facts) | {"example": [{"role": 1}]}))
    with pytest.raises(PTuneError, match="expected a text, or messages with role and content"):
        RunFacts.load(tmp_path)


def test_the_snippet_of_a_tokenizer_that_closes_texts_asks_as_training_did(
    wrap: Wrap, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipeline would ask behind the closing token, where no answer has been learned."""
    words = tokenizer_of("wordpiece")
    content = {"task": "CAUSAL_LM", "base": "base", "method": "p_tuning_v2", "output_dir": "out"}
    recipe = make_recipe(content | {"data": {"source": "rows.jsonl"}}, folder=tmp_path)
    model, task = wrap("llama", "p_tuning_v2"), CausalLM()
    row = task.check_row({"prompt": "hello", "answer": "world"}, "row 1")
    facts = replace(facts_of(model), **card_facts(recipe, Rows([row], [row], [], []), task, words, []))
    write_repository(model, tmp_path, "user/adapter", tokenizer=words, facts=facts)
    snippet = re.findall(r"```python\n(.*?)```", ModelCard.load(tmp_path / "README.md").text, re.DOTALL)[0]
    exec(snippet.replace("user/adapter", str(tmp_path)), names := {})
    assert names["inputs"]["input_ids"][0].tolist() == task.encode([row], words, [])[0]["source_ids"]
    assert capsys.readouterr().out.startswith("hello")
    chatting = task.check_row({"instruction": "hello", "output": "world"}, "row 1")
    words.chat_template = "{{ messages[0].content }}"
    assert "closing" not in card_facts(recipe, Rows([chatting], [chatting], [], []), task, words, [])


def test_the_snippet_of_a_template_reads_it(tmp_path: Path) -> None:
    options = {"template": "[P2] {first} {second} [MASK]", "verbalizer": {"a": "b"}}
    facts = RunFacts("p_tuning", "MASKED_LM", options=options, example="x")
    card = make_card(facts)
    assert "from hf_ptune.cloze import classify" in card.text and '[{"first": "x", "second": "x"}]' in card.text
    facts.example = {"first": "it rains", "second": "it is wet"}
    facts.save(tmp_path)
    assert '[{"first": "it rains", "second": "it is wet"}]' in make_card(RunFacts.load(tmp_path)).text
    card = make_card(RunFacts("p_tuning", "CAUSAL_LM", options=options | {"verbalizer": None}))
    assert "predict_words(model, tokenizer" in card.text and "pipeline" not in card.text.split("## Size")[0]


TEXTS = {"text": "it rains", "more": "again"}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "MASKED_LM", "CAUSAL_LM"])
@pytest.mark.parametrize("example", [TEXTS, "it rains"])
def test_the_snippet_places_the_virtual_tokens_of_a_template(
    task: str, example: Any, base_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text without them gets no prompt, and so the base's own answer."""
    family = "llama" if task == "CAUSAL_LM" else "bert"
    words = tokenizer_of("wordpiece")
    config = PTuneConfig(method="prompt_tuning", template="[P2] {text} [P1] {more}")
    backbone = TASKS[task].from_pretrained(base_folder(family, task))
    model = get_ptune_model(backbone, config, words).eval()
    facts = replace(facts_of(model), example=example)
    write_repository(model, tmp_path, "user/adapter", tokenizer=words, facts=facts)
    assert RunFacts.load(tmp_path).example == example
    snippet = re.findall(r"```python\n(.*?)```", ModelCard.load(tmp_path / "README.md").text, re.DOTALL)[0]
    read: list[Any] = []
    call = PreTrainedTokenizerFast.__call__

    def watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(call(self, *args, **kwargs))
        return read[-1]

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watch)
    exec(snippet.replace("user/adapter", str(tmp_path)), {})
    ids, wanted = torch.as_tensor(read[-1]["input_ids"]), words.convert_tokens_to_ids(virtual_tokens(3))
    assert all([i for i in row if i in wanted] == wanted for row in ids.reshape(-1, ids.shape[-1]).tolist())


def test_the_snippet_takes_words_of_several_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tokenizer_of("wordpiece")
    options = {"template": "[P2] {text} [MASK]", "verbalizer": {"a": "terrible", "b": "great"}}
    build("bert", "MASKED_LM").save_pretrained(tmp_path / "base")
    backbone = TASKS["MASKED_LM"].from_pretrained(tmp_path / "base")
    model = get_ptune_model(backbone, PTuneConfig(method="prompt_tuning", **options), words)
    write_repository(model, tmp_path / "ours", "user/adapter", tokenizer=words)
    snippet = re.findall(r"```python\n(.*?)```", ModelCard.load(tmp_path / "ours" / "README.md").text, re.DOTALL)[0]
    exec(snippet.replace("user/adapter", str(tmp_path / "ours")), {})
    assert "Choice(label=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "options"),
    [
        *((task, {}) for task in ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS", "MULTIPLE_CHOICE")),
        ("MASKED_LM", {"template": "{text} [MASK]"}),
    ],
)
def test_the_example_of_a_snippet_is_written_in_its_own_letters(task: str, options: dict[str, Any]) -> None:
    example = '提供标语 "é" <a> & it\'s\n\\u \u2028\t🙂'
    text = make_card(RunFacts("p_tuning", task, options=options, example=example)).text
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert "提供标语" in snippet and "<a> & it's" in snippet and "🙂" in snippet
    assert example in [n.value for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.Constant)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task": "FOO"}, "task is 'FOO'; expected one of SEQ_CLS"),
        ({"method": "foo"}, "foo"),
        ({"options": None}, "options is None; expected a dict"),
        ({"metrics": [{"accuracy": "high"}]}, "accuracy in metrics is 'high'; expected a number"),
        ({"metrics": {"accuracy": 0.9}}, "expected a list"),
        ({"metrics": ["high"]}, "metrics holds 'high'"),
        ({"history": [{"loss": []}]}, "loss in history"),
        ({"memory_by_rank": {"1": 3}}, "memory_by_rank holds 3"),
        ({"datasets": "a/b"}, "datasets is 'a/b'; expected a list"),
        ({"datasets": [1]}, "datasets holds 1; expected text"),
        ({"seeds": ["a"]}, "seeds holds 'a'"),
        ({"example": None}, "example is None; expected a str"),
        ({"example": {"text": "a"}}, "expected a text, or text and text_pair"),
        ({"example": {"text": "a", "text_pair": 1}}, "expected a text, or text and text_pair"),
        ({"example": {"text": "a", "text_pair": "b"}, "task": "CAUSAL_LM"}, "expected a str"),
        ({"base": 3}, "base is 3; expected a str"),
    ],
)
def test_facts_that_make_no_card_are_refused(
    changed: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"method": "p_tuning_v2", "task": "SEQ_CLS", "metrics": [{"loss": None}]} | changed
    (tmp_path / "run_facts.json").write_text(json.dumps(content))
    assert main(["card", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "holds no facts of a run" in told and said in told
