"""One prompt over several tasks: what is shared, what trains, and what is saved."""

import copy
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from hf_ptune import FreezeBackboneCallback, GuardCallback, PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.backbone import TASKS
from hf_ptune.callbacks import check_batch
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError, GuardError, PTuneError
from hf_ptune.multitask import MultiTaskDataset, MultiTaskPrompt, TaskCollator, TaskSampler, get_multitask_model

METHODS = ["p_tuning_v2", "prefix_tuning", "prompt_tuning", "p_tuning"]
LABELS = {"topic": 3, "ner": 5, "mood": 2}


def backbones(family: str = "bert", folder: Path | None = None) -> dict[str, PreTrainedModel]:
    """Task models over one base, each with a head of its own."""
    body = build(family, "FEATURE_EXTRACTION").state_dict()
    made = {}
    for number, (name, count) in enumerate(LABELS.items()):
        model = build(family, "TOKEN_CLS" if name == "ner" else "SEQ_CLS", num_labels=count)
        model.base_model.load_state_dict(body, strict=False)
        torch.manual_seed(10 + number)
        for head_name, parameter in model.named_parameters():
            if not head_name.startswith(model.base_model_prefix + "."):
                torch.nn.init.normal_(parameter, std=0.5)
        made[name] = model
    return made


def batch_of(task: str, rows: int = 3, length: int = 6) -> dict[str, Any]:
    made = torch.Generator().manual_seed(len(task))
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=made)
    shape = (rows, length) if task == "ner" else (rows,)
    labels = torch.randint(LABELS[task], shape, generator=made)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def together(method: str = "p_tuning_v2", family: str = "bert") -> MultiTaskPrompt:
    model = get_multitask_model(backbones(family), PTuneConfig(method=method, num_virtual_tokens=4)).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def alone(model: MultiTaskPrompt, method: str, family: str) -> dict[str, PTunePreTrainedModel]:
    """The same tasks as wrapped models that share nothing."""
    made = {}
    for task, backbone in backbones(family).items():
        config = PTuneConfig(method=method, num_virtual_tokens=4)
        single = get_ptune_model(backbone, config).double().eval()
        single.prompt.load_state_dict(model.prompt.state_dict())
        made[task] = single
    return made


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_shared_prompt_gets_the_sum_of_the_tasks_gradients(method: str, family: str) -> None:
    model = together(method, family)
    sums: dict[str, Any] = Counter()
    for task, single in alone(model, method, family).items():
        output = single(**batch_of(task))
        output.loss.backward()
        assert torch.allclose(model(task=task, **batch_of(task)).logits, output.logits, atol=1e-10)
        for name, parameter in single.prompt.named_parameters():
            sums[name] = sums[name] + parameter.grad
        for name, parameter in single.named_parameters():
            if parameter.requires_grad and not name.startswith("prompt."):
                sums[f"{task}.{name}"] = parameter.grad
    for task in LABELS:
        model(task=task, **batch_of(task)).loss.backward()
    prompt = dict(model.prompt.named_parameters())
    for name, expected in sums.items():
        task, _, rest = name.partition(".")
        found = prompt[name] if name in prompt else dict(model.model_of(task).named_parameters())[rest]
        assert torch.allclose(found.grad, expected, atol=1e-10), name
    assert all(p.grad is None for n, p in model.named_parameters() if n not in model.adapter_parameter_names())


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_task_answers_by_the_prompt_as_it_is_now(method: str) -> None:
    """Written in place or loaded, where each task keeps what the prompt has become while it does not train."""
    model = together(method)
    singles, first = alone(model, method, "bert"), copy.deepcopy(model.prompt.state_dict())

    def answers() -> dict[str, torch.Tensor]:
        return {task: model(task=task, **batch_of(task)).logits for task in LABELS}

    before = answers()
    for parameter in (p for one in (model, *singles.values()) for p in one.prompt.parameters()):
        parameter.mul_(-1)
    after = answers()
    for task, single in singles.items():
        assert torch.allclose(after[task], single(**batch_of(task)).logits, atol=1e-10)
        assert not torch.allclose(after[task], before[task], atol=1e-3)
    model.prompt.load_state_dict(first)
    assert all(torch.equal(logits, before[task]) for task, logits in answers().items())


