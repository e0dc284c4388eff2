"""The walk of several tasks: one recipe, one prompt, an adapter a task, each of which starts another run."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hub import HubServer, connect
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_train import LENGTHS, ROWS, write_base
from transformers import AutoTokenizer

from hf_ptune import LearningCallback, PTuneConfig, train
from hf_ptune.arguments import make_arguments
from hf_ptune.backbone import TASKS
from hf_ptune.cards import RunFacts
from hf_ptune.cli import main
from hf_ptune.errors import AdapterFileError, ConfigError, GuardError, PTuneError, RecipeError
from hf_ptune.evaluation import evaluate_tasks
from hf_ptune.fresh_base import load_tokenizer
from hf_ptune.optimizer import make_optimizer
from hf_ptune.recipe import make_recipe
from hf_ptune.tasks.causal_lm import CausalLM
from hf_ptune.train_multitask import MultiTaskTrainer, build, make_multitask_recipe, run


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    for task, count in (("SEQ_CLS", 40), ("TOKEN_CLS", 24)):
        (tmp_path / f"{task}.jsonl").write_text("\n".join(json.dumps(ROWS[task](n)) for n in range(count)))
    return {
        "base": base,
        "method": "p_tuning_v2",
        "options": {"num_virtual_tokens": 4},
        "tasks": [
            {"name": "when", "task": "SEQ_CLS", "data": {"source": "SEQ_CLS.jsonl"}},
            {"name": "letters", "task": "TOKEN_CLS", "data": {"source": "TOKEN_CLS.jsonl"}},
        ],
        "training": {
            "num_train_epochs": 16,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-2,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
        },
        "output_dir": str(tmp_path / "out"),
    }


def test_from_recipe_to_adapters_to_one_task(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    assert main(["train", str(tmp_path / "r.yaml"), "--seed=1"]) == 0
    printed = capsys.readouterr().out
    prompts = []
    for name, task in (("when", "SEQ_CLS"), ("letters", "TOKEN_CLS")):
        folder = tmp_path / "out" / "adapter" / name
        assert f"{name}: held-out" in printed and (folder / "README.md").is_file()
        model = TASKS[task].from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        prompts.append(model.prompt.weight)
    assert torch.equal(*prompts)
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path / "out/adapter/when")}
    one = {k: v for k, v in content.items() if k != "tasks"} | {"task": "SEQ_CLS", "data": {"source": "SEQ_CLS.jsonl"}}
    one["options"] = content["options"] | start | {"prompt_tuning_init_head": True}
    one["training"] = content["training"] | {"max_steps": 1, "learning_rate": 1e-9}
    outcome = train.run(make_recipe(one | {"output_dir": str(tmp_path / "one")}, folder=tmp_path))
    facts = json.loads((tmp_path / "out/adapter/when/run_facts.json").read_text())
    assert outcome.before["accuracy"] == pytest.approx(facts["metrics"][0]["accuracy"])
    assert PTuneConfig.from_pretrained(outcome.folder).prompt_tuning_init == "ADAPTER"


@pytest.mark.parametrize("epochs", [1, 6])
def test_a_head_that_comes_along_reads_what_it_did(epochs: int, content: dict[str, Any], tmp_path: Path) -> None:
    """However many epochs either run has."""
    content["training"] |= {"num_train_epochs": 1}
    run(make_multitask_recipe(content, folder=tmp_path))
    folder = tmp_path / "out/adapter/letters"
    assert PTuneConfig.from_pretrained(folder).head_states == "mix"
    one = {k: v for k, v in content.items() if k != "tasks"} | content["tasks"][1]
    one["options"] = content["options"] | {
        "prompt_tuning_init": "ADAPTER",
        "prompt_tuning_init_adapter": str(folder),
        "prompt_tuning_init_head": True,
    }
    one["training"] = content["training"] | {"num_train_epochs": epochs}
    del one["name"]
    outcome = train.run(make_recipe(one | {"output_dir": str(tmp_path / "one")}, folder=tmp_path))
    assert PTuneConfig.from_pretrained(outcome.folder).head_states == "mix"
    one["data"] = {"source": "TOKEN_CLS.jsonl", "labels": ["O", "B-L"]}
    with pytest.raises(ConfigError, match="labels"):
        train.run(make_recipe(one | {"options": one["options"] | {"head_states": "last"}}, folder=tmp_path))


@pytest.mark.parametrize(
    ("given", "read"), [({}, "last"), ({"head_states": "auto"}, "mix"), ({"head_states": "last"}, "last")]
)
@pytest.mark.parametrize("turned", [False, True])
def test_heads_read_what_their_own_task_s_defaults_say(
    given: dict[str, Any], read: str, turned: bool, content: dict[str, Any], tmp_path: Path
) -> None:
    """Whichever task is the first: in long runs taggers read the last layer, unless the recipe says otherwise."""
    content["options"] |= given
    content["tasks"] = content["tasks"][::-1] if turned else content["tasks"]
    recipe = make_multitask_recipe(content, folder=tmp_path)
    model, _ = build(recipe, load_tokenizer(recipe.shared.base))
    assert {n: model.model_of(n).config.head_states for n in model.tasks} == {"when": "last", "letters": read}
    assert (model.model_of("letters").mix is not None) == (read == "mix") and model.model_of("when").mix is None


def test_both_tasks_learn(content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content["tasks"][0]["data"]["test_source"] = "SEQ_CLS.jsonl"
    found = run(make_multitask_recipe(content, folder=tmp_path))
    assert found["when"]["test_accuracy"] > 0.7 and "test_loss" not in found["letters"]
    assert f"test accuracy: {found['when']['test_accuracy']:.3f}" in capsys.readouterr().out
    facts = RunFacts.load(tmp_path / "out/adapter/when")
    known = {"loss", "accuracy", "f1_macro"}
    assert set(facts.metrics[0]) == known | {f"test_{name}" for name in known}
    assert set(found) == {"when", "letters"} and found["when"]["accuracy"] > 0.7 and found["letters"]["loss"] < 0.7


def test_what_a_run_left_is_measured_task_by_task(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "r.yaml", tmp_path / "out"
    content["tasks"][0]["data"]["test_source"] = "SEQ_CLS.jsonl"
    content["training"] |= {"num_train_epochs": 2, "save_strategy": "epoch", "metric_for_best_model": "mean"}
    one = {"tasks": None, "task": "SEQ_CLS", "data": {"source": "SEQ_CLS.jsonl"}}
    path.write_text(json.dumps(content | {"variants": {"one": one}}))
    assert main(["evaluate", str(path)]) == 2
    assert f"{out / 'adapter' / 'when'} is no folder; train the recipe first" in capsys.readouterr().err
    trained = run(make_multitask_recipe(content, folder=tmp_path))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("when", "letters", "  "))]
    found = evaluate_tasks(make_multitask_recipe(content, folder=tmp_path))
    flat = {n: f["held-out"] | {f"test_{k}": v for k, v in f.get("test", {}).items()} for n, f in found.items()}
    assert flat == {n: pytest.approx(f, rel=1e-5) for n, f in trained.items()}
    said = capsys.readouterr().out.splitlines()
    rows = [line.partition(": loss ")[0] for line in said if " rows: loss " in line]
    assert rows == ["when: held-out, 10 rows", "when: test, 40 rows", "letters: held-out, 6 rows"]
    table = [re.sub(r"[0-9.]+ before, ([0-9.]+) after training", r"\1", line) for line in printed]
    assert said[-5:] == table and len(table) == 5
    # a checkpoint has such folders too; a variant may be of one task
    assert main(["evaluate", str(path), "--adapter", str(out / "checkpoint-14")]) == 0
    assert main(["evaluate", str(path), "--variant=one", "--adapter", str(out / "adapter/when")]) == 0
    single = ["--variant=one", "--training.metric_for_best_model=loss", f"--output_dir={tmp_path / 'one'}"]
    assert main(["train", str(path), *single]) == 0 and (tmp_path / "one/adapter/config.json").is_file()
    (out / "adapter/letters/config.json").unlink()
    with pytest.raises(AdapterFileError, match="letters holds no finished adapter: config.json missing"):
        evaluate_tasks(make_multitask_recipe(content, folder=tmp_path))


def test_a_task_whose_name_begins_another_s_has_its_own_metrics_alone(content: dict[str, Any], tmp_path: Path) -> None:
    content["tasks"][0]["name"], content["tasks"][1]["name"] = "when", "when_tags"
    content["training"] |= {"max_steps": 1}
    found = run(make_multitask_recipe(content, folder=tmp_path))
    assert set(found["when"]) == {"loss", "accuracy", "f1_macro"} and "f1" in found["when_tags"]
    facts = RunFacts.load(tmp_path / "out/adapter/when")
    assert facts.metrics == [found["when"]]


def test_a_card_names_the_tasks_that_the_prompt_was_trained_for_too(content: dict[str, Any], tmp_path: Path) -> None:
    content["tasks"][0]["card"] = {"datasets": [str(tmp_path / "dates.csv"), "user/days"], "limits": ["Short ones."]}
    content["training"] |= {"max_steps": 1}
    run(make_multitask_recipe(content | {"temperature": 2}, folder=tmp_path))
    cards = {name: (tmp_path / "out/adapter" / name / "README.md").read_text() for name in ("when", "letters")}
    beside = "too; the number of training rows is its own alone."
    assert f"- Short ones.\n- Its prompt was trained for letters (TOKEN_CLS: TOKEN_CLS) {beside}\n" in cards["when"]
    assert f"- Its prompt was trained for when (SEQ_CLS: dates.csv, user/days) {beside}\n" in cards["letters"]
    assert all("| `temperature` | 2.0 |" in card and str(tmp_path) not in card for card in cards.values())
    content["tasks"] = content["tasks"][:1]
    run(make_multitask_recipe(content, folder=tmp_path))
    assert RunFacts.load(tmp_path / "out/adapter/when").limits == ["Short ones."]


def test_tasks_over_a_decoder_have_its_rate(content: dict[str, Any], tmp_path: Path) -> None:
    content["base"] = write_base(tmp_path / "decoder", "llama", "SEQ_CLS")
    del content["training"]["learning_rate"], content["training"]["num_train_epochs"]
    content["training"] |= {"max_steps": 4, "logging_steps": 1, "lr_scheduler_type": "constant"}
    run(make_multitask_recipe(content, folder=tmp_path))
    facts = RunFacts.load(tmp_path / "out" / "adapter" / "when")
    rates = [entry["learning_rate"] for entry in facts.history if "learning_rate" in entry]
    assert rates and set(rates) == {2e-2} and facts.options["prompt_tuning_init"] == "SAMPLE_VOCAB"


def test_test_rows_are_looked_at_before_training(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps(ROWS["SEQ_CLS"](0) | {"text": "a " * 99}))
    content["tasks"][0]["data"] |= {"test_source": "long.jsonl", "max_length": 1000}
    content["training"] |= {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(GuardError, match="sequences of 101 tokens"):
        run(make_multitask_recipe(content, folder=tmp_path))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_mean_is_of_numbers_from_0_to_1(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_multitask_recipe(content, folder=tmp_path)
    tokenizer = load_tokenizer(recipe.shared.base)
    model, parts = build(recipe, tokenizer)
    trainer = MultiTaskTrainer(model, make_arguments(recipe.shared), parts, tokenizer)
    trainer.parts["letters"] = replace(parts["letters"], task=CausalLM(generate=True))
    measured = {"when": {"accuracy": 0.75}, "letters": {"bleu": 25.0}}
    monkeypatch.setattr(trainer, "measure", lambda name, features: measured[name])
    found = trainer.evaluate()
    assert (found["eval_letters_bleu"], found["eval_mean"]) == (25.0, 0.5)


def test_engines_that_split_models_are_refused(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_ptune.multitask_saving.splits", lambda trainer: True)
    with pytest.raises(PTuneError, match="splits a model over ranks"):
        run(make_multitask_recipe(content, folder=tmp_path))


def test_a_run_goes_on_from_its_checkpoint(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"] |= {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "warmup_steps": 0}
    ends = []
    for resume in (False, True):
        recipe = make_multitask_recipe(content, folder=tmp_path)
        torch.manual_seed(0)
        tokenizer = load_tokenizer(recipe.shared.base)
        model, parts = build(recipe, tokenizer)
        trainer = MultiTaskTrainer(model, make_arguments(recipe.shared), parts, tokenizer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-5") if resume else None)
        ends.append({n: p.detach() for n, p in model.named_parameters()})
    assert all(torch.allclose(t, ends[1][n], atol=1e-6) for n, t in ends[0].items())
    assert TASKS["TOKEN_CLS"].from_pretrained(tmp_path / "out/checkpoint-10/letters").config.num_virtual_tokens == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "tasks holds no list"),
        ({"tasks": []}, "tasks holds no list"),
        ({"tasks": [{"task": "SEQ_CLS"}]}, "a task has the name None"),
        (
            {"tasks": [{"name": "a", "task": "SEQ_CLS", "data": {"source": "a.csv"}}] * 2},
            "the name 'a'; expected one of",
        ),
        ({"tasks": [{"name": "a", "training": {}}]}, "unknown key training of task a"),
        ({"tasks": [{"name": "a", "task": "CLS", "data": {"source": "a.csv"}}]}, "x.yaml, task a: task is 'CLS'"),
        ({"temperature": 0}, "temperature is 0; expected a number above 0"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, content: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=message):
        make_multitask_recipe(content | change, "x.yaml")
    with pytest.raises(RecipeError, match=r"names several tasks; .* hf_ptune\.train_multitask"):
        make_recipe(content)


def test_each_task_becomes_a_repository(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content["training"] |= {"push_to_hub": True, "hub_model_id": "alice/both", "hub_token": "t", "max_steps": 1}
    with HubServer() as hub:
        hub.add_user("alice", "t")
        connect(monkeypatch, hub)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        run(make_multitask_recipe(content, folder=tmp_path))
        assert set(hub.repos) == {"alice/both-when", "alice/both-letters"}
        loaded = TASKS["TOKEN_CLS"].from_pretrained("alice/both-letters", cache_dir=tmp_path / "cache", token="t")
        assert "alice/both-letters" in ModelCard.load("alice/both-letters", token="t").content
    facts = json.loads((tmp_path / "out/adapter/letters/run_facts.json").read_text())
    written = TASKS["TOKEN_CLS"].from_pretrained(tmp_path / "out/adapter/letters")
    assert torch.equal(loaded.prompt.weight, written.prompt.weight)
    assert facts["memory"]["rss_peak"] > 0 and facts["speed"]


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"load_best_model_at_end": True, "save_strategy": "epoch"}]
)
def test_settings_of_the_trainer(settings: dict[str, Any], content: dict[str, Any], tmp_path: Path) -> None:
    content["training"] |= settings | {"eval_strategy": "epoch", "num_train_epochs": 2}
    assert set(run(make_multitask_recipe(content, folder=tmp_path))) == {"when", "letters"}


def test_labels_of_causal_language_models_are_not_smoothed_beside_other_tasks(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """The Trainer would compare each token with the logits of its own place."""
    content["base"] = write_base(tmp_path / "gpt2", "gpt2", "CAUSAL_LM")
    (tmp_path / "second.jsonl").write_text("\n".join(json.dumps(ROWS["CAUSAL_LM"](n)) for n in range(8)))
    content["tasks"][1] = {"name": "second", "task": "CAUSAL_LM", "data": {"source": "second.jsonl"}}
    content["training"] |= {"label_smoothing_factor": 0.1}
    with pytest.raises(RecipeError, match=r"label_smoothing_factor is 0\.1.*second is CAUSAL_LM"):
        run(make_multitask_recipe(content, folder=tmp_path))


def test_tasks_are_measured_whole_and_in_order(content: dict[str, Any], tmp_path: Path) -> None:
    """However training draws its rows."""
    rows = [LENGTHS["TOKEN_CLS"](n) for n in range(44)]
    (tmp_path / "TOKEN_CLS.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer, found = load_tokenizer(content["base"]), []
    for further in ({}, {"train_sampling_strategy": "group_by_length"}, {"dataloader_drop_last": True}):
        recipe = make_multitask_recipe(content | {"training": content["training"] | further}, folder=tmp_path)
        torch.manual_seed(0)
        model, parts = build(recipe, tokenizer)
        found.append(MultiTaskTrainer(model, make_arguments(recipe.shared), parts, tokenizer).evaluate())
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


def test_rows_that_fill_no_batch_are_refused(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are more processes than batches: a process by itself fills its batches up."""
    content["training"] |= {"dataloader_drop_last": True, "per_device_train_batch_size": 64, "max_steps": 1}
    assert len(run(make_multitask_recipe(content, folder=tmp_path))) == 2
    monkeypatch.setattr(MultiTaskTrainer, "get_train_dataloader", lambda self: [])
    with pytest.raises(RecipeError, match="48 rows to train on fill no batch of 64 .* leave dataloader_drop_last out"):
        run(make_multitask_recipe(content, folder=tmp_path))


