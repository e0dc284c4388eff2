"""A frozen backbone without its dropout, while a prompt trains in front of it."""

import copy
from typing import Any

import pytest
import torch
from families import CONFIGS, METHODS, batch, build
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from hf_ptune import PTuneConfig, get_ptune_model
from hf_ptune.callbacks.guard import kept_model_state

HALF = {
    name: 0.5
    for name in (
        "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop",
        "hidden_dropout", "attention_dropout", "dropout", "activation_dropout", "dropout_rate", "embedding_dropout",
        "mlp_dropout", "encoder_layerdrop", "decoder_layerdrop",
    )
}  # fmt: skip

HEADS = ("classifier_dropout", "summary_first_dropout", "seq_classif_dropout", "cls_dropout", "pooler_dropout")


def noisy(family: str) -> PreTrainedModel:
    """A base all of whose dropouts have probability one half, but for the head's."""
    known = {n for n in HALF if hasattr(CONFIGS[family](), n)}
    return build(family, **{n: HALF[n] for n in known}, **dict.fromkeys(HEADS, 0.0))


def passes(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (model(**inputs).logits.detach() for _ in range(2))
    return first, second


@pytest.mark.parametrize("family", CONFIGS)
def test_a_training_pass_draws_nothing(family: str) -> None:
    inputs = batch(family)
    kept = get_ptune_model(noisy(family), PTuneConfig(num_virtual_tokens=3)).train()
    assert not torch.equal(*passes(kept, inputs)), "the test's own base is still"
    model = get_ptune_model(noisy(family), PTuneConfig(num_virtual_tokens=3, backbone_dropout=False)).train()
    first, second = passes(model, inputs)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(**inputs).logits)
    model.train().backbone.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(model(**inputs).logits, first)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_without_noise(method: str) -> None:
    inputs = batch("bert")
    gradients = []
    for base, settings in ((noisy("bert"), {"backbone_dropout": False}), (build("bert"), {})):
        base.dropout.p = 0.0
        torch.manual_seed(1)
        model = get_ptune_model(base, PTuneConfig(method=method, num_virtual_tokens=3, **settings)).train()
        model(**inputs).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def probabilities(model: torch.nn.Module) -> dict[str, float]:
    return {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}


def test_it_comes_back() -> None:
    base = noisy("bert")
    before = probabilities(base)
    assert set(before.values()) == {0.0, 0.5}
    model = get_ptune_model(base, PTuneConfig(backbone_dropout=False))
    assert probabilities(base) == before, "nothing trains yet"
    for _ in range(2):
        assert set(probabilities(model.train().backbone.bert).values()) == {0.0}
    twin = copy.deepcopy(model)
    assert probabilities(twin.eval().backbone) == before
    assert set(probabilities(model.backbone.bert).values()) == {0.0}, "a copy has its own"
    assert probabilities(model.eval().backbone) == before
    model.train()
    model.resize_token_embeddings(120)
    assert set(probabilities(model.backbone.bert).values()) == {0.0}
    assert probabilities(model.unwrap()) == before


def test_a_base_in_training_mode_is_still_at_once_and_gets_it_back_for_a_new_wrapper() -> None:
    base = noisy("bert").train()
    model = get_ptune_model(base, PTuneConfig(backbone_dropout=False))
    inputs = batch("bert")
    assert torch.equal(*passes(model, inputs))
    with pytest.warns(UserWarning, match="had a prompt already"):
        kept = get_ptune_model(base, PTuneConfig())
    assert not torch.equal(*passes(kept, inputs))


def test_checks_before_training_leave_it_out() -> None:
    model = get_ptune_model(noisy("bert"), PTuneConfig(backbone_dropout=False)).train()
    with kept_model_state(model):
        model.eval()
    assert set(probabilities(model.backbone.bert).values()) == {0.0}


def test_heads_keep_theirs() -> None:
    base = noisy("bert")
    base.dropout.p = 0.5
    model = get_ptune_model(base, PTuneConfig(backbone_dropout=False)).train()
    assert base.dropout.p == 0.5 and not torch.equal(*passes(model, batch("bert")))


def test_a_backbone_that_trains_along_keeps_it() -> None:
    config = PTuneConfig(method="p_tuning", backbone_dropout=False, train_backbone=True)
    model = get_ptune_model(noisy("bert"), config).train()
    assert not torch.equal(*passes(model, batch("bert")))


def test_nothing_of_it_is_saved(tmp_path: Any) -> None:
    folder = tmp_path / "base"
    noisy("bert").save_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    get_ptune_model(base, PTuneConfig(backbone_dropout=False)).train().save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert loaded.config.backbone_dropout is False
    assert loaded.config.base.hidden_dropout_prob == 0.5
    assert set(probabilities(loaded.backbone.bert).values()) == {0.5}
    loaded.train()
    assert set(probabilities(loaded.backbone.bert).values()) == {0.0}


_SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 36}


@pytest.mark.parametrize("family", ["falcon", "persimmon", "prophetnet"])
def test_probabilities_that_are_read_while_a_pass_runs(family: str) -> None:
    """These families ask their configuration, in every pass."""
    noise = {"hidden_dropout": 0.5, "attention_dropout": 0.5, "dropout": 0.5, "activation_dropout": 0.5}
    heads = {f"num{part}_attention_heads": 4 for part in ("", "_encoder", "_decoder")}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36}
    depth = {"num_hidden_layers": 2} if family != "prophetnet" else layers
    config = AutoConfig.for_model(family, **_SMALL, **heads, **depth, **noise, pad_token_id=0)
    kind = AutoModelForCausalLM if family != "prophetnet" else AutoModelForSeq2SeqLM
    method = "p_tuning_v2" if family != "prophetnet" else "bitfit"
    model = get_ptune_model(kind.from_config(config), PTuneConfig(method=method, backbone_dropout=False))
    inputs = {"input_ids": batch("llama")["input_ids"]}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if family == "prophetnet" else {}
    first, second = passes(model.train(), inputs)
    assert torch.equal(first, second)
    assert torch.equal(*passes(copy.deepcopy(model), inputs))
    assert model.backbone.config.attention_dropout == 0.5, "what may be saved says what it was"
    torch.testing.assert_close(first, model.eval()(**inputs).logits)
    assert not torch.equal(*passes(model.unwrap().train(), inputs))
