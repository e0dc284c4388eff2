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
    """Number of labels of a pass, as the Trainer counts them; `None` where it gets none.

    Args:
        inputs: of the pass, by name.
        shifted: whether the first label of a row does not count, as in causal models.
    """
    labels, moved = (inputs.get(name) for name in ("labels", "shift_labels"))
    if not isinstance(labels, Tensor):
        return None  # whoever took them away reckons by himself
    if isinstance(moved, Tensor):
        labels = moved
    elif shifted:
        labels = labels[..., 1:]
    return labels.ne(IGNORED).sum()


def with_share(output: Any, count: Tensor, items: Tensor | int) -> Any:
    """Turn the mean over a pass into its share of the whole batch's mean.

    Args:
        output: of the model, with the loss first.
        count: labels of the pass.
        items: labels of the whole batch.
    """
    loss: Tensor = output["loss"] if isinstance(output, ModelOutput) else output[0]
    count, whole = count.to(loss.device), torch.as_tensor(items, device=loss.device).clamp(min=1)
    share = count.to(torch.promote_types(loss.dtype, torch.float32)) / whole
    part = loss.masked_fill(count == 0, 0.0) * share  # the mean of nothing is no number
    if isinstance(output, ModelOutput):
        output["loss"] = part
        return output
    return (part, *output[1:])