def test_the_order_of_rows_has_a_seed_of_its_own(content: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, orders = load_tokenizer(content["base"]), []
    for seed, of_rows in ((1, None), (1, 0), (2, 0), (0, None)):
        changes = {"seed": seed, "training": content["training"] | {"data_seed": of_rows}}
        recipe = make_multitask_recipe(content | changes, folder=tmp_path)
        model, parts = build(recipe, tokenizer)
        trainer = MultiTaskTrainer(model, make_arguments(recipe.shared), parts, tokenizer)
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] != orders[1] == orders[2] == orders[3]


def test_a_run_that_does_not_learn_is_warned_and_finished(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    content["training"] |= {"learning_rate": 1e-9, "num_train_epochs": 8}
    run(make_multitask_recipe(content, folder=tmp_path))
    assert "Raise the learning rate" in caplog.text


@pytest.mark.parametrize(
    ("family", "rate", "expected"), [("gpt2", 1e-7, ["too_low"]), ("gpt2", 2e-2, []), ("bert", 2e-2, [])]
)
def test_losses_of_different_tasks_are_not_compared(
    family: str, rate: float, expected: list[str], content: dict[str, Any], tmp_path: Path
) -> None:
    second = "CAUSAL_LM" if family == "gpt2" else "TOKEN_CLS"
    content["base"] = write_base(tmp_path / family, family, second)
    (tmp_path / "second.jsonl").write_text("\n".join(json.dumps(ROWS[second](n)) for n in range(40)))
    content["tasks"][1] = {"name": "second", "task": second, "data": {"source": "second.jsonl"}}
    recipe = make_multitask_recipe(content, folder=tmp_path)
    tokenizer, watch = load_tokenizer(recipe.shared.base), LearningCallback()
    for seed in range(4):
        content["training"] |= {"learning_rate": rate, "max_steps": 80, "per_device_train_batch_size": 2}
        recipe = make_multitask_recipe(content | {"seed": seed}, folder=tmp_path)
        model, parts = build(recipe, tokenizer)
        trainer = MultiTaskTrainer(model, make_arguments(recipe.shared), parts, tokenizer, callbacks=[watch])
        trainer.train()
        assert list(watch.found) == expected
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert all({"loss_when", "loss_second"} & set(e) for e in logs) and len(logs) > 20
    first = logs[0]
    assert first["loss"] == pytest.approx(first.get("loss_when", first.get("loss_second")), rel=1e-4)


def test_a_task_that_blows_up_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"] |= {"learning_rate": 10.0, "max_steps": 80, "warmup_steps": 0}
    recipe = make_multitask_recipe(content, folder=tmp_path)
    tokenizer, watch = load_tokenizer(recipe.shared.base), LearningCallback()
    model, parts = build(recipe, tokenizer)
    MultiTaskTrainer(model, make_arguments(recipe.shared), parts, tokenizer, callbacks=[watch]).train()
    assert "the loss of task when is" in watch.found["too_high"]
    assert "Lower the learning rate" in watch.found["too_high"]


def test_a_prompt_that_trains_on_in_this_process_is_no_fresh_start(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"] |= {"learning_rate": 2e-2, "max_steps": 40}
    recipe = make_multitask_recipe(content, folder=tmp_path)
    tokenizer, watch = load_tokenizer(recipe.shared.base), LearningCallback()
    model, parts = build(recipe, tokenizer)
    for rate in (2e-2, 1e-7):
        arguments = make_arguments(recipe.shared)
        arguments.learning_rate = rate
        MultiTaskTrainer(model, arguments, parts, tokenizer, callbacks=[watch]).train()
        assert not watch.found


@pytest.mark.parametrize(
    ("family", "tasks"),
    [("roberta", ["SEQ_CLS", "MULTIPLE_CHOICE"]), ("bert", ["TOKEN_CLS", "MULTIPLE_CHOICE", "SEQ_CLS"])],
)
def test_a_base_without_a_pooler_gets_one(
    family: str, tasks: list[str], content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    content["base"] = write_base(tmp_path / family, family, "MASKED_LM")
    (tmp_path / "MULTIPLE_CHOICE.jsonl").write_text(
        "\n".join(json.dumps(ROWS["MULTIPLE_CHOICE"](n)) for n in range(24))
    )
    content["tasks"] = [{"name": t.lower(), "task": t, "data": {"source": f"{t}.jsonl"}} for t in tasks]
    content["training"] |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    with_pooler = {t for t in tasks if t == "MULTIPLE_CHOICE" or (t == "SEQ_CLS" and family == "bert")}
    run(make_multitask_recipe(content, folder=tmp_path))
    assert caplog.text.count("has no pooler") == len(with_pooler)
    folder, poolers = tmp_path / "out", []
    ends = {t: load_file(folder / "adapter" / t.lower() / "model.safetensors") for t in tasks}
    for task in tasks:
        saved = PTuneConfig.from_pretrained(folder / "adapter" / task.lower()).modules_to_save
        assert saved == (["pooler"] if task in with_pooler else None)
        poolers += [t for n, t in ends[task].items() if n.endswith("pooler.dense.weight")]
    assert len(poolers) == len(with_pooler)  # each task has its own, beside its head
    assert all(not torch.equal(poolers[0], other) for other in poolers[1:])
    # the same outputs, from a folder and in the middle of a run
    recipe = make_multitask_recipe(content, folder=tmp_path)
    tokenizer = load_tokenizer(recipe.shared.base)
    model, parts = build(recipe, tokenizer)
    model.eval().load_adapters(folder / "adapter")
    for task in tasks:
        batch = parts[task.lower()].task.collator(tokenizer)(parts[task.lower()].held_out[:3])
        again = TASKS[task].from_pretrained(folder / "adapter" / task.lower())
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, model(task=task.lower(), **batch).logits)
    content["training"] |= {"resume_from_checkpoint": str(folder / "checkpoint-3")}
    with pytest.raises(RecipeError, match=r"temperature is 1.0 there and 4.0 here"):
        run(make_multitask_recipe(json.loads(json.dumps(content | {"temperature": 4})), folder=tmp_path))
    run(make_multitask_recipe(content, folder=tmp_path))
    for task in tasks:
        tensors = load_file(folder / "adapter" / task.lower() / "model.safetensors")
        assert all(torch.allclose(t, ends[task][n], atol=1e-6) for n, t in tensors.items())
    # adapted to one task, with its pooler
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(folder / "adapter/multiple_choice")}
    one = {k: v for k, v in content.items() if k != "tasks"} | {"task": "MULTIPLE_CHOICE", "output_dir": str(tmp_path)}
    one |= {"options": content["options"] | start | {"prompt_tuning_init_head": True}}
    one |= {"data": {"source": "MULTIPLE_CHOICE.jsonl"}, "training": {"max_steps": 1, "learning_rate": 1e-9}}
    one["training"] |= {"use_cpu": True, "report_to": "none"}
    outcome = train.run(make_recipe(one, folder=tmp_path))
    facts = json.loads((folder / "adapter/multiple_choice/run_facts.json").read_text())
    assert outcome.before["loss"] == pytest.approx(facts["metrics"][0]["loss"], rel=1e-4)


def test_modules_that_a_recipe_trains_may_be_absent(content: dict[str, Any], tmp_path: Path) -> None:
    content["base"] = write_base(tmp_path / "masked", "bert", "MASKED_LM")
    content["options"] |= {"modules_to_save": ["pooler"]}
    content["tasks"][1] |= {"task": "SEQ_CLS", "data": {"source": "SEQ_CLS.jsonl"}}
    content["training"] |= {"max_steps": 1}
    run(make_multitask_recipe(content, folder=tmp_path))
    for name in ("when", "letters"):
        assert PTuneConfig.from_pretrained(tmp_path / "out/adapter" / name).modules_to_save == ["pooler"]


def test_it_goes_on_from_the_command_line(content: dict[str, Any], tmp_path: Path) -> None:
    content["training"] |= {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    for further in ([], ["--training.resume_from_checkpoint=true"]):
        assert main(["train", str(tmp_path / "r.yaml"), *further]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["global_step"] == 10


def test_what_tasks_cannot_share(content: dict[str, Any], tmp_path: Path) -> None:
    content["options"] |= {"train_backbone": True}
    with pytest.raises(ConfigError, match="tasks share a base that is frozen"):
        run(make_multitask_recipe(content, folder=tmp_path))
    options = {"template": "[P2] {text} [MASK]", "verbalizer": {"early": "a", "late": "b"}}
    content["tasks"][0] |= {"task": "CLOZE_MASKED_LM", "task_options": options}
    with pytest.raises(RecipeError, match="has a template of its own; train it by itself"):
        make_multitask_recipe(content, folder=tmp_path)


def test_heads_have_their_own_rate(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_multitask_recipe(content | {"head_learning_rate": 0.5}, folder=tmp_path).shared
    model, _ = build(make_multitask_recipe(content, folder=tmp_path), load_tokenizer(recipe.base))
    chosen = make_optimizer(make_arguments(recipe), model, *recipe.rates())
    assert chosen is not None
    rates = {id(p): group["lr"] for group in chosen[1]["params"] for p in group["params"]}
    assert rates[id(model.prompt.weight)] == 5e-2 and chosen[1]["params"][0]["lr"] == 5e-2
    assert {rates[id(p)] for n, p in model.named_parameters() if "classifier" in n} == {0.5}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
