"""Any Trainer script: checkpoints, resume, best model, predictions."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import VOCABULARY, batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hf_ptune import FreezeBackboneCallback, GuardCallback, MemoryCallback, PTunePreTrainedModel
from hf_ptune.engines import replaces

Wrap = Callable[..., PTunePreTrainedModel]


class Rows(torch.utils.data.Dataset):
    """Token ids whose first token decides the label."""

    def __init__(self, task: str, count: int = 32) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, VOCABULARY, (count, 6), generator=generator)
        self.task = task

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        labels = ids if self.task == "CAUSAL_LM" else (ids if self.task == "TOKEN_CLS" else ids[0]) % 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(model: Any, folder: Path, task: str, resume: bool | str = False, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    } | options
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Rows(task),
        eval_dataset=Rows(task, 8),
        callbacks=[FreezeBackboneCallback(), GuardCallback(), MemoryCallback()],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


CASES = [
    ("llama", "CAUSAL_LM", "prompt_tuning", {}),
    ("llama", "CAUSAL_LM", "p_tuning", {}),
    ("llama", "CAUSAL_LM", "p_tuning", {"encoder_reparameterization_type": "LSTM"}),
    ("bert", "SEQ_CLS", "prefix_tuning", {"prefix_dropout": 0.1}),
    ("bert", "SEQ_CLS", "p_tuning_v2", {}),
    ("bert", "SEQ_CLS", "bitfit", {}),
]


@pytest.mark.parametrize(("family", "task", "method", "options"), CASES)
def test_resume_equals_the_straight_run(
    family: str, task: str, method: str, options: dict[str, Any], wrap: Wrap, tmp_path: Path
) -> None:
    straight = wrap(family, method, task, strong=False, **options).float()
    train(straight, tmp_path / "straight", task)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    written = sorted(p.name for p in checkpoint.iterdir())
    assert {n for n in written if n.endswith((".bin", ".safetensors"))} == {"model.safetensors", "training_args.bin"}
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(straight.adapter_state_dict())
    resumed = wrap(family, method, task, strong=False, **options).float()
    train(resumed, tmp_path / "resumed", task, resume=str(checkpoint))
    for name, tensor in resumed.adapter_state_dict().items():
        assert torch.equal(tensor, straight.adapter_state_dict()[name]), name


def test_the_best_model_comes_back(wrap: Wrap, tmp_path: Path) -> None:
    for method in ("p_tuning", "prefix_tuning"):
        model = wrap("bert", method, "SEQ_CLS", strong=False).float()
        trainer = train(
            model,
            tmp_path / method,
            "SEQ_CLS",
            learning_rate=3.0,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )
        best = trainer.state.best_model_checkpoint
        assert best is not None
        loaded = AutoModelForSequenceClassification.from_pretrained(best)
        for name, tensor in model.adapter_state_dict().items():
            assert torch.equal(tensor, loaded.adapter_state_dict()[name]), name


@pytest.mark.parametrize(("method", "whole"), [("p_tuning", False), ("bitfit", False), ("prompt_tuning", True)])
def test_checkpoints_lack_nothing_but_the_base(
    method: str, whole: bool, wrap: Wrap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")
    family, task = ("gpt2", "CAUSAL_LM") if whole else ("bert", "SEQ_CLS")  # the one has tied weights
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}

    def fresh() -> PTunePreTrainedModel:
        return wrap(family, method, task, strong=False, train_backbone=whole).float()

    train(fresh(), tmp_path, task, **best)
    checkpoint = tmp_path / "checkpoint-2"
    train(fresh(), tmp_path, task, resume=str(checkpoint), **best)
    assert "keys in the checkpoint" not in caplog.text
    tensors = load_file(checkpoint / "model.safetensors")
    gone = sorted(tensors)[0]
    other = {n: t for n, t in tensors.items() if n != gone} | {"prompt.other": torch.zeros(2)}
    save_file(other, checkpoint / "model.safetensors", metadata={"format": "pt"})
    train(fresh(), tmp_path, task, resume=str(checkpoint))
    assert f"missing keys in the checkpoint model loaded: ['{gone}']" in caplog.text
    assert "unexpected keys in the checkpoint model loaded: ['prompt.other']" in caplog.text


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_predictions_have_the_labels_shape(method: str, wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("bert", method, "TOKEN_CLS").float()
    trainer = train(model, tmp_path, "TOKEN_CLS")
    found = trainer.predict(Rows("TOKEN_CLS", 5))
    assert found.predictions.shape == (5, 6, 2) and found.label_ids.shape == (5, 6)
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(str(tmp_path / "final"))
    assert isinstance(AutoModelForTokenClassification.from_pretrained(tmp_path / "final"), PTunePreTrainedModel)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_by_the_arguments(reentrant: bool, wrap: Wrap, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = wrap("llama", "prefix_tuning", "CAUSAL_LM", strong=False).float()
        train(
            model,
            tmp_path / str(checkpointing),
            "CAUSAL_LM",
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            gradient_accumulation_steps=2,
        )
        results.append(model.adapter_state_dict())
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-6) for n in results[0])


def test_memory_reaches_the_log_history(wrap: Wrap, tmp_path: Path) -> None:
    trainer = train(wrap("bert", "p_tuning_v2", "SEQ_CLS").float(), tmp_path, "SEQ_CLS")
    assert any(key.startswith("mem_") for row in trainer.state.log_history for key in row)


def test_functions_for_one_method_of_the_trainer_are_all_called_and_each_once(wrap: Wrap, tmp_path: Path) -> None:
    class Mine(Trainer):
        pass

    called: list[str] = []

    def first(trainer: Any, original: Any, *args: Any) -> Any:
        called.append("first")
        return original(*args)

    def second(trainer: Any, original: Any, *args: Any) -> Any:
        called.append("second")
        return original(*args)

    for function in (first, second, second):
        replaces(Mine, "create_optimizer", only_split=False)(function)
    model = wrap("bert", "p_tuning_v2", "SEQ_CLS").float()
    Mine(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)).create_optimizer()
    assert called == ["second", "first"]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_accelerate_takes_its_wrapper_of_precision_off(family: str, wrap: Wrap, request: Any) -> None:
    AcceleratorState._reset_state()  # there is one for all tests, which has another precision
    request.addfinalizer(AcceleratorState._reset_state)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = wrap(family, "p_tuning_v2").float().eval()
    with torch.no_grad():
        wanted = model(**batch(family)).logits
        plain = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
        torch.testing.assert_close(plain.eval()(**batch(family)).logits, wanted)
