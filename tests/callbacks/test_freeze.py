from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from setup_runs import Rows, bert, llama, tensors, trainer, wrap
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import ParallelMode

from hf_ptune.callbacks import FreezeBackboneCallback, GuardCallback
from hf_ptune.errors import PTuneError

LAYER = "backbone.model.layers.1.mlp.*"


class Watch(TrainerCallback):
    """Keep what trains before every step, and copies of a layer after it."""

    def __init__(self) -> None:
        self.trainable: list[set[str]] = []
        self.rates: list[list[float]] = []
        self.layer: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainable.append({n for n, p in kwargs["model"].named_parameters() if p.requires_grad})
        self.rates.append([g["lr"] for g in kwargs["optimizer"].param_groups])
        weight = kwargs["model"].backbone.model.layers[1].mlp.up_proj.weight
        self.layer.append(weight.detach().clone())


def test_backbone_is_frozen_before_the_optimizer_exists(tmp_path: Path) -> None:
    model = wrap(llama())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    run = trainer(model, tmp_path, [FreezeBackboneCallback()])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == model.adapter_parameter_names()
    before = tensors(model.backbone)
    run.train()
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == model.get_nb_trainable_parameters()[0]
    assert all(torch.equal(t, before[n]) for n, t in model.backbone.state_dict().items())


def test_a_model_without_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PTuneError, match="found LlamaForCausalLM.*get_ptune_model"):
        trainer(llama(), tmp_path, [FreezeBackboneCallback()])


