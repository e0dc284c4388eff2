"""Route 4: virtual tokens that stand wherever a sequence has their ids (P-Tuning, Liu et al. 2021, section 3.1).

The user's sequence holds a place for every virtual token, so that masks, positions, labels and outputs are the
user's. The ids lie beyond the base's vocabulary: before the base sees them they become that of a plain token, whose
embedding gives way to the prompt's row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ptune.errors import InjectionError
from hf_ptune.injection.calls import Slot, bind, parameters_of
from hf_ptune.injection.embeddings import has_decoder
from hf_ptune.injection.interrupts import OnInterrupt
from hf_ptune.injection.probe import close, device_of, probing, trying, vocabulary_of

_NOWHERE = -1


class Placeholders:
    """Put the prompt's rows where a sequence has virtual tokens.

    Args:
        reader: the module that reads the sequence: the body, or its encoder.
        words: its word embeddings.
        ids: of the virtual tokens, in the order of the prompt.
        rows: gives the prompt `[P, H]`; `None` while it is turned off.
    """

    def __init__(
        self, reader: PreTrainedModel, words: nn.Module, ids: list[int], rows: Callable[[], Tensor | None]
    ) -> None:
        self.reader = reader
        self.words = words
        self.ids = ids
        self.rows = rows
        self.plain = _plain_token(reader.config, vocabulary_of(reader))
        # by thread [B, S], number of the virtual token or -1; while the reader runs
        self.places = Slot()
        self.handles = [
            reader.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            reader.register_forward_hook(self._after, always_call=True),
            words.register_forward_hook(self._after_words),
            OnInterrupt(reader, self.places.take),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = bind(module, args, kwargs)
        ids = named.get("input_ids")
        if not isinstance(ids, Tensor):
            if self.rows() is None:
                return None
            raise InjectionError(
                f"{type(module).__name__} was called without input_ids, which say where the template's virtual tokens "
                "stand. Pass input_ids instead of inputs_embeds."
            )
        found = ids[..., None] == torch.tensor(self.ids, device=ids.device)  # [B, S, P]
        there = found.any(-1)
        self.places.put(torch.where(there, found.int().argmax(-1), _NOWHERE))
        named["input_ids"] = ids.masked_fill(there, self.plain)
        return (), named

    def _after_words(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        places = self.places.take()
        rows = None if places is None else self.rows()
        if places is None or rows is None:
            return None
        # some families pad the sequence by themselves, at its end
        more = output.shape[1] - places.shape[1] if output.dim() == 3 else -1
        if more < 0 or output.shape[0] != places.shape[0]:
            raise InjectionError(
                f"{type(self.reader).__name__} embeds {tuple(output.shape)} where a sequence of "
                f"{tuple(places.shape)} was given, so that virtual tokens have no place in it."
            )
        places = F.pad(places, (0, more), value=_NOWHERE).to(output.device)
        chosen = F.embedding(places.clamp(min=0), rows.to(output.device, output.dtype))
        return torch.where((places != _NOWHERE)[..., None], chosen, output)

    def agrees(self, body: PreTrainedModel, count: int) -> bool:
        """Whether a virtual token whose row is a plain token's embedding answers as that token would.

        It does not where a family reads ids past its word embeddings, or embeds another sequence than it was given.

        Args:
            body: the whole body; it runs on four tokens.
            count: P.
        """
        device = device_of(self.words)
        ids = torch.tensor([[11, 18, 25, 7]], device=device) % vocabulary_of(body)
        inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if has_decoder(body):
            inputs["decoder_input_ids"] = ids
        inputs = {k: v for k, v in inputs.items() if k in parameters_of(body)}
        rows, answers = self.rows, []
        try:
            with trying(InjectionError), probing(body), torch.no_grad():
                row = self.words(torch.tensor([[self.plain]], device=device))[0]
                self.rows = lambda: row.expand(count, -1)
                for token in (self.plain, self.ids[0]):
                    at = torch.arange(ids.shape[1], device=device) == 2
                    answers.append(body(input_ids=ids.masked_fill(at, token), **inputs)[0].float())
                return close(answers[1], answers[0], body.dtype)
        finally:
            self.rows = rows
        return False

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.places.take()


def _plain_token(config: PreTrainedConfig, size: int) -> int:
    """The first id without a meaning of its own: pads move positions, others stand for an image or an end."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value if isinstance(value, list) else [value])
    return next((i for i in range(size) if i not in special), 0)
