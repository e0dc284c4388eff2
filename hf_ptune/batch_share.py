"""The share that one pass has in the loss of a batch, which the Trainer runs in several passes or on several devices.

The Trainer tells a model how many labels the whole batch has, and leaves the division to it. Most task models of
transformers give the mean over their own pass all the same, so that loss and gradients would grow with the passes
(https://github.com/huggingface/transformers/issues/47688).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_ptune.cross_entropy import IGNORED


def count_labels(inputs: dict[str, Any], shifted: bool) -> Tensor | None:
    """Number of labels of a pass, as the Trainer counts them; `None` where there are none to take a mean over.

    Args:
        inputs: of the pass, by name.
        shifted: whether the first label of a row is never predicted.
    """
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and shifted:
            labels = labels[..., 1:]
    if not isinstance(labels, Tensor):
        return None
    count = labels.ne(IGNORED).sum()
    # one label a row is there by itself, and looking would wait for the device
    return count if labels.dim() == 1 or bool(count) else None


def with_share(output: Any, count: Tensor, items: Tensor | int) -> Any:
    """Turn the mean over a pass into its share of the whole batch's mean.

    Args:
        output: of the model, with the loss first.
        count: labels of the pass.
        items: labels of the whole batch.
    """
    loss: Tensor = output["loss"] if isinstance(output, ModelOutput) else output[0]
    part = loss * count.to(loss.device) / torch.as_tensor(items, device=loss.device)
    if isinstance(output, ModelOutput):
        output["loss"] = part
        return output
    return (part, *output[1:])
