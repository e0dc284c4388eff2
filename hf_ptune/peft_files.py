"""Files of PEFT's folders: settings and tensors of a prompt, as they are read before there is a base."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from hf_ptune.adapter_file import read_tensors
from hf_ptune.errors import AdapterFileError, ConfigError

PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PICKLE_NAME = "adapter_model.bin"
PEFT_TYPES = {
    "prompt_tuning": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
    "prefix_tuning": "PREFIX_TUNING",
    "p_tuning_v2": "PREFIX_TUNING",
}
PEFT_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
NO_PREFIX = "PEFT puts a prefix into the decoder's own attention alone, and moves or biases positions there."


def find_file(source: str, name: str, hub: dict[str, Any]) -> str | None:
    """Path of a file of a folder or of the Hub; `None` where there is no such file."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{source} is no folder or Hub id that could be read ({error}).") from error


def read_settings(source: str, hub: dict[str, Any]) -> dict[str, Any]:
    """What an adapter's configuration says, its kind and task among it."""
    path = find_file(source, PEFT_CONFIG_NAME, hub)
    if path is None:
        raise AdapterFileError(f"{source} has no {PEFT_CONFIG_NAME}; expected an adapter that PEFT saved.")
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{path} holds a {type(settings).__name__}; expected an object.")
    return {"peft_type": None, "task_type": None} | settings


def method_of(settings: dict[str, Any], source: str) -> str:
    """Name of our method, once the settings have been found convertible."""
    kind, task, tokens = settings["peft_type"], settings["task_type"], settings.get("num_virtual_tokens")
    if kind not in PEFT_TYPES.values():
        raise ConfigError(f"{source} has peft_type={kind!r}; convertible are {', '.join(set(PEFT_TYPES.values()))}.")
    if task not in (*PEFT_TASKS, None):
        raise ConfigError(f"{source} has task_type={task!r}; expected one of {', '.join(PEFT_TASKS)}.")
    if type(tokens) is not int or tokens < 1:
        raise ConfigError(f"{source} has num_virtual_tokens={tokens!r}; expected a number of at least 1.")
    if kind == "PREFIX_TUNING" and (task == "SEQ_2_SEQ_LM" or settings.get("num_transformer_submodules") == 2):
        raise ConfigError(f"{source} cannot be converted to equal outputs: {NO_PREFIX}")
    if kind == "PREFIX_TUNING":
        return "prefix_tuning" if settings.get("prefix_projection") else "p_tuning_v2"
    return "prompt_tuning" if kind == "PROMPT_TUNING" else "p_tuning"


def read_file(path: str) -> dict[str, Tensor]:
    """Tensors of a file by name: safetensors, or a pickle of tensors alone."""
    if path.endswith(".safetensors"):
        return read_tensors(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read as a pickle of tensors alone ({error}).") from error
    if not isinstance(loaded, dict):
        raise AdapterFileError(f"{path} holds a {type(loaded).__name__}; expected tensors by name.")
    return check_finite(loaded, path)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same, once all are tensors of finite values."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise AdapterFileError(f"{source}: {name} is a {type(tensor).__name__}; expected a tensor.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{source}: {name} holds values that are not finite; the adapter is broken.")
    return dict(tensors)


def pop_prompt(tensors: dict[str, Tensor], settings: dict[str, Any], source: str) -> Tensor:
    """Take the prompt `[P, H]` or `[P, W]` out of a PEFT adapter's tensors."""
    prompt = tensors.pop("prompt_embeddings", None)
    if prompt is None:
        raise AdapterFileError(f"{source} holds no prompt_embeddings, but {sorted(tensors)[:5]}.")
    tokens: int = settings["num_virtual_tokens"]
    # an encoder-decoder's has rows for a decoder too, which its forward never reads
    parts = 2 if settings["task_type"] == "SEQ_2_SEQ_LM" and settings.get("num_transformer_submodules") != 1 else 1
    if prompt.dim() != 2 or prompt.shape[0] != tokens * parts:
        raise AdapterFileError(
            f"{source}: prompt_embeddings is {tuple(prompt.shape)}, expected ({tokens * parts}, any)."
        )
    return prompt[:tokens]
