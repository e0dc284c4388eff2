"""What a head over tokens reads beside a token's own state: those of its two neighbours in the row.

A frozen base says little of a token's neighbours in the token's own state, and a prompt cannot change which of a row's
own tokens attend to each other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.errors import BackboneError, ConfigError, InjectionError
from hf_ptune.injection.calls import Slot, bind, cache_of
from hf_ptune.injection.embeddings import has_decoder
from hf_ptune.injection.pooling import own_tokens
from hf_ptune.injection.probe import PROBE_TOKENS, body_of, close, device_of, probing, run_on_tokens, sparse_as_it_was

_BOUNDS = 2  # start and end of an answer
_CURE = "Train with head_window='token'."
# of the weights, so that Adam moves what they say a quarter as fast as the head itself: at its own rate labels of roles
# are fitted before they are learnt
_SHARE = 0.25


class HeadWindow(nn.Module):
    """Weigh the states of a token's neighbours for its logits (window approach, Collobert et al. 2011, section 3.3.1).

    A head of the base that reads a token alone is one over the window of three with this added. Weights start from
    zero, so that a model starts as without it, and count a quarter, so that they learn slower than the head does.

    Args:
        head: name of the head in the task model, a linear layer.
        labels: number of its logits.
        width: of the states that it reads.
    """

    def __init__(self, head: str, labels: int, width: int) -> None:
        super().__init__()
        self.head = head
        self.weight = nn.Parameter(torch.zeros(2, labels, width))  # of the token before, of the one after

    def forward(self, states: Tensor, adjacent: Tensor) -> Tensor:
        """What neighbours add to the logits of every token.

        Args:
            states: `[B, S, H]`.
            adjacent: whether a token and the one after it are neighbours `[B or 1, S - 1]`.

        Returns:
            `[B, S, labels]`; of tokens without neighbours zero.
        """
        before, after = (_SHARE * self.weight).to(states)
        apart = ~adjacent.to(states.device)[..., None]
        of_the_left = (states[:, :-1] @ before.T).masked_fill(apart, 0)
        of_the_right = (states[:, 1:] @ after.T).masked_fill(apart, 0)
        return nn.functional.pad(of_the_left, (0, 0, 1, 0)) + nn.functional.pad(of_the_right, (0, 0, 0, 1))


def token_head(backbone: PreTrainedModel, task: str) -> str | None:
    """Name of the linear layer of a task model that makes a token's logits of its state, if there is one.

    Args:
        backbone: the task model.
        task: TOKEN_CLS or QUESTION_ANS.
    """
    inside = set(body_of(backbone).modules())
    count = _BOUNDS if task == "QUESTION_ANS" else backbone.config.num_labels
    heads = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and module not in inside and module.out_features == count
    ]
    return heads[-1] if heads else None


def make_window(backbone: PreTrainedModel, task: str) -> HeadWindow:
    """The window of a task model's head, where the head is.

    Args:
        backbone: the task model.
        task: TOKEN_CLS or QUESTION_ANS.

    Raises:
        ConfigError: it has no head over tokens.
    """
    name = token_head(backbone, task)
    if name is None:
        raise ConfigError(f"head_window='neighbours', but {type(backbone).__name__} has no head over tokens.")
    head: Any = backbone.get_submodule(name)
    return HeadWindow(name, head.out_features, head.in_features).to(device_of(head))


def why_no_window(backbone: PreTrainedModel, task: str) -> str | None:
    """Why a task model's answer is not what one linear layer makes of every token's state; `None` where it is."""
    name, family = token_head(backbone, task), type(backbone).__name__
    if has_decoder(backbone) or name is None:
        return f"{family} has no such head"
    seen: list[tuple[Tensor, Tensor]] = []
    with probing(backbone), sparse_as_it_was(body_of(backbone)), torch.no_grad():
        head = backbone.get_submodule(name)
        handle = head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        try:
            output = run_on_tokens(backbone, return_dict=True)
        except BackboneError as error:
            return str(error)
        finally:
            handle.remove()
    logits = output.get("logits")
    if logits is None and "start_logits" in output:
        logits = torch.stack([output.start_logits, output.end_logits], -1)
    if logits is None or len(seen) != 1 or seen[0][0].shape[:2] != (1, PROBE_TOKENS):
        return f"{name} of {family} is not run once over all tokens"
    made = seen[0][1]
    if made.shape != logits.shape or not close(made, logits, backbone.dtype):
        return f"{family} does not answer what its {name} gives"
    return None


class _Added:
    """Add what neighbours say to the logits of a head: all that a hook on it holds, so that it can be copied alone."""

    def __init__(self, window: HeadWindow) -> None:
        self.window = window
        self.adjacent = Slot()  # [B or 1, S - 1], from the call of the task model to that of its head

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        adjacent, states = self.adjacent.take(), args[0]
        if adjacent is None:
            return None
        if states.dim() != 3 or states.shape[1] != adjacent.shape[1] + 1:
            raise InjectionError(
                f"the head reads states of {tuple(states.shape)}, but the row has {adjacent.shape[1] + 1} tokens, so "
                f"that none has its neighbours. {_CURE}"
            )
        added: Tensor = self.window(states, adjacent)
        return output + added.to(output)


class WindowedHead:
    """Add what neighbours say to the logits that a task model's head gives.

    Args:
        backbone: the task model, an encoder or decoder.
        window: weighs the neighbours, and names the head.
        active: whether the prompt is at work.
        packs: whether several texts may stand in one row, told by positions that start again.
    """

    def __init__(self, backbone: nn.Module, window: HeadWindow, active: Callable[[], bool], packs: bool) -> None:
        self.active = active
        self.packs = packs
        self.added = _Added(window)
        self.head, self.handle = self._follow(backbone)
        self.before = backbone.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        """Take the hooks away."""
        self.before.remove()
        self.handle.remove()

    def _follow(self, backbone: nn.Module) -> tuple[nn.Module, Any]:
        window = self.added.window
        head = backbone.get_submodule(window.head)
        shape = tuple(window.weight.shape[1:])
        if isinstance(head, nn.Linear) and (head.out_features, head.in_features) != shape:
            raise InjectionError(
                f"{window.head} gives {head.out_features} logits of {head.in_features} values, but what reads the "
                f"neighbours gives {shape[0]} of {shape[1]}. Wrap a base that has this head, or train with "
                "head_window='token'."
            )
        return head, head.register_forward_hook(self.added)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active():
            self.added.adjacent.put(None)
            return
        if module.get_submodule(self.added.window.head) is not self.head:  # another one has taken its place
            self.handle.remove()
            self.head, self.handle = self._follow(module)
        self.added.adjacent.put(_adjacent(bind(module, args, kwargs), self.packs))


def _adjacent(named: dict[str, Any], packs: bool) -> Tensor | None:
    """Whether each token of a call and the one after it are own tokens of one text `[B or 1, S - 1]`."""
    if named.get("attention_mask") is None and named.get("input_mask") is not None:
        named = named | {"attention_mask": 1 - named["input_mask"]}  # of XLNet: one for pads
    own = own_tokens(named, f"a head that reads neighbours needs [B, S]. {_CURE}")
    if own is None or (named.get("input_ids") is None and named.get("inputs_embeds") is None):
        return None  # the base says what it lacks
    cache = cache_of(named)
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length()):
        raise InjectionError(f"a row that goes on from a cache lacks the neighbours of its first token. {_CURE}")
    own = own != 0
    adjacent = own[:, :-1] & own[:, 1:]
    positions = named.get("position_ids")
    if packs and isinstance(positions, Tensor) and positions.dim() == 2:
        adjacent = adjacent & (positions[:, 1:] == positions[:, :-1] + 1).to(adjacent.device)
    return adjacent
