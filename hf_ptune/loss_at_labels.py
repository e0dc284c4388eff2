"""The loss of a language model from the logits of labelled positions alone."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.utils import logging

from hf_ptune.cross_entropy import IGNORED, causal_lm_loss, masked_lm_loss
from hf_ptune.errors import PTuneError
from hf_ptune.injection import Slot, bind, probing, transformed, trying

logger = logging.get_logger(__name__)
_SHIFTED = "CAUSAL_LM"
TASKS = (_SHIFTED, "SEQ_2_SEQ_LM", "MASKED_LM")
_LOSSES: dict[Any, Any] = {ForCausalLMLoss: causal_lm_loss, ForMaskedLMLoss: masked_lm_loss}
# what a caller may pass that needs all logits, or counts labels in another way
_OTHERWISE = ("logits_to_keep", "shift_labels", "ignore_index", "output_logits")


class _Sparing:
    """A standard loss without a softmax of all logits, while a pass runs; in a copy made meanwhile none does."""

    def __init__(self, standard: Any, runs: bool = True) -> None:
        self.standard = standard
        self.runs = runs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (_LOSSES[self.standard] if self.runs else self.standard)(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _Sparing, (self.standard, False)


class LossAtLabels:
    """Let the vocabulary projection see only hidden states whose label counts.

    The states are gathered as they enter the projection, and the labels likewise, so that everything around it
    (scales, soft caps, the loss itself) stays the backbone's own.

    Args:
        wrapper: a model that holds a backbone.
        backbone: a loaded language model.
        task: a key of `backbone.TASKS`.
    """

    def __init__(self, wrapper: nn.Module, backbone: PreTrainedModel, task: str) -> None:
        self.wrapper = wrapper
        self.backbone = backbone
        self.shifted = task == _SHIFTED
        self.agrees: bool | None = None  # tried when the first batch trains
        self.now = Slot()  # rows to keep of the flat states, and the shape `[B, S]` that they are of
        head = backbone.get_output_embeddings() if task in TASKS else None
        self.handle = None if head is None else head.register_forward_pre_hook(self._gather)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a training call, or `None` where it is not one that needs labelled positions alone.

        Args:
            args: of the backbone's forward.
            kwargs: of the backbone's forward.

        Returns:
            The backbone's output; its `logits` are computed if somebody asks for them.
        """
        if not self.backbone.training or not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
            return None
        given = vars(self.backbone).get("_loss_function")
        if self.handle is None or self.agrees is False or not isinstance(given, _Sparing | None):
            return None  # a loss of the user's own may read any position
        named = bind(self.backbone, args, kwargs)
        labels = named.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2 or any(_given(named.get(name)) for name in _OTHERWISE):
            return None
        if named.get("return_dict") is False:
            return None
        if named.get("decoder_inputs_embeds") is not None:
            return None
        if self.agrees is None:
            self.agrees = self._same_loss(labels.device)
        output = self._run(named) if self.agrees else None
        if output is None or output.get("logits") is None:
            return output
        trained = [p for p in self.wrapper.parameters() if p.requires_grad]
        version = sum(p._version for p in trained)

        def compute() -> Tensor:
            if sum(p._version for p in trained) != version:
                raise PTuneError(
                    "logits were asked for after the weights had changed, so that they would be those of another step. "
                    "Read them before optimizer.step(), or set loss_at_labels=False in the PTuneConfig."
                )
            return self._all_logits(named)

        return _with_logits(output, compute)

    def _run(self, named: dict[str, Any]) -> Any:
        labels: Tensor = named["labels"]
        flat = (F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.shifted else labels).flatten()
        rows = (flat != IGNORED).nonzero()[:, 0]
        if not len(rows):
            return None
        kept = flat[rows]
        if self.shifted:  # the backbone shifts by itself: the first label and the last state meet nothing
            rows, kept = torch.cat([rows, rows[-1:]]), torch.cat([kept.new_full((1,), IGNORED), kept])
        self.now.put((rows, labels.shape))
        try:
            with self._own_loss():
                return self.backbone(**(self._with_decoder_inputs(named) | {"labels": kept[None]}))
        finally:
            self.now.take()

    @contextmanager
    def _own_loss(self) -> Iterator[None]:
        """Let transformers' standard losses run without a softmax of all logits; others stay."""
        standard = self.backbone.loss_function
        standard = standard.standard if isinstance(standard, _Sparing) else standard
        if standard in _LOSSES:
            self.backbone.__dict__["_loss_function"] = _Sparing(standard)
        try:
            yield
        finally:
            self.backbone.__dict__.pop("_loss_function", None)  # another thread's pass has ended

    def _gather(self, module: Any, args: tuple[Any, ...]) -> Any:
        now: tuple[Tensor, torch.Size] | None = self.now.look()
        if now is None or not args or args[0].shape[:-1] != now[1]:
            return None
        return args[0].flatten(0, 1).index_select(0, now[0].to(args[0].device))[None], *args[1:]

    def _same_loss(self, device: torch.device) -> bool:
        """Whether the backbone's loss is the same from labelled positions alone, on a few tokens."""
        words: Any = self.backbone.get_input_embeddings()
        size = getattr(words, "num_embeddings", None)
        if size is None:
            return False
        ids = torch.tensor([[5, 9, 13, 4, 7], [11, 3, 8, 6, 12]], device=device) % size
        labels = ids.clone()
        labels[0, :2] = labels[1, 3:] = IGNORED
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        with trying(), probing(self.wrapper), torch.no_grad():
            whole, part = self.backbone(**inputs).loss, self._run(inputs).loss
            exact = whole.dtype in (torch.float32, torch.float64) and self.backbone.dtype != torch.bfloat16
            return bool(torch.isclose(whole, part, rtol=1e-4 if exact else 2e-2, atol=1e-6))
        return False

    def _all_logits(self, named: dict[str, Any]) -> Tensor:
        logger.warning_once(
            "logits were asked for after a training step that computed them at labels only: the forward pass is "
            "repeated. Set loss_at_labels=False in the PTuneConfig to have them with the loss."
        )
        logits: Tensor = self.backbone(**(self._with_decoder_inputs(named) | {"labels": None})).logits
        return logits

    def _with_decoder_inputs(self, named: dict[str, Any]) -> dict[str, Any]:
        """What an encoder-decoder derives from all labels, before they are replaced."""
        if not self.backbone.config.is_encoder_decoder or named.get("decoder_input_ids") is not None:
            return named
        prepare: Any = self.backbone.prepare_decoder_input_ids_from_labels
        return named | {"decoder_input_ids": prepare(labels=named["labels"])}


