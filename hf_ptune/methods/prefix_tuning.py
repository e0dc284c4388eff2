"""Prefix Tuning (Li & Liang 2021): keys and values of every layer behind an MLP."""

import torch
from torch import nn

from hf_ptune.methods.base import EncoderSpec, PromptEncoder, PromptKind
from hf_ptune.methods.registry import Method, register_method


class PrefixMLP(PromptEncoder):
    """Trainable embeddings `[P, H]` through a two-layer MLP into the keys and values `[P, W]`."""

    kind = PromptKind.PREFIX

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        hidden = spec.encoder_hidden_size or spec.embedding_dim
        self.embedding = nn.Embedding(spec.num_virtual_tokens, spec.embedding_dim)
        self.mlp = nn.Sequential(
            nn.Linear(spec.embedding_dim, hidden),
            nn.Tanh(),
            nn.Dropout(spec.encoder_dropout),
            nn.Linear(hidden, spec.prefix_width),
        )
        self.register_buffer("offset", torch.zeros(spec.num_virtual_tokens, spec.prefix_width))
        self.offset: torch.Tensor

    def forward(self) -> torch.Tensor:
        return self.mlp(self.embedding.weight) + self.offset  # [P, W]

    @property
    def origin(self) -> torch.Tensor:
        return self.offset


def build(spec: EncoderSpec) -> PrefixMLP:
    """Build the reparameterised prefix of Prefix Tuning (Li & Liang 2021, section 4.3).

    Where the prefix starts from a text's own keys and values, what the MLP lacks of them at first is added to its
    output, as a constant; the paper initialises without the MLP in that case.
    """
    return PrefixMLP(spec)


PREFIX_TUNING = register_method(
    Method("prefix_tuning", "Prefix Tuning", "Li & Liang 2021, section 4", PromptKind.PREFIX, build, True)
)
