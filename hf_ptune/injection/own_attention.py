"""Route 2: families, and eager kernels, that compute attention by themselves.

Between the product of queries with keys and the product of probabilities with values every family does as it
likes: scales, biases, masks, sinks, soft caps. While such a module runs, a function mode follows its scores and
keeps a second tensor beside them, the scores of the prefix. Scalar steps apply to both; masks and biases over
the own keys leave the prefix as it is; the softmax is taken over both together; the prefix's share of the output
is added where the probabilities meet the values. The module's own tensors keep their shapes.
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_ptune.errors import InjectionError
from hf_ptune.injection import alibi, attention
from hf_ptune.injection.attention import extend_dense_mask
from hf_ptune.injection.interrupts import OnInterrupt
from hf_ptune.injection.merge import lay, merge_kernel, merged_attention
from hf_ptune.injection.shared_prefix import shared_product
from hf_ptune.injection.sites import Site, key_groups, site_of

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_BIASED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax}
_SUMS = {torch.logsumexp, Tensor.logsumexp}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
_MASKINGS = {torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_, torch.where, Tensor.where}
_VIEWS = {Tensor.view, Tensor.reshape, torch.reshape}
_UNRELATED = {
    Tensor.expand_as,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    torch.empty_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
    Tensor.new_tensor,
}
_running = threading.local()


def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: follow its scores."""
    site, stack = site_of(module), _stack()
    stack.append(None)  # `after` takes one away, whatever is raised here
    if site is not None and (site.key is not None or site.recording) and is_own(module):
        mode = ScoreShadow(site, module, kwargs)
        mode.__enter__()
        stack[-1] = mode


def after(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of an attention module: stop following, and refuse to have missed the prefix."""
    mode = _leave()
    if mode is not None and output is not None and not mode.site.probing:
        mode.check()


def follow(module: nn.Module) -> list[Any]:
    """Follow an attention module's scores from now on; handles that end it."""
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
        OnInterrupt(module, _leave),
    ]


def _leave() -> "ScoreShadow | None":
    stack = _stack()
    mode: ScoreShadow | None = stack.pop() if stack else None
    if mode is not None:
        mode.__exit__(None, None, None)
    return mode