def test_base_weights_are_held_once() -> None:
    model, single = together(), build("bert", num_labels=3)
    places = {p.data_ptr(): p.numel() for p in model.parameters()}
    heads = sum(32 * (n + 0) + n for n in LABELS.values())
    body = sum(p.numel() for p in single.base_model.parameters())
    assert sum(places.values()) == body + heads + model.prompt.weight.numel()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == model.adapter_parameter_names()
    assert sum(n.endswith("prompt.weight") for n in trained) == 1 and len(trained) == 1 + 2 * len(LABELS)


def test_modules_that_train_are_each_tasks_own() -> None:
    made = {t: m for t, m in backbones().items() if t != "ner"}
    config = PTuneConfig(num_virtual_tokens=4, modules_to_save=["pooler"])
    for modules, expected in ((None, {"topic", "mood"}), ({"mood": []}, {"topic"}), ({"topic": []}, {"mood"})):
        model = get_multitask_model(copy.deepcopy(made), config, modules_to_save=modules)
        pooler = {t: model.model_of(t).backbone.bert.pooler.dense.weight for t in made}
        assert pooler["topic"] is not pooler["mood"]
        assert {t for t, weight in pooler.items() if weight.requires_grad} == expected
        shared = [model.model_of(t).backbone.bert.embeddings.word_embeddings.weight for t in made]
        assert shared[0] is shared[1] and not shared[0].requires_grad


