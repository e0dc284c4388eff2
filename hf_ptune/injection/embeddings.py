"""Route 3: prompts among the input embeddings of bidirectional encoders.

Virtual tokens of an encoder attend to the sample, so they run with every row. They stand after the first token,
where [CLS] pooling does not meet them, and leave the encoder's outputs before a head sees them. The encoder of an
encoder-decoder takes them at the front, and its decoder goes on seeing them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ptune.errors import InjectionError
from hf_ptune.injection.calls import parameters_of

_LENGTHENED = {"attention_mask", "token_type_ids", "position_ids"}
# of sequences beside the text, or of layers and heads
_OF_OTHERS = ("encoder_", "entity_", "visual_", "pixel_", "image", "head_mask")


class InputPrompt:
    """Insert the prompt `[P, H]` into the inputs of one encoder and cut it from its outputs.

    Args:
        encoder: the module whose forward takes `input_ids` or `inputs_embeds`.
        embed: the word embeddings.
        index: number of own tokens before the prompt.
    """

    def __init__(self, encoder: nn.Module, embed: nn.Module, index: int) -> None:
        self.encoder = encoder
        self.embed = embed
        self.index = index
        self.accepted = parameters_of(encoder)
        # Marian and its kin scale what they embed themselves, and no embeddings that they are given
        scale = getattr(encoder, "embed_scale", None)
        self.scale = float(scale) if isinstance(scale, (int, float)) else 1.0

    def embedded(self, ids: Tensor) -> Tensor:
        """Embeddings as the encoder has them behind its own look-up `[..., H]`."""
        found: Tensor = self.embed(ids)
        return found if self.scale == 1.0 else found * self.scale

    def insert(self, prompt: Tensor, named: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the named arguments of a call so that every row holds the prompt."""
        ids, embeds = named.pop("input_ids", None), named.pop("inputs_embeds", None)
        if embeds is None:
            if ids is None:
                raise InjectionError("neither input_ids nor inputs_embeds were given; pass one of them.")
            embeds = self.embedded(ids)
        batch, length = embeds.shape[:2]
        prompt = prompt.to(embeds.device, embeds.dtype)
        virtual = prompt.shape[0]
        mask = named.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise InjectionError(
                f"attention_mask has {mask.dim()} axes; a prompt among the inputs of an encoder needs [B, S]."
            )
        read = {name: given for name, given in named.items() if name in self.accepted}
        _check_lengthened(self.encoder, read, embeds)
        at = self.places(mask, batch, embeds.device)
        rows = prompt[None].expand(batch, -1, -1)
        positions = self._positions(ids, named, batch, length, embeds.device)
        named["inputs_embeds"] = splice(embeds, rows, at)
        if mask is None and ids is not None and "lengths" in self.accepted and named.get("lengths") is None:
            pad: Any = self.encoder.pad_index
            named["lengths"] = ids.ne(pad).sum(1)  # as XLM and Flaubert count them of ids that have no mask
        if mask is not None:
            named["attention_mask"] = splice(mask, mask.new_ones(batch, virtual), at)
        types = named.get("token_type_ids")
        table = getattr(self.encoder, "embeddings", None)
        if types is None and "token_type_ids" in self.accepted and hasattr(table, "token_type_ids"):
            # ConvBERT has as many of its own as it has positions
            types = torch.zeros(batch, length, dtype=torch.long, device=embeds.device)
        if types is not None:
            named["token_type_ids"] = splice(types, types[:, :1].expand(batch, virtual, *types.shape[2:]), at)
        if (lengths := named.get("lengths")) is not None:  # XLM's, of rows in place of a mask
            named["lengths"] = lengths + virtual
        if positions is not None:
            first = positions.gather(1, (at[:, None] - self.index))
            named["position_ids"] = splice(positions, first.expand(-1, virtual), at)
        return named

    def places(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Number of positions before the prompt in each row `[B]`: pads on the left, and own first tokens."""
        if mask is None:
            return torch.full((batch,), self.index, device=device)
        return mask.to(torch.int).argmax(dim=1) + self.index

    def _positions(
        self, ids: Tensor | None, named: dict[str, Any], batch: int, length: int, device: torch.device
    ) -> Tensor | None:
        """Positions that the own tokens would have without a prompt; virtual ones share the first's."""
        if "position_ids" not in self.accepted:
            return None
        if (given := named.get("position_ids")) is not None:
            return torch.as_tensor(given).expand(batch, -1)
        table = getattr(getattr(self.encoder, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        if padding is None:
            return torch.arange(length, device=device)[None].expand(batch, -1)
        # RoBERTa and its kin count from padding_idx + 1 and skip pads
        real = torch.ones(batch, length, dtype=torch.long, device=device) if ids is None else ids.ne(padding).long()
        return real.cumsum(1) * real + padding

    def cut(self, output: Any, virtual: int, mask: Tensor | None) -> Any:
        """Take the virtual positions out of everything that has them; `mask` is the one with the prompt."""
        return _map(output, self._cutter(output[0], virtual, mask))

    def cut_reports(self, output: Any, virtual: int, mask: Tensor | None) -> Any:
        """Take them out of all but the last states, which a decoder goes on with; `mask` as in `cut`."""
        if len(output) == 1:
            return output
        change = self._cutter(output[0], virtual, mask)
        if not isinstance(output, ModelOutput):
            return (output[0], *_map(tuple(output[1:]), change))
        for name in list(output.keys())[1:]:
            output[name] = _map(output[name], change)
        return output

    def _cutter(self, states: Tensor, virtual: int, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        at = self.places(mask, states.shape[0], states.device)
        return lambda tensor: cut_tensor(tensor, at, virtual, states.shape[1] - virtual)


def _check_lengthened(encoder: nn.Module, named: dict[str, Any], embeds: Tensor) -> None:
    for name, given in named.items():
        if name in _LENGTHENED or name.startswith(_OF_OTHERS) or not isinstance(given, Tensor):
            continue
        if given.dim() > 1 and given.shape[:2] == embeds.shape[:2]:
            raise InjectionError(
                f"{name} {tuple(given.shape)} says something of every token of {type(encoder).__name__}, of which a "
                "prompt among its inputs has nothing. Leave it out, or take a method that puts nothing there: "
                "p_tuning_v2, prefix_tuning, bitfit."
            )


def splice(own: Tensor, virtual: Tensor, at: Tensor) -> Tensor:
    """Insert `[B, P, ...]` into `[B, S, ...]` after `at` positions of each row."""
    both = torch.cat([own, virtual], dim=1)
    length, count = own.shape[1], virtual.shape[1]
    place = torch.arange(length + count, device=own.device)[None]
    at = at.to(own.device)[:, None]
    inside = (place >= at) & (place < at + count)
    order = torch.where(inside, place - at + length, torch.where(place < at, place, place - count))
    return both.gather(1, _like(order, both))


def cut_tensor(tensor: Tensor, at: Tensor, virtual: int, length: int, keys_alone: bool = False) -> Tensor:
    """Take `virtual` positions after `at` out of every axis of states `[B, S, H]` or attentions `[B, H, S, S]`.

    Of attentions to another sequence, `[B, H, N, S]`, out of the last one (`keys_alone`).
    """
    axes = {3: [1], 4: [3] if keys_alone else [2, 3]}
    for axis in axes.get(tensor.dim(), []):
        if tensor.shape[axis] == length + virtual:
            place = torch.arange(length, device=tensor.device)[None]
            order = torch.where(place < at.to(tensor.device)[:, None], place, place + virtual)
            moved = tensor.movedim(axis, 1)
            tensor = moved.gather(1, _like(order, moved)).movedim(1, axis)
    return tensor.contiguous()


def _like(order: Tensor, tensor: Tensor) -> Tensor:
    return order.reshape(*order.shape, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])


def _map(output: Any, change: Any) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, ModelOutput):
        for name in list(output.keys()):
            output[name] = _map(output[name], change)
        return output
    if type(output) in (tuple, list):
        return type(output)(_map(o, change) for o in output)
    return output


def normalises_embeddings(body: nn.Module) -> bool:
    """Whether embeddings are normalised before the first layer, as in BERT and its kin."""
    table = getattr(body, "embeddings", None)
    return table is not None and any("norm" in name.lower() for name, _ in table.named_children())


def cut_encoder_fields(output: Any, at: Tensor, virtual: int, length: int) -> Any:
    """Cut the virtual positions from what an encoder-decoder reports of its encoder's last states."""
    for name in ("encoder_last_hidden_state", "cross_attentions"):
        if output.get(name) is not None:
            output[name] = _map(output[name], lambda t: cut_tensor(t, at, virtual, length, keys_alone=True))
    return output


def has_decoder(backbone: PreTrainedModel) -> bool:
    """Whether a decoder goes on with what an encoder reads; UMT5's encoders say so too where they are by themselves."""
    return bool(backbone.config.is_encoder_decoder) and "decoder_input_ids" in parameters_of(backbone.base_model)


def word_embeddings(backbone: PreTrainedModel) -> nn.Module | None:
    """The module that turns the input's token ids into embeddings, of the encoder where there are two.

    `None` for families without one, such as CANINE, which hashes characters.
    """
    owner = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    try:
        embed: nn.Module = owner.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # FSMT has no such method
        return None
    return embed
