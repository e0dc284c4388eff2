"""The only place where prompts meet a backbone."""

from hf_ptune.injection.calls import Slot, bind, cache_name, cache_of, parameters_of, this_thread, transformed
from hf_ptune.injection.embeddings import has_decoder, normalises_embeddings, word_embeddings
from hf_ptune.injection.head_window import HeadWindow, make_window, why_no_window
from hf_ptune.injection.injector import Injector
from hf_ptune.injection.layer_mix import ScalarMix, forget_captures, gives_layers, layers_of, restore_captures
from hf_ptune.injection.packed import keep_unpacked
from hf_ptune.injection.pooling import reads_first_token
from hf_ptune.injection.probe import (
    PROBE_TOKENS,
    body_of,
    complaint,
    device_of,
    evaluating,
    find_geometry,
    probing,
    text_of,
    trying,
)
from hf_ptune.injection.trials import embeddings_agree, prompts_agree

__all__ = [
    "PROBE_TOKENS",
    "HeadWindow",
    "Injector",
    "ScalarMix",
    "Slot",
    "bind",
    "body_of",
    "cache_name",
    "cache_of",
    "complaint",
    "device_of",
    "embeddings_agree",
    "evaluating",
    "find_geometry",
    "forget_captures",
    "gives_layers",
    "has_decoder",
    "keep_unpacked",
    "layers_of",
    "make_window",
    "normalises_embeddings",
    "parameters_of",
    "probing",
    "prompts_agree",
    "reads_first_token",
    "restore_captures",
    "text_of",
    "this_thread",
    "transformed",
    "trying",
    "why_no_window",
    "word_embeddings",
]