def test_training_moves_prompt_and_heads_only() -> None:
    model = together()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for task in ("topic", "ner"):
        model(task=task, **batch_of(task)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    prompts = {f"tasks.{t}.prompt.weight" for t in LABELS}  # one tensor, by three names
    heads = {f"tasks.{t}.backbone.classifier.{w}" for t in ("topic", "ner") for w in ("weight", "bias")}
    assert moved == prompts | heads


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flatten", [False, True])
def test_each_saved_adapter_is_a_normal_one(method: str, flatten: bool, tmp_path: Path) -> None:
    made = backbones()
    build("bert", "FEATURE_EXTRACTION").save_pretrained(tmp_path / "base")
    config = PTuneConfig(method=method, num_virtual_tokens=4, base_model_name_or_path=str(tmp_path / "base"))
    model = get_multitask_model(made, config).double().eval()
    model.save_pretrained(tmp_path / "out", flatten=flatten)
    for task in LABELS:
        auto = TASKS["TOKEN_CLS" if task == "ner" else "SEQ_CLS"]
        again = auto.from_pretrained(tmp_path / "out" / task, dtype=torch.float64).double()
        inputs = batch_of(task)
        assert torch.allclose(again(**inputs).logits, model(task=task, **inputs).logits, atol=1e-6)
    # adapted to one task: the prompt of all of them, with a fresh head
    start = {"prompt_tuning_init": "ADAPTER", "prompt_tuning_init_adapter": str(tmp_path / "out" / "ner")}
    fresh = PTuneConfig(method=method, num_virtual_tokens=4, base_model_name_or_path=str(tmp_path / "base"), **start)
    adapted = get_ptune_model(backbones()["topic"], fresh).double().eval()
    assert torch.allclose(adapted.prompt()[:4], model.prompt(), atol=1e-6)


def test_adapters_are_loaded_back(tmp_path: Path) -> None:
    model = together()
    model.save_pretrained(tmp_path)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter_parameter_names():
                parameter.zero_()
    model.load_adapters(tmp_path)
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    (tmp_path / "ner" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterFileError):
        model.load_adapters(tmp_path)


@pytest.mark.parametrize(
    ("options", "labels", "said"),
    [
        ({"pooling": "mean"}, ("a", "b"), "pooling is 'mean' there and 'cls' here"),
        ({}, ("b", "a"), r"labels is \['b', 'a'\] there and \['a', 'b'\] here"),
        ({"position_shift": True}, ("a", "b"), "position_shift is True there and False here"),
        ({}, ("a", "b"), "two has another prompt than one beside it"),
    ],
)
def test_other_adapters_are_not_loaded(
    options: dict[str, Any], labels: tuple[str, str], said: str, tmp_path: Path
) -> None:
    """Their tensors have the same shapes, and mean something else."""

    def named(labels: tuple[str, str]) -> PreTrainedModel:
        made = build("bert", "SEQ_CLS", num_labels=2)
        made.config.id2label = dict(enumerate(labels))
        made.config.label2id = {label: n for n, label in enumerate(labels)}
        return made

    for number, task in enumerate(("one", "two")):
        single = get_ptune_model(named(labels), PTuneConfig(**{"num_virtual_tokens": 4, "pooling": "cls"} | options))
        with torch.no_grad():
            single.prompt.weight.fill_(number)
        single.save_pretrained(tmp_path / task)
    model = get_multitask_model(
        {task: named(("a", "b")) for task in ("one", "two")}, PTuneConfig(num_virtual_tokens=4, pooling="cls")
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterFileError, match=said):
        model.load_adapters(tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_cannot_be_shared_is_refused() -> None:
    config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4)
    other = backbones()
    with torch.no_grad():
        other["ner"].base_model.embeddings.word_embeddings.weight[5] += 1
    with pytest.raises(BackboneError, match="base of task 'ner' differs .*word_embeddings"):
        get_multitask_model(other, config)
    two = {name: build("bert", "SEQ_CLS") for name in ("one", "two")}
    two["two"].load_state_dict(two["one"].state_dict())
    with torch.no_grad():
        two["two"].base_model.pooler.dense.weight.add_(1)  # as where a checkpoint lacks one
    with pytest.raises(BackboneError, match=r"'two' differs .*pooler.* train it, modules_to_save=\['pooler'\]"):
        get_multitask_model(two, config)
    with pytest.raises(BackboneError, match="not that of the first task|differs"):
        get_multitask_model({"a": backbones()["ner"], "b": backbones("gpt2")["ner"]}, config)
    with pytest.raises(ConfigError, match="no prompt that tasks could share"):
        get_multitask_model(backbones(), PTuneConfig(method="bitfit"))
    with pytest.raises(ConfigError, match="no task"):
        get_multitask_model({}, config)
    with pytest.raises(ConfigError, match="names the task 'pos'; expected one of topic, ner, mood"):
        get_multitask_model(backbones(), config, modules_to_save={"pos": ["pooler"]})
    with pytest.raises(ConfigError, match="cannot be a folder's"):
        get_multitask_model({"../x": backbones()["ner"]}, config)
    with pytest.raises(PTuneError, match="no task 'pos'; the tasks are topic, ner, mood"):
        together()(task="pos", input_ids=torch.ones(1, 2))


def test_batches_are_of_one_task_and_every_row_is_seen() -> None:
    parts = {"a": [{"x": n} for n in range(10)], "b": [{"x": n} for n in range(3)]}
    dataset = MultiTaskDataset(parts)
    assert len(dataset) == 13 and dataset[9] == {"x": 9, "task": "a"} and dataset[12] == {"x": 2, "task": "b"}
    sampler = TaskSampler(dataset.sizes, 4, seed=1)
    pad = TaskCollator({t: lambda rows: {"x": torch.tensor([r["x"] for r in rows])} for t in parts})
    epochs = [list(DataLoader(dataset, 4, sampler=sampler, collate_fn=pad)) for _ in range(2)]
    assert len(sampler) == 16 and [len(e) for e in epochs] == [4, 4]
    for epoch in epochs:
        assert {(b["task"], int(x)) for b in epoch for x in b["x"]} == {
            (t, r["x"]) for t, rows in parts.items() for r in rows
        }
        assert Counter(b["task"] for b in epoch) == {"a": 3, "b": 1} and all(len(b["x"]) == 4 for b in epoch)
    assert [b["x"].tolist() for b in epochs[0]] != [b["x"].tolist() for b in epochs[1]]
    sampler.set_epoch(0)
    assert [b["x"].tolist() for b in DataLoader(dataset, 4, sampler=sampler, collate_fn=pad)] == [
        b["x"].tolist() for b in epochs[0]
    ]
    with pytest.raises(PTuneError, match="a batch has rows of"):
        pad([dataset[0], dataset[12]])


def test_a_temperature_gives_small_tasks_more() -> None:
    sizes = {"large": 1600, "small": 100}
    # shares are size ** (1 / T), written out: 40 to 10 at T = 2
    for temperature, expected in ((1.0, [100, 7]), (2.0, [86, 21]), (1e9, [54, 53])):
        assert TaskSampler(sizes, 16, temperature).batches == expected
    with pytest.raises(ConfigError, match="temperature=0"):
        TaskSampler(sizes, 16, 0.0)
    with pytest.raises(ConfigError, match="'b' has no rows"):
        TaskSampler({"a": 1, "b": 0}, 4)


def rows_of(*tasks: str, count: int = 4) -> dict[str, list[dict[str, Any]]]:
    return {task: [{k: v[0] for k, v in batch_of(task, rows=1).items()} for _ in range(count)] for task in tasks}


def plain_trainer(model: MultiTaskPrompt, folder: Path, **options: Any) -> Trainer:
    """A Trainer as scripts have it, over two of the three tasks."""
    dataset = MultiTaskDataset(rows_of("topic", "ner"))

    class Tasks(Trainer):
        def _get_train_sampler(self, *args: Any) -> TaskSampler:
            return TaskSampler(dataset.sizes, 2)

    callbacks = options.pop("callbacks", None)
    settings: dict[str, Any] = {
        "num_train_epochs": 2,
        "save_strategy": "epoch",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 1,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": [],
        "use_cpu": True,
    }
    arguments = TrainingArguments(folder, **settings | options)
    pad = TaskCollator(dict.fromkeys(LABELS, default_data_collator))
    return Tasks(model, arguments, train_dataset=dataset, eval_dataset=dataset, data_collator=pad, callbacks=callbacks)


def test_a_plain_trainer_saves_and_goes_on(tmp_path: Path) -> None:
    """Checkpoints, the best of them and the end hold an adapter folder a task; a run from one ends as one without."""

    def trainer(folder: str, **options: Any) -> Trainer:
        return plain_trainer(together("prefix_tuning"), tmp_path / folder, **options)

    whole = trainer("whole")
    whole.train()
    saved = tmp_path / "whole" / "checkpoint-4"
    tensors = load_file(saved / "ner" / "model.safetensors")
    assert set(tensors) == set(whole.model.model_of("ner").adapter_state_dict())
    again = trainer("whole")
    again.train(resume_from_checkpoint=str(saved))
    names = whole.model.adapter_parameter_names()
    first, second = (dict(t.model.named_parameters()) for t in (whole, again))
    assert all(torch.allclose(first[n], second[n], atol=1e-10) for n in names)
    whole.save_model(str(tmp_path / "end"))
    assert {p.name for p in (tmp_path / "end").iterdir()} == {*LABELS, "training_args.bin"}
    best = trainer("best", eval_strategy="epoch", load_best_model_at_end=True, prediction_loss_only=True)
    best.train()
    kept = load_file(Path(str(best.state.best_model_checkpoint)) / "topic" / "model.safetensors")
    assert all(torch.equal(t, kept[n]) for n, t in best.model.model_of("topic").adapter_state_dict().items())


def test_a_checkpoint_has_the_files_of_any_other(tmp_path: Path) -> None:
    whole = plain_trainer(together("prefix_tuning"), tmp_path / "whole")
    arguments = copy.deepcopy(whole.args)
    arguments.output_dir = str(tmp_path / "single")
    single = Trainer(together("prefix_tuning").model_of("topic"), arguments, train_dataset=rows_of("topic")["topic"])
    names = []
    for trainer in (whole, single):
        trainer.train()
        names.append({p.name for p in Path(str(trainer.args.output_dir)).glob("checkpoint-4/*")})
    own = {"config.json", "model.safetensors"}  # which each task has in its folder
    assert own < names[1] and names[0] == (names[1] - own) | set(LABELS)
    settings = torch.load(tmp_path / "whole/checkpoint-4/training_args.bin", weights_only=False)
    assert settings.to_dict() == whole.args.to_dict()


def test_a_plain_trainer_freezes_and_is_guarded(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [FreezeBackboneCallback(), GuardCallback()]):
        model = together("prefix_tuning").requires_grad_(bool(callbacks))
        if not callbacks:
            model.freeze_backbone()
        before = copy.deepcopy(model.state_dict())
        run = plain_trainer(model, tmp_path, callbacks=callbacks, save_strategy="no")
        assert {n for n, p in model.named_parameters() if p.requires_grad} == model.adapter_parameter_names()
        run.train()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in model.adapter_parameter_names() if not n.startswith("tasks.mood.backbone.")}
        ends.append(model.state_dict())
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())  # the guard takes part in nothing


