"""One room per method; importing the package registers them all."""

from hf_ptune.methods import bitfit, p_tuning, p_tuning_v2, prefix_tuning, prompt_tuning
from hf_ptune.methods.base import PromptKind
from hf_ptune.methods.registry import Method, get_method, method_names

__all__ = [
    "Method",
    "PromptKind",
    "bitfit",
    "get_method",
    "method_names",
    "p_tuning",
    "p_tuning_v2",
    "prefix_tuning",
    "prompt_tuning",
]
