"""One prompt over several tasks: a frozen base and a prompt that all of them share, and a head for each."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel

from hf_ptune.adapter_file import check_tensors, find_weights, read_tensors
from hf_ptune.backbone import POOLER, head_names, task_of
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.errors import AdapterFileError, BackboneError, ConfigError, PTuneError
from hf_ptune.methods import get_method
from hf_ptune.modeling_ptune import PTunePreTrainedModel
from hf_ptune.placement import reading_for, shifts_positions
from hf_ptune.resuming import differences
from hf_ptune.wrapping import get_ptune_model

TASK_KEY = "task"


class MultiTaskPrompt(nn.Module):
    """Hold a wrapped model for each task, with one prompt and one set of base weights under all of them.

    Liu et al. 2022, section 3.2, "Multi-task Learning": continuous prompts are shared, each task has a linear head.
    What is trained of the base besides (`modules_to_save`, such as a pooler that the checkpoint lacks) belongs to the
    head, so that each task has its own.

    Args:
        models: name of a task to its wrapped model; what they share has been shared already.
    """

    # losses are means over a batch of one task: the Trainer has no tokens of several tasks to count together
    accepts_loss_kwargs = False

    def __init__(self, models: Mapping[str, PTunePreTrainedModel]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(models)
        self.config = next(iter(models.values())).config

    @property
    def prompt(self) -> nn.Module:
        """The prompt that all tasks share."""
        prompt: nn.Module = self.model_of(next(iter(self.tasks))).prompt
        return prompt

    def model_of(self, task: str) -> Any:
        """The wrapped model of a task.

        Raises:
            PTuneError: no such task.
        """
        if task not in self.tasks:
            raise PTuneError(f"there is no task {task!r}; the tasks are {', '.join(self.tasks)}.")
        return self.tasks[task]

    def forward(self, task: str, **inputs: Any) -> Any:
        """What a task's model says to a batch of that task."""
        return self.model_of(task)(**inputs)

    def adapter_parameter_names(self) -> set[str]:
        """Names, as in `named_parameters()`, of all that is trained: the prompt once, and every head."""
        every = {f"tasks.{t}.{n}" for t in self.tasks for n in self.model_of(t).adapter_parameter_names()}
        return every & {n for n, _ in self.named_parameters()}

    def freeze_backbone(self) -> None:
        """Let gradients reach the prompt and the heads, and nothing else."""
        for task in self.tasks:
            self.model_of(task).freeze_backbone()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        for task in self.tasks:
            self.model_of(task).gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], flatten: bool = False, **kwargs: Any) -> None:
        """Write one adapter folder a task, each with the shared prompt and the task's own head.

        Each loads like any other adapter, and can be what `prompt_tuning_init="ADAPTER"` starts from.

        Args:
            save_directory: gets a folder by the name of each task.
            flatten: fold the reparameterisation into the written prompts.
            kwargs: what `PTunePreTrainedModel.save_pretrained` takes.
        """
        for task in self.tasks:
            self.model_of(task).save_pretrained(Path(save_directory) / task, flatten=flatten, **kwargs)

    def load_adapters(self, folder: str | os.PathLike[str]) -> None:
        """Take over the prompt and the heads that `save_pretrained` wrote, in place; all of them, or nothing.

        Raises:
            AdapterFileError: the folder holds other adapters, or such as share no prompt.
        """
        taken: dict[str, dict[str, Tensor]] = {}
        for task in self.tasks:
            source, model = str(Path(folder) / task), self.model_of(task)
            taken[task] = found = read_tensors(find_weights(source))
            check_tensors(found, model.adapter_state_dict(), source)
            there = _read_config(source)
            differ = differences(there, model.config)
            shifts = [shifts_positions(model.backbone, c) for c in (there, model.config)]
            if shifts[0] != shifts[1]:
                differ.append(f"position_shift is {shifts[0]} there and {shifts[1]} here")
            if differ:
                raise AdapterFileError(
                    f"{source} holds another adapter: {'; '.join(differ)}. Load the tasks with its options and labels."
                )
            first = next(iter(taken.values()))
            if any(n.startswith("prompt.") and not torch.equal(t, first[n]) for n, t in found.items()):
                raise AdapterFileError(
                    f"{source} has another prompt than {next(iter(taken))} beside it; expected adapters that were "
                    "trained together. Load each by itself, with its Auto class."
                )
        for task, found in taken.items():
            self.model_of(task).load_adapter_state_dict(found)


