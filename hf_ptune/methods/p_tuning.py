"""P-Tuning (Liu et al. 2021): input embeddings behind a prompt encoder, MLP or BiLSTM with MLP."""

import torch
from torch import nn

from hf_ptune.methods.base import EncoderSpec, PromptEncoder, PromptKind
from hf_ptune.methods.registry import Method, register_method


class PromptEncoderMLP(PromptEncoder):
    """Trainable embeddings `[P, H]` through three linear layers with ReLU between them."""

    kind = PromptKind.EMBEDDINGS

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        hidden = spec.encoder_hidden_size or spec.embedding_dim
        self.embedding = nn.Embedding(spec.num_virtual_tokens, spec.embedding_dim)
        self.mlp = nn.Sequential(
            nn.Linear(spec.embedding_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, spec.embedding_dim),
        )
        self.register_buffer("offset", torch.zeros(spec.num_virtual_tokens, spec.embedding_dim))
        self.offset: torch.Tensor

    def network(self) -> torch.Tensor:
        return self.mlp(self.embedding.weight)  # [P, H]

    def forward(self) -> torch.Tensor:
        return self.network() + self.offset

    @property
    def origin(self) -> torch.Tensor:
        return self.offset


class PromptEncoderLSTM(PromptEncoderMLP):
    """Trainable embeddings `[P, H]` through a bidirectional LSTM and two linear layers."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        hidden = spec.encoder_hidden_size or spec.embedding_dim
        self.lstm = nn.LSTM(
            spec.embedding_dim,
            hidden,
            num_layers=spec.encoder_num_layers,
            dropout=spec.encoder_dropout if spec.encoder_num_layers > 1 else 0.0,
            bidirectional=True,
            batch_first=True,
        )
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, spec.embedding_dim)
        )

    def network(self) -> torch.Tensor:
        return self.mlp(self.lstm(self.embedding.weight[None])[0])[0]  # [P, H]


def build(spec: EncoderSpec) -> PromptEncoder:
    """Build the prompt encoder of P-Tuning (Liu et al. 2021, section 3.2).

    The paper's encoder is the LSTM; the MLP is its released code's alternative. Where an initial prompt is
    asked for, training starts from it: what the network lacks of it at first is added to its output, as a constant.
    """
    if spec.encoder_reparameterization_type == "LSTM":
        return PromptEncoderLSTM(spec)
    return PromptEncoderMLP(spec)


P_TUNING = register_method(
    Method("p_tuning", "P-Tuning", "Liu et al. 2021, section 3.2", PromptKind.EMBEDDINGS, build, True)
)
