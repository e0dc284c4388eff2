import logging
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from setup_runs import Rows, batch, bert, llama, tensors, trainer, wrap
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForQuestionAnswering,
    BartForSequenceClassification,
    BertForMultipleChoice,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
)
from transformers.trainer_pt_utils import IterableDatasetShard

from hf_ptune.callbacks import GuardCallback, check_batch
from hf_ptune.errors import GuardError

TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "bitfit"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_sound_models_pass_and_stay_as_they_were(method: str, family: str) -> None:
    model = wrap(llama(attention_bias=True) if family == "llama" else bert(), method)
    model.train()
    model.backbone.eval()
    before, modes = tensors(model), [m.training for m in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    check_batch(model, batch(Rows(classes=None if family == "llama" else 3)))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning_v2"])
def test_gradient_checkpointing_passes(method: str, reentrant: bool) -> None:
    model = wrap(llama(), method)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_batch(model, batch(Rows()))


class Noisy(Rows):
    """Rows whose making draws from all three random generators."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(index)


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning"])
def test_training_is_the_same_with_and_without_guard(tmp_path: Path, method: str) -> None:
    ends = []
    for callbacks in ([], [GuardCallback()]):
        model = wrap(llama(attention_dropout=0.2), method, encoder_dropout=0.1, prefix_dropout=0.1)
        random.seed(0), np.random.seed(0)
        trainer(model, tmp_path, callbacks, rows=Noisy()).train()
        ends.append((tensors(model), random.random(), np.random.rand(), torch.rand(1)))
    assert all(torch.equal(t, ends[1][0][n]) for n, t in ends[0][0].items())
    assert ends[0][1:3] == ends[1][1:3] and torch.equal(ends[0][3], ends[1][3])


@pytest.mark.parametrize(
    ("stopped", "told"), [([], ""), (["backbone.classifier.weight"], "makes them: backbone.classifier.weight\n")]
)
def test_a_bias_that_all_choices_share_has_no_gradient(
    stopped: list[str], told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    torch.manual_seed(0)
    model = wrap(BertForMultipleChoice(bert().config))
    rows = Rows(classes=2)
    choices = [torch.stack([rows[k]["input_ids"], rows[k + 1]["input_ids"]]) for k in range(2)]
    inputs = {"input_ids": torch.stack(choices), "labels": torch.tensor([0, 1])}
    model(**inputs).loss.backward()
    bias = model.get_parameter("backbone.classifier.bias")
    assert bias.grad is not None and bias.grad.abs() < 1e-6
    for parameter in (bias, *map(model.get_parameter, stopped)):
        parameter.register_hook(torch.zeros_like)  # as it is but for rounding
    check_batch(model, inputs)
    assert "".join(f"{r.getMessage()}\n" for r in caplog.records).endswith(told) and bool(caplog.records) == bool(told)


def test_existing_gradients_are_kept() -> None:
    model = wrap(llama())
    assert model.prompt is not None
    parameter = next(model.prompt.parameters())
    parameter.grad = torch.full_like(parameter, 3.0)
    check_batch(model, batch(Rows()))
    assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0))


def test_a_prompt_that_does_not_move_the_logits_is_found() -> None:
    model = wrap(llama())
    assert model._injector is not None
    model._injector.enabled = False
    with pytest.raises(GuardError, match="does not move the logits"):
        check_batch(model, batch(Rows()))


def test_a_frozen_adapter_is_found() -> None:
    model = wrap(bert(), "p_tuning")
    assert model.prompt is not None
    next(model.prompt.parameters()).requires_grad_(False)
    with pytest.raises(GuardError, match=r"get no gradient.*frozen.*freeze_backbone\(\)"):
        check_batch(model, batch(Rows(classes=3)))


def test_a_wholly_frozen_model_is_found() -> None:
    model = wrap(llama()).requires_grad_(False)
    with pytest.raises(GuardError, match="does not depend on any trainable parameter"):
        check_batch(model, batch(Rows()))


def test_a_parameter_that_the_forward_pass_leaves_out_is_found() -> None:
    model = wrap(llama())
    assert model.prompt is not None
    model.prompt.register_parameter("stray", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(GuardError, match="prompt.stray of the adapter get no gradient"):
        check_batch(model, batch(Rows()))


def test_gradient_of_the_backbone_is_found() -> None:
    model = wrap(llama())
    model.backbone.model.norm.weight.requires_grad_(True)
    with pytest.raises(GuardError, match=r"backbone get gradient \(backbone.model.norm.weight\).*FreezeBackbone"):
        check_batch(model, batch(Rows()))


def test_a_gradient_that_is_not_finite_is_found() -> None:
    model = wrap(llama())
    assert model.prompt is not None
    next(model.prompt.parameters()).register_hook(lambda g: g * float("nan"))
    with pytest.raises(GuardError, match="not finite"):
        check_batch(model, batch(Rows()))


def test_a_prompt_without_gradient_is_found_under_a_head_with_gradient() -> None:
    model = wrap(bert())
    assert model.prompt is not None
    for parameter in model.prompt.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(GuardError, match="every gradient of the prompt is zero"):
        check_batch(model, batch(Rows(classes=3)))


def test_single_zero_gradients_are_only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("hf_ptune.callbacks.guard"), "warning", told.append)
    model = wrap(bert(), "prefix_tuning")
    assert model.prompt is not None
    next(model.prompt.parameters()).register_hook(torch.zeros_like)
    check_batch(model, batch(Rows(classes=3)))
    assert len(told) == 1 and "prompt." in told[0]


def test_missing_and_unusable_loss_are_found() -> None:
    model, inputs = wrap(llama()), batch(Rows())
    with pytest.raises(GuardError, match="returned no loss for the inputs attention_mask, input_ids"):
        check_batch(model, {k: v for k, v in inputs.items() if k != "labels"})
    with pytest.raises(GuardError, match="All labels are -100"):
        check_batch(model, inputs | {"labels": torch.full_like(inputs["labels"], -100)})


def test_labels_out_of_range_are_found() -> None:
    inputs = batch(Rows(classes=3))
    with pytest.raises(GuardError, match="labels run from 0 to 7, expected 0 to 2.*num_labels"):
        check_batch(wrap(bert()), inputs | {"labels": torch.tensor([0, 7])})
    rows = batch(Rows())
    with pytest.raises(GuardError, match="expected 0 to 49.*tokenizer"):
        check_batch(wrap(llama()), rows | {"labels": rows["labels"] + 40})


@pytest.mark.parametrize("method", ["p_tuning_v2", "prompt_tuning"])
def test_prompt_and_sequence_must_fit_the_position_table(method: str) -> None:
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=10, bos_token_id=1, eos_token_id=1)
    model = wrap(GPT2LMHeadModel(config), method)
    check_batch(model, batch(Rows(length=6)))
    with pytest.raises(GuardError, match=r"7 tokens and 4 virtual tokens make 11 positions, but .*wpe has 10\."):
        check_batch(model, batch(Rows(length=7)))


def test_encoders_keep_their_whole_position_table() -> None:
    model = wrap(bert())
    check_batch(model, batch(Rows(length=16, classes=3)))
    with pytest.raises(GuardError, match="sequences of 17 tokens, but .*position_embeddings has 16"):
        check_batch(model, batch(Rows(length=17, classes=3)))


@pytest.mark.parametrize(("length", "fits"), [(10, True), (11, False)])
def test_roberta_starts_behind_its_padding(length: int, fits: bool) -> None:
    config = RobertaConfig(
        **TINY,
        intermediate_size=16,
        max_position_embeddings=12,
        pad_token_id=1,
        num_labels=3,
        hidden_dropout_prob=0,
    )
    model, inputs = wrap(RobertaForSequenceClassification(config)), batch(Rows(length=length, classes=3))
    with (
        nullcontext()
        if fits
        else pytest.raises(GuardError, match="sequences of 11 tokens, but .*position_embeddings has 10")
    ):
        check_batch(model, inputs)


@pytest.mark.parametrize(("length", "fits"), [(8, True), (9, False)])
def test_the_decoder_has_its_own_length(length: int, fits: bool) -> None:
    sizes = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = BartConfig(
        vocab_size=50, d_model=32, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=8, **sizes
    )
    model = wrap(BartForConditionalGeneration(config))
    inputs = batch(Rows(length=8)) | {"labels": torch.ones(2, length, dtype=torch.long)}
    with (
        nullcontext()
        if fits
        else pytest.raises(GuardError, match="sequences of 9 tokens, but .*decoder.embed_positions has 8")
    ):
        check_batch(model, inputs)


def bart_config(**settings: Any) -> BartConfig:
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    sizes = dict.fromkeys(names, 2) | {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2}
    return BartConfig(**{"vocab_size": 50, "max_position_embeddings": 12, "num_labels": 3} | sizes | tokens | settings)


def closed(length: int) -> dict[str, torch.Tensor]:
    """A batch of classified rows, each with one end."""
    inputs = batch(Rows(length=length, classes=3))
    ids = inputs["input_ids"].clamp(min=3)
    ids[:, -1] = 1
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("method", ["p_tuning_v2", "prefix_tuning", "prompt_tuning", "p_tuning", "bitfit"])
def test_encoder_decoders_that_classify_pass(method: str) -> None:
    check_batch(wrap(BartForSequenceClassification(bart_config()), method), closed(8))


def test_encoder_decoders_that_answer_questions_pass() -> None:
    inputs = {k: v for k, v in closed(8).items() if k != "labels"}
    check_batch(
        wrap(BartForQuestionAnswering(bart_config())),
        inputs | {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    )


def test_a_decoder_that_does_not_write_reads_the_input() -> None:
    model = wrap(BartForSequenceClassification(bart_config()))
    tables = model.backbone.model.encoder.embed_positions, model.backbone.model.decoder.embed_positions
    assert [t.num_embeddings - t.offset for t in tables] == [12, 12]
    model.backbone.model.encoder.embed_positions = type(tables[0])(20, 32)
    with pytest.raises(GuardError, match="sequences of 13 tokens, but .*decoder.embed_positions has 12"):
        check_batch(model, closed(13))


def test_a_model_without_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="get_ptune_model"):
        trainer(llama(), tmp_path, [GuardCallback()]).train()


class Unlabelled(Rows):
    """Rows of which the last one alone has labels that count."""

    def __init__(self, labelled: bool = True) -> None:
        super().__init__()
        self.labelled = labelled

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        counts = self.labelled and index == len(self) - 1
        return row if counts else row | {"labels": torch.full_like(row["labels"], -100)}


def streamed(rows: Rows) -> Any:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{k: v.tolist() for k, v in rows[i].items()} for i in range(len(rows))])
    return made.to_iterable_dataset().with_format("torch")


@pytest.mark.parametrize("make", [lambda rows: rows, streamed], ids=["rows", "stream"])
@pytest.mark.parametrize("size", [1, 4])
def test_rows_without_a_counted_label_are_passed_over(tmp_path: Path, make: Any, size: int) -> None:
    settings = {"per_device_train_batch_size": size, "max_steps": 2}
    trainer(wrap(llama()), tmp_path, [GuardCallback()], rows=make(Unlabelled()), **settings).train()
    with pytest.raises(GuardError, match="All labels are -100"):
        trainer(wrap(llama()), tmp_path, [GuardCallback()], rows=make(Unlabelled(False)), **settings).train()


def test_the_first_label_of_a_causal_row_does_not_count(tmp_path: Path) -> None:
    class First(Rows):
        def __getitem__(self, index: int) -> dict[str, Any]:
            row = super().__getitem__(index)
            return row | {"labels": row["labels"].masked_fill(torch.arange(7) > (0 if index < 2 else 7), -100)}

    trainer(wrap(llama()), tmp_path, [GuardCallback()], rows=First(), per_device_train_batch_size=1).train()


def test_loss_functions_get_what_the_trainer_gives_them(tmp_path: Path) -> None:
    seen: list[Any] = []

    def summed(outputs: Any, labels: Any, num_items_in_batch: Any) -> torch.Tensor:
        seen.append(num_items_in_batch)
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def plain(outputs: Any, labels: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    run = trainer(wrap(bert()), tmp_path, [GuardCallback(summed)], rows=Rows(classes=3))
    run.compute_loss_func = summed
    run.train()
    assert [int(count) for count in seen] == [4] * 5
    check_batch(wrap(bert()), batch(Rows(classes=3)), plain)
    check_batch(wrap(bert()), batch(Rows(classes=3)), lambda outputs, labels, **given: plain(outputs, labels))


class Batches(torch.utils.data.Dataset):
    """Whole batches, as samples."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        samples = [self.rows[4 * index + i] for i in range(4)]
        return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}


