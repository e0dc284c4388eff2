"""Which tensors of a wrapped model are its adapter's: named, counted, read and written."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.backbone import adapter_names, count_parameter
from hf_ptune.errors import AdapterFileError
from hf_ptune.injection import HeadWindow, Injector, ScalarMix
from hf_ptune.methods.base import PromptEncoder
from hf_ptune.sharding import whole, write


class AdapterTensors(PreTrainedModel):
    """Tell the adapter's tensors from its base's."""

    task: ClassVar[str]
    config: Any
    backbone: PreTrainedModel
    prompt: PromptEncoder | None
    mix: ScalarMix | None
    window: HeadWindow | None
    _injector: Injector | None

    def head_parts(self) -> dict[str, nn.Module]:
        """What the wrapper adds to the base's head, by the name that it has in the wrapper."""
        parts = {"mix": self.mix, "window": self.window}
        return {name: part for name, part in parts.items() if part is not None}

    def own_parts(self) -> dict[str, nn.Module]:
        """All that the wrapper adds to its base, by name."""
        return ({} if self.prompt is None else {"prompt": self.prompt}) | self.head_parts()

    def adapter_parameter_names(self) -> set[str]:
        """Names, as in `named_parameters()`, of all that is trained, counted and saved."""
        config = self.config
        names = adapter_names(
            self.backbone, config.method, self.task, config.modules_to_save, whole=config.train_backbone
        )
        return {f"backbone.{n}" for n in names} | {
            f"{place}.{n}" for place, part in self.own_parts().items() for n, _ in part.named_parameters()
        }

    def adapter_state_dict(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The adapter's tensors by name, buffers of the prompt included; whole ones, where ranks hold parts.

        Args:
            state_dict: a gathered state dict of the wrapper, or of its adapter. Unset, and with parameters in parts,
                all ranks have to come.
        """
        if state_dict is None:
            return {n: whole(t) for n, t in self._adapter_tensors().items()}
        return self._of_the_adapter(state_dict)

    def load_adapter_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Write the adapter's tensors, whole ones, whatever ranks hold of them; where in parts, all ranks come.

        Args:
            tensors: by name, as `adapter_state_dict` gives them; the same on all ranks.

        Raises:
            AdapterFileError: one of the adapter's is missing, or another one is there.
        """
        targets = self._adapter_tensors()
        if missing := set(targets) ^ set(tensors):
            raise AdapterFileError(f"expected the tensors of the adapter; {sorted(missing)[:5]} are not in both.")
        for name, target in targets.items():
            write(target, tensors[name])
        if self._injector is not None:
            self._injector.kept.forget()

    def _adapter_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers themselves, in parts where ranks hold parts."""
        return self._of_the_adapter(self.state_dict(keep_vars=True))

    def _of_the_adapter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.adapter_parameter_names()
        return {n: t for n, t in tensors.items() if n in wanted or n.startswith("prompt.")}

    def freeze_backbone(self) -> None:
        """Let gradients reach the adapter's parameters and no others."""
        wanted = self.adapter_parameter_names()
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in wanted)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count parameters: (trainable, all)."""
        trainable = sum(count_parameter(p) for p in self.parameters() if p.requires_grad)
        return trainable, sum(count_parameter(p) for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total}")
