"""Logits of a language model at one position a row: the projection to the vocabulary sees no other."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.errors import PTuneError
from hf_ptune.injection import this_thread

TASKS = ("CAUSAL_LM", "MASKED_LM")


def run_with_logits_at(backbone: PreTrainedModel, task: str, places: Tensor, kwargs: dict[str, Any]) -> Any:
    """Run a language model, and project one position of each row alone.

    Args:
        backbone: the language model.
        task: a key of `backbone.TASKS`.
        places: `[B]`, the positions.
        kwargs: of the backbone's forward, `input_ids` `[B, S]` among them.

    Returns:
        The backbone's output with logits `[B, 1, V]`.

    Raises:
        PTuneError: no language model, or labels, which are for all positions.
    """
    if task not in TASKS:
        raise PTuneError(f"logits_at is for {' and '.join(TASKS)}; the model does {task}.")
    if kwargs.get("labels") is not None:
        raise PTuneError(
            "labels came with logits_at, but they are for all positions. Compute the loss from the logits: "
            "Trainer(compute_loss_func=...)."
        )
    shape, thread = kwargs["input_ids"].shape, this_thread()

    def gather(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if this_thread() != thread or not args or args[0].shape[:-1] != shape:
            return None
        return _at(args[0], places), *args[1:]

    head: nn.Module | None = backbone.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(gather)
    try:
        output = backbone(**kwargs)
    finally:
        if handle is not None:
            handle.remove()
    if output.logits.shape[1] == shape[1]:  # a family that projects in another way
        output.logits = _at(output.logits, places)
    return output


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """`[B, S, N]` to `[B, 1, N]`."""
    index = places.to(tensor.device)[:, None, None].expand(-1, 1, tensor.shape[-1])
    return torch.gather(tensor, 1, index)
