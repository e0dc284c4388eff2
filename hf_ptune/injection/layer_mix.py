"""What heads of encoders read: a trained mix of the states of all layers, in place of the last ones.

What tells one token from another may lie in the middle of an encoder whose last layers were trained for sentences, and
so may what tells how two texts of a row fit together. A head that pools reads the mean of the own tokens in the mix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from hf_ptune.errors import BackboneError, InjectionError
from hf_ptune.injection.bridge import checkpoint_layers, reentrant_layers
from hf_ptune.injection.calls import Slot, bind, parameters_of
from hf_ptune.injection.pooling import has_pooler, mean_first, own_tokens, pool_again
from hf_ptune.injection.probe import close, probing, run_on_tokens, trying

_ALIKE = 3.0
_CAPTURES = "output_capturing_hook"


class ScalarMix(nn.Module):
    """Weigh the states of all layers (Peters et al. 2018, section 3.2): `scale * sum(softmax(weight) * states)`.

    Every layer has the same weight at the start. The layer normalisation that the paper may put before it is left out.

    Args:
        count: number of states, the embeddings' among them.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))
        self.scale = nn.Parameter(torch.ones(1))  # with an axis: FSDP2 splits no scalars

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Mix as many states `[B, S, H]` as there are weights into `[B, S, H]`."""
        last = states[-1]
        shares = (self.scale * self.weight.softmax(0)).to(last)
        mixed = shares[-1] * last
        for share, state in zip(shares[:-1], states[:-1], strict=True):
            mixed = mixed + share * state.to(last.device)
        return mixed


def layers_of(body: PreTrainedModel) -> int:
    """Number of states that a body gives out: of its embeddings, and of every layer."""
    return int(body.config.num_hidden_layers) + 1


def gives_layers(body: PreTrainedModel, alike: bool = False, pooled: bool = False) -> bool:
    """Whether a body gives out the states of all its layers, each of the shape of the last ones.

    Args:
        body: an encoder.
        alike: whether none may be several times as large as another, as they are where states are normalised behind
            the last layer alone.
        pooled: whether its own pooler, if it has one, must be one that can be run again on a mix of them.
    """
    accepted = parameters_of(body)
    if not {"output_hidden_states", "kwargs"} & accepted or not hasattr(body.config, "num_hidden_layers"):
        return False
    if getattr(body.config, "attention_type", None) == "block_sparse":
        return False  # its inner states have the pads that fill rows up to whole blocks
    try:
        with probing(body), torch.no_grad():
            output = run_on_tokens(body, output_hidden_states=True, return_dict=True)
            pools = not pooled or not has_pooler(body) or _pools_again(body, output)
    except BackboneError:
        return False
    forget_captures(body)
    states: Any = getattr(output, "hidden_states", None)
    if not pools or not _fit(states, output[0], layers_of(body)):
        return False
    sizes = [float(s.float().square().mean()) ** 0.5 for s in states]
    return not alike or max(sizes) <= _ALIKE * min(sizes)


def _pools_again(body: PreTrainedModel, output: Any) -> bool:
    """Whether a body's own pooler gives from outside what it gave inside."""
    with trying():  # it may take more than states, or not tell what it gives
        again = pool_again(body, output[0])
        return again.shape == output.pooler_output.shape and close(again, output.pooler_output, body.dtype)
    return False


def forget_captures(backbone: nn.Module) -> None:
    """Take away what transformers leaves on modules whose states were asked for; nothing that holds it can be pickled.

    It comes back when states are asked for again.
    """
    for module in backbone.modules():
        hooks = module._forward_hooks
        for number in [n for n, hook in hooks.items() if _CAPTURES in getattr(hook, "__qualname__", "")]:
            del hooks[number]
        module.__dict__.pop("_output_capturing_hooks_installed", None)


def restore_captures(backbone: nn.Module) -> None:
    """Let states of a backbone that was unpickled be asked for.

    transformers notes which modules have any while they are made, which unpickling leaves out.
    """
    for module in backbone.modules():
        if isinstance(module, PreTrainedModel):
            # by the name of the class; the registry's own __setitem__ takes names or modules, by version
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(module)), module._can_record_outputs)


def _fit(states: Any, last: Tensor, count: int) -> bool:
    return states is not None and len(states) == count and all(s.shape == last.shape for s in states)


@dataclass(frozen=True)
class Asked:
    """Hold what the caller of a body asks for: states of layers, the kind of output, and its own tokens `[B, S]`."""

    output_hidden_states: Any
    return_dict: Any
    own: Tensor | None


class LayerMix:
    """Put the mix of all layers in the place of the last states, behind the body.

    Args:
        body: an encoder that `gives_layers`.
        mix: weighs its states.
        active: whether the prompt is at work.
        pools_mean: whether the mean of each row's own tokens, virtual ones and pads left out, takes the place of its
            first state in the mix then, and the body's own pooler, if it has one, pools that.
    """

    def __init__(
        self, body: PreTrainedModel, mix: ScalarMix, active: Callable[[], bool], pools_mean: bool = False
    ) -> None:
        self.layers = checkpoint_layers(body)
        self.mix = mix
        self.active = active
        self.pools_mean = pools_mean
        self.asked = Slot()  # while the body runs
        self.handles = [
            # before a prompt among the inputs comes there, and after it has left the states
            body.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            body.register_forward_hook(self._after),
        ]

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active():
            return None
        _check_checkpointing(module, self.layers)
        named = bind(module, args, kwargs)
        states, as_dict = (
            getattr(module.config, n, None) if named.get(n) is None else named[n]
            for n in ("output_hidden_states", "return_dict")
        )
        self.asked.put(Asked(states, as_dict, own_tokens(named) if self.pools_mean else None))
        return (), named | {"output_hidden_states": True, "return_dict": True}

    def _after(self, module: Any, args: Any, output: ModelOutput) -> Any:
        if not self.active():
            return None
        asked: Asked = self.asked.take()
        states = output.hidden_states
        if not _fit(states, output[0], count := len(self.mix.weight)):
            raise InjectionError(
                f"{type(module).__name__} gives out states of {[tuple(s.shape) for s in states or ()]}; a mix of "
                f"layers needs {count} of {tuple(output[0].shape)}. Train with head_states='last'."
            )
        kept = dict(output.items()) | {"last_hidden_state": self.mix(states)}
        if asked.own is not None:
            kept["last_hidden_state"] = mean_first(kept["last_hidden_state"], asked.own)
            if has_pooler(module):
                kept["pooler_output"] = pool_again(module, kept["last_hidden_state"])
        kept["hidden_states"] = _selected(states, asked.output_hidden_states)
        mixed = type(output)(**kept)
        return mixed if asked.return_dict in (None, True) else mixed.to_tuple()


def _selected(states: tuple[Tensor, ...], wanted: Any) -> tuple[Tensor | None, ...] | None:
    """The states that a caller asks for: all of them, none, or those of the layers that it names."""
    if wanted is None or isinstance(wanted, bool):
        return states if wanted else None
    named = {n % len(states) for n in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(s if n in named else None for n, s in enumerate(states))


def _check_checkpointing(body: nn.Module, layers: list[nn.Module]) -> None:
    """Refuse checkpoints from whose inside states come without a graph, in versions that checkpoint around hooks."""
    if not (body.training and torch.is_grad_enabled()):
        return
    if any(type(layer).__call__ is not nn.Module.__call__ for layer in reentrant_layers(layers)):
        raise InjectionError(
            "use_reentrant=True gives the states of inner layers no gradient, which a mix of layers needs; take "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
