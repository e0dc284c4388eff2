"""Passes over a few tokens that try whether a backbone takes a prompt as the same embeddings before a text."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hf_ptune.errors import InjectionError
from hf_ptune.injection.calls import parameters_of
from hf_ptune.injection.positions import follow_length, of_text_alone
from hf_ptune.injection.probe import (
    PROBE_TOKENS,
    close,
    device_of,
    probing,
    sparse_as_it_was,
    trying,
    vocabulary_of,
)


def prompts_agree(injector: Any) -> bool:
    """Whether a prompt given as a prefix answers as the same embeddings before the tokens would.

    It does not where a layer carries more from token to token than keys and values: a recurrent or
    convolutional state, sinks of its own, positions that cannot be moved.
    """
    words = injector.words()
    ids = torch.tensor([[11, 18, 25]], device=device_of(words)) % vocabulary_of(injector.body)
    kept = injector.encode, injector.num_virtual_tokens
    try:
        # families that need input_ids refuse embeddings
        with trying(), probing(injector.body), of_text_alone(injector.counters), torch.no_grad():
            embeds = words(ids)
            embeds = torch.cat([embeds[:, :1] / 2, embeds[:, 1:]], 1)  # as a prompt, no token's embedding
            injector.fill(None)
            with injector.busy.here():
                expected = _states(injector, embeds)[:, 1:]
            injector.encode, injector.num_virtual_tokens = lambda: embeds[0, :1], 1
            injector.kept.forget()
            found = _states(injector, embeds[:, 1:])
            return close(found, expected, injector.backbone.dtype)
    finally:
        injector.kept.forget()
        injector.encode, injector.num_virtual_tokens = kept
    return False


def embeddings_agree(injector: Any) -> bool:
    """Whether an encoder that is given the embeddings of a text, with no prompt among them, answers as it does to ids.

    It does not where it does more to ids than look them up: scales by what it counts of them, or norms and positions
    that it leaves out for embeddings.
    """
    inputs, answers = injector.inputs, []
    device = device_of(injector.words())
    ids = (torch.arange(PROBE_TOKENS, device=device) * 7 + 11)[None] % vocabulary_of(injector.body)
    with (
        injector.busy.here(),
        trying(InjectionError),
        probing(inputs.encoder),
        sparse_as_it_was(inputs.encoder),
        torch.no_grad(),
    ):
        no_prompt = injector.encode()[:0]
        for given in (False, True):
            named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            named = {k: v for k, v in named.items() if k == "input_ids" or k in inputs.accepted}
            with torch.random.fork_rng(devices=[]):  # the same for both, for families that draw
                answers.append(inputs.encoder(**(inputs.insert(no_prompt, named) if given else named))[0].float())
        return close(answers[1], answers[0], injector.backbone.dtype)
    return False


def _states(injector: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Last states of `[1, S, H]`; where attention is causal by a mask alone, a pad behind them asks for one."""
    body = injector.body
    causal = all(getattr(body.get_submodule(site.name), "is_causal", True) for site in injector.sites)
    if causal or "attention_mask" not in parameters_of(body):
        return torch.as_tensor(body(inputs_embeds=embeds)[0]).float()
    mask = torch.tensor([[1] * embeds.shape[1] + [0]], device=embeds.device)
    states = body(inputs_embeds=torch.cat([embeds, embeds[:, :1]], 1), attention_mask=mask)[0]
    return torch.as_tensor(states[:, :-1]).float()


def joining_agrees(injector: Any) -> bool:
    """Whether prompt and rows in one sequence answer as the prompt shared as a prefix does."""
    if follow_length(injector.body):  # a prompt by itself is shorter than with the rows
        return False
    chunked = getattr(injector.body.config.get_text_config(), "attention_chunk_size", None)
    if (
        chunked  # by the pads of each row, of which one sequence has but its own: a device would not survive the others
        or not injector.shift
        or "position_ids" not in parameters_of(injector.body)
    ):
        return False
    ids = torch.tensor([[11, 18, 25, 7], [3, 12, 9, 5]], device=device_of(injector.words()))
    inputs = {
        "input_ids": ids % vocabulary_of(injector.body),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=ids.device),
    }
    with probing(injector.kept.prompt), torch.no_grad():
        encode, encoded = injector.encode, injector.encode()
    injector.encode = lambda: encoded
    answers = []
    injector.trying = True
    try:
        # layers that look into their mask, or that mix tokens by themselves, refuse it
        with trying(InjectionError), probing(injector.body), saved_tensors_hooks(_itself, _itself):
            for injector.joins in (False, True):
                output = injector.body(**inputs)
                answers.append(output[0].detach().float()[inputs["attention_mask"].bool()])
            return close(answers[0], answers[1], injector.backbone.dtype)
    finally:
        injector.encode, injector.joins, injector.trying = encode, None, False
    return False


def _itself(saved: Tensor) -> Tensor:
    """Keep a saved tensor as it is: a checkpoint around the pass that is being tried would count it as its own."""
    return saved