def get_multitask_model(
    backbones: Mapping[str, PreTrainedModel],
    config: PTuneConfig,
    tokenizer: Any = None,
    modules_to_save: Mapping[str, Sequence[str]] | None = None,
    head_states: Mapping[str, str | None] | None = None,
) -> MultiTaskPrompt:
    """Wrap a task model for each task, over one base and with one prompt.

    Args:
        backbones: name of a task to its whole task model; all of the same base. The weights of the first one's base
            take the place of the others' own, which are freed.
        config: method and options, for all of them; the first task's start is the prompt's.
        tokenizer: reads the text of a start.
        modules_to_save: name of a task to those of its own, where they are not the configuration's.
        head_states: name of a task to what its head reads, likewise.

    Returns:
        The model; a batch names its task: `model(task="ner", input_ids=…, labels=…)`.

    Raises:
        BackboneError: the backbones have different bases, or cannot take the method.
        ConfigError: fewer than one task, a name that cannot be a folder or is none of the tasks', a method without a
            prompt, or a base that would be trained.
    """
    if not backbones:
        raise ConfigError("there is no task; name at least one, with its backbone.")
    wrong = [n for n in backbones if not n or n.startswith(".") or not n.replace("-", "").replace("_", "").isalnum()]
    if wrong:
        raise ConfigError(f"the task's name {wrong[0]!r} cannot be a folder's; use letters, digits, - and _.")
    for option, by_task in (("modules_to_save", modules_to_save), ("head_states", head_states)):
        if unknown := set(by_task or ()) - set(backbones):
            raise ConfigError(f"{option} names the task {min(unknown)!r}; expected one of {', '.join(backbones)}.")
    if config.train_backbone:
        raise ConfigError("train_backbone=True: tasks share a base that is frozen; leave it out.")
    if get_method(config.method).kind is None:
        raise ConfigError(f"{config.method} has no prompt that tasks could share; choose another method.")
    leading, first = next(iter(backbones.items()))
    trained = dict.fromkeys(backbones, config.modules_to_save) | dict(modules_to_save or {})
    modules = {task: list(named or []) for task, named in trained.items()}
    before = [(m._parameters, dict(m._parameters)) for backbone in backbones.values() for m in backbone.modules()]
    models: dict[str, PTunePreTrainedModel] = {}
    try:
        for task, backbone in backbones.items():
            share_base(first, backbone, task, modules[leading], modules[task])
        for task, backbone in backbones.items():
            states = (head_states or {}).get(task, config.head_states)
            own = {"modules_to_save": modules[task] or None, "head_states": states}
            chosen = type(config).from_dict(config.to_dict() | own)
            models[task] = get_ptune_model(backbone, reading_for(chosen, task_of(backbone)), tokenizer)
        _share_prompt(models)
    except BaseException:
        for model in reversed(models.values()):  # the first one froze what they share
            model.unwrap()
        for held, own_weights in before:
            held.update(own_weights)
        raise
    return MultiTaskPrompt(models)


def _read_config(source: str) -> PTuneConfig:
    try:
        config: PTuneConfig = PTuneConfig.from_pretrained(source)
    except OSError as error:
        raise AdapterFileError(f"{source} has no config.json that could be read ({error}).") from error
    return config


def _share_prompt(models: Mapping[str, PTunePreTrainedModel]) -> None:
    prompt = next(iter(models.values())).prompt
    for task, model in models.items():
        assert prompt is not None and model.prompt is not None
        shapes = [{n: t.shape for n, t in p.state_dict().items()} for p in (prompt, model.prompt)]
        if shapes[0] != shapes[1]:
            raise BackboneError(f"the task {task!r} needs another prompt than the first one: {shapes[1]}.")
        model.prompt = prompt
        model._reattach()