def test_a_schedule_of_tasks_is_refused(tmp_path: Path) -> None:
    callback = FreezeBackboneCallback({2: ["*.layer.1.*"]})
    with pytest.raises(PTuneError, match="unfreeze_schedule: tasks share a base that is frozen"):
        plain_trainer(together(), tmp_path, callbacks=[callback])
    run = plain_trainer(together(), tmp_path)
    run.add_callback(callback)
    with pytest.raises(PTuneError, match="unfreeze_schedule: tasks share a base that is frozen"):
        run.train()


class Stream(IterableDataset[dict[str, Any]]):
    """Rows of tasks, one after another, that a loader can neither count nor index."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)

    def take(self, count: int) -> list[dict[str, Any]]:
        return self.rows[:count]


@pytest.mark.parametrize("kind", ["parts", "rows", "stream", "batches"])
@pytest.mark.parametrize("wrong", ["topic", "ner"])
def test_the_guard_looks_at_every_task(
    kind: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However rows of tasks come; a task without rows is told."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    parts = rows_of("topic", "ner", count=3)  # batches of two rows in order would mix tasks
    model, pad = together(), TaskCollator(dict.fromkeys(LABELS, default_data_collator))

    def check() -> None:
        dataset: Any = MultiTaskDataset(parts)
        rows = [dataset[n] for n in range(len(dataset))]
        loader: Any = [pad(rows[:2]), pad(rows[3:])]
        if kind != "batches":
            dataset = {"parts": dataset, "rows": rows, "stream": Stream(rows)}[kind]
            loader = DataLoader(dataset, batch_size=2, collate_fn=pad)
        arguments = TrainingArguments(tmp_path, use_cpu=True, per_device_train_batch_size=2)
        state, control = TrainerState(), TrainerControl()
        GuardCallback().on_train_begin(arguments, state, control, model=model, train_dataloader=loader)

    check()
    assert caplog.text.count("has not tried the task") == caplog.text.count("has not tried the task mood") == 1
    for row in parts[wrong]:
        row["labels"] = row["labels"] * 0 + 9
    with pytest.raises(GuardError, match=f"labels run from 9 to 9, expected 0 to {LABELS[wrong] - 1}"):
        check()


def test_a_batch_of_a_task_is_checked_as_it_is() -> None:
    model = together()
    check_batch(model, batch_of("ner") | {"task": "ner"})
    assert all(p.grad is None for p in model.parameters()) and not model.training
    with pytest.raises(GuardError, match="is of the task None; expected task to be one of topic, ner, mood"):
        check_batch(model, batch_of("ner"))
    with pytest.raises(GuardError, match="labels run from"):
        check_batch(model, batch_of("ner") | {"task": "mood", "labels": torch.full((3,), 2)})
    model.model_of("topic").backbone.bert.embeddings.word_embeddings.weight.requires_grad_(True)  # all tasks' own
    with pytest.raises(GuardError, match=r"1 parameters of the backbone get gradient"):
        check_batch(model, batch_of("mood") | {"task": "mood"})
