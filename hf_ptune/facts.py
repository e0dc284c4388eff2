"""What is known of a wrapped model, and of the run that it comes from."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from hf_ptune.adapter_file import find_weights, read_tensors
from hf_ptune.backbone import count_parameter
from hf_ptune.cards import FACTS_NAME, RunFacts
from hf_ptune.errors import PTuneError
from hf_ptune.methods import get_method
from hf_ptune.option_checks import READINGS

SOURCE = "_ptune_source"  # on a wrapped model: what it was loaded from, and with which options of the Hub
RUN = "_ptune_facts"  # on a wrapped model: what is known of the training that it comes from


def facts_of(
    model: Any,
    folder: str | os.PathLike[str] | None = None,
    state_dict: dict[str, Tensor] | None = None,
    token: str | bool | None = None,
) -> RunFacts:
    """What is known of the run that a model comes from, and what the model tells of itself.

    Args:
        model: a wrapped model; `ModelCardCallback` leaves the facts of its training there.
        folder: may hold the facts of a run.
        state_dict: see `finish_folder`.
        token: for where the model was loaded from.
    """
    if folder is not None and (Path(folder) / FACTS_NAME).is_file():
        return RunFacts.load(Path(folder))
    own = model_facts(model)
    run = model.__dict__.get(RUN) or _facts_of_source(model, state_dict, token)
    if run is None:
        return own
    names = ("method", "task", "options", "parameters", "all_parameters", "base_bytes", "base_parameters")
    told = {name: getattr(own, name) for name in names}
    return replace(run, base=own.base or run.base, base_revision=own.base_revision or run.base_revision, **told)


def model_facts(model: Any) -> RunFacts:
    """What a model tells of itself, without a run.

    Args:
        model: a wrapped model.
    """
    config = model.config
    names = model.adapter_parameter_names()
    own = {id(p): p for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    base = config.base_model_name_or_path
    return RunFacts(
        method=config.method,
        task=type(model).task,
        base=None if base is None or is_local(base) else base,
        base_revision=config.base_model_revision,
        options=method_options(config),
        parameters=sum(count_parameter(p) for p in own.values()),
        all_parameters=model.get_nb_trainable_parameters()[1],
        base_parameters=sum(count_parameter(p) for p in model.backbone.parameters()),
        base_bytes=sum(
            (p.numel() or getattr(p, "ds_numel", 0)) * p.element_size() for p in model.backbone.parameters()
        ),
    )


def _facts_of_source(model: Any, state_dict: dict[str, Tensor] | None, token: str | bool | None) -> RunFacts | None:
    """The facts kept where a model was loaded from, as long as it is still that model."""
    source, hub = source_of(model, token)
    if source is None:
        return None
    try:
        path = cached_file(source, FACTS_NAME, _raise_exceptions_for_missing_entries=False, **hub)
        if path is None:
            return None
        facts, loaded = RunFacts.load(Path(path).parent), read_tensors(find_weights(source, **hub))
    except (OSError, ValueError, PTuneError):
        return None
    here = model.adapter_state_dict() if state_dict is None else state_dict
    same = (
        facts.task == type(model).task
        and loaded.keys() == here.keys()
        and all(torch.equal(loaded[n].to(t.dtype), t.cpu()) for n, t in here.items())
    )
    return facts if same else None


def method_options(config: Any) -> dict[str, Any]:
    """The options of a method that differ from what they are unset."""
    unset = type(config)(method=config.method)
    prompted = get_method(config.method).kind is not None
    names = ["num_virtual_tokens", "prompt_tuning_init"] if prompted else []
    names += [
        "prompt_tuning_init_text",
        "prompt_tuning_init_head",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
        "prefix_dropout",
        "layers",
        "sites",
        "backbone_dropout",
        "modules_to_save",
        "train_backbone",
        "template",
        "verbalizer",
    ]
    found = {name: getattr(config, name) for name in names}
    start = config.prompt_tuning_init_adapter
    if start is not None:  # where a folder lies on one machine is of no use to others
        found["prompt_tuning_init_adapter"] = Path(start).name if is_local(start) else start
    # what is unset has become one of two
    found |= {name: other for name, (_, other) in READINGS.items() if getattr(config, name) == other}
    return {k: v for k, v in found.items() if k == "num_virtual_tokens" or v != getattr(unset, k)}


def source_of(model: Any, token: str | bool | None) -> tuple[str | None, dict[str, Any]]:
    """Folder or Hub id that a model was loaded from, if it was, and how to read there."""
    source, hub = model.__dict__.get(SOURCE) or (None, {})
    return source, {k: v for k, v in (hub | {"token": token}).items() if v is not None}


def is_local(base: str) -> bool:
    """Whether a base's name is a folder of this machine."""
    return os.path.isabs(base) or base.startswith((".", "~")) or os.path.isdir(base)
