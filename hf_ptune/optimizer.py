"""A learning rate of its own for a backbone that trains along with its prompt."""

from typing import Any, cast

from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ptune.backbone import adapter_names
from hf_ptune.errors import ConfigError


def make_optimizer(
    args: TrainingArguments, model: Any, backbone_learning_rate: float | None
) -> tuple[Any, dict[str, Any]] | None:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: the optimizer of its arguments, with groups of two rates.

    P-Tuning tunes prompt and backbone together on SuperGLUE (Liu et al. 2021, section 4.2); the pretrained part
    takes the smaller steps. Schedules and weight decay go by group, as the Trainer's own.

    Args:
        args: of the Trainer; `learning_rate` is that of the prompt and of a fresh head.
        model: a wrapped model with `train_backbone`.
        backbone_learning_rate: more than 0; `None` leaves the optimizer to the Trainer.

    Returns:
        Class and arguments of the optimizer, or `None`.

    Raises:
        ConfigError: the backbone does not train.
    """
    if backbone_learning_rate is None:
        return None
    config = model.config
    if not config.train_backbone:
        raise ConfigError("backbone_learning_rate is for a backbone that trains: PTuneConfig(train_backbone=True).")
    own = {f"backbone.{n}" for n in adapter_names(model.backbone, config.method, model.task, config.modules_to_save)}
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            pretrained = name.startswith("backbone.") and name not in own
            groups.setdefault((pretrained, name in decayed), []).append(parameter)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    rates = {True: backbone_learning_rate, False: args.learning_rate}
    return kind, dict(settings) | {
        "params": [
            {"params": parameters, "lr": rates[pretrained], "weight_decay": args.weight_decay if decays else 0.0}
            for (pretrained, decays), parameters in groups.items()
        ]
    }