def test_an_optimizer_with_other_parameters_is_refused(tmp_path: Path) -> None:
    model = wrap(llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = trainer(model, tmp_path, [FreezeBackboneCallback()], optimizers=(optimizer, None))
    with pytest.raises(PTuneError, match="optimizer does not hold exactly what trains"):
        run.train()


def test_an_optimizer_with_tensors_of_elsewhere_is_refused(tmp_path: Path) -> None:
    model = wrap(llama())
    model.freeze_backbone()
    held = [*(p for p in model.parameters() if p.requires_grad), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(held, lr=0.01)
    run = trainer(model, tmp_path, [FreezeBackboneCallback()], optimizers=(optimizer, None))
    with pytest.raises(PTuneError, match=r"missing \[\], frozen \[\], 1 tensors that are not the model's"):
        run.train()


def test_freezing_too_late_is_refused(tmp_path: Path) -> None:
    model = wrap(llama())
    model.backbone.model.norm.weight.requires_grad_(True)
    run = trainer(model, tmp_path)
    run.add_callback(FreezeBackboneCallback())
    with pytest.raises(PTuneError, match=r"trained also \[backbone.model.norm.weight\]"):
        run.train()


@pytest.mark.parametrize(("when", "first"), [(2, 2), (0, 0), (0.5, 2), (1.0, 4), (99, 6)])
def test_schedule_unfreezes_when_due(tmp_path: Path, when: float, first: int) -> None:
    model = wrap(llama())
    start = model.backbone.model.layers[1].mlp.up_proj.weight.detach().clone()
    watch = Watch()
    callbacks = [GuardCallback(), FreezeBackboneCallback({when: [LAYER]}), GuardCallback(), watch]
    trainer(model, tmp_path, callbacks, max_steps=6).train()
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    assert [name in names for names in watch.trainable] == [step >= first for step in range(6)]
    previous = [start, *watch.layer]
    moved = [not torch.equal(a, b) for a, b in pairwise(previous)]
    # the linear schedule is at rate 0.05 / 6 in the last step still, so every step due moves
    assert moved == [step >= first for step in range(6)]
    assert all(len(set(rates)) == 1 for rates in watch.rates)


def test_unfrozen_parameters_get_the_weight_decay_of_the_trainer(tmp_path: Path) -> None:
    model = wrap(bert())
    run = trainer(
        model,
        tmp_path,
        [FreezeBackboneCallback({1: ["*.layer.1.output.*"]})],
        rows=Rows(classes=3),
        max_steps=2,
    )
    run.train()
    decay = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    output = model.backbone.bert.encoder.layer[1].output
    assert decay[id(output.dense.weight)] == pytest.approx(0.1)
    assert decay[id(output.dense.bias)] == decay[id(output.LayerNorm.weight)] == 0.0


def test_unfrozen_modules_are_saved_and_resume_is_exact(tmp_path: Path) -> None:
    schedule = {2: [LAYER], 5: ["backbone.model.norm.weight"]}
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = wrap(llama())
    trainer(straight, tmp_path / "run", [FreezeBackboneCallback(schedule)], **settings).train()
    resumed = wrap(llama())
    run = trainer(resumed, tmp_path / "run", [FreezeBackboneCallback(schedule), GuardCallback()], **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    expected = tensors(straight)
    assert all(torch.equal(t, expected[n]) for n, t in tensors(resumed).items())
    assert "backbone.model.layers.1.mlp.up_proj.weight" in straight.adapter_state_dict()
    assert straight.config.modules_to_save is not None and "model.norm" in straight.config.modules_to_save


def test_two_trainings_of_one_trainer(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(wrap(llama()), tmp_path, [FreezeBackboneCallback({2: [LAYER]}), watch])
    run.train()
    run.train()
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    assert [name in names for names in watch.trainable] == [False, False, True, True] * 2


def init_run(folder: Path, callbacks: Any, **settings: Any) -> Trainer:
    """A Trainer that makes its model itself."""
    made = trainer(wrap(llama()), folder, **settings)
    return Trainer(
        model_init=lambda: wrap(llama()), args=made.args, train_dataset=made.train_dataset, callbacks=callbacks
    )


def add_run(folder: Path, callbacks: Any, **settings: Any) -> Trainer:
    """A Trainer that callbacks join later."""
    run = trainer(wrap(llama()), folder, **settings)
    for callback in callbacks:
        run.add_callback(callback)
    return run


@pytest.mark.parametrize("make", [init_run, add_run])
def test_schedules_hold_however_model_and_callback_come(tmp_path: Path, make: Any) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    straight = wrap(llama())
    run = trainer(straight, tmp_path / "straight", [FreezeBackboneCallback({2: [LAYER]})], **settings)
    run.train()
    watch = Watch()
    callbacks = [FreezeBackboneCallback({2: [LAYER]}), GuardCallback(), watch]
    other = make(tmp_path / "other", callbacks, **settings)
    other.train()
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    assert [name in names for names in watch.trainable] == [step >= 2 for step in range(6)]
    expected = tensors(other.model)
    assert other.model.config.modules_to_save == straight.config.modules_to_save
    groups = [[(len(g["params"]), g["weight_decay"]) for g in r.optimizer.param_groups] for r in (run, other)]
    assert groups[0] == groups[1]
    resumed = make(tmp_path / "other", [FreezeBackboneCallback({2: [LAYER]})], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-4"))
    assert all(torch.equal(t, expected[n]) for n, t in tensors(resumed.model).items())


def test_every_model_of_one_trainer_is_scheduled(tmp_path: Path) -> None:
    watch = Watch()
    run = init_run(tmp_path, [FreezeBackboneCallback({2: [LAYER]}), watch])
    run.train()
    run.model = None  # as a search for hyperparameters leaves it
    run.train()
    name = "backbone.model.layers.1.mlp.up_proj.weight"
    assert [name in names for names in watch.trainable] == [False, False, True, True] * 2


def test_a_schedule_that_comes_after_the_optimizer_is_refused(tmp_path: Path) -> None:
    run = trainer(wrap(llama()), tmp_path)
    run.callback_handler.add_callback(FreezeBackboneCallback({2: [LAYER]}))
    with pytest.raises(PTuneError, match=r"unfreeze_schedule came when.*trainer.add_callback before trainer.train"):
        run.train()
    run = trainer(wrap(llama()), tmp_path)
    run.train()
    run.add_callback(FreezeBackboneCallback({2: [LAYER]}))
    with pytest.raises(PTuneError, match=r"optimizer does not hold exactly what trains: missing \[backbone"):
        run.train()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({2: ["backbone.nowhere.*"]}, "matches no parameter"),
        ({2: ["prompt.*"]}, "which the adapter trains from the first step"),
    ],
)
def test_patterns_that_select_nothing_are_refused(tmp_path: Path, schedule: Any, message: str) -> None:
    with pytest.raises(PTuneError, match=message):
        trainer(wrap(llama()), tmp_path, [FreezeBackboneCallback(schedule)])


@pytest.mark.parametrize("schedule", [{True: ["a"]}, {-1: ["a"]}, {"2": ["a"]}, {2: "a"}])
def test_malformed_schedules_are_refused(schedule: Any) -> None:
    with pytest.raises(PTuneError, match="unfreeze_schedule"):
        FreezeBackboneCallback(schedule)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_cannot_train_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = wrap(llama())
    layer = model.backbone.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(PTuneError, match="up_proj.weight cannot be trained.*" + str(dtype)):
        trainer(model, tmp_path, [FreezeBackboneCallback({2: [LAYER]})])


def test_meta_weights_are_refused(tmp_path: Path) -> None:
    model = wrap(llama())
    layer = model.backbone.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"))
    callback = FreezeBackboneCallback({2: [LAYER]})
    run = trainer(wrap(llama()), tmp_path)
    with pytest.raises(PTuneError, match="meta device"):
        callback.on_init_end(run.args, run.state, run.control, model=model)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = wrap(llama())
    layer = model.backbone.model.layers[1].mlp.up_proj
    layer.weight = bitsandbytes.nn.Params4bit(torch.zeros(64, 64), requires_grad=False, quant_type="nf4")
    with pytest.raises(PTuneError, match=r"up_proj.weight cannot be trained: it is quantised \(Params4bit\)"):
        trainer(model, tmp_path, [FreezeBackboneCallback({2: [LAYER]})])


def test_half_precision_weights_are_refused_where_gradients_are_scaled(tmp_path: Path) -> None:
    model = wrap(llama())
    assert model.prompt is not None
    model.prompt.half()
    callback, run = FreezeBackboneCallback(), trainer(wrap(llama()), tmp_path)
    callback.on_init_end(run.args, run.state, run.control, model=model)
    run.args.fp16 = True
    with pytest.raises(PTuneError, match="prompt.weight cannot be trained: it holds float16"):
        callback.on_init_end(run.args, run.state, run.control, model=model)


@pytest.mark.parametrize(
    ("find_unused", "checkpointing", "refused"),
    [(None, False, False), (None, True, True), (False, False, True)],
)
def test_ranks_that_would_wait_for_held_gradients_are_refused(
    find_unused: bool | None, checkpointing: bool, refused: bool
) -> None:
    args: Any = SimpleNamespace(
        parallel_mode=ParallelMode.DISTRIBUTED,
        ddp_find_unused_parameters=find_unused,
        gradient_checkpointing=checkpointing,
        fp16=False,
    )
    callback, nothing = FreezeBackboneCallback({2: [LAYER]}), TrainerControl()
    with pytest.raises(PTuneError, match="ddp_find_unused_parameters=True") if refused else nullcontext():
        callback.on_init_end(args, TrainerState(), nothing, model=wrap(llama()))
