"""Route 1: the attention interface. A registered function meets the prefix of its module, and only there.

The function that a backbone uses ("sdpa", "flex_attention", "flash_attention_2", one of the user's own) keeps
its name, since models branch on that name for their masks; it is wrapped once per process, and again where another
one takes its place. It answers modules without a site by the very call it wraps.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from hf_ptune.errors import InjectionError
from hf_ptune.injection import joint
from hf_ptune.injection.merge import lay, mask_beside_prefix, merge_kernel, merged_attention
from hf_ptune.injection.registered import is_sealed, replace, seal
from hf_ptune.injection.sites import Site, site_of

_LOCK = threading.Lock()
Listener = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], None]
_listening = threading.local()


def listen(listener: Listener | None) -> None:
    """Report every attention call of this thread to `listener(module, query, key, value)`; `None` stops."""
    _listening.to = listener


def install(name: str) -> None:
    """Make the attention function registered under `name` see the prefixes of wrapped backbones."""
    with _LOCK:
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        if function is not None and not is_sealed(function):
            replace(ALL_ATTENTION_FUNCTIONS, name, _wrap(name, function))
        if name == "sdpa":
            joint.install(name)


def is_installed(name: str | None) -> bool:
    """Whether the function that stands under `name` now sees the prefixes; what attends by itself needs none."""
    if name in (None, "eager"):
        return True
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    return (function is None or is_sealed(function)) and (name != "sdpa" or joint.is_installed(name))


def _wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    flash = is_flash_attention_requested(requested_attention_implementation=name)
    merges = function is sdpa_attention_forward
    home = getattr(function, "__globals__", {}).get("__name__", "")
    call = function if home.startswith("transformers.") else _joining_once(function)

    @functools.wraps(function)
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        site = site_of(module)
        if site is None:
            if not torch.compiler.is_compiling() and (listener := getattr(_listening, "to", None)) is not None:
                listener(module, query, key, value)
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        if site.met:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        if isinstance(attention_mask, joint.JointMask):
            return joint.attend(attention, site, module, (query, key, value), attention_mask, kwargs)
        if site.recording:
            site.record(key[0], value[0])
            if site.causal and attention_mask is None and not _is_causal(module, kwargs):
                kwargs["is_causal"] = True
        if site.key is None:
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        if flash:
            _refuse_flash(site, kwargs)
        if (
            merges
            and not args
            and (merged := _merge(module, site, query, key, value, attention_mask, kwargs)) is not None
        ):
            return merged, None
        mask = None
        if merges:
            causal = query.shape[2] > 1 and _is_causal(module, kwargs)
            mask = mask_beside_prefix(query, attention_mask, key.shape[2], site.num_virtual_tokens, causal)
        if mask is None:
            mask = _extend_mask(module, site, query, key, attention_mask, kwargs, flash)
        if (bias := kwargs.get("position_bias")) is not None:
            kwargs["position_bias"] = F.pad(bias, (site.num_virtual_tokens, 0))
        key, value = prepend(site, key, value)
        return call(module, query, key, value, mask, *args, **kwargs)

    return seal(attention)


def _joining_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of the user's own call the wrapped one that it has replaced, without a second prefix."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site = site_of(module)
        assert site is not None
        site.met = True
        try:
            return function(module, *args, **kwargs)
        finally:
            site.met = False

    return attention


def _merge(
    module: nn.Module,
    site: Site,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """What torch's fused attention over [prefix | own tokens] gives, `[B, S, H, D]`, or `None` to concatenate."""
    if kwargs.get("cache") is not None or kwargs.get("softcap") is not None:
        return None
    causal = mask is None and query.shape[2] > 1 and _is_causal(module, kwargs)
    if (bias := kwargs.get("position_bias")) is not None:
        if not (mask is None or isinstance(mask, torch.Tensor)):
            return None
        mask, causal = _biased_mask(bias[..., : key.shape[2]], mask, causal), False
    kernel = merge_kernel(query, key, value, mask, causal, kwargs.get("dropout", 0.0), site.num_virtual_tokens)
    if kernel is None:
        return None
    prefix_key, prefix_value = _checked_prefix(site, key, value)
    output = merged_attention(query, key, value, prefix_key, prefix_value, mask, causal, kwargs.get("scaling"), kernel)
    return output.transpose(1, 2).contiguous()


def _biased_mask(bias: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """A learned bias over own keys, with the hidden ones at the lowest number."""
    if mask is not None and mask.dtype != torch.bool:
        return bias + mask[..., : bias.shape[-1]]
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask[..., : bias.shape[-1]], torch.finfo(bias.dtype).min)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def prepend(site: Site, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the shared prefix before the own keys and values `[B, K, T, D]`; the reference of every faster path."""
    prefix_key, prefix_value = _checked_prefix(site, key, value)
    return lay(prefix_key, key), lay(prefix_value, value)


def _checked_prefix(site: Site, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    prefix_key, prefix_value = site.prefix(key)
    if (key.shape[1], key.shape[3], value.shape[3]) != (
        prefix_key.shape[0],
        prefix_key.shape[2],
        prefix_value.shape[2],
    ):
        raise InjectionError(
            f"{site.name} attends with keys of {key.shape[1]} heads x {key.shape[3]} and values x {value.shape[3]}, "
            f"but its prefix has {prefix_key.shape[0]} heads x {prefix_key.shape[2]} and x {prefix_value.shape[2]}. "
            "The backbone differs from the one the adapter was made for; load that one, or make a new adapter."
        )
    return prefix_key, prefix_value


def _refuse_flash(site: Site, kwargs: dict[str, Any]) -> None:
    # these kernels take no mask with which a prefix could stay visible
    packed = kwargs.get("cu_seq_lens_q") is not None
    if packed or kwargs.get("sliding_window") is not None:
        what = "packed sequences" if packed else "a sliding window"
        raise InjectionError(
            f"{site.name} runs {what} on a flash attention kernel, which would hide the prefix from later tokens. "
            'Call model.set_attn_implementation("sdpa") or "flex_attention".'
        )


def _extend_mask(
    module: nn.Module,
    site: Site,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    flash: bool,
) -> Any:
    """Let every query see the whole prefix, whatever the own mask says."""
    virtual, queries, keys = site.num_virtual_tokens, query.shape[2], key.shape[2]
    if mask is None:
        if flash or queries == 1 or not _is_causal(module, kwargs):
            return None
        # `is_causal` of the kernels is aligned to the upper left: with a prefix it has to become a mask
        return torch.ones(queries, virtual + keys, dtype=torch.bool, device=query.device).tril(virtual)[None, None]
    if not isinstance(mask, torch.Tensor):
        return _extend_block_mask(mask, virtual, queries, keys)
    if flash:
        return F.pad(mask, (virtual, 0), value=1)
    return extend_dense_mask(mask, virtual, keys)


def extend_dense_mask(mask: torch.Tensor, virtual: int, keys: int) -> torch.Tensor:
    """Add `virtual` visible columns before a boolean or additive mask `[..., T]`."""
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return F.pad(mask, (virtual, 0), value=True)
    return F.pad(mask, (virtual, 0))


def _extend_block_mask(mask: Any, virtual: int, queries: int, keys: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    made: dict[int, Any] = mask.__dict__.setdefault("_ptune_extended", {})
    if virtual not in made:
        own = mask.mask_mod

        def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
            return (kv < virtual) | own(b, h, q, torch.clamp(kv - virtual, min=0))

        made[virtual] = create_block_mask(
            visible, mask.shape[0], None, queries, virtual + keys, device=mask.kv_num_blocks.device
        )
    return made[virtual]
