"""Try one batch before training starts, so that a run that cannot learn stops with its reason."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import IterableDatasetShard
from transformers.utils import logging

from hf_ptune.batch_share import count_labels
from hf_ptune.callbacks.freeze import SHARDING, held_back, some, unwrap_ptune_model
from hf_ptune.cross_entropy import IGNORED
from hf_ptune.errors import GuardError
from hf_ptune.injection import device_of
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.multitask import TASK_KEY, MultiTaskDataset, MultiTaskPrompt
from hf_ptune.position_tables import position_tables, positions_of_prompt

logger = logging.get_logger(__name__)

LossFunction = Callable[..., Tensor]
_LOGITS = ("logits", "start_logits", "last_hidden_state")
_STREAMED = 10_000  # rows of a stream that are searched for a label that counts, or of any data for a task


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Give the random states of Python, numpy and torch (CPU and the model's GPUs) back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def kept_model_state(model: nn.Module) -> Iterator[None]:
    """Give modes, gradients and buffers back as they were.

    Buffers of more than one integer are not copied: they hold packed weights, which no forward pass writes.
    """
    mode, modes = model.training, [(m, m.training) for m in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [
        (m, name, b, b.detach().clone() if b.is_floating_point() or b.numel() == 1 else b)
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        model.train(mode)  # ours does more than set a flag
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer
                if copy is not buffer:
                    buffer.copy_(copy)


def check_batch(model: nn.Module, batch: Mapping[str, Any], compute_loss_func: LossFunction | None = None) -> None:
    """Check that a model can learn from a batch; leave model and random states as they were.

    Args:
        model: a model of `get_ptune_model` or `get_multitask_model`, in whatever container accelerate put it.
        batch: what the model's forward takes, labels included, of several tasks the `task` too; `input_ids` is
            `[B, S]`.
        compute_loss_func: the Trainer's, where it does not take the model's own loss.

    Raises:
        GuardError: rows lack virtual tokens of the template, the sequences do not fit the position table, labels are
            out of range, the model is none of ours or returns no logits, the prompt does not move them, the loss is
            missing, not finite or of nothing that trains, the backbone gets gradient, or a parameter of the adapter
            gets none or one that is not finite, or the whole prompt or adapter one of zeros.
    """
    whole = unwrap_ptune_model(model, "the guard", GuardError)
    inputs = dict(batch)
    inner = _model_of(whole, inputs.pop(TASK_KEY, None)) if isinstance(whole, MultiTaskPrompt) else whole
    inputs = send_to_device(inputs, device_of(inner))
    _check_places(inner, inputs)
    check_positions(inner, inputs)
    _check_labels(inner, inputs)
    with kept_random_state(inner), kept_model_state(inner):
        loss_of: Callable[[Any], Any] = _own_loss
        if compute_loss_func is not None:
            count = count_labels(inputs, _shifted(inner))
            loss_of = partial(_given_loss, compute_loss_func, inputs.pop("labels", None), count)
        _check_prompt_moves(inner, inputs)
        _check_gradients(inner, inputs, loss_of)


def _model_of(model: MultiTaskPrompt, task: Any) -> PTunePreTrainedModel:
    if task not in model.tasks:
        raise GuardError(
            f"the batch is of the task {task!r}; expected {TASK_KEY} to be one of {', '.join(model.tasks)}. "
            "Let the collator name it, as TaskCollator does."
        )
    found: PTunePreTrainedModel = model.model_of(task)
    return found


def _own_loss(output: Any) -> Any:
    return getattr(output, "loss", None)


def _given_loss(function: LossFunction, labels: Any, count: Tensor | None, output: Any) -> Any:
    taken = inspect.signature(function).parameters.values()
    if any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in taken):
        return function(output, labels, num_items_in_batch=count)  # by name, as the Trainer does
    return function(output, labels)


def _shifted(model: PTunePreTrainedModel) -> bool:
    """Whether the first label of a row is no word to be told."""
    return model.task == "CAUSAL_LM"


def _check_places(model: PTunePreTrainedModel, inputs: dict[str, Any]) -> None:
    """Refuse rows without the virtual tokens of the template."""
    ids, virtual = inputs.get("input_ids"), model.config.virtual_token_ids
    if virtual is None or not isinstance(ids, Tensor):
        return
    there = (ids[..., None] == torch.tensor(virtual, device=ids.device)).any(-2).all(-1)  # [B]
    if not bool(there.all()):
        raise GuardError(
            f"{int((~there).sum())} of {there.numel()} rows of the first batch lack virtual tokens of the template "
            f"{model.config.template!r}, expected all {len(virtual)} in each. Encode rows by "
            "hf_ptune.templates.Template, or write their names (<|prompt_0|> …) into the text, and let no truncation "
            "cut them off."
        )


def _check_prompt_moves(model: PTunePreTrainedModel, inputs: dict[str, Any]) -> None:
    if model.prompt is None:
        return
    model.eval()  # type: ignore[no-untyped-call]  # without dropout, so that only the prompt differs
    with torch.no_grad():
        moved = _logits(model(**inputs))
        with model.disable_adapter():
            still = _logits(model(**inputs))
    if torch.equal(moved, still):
        raise GuardError(
            f"the prompt of {model.config.num_virtual_tokens} virtual tokens does not move the logits: they "
            f"are the backbone's own, bit for bit, expected others. {type(model.backbone).__name__} may have "
            "been given another prompt or attention implementation since; wrap it anew with get_ptune_model."
        )


def _logits(output: Any) -> Tensor:
    for name in _LOGITS:
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    raise GuardError(
        f"the model returned {type(output).__name__}, expected one of {', '.join(_LOGITS)}. "
        "Let it return its usual output (return_dict=True)."
    )


def _check_gradients(model: PTunePreTrainedModel, inputs: dict[str, Any], loss_of: Callable[[Any], Any]) -> None:
    model.train()  # gradient checkpointing works in this mode only
    loss = loss_of(model(**inputs))
    if not isinstance(loss, Tensor):
        raise GuardError(
            f"the model returned no loss for the inputs {some(inputs)}; expected labels that its forward "
            "takes. Let the collator keep the label column, or leave the guard out where the Trainer "
            "computes the loss."
        )
    if not bool(torch.isfinite(loss).all()):
        raise GuardError(
            f"the loss is {loss.detach().mean().item()}, expected a finite number. "
            + ("All labels are -100: let some of them count. " if _all_ignored(model, inputs) else "")
            + "Check labels and inputs, or use bfloat16 or float32 instead of float16."
        )
    if not loss.requires_grad:
        raise GuardError(
            "the loss does not depend on any trainable parameter; expected the adapter to train. "
            "Call model.freeze_backbone() before training, and turn torch.no_grad off."
        )
    # autograd.grad would spare the .grad fields, but reentrant checkpoints refuse it
    loss.mean().backward()  # type: ignore[no-untyped-call]
    _check_adapter_gradients(model)


def _check_adapter_gradients(model: PTunePreTrainedModel) -> None:
    named = dict(model.named_parameters())
    adapter = model.adapter_parameter_names()
    leaked = {n for n, p in named.items() if n not in adapter and p.grad is not None}
    if leaked:
        raise GuardError(
            f"{len(leaked)} parameters of the backbone get gradient ({some(leaked)}), expected none. "
            "Freeze them: Trainer(callbacks=[FreezeBackboneCallback()]), or model.freeze_backbone()."
        )
    # where ranks hold parts, what is asked of a gradient is asked of all of them, so in one order
    due = {n: named[n].grad for n in sorted(adapter - held_back(model))}
    absent = {n for n, g in due.items() if g is None}
    if model.config.train_backbone:  # what the task does not use, such as a pooler, is the backbone's own affair
        absent = {n for n in absent if n.startswith("prompt.")}
    if absent:
        cause = "the forward pass does not use them; check gradient checkpointing and modules_to_save"
        if any(not named[n].requires_grad for n in absent):
            cause = "they are frozen; call model.freeze_backbone() before training"
        raise GuardError(f"{some(absent)} of the adapter get no gradient, expected one for each: {cause}.")
    wild = {n for n, g in due.items() if g is not None and not bool(torch.isfinite(g).all())}
    if wild:
        raise GuardError(
            f"{some(wild)} of the adapter get a gradient that is not finite. "
            "Use bfloat16 or float32 instead of float16, and check the batch for extreme values."
        )
    zero = {n for n, g in due.items() if g is not None and not bool(g.any())}
    prompt = {n for n in due if n.startswith("prompt.")}
    if due and (zero == set(due) or (prompt and prompt <= zero)):
        raise GuardError(
            f"every gradient of {'the prompt' if prompt else 'the adapter'} is zero, expected others. "
            "Check that labels are not all -100 and that the attention mask leaves tokens to attend from."
        )
    if model.task == "MULTIPLE_CHOICE":  # a bias that is added to every choice has none
        zero -= {n for n in zero if n.endswith(".bias") and named[n].numel() == 1}
    if zero:
        logger.warning(f"gradients that are zero in the first batch, as a start at zero makes them: {some(zero)}")


def _all_ignored(model: PTunePreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    told = {n: model.labels_of_words(t) for n, t in inputs.items() if n == "labels" and isinstance(t, Tensor)}
    count = count_labels(told | {k: v for k, v in inputs.items() if k == "shift_labels"}, _shifted(model))
    return count is not None and not count


def check_positions(model: PTunePreTrainedModel, inputs: Mapping[str, Any], further: int = 0) -> None:
    """Compare S, and P where own tokens stand behind the prompt, with tables of absolute positions.

    Args:
        model: a wrapped model.
        inputs: a batch.
        further: tokens that will be written behind the ids of a decoder.

    Raises:
        GuardError: a table has fewer rows.
    """
    virtual = positions_of_prompt(model)
    # without tokens of its own, a decoder reads what it is to write, or the input where it writes nothing
    read = "labels" if model.task == "SEQ_2_SEQ_LM" else "input_ids"
    for table in position_tables(model):
        names: tuple[str, ...] = ("decoder_input_ids", "decoder_inputs_embeds", read)
        if not table.in_decoder:
            names = ("input_ids", "inputs_embeds")
        length = _length(inputs, names)
        if table.in_decoder:
            length = max(length, further)
        elif not model.config.is_encoder_decoder:
            length += further
        if length + virtual > table.rows:
            prompt = f" and {virtual} virtual tokens make {length + virtual} positions" if virtual else ""
            written = f" ({further + 1} of them to be written)" if further else ""
            left = table.rows - virtual - further
            cures = [f"shorten the samples to {left} tokens (max_length of the tokenizer)"] if left > 0 else []
            cures += ["write fewer new tokens"] if further else []
            cures += ["take fewer virtual tokens"] if virtual else []
            cure = ", or ".join(cures)
            raise GuardError(
                f"sequences of {length} tokens{written}{prompt}, but {table.name} has {table.rows}. "
                f"{cure[0].upper()}{cure[1:]}."
            )


def _length(inputs: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        if isinstance(found := inputs.get(name), Tensor):
            return int(found.shape[2 if name == "input_ids" and found.dim() == 3 else 1])  # [B, C, S]
    return 0


def _check_labels(model: PTunePreTrainedModel, inputs: dict[str, Any]) -> None:
    labels, config = inputs.get("labels"), model.config
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() == 0:
        return
    if model.task in ("SEQ_CLS", "TOKEN_CLS"):
        if config.num_labels == 1 or config.problem_type in ("regression", "multi_label_classification"):
            return
        limit = int(config.num_labels or 0)
        cure = "Load the backbone with num_labels= the number of classes"
    elif model.task in ("CAUSAL_LM", "MASKED_LM", "SEQ_2_SEQ_LM"):
        limit = int(config.get_text_config().vocab_size)
        cure = "Use the backbone's own tokenizer, or resize its embeddings"
    else:
        return
    labels = model.labels_of_words(labels)
    counted = labels[labels != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < limit:
        raise GuardError(
            f"labels run from {int(counted.min())} to {int(counted.max())}, expected 0 to {limit - 1} "
            f"(or -100 to ignore). {cure}, or renumber the labels."
        )


class GuardCallback(TrainerCallback):
    """Try one batch before training starts and stop with a `GuardError` where training could not work.

    The batch is collated from the first rows of the training data, beside the data loader: order of the
    data, random states and parameters stay as they are without the guard. Where none of its labels counts, further
    rows are taken until one does. Of several tasks each has its batch, where it has rows. It is not run where DeepSpeed
    runs the model, nor on a stream of samples that cannot be started anew, nor on a loader of the user's own that
    cannot be indexed; all are logged.

    Args:
        compute_loss_func: the Trainer's, where it has one.
    """

    def __init__(self, compute_loss_func: LossFunction | None = None) -> None:
        self.compute_loss_func = compute_loss_func

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the batch and check it.

        Raises:
            GuardError: what `check_batch` raises, or training data without samples.
        """
        model = unwrap_ptune_model(kwargs.get("model"), type(self).__name__, GuardError)
        if args.distributed_state is not None and args.distributed_state.distributed_type in SHARDING:
            logger.warning("the guard is not run: parameters are sharded over ranks.")
            return
        parts: dict[str | None, PTunePreTrainedModel] = (
            {t: model.model_of(t) for t in model.tasks} if isinstance(model, MultiTaskPrompt) else {None: model}
        )
        for task, inner in parts.items():
            batches = _batches(kwargs["train_dataloader"], state.train_batch_size or args.train_batch_size, task)
            if batches is None:
                return
            with kept_random_state(model):
                batch = next(batches, None)
                if batch is not None and _all_ignored(inner, batch):
                    batch = next((b for b in batches if not _all_ignored(inner, b)), batch)
            if batch is not None:
                check_batch(model, batch, self.compute_loss_func)
            elif task is None:
                raise GuardError("the training data has no samples; expected at least one.")
            else:
                logger.warning(f"the guard has not tried the task {task}: it found no row of it.")


