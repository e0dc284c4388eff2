"""A batch in several passes is the batch in one: the Trainer's accumulation changes neither loss nor gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import CONFIGS, batch, build
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_ptune import PTuneConfig, PTunePreTrainedModel, get_ptune_model
from hf_ptune.batch_share import with_share
from hf_ptune.modeling_ptune import CLASSES

Wrap = Callable[..., PTunePreTrainedModel]
ROWS = 8
CASES: list[tuple[str, str | None]] = [(family, None) for family in CONFIGS]
CASES += [("bert", task) for task in ("TOKEN_CLS", "MULTIPLE_CHOICE", "MASKED_LM", "QUESTION_ANS")]
CASES += [("llama", "SEQ_CLS"), ("llama", "TOKEN_CLS"), ("modernbert", "MASKED_LM"), ("t5", "SEQ_CLS")]


def inputs_of(family: str, task: str) -> dict[str, Tensor]:
    """A batch whose rows have different numbers of labels, where a row has several."""
    inputs = batch(family, rows=ROWS)
    ids, hidden = inputs["input_ids"], torch.arange(7)[None] > torch.arange(ROWS)[:, None] % 5 + 2
    if task == "SEQ_CLS":
        inputs["labels"] = torch.arange(ROWS) % 2
        if family == "t5":
            ids[:, -1] = 1  # its heads read the state at the end of the text
    elif task == "MULTIPLE_CHOICE":
        inputs = {n: v[:, None].expand(-1, 2, -1).clone() for n, v in inputs.items() if n != "labels"}
        inputs["input_ids"][:, 1] = ids.flip(-1)
        inputs["labels"] = torch.arange(ROWS) % 2
    elif task == "QUESTION_ANS":
        inputs.pop("labels")
        inputs |= {"start_positions": torch.arange(ROWS) % 3, "end_positions": torch.arange(ROWS) % 3 + 2}
    else:
        labels = ids % 2 if task == "TOKEN_CLS" else ids[:, :5] if task == "SEQ_2_SEQ_LM" else ids
        inputs["labels"] = labels.masked_fill(hidden[:, : labels.shape[1]], -100)
    return inputs


def one_step(model: Any, inputs: dict[str, Tensor], passes: int, folder: Path, **settings: Any) -> float:
    """The loss that the Trainer logs for one step of SGD."""
    run = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=1,
            per_device_train_batch_size=ROWS // passes,
            gradient_accumulation_steps=passes,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        ),
        train_dataset=[{n: v[row] for n, v in inputs.items()} for row in range(ROWS)],
    )
    run.train()
    return float(run.state.log_history[0]["loss"])


def by_hand(model: Any, inputs: dict[str, Tensor]) -> float:
    """Mean of the cross entropy over all labels, from the logits of the whole batch."""
    with torch.no_grad():
        output = model.eval()(**inputs)
    if model.task == "QUESTION_ANS":
        pairs = [(output[f"{n}_logits"], inputs[f"{n}_positions"]) for n in ("start", "end")]
        return float(sum(F.cross_entropy(logits, labels) for logits, labels in pairs) / 2)
    logits, labels = output.logits, inputs["labels"]
    if model.task == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return float(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten()))


@pytest.mark.parametrize("at_labels", [True, False])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_passes_change_nothing(family: str, task: str | None, at_labels: bool, tmp_path: Path) -> None:
    losses, adapters = [], []
    for passes in (1, 4):
        torch.manual_seed(0)
        backbone = build(family, task).double()
        for layer in backbone.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        config = PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4, loss_at_labels=at_labels)
        model = get_ptune_model(backbone, config)
        if not at_labels and model.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "MASKED_LM"):
            pytest.skip("other tasks have a loss at every label by themselves")
        inputs = inputs_of(family, model.task)
        expected = by_hand(model, inputs)
        losses.append(one_step(model, inputs, passes, tmp_path))
        adapters.append(model.adapter_state_dict())
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], atol=1e-7), name


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_pass_of_a_batch(return_dict: bool, wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2", "TOKEN_CLS"), inputs_of("bert", "TOKEN_CLS")
    whole = model(**inputs, return_dict=return_dict)[0]
    items = inputs["labels"].ne(-100).sum()
    for count in (items, int(items)):
        parts = [
            model(**{n: v[rows] for n, v in inputs.items()}, num_items_in_batch=count, return_dict=return_dict)[0]
            for rows in (slice(0, 3), slice(3, ROWS))
        ]
        assert torch.allclose(sum(parts), whole, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "task"), [("llama", None), ("t5", None), ("bert", "TOKEN_CLS"), ("bert", "MASKED_LM")]
)
def test_a_pass_without_labels_adds_nothing(family: str, task: str | None, wrap: Wrap) -> None:
    model = wrap(family, "p_tuning_v2", task)
    inputs = inputs_of(family, model.task)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for train in (True, False):
        loss = model.train(train)(**inputs, num_items_in_batch=5).loss
        assert loss == 0
        loss.backward()
        for parameter in (p for p in model.parameters() if p.grad is not None):
            assert not parameter.grad.any()


@pytest.mark.parametrize(("family", "task"), [("llama", None), ("bert", "TOKEN_CLS")])
def test_a_share_is_compiled_whole(family: str, task: str | None, wrap: Wrap) -> None:
    model = wrap(family, "p_tuning_v2", task).train()
    inputs = inputs_of(family, model.task)
    items = torch.tensor(40)
    expected = model(**inputs, num_items_in_batch=items).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**inputs, num_items_in_batch=items).loss, expected, atol=1e-9)


@pytest.mark.parametrize("return_dict", [True, False])
def test_whoever_takes_the_labels_reckons_by_himself(return_dict: bool, wrap: Wrap) -> None:
    """The Trainer does, to smooth them; labels that a collator has moved stay."""
    model, inputs = wrap("llama", "p_tuning_v2"), batch("llama")
    labels = inputs.pop("labels")
    plain = model(**inputs, return_dict=return_dict)
    output = model(**inputs, shift_labels=labels, num_items_in_batch=1000, return_dict=return_dict)
    at = "logits" if return_dict else 0
    assert torch.equal(output[at], plain[at])


def test_several_labels_a_row(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2"), batch("bert", rows=ROWS)
    model.backbone.config.problem_type = "multi_label_classification"
    inputs["labels"] = (torch.arange(ROWS * 2).view(ROWS, 2) % 3 == 0).double()
    whole = model(**inputs).loss
    parts = [
        model(**{n: v[rows] for n, v in inputs.items()}, num_items_in_batch=2 * ROWS).loss
        for rows in (slice(0, 3), slice(3, ROWS))
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-12)


def test_a_share_is_no_larger_than_half_precision_holds() -> None:
    loss = torch.tensor(2.0, dtype=torch.float16)
    assert with_share((loss,), torch.tensor(40_000), torch.tensor(160_000))[0] == 0.5
    assert with_share((loss,), torch.tensor(40_000), 160_000)[0] == 0.5


def test_a_batch_without_labels(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2", "TOKEN_CLS"), inputs_of("bert", "TOKEN_CLS")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs, num_items_in_batch=torch.tensor(0)).loss == 0


def test_outputs_without_a_loss(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2"), batch("bert")
    inputs.pop("labels")
    assert model(**inputs, num_items_in_batch=3).loss is None


def test_label_smoothing_stays_the_trainer_s(tmp_path: Path) -> None:
    losses = []
    for passes in (1, 4):
        torch.manual_seed(0)
        model = get_ptune_model(build("bert", "TOKEN_CLS"), PTuneConfig(method="p_tuning_v2", num_virtual_tokens=4))
        inputs = inputs_of("bert", model.task)
        losses.append(one_step(model, inputs, passes, tmp_path, label_smoothing_factor=0.1))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_every_task_is_here() -> None:
    tried = {type(get_ptune_model(build(f, t), PTuneConfig())).__mro__[1] for f, t in CASES}
    assert tried == {c for name, c in CLASSES.items() if name != "FEATURE_EXTRACTION"}
