"""Make the classes known to transformers' Auto classes and pipelines."""

from transformers import AutoConfig

from hf_ptune.backbone import TASKS
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.modeling_ptune import CLASSES

__all__ = ["TASKS", "register"]


def register() -> None:
    """Register configuration and task classes; a second call changes nothing."""
    AutoConfig.register(PTuneConfig.model_type, PTuneConfig, exist_ok=True)
    for task, auto_class in TASKS.items():
        auto_class.register(PTuneConfig, CLASSES[task], exist_ok=True)
