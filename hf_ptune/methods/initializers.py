"""Where a prompt starts: random with a backbone's own deviation, or at given tokens."""

from typing import Any

import torch
from torch import Tensor

_COMMON = 5000


def random_like(sample: Tensor, num_virtual_tokens: int) -> Tensor:
    """Draw `[P, N]` with the deviation of a sample `[M, N]`; the mean stays 0 (Lester et al. 2021, section 3.2).

    The paper's uniform range fits T5 alone: a deviation of 1 against embeddings of 0.02 does not converge.
    """
    spread = sample.float().std()
    return torch.randn(num_virtual_tokens, sample.shape[1], device=sample.device) * spread


def fit_length(ids: list[int], num_virtual_tokens: int) -> list[int]:
    """Repeat or cut token ids to P, as the prompt's length asks."""
    return (ids * (num_virtual_tokens // len(ids) + 1))[:num_virtual_tokens]


def sample_vocabulary(vocab_size: int, num_virtual_tokens: int, tokenizer: Any = None) -> list[int]:
    """Draw P token ids, without repeats where the vocabulary allows (Lester et al. 2021, section 3.2).

    The paper draws from the 5,000 most common tokens; low ids are those in most vocabularies, once a tokenizer has
    told which of them are special or stand for no text (`[unused7]`).
    """
    pool = list(range(min(vocab_size, _COMMON)))
    if tokenizer is not None:
        first = range(min(vocab_size, len(tokenizer), 2 * _COMMON))
        special = set(tokenizer.all_special_ids)
        tokens = tokenizer.convert_ids_to_tokens(list(first))
        ordinary = [i for i, t in zip(first, tokens, strict=True) if t and i not in special and t[:7] != "[unused"]
        pool = ordinary[:_COMMON] or pool
    if len(pool) >= num_virtual_tokens:
        return [pool[i] for i in torch.randperm(len(pool))[:num_virtual_tokens]]
    return [pool[i] for i in torch.randint(len(pool), (num_virtual_tokens,))]
