"""Prompt Tuning (Lester et al. 2021): trainable input embeddings, no reparameterisation."""

from hf_ptune.methods.base import DirectEmbeddings, EncoderSpec, PromptKind
from hf_ptune.methods.registry import Method, register_method


def build(spec: EncoderSpec) -> DirectEmbeddings:
    """Build the prompt `[P, H]` of Prompt Tuning (Lester et al. 2021, section 2).

    The paper draws random prompts uniformly from [-0.5, 0.5] because T5's embeddings are that large; here
    random prompts take the deviation of the backbone's own embeddings, or 1 where the module that holds these
    normalises them, as in BERT and its kin.
    """
    return DirectEmbeddings(spec.num_virtual_tokens, spec.embedding_dim)


PROMPT_TUNING = register_method(
    Method("prompt_tuning", "Prompt Tuning", "Lester et al. 2021, section 2", PromptKind.EMBEDDINGS, build)
)