def share_base(
    first: PreTrainedModel,
    other: PreTrainedModel,
    task: str = "",
    first_trains: Sequence[str] = (),
    other_trains: Sequence[str] = (),
) -> None:
    """Let a task model use the weights of another one's base instead of its own; heads stay its own.

    Args:
        first: a task model.
        other: one of the same base; its modules stay, and with them hooks and buffers.
        task: what it is for, for messages.
        first_trains: names of the modules that the first one trains besides its head; they stay its own.
        other_trains: those that the other one trains.

    Raises:
        BackboneError: the bases differ, in a shape or a value; or lack a module that is to be trained.
    """
    theirs = dict(first.base_model.named_parameters())
    heads: set[int] = set()
    for model, further in ((first, first_trains), (other, other_trains)):
        names = head_names(model, task_of(model), list(further))
        heads |= {id(p) for n, p in model.named_parameters() if n in names}
    swapped: dict[int, nn.Parameter] = {}
    for name, parameter in other.base_model.named_parameters():
        shared = theirs.get(name)
        if shared is None or shared is parameter or {id(shared), id(parameter)} & heads:
            continue  # a pooler that the other task model does not have
        if shared.shape != parameter.shape or shared.dtype != parameter.dtype or not torch.equal(shared, parameter):
            cure = "Load all task models from the same checkpoint, in the same dtype."
            if f".{POOLER}." in f".{name}":
                cure += f" One that lacks a {POOLER} gives each a fresh one: train it, modules_to_save=[{POOLER!r}]."
            raise BackboneError(
                f"the base of task {task!r} differs from the first task's in {name}; multi-task prompts need one base. "
                f"{cure}"
            )
        swapped[id(parameter)] = shared
    if not swapped and first is not other and not set(theirs) & {n for n, _ in other.base_model.named_parameters()}:
        raise BackboneError(f"task {task!r} has a {type(other).__name__}, whose base is not that of the first task.")
    for module in other.modules():
        for name, held in module._parameters.items():
            if held is not None and id(held) in swapped:
                module._parameters[name] = swapped[id(held)]  # tied weights outside the base follow


class MultiTaskDataset(Dataset[dict[str, Any]]):
    """Hold the features of several tasks one after another; each row names its task.

    Args:
        parts: name of a task to its features.
    """

    def __init__(self, parts: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        self.parts = {task: part for task, part in parts.items()}
        self.sizes = {task: len(part) for task, part in parts.items()}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        for task, part in self.parts.items():
            if index < len(part):
                return part[index] | {TASK_KEY: task}
            index -= len(part)
        raise IndexError(index)


class TaskSampler(Sampler[int]):
    """Draw rows so that every batch is of one task, and tasks follow each other at random.

    A task of n rows gets a share of the batches that is proportional to n ** (1 / temperature): at 1, the default,
    every row is seen once an epoch (the last batch of a task is filled up with rows drawn before); a higher
    temperature gives small tasks more, in an epoch of about the same length.

    Args:
        sizes: number of rows of each task, in the order of the dataset; each at least 1.
        batch_size: rows a batch, as the data loader cuts them.
        temperature: above 0.
        seed: of order and choice; every epoch has its own.

    Raises:
        ConfigError: a task without rows, or a temperature of 0 or less.
    """

    def __init__(self, sizes: Mapping[str, int], batch_size: int, temperature: float = 1.0, seed: int = 0) -> None:
        if empty := [task for task, size in sizes.items() if size < 1]:
            raise ConfigError(f"the task {empty[0]!r} has no rows; expected at least one.")
        if temperature <= 0:
            raise ConfigError(f"temperature={temperature}; expected more than 0.")
        self.sizes = list(sizes.values())
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        whole = [math.ceil(size / batch_size) for size in self.sizes]
        weights = [(size / max(self.sizes)) ** (1 / temperature) for size in self.sizes]
        total = sum(whole)
        shares = [max(1, round(total * w / sum(weights))) for w in weights]
        self.batches = whole if temperature == 1 else shares

    def __len__(self) -> int:
        return sum(self.batches) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; the data loader of accelerate does."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1
        batches: list[list[int]] = []
        start = 0
        for size, count in zip(self.sizes, self.batches, strict=True):
            needed = count * self.batch_size
            drawn: list[int] = []
            while len(drawn) < needed:
                drawn += (torch.randperm(size, generator=generator) + start).tolist()
            batches += [drawn[k : k + self.batch_size] for k in range(0, needed, self.batch_size)]
            start += size
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]


class TaskCollator:
    """Pad a batch by its task's own collator, and name the task beside it.

    Args:
        collators: name of a task to what pads its features.
    """

    def __init__(self, collators: Mapping[str, Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]]) -> None:
        self.collators = dict(collators)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        tasks = {row[TASK_KEY] for row in rows}
        if len(tasks) != 1:
            raise PTuneError(f"a batch has rows of {sorted(tasks)}; expected one task. Draw rows by TaskSampler.")
        task = tasks.pop()
        return dict(self.collators[task]([{k: v for k, v in row.items() if k != TASK_KEY} for row in rows])) | {
            TASK_KEY: task
        }
