"""BitFit (Ben Zaken et al. 2022): the backbone's own bias terms are trained, nothing is added."""

from torch import nn

from hf_ptune.methods.registry import Method, register_method

_RECURRENT = ("bias_ih_l0", "bias_hh_l0")


def bias_names(backbone: nn.Module) -> set[str]:
    """Names of the bias terms of a backbone, layer norms included (Ben Zaken et al. 2022, section 3)."""
    lasts = {name: name.rsplit(".", 1)[-1] for name, _ in backbone.named_parameters()}
    return {n for n, last in lasts.items() if last == "bias" or last.endswith("_bias") or last in _RECURRENT}


BITFIT = register_method(Method("bitfit", "BitFit", "Ben Zaken et al. 2022, section 3", None, None, of_base=bias_names))
