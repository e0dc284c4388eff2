"""Weights in 4 bit that a CPU packs for inference, through which no gradient comes."""

from typing import Any

from torch import nn

_PACKS = "support_avx512bf16_for_cpu"  # on bitsandbytes' layers: whether they pack, in eval mode, and for good


def keep_unpacked(backbone: nn.Module) -> None:
    """Let bitsandbytes' layers keep weights that a prompt can be trained through, and unpack those that are packed.

    On CPUs that multiply in bfloat16 the first pass in eval mode packs them for a kernel without a gradient; training
    goes on with that, and leaves whatever comes before the layer without one.

    Args:
        backbone: about to be run or wrapped.
    """
    for module in backbone.modules():
        if getattr(module, _PACKS, False):
            setattr(module, _PACKS, False)
        weight: Any = getattr(module, "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            if state.absmax.dim() == 2:  # [K / block, N], which the inverse leaves as packing had it
                state.absmax = state.absmax.T.reshape(-1).float()
            weight.quant_state = state