class Watch:
    """Follow the scores of the modules that attend by themselves, and hook no others: hooks slow every call.

    Which ones do may change with the attention that a backbone is set to.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.configs: list[Any] = []
        self.names: list[Any] | None = None  # of the attentions that were set when the hooks were put
        self.handles: list[Any] = []

    def add(self, module: nn.Module) -> None:
        """Watch an attention module."""
        self.modules.append(module)
        config = getattr(module, "config", None)
        if not any(config is c for c in self.configs):
            self.configs.append(config)

    def follow(self) -> bool:
        """Put hooks on those that attend by themselves now; whether attentions have been set or registered anew."""
        names = [getattr(c, "_attn_implementation", None) for c in self.configs]
        if names == self.names:
            return not all(attention.is_installed(n) for n in names)
        self.stop()
        self.names = names
        for module in filter(is_own, self.modules):
            self.handles += follow(module)
        return True

    def stop(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.names = None


def _stack() -> list[Any]:
    if not hasattr(_running, "stack"):
        _running.stack = []
    stack: list[Any] = _running.stack
    return stack


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's forward calls the attention interface."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def is_own(module: nn.Module) -> bool:
    if not uses_interface(module):
        return True
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) in ("eager", None)


class ScoreShadow(TorchFunctionMode):
    """Carry the prefix's scores `[..., S, P]` beside the own scores `[..., S, T]` of one attention call."""

    def __init__(self, site: Site, module: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.site = site
        self.module = module
        self.groups = key_groups(module)
        self.bias = alibi.prefix_bias(module, site, kwargs)
        self.again = alibi.bias_of_mask(module, self.bias, kwargs)
        self.shadows: dict[int, Tensor] = {}
        self.products: dict[int, int] = {}  # of a tracked tensor: the number of the product it comes from
        self.owners: list[Tensor] = []  # keeps the ids above alive
        self.keys: dict[int, Tensor] = {}
        self.query: Tensor | None = None  # of the product that is followed
        self.normalised: set[int] = set()  # products whose scores went through a softmax
        self.count = 0
        self.done = False

    def check(self) -> None:
        if not self.done:
            raise InjectionError(
                f"{self.site.name} ({type(self.module).__name__}) ran without a product of probabilities and values "
                'that a prefix could join. Use attn_implementation="sdpa" if the model has it, or another backbone.'
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._kernel(*args, **kwargs)
        own = next((t for t in _tensors(args, kwargs) if id(t) in self.shadows), None)
        if own is None:
            return self._find_scores(func, args, kwargs)
        if func in _UNRELATED:
            return func(*args, **kwargs)
        return self._follow(func, own, args, kwargs)

    def _track(self, own: Tensor, shadow: Tensor, product: int) -> Tensor:
        self.owners.append(own)
        self.products[id(own)] = product
        self.shadows[id(own)] = shadow
        return own

    def _find_scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores = func(*args, **kwargs)
        axes: _Einsum | None = None
        scale = 1.0
        if func in _PRODUCTS and _is_score_product(*args[:2]):
            query, key = args[0], args[1].transpose(-1, -2)  # [..., S, D], [..., T, D]
        elif func in _BIASED_PRODUCTS:
            bound = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
            query, key, scale = bound["batch1"], bound["batch2"].transpose(-1, -2), kwargs.get("alpha", 1.0)
        elif func is torch.einsum and (axes := _Einsum.of_scores(args)) is not None:
            operands = _operands(args)
            query, key = axes.standard(operands[0], axes.first), axes.standard(operands[1], axes.second)
        else:
            return scores
        number, self.count = self.count, self.count + 1
        if not self.site.probing and number != self.site.product:
            if self.done and query is self.query and self.site.key is not None:
                raise InjectionError(
                    f"{self.site.name} ({type(self.module).__name__}) attends twice, and a prefix would meet one "
                    'of the two alone. Use attn_implementation="sdpa".'
                )
            return scores
        self.keys[number], self.query = key, query
        shadow = scores.new_empty(0)
        if self.site.key is not None:
            shadow = self._meet(query, self.site.prefix(query)[0].mT) * scale
            if func in _BIASED_PRODUCTS:
                shadow = self._add_bias(shadow)
            if axes is not None:
                shadow = axes.restore(shadow)
        return self._track(scores, shadow, number)

    def _meet(self, rows: Tensor, shared: Tensor) -> Tensor:
        """Multiply `[B, H, S, N]` or `[B * H, S, N]` with `[K, N, M]`, of which no row gets a copy."""
        if rows.dim() == 4:
            return shared_product(rows, shared)
        return shared_product(rows.unflatten(0, (-1, shared.shape[0])), shared).flatten(0, 1)

    def _add_bias(self, shadow: Tensor) -> Tensor:
        if self.bias is None:
            return shadow
        # [B, H, 1, P], as often as the base adds its own
        bias, self.bias, self.again = self.bias.to(shadow), self.again, None
        if shadow.dim() == 3:
            return (shadow.unflatten(0, (-1, bias.shape[1])) + bias).flatten(0, 1)
        return shadow + bias

    def _follow(self, func: Any, own: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shadow, number = self.shadows[id(own)], self.products[id(own)]
        if number in self.normalised:
            if func in _PRODUCTS and args[0] is own:
                return self._values(func(*args, **kwargs), shadow, args[1], None, number)
            if func is torch.einsum and len(_operands(args)) == 2 and _operands(args)[0] is own:
                axes = _Einsum.of_values(args)
                value = axes.standard(_operands(args)[1], axes.second)
                return self._values(func(*args, **kwargs), shadow, value, axes, number)
        if func in _SOFTMAX:
            self.normalised.add(number)
            if self.site.key is not None:
                options = {k: v for k, v in kwargs.items() if k != "input"}
                both = func(torch.cat([shadow, own], dim=-1), *args[1:], **options)
                virtual = shadow.shape[-1]
                return self._track(both[..., virtual:], both[..., :virtual], number)
        if func in _SUMS and self.site.key is not None:  # a sink's gate weighs all that is attended to
            return func(
                torch.cat([shadow, own], dim=-1), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}
            )
        width = own.shape[-1]
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.dtype == torch.bool or result.dim() == 0:
            return result
        if self.site.key is None:
            return self._track(result, shadow, number)
        return self._track(result, self._step(func, shadow, own, width, result, args, kwargs), number)

    def _step(
        self,
        func: Any,
        shadow: Tensor,
        own: Tensor,
        width: int,
        result: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """What one step on the own scores does to the prefix's."""
        if func in _MASKINGS or func in (torch.cat, torch.concat):
            return shadow
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if Ellipsis in [i for i in index if i is Ellipsis] or len(index) == own.dim():
                index = (*index[:-1], slice(None))
            return shadow[index]
        if func in _VIEWS:
            sizes = (
                list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list, torch.Size)) else list(args[1:])
            )
            if sizes[-1] == width:
                sizes[-1] = shadow.shape[-1]
            return shadow.reshape(sizes)
        # of a single own key, masks and biases are told from scales by what is done with them
        over_keys = (width > 1 or func in _ADDITIONS) and any(
            t is not own and t.dim() > 0 and t.shape[-1] == width for t in _tensors(args, kwargs)
        )
        if over_keys:
            return self._add_bias(shadow) if func in _ADDITIONS else shadow
        swapped = [shadow if a is own else a for a in args]
        return func(*swapped, **{k: shadow if v is own else v for k, v in kwargs.items()})

    def _values(self, output: Tensor, shadow: Tensor, value: Tensor, axes: "_Einsum | None", number: int) -> Tensor:
        self.done = True
        if self.site.recording:
            self.site.product = number
            self.site.record(self._heads(self.keys[number]), self._heads(value))
        if self.site.key is None:
            return output
        if axes is not None:
            shadow = axes.standard(shadow, axes.first)
        share = self._meet(shadow, self.site.prefix(value)[1].to(shadow.dtype))
        return output + (axes.restore(share) if axes is not None else share)

    def _heads(self, operand: Tensor) -> Tensor:
        """Keys or values `[K, P, D]` of batch 1."""
        heads = operand[0] if operand.dim() == 4 else operand
        return heads[:: self.groups]

    def _kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        self.done = True
        if self.site.recording:
            self.site.record(self._heads(key), self._heads(value))
        if self.site.key is not None:
            pair = self.site.prefix(key)
            prefix_key, prefix_value = (t.repeat_interleave(key.shape[1] // t.shape[0], dim=0) for t in pair)
            virtual = self.site.num_virtual_tokens
            fused = None
            if self.bias is None:
                fused = merge_kernel(query, key, value, attn_mask, is_causal, dropout_p, virtual)
            if fused is not None:
                scale = kwargs.get("scale")
                return merged_attention(query, key, value, prefix_key, prefix_value, attn_mask, is_causal, scale, fused)
            keys, queries = key.shape[-2], query.shape[-2]
            if is_causal:
                attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
            if attn_mask is not None:
                attn_mask = self._extend_kernel_mask(attn_mask, virtual, keys, query.shape[-1])
            key, value = lay(prefix_key, key), lay(prefix_value, value)
            is_causal = False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **kwargs
        )

    def _extend_kernel_mask(self, mask: Tensor, virtual: int, keys: int, width: int) -> Tensor:
        mask = extend_dense_mask(mask, virtual, keys)
        if self.bias is None:
            return mask
        # Falcon scales its alibi with the scores
        bias = F.pad(self.bias.to(mask.device, torch.float32) * width**-0.5, (0, keys))
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
        return (mask + bias).to(mask.dtype)


def _is_score_product(query: Any, key: Any) -> bool:
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return False
    if not query.dim() == key.dim() >= 3 or isinstance(key, nn.Parameter):
        return False
    # all heads may share one key head (Shazeer 2019)
    return query.shape[:-2] in (key.shape[:-2], (*key.shape[:-3], query.shape[-3])) and key.shape[-3] in (
        1,
        query.shape[-3],
    )


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for a in (*args, *kwargs.values()):
        flat.extend(x for x in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(x, Tensor))
    return flat


def _operands(args: tuple[Any, ...]) -> list[Tensor]:
    return list(args[1]) if isinstance(args[1], (list, tuple)) else list(args[1:])


class _Einsum:
    """Axes of a product of queries and keys, or probabilities and values, written as an einsum."""

    def __init__(self, first: str, second: str, out: str, order_first: str, order_second: str, order_out: str) -> None:
        self.first, self.second, self.out = (first, order_first), (second, order_second), (out, order_out)

    @classmethod
    def of_scores(cls, args: tuple[Any, ...]) -> "_Einsum | None":
        left, _, out = args[0].replace(" ", "").partition("->")
        parts = left.split(",")
        if len(parts) != 2 or not all(len(p) == 4 for p in (*parts, out)):
            return None
        shared = [c for c in parts[0] if c in parts[1] and c in out]
        depth = [c for c in parts[0] if c in parts[1] and c not in out]
        if len(shared) != 2 or len(depth) != 1 or parts[1][-1] != depth[0]:
            return None
        head = parts[1][-2]
        if head not in shared or parts[0][-2:] != head + depth[0]:
            return None
        batch = next(c for c in shared if c != head)
        q = next(c for c in parts[0] if c not in (head, batch, depth[0]))
        k = next(c for c in parts[1] if c not in (head, batch, depth[0]))
        lead = batch + head
        return cls(parts[0], parts[1], out, lead + q + depth[0], lead + k + depth[0], lead + q + k)

    @classmethod
    def of_values(cls, args: tuple[Any, ...]) -> "_Einsum":
        left, _, out = args[0].replace(" ", "").partition("->")
        first, second = left.split(",")
        depth, head = second[-1], second[-2]
        k = next(c for c in first if c in second and c not in out)
        batch = next(c for c in second if c not in (depth, head, k))
        q = next(c for c in first if c not in (batch, head, k))
        lead = batch + head
        return cls(first, second, out, lead + q + k, lead + k + depth, lead + q + depth)

    def standard(self, tensor: Tensor, axes: tuple[str, str]) -> Tensor:
        """Bring a tensor from its written axes into [batch, head, rows, columns]."""
        written, order = axes
        return tensor.permute([written.index(c) for c in order])

    def restore(self, tensor: Tensor) -> Tensor:
        written, order = self.out
        return tensor.permute([order.index(c) for c in written])
