"""Tiny, randomly initialised models of every text family of transformers.

A configuration is built through its own constructor with small values for the fields that it has, so that what
a family derives from them (head sizes, layer patterns, per-layer settings) fits. What does not follow from names
alone stands in `FAMILIES`.
"""

import dataclasses
import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

CAUSAL, SEQCLS = "causal", "seqcls"
AUTO_CLASSES: dict[str, Any] = {CAUSAL: AutoModelForCausalLM, SEQCLS: AutoModelForSequenceClassification}
FAMILY_NAMES: dict[str, list[str]] = {
    CAUSAL: list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    SEQCLS: list(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
}
VOCABULARY, PAD, BOS, EOS, LABELS, PLACEHOLDERS = 99, 0, 1, 2, 3, 10  # placeholders: the last ids

_SIZES: dict[int, str] = {
    2: (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k "
        "moe_topk num_selected_experts top_k_experts linear_num_key_heads mamba_n_groups n_groups type_vocab_size"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads "
        "rotary_dim index_n_heads index_topk_freq"
    ),
    8: (
        "head_dim d_kv d_head attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim state_size "
        "mamba_d_state ssm_state_size mamba_chunk_size chunk_size sliding_window attention_window_size "
        "local_attention linear_key_head_dim linear_value_head_dim per_layer_input_hidden_size "
        "hidden_size_per_layer_input query_pre_attn_scalar image_size num_mel_bins "
        "attention_window laurel_rank altup_lora_rank"
    ),
    16: (
        "q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim bottleneck_size swa_head_dim global_head_dim "
        "index_head_dim embedding_size mamba_dt_rank time_step_rank"
    ),
    32: (
        "hidden_size d_model n_embd dim emb_dim model_dim moe_intermediate_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size lru_width word_embed_proj_dim d_embed "
        "expert_ffn_hidden_size zero_expert_num expert_hidden_size"
    ),
    64: (
        "intermediate_size ffn_dim d_ff d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim n_inner "
        "hidden_size_global "
        "dense_intermediate_size block_ff_dim intermediate_size_mlp dim_ff dff mamba_expand_dim"
    ),
    128: (
        "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_sequence_length context_length "
        "max_target_positions max_source_positions original_max_position_embeddings"
    ),
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace moe_layer_start_index",
    VOCABULARY: "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size n_words",
}
SMALL: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()} | {
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "num_kv_shared_layers": 0,
}
# set even where the family's default is None
_ALWAYS = {"num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id"}
_RANDOM = ("dropout", "pdrop", "drop_rate", "layerdrop", "jitter_noise", "dropout_prob", "dropout_p")
_PATTERNS = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "attention_layers",
    "intermediate_size",
    "activation_sparsity_pattern",
)

# model_type -> fields that names alone do not tell
_NO_GROUPS = {"num_key_value_heads": 4}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_HYBRIDS = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY, "num_hidden_layers": 2},
    "blt_global_transformer": {"hidden_size": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {"head_dim": 16, "shared_experts_intermediate_size": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "esm": {"token_dropout": False, "position_embedding_type": "rotary", "vocab_size": VOCABULARY},
    "esmc": _NO_GROUPS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": _SHARED | {"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 9, "entity_emb_size": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "mobilebert": {"initializer_range": 0.02},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "layer_types": ["linear_attention", "indexed_attention"],
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2, "hash_seed": 0},
    "roc_bert": {
        "shape_vocab_size": VOCABULARY,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "squeezebert": {"embedding_size": 32},
    "t5": {"decoder_start_token_id": PAD},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "zamba": _NO_GROUPS | _HYBRIDS,
    "zamba2": _HYBRIDS,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A small configuration of a class, its sub-configurations small too."""
    default = kind()
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    names += [n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "kwargs", "args")]
    values: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        value = default.__dict__.get(name)
        if isinstance(value, PreTrainedConfig):
            values[name] = tiny_config(type(value))
        elif isinstance(value, float) and name.endswith(_RANDOM):
            values[name] = 0.0
        elif isinstance(value, (list, tuple, dict)):
            continue
        elif name in SMALL and (value is not None or name in _ALWAYS):
            values[name] = SMALL[name]
    for name in kind.sub_configs:
        if name not in values and isinstance(value := getattr(default, name, None), PreTrainedConfig):
            values[name] = tiny_config(type(value))
    values |= _placeholders(default, names) | _patterns(default, names)
    if values.get("kv_lora_rank") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= FAMILIES.get(kind.model_type, {})
    return kind(**{n: v for n, v in values.items() if v is not ...})


def _placeholders(default: PreTrainedConfig, names: list[str]) -> dict[str, Any]:
    """Ids of images, sounds and the like, at the end of the small vocabulary."""
    found = [n for n in names if n.endswith(("_token_id", "_token_index")) and n not in SMALL]
    large = [n for n in found if isinstance(v := default.__dict__.get(n), int) and v >= VOCABULARY]
    return {n: VOCABULARY - 1 - i % PLACEHOLDERS for i, n in enumerate(large)}


def _patterns(default: PreTrainedConfig, names: list[str]) -> dict[str, Any]:
    """Per-layer lists, each kind of layer once at least, and the number of layers that takes."""
    found = {n: v for n in _PATTERNS if n in names and isinstance(v := default.__dict__.get(n), list) and v}
    distinct = {n: list(dict.fromkeys(v)) for n, v in found.items()}
    layers = max([2, *map(len, distinct.values())])
    values: dict[str, Any] = {n: ([SMALL.get(n, k) for k in v] * layers)[:layers] for n, v in distinct.items()}
    if found:
        values["num_hidden_layers"] = layers
    return values


def tiny_model(model_type: str, auto_class: Any) -> PreTrainedModel:
    """Build a tiny model of a family, in float32 and eval mode, without dropout.

    Args:
        model_type: key of transformers' configuration mapping.
        auto_class: AutoModelForCausalLM or AutoModelForSequenceClassification.

    Raises:
        Exception: whatever the family's own code raises where no tiny model can be built.
    """
    config = tiny_config(CONFIG_MAPPING[model_type])
    if auto_class is AutoModelForCausalLM:
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "is_decoder"):
                part.is_decoder = True
    else:
        config.num_labels = LABELS
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config)
    if model_type == "xmod":
        model.set_default_language(config.languages[0])
    return model.float().eval()
