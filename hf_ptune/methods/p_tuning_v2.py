"""P-Tuning v2 (Liu et al. 2022): keys and values of every layer, trained directly."""

from hf_ptune.methods.base import DirectPrefix, EncoderSpec, PromptKind
from hf_ptune.methods.registry import Method, register_method


def build(spec: EncoderSpec) -> DirectPrefix:
    """Build the deep prompt `[P, W]` of P-Tuning v2 (Liu et al. 2022, section 3).

    The paper leaves the reparameterisation optional; with one, the method here is `prefix_tuning`.
    """
    return DirectPrefix(spec.num_virtual_tokens, spec.prefix_width)


P_TUNING_V2 = register_method(
    Method("p_tuning_v2", "P-Tuning v2", "Liu et al. 2022, section 3", PromptKind.PREFIX, build)
)