class OwnLoader:
    """Batches that nothing tells how to read again."""

    dataset = Rows()

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        return iter([Batches()[i] for i in range(4)])


@pytest.mark.parametrize("kind", ["unbatched", "prepared", "list", "own"])
def test_loaders_of_the_users_own(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
            if kind == "prepared":
                return self.accelerator.prepare(loader)
            return {"unbatched": loader, "list": [Batches()[i] for i in range(4)], "own": OwnLoader()}[kind]

    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("hf_ptune.callbacks.guard"), "warning", told.append)
    trainer(wrap(llama()), tmp_path, [GuardCallback()], trainer_class=Own).train()
    if kind == "own":
        assert told == ["the guard is not run: OwnLoader cannot be read without using up samples."]
        return
    assert not told
    model = wrap(llama())
    assert model._injector is not None
    model._injector.enabled = False
    with pytest.raises(GuardError, match="does not move"):
        trainer(model, tmp_path, [GuardCallback()], trainer_class=Own).train()


class Stream(torch.utils.data.IterableDataset):
    """Samples that are gone once they have been read."""

    def __init__(self) -> None:
        self.rows = iter([Rows()[i] for i in range(16)])
        self.read = 0

    def __iter__(self) -> Any:
        for row in self.rows:
            self.read += 1
            yield row


