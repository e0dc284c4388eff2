"""Tiny backbones of every family that the contract holds for, built from configurations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import is_torch_greater_or_equal

from hf_ptune.backbone import TASKS
from hf_ptune.errors import InjectionError

VOCABULARY = 99
compiles_several_hooks = pytest.mark.skipif(
    not is_torch_greater_or_equal("2.12", accept_dev=True),
    reason="torch before 2.12 mistakes hooks of one module for each other where one was put before the rest",
)
_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "intermediate_size": 37,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_DECODER = _COMMON | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": None}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_DECODER),
    "gpt2": lambda: GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=128,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "bloom": lambda: BloomConfig(
        hidden_size=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "qwen3": lambda: Qwen3Config(**_DECODER),
    "gemma2": lambda: Gemma2Config(**_DECODER, sliding_window=4, query_pre_attn_scalar=8),
    "mistral": lambda: MistralConfig(**_DECODER, sliding_window=4),
    "bert": lambda: BertConfig(**_COMMON, **_NO_DROPOUT, max_position_embeddings=64),
    "roberta": lambda: RobertaConfig(**_COMMON, **_NO_DROPOUT, max_position_embeddings=64),
    "deberta-v2": lambda: DebertaV2Config(
        **_COMMON, **_NO_DROPOUT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=64
    ),
    "modernbert": lambda: ModernBertConfig(
        **(_COMMON | {"num_hidden_layers": 3}),
        local_attention=8,
        global_attn_every_n_layers=3,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
    ),
    "distilbert": lambda: DistilBertConfig(
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=37,
        vocab_size=VOCABULARY,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.3,
        max_position_embeddings=64,
    ),
    "t5": lambda: T5Config(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0, **_SEQ2SEQ),
    "bart": lambda: BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        dropout=0.0,
        init_std=0.3,
        max_position_embeddings=64,
        bos_token_id=0,
        forced_eos_token_id=None,
        **_SEQ2SEQ,
    ),
}
DECODERS = ["llama", "gpt2", "bloom", "qwen3", "gemma2", "mistral"]
ENCODERS = ["bert", "roberta", "deberta-v2", "modernbert", "distilbert"]
SEQ2SEQ = ["t5", "bart"]
METHODS = ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "bitfit"]


def main_task(family: str) -> str:
    """The task that a family's papers show it on."""
    return "CAUSAL_LM" if family in DECODERS else "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "SEQ_CLS"


def build(family: str, task: str | None = None, **settings: Any) -> PreTrainedModel:
    """Build a tiny backbone in float64 and eval mode, the same one every time."""
    config = CONFIGS[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model: PreTrainedModel = TASKS[task or main_task(family)].from_config(config)
    return model.double().eval()


def takes_bitfit(family: str) -> bool:
    """Whether the family has bias terms at all."""
    return family not in ("llama", "qwen3", "gemma2", "mistral", "t5", "modernbert")


def batch(family: str, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels for the family's main task."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = {"CAUSAL_LM": ids, "SEQ_2_SEQ_LM": ids[:, :5].contiguous(), "SEQ_CLS": torch.arange(rows) % 2}[
        main_task(family)
    ]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def assert_checkpoints_change_no_gradient(model: Any, inputs: dict[str, torch.Tensor], reentrant: bool) -> None:
    """Compare the gradients of an adapter's parameters with and without gradient checkpointing."""
    parameters = [p for n, p in model.named_parameters() if n in model.adapter_parameter_names()]
    wanted = torch.autograd.grad(model(**inputs).loss, parameters)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and model.mix is not None and "__call__" in vars(GradientCheckpointingLayer):
        with pytest.raises(InjectionError, match="use_reentrant"):  # transformers before 5.23
            model(**inputs)
        return
    model(**inputs).loss.backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, atol=1e-9)
