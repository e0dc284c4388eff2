"""What is done on the host a step: on a GPU a small batch waits for whatever launches its kernels."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import batch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ptune import PTuneConfig, PTunePreTrainedModel, cross_entropy, get_ptune_model
from hf_ptune.injection import attention

Wrap = Callable[..., PTunePreTrainedModel]


def operators(call: Callable[[], Any]) -> Counter[str]:
    """How often each operator is dispatched."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return Counter(e.name for e in profiler.events() if e.name.startswith("aten::"))


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def prompted(layers: int, method: str) -> PTunePreTrainedModel:
    return get_ptune_model(llama(layers), PTuneConfig(method=method, num_virtual_tokens=4))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy prefixes before every row, as on a GPU."""
    monkeypatch.setattr(attention, "merge_kernel", lambda *a: None)


def training(model: Any) -> Counter[str]:
    """What a training step dispatches, down to the input embeddings."""
    embeds = model.get_input_embeddings()(batch("llama")["input_ids"]).detach().requires_grad_()

    def step() -> None:
        model(inputs_embeds=embeds, labels=batch("llama")["labels"], use_cache=False).loss.backward()

    model.train()
    step()  # tries what is tried once
    return operators(step)


def of_a_layer(method: str) -> Counter[str]:
    """What a training step dispatches for one layer more, beyond what it does for the base."""
    found = Counter(training(prompted(3, method)))
    found.subtract(training(prompted(2, method)))
    found.subtract(training(llama(3).requires_grad_(False)))
    found.update(training(llama(2).requires_grad_(False)))
    return found


def test_a_prefix_is_cast_and_cut_once(copied: None) -> None:
    found = of_a_layer("p_tuning_v2")
    assert found["aten::_to_copy"] <= 0 and found["aten::split_with_sizes"] == 0
    assert found["aten::cat"] == 2  # keys and values


def test_a_joint_pass_takes_sequences_apart_in_one_step(copied: None) -> None:
    found = of_a_layer("prompt_tuning")
    assert found["aten::select_backward"] == 0 and found["aten::split_with_sizes"] == 0
    assert found["aten::cat"] == 6  # keys and values, what the attentions give, and three gradients


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning_v2"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_is_made_once_a_pass_without_gradients(copied: None, method: str, mode: Any) -> None:
    found = []
    for layers in (2, 3):
        model = prompted(layers, method).eval()
        with mode():
            model(batch("llama")["input_ids"])
            found.append(operators(lambda model=model: model(batch("llama")["input_ids"]))["aten::triu"])
    assert found == [1, 1]


def test_only_attention_of_its_own_has_hooks(wrap: Wrap) -> None:
    model: Any = wrap("llama", "p_tuning_v2")
    inputs = batch("llama")
    modules = [m for m in model.modules() if type(m).__name__ == "LlamaAttention"]

    def hooked() -> list[bool]:
        return [bool(m._forward_hooks or m._forward_pre_hooks) for m in modules]

    with torch.no_grad():
        sdpa = model(**inputs).logits
        assert not any(hooked())
        model.backbone.set_attn_implementation("eager")  # past the wrapper
        assert torch.allclose(model(**inputs).logits, sdpa, atol=1e-6) and all(hooked())
        model.backbone.set_attn_implementation("sdpa")
        assert torch.equal(model(**inputs).logits, sdpa) and not any(hooked())
    model.backbone.set_attn_implementation("eager")
    model(**inputs)
    model.unwrap()
    assert not any(hooked())


def test_pieces_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([[3, -100, 5, 1, 2, 60]])
    results = []
    for size in (64, 2**24):
        monkeypatch.setattr(cross_entropy, "_PIECE", size)
        logits = nn.Parameter(torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
        loss = cross_entropy.causal_lm_loss(logits, labels, 64)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
