"""Going on from a checkpoint: a finished run takes no further step, and another run's checkpoint is refused."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, build
from test_train import write_base, write_recipe
from transformers import Trainer, TrainingArguments

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.cards import RunFacts
from hf_ptune.data import load_rows
from hf_ptune.errors import PTuneError, RecipeError
from hf_ptune.recipe import make_recipe
from hf_ptune.resuming import check_checkpoint
from hf_ptune.train import run
from hf_ptune.train_multitask import make_multitask_recipe
from hf_ptune.train_multitask import run as run_tasks


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe of which a run has been finished, in the middle of an epoch, and which resumes."""
    found = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "bert", "SEQ_CLS"))
    found["training"] |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    run(make_recipe(found, folder=tmp_path))
    found["training"] |= {"resume_from_checkpoint": "true"}
    return found


def test_a_finished_run_takes_no_further_step(content: dict[str, Any], tmp_path: Path) -> None:
    expected = (tmp_path / "out" / "adapter" / "model.safetensors").read_bytes()
    run(make_recipe(content, folder=tmp_path))
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert (tmp_path / "out" / "adapter" / "model.safetensors").read_bytes() == expected
    content["training"] |= {"max_steps": 6}
    run(make_recipe(content, folder=tmp_path))
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"per_device_train_batch_size": 4}, 4),
        ({"gradient_accumulation_steps": 2}, 16),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, None),
        ({"auto_find_batch_size": True, "per_device_train_batch_size": 16}, None),
    ],
)
def test_another_number_of_rows_a_step_is_told(
    settings: dict[str, Any],
    rows: int | None,
    content: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content["training"] |= {"max_steps": 4, **settings}
    run(make_recipe(content, folder=tmp_path))
    assert ("a step had" in caplog.text) == (rows is not None)
    assert rows is None or f"had 8 rows in the run that goes on from step 3, and has {rows} here" in caplog.text


def test_what_was_measured_of_the_same_held_out_rows_stays(
    content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"][0]
    content["training"] |= {"max_steps": 4}
    outcome = run(make_recipe(content, folder=tmp_path))
    assert outcome.before["loss"] == fresh["eval_loss"] != outcome.after["loss"]
    assert [e["step"] for e in RunFacts.load(outcome.folder).history if "eval_loss" in e] == [0, 3, 4]
    assert "what was measured" not in caplog.text


def test_what_was_measured_of_other_held_out_rows_is_dropped(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "late.jsonl").write_text("\n".join(json.dumps({"text": "e f", "label": "late"}) for _ in range(4)))
    content["data"] = {"source": "fewer.jsonl", "eval_source": "late.jsonl"}
    rows = load_rows(make_recipe(content | {"data": {"source": "rows.jsonl"}}, folder=tmp_path)).train
    (tmp_path / "fewer.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content["training"] |= {"max_steps": 4}
    outcome = run(make_recipe(content, folder=tmp_path))
    assert outcome.before == {} and "accuracy" in outcome.after
    assert [e["step"] for e in RunFacts.load(outcome.folder).history if "eval_loss" in e] == [3, 4]
    assert f"held-out accuracy: {outcome.after['accuracy']:.3f} after training" in capsys.readouterr().out
    assert "what was measured up to step 3 was of other held-out rows, or in another way" in caplog.text


def test_a_run_that_goes_on_may_write_answers_too(tmp_path: Path) -> None:
    """From a checkpoint of earlier versions too, which does not say how it was measured."""
    pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
    content = write_recipe(tmp_path, "CAUSAL_LM", write_base(tmp_path / "base", "gpt2", "CAUSAL_LM"))
    content["training"] |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run(make_recipe(content, folder=tmp_path))
    content["training"] |= {"max_steps": 2, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    content["task_options"] = {"generate": True, "max_new_tokens": 2}
    said = tmp_path / "out" / "checkpoint-1" / "ptune_run.json"
    for known, steps in ((True, [1, 2]), (False, [0, 1, 2])):
        facts = json.loads(said.read_text())
        said.write_text(json.dumps(facts if known else {k: v for k, v in facts.items() if k != "held-out rows"}))
        outcome = run(make_recipe(content, folder=tmp_path))
        assert "bleu" not in outcome.before and "bleu" in outcome.after
        assert [e["step"] for e in RunFacts.load(outcome.folder).history if "eval_loss" in e] == steps


def test_a_finished_run_of_several_tasks_takes_no_further_step(tmp_path: Path) -> None:
    content = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "bert", "SEQ_CLS"))
    content["tasks"] = [{"name": "one", "task": content.pop("task"), "data": content.pop("data")}]
    content["training"] |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    # how rows of one task are ordered may change: those of several have a way of their own
    for further in ({}, {"resume_from_checkpoint": "true", "train_sampling_strategy": "sequential"}):
        content["training"] |= further
        run_tasks(make_multitask_recipe(content, folder=tmp_path))
        assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    content["options"] = {"num_virtual_tokens": 5}
    with pytest.raises(RecipeError, match=r"checkpoint-3.one is of another run: options.num_virtual_tokens is 4"):
        run_tasks(make_multitask_recipe(content, folder=tmp_path))


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (
            ("reduce_lr_on_plateau", {"factor": 0.5}),
            ("reduce_lr_on_plateau", {"factor": 0.1}),
            "kwargs is .*5} .*1} here",
        ),
        (("reduce_lr_on_plateau", {"factor": 0.5}), ("linear", {}), "type is reduce_lr_on_plateau .* linear here"),
        (("linear", {}), ("greedy", {}), "type is linear there and greedy here"),
        (("linear", {}), ("cosine", {"num_cycles": 1}), None),
        (("greedy", {"patience": 2, "factor": 0.5}), ("greedy", {"factor": 0.5, "patience": 2}), None),
    ],
)
def test_schedules_that_follow_measurements_keep_their_settings(
    there: tuple[str, Any], here: tuple[str, Any], message: str | None, tmp_path: Path
) -> None:
    """Their checkpoints hold them; others take those of the recipe."""
    content = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "bert", "SEQ_CLS"))
    content["training"] |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    for steps, (kind, options) in enumerate((there, here), 1):
        content["training"] |= {"max_steps": steps, "lr_scheduler_type": kind, "lr_scheduler_kwargs": options}
        with pytest.raises(RecipeError, match=message) if message and steps == 2 else nullcontext():
            run(make_recipe(content, folder=tmp_path))
        content["training"] |= {"resume_from_checkpoint": "true"}


