"""Parameters that ranks hold in parts, by FSDP2 or ZeRO: read whole, written whole, and run before an engine runs them.

Everything here that meets such a parameter talks to the other ranks: all of them have to come.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def _in_zero3(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def in_parts(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has split a model over ranks, so that all of them have to run it as often."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(map(_in_zero3, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, from its master copy where the engine trains one; itself where nobody has split it.

    Args:
        tensor: a parameter or buffer of a module's `state_dict(keep_vars=True)`.
    """
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            return cast(DTensor, tensor.detach()).full_tensor()
        master = read_master(tensor) if _has_master(tensor) else None
        if master is None and _in_zero3(tensor):
            with _gathered([tensor]):
                return tensor.detach().clone()
        return tensor.detach() if master is None else master


def write(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into a parameter, and into its master copy.

    Args:
        target: a parameter or buffer of a module's `state_dict(keep_vars=True)`.
        value: of its whole shape; the same on all ranks.
    """
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(scatter(value, target))
        elif _in_zero3(target):
            with _gathered([target], write=True):
                target.data.copy_(value)
        else:
            target.copy_(value)
        if _has_master(target):
            write_master(target, value)


def _has_master(tensor: Any) -> bool:
    """Whether DeepSpeed trains a copy of it in float32."""
    if _in_zero3(tensor):
        return hasattr(tensor, "_z3_optimizer") and tensor.requires_grad
    return hasattr(tensor, "get_full_hp_param")


def read_master(parameter: Any, key: str | None = None) -> Any:
    """All of the copy that DeepSpeed trains, or of one of its moments; `None` where it keeps none.

    Args:
        parameter: the model's own.
        key: name of the moment in the optimizer's state.
    """
    if _in_zero3(parameter):
        return parameter._z3_optimizer.get_full_hp_param(parameter, key)
    return parameter.get_full_hp_param(key)


def write_master(parameter: Any, value: Tensor, key: str | None = None) -> None:
    """Write all of the copy that DeepSpeed trains, or of one of its moments; see `read_master`."""
    full = value.to(parameter.device, torch.float32)
    if _in_zero3(parameter):
        parameter._z3_optimizer.set_full_hp_param(full, parameter, key)
    else:
        parameter.set_full_hp_param(full, key)


def scatter(value: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a whole tensor.

    Args:
        value: the same on all ranks.
        like: has its shape and is split as it should be.
    """
    full = value.to(like.device, like.dtype)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


@contextmanager
def _gathered(parameters: list[Tensor], write: bool = False) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


def _path(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules on the way from a root, which is left out, to a module inside it, which is the last."""
    parts = name.split(".")
    return [root.get_submodule(".".join(parts[:count])) for count in range(1, len(parts) + 1)]


def whole_for_backward(root: nn.Module, name: str, inner: tuple[Tensor, Tensor]) -> None:
    """Let FSDP2 gather a layer before gradients enter it by tensors that leave it other than as its output.

    Args:
        root: holds the layer, perhaps without being split itself.
        name: of a module inside the layer, in `root`.
        inner: tensors that were taken out of that module.
    """
    layer = next((m for m in reversed(_path(root, name)) if isinstance(m, FSDPModule)), None)
    if layer is None:
        return
    for tensor in inner:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: (layer.unshard(), gradient)[1])


def units_of(model: nn.Module, names: Iterable[str], embed: nn.Module | None) -> set[str]:
    """Classes of layers that FSDP2 splits one by one, less those around the word embeddings.

    accelerate splits these by themselves, after all others, and fails on parameters that are split already, as they
    are where a family counts its whole embeddings among its layers.

    Args:
        model: is to be split.
        names: of the classes that its family counts as layers.
        embed: its word embeddings.
    """
    name = next((n for n, m in model.named_modules() if m is embed), "")
    return set(names) - {type(m).__name__ for m in _path(model, name)[:-1]}


@contextmanager
def loading_alone() -> Iterator[None]:
    """Let a rank load a model by itself: under ZeRO-3 all ranks would have to come, to take their parts."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


@contextmanager
def running(module: nn.Module) -> Iterator[None]:
    """Let a module be called that ZeRO-3 has split when it was loaded, and that no engine runs yet.

    A layer is whole while it runs, and no longer; other modules are left as they are.
    """
    layers = [m for m in module.modules() if any(map(_in_zero3, m.parameters(recurse=False)))]
    if not layers or type(layers[0]._parameters).__name__ == "ZeROOrderedDict":  # the engine's own
        yield
        return
    open_now: list[Any] = []

    def enter(layer: nn.Module, args: Any) -> None:
        opened = _gathered([p for p in layer.parameters(recurse=False) if _in_zero3(p)])
        opened.__enter__()
        open_now.append(opened)

    def leave(layer: nn.Module, args: Any, output: Any) -> None:
        open_now.pop().__exit__(None, None, None)

    handles: list[Any] = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(enter, prepend=True))
        handles.append(layer.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
