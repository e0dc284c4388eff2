"""How many tokens a backbone's tables of absolute positions have room for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.errors import InjectionError
from hf_ptune.injection import body_of, cache_of, text_of

_NAMES = ("wpe", "position_embeddings", "position_embedding", "embed_positions", "pos_emb")


@dataclass(frozen=True)
class PositionTable:
    """Hold one table of a backbone.

    Args:
        name: of the module.
        rows: positions that it has for tokens, virtual ones included.
        in_decoder: whether it counts what the decoder of an encoder-decoder reads.
    """

    name: str
    rows: int
    in_decoder: bool


def position_tables(model: Any) -> Iterator[PositionTable]:
    """The tables of absolute positions of a wrapped model's backbone; none where positions are rotary or relative."""
    others: tuple[str, ...] = ()  # what reads images or sounds has tables of its own
    body = body_of(model.backbone)
    text = text_of(body, [s["name"] for s in model.config.geometry["sites"]])
    inside = None if text is body else set(text.modules())
    for name, module in model.backbone.named_modules():
        if name and isinstance(module, PreTrainedModel) and module.main_input_name != "input_ids":
            others = (*others, f"{name}.")
        if not isinstance(module, nn.Embedding) or name.rpartition(".")[2] not in _NAMES or name.startswith(others):
            continue
        if inside is not None and module not in inside:
            continue
        offset = getattr(module, "offset", None)  # BART, OPT: rows before position 0
        if not isinstance(offset, int):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa
        in_decoder = model.config.is_encoder_decoder and "decoder" in name.split(".")
        yield PositionTable(name, module.num_embeddings - offset, in_decoder)


def positions_of_prompt(model: Any) -> int:
    """Positions that a prompt takes up before the own tokens: P, or 0."""
    injector = model._injector
    if injector is None:
        return 0
    # encoders without position_ids (BART) count what is put among their inputs
    counted = injector.inputs is not None and "position_ids" not in injector.inputs.accepted
    return int(model.config.num_virtual_tokens) if injector.shift or counted else 0


def token_room(model: Any) -> int | None:
    """Own tokens that a row of `input_ids` may have; `None` where no table limits them."""
    rooms = [t.rows - positions_of_prompt(model) for t in position_tables(model) if not t.in_decoder]
    return min(rooms, default=None)


def writing_room(model: Any, tokens: int) -> int | None:
    """New tokens that `generate` may write for rows of a length; `None` where no table limits them.

    Args:
        model: a wrapped causal or encoder-decoder model.
        tokens: S, of the longest row of `input_ids`.
    """
    if model.config.is_encoder_decoder:
        return min((t.rows for t in position_tables(model) if t.in_decoder), default=None)
    room = token_room(model)
    return None if room is None else room - tokens + 1  # the last one that is written is not read


def row_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of a row of a call, those in its cache included; 0 where it names none.

    Args:
        args: of a model's forward, or of `generate`.
        kwargs: of the same.
    """
    given = (*(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs")), *args[:1])
    rows, cache = next((t for t in given if isinstance(t, Tensor)), None), cache_of(kwargs)
    before = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    if rows is None:
        return 0
    axis = -2 if rows.is_floating_point() else -1  # [.., S, H] or [.., S], of choices too
    return int(rows.shape[axis]) + before


@contextmanager
def telling_of_positions(model: Any, tokens: Callable[[], int]) -> Iterator[None]:
    """Say of an index out of range that the prompt takes positions too, where that leaves too few for a row.

    Args:
        model: a wrapped model.
        tokens: counts those that a row has in all; asked only where something was out of range.

    Raises:
        InjectionError: an index was out of range; says how long rows may be.
    """
    try:
        yield
    except IndexError as error:
        room, taken = token_room(model), positions_of_prompt(model)
        if not taken or room is None or tokens() <= room:
            raise
        raise InjectionError(
            f"{error}: the base has positions for {room + taken} tokens, of which the prompt takes {taken}, so that "
            f"rows of up to {room} fit, new tokens included. Let the tokenizer cut them there, by truncation=True and "
            f"tokenizer.model_max_length = {room}, or take fewer virtual tokens."
        ) from error