def test_a_stream_is_not_used_up(tmp_path: Path) -> None:
    stream = Stream()
    GuardCallback().on_train_begin(
        *(lambda run: (run.args, run.state, run.control))(trainer(wrap(llama()), tmp_path)),
        model=wrap(llama()),
        train_dataloader=torch.utils.data.DataLoader(stream, batch_size=4),
    )
    assert stream.read == 0


class Sized(Stream):
    def __len__(self) -> int:
        return 16


@pytest.mark.parametrize("shard", [None, accelerate.data_loader.IterableDatasetShard, IterableDatasetShard])
@pytest.mark.parametrize("make", [Stream, Sized])
def test_streams_are_read_by_no_index(tmp_path: Path, make: Any, shard: Any) -> None:
    stream = make()
    rows = stream if shard is None else shard(stream, batch_size=4, num_processes=2)
    run = trainer(wrap(llama()), tmp_path)
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    GuardCallback().on_train_begin(run.args, run.state, run.control, model=run.model, train_dataloader=loader)
    assert stream.read == 0


@pytest.mark.parametrize("shard", [accelerate.data_loader.IterableDatasetShard, IterableDatasetShard])
def test_a_rank_s_share_of_a_stream_that_starts_anew_is_checked(tmp_path: Path, shard: Any) -> None:
    run = trainer(wrap(llama()), tmp_path)
    loader = torch.utils.data.DataLoader(shard(streamed(Rows()), batch_size=4, num_processes=2), batch_size=4)
    run.model._injector.enabled = False
    with pytest.raises(GuardError, match="does not move"):
        GuardCallback().on_train_begin(run.args, run.state, run.control, model=run.model, train_dataloader=loader)


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": True}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}],
    ids=str,
)
def test_guard_passes_in_the_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = trainer(wrap(llama(), "prefix_tuning"), tmp_path, [GuardCallback()], max_steps=1, **settings)
    run.train()
    assert run.state.global_step == 1


def test_streams_that_start_anew_are_checked(tmp_path: Path) -> None:
    stream = streamed(Rows())
    ends = []
    for callbacks in ([], [GuardCallback()]):
        model = wrap(llama())
        trainer(model, tmp_path, callbacks, rows=stream).train()
        ends.append(tensors(model))
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
    model = wrap(llama())
    assert model._injector is not None
    model._injector.enabled = False
    with pytest.raises(GuardError, match="does not move"):
        trainer(model, tmp_path, [GuardCallback()], rows=stream).train()


def test_guard_stops_the_trainer_before_the_first_step(tmp_path: Path) -> None:
    model = wrap(llama())
    before = tensors(model)
    run = trainer(model, tmp_path, [GuardCallback()])
    assert model._injector is not None
    model._injector.enabled = False
    with pytest.raises(GuardError, match="does not move"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
