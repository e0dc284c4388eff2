"""BitFit (Ben Zaken et al. 2022): the backbone's own bias terms are trained, nothing is added."""

from torch import nn

from hf_ptune.errors import BackboneError
from hf_ptune.methods.registry import Method, register_method

_RECURRENT = ("bias_ih_l0", "bias_hh_l0")


def bias_names(backbone: nn.Module) -> set[str]:
    """Names of the bias terms of a backbone, layer norms included (Ben Zaken et al. 2022, section 3).

    Raises:
        BackboneError: it has none.
    """
    lasts = {name: name.rsplit(".", 1)[-1] for name, _ in backbone.named_parameters()}
    names = {n for n, last in lasts.items() if last == "bias" or last.endswith("_bias") or last in _RECURRENT}
    if not names:
        raise BackboneError(
            f"{type(backbone).__name__} has no bias terms for bitfit to train. "
            "Methods that work there: p_tuning_v2, prefix_tuning, p_tuning, prompt_tuning."
        )
    return names


BITFIT = register_method(Method("bitfit", "BitFit", "Ben Zaken et al. 2022, section 3", None, None, of_base=bias_names))