def test_a_run_of_more_than_ten_labels_goes_on(tmp_path: Path) -> None:
    """A file has their numbers as texts, in the order of those: "1", "10", "11", "2"."""
    found = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "bert", "SEQ_CLS"))
    found["data"] |= {"labels": ["early", "late", *(f"never {n}" for n in range(10))]}
    found["training"] |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    run(make_recipe(found, folder=tmp_path))
    found["training"] |= {"resume_from_checkpoint": "true", "max_steps": 6}
    run(make_recipe(found, folder=tmp_path))
    assert (tmp_path / "out" / "checkpoint-6").is_dir()


def test_checkpoints_go_on_that_are_older_than_an_option(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "out" / "checkpoint-3" / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("head_states") == "last" and settings.pop("head_window") == "token"
    path.write_text(json.dumps(settings))
    told = path.with_name("ptune_run.json")
    facts = json.loads(told.read_text())
    assert facts.pop("training.data_seed") == "None"
    told.write_text(json.dumps(facts))
    content["training"] |= {"max_steps": 4, "save_steps": 4}
    run(make_recipe(content, folder=tmp_path))
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


@pytest.mark.parametrize(
    ("option", "old", "new"),
    [("head_states", "last", "mix"), ("head_states", "mix", "last"), ("head_window", "token", "neighbours")],
)
def test_a_head_that_reads_something_else_is_refused(option: str, old: str, new: str, tmp_path: Path) -> None:
    models = [
        get_ptune_model(build("bert", "TOKEN_CLS"), PTuneConfig(num_virtual_tokens=4, **{option: value}))
        for value in (old, new)
    ]
    models[0].save_pretrained(tmp_path)
    check_checkpoint(models[0], str(tmp_path))
    with pytest.raises(RecipeError, match=f"options.{option} is '{old}' there and '{new}' here"):
        check_checkpoint(models[1], str(tmp_path))


def test_another_commit_of_the_base_is_refused(tmp_path: Path) -> None:
    model = get_ptune_model(build("bert"), PTuneConfig(num_virtual_tokens=4))
    model.config.base_model_revision = "a" * 40
    model.save_pretrained(tmp_path)
    check_checkpoint(model, str(tmp_path))
    model.config.base_model_revision = None
    check_checkpoint(model, str(tmp_path))
    model.config.base_model_revision = "b" * 40
    with pytest.raises(RecipeError, match="commit of the base is 'a+' there and 'b+' here"):
        check_checkpoint(model, str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "prefix_tuning"}, "method is 'p_tuning_v2' there and 'prefix_tuning' here"),
        ({"options": {"num_virtual_tokens": 5}}, "options.num_virtual_tokens is 4 there and 5 here"),
        ({"options": {"num_virtual_tokens": 4, "layers": [1]}}, r"options.layers is None there and \[1\] here"),
        ({"options": {"num_virtual_tokens": 4, "pooling": "cls"}}, "options.pooling is 'mean' there and 'cls' here"),
        ({"base": "other"}, r"base is '.*base' there and '.*other' here"),
        ({"training": {"learning_rate": 0.5}}, "training.learning_rate is .* there and 0.5 here"),
        ({"training": {"optim": "sgd"}}, "training.optim is .* there and .*sgd here"),
        ({"training": {"weight_decay": 0.5}}, "training.weight_decay is 0.0 there and 0.5 here"),
        ({"training": {"adam_beta2": 0.9}}, "training.adam_beta2 is 0.999 there and 0.9 here"),
        ({"training": {"optim_args": "fused=false"}}, "training.optim_args is None there and fused=false here"),
        ({"seed": 7}, "seed is .* there and 7 here"),
        ({"training": {"data_seed": 7}}, "training.data_seed is None there and 7 here"),
        (
            {"training": {"train_sampling_strategy": "sequential"}},
            "sampling_strategy is random there and sequential here",
        ),
        ({"training": {"dataloader_drop_last": True}}, "training.dataloader_drop_last is False there and True here"),
        (
            {"training": {"accelerator_config": {"use_seedable_sampler": False}}},
            "seedable_sampler is True .* False here",
        ),
        ({"split": 3}, r"its training rows are others \(data.source, .*; its training labels are others"),
        ({"labels": ["late", "early"]}, r"labels is \['early', 'late'\] there and \['late', 'early'\] here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], message: str, content: dict[str, Any], tmp_path: Path
) -> None:
    if "training" in changes:
        changes = {"training": content["training"] | changes["training"]}
    if "split" in changes:
        changes = {"data": content["data"] | {"split_seed": 3}}
    if "base" in changes:
        changes = {"base": write_base(tmp_path / "other", "bert", "SEQ_CLS")}
    if "labels" in changes:
        changes = {"data": content["data"] | changes}
    with pytest.raises(RecipeError, match=message + ".*Give the old values.*or another output_dir"):
        run(make_recipe(json.loads(json.dumps(content | changes)), folder=tmp_path))


