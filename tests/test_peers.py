"""Defects measured in peer libraries, none of which may be ours; numbers are rows of the list they were kept in."""

import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, batch, build
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    ElectraConfig,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from hf_ptune import PTuneConfig, PTuneForCausalLM, PTunePreTrainedModel, get_ptune_model
from hf_ptune.backbone import TASKS

Wrap = Callable[..., PTunePreTrainedModel]
BOTH = pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def strengthen(model: Any) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


@BOTH
def test_row_1_caches_of_every_kind(method: str, wrap: Wrap) -> None:
    model, ids = wrap("llama", method), batch("llama")["input_ids"]
    plain = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    expected = model.generate(ids, **plain, use_cache=False)
    assert torch.equal(expected, model.generate(ids, **plain, cache_implementation="static"))
    first = model.generate(ids, **plain, return_dict_in_generate=True)
    again = model.generate(
        torch.cat([first.sequences, ids[:, :1]], dim=1), **plain, past_key_values=first.past_key_values
    )
    fresh = model.generate(torch.cat([first.sequences, ids[:, :1]], dim=1), **plain, use_cache=False)
    assert torch.equal(again, fresh)


def test_row_2_grouped_heads_and_wide_ones(wrap: Wrap) -> None:
    model = wrap("qwen3", "p_tuning_v2")
    assert model.prompt.weight.shape[1] == 2 * 2 * 2 * 8  # layers, keys and values, key heads, head width


def test_row_3_random_prompts_are_as_large_as_embeddings(wrap: Wrap) -> None:
    for family in ("llama", "t5"):
        model = wrap(family, "prompt_tuning", strong=False, num_virtual_tokens=64)
        spread = model.get_input_embeddings().weight.std()
        assert 0.7 < model.prompt.weight.std() / spread < 1.4
    # BERT normalises embeddings, so that there every size is the same one to its layers
    model = wrap("bert", "prompt_tuning", "FEATURE_EXTRACTION", strong=False, num_virtual_tokens=64)
    seen = model.backbone.embeddings(inputs_embeds=model.prompt()[None])
    own = model.backbone.embeddings(batch("bert")["input_ids"])
    assert 0.9 < model.prompt.weight.std() < 1.1 and 0.9 < seen.std() / own.std() < 1.1


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning"])
def test_row_4_the_reparameterisation_is_kept(method: str, wrap: Wrap, tmp_path: Path) -> None:
    model = wrap("llama", method)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert dict(loaded.prompt.named_parameters()).keys() == dict(model.prompt.named_parameters()).keys()
    assert torch.equal(loaded.prompt(), model.prompt().to(loaded.prompt().dtype))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_row_5_seq2seq_prefixes_reach_the_encoder(family: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, "p_tuning_v2", sites=["encoder"]), batch(family)
    with torch.no_grad():
        prompted = model(**inputs).encoder_last_hidden_state
        with model.disable_adapter():
            base = model(**inputs).encoder_last_hidden_state
    assert prompted.shape == base.shape and not torch.allclose(prompted, base, atol=1e-4)


@BOTH
def test_row_6_outputs_are_as_long_as_labels(method: str, wrap: Wrap) -> None:
    for family in ("llama", "bert", "t5"):
        task = "TOKEN_CLS" if family == "bert" else None
        inputs = batch(family)
        if family == "bert":
            inputs["labels"] = inputs["input_ids"] % 2
        assert logits(wrap(family, method, task), **inputs).shape[:2] == inputs["labels"].shape


def test_row_8_checkpointing_reaches_an_unpadded_bert(wrap: Wrap) -> None:
    model, inputs = wrap("bert", "p_tuning_v2").train(), batch("bert")
    inputs.pop("attention_mask")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs).loss.backward()
    assert model.prompt.weight.grad is not None and model.prompt.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert", "distilbert"])
@BOTH
def test_row_9_encoders_without_a_cache(family: str, method: str, wrap: Wrap) -> None:
    model, inputs = wrap(family, method), batch(family)
    with model.disable_adapter():
        base = logits(model, **inputs)
    assert not torch.allclose(base, logits(model, **inputs), atol=1e-4)


def test_row_12_the_head_and_its_size_are_kept(tmp_path: Path) -> None:
    backbone = build("bert", num_labels=5)
    backbone.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    get_ptune_model(base, PTuneConfig(num_virtual_tokens=2)).save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert loaded.config.num_labels == 5 and loaded.backbone.classifier.out_features == 5


