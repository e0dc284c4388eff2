"""Logits only where a label counts: the same loss and gradients, and the logits all the same for who asks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DECODERS, SEQ2SEQ, batch
from tokenizers_of import tokenizer_of
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_ptune import PTunePreTrainedModel
from hf_ptune.errors import PTuneError
from hf_ptune.loss_at_labels import LossAtLabels

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
def test_same_loss_and_gradients(
    family: str, task: str | None, method: str, wrap: Wrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers would compute the losses of float64 logits in float32, and give back gradients of its precision
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
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
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    for ours, whole in zip(results[0][1], results[1][1], strict=True):
        # bases that attend in float32 round there, by what the processor's kernels add up first
        assert torch.allclose(ours, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))


@every_case
def test_logits_come_when_asked_for(family: str, task: str | None, wrap: Wrap) -> None:
    model, inputs = wrap(family, "p_tuning_v2", task).train(), labelled(family)
    output = model(**inputs)
    assert "logits" not in list(output) and "logits" in output
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.equal(output.logits, expected) and torch.equal(output["logits"], expected)


def test_outputs_are_read_as_those_of_the_base(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), labelled("llama")
    plain = model.backbone(**inputs)
    output = model(**inputs)
    assert torch.allclose(output.get("logits"), plain.logits) and output.get("nothing", 3) == 3
    assert [type(part) for part in output.to_tuple()] == [type(part) for part in plain.to_tuple()]


def test_a_trainer_reads_logits_under_autocast(wrap: Wrap, tmp_path: Any) -> None:
    """accelerate makes the output of a pass in bf16 anew, of its items."""
    read: list[Tensor] = []

    class Reading(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            output = model(**inputs)
            read.append(output.logits)
            return (output.loss, output) if return_outputs else output.loss

    rows = [{k: v[0] for k, v in labelled("llama").items()} for _ in range(2)]
    arguments = TrainingArguments(tmp_path, max_steps=1, bf16=True, report_to=[], use_cpu=True)
    Reading(wrap("llama", "p_tuning_v2").float(), arguments, train_dataset=rows).train()
    assert read[0].dtype == torch.float32 and read[0].shape[:2] == (2, rows[0]["input_ids"].shape[0])


def test_logits_of_weights_that_have_changed_are_refused(wrap: Wrap) -> None:
    model = wrap("llama", "p_tuning_v2").train()
    output = model(**labelled("llama"))
    with torch.no_grad():
        model.prompt.weight.add_(1)
    assert "logits='computed on demand'" in repr(output)
    with pytest.raises(PTuneError, match="after the weights had changed"):
        output.logits  # noqa: B018


def test_an_output_that_is_made_anew_takes_the_logits_of_no_other(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), labelled("llama")
    first = model(**inputs)
    model(**{k: v[:1] for k, v in inputs.items()})
    assert type(first)(loss=first.loss).logits is None


def test_a_loss_function_of_a_user_s_own_gets_all_logits(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2"), labelled("llama")
    seen: list[Any] = []

    def loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        seen.append(logits.shape[:2])
        return logits.sum() * 0 + 42

    model.loss_function = loss
    for mode in (True, False):
        assert model.train(mode)(**inputs).loss == 42
    assert seen == [inputs["input_ids"].shape] * 2 and model.loss_function is loss


@pytest.mark.parametrize(("family", "task"), [("llama", None), ("bert", "MASKED_LM")])
def test_a_copy_made_in_the_midst_of_a_pass_is_as_any_other(family: str, task: str | None, wrap: Wrap) -> None:
    model, inputs, copies = wrap(family, "p_tuning_v2", task).train(), labelled(family), []
    expected = model(**inputs).loss
    handle = model.base_model.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    model(**inputs)
    handle.remove()
    whole = inputs | {"shift_labels": torch.zeros_like(inputs["labels"])} if task is None else inputs
    assert torch.equal(copies[0].eval()(**whole).loss, model.eval()(**whole).loss)
    seen = seen_by_head(copies[0].train())
    assert torch.equal(copies[0](**inputs).loss, expected)
    assert len(seen) == 1 and seen[0] < inputs["labels"].numel()
    assert copies[0].loss_function is model.loss_function


def test_a_device_that_fails_does_not_turn_it_off(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), batch("llama")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LossAtLabels, "_run", full)
        with pytest.raises(torch.OutOfMemoryError):
            model(**inputs)
    model(**inputs)
    assert model._loss_at_labels.agrees


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
    assert seen and max(seen) == 9  # two rows of four labels, and the state that meets no label


def test_calls_that_are_read_by_place(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), labelled("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
    loss, logits = model(**inputs)[:2]
    assert loss.dim() == 0 and torch.allclose(logits, expected, atol=1e-9)
    assert torch.allclose(model(**inputs)[1], expected, atol=1e-9)


def test_arguments_that_are_tensors_count_as_given(wrap: Wrap) -> None:
    model, inputs = wrap("llama", "p_tuning_v2").train(), labelled("llama")
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    with torch.no_grad():
        expected = model(**inputs).loss
    assert torch.allclose(model(**inputs, shift_labels=shifted).loss, expected, atol=1e-6)
    kept = torch.arange(inputs["input_ids"].shape[1])
    assert torch.allclose(model(**inputs, logits_to_keep=kept).loss, expected, atol=1e-6)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_decoder_may_be_given_embeddings(family: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, "p_tuning_v2").train(), labelled(family)
    ids = inputs["labels"].clamp(min=0)
    embeds = model.get_input_embeddings()(ids)
    loss = model(**inputs, decoder_inputs_embeds=embeds).loss
    assert torch.allclose(loss, model(**inputs, decoder_input_ids=ids).loss, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", *SEQ2SEQ])
def test_smoothed_labels_are_those_of_the_next_token(family: str, wrap: Wrap, tmp_path: Any) -> None:
    model, inputs = wrap(family, "p_tuning_v2"), labelled(family)
    if family in SEQ2SEQ:
        rows = [{n: t[i].tolist() for n, t in inputs.items()} for i in range(3)]
        tokenizer = tokenizer_of("wordpiece")
        inputs = dict(DataCollatorForSeq2Seq(tokenizer, model=model)(rows))
        assert (
            inputs["decoder_input_ids"].tolist()
            == model.backbone.prepare_decoder_input_ids_from_labels(labels=inputs["labels"]).tolist()
        )
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    found = Trainer(model, args).compute_loss(model, dict(inputs))
    with torch.no_grad():
        logits, labels = model(**inputs).logits, inputs["labels"]
    if family not in SEQ2SEQ:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert torch.allclose(found, expected, rtol=1e-5)