@pytest.mark.parametrize(
    ("task", "family"), [("SEQ_CLS", "bert"), ("TOKEN_CLS", "bert"), ("QUESTION_ANS", "bert"), ("SEQ_2_SEQ_LM", "t5")]
)
def test_a_checkpoint_of_other_labels_is_refused(task: str, family: str, tmp_path: Path) -> None:
    """Of the same texts, learned as something else."""
    content = write_recipe(tmp_path, task, write_base(tmp_path / "base", family, task))
    content["training"] |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run(make_recipe(content, folder=tmp_path))
    changed = {
        "SEQ_CLS": lambda row: {"label": {"early": "late", "late": "early"}[row["label"]]},
        "TOKEN_CLS": lambda row: {"tags": [{"O": "B-L", "B-L": "O"}[tag] for tag in row["tags"]]},
        "QUESTION_ANS": lambda row: {"answers": {"text": [row["context"][0]], "answer_start": [0]}},
        "SEQ_2_SEQ_LM": lambda row: {"target": row["text"]},
    }[task]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row | changed(row)) for row in rows))
    content["training"] |= {"resume_from_checkpoint": "true"}
    with pytest.raises(RecipeError, match="is of another run: its training labels are others"):
        run(make_recipe(content, folder=tmp_path))


def test_a_checkpoint_of_other_rates_is_refused(tmp_path: Path) -> None:
    """Its optimizer would go on with the old ones."""
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    content = write_recipe(tmp_path, "SEQ_CLS", base, options={"num_virtual_tokens": 4, "train_backbone": True})
    rates = {"head_learning_rate": 2e-2, "backbone_learning_rate": 1e-4}
    content["training"] |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    run(make_recipe(content | rates, folder=tmp_path))
    content["training"] |= {"resume_from_checkpoint": "true", "max_steps": 4}
    for name, rate in rates.items():
        with pytest.raises(RecipeError, match=f"{name} is {rate} there and 0.001 here"):
            run(make_recipe(json.loads(json.dumps(content | rates | {name: 1e-3})), folder=tmp_path))
    run(make_recipe(content | rates, folder=tmp_path))
    groups = torch.load(tmp_path / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {3e-2, *rates.values()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"method": "prefix_tuning"}, "method is 'p_tuning_v2' there and 'prefix_tuning' here"),
        ({"num_virtual_tokens": 6}, "num_virtual_tokens is 4 there and 6 here"),
        ({"pooling": "mean"}, "pooling is 'cls' there and 'mean' here"),
    ],
)
@pytest.mark.parametrize("only_model", [False, True])
def test_a_trainer_of_one_s_own_resumes_from_the_same_adapter_alone(
    options: dict[str, Any], message: str | None, only_model: bool, tmp_path: Path
) -> None:
    rows = [{k: v[0] for k, v in batch("bert", rows=1).items()} for _ in range(4)]

    def trainer(steps: int, **chosen: Any) -> Trainer:
        config = PTuneConfig(**{"method": "p_tuning_v2", "num_virtual_tokens": 4, "pooling": "cls"} | chosen)
        model = get_ptune_model(build("bert", "SEQ_CLS").float(), config)
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, save_only_model=only_model, report_to=[], use_cpu=True
        )
        return Trainer(model, arguments, train_dataset=rows)

    trainer(1).train()
    again = trainer(2, **options)
    if message is None:
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 2
        return
    before = {name: tensor.clone() for name, tensor in again.model.state_dict().items()}
    with pytest.raises(PTuneError, match=message):
        again.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.model.state_dict().items())
