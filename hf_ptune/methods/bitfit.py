"""BitFit (Ben Zaken et al. 2022): the backbone's own bias terms are trained, nothing is added."""

from collections.abc import Iterable

from torch import nn

from hf_ptune.methods.registry import Method, register_method

BITFIT = register_method(Method("bitfit", "BitFit", "Ben Zaken et al. 2022, section 3", None, None))


def bias_names(backbone: nn.Module) -> Iterable[str]:
    """Names of the bias terms of a backbone, layer norms included (Ben Zaken et al. 2022, section 3)."""
    for name, _ in backbone.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last == "bias" or last.endswith("_bias") or last in ("bias_ih_l0", "bias_hh_l0"):
            yield name