def _batches(loader: Any, size: int, task: str | None) -> Iterator[Mapping[str, Any]] | None:
    """The training data in order, of one task where one is named, read beside its loader.

    `None`, and logged, where that would use up samples.
    """
    if _is_indexed(loader):
        return _of_task(_items(loader, len(loader)), task)
    dataset: Any = getattr(loader, "dataset", None) if hasattr(loader, "collate_fn") else None
    if isinstance(dataset, (accelerate.data_loader.IterableDatasetShard, IterableDatasetShard)):
        dataset = dataset.dataset  # a rank's share of it
    if task is not None and isinstance(dataset, MultiTaskDataset):
        rows: Iterator[Any] = (row | {TASK_KEY: task} for row in dataset.parts.get(task, ()))
    elif _is_indexed(dataset):
        rows = _of_task(_items(dataset, len(dataset)), task)
    elif hasattr(dataset, "take"):
        rows = _of_task(iter(dataset.take(_STREAMED)), task)
    else:
        name = type(loader if dataset is None else dataset).__name__
        logger.warning(f"the guard is not run: {name} cannot be read without using up samples.")
        return None
    if getattr(loader, "batch_sampler", None) is None:  # each sample is a batch
        return map(loader.collate_fn, rows)
    return map(loader.collate_fn, iter(lambda: list(islice(rows, size)), []))


def _of_task(found: Iterator[Any], task: str | None) -> Iterator[Any]:
    """Those of the first rows, or batches, that name a task; all of them where none is asked for."""
    if task is None:
        return found
    return (f for f in islice(found, _STREAMED) if isinstance(f, Mapping) and f.get(TASK_KEY) == task)


def _is_indexed(data: Any) -> bool:
    """Whether samples can be read by number; torch's streams inherit a `__getitem__` that only raises."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def _items(data: Any, count: int) -> Iterator[Any]:
    return (data[i] for i in range(count))
