"""What a backbone was before an adapter trained parts of it: put back, or noted."""

from torch import Tensor
from transformers import PreTrainedModel

from hf_ptune.backbone import adapter_names, head_names
from hf_ptune.configuration_ptune import PTuneConfig
from hf_ptune.sharding import write

CHANGED = "_ptune_changed"  # on a backbone: names of parameters that an adapter has trained and left in it


class Before:
    """Keep what a method itself trains of a base; what else an adapter trains of it may be large, and is noted alone.

    Args:
        backbone: about to be wrapped.
        config: of the adapter.
        task: a key of `backbone.TASKS`.
    """

    def __init__(self, backbone: PreTrainedModel, config: PTuneConfig, task: str) -> None:
        self.config = config
        self.task = task
        names: set[str] = set()
        if not config.train_backbone:
            names = adapter_names(backbone, config.method, task) - head_names(backbone, task)
        self.kept: dict[str, Tensor] = {
            n: p.detach().clone() for n, p in backbone.named_parameters() if n in names and p.numel() and not p.is_meta
        }

    def put_back(self, backbone: PreTrainedModel, trained: bool = True) -> None:
        """Give a backbone what is kept of before; note what else of it has been trained, its head apart.

        Args:
            backbone: the same, as it is now.
            trained: whether anything can have been trained since then.
        """
        parameters, config = dict(backbone.named_parameters()), self.config
        for name, value in self.kept.items():
            if name in parameters and parameters[name].shape == value.shape:
                write(parameters[name], value)
        if trained and (config.modules_to_save or config.train_backbone):
            names = adapter_names(
                backbone, config.method, self.task, config.modules_to_save, whole=config.train_backbone
            )
            noted = names - head_names(backbone, self.task) - set(self.kept)
            backbone.__dict__[CHANGED] = {*noted, *backbone.__dict__.get(CHANGED, ())}
