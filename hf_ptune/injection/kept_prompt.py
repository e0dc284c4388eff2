"""What a prompt has become: made anew while it trains, once and kept otherwise."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_ptune.injection.calls import transformed, version_of

_ONE_AT_A_TIME = threading.RLock()
# of any wrapper: averages of weights that train, such as a mean teacher's, are written where torch counts no change
_passes_with_gradients = 0


@dataclass(frozen=True)
class _Encoded:
    """What a prompt became.

    Args:
        version: of all that it depends on.
        trained: parameters of the body among these. Looking for them at every step of generation would take longer
            than a layer does.
        value: embeddings, or keys and values of every site.
    """

    version: Any
    trained: list[nn.Parameter]
    value: Any


class KeptPrompt:
    """Keep what a prompt has become for as long as nothing changes that it depends on.

    Args:
        prompt: the encoder.
        backbone: gives the dtype of what is kept.
        body: where the prompt becomes keys and values by a pass of it, else `None`.
    """

    def __init__(self, prompt: nn.Module, backbone: PreTrainedModel, body: nn.Module | None) -> None:
        self.prompt = prompt
        self.backbone = backbone
        self.body = body
        self.found: _Encoded | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy encodes its prompt by itself, so that what was encoded, and when, makes no difference to it
        return vars(self) | {"found": None}

    def make_anew(self, make: Callable[[], Any]) -> Any:
        """What the prompt becomes by `make`, whatever is kept."""
        global _passes_with_gradients
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _passes_with_gradients += 1
        self.forget()
        return make()

    def get(self, make: Callable[[], Any], settle: Callable[[Any], Any]) -> Any:
        """What the prompt becomes by `make`; what is kept of it has been settled."""
        # dropout draws it anew
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.prompt.training or transformed():
            return self.make_anew(make)
        with _ONE_AT_A_TIME:  # the prompt's own pass is no matter for the rows of another thread
            found = self.found
            if found is None or found.version != self._version(found.trained):
                # of a body, which may train
                trained = [] if self.body is None else [p for p in self.body.parameters() if p.requires_grad]
                found = self.found = _Encoded(self._version(trained), trained, settle(make()))
        return found.value

    def forget(self) -> None:
        """Let the prompt be made anew."""
        self.found = None

    def _version(self, trained: list[nn.Parameter]) -> Any:
        """What tells whether the encoded prompt is still what it would become."""
        tensors = [*self.prompt.parameters(), *self.prompt.buffers(), *trained]
        written = ((t.data_ptr(), version_of(t), t.device) for t in tensors)
        # a prompt is encoded without autocast; the body that makes keys and values of one runs under it
        kinds = () if self.body is None else {t.device.type for t in tensors}
        cast = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in sorted(kinds))
        return (self.backbone.dtype, _passes_with_gradients, *cast, *written)
