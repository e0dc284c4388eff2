"""Start a prompt at random, at zero, at the backbone's own embeddings, keys and values of tokens, or at an adapter."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_ptune.backbone import read_tokenizer
from hf_ptune.errors import BackboneError, ConfigError
from hf_ptune.injection import (
    PROBE_TOKENS,
    Injector,
    device_of,
    has_decoder,
    normalises_embeddings,
    probing,
    word_embeddings,
)
from hf_ptune.methods import PromptKind, get_method
from hf_ptune.methods.base import join_prefix
from hf_ptune.methods.initializers import fit_length, random_like, sample_vocabulary
from hf_ptune.prompt_transfer import transfer

logger = logging.get_logger(__name__)
_SAMPLED = 4096  # tokens whose embeddings tell the deviation of all
_SAMPLE = 64  # tokens whose keys and values say how those of a random prefix are distributed


def initialise(model: Any, tokenizer: Any = None) -> None:
    """Set the prompt of a freshly wrapped model as its configuration asks.

    Args:
        model: a wrapped model.
        tokenizer: reads text and labels; loaded from the base when unset.

    Raises:
        ConfigError: a text or label start without a tokenizer or labels, or an adapter that does not fit.
        BackboneError: an adapter of another base, or a base that does not say how many tokens it knows.
        AdapterFileError: an adapter's folder does not hold what its configuration describes.
    """
    config, prompt, injector = model.config, model.prompt, model._injector
    if prompt is None:
        return
    kind, start = prompt.kind, config.prompt_tuning_init
    virtual = config.num_virtual_tokens
    if start == "ADAPTER":
        transfer(model, config.prompt_tuning_init_adapter)
        return
    if start == "RANDOM" and get_method(config.method).reparameterised:
        return
    with torch.no_grad():
        if start == "ZERO":
            encoded = torch.zeros_like(prompt())
        elif start == "RANDOM":
            encoded = _random(model, injector, kind, virtual)
        else:
            rows = _token_rows(model, start, virtual, tokenizer)
            if kind is PromptKind.EMBEDDINGS:
                encoded = _embed(injector, rows)
            else:
                encoded = join_prefix(_keys_of(injector, [row[0] for row in rows]))
        prompt.start_from(encoded)


def _random(model: Any, injector: Injector, kind: PromptKind, virtual: int) -> Tensor:
    if kind is PromptKind.EMBEDDINGS:
        sample = embedding_sample(injector)
        if normalises_embeddings(injector.body):
            # their size is lost there, and a larger start holds its direction at larger learning rates
            return torch.randn(virtual, sample.shape[1], device=sample.device)
        return random_like(sample, virtual)
    longest = getattr(model.backbone.config.get_text_config(), "max_position_embeddings", None) or 2 * _SAMPLE
    ids = sample_vocabulary(vocabulary_size(model.backbone), max(PROBE_TOKENS, min(_SAMPLE, longest // 2)))
    pairs = _keys_of(injector, ids)
    # channel by channel: a few are many times larger than all others, and draws as large everywhere drown the tokens
    draws = [
        t.float().mean(1, keepdim=True)
        + t.float().std(1, keepdim=True) * torch.randn(t.shape[0], virtual, t.shape[2], device=t.device)
        for pair in pairs
        for t in pair
    ]
    return join_prefix([(draws[i], draws[i + 1]) for i in range(0, len(draws), 2)])


def _keys_of(injector: Injector, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The backbone's own keys and values `[K, P, D]` of P tokens, at every site."""
    body = injector.body
    tokens = torch.tensor([ids], device=device_of(body))
    inputs = {"input_ids": tokens}
    if has_decoder(body):
        inputs["decoder_input_ids"] = tokens
    with probing(body):
        return injector.record(inputs)


def _embed(injector: Injector, rows: list[list[int]]) -> Tensor:
    """Embeddings `[P, H]`; several ids in a row are averaged."""
    device = device_of(injector.words())
    return torch.stack([injector.embedded(torch.tensor([row], device=device))[0].float().mean(0) for row in rows])


def _token_rows(model: Any, start: str, virtual: int, tokenizer: Any) -> list[list[int]]:
    """Token ids behind every virtual token; a label of several tokens keeps them together."""
    size = vocabulary_size(model.backbone)
    if start == "SAMPLE_VOCAB":
        return [[i] for i in sample_vocabulary(size, virtual, tokenizer)]
    tokenizer = tokenizer or base_tokenizer(model.config)
    if start == "TEXT":
        text = model.config.prompt_tuning_init_text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(f"prompt_tuning_init_text={text!r} has no token to start from; give a text of words.")
        return [[i] for i in fit_length(ids, virtual)]
    labels = model.config.id2label
    if not labels or all(str(v).startswith("LABEL_") for v in labels.values()):
        raise ConfigError(
            f"prompt_tuning_init='CLASS_LABELS' needs named labels; found {labels}. Load the backbone with id2label."
        )
    rows = [tokenizer(str(v), add_special_tokens=False)["input_ids"] for v in labels.values()][:virtual]
    if not all(rows):
        raise ConfigError(
            f"prompt_tuning_init='CLASS_LABELS' needs labels that have tokens; found {labels}. Load the backbone with "
            "an id2label of words."
        )
    return rows + [[i] for i in sample_vocabulary(size, virtual, tokenizer)][: virtual - len(rows)]


def base_tokenizer(config: Any) -> Any:
    """The tokenizer of the base that a configuration names.

    Raises:
        ConfigError: it names none, or none is there.
    """
    if config.base_model_name_or_path is None:
        raise ConfigError(
            "a start from text or labels, and a template, need tokenizer=…: the backbone does not name its base."
        )
    try:
        return read_tokenizer(config.base_model_name_or_path, config.base_model_revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer was found beside the base {config.base_model_name_or_path!r} ({error}); pass tokenizer=…"
        ) from error


def embedding_sample(injector: Injector) -> Tensor:
    """Input embeddings `[M, H]` of the first tokens of the vocabulary."""
    size = vocabulary_size(injector.backbone)
    ids = torch.arange(min(size, _SAMPLED), device=device_of(injector.words()))
    with torch.no_grad():
        return injector.embedded(ids[None])[0].float()


def vocabulary_size(backbone: PreTrainedModel) -> int:
    """Number of tokens that the input embeddings know."""
    words = word_embeddings(backbone)
    if words is None:
        return 128  # such families take characters
    known = getattr(words, "num_embeddings", None), getattr(backbone.config.get_text_config(), "vocab_size", None)
    size = next((n for n in known if isinstance(n, int)), None)
    if size is None:
        raise BackboneError(f"{type(backbone).__name__} does not say how many tokens its embeddings know.")
    return size
