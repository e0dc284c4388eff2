"""Outputs and gradients equal PEFT's where PEFT is right, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from families import batch, build
from transformers import BloomConfig, BloomForCausalLM

from hf_ptune import PTuneConfig, PTuneForCausalLM, get_ptune_model
from hf_ptune.injection import find_geometry

peft = pytest.importorskip("peft")
VIRTUAL = 4
CONFIGS: dict[str, Callable[..., Any]] = {
    "prompt_tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p_tuning-MLP": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
    ),
    "p_tuning-LSTM": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=VIRTUAL,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
    ),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=16
    ),
    "p_tuning_v2": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}
# ours -> theirs, for one prompt encoder
RENAMED: dict[str, dict[str, str]] = {
    "prompt_tuning": {"weight": "embedding.weight"},
    "p_tuning-MLP": {"embedding": "embedding", "mlp": "mlp_head"},
    "p_tuning-LSTM": {"embedding": "embedding", "mlp": "mlp_head", "lstm": "lstm_head"},
    "prefix_tuning": {"embedding": "embedding", "mlp.0": "transform.0", "mlp.3": "transform.2"},
    "p_tuning_v2": {"weight": "embedding.weight"},
}


def theirs_of(case: str, name: str) -> str:
    for ours, theirs in RENAMED[case].items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    raise KeyError(name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen3"])
@pytest.mark.parametrize("case", list(CONFIGS))
def test_causal_models(case: str, family: str) -> None:
    # PEFT's projection has the width of full heads
    multi_query = {"num_key_value_heads": 4} if family in ("llama", "qwen3") else {}
    method, _, kind = case.partition("-")
    # from words a constant would stand beside the network, which PEFT has none of
    options: dict[str, Any] = {
        "num_virtual_tokens": VIRTUAL,
        "encoder_hidden_size": 16,
        "prompt_tuning_init": "RANDOM",
    }
    if kind:
        options["encoder_reparameterization_type"] = kind
    ours = get_ptune_model(build(family, **multi_query), PTuneConfig(method=method, **options)).eval()
    theirs = peft.get_peft_model(build(family, **multi_query), CONFIGS[case]()).double().eval()
    encoder = theirs.prompt_encoder["default"]
    their_parameters = dict(encoder.named_parameters())
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.prompt.named_parameters():
            parameter.normal_(0, 0.3)
            their_parameters[theirs_of(case, name)].copy_(parameter)
    inputs = batch(family)
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    inputs["labels"][:, 0] = -100  # PEFT also predicts the first own token, from the last virtual one
    mine, peers = ours(**inputs), theirs(**inputs)
    logits = peers.logits[:, -inputs["input_ids"].shape[1] :]
    real = inputs["attention_mask"].bool()
    assert torch.allclose(mine.logits[real], logits[real], atol=1e-9 if family == "gpt2" else 1e-5)
    mine.loss.backward()
    peers.loss.backward()
    assert torch.allclose(mine.loss, peers.loss, atol=1e-6)
    for name, parameter in ours.prompt.named_parameters():
        gradient = their_parameters[theirs_of(case, name)].grad
        assert gradient is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6), name


def test_counts_of_the_reference_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The two printed lines of the reference runs, with the shape of bloom-389m-zh."""
    config = BloomConfig(vocab_size=42437, hidden_size=1024, n_layer=24, n_head=16)
    with init_empty_weights():
        empty = BloomForCausalLM(config)
    empty.tie_weights()
    small = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=1024, n_layer=1, n_head=16))
    geometry = find_geometry(small)
    site = geometry["sites"][0]
    geometry["sites"] = [site | {"name": f"h.{n}.self_attention", "layer": n} for n in range(24)]
    expected = {
        "p_tuning": "trainable params: 3159040 || all params: 348928000 || trainable%: 0.9053558327219369",
        "p_tuning_v2": "trainable params: 491520 || all params: 346260480 || trainable%: 0.1419509382069822",
    }
    for method, line in expected.items():
        settings = PTuneConfig(method=method, num_virtual_tokens=10, encoder_hidden_size=1024, geometry=geometry)
        settings.set_base(config)
        model = PTuneForCausalLM(settings, empty)
        model.print_trainable_parameters()
        assert capsys.readouterr().out.strip() == line
        model.unwrap()
