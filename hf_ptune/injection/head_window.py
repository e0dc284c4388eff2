"""What a head over tokens reads beside a token's own state: those of its two neighbours in the row.

A frozen base says little of a token's neighbours in the token's own state, and a prompt cannot change which of a row's
own tokens attend to each other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.errors import BackboneError, InjectionError
from hf_ptune.injection.calls import Slot, bind
from hf_ptune.injection.pooling import own_tokens
from hf_ptune.injection.probe import PROBE_TOKENS, body_of, close, probing, run_on_tokens

_BOUNDS = 2  # start and end of an answer
# of the weights, so that Adam moves what they say a quarter as fast as the head itself: at its own rate labels of roles
# are fitted before they are learnt
_SHARE = 0.25


class HeadWindow(nn.Module):
    """Weigh the states of a token's neighbours for its logits (window approach, Collobert et al. 2011, section 3.3.1).

    A head of the base that reads a token alone is one over the window of three with this added. Weights start from
    zero, so that a model starts as without it, and count a quarter, so that they learn slower than the head does.

    Args:
        labels: number of logits of a token.
        width: of the states that the head reads.
    """

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
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
        apart = ~adjacent[..., None]
        of_the_left = (states[:, :-1] @ before.T).masked_fill(apart, 0)
        of_the_right = (states[:, 1:] @ after.T).masked_fill(apart, 0)
        return nn.functional.pad(of_the_left, (0, 0, 1, 0)) + nn.functional.pad(of_the_right, (0, 0, 0, 1))


def token_head(backbone: PreTrainedModel, task: str) -> nn.Linear | None:
    """The linear layer of a task model that makes a token's logits of its state, if there is one.

    Args:
        backbone: the task model.
        task: TOKEN_CLS or QUESTION_ANS.
    """
    inside = set(body_of(backbone).modules())
    count = _BOUNDS if task == "QUESTION_ANS" else backbone.config.num_labels
    heads = [m for m in backbone.modules() if isinstance(m, nn.Linear) and m not in inside and m.out_features == count]
    return heads[-1] if heads else None


def reads_tokens(backbone: PreTrainedModel, task: str) -> bool:
    """Whether a task model's answer is what one linear layer makes of every token's state, and no more."""
    head = token_head(backbone, task)
    if head is None:
        return False
    seen: list[tuple[Tensor, Tensor]] = []
    with probing(backbone), torch.no_grad():
        handle = head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        try:
            output = run_on_tokens(backbone, return_dict=True)
        except BackboneError:
            return False
        finally:
            handle.remove()
    logits = output.get("logits")
    if logits is None and "start_logits" in output:
        logits = torch.stack([output.start_logits, output.end_logits], -1)
    if len(seen) != 1 or logits is None:
        return False
    states, made = seen[0]
    fits = states.shape[:2] == (1, PROBE_TOKENS) and made.shape == logits.shape
    return fits and close(made, logits, backbone.dtype)


class WindowedHead:
    """Add what neighbours say to the logits that a task model's head gives.

    Args:
        backbone: the task model, an encoder or decoder that `reads_tokens`.
        head: its `token_head`.
        window: weighs the neighbours.
        active: whether the prompt is at work.
        packs: whether several texts may stand in one row, told by positions that start again.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, window: HeadWindow, active: Callable[[], bool], packs: bool
    ) -> None:
        self.window = window
        self.active = active
        self.packs = packs
        self.adjacent = Slot()  # [B or 1, S - 1], from the call of the task model to that of its head
        self.handles = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            head.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = bind(module, args, kwargs)
        self.adjacent.put(_adjacent(named, self.packs) if self.active() else None)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        adjacent, states = self.adjacent.take(), args[0]
        if adjacent is None:
            return None
        if states.dim() != 3 or states.shape[1] != adjacent.shape[1] + 1:
            raise InjectionError(
                f"the head reads states of {tuple(states.shape)}, but the row has {adjacent.shape[1] + 1} tokens, so "
                "that none has its neighbours. Train with head_window='token'."
            )
        added: Tensor = self.window(states, adjacent)
        return output + added.to(output)


def _adjacent(named: dict[str, Any], packs: bool) -> Tensor | None:
    """Whether each token of a call and the one after it are own tokens of one text `[B or 1, S - 1]`."""
    own = own_tokens(named, "a head that reads neighbours")
    if own is None:
        return None
    tokens = named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"]
    own = own[:, -tokens.shape[1] :] != 0  # a mask may begin with what is in a cache
    adjacent = own[:, :-1] & own[:, 1:]
    positions = named.get("position_ids")
    if packs and isinstance(positions, Tensor) and positions.dim() == 2:
        adjacent = adjacent & (positions[:, 1:] == positions[:, :-1] + 1).to(adjacent.device)
    return adjacent