@BOTH
def test_row_19_multiple_choice_and_masked_lm(method: str, wrap: Wrap) -> None:
    choice = wrap("bert", method, "MULTIPLE_CHOICE")
    ids = batch("bert", rows=6)["input_ids"].view(2, 3, 7)
    output = choice(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    masked = wrap("bert", method, "MASKED_LM")
    ids = batch("bert")["input_ids"]
    assert logits(masked, input_ids=ids).shape == (2, 7, 99)


def test_row_24_the_backbone_s_arguments_show(wrap: Wrap) -> None:
    import inspect

    seen = inspect.signature(wrap("bert", "p_tuning_v2").forward).parameters
    assert {"input_ids", "token_type_ids", "labels"} <= set(seen)


def test_row_27_training_goes_on(wrap: Wrap, tmp_path: Path) -> None:
    wrap("llama", "prompt_tuning").save_pretrained(tmp_path)
    loaded = PTuneForCausalLM.from_pretrained(tmp_path).train()
    loaded(**batch("llama")).loss.backward()
    assert loaded.prompt.weight.grad is not None


@BOTH
def test_row_29_full_length_inputs_fit_encoders(method: str, wrap: Wrap) -> None:
    for family, length in (("bert", 64), ("distilbert", 64), ("roberta", 62)):
        assert logits(wrap(family, method), **batch(family, length=length)).shape == (2, 2)


@BOTH
@pytest.mark.parametrize("model_class", [LlamaForSequenceClassification, GPT2ForSequenceClassification])
def test_row_34_pooling_picks_the_last_real_token(method: str, model_class: type[PreTrainedModel]) -> None:
    torch.manual_seed(0)
    config = CONFIGS["llama" if model_class is LlamaForSequenceClassification else "gpt2"]()
    model = strengthen(get_ptune_model(model_class(config).eval(), PTuneConfig(method=method, num_virtual_tokens=4)))
    ids = batch("llama")["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    alone, many = logits(model, input_ids=ids), logits(model, input_ids=padded, attention_mask=mask)
    assert torch.allclose(alone, many, atol=1e-5)


def test_row_35_cls_is_pooled(wrap: Wrap) -> None:
    """The pooled state is that of the first own token, computed here by hand among the inserted embeddings."""
    model, inputs = wrap("bert", "prompt_tuning", pooling="cls"), batch("bert")
    ids, prompt = inputs["input_ids"], model.prompt.weight[None].expand(2, -1, -1)
    with torch.no_grad():
        words = model.get_input_embeddings()(ids)
        embeds = torch.cat([words[:, :1], prompt, words[:, 1:]], dim=1)
        positions = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]])
        expected = build("bert")
        expected.load_state_dict(model.backbone.state_dict())
        by_hand = expected(inputs_embeds=embeds, position_ids=positions).logits
    assert torch.allclose(logits(model, **inputs), by_hand, atol=1e-10)


@BOTH
def test_row_36_tags_and_spans_keep_their_places(method: str, wrap: Wrap) -> None:
    ids = batch("bert")["input_ids"]
    tags = wrap("bert", method, "TOKEN_CLS")(input_ids=ids, labels=ids % 2)
    assert tags.logits.shape == (2, 7, 2) and torch.isfinite(tags.loss)
    answer = wrap("bert", method, "QUESTION_ANS")
    spans = answer(input_ids=ids, start_positions=torch.tensor([1, 6]), end_positions=torch.tensor([2, 6]))
    assert spans.start_logits.shape == (2, 7) and torch.isfinite(spans.loss)
    by_hand = torch.nn.functional.cross_entropy(spans.start_logits, torch.tensor([1, 6]))
    ends = torch.nn.functional.cross_entropy(spans.end_logits, torch.tensor([2, 6]))
    assert torch.allclose(spans.loss, (by_hand + ends) / 2, atol=1e-6)


@pytest.mark.parametrize("family", ["modernbert", "bert", "distilbert"])
@BOTH
def test_row_37_features_move(family: str, method: str, wrap: Wrap) -> None:
    model, ids = wrap(family, method, "FEATURE_EXTRACTION"), batch(family)["input_ids"]
    with torch.no_grad():
        prompted = model(input_ids=ids).last_hidden_state
        with model.disable_adapter():
            base = model(input_ids=ids).last_hidden_state
    assert prompted.shape == base.shape and not torch.allclose(prompted, base, atol=1e-4)


def test_row_38_every_row_of_a_seq2seq_prompt_gets_gradient(wrap: Wrap) -> None:
    for family in ("t5", "bart"):
        model = wrap(family, "prompt_tuning")
        model(**batch(family)).loss.backward()
        assert (model.prompt.weight.grad.abs().sum(dim=1) > 0).all()


@BOTH
def test_row_39_embeddings_of_another_width(method: str) -> None:
    small: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 37}
    for config in (
        AlbertConfig(**small, embedding_size=16, num_hidden_layers=2),
        ElectraConfig(**small, embedding_size=16, num_hidden_layers=2),
    ):
        model = get_ptune_model(
            AutoModelForSequenceClassification.from_config(config), PTuneConfig(method=method, num_virtual_tokens=3)
        )
        loss = model(**batch("bert")).loss
        loss.backward()
        assert all(p.grad is not None for p in model.prompt.parameters())


def test_row_40_sliding_layers_keep_their_prefix(wrap: Wrap) -> None:
    model = wrap("mistral", "p_tuning_v2")
    ids = batch("mistral", length=12)["input_ids"]
    output = model(input_ids=ids).logits[:, -1].sum()
    output.backward()
    assert (model.prompt.weight.grad.abs().sum(dim=1) > 0).all()


def test_row_40_hybrid_models_take_prefixes_in_their_attention() -> None:
    config = Qwen3NextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    with unittest.mock.patch("hf_ptune.wrapping.logger.warning") as said:
        model = strengthen(get_ptune_model(Qwen3NextForCausalLM(config), PTuneConfig(num_virtual_tokens=3)))
    assert "layers.0" in said.call_args[0][0]
    assert model.config.geometry["skipped"] == ["layers.0"]
    ids = batch("llama")["input_ids"]
    with model.disable_adapter():
        base = logits(model, input_ids=ids)
    assert not torch.allclose(base, logits(model, input_ids=ids), atol=1e-4)


def test_every_task_has_a_class() -> None:
    assert set(TASKS) >= {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "MULTIPLE_CHOICE", "MASKED_LM"}
    assert AutoModelForMultipleChoice is TASKS["MULTIPLE_CHOICE"]
