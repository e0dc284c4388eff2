"""What a method is: an encoder of virtual tokens that knows no backbone."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import nn

from hf_ptune.shapes import check_shape


class PromptKind(Enum):
    """What an encoder returns: embeddings `[P, H]`, or the flat keys and values `[P, W]` of every site."""

    EMBEDDINGS = "embeddings"
    PREFIX = "prefix"


@dataclass(frozen=True)
class SiteShape:
    """Key and value geometry of one attention site: `K` heads, key width and value width per head."""

    heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


def split_prefix(flat: torch.Tensor, shapes: list[SiteShape]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut flat keys and values `[P, W]` into a pair `([K, P, D], [K, P, D])` per site, keys before values."""
    first = shapes[0]
    if first.key_dim == first.value_dim and all(s == first for s in shapes):
        # in one step, and one of backward, whatever the number of sites
        parts = flat.reshape(flat.shape[0], 2 * len(shapes), first.heads, first.key_dim).permute(1, 2, 0, 3).unbind()
    else:
        sizes = [(s.heads, d) for s in shapes for d in (s.key_dim, s.value_dim)]
        blocks = flat.split([heads * dim for heads, dim in sizes], dim=1)
        parts = tuple(b.unflatten(1, size).transpose(0, 1) for b, size in zip(blocks, sizes, strict=True))
    return list(zip(parts[::2], parts[1::2], strict=True))


def join_prefix(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Flatten a pair `([K, P, D], [K, P, D])` per site into `[P, W]`; the inverse of `split_prefix`."""
    blocks = [t.transpose(0, 1).flatten(1) for pair in pairs for t in pair]
    return torch.cat(blocks, dim=1)


@dataclass(frozen=True)
class EncoderSpec:
    """All that a method needs to build its encoder.

    Args:
        num_virtual_tokens: P, at least 1.
        embedding_dim: H, width of the backbone's input embeddings.
        prefix_width: W, width of one virtual token's keys and values over all sites.
        encoder_hidden_size: width inside the reparameterisation; `None` takes H.
        encoder_reparameterization_type: "MLP" or "LSTM" (P-Tuning only).
        encoder_num_layers: LSTM layers.
        encoder_dropout: inside the MLP of Prefix Tuning, or between the layers of an LSTM; 0 or more, less than 1.
    """

    num_virtual_tokens: int
    embedding_dim: int
    prefix_width: int
    encoder_hidden_size: int | None = None
    encoder_reparameterization_type: str = "MLP"
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0


class PromptEncoder(nn.Module, ABC):
    """Virtual tokens and, where the method has one, their reparameterisation."""

    kind: ClassVar[PromptKind]

    @abstractmethod
    def forward(self) -> torch.Tensor:
        """Encode the prompt once: `[P, H]` or `[P, W]`, never with a batch axis."""

    @property
    @abstractmethod
    def origin(self) -> torch.Tensor:
        """The tensor that a start is written to: the prompt itself, or what is added to a network's output."""

    def start_from(self, encoded: torch.Tensor) -> None:
        """Initialise so that `forward` starts at `encoded`, whatever a network in between adds by then."""
        origin, training = self.origin, self.training
        check_shape("the start of a prompt", encoded, origin.shape, "P N", "Give a start for every virtual token.")
        self.eval()
        with torch.no_grad():
            wanted = origin.copy_(encoded).clone()  # of the prompt's device and type
            origin.sub_(self() - wanted)
        self.train(training)


class DirectPrompt(PromptEncoder):
    """Virtual tokens without reparameterisation; also what every trained encoder is flattened into."""

    def __init__(self, num_virtual_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_virtual_tokens, width))

    def forward(self) -> torch.Tensor:
        return self.weight  # [P, H] or [P, W]

    @property
    def origin(self) -> torch.Tensor:
        return self.weight


class DirectEmbeddings(DirectPrompt):
    """Trainable embeddings `[P, H]`."""

    kind = PromptKind.EMBEDDINGS


class DirectPrefix(DirectPrompt):
    """Trainable keys and values `[P, W]`."""

    kind = PromptKind.PREFIX


def direct_prompt(kind: PromptKind, num_virtual_tokens: int, width: int) -> DirectPrompt:
    """A prompt of a kind without reparameterisation, at zero."""
    return (DirectEmbeddings if kind is PromptKind.EMBEDDINGS else DirectPrefix)(num_virtual_tokens, width)


def flatten(encoder: PromptEncoder) -> DirectPrompt:
    """Encode once and keep the result alone, for publishing and serving."""
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        encoded = encoder()
    encoder.train(was_training)
    direct = direct_prompt(encoder.kind, *encoded.shape).to(encoded)
    direct.start_from(encoded)
    return direct
