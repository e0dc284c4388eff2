"""Logits only where a label counts: the same loss and gradients, and the logits all the same for who asks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DECODERS, SEQ2SEQ, batch
from transformers import Trainer, TrainingArguments

from hf_ptune import PTunePreTrainedModel

Wrap = Callable[..., PTunePreTrainedModel]
MASKED = ["bert", "roberta", "modernbert", "deberta-v2", "distilbert"]
CASES = [(f, None) for f in DECODERS + SEQ2SEQ] + [(f, "MASKED_LM") for f in MASKED]
every_case = pytest.mark.parametrize(("family", "task"), CASES)


def labelled(family: str) -> dict[str, torch.Tensor]:
    inputs = batch(family, rows=3)
    if family in MASKED:
        inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :3] = inputs["labels"][1, 2:] = -100
    return inputs


def seen_by_head(model: Any) -> list[int]:
    """Numbers of positions that the vocabulary projection meets, call by call."""
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, a, output: seen.append(output[..., 0].numel()))
    return seen


@every_case
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
def test_same_loss_and_gradients(family: str, task: str | None, method: str, wrap: Wrap) -> None:
    inputs, results = labelled(family), []
    count = int((inputs["labels"][:, 1:] if family in DECODERS else inputs["labels"]).ne(-100).sum())
    for on in (True, False):
        model = wrap(family, method, task, loss_at_labels=on).train()
        model(**inputs)  # the first call also compares
        seen = seen_by_head(model)
        loss = model(**inputs).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.prompt.parameters()]))
        assert seen == [count + (family in DECODERS) if on else inputs["labels"].numel()]
    # transformers computes its losses in float32, whatever the logits are in
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    for ours, whole in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(ours, whole, rtol=1e-5, atol=1e-8)


@every_case
def test_logits_come_when_asked_for(family: str, task: str | None, wrap: Wrap) -> None:
    model, inputs = wrap(family, "p_tuning_v2", task).train(), labelled(family)
    output = model(**inputs)
    assert "logits" not in output
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.equal(output.logits, expected) and torch.equal(output["logits"], expected)


def test_calls_that_need_all_logits_get_them(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), labelled("llama")
    rows = inputs["input_ids"].shape
    assert "logits" in model.eval()(**inputs)
    model.train()
    assert model(**inputs, return_dict=False)[1].shape[:2] == rows
    assert model(inputs["input_ids"]).logits.shape[:2] == rows
    inputs["labels"][:] = -100
    assert "logits" in model(**inputs) and model(**inputs).loss.isnan()


def test_a_count_of_labels_from_outside_is_kept(wrap: Wrap) -> None:
    inputs, losses = labelled("llama"), []
    for on in (True, False):
        model = wrap("llama", "prompt_tuning", loss_at_labels=on).train()
        losses.append(model(**inputs, num_items_in_batch=torch.tensor(40)).loss)
    assert torch.allclose(*losses, rtol=1e-6)


def test_trainer_meets_no_logits(wrap: Wrap, tmp_path: Any) -> None:
    model = wrap("llama", "prompt_tuning").float().train()
    seen = seen_by_head(model)
    rows = [{k: v[0] for k, v in labelled("llama").items()} for _ in range(4)]
    arguments = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=rows).train()
    assert max(seen[2:]) == 9  # two rows of four labels, and the state that meets no label
