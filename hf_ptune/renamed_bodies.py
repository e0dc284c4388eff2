"""Bases whose class calls the body otherwise than their checkpoints do, as those of Llama's kin that find answers."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from hf_ptune.errors import BackboneError


def mapping_of(backbone: PreTrainedModel, info: dict[str, Any]) -> dict[str, str] | None:
    """How names of a checkpoint become those of a base that has read nothing of its body.

    Args:
        backbone: as `from_pretrained` made it.
        info: what that says of missing and unexpected keys.

    Returns:
        `key_mapping` for `from_pretrained`, or `None` where the body has been read, or is not there by another name.
    """
    own, unexpected = f"{backbone.base_model_prefix}.", set(info["unexpected_keys"])
    body = {n.removeprefix(own) for n, _ in backbone.named_parameters() if n.startswith(own)}
    if not body or not {own + n for n in body} <= set(info["missing_keys"]):
        return None
    for other in sorted({n.split(".")[0] for n in unexpected}):
        if {f"{other}.{n}" for n in body} <= unexpected:
            return _mapping(other, own)
    return None


def check_read(backbone: PreTrainedModel) -> None:
    """Refuse a base in memory whose body is as it was drawn, while its checkpoint has it by another name.

    Args:
        backbone: what a prompt is about to be put into.

    Raises:
        BackboneError: it has read nothing of its body.
    """
    own, family = (c.__dict__.get("base_model_prefix") for c in (type(backbone), _family_of(backbone)))
    if own in (None, family) or not backbone.name_or_path:
        return
    there = [(n, p) for n, p in backbone.named_parameters() if p.numel() and not p.is_meta]  # not on a disk, or a rank
    body = [(n, p) for n, p in there if n.startswith(f"{own}.") and p.dim() == 1]
    drawn = next(((n.removeprefix(f"{own}."), p) for n, p in body if bool((p == 1).all())), None)  # a norm
    if drawn is None:
        return
    stored = _read(backbone, f"{family}.{drawn[0]}")
    if stored is not None and not bool((stored == 1).all()):
        name, base = type(backbone).__name__, backbone.name_or_path
        raise BackboneError(
            f"{name} has read nothing of {base}: the checkpoint calls its body {family!r}, the class {own!r}, so that "
            f"transformers has drawn it anew. Load it by from_pretrained({base!r}, "
            f"key_mapping={_mapping(str(family), f'{own}.')})."
        )


def _mapping(other: str, own: str) -> dict[str, str]:
    return {rf"^{re.escape(other)}\.": own}


def _family_of(backbone: PreTrainedModel) -> type:
    """The class of all models of the family, which says how their checkpoints call the body."""
    above = type(backbone).__mro__[1:]
    return next((c for c in above if issubclass(c, PreTrainedModel) and "config_class" in vars(c)), PreTrainedModel)


def _read(backbone: PreTrainedModel, name: str) -> torch.Tensor | None:
    """A tensor of a base's checkpoint that is on this machine; `None` where it cannot be read."""
    found = partial(
        cached_file,
        backbone.name_or_path,
        revision=getattr(backbone.config, "_commit_hash", None),
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
    )
    try:
        path = found(SAFE_WEIGHTS_NAME)
        if path is None and (index := found(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            path = found(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"][name])
        if path is None:
            return None
        with safe_open(path, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor
    except (OSError, ValueError, KeyError, SafetensorError):  # damaged, or without such a tensor
        return None
