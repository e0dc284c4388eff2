"""Tiny, randomly initialised models of every text family of transformers."""

import contextlib
import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_ptune.backbone import TASKS

MAPPINGS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
VOCABULARY = 99

# field -> value, where a configuration has the field
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "emb_dim": 32,
    "model_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_inner": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_hidden_size": 64,
    "hidden_dim": 64,
    "n_inner": 64,
    "dense_intermediate_size": 64,
    "block_ff_dim": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "d_head": 8,
    "attention_head_size": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "seq_length": 128,
    "max_sequence_length": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "sliding_window": 8,
    "attention_window_size": 8,
    "local_attention": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "bottleneck_size": 16,
    "per_layer_input_hidden_size": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "use_cache": True,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "query_pre_attn_scalar": 8,
}
KEPT_NONE = (
    "q_lora_rank",
    "kv_lora_rank",
    "sliding_window",
    "n_inner",
    "word_embed_proj_dim",
    "d_inner",
    "num_experts",
)
DROPOUTS = ("drop", "dropout", "pdrop")
FAMILIES: dict[str, dict[str, Any]] = {
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "deberta": {"pooler_hidden_size": 32},
    "deberta-v2": {"pooler_hidden_size": 32},
    "esmc": {"num_key_value_heads": 4},
    "rwkv": {"attention_hidden_size": 32},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "layoutlmv3": {"visual_embed": False},
    "longformer": {"attention_window": [4, 4]},
    "xlstm": {"num_heads": 4, "head_dim": 8, "qk_dim_factor": 0.5, "v_dim_factor": 1.0},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
}
# as arguments of the configuration's class, where it checks them together or derives others from them
ARGUMENTS: dict[str, dict[str, Any]] = {
    "laguna": {"num_hidden_layers": 2, "num_attention_heads_per_layer": [4, 4]},
    "gemma3n_text": {"num_hidden_layers": 5, "activation_sparsity_pattern": [0.0] * 5, "intermediate_size": [64] * 5},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_groups": 1, "mamba_expand": 2},
    "falcon_h1": {"num_hidden_layers": 2, "mamba_d_ssm": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 32}},
}


def shrink(config: PreTrainedConfig, seen: int = 0) -> PreTrainedConfig:
    """Make a configuration tiny in place, its sub-configurations too."""
    for name, value in SMALL.items():
        if hasattr(config, name) and (value is not None):
            try:
                current = getattr(config, name)
                if isinstance(current, (list, tuple)) or (current is None and name in KEPT_NONE):
                    continue
                setattr(config, name, value)
            except (AttributeError, NotImplementedError, ValueError, TypeError):
                continue
    for name, value in list(vars(config).items()):
        if any(word in name for word in DROPOUTS) and isinstance(value, float):
            setattr(config, name, 0.0)
        if isinstance(value, PreTrainedConfig) and seen < 4:
            shrink(value, seen + 1)
    if isinstance(getattr(config, "kv_lora_rank", None), int):
        config.num_key_value_heads = 4  # latent attention has as many key heads as query heads
    for name in ("forced_eos_token_id", "forced_bos_token_id", "begin_suppress_tokens", "suppress_tokens"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    _fit_lists(config)
    for name, value in FAMILIES.get(config.model_type, {}).items():
        setattr(config, name, value)
    return config


def _fit_lists(config: PreTrainedConfig) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and kinds:
        distinct = list(dict.fromkeys(kinds))
        layers = max(layers, len(distinct))
        config.num_hidden_layers = layers
        with contextlib.suppress(AttributeError):  # some derive it from other fields
            config.layer_types = (distinct * layers)[:layers]
    for name in ("mlp_layer_types", "no_rope_layers", "intermediate_size", "attention_layers"):
        value = getattr(config, name, None)
        if isinstance(value, list) and value:
            setattr(config, name, (value * layers)[:layers])


def tiny_model(model_type: str, task: str) -> PreTrainedModel:
    """Build a tiny model of a family for a task, in float32 and eval mode.

    Args:
        model_type: key of transformers' configuration mapping.
        task: "CAUSAL_LM" or "SEQ_CLS".

    Raises:
        Exception: whatever the family's own code raises where no tiny model can be built.
    """
    config = shrink(CONFIG_MAPPING[model_type](**ARGUMENTS.get(model_type, {})))
    if task == "CAUSAL_LM" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(0)
    model = TASKS[task].from_config(copy.deepcopy(config))
    return model.float().eval()
