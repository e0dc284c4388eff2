"""Trained word embeddings in PEFT's folders: beside the base's own as a copy, or in their place."""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ptune.errors import ConfigError


def shared_names(backbone: PreTrainedModel, reads_words: bool) -> list[list[str]]:
    """Names of each weight that a copy cannot stand for, since PEFT goes on to read the base's own beside it.

    Args:
        backbone: the task model.
        reads_words: whether the prompt stands among the inputs: PEFT looks its neighbours up in the base's own table.

    Returns:
        One list a weight, that of `named_parameters()` first: tied ones, and the table of words where it is read.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    table = id(getattr(backbone.get_input_embeddings(), "weight", None)) if reads_words else None
    return [names for key, names in groups.items() if len(names) > 1 or key == table]


def settle(
    kept: dict[str, Tensor],
    backbone: PreTrainedModel,
    copied: Collection[str],
    reads_words: bool,
    source: str,
    looked_up: Tensor | None = None,
) -> dict[str, Tensor]:
    """Give each weight that PEFT reads in several places one name, where all of them hold the same.

    Args:
        kept: what the adapter keeps of the base, by name.
        backbone: the task model.
        copied: ends of the names of modules that PEFT copies, its `modules_to_save`; others are written into the base.
        reads_words: as for `shared_names`.
        source: of the adapter, for messages.
        looked_up: the table of words that PEFT has a copy of besides, and reads beside a prompt among the inputs.

    Raises:
        ConfigError: they hold different values, so that no one weight could answer alike.
    """
    kept = dict(kept)
    for names in shared_names(backbone, reads_words):
        own = backbone.get_parameter(names[0]).detach()
        found = {n: kept.pop(n).to(own) for n in names if n in kept}
        if not found:
            continue
        if strange := [t for t in found.values() if t.shape != own.shape]:
            kept[names[0]] = strange[0]  # refused later, as all shapes are
            continue
        written = next((t for n, t in found.items() if not _is_in(n, copied)), own)
        read = [t if _is_in(n, copied) else written for n, t in found.items()]
        if len(found) < len(names) or reads_words:
            read.append(written)
        if reads_words and looked_up is not None:
            read.append(looked_up.to(own))
        if not all(t.shape == own.shape and torch.equal(read[0], t) for t in read):
            raise ConfigError(
                f"{source} has a trained copy of {next(iter(found))} (modules_to_save), and PEFT goes on to read the "
                f"base's own beside it: {type(backbone).__name__} has one weight for both, so that outputs could not "
                "be equal. Train without it in modules_to_save."
            )
        kept[names[0]] = read[0]
    return kept


def _is_in(name: str, modules: Collection[str]) -> bool:
    """Whether a parameter is in one of the modules, named by the ends of their paths as PEFT does."""
    parts = name.split(".")
    return any(".".join(parts[:k]).endswith(m) for k in range(1, len(parts)) for m in modules)
