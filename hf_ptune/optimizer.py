"""Learning rates of their own for a fresh task head, and for a backbone that trains along with its prompt."""

from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ptune.backbone import POOLER, adapter_names, head_names
from hf_ptune.errors import ConfigError

_PROMPT, _HEAD, _BACKBONE = range(3)  # the prompt's group comes first: the Trainer logs the rate of the first


def make_optimizer(
    args: TrainingArguments,
    model: Any,
    backbone_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
) -> tuple[Any, dict[str, Any]] | None:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: the optimizer of its arguments, with groups of their rates.

    P-Tuning tunes prompt and backbone together on SuperGLUE (Liu et al. 2021, section 4.2); the pretrained part
    takes the smaller steps. A fresh head takes larger ones than a network before the prompt could. Schedules and
    weight decay go by group, as the Trainer's own.

    Args:
        args: of the Trainer; `learning_rate` is that of the prompt, and of all that has none of its own.
        model: a wrapped model, or one of several tasks.
        backbone_learning_rate: more than 0, of a model with `train_backbone`.
        head_learning_rate: more than 0; nothing comes of it where the task has no head.

    Returns:
        Class and arguments of the optimizer, or `None`: the Trainer makes it, with one rate.

    Raises:
        ConfigError: a rate of 0 or less, or one of a backbone that does not train.
    """
    if backbone_learning_rate is None and head_learning_rate is None:
        return None
    for name, rate in (("backbone", backbone_learning_rate), ("head", head_learning_rate)):
        if rate is not None and not rate > 0:
            raise ConfigError(f"{name}_learning_rate={rate}; expected more than 0. Leave it out for the prompt's rate.")
    config = model.config
    if backbone_learning_rate is not None and not config.train_backbone:
        raise ConfigError("backbone_learning_rate is for a backbone that trains: PTuneConfig(train_backbone=True).")
    own: set[str] = set()
    if config.train_backbone:
        names = adapter_names(model.backbone, config.method, model.task, config.modules_to_save)
        own = {f"backbone.{n}" for n in names}
    heads = _heads(model)
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pretrained = config.train_backbone and name.startswith("backbone.") and name not in own
            kind = _HEAD if name in heads else _BACKBONE if pretrained else _PROMPT
            groups.setdefault((kind, name in decayed), []).append(parameter)
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    rates = {_PROMPT: None, _HEAD: head_learning_rate, _BACKBONE: backbone_learning_rate}
    return optimizer, dict(settings) | {
        "params": [
            {
                "params": parameters,
                "lr": args.learning_rate if rates[kind] is None else rates[kind],
                "weight_decay": args.weight_decay if decays else 0.0,
            }
            for (kind, decays), parameters in sorted(groups.items(), key=lambda pair: pair[0][0])
        ]
    }


def _heads(model: Any) -> set[str]:
    """Names of the parameters of a model's task head, with a pooler that trains and what is added to the head.

    Of several tasks, those of all heads.
    """
    parts = {f"tasks.{t}.": model.model_of(t) for t in model.tasks} if hasattr(model, "model_of") else {"": model}
    found: set[str] = set()
    for place, part in parts.items():
        pooler = [POOLER] if POOLER in (part.config.modules_to_save or []) else []
        found |= {f"{place}backbone.{n}" for n in head_names(part.backbone, part.task, pooler)}
        found |= {f"{place}{own}.{n}" for own, added in part.head_parts().items() for n, _ in added.named_parameters()}
    return found