def _given(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(value)


class _LogitsOnDemand:
    """Mixed into an output class: `logits` are computed when they are asked for, and are no item before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # accelerate makes the output of a pass in half precision anew, of its items
        source, _made.last = getattr(_made, "last", lambda: None)(), lambda: None
        loss: Any = super().__getitem__("loss") if source is not None else None  # type: ignore[misc]
        if source is not None and (loss is source.loss or loss.dtype != source.loss.dtype):
            compute = source.__dict__["_compute"]
            self.__dict__["_compute"] = lambda: compute().to(loss.dtype)

    def __repr__(self) -> str:
        kept = self.__dict__.get("_logits")
        shown = {**dict(self.items()), "logits": "computed on demand" if kept is None else kept}  # type: ignore[attr-defined]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def logits(self) -> Tensor | None:
        kept = self.__dict__
        if kept.get("_logits") is None and "_compute" in kept:
            kept["_logits"] = kept["_compute"]()
        return kept.get("_logits")

    @logits.setter
    def logits(self, value: Tensor | None) -> None:
        self.__dict__["_logits"] = value

    def get(self, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)  # type: ignore[misc]

    def __contains__(self, key: Any) -> bool:
        return key == "logits" or super().__contains__(key)  # type: ignore[misc]

    def to_tuple(self) -> tuple[Any, ...]:
        loss, *rest = super().to_tuple()  # type: ignore[misc]
        return (loss, self.logits, *rest)

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            return self.logits
        if isinstance(key, str) or key == 0:  # the loss
            return super().__getitem__(key)  # type: ignore[misc]
        return self.to_tuple()[key]


_on_demand: dict[Any, type] = {}
_made = threading.local()  # `last`: what refers to the last output that this thread has made


def _with_logits(output: Any, compute: Callable[[], Tensor]) -> Any:
    OrderedDict.__delitem__(output, "logits")
    del output.__dict__["logits"]
    kind = type(output)
    if kind not in _on_demand:
        # FSDP2 walks the fields for tensors with gradients, which must not count as asking
        shown = {n: f for n, f in vars(kind)["__dataclass_fields__"].items() if n != "logits"}
        names = {"__module__": kind.__module__, "__dataclass_fields__": shown}
        _on_demand[kind] = type(kind.__name__, (_LogitsOnDemand, kind), names)
    output.__class__ = _on_demand[kind]
    output.__dict__["_compute"] = compute
    _made.last = weakref.ref(output)
    return output
