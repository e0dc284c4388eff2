"""The Trainer that shows a task the features behind its predictions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer
from transformers.models.bart.modeling_bart import shift_tokens_right
from transformers.trainer_utils import EvalLoopOutput

from hf_ptune.tasks.base import Task


class TaskTrainer(Trainer):
    """Train and measure a model on a task's features.

    Args:
        task: pads, measures and asks.
        labels: names of its labels.
        processing_class: the tokenizer.
        kwargs: what a Trainer takes; collator and metrics are the task's own.
    """

    def __init__(
        self, *, task: Task, labels: Sequence[str], processing_class: PreTrainedTokenizerBase, **kwargs: Any
    ) -> None:
        scorer = task.scorer(processing_class, labels)
        smoothing = getattr(kwargs.get("args"), "label_smoothing_factor", 0.0)
        super().__init__(
            processing_class=processing_class,
            data_collator=task.collator(processing_class),
            compute_metrics=self._measure,
            compute_loss_func=None if scorer is None else partial(scorer.loss, smoothing=smoothing),
            preprocess_logits_for_metrics=task.preprocess_logits if scorer is None else scorer.choose,
            **kwargs,
        )
        self.task = task
        self.labels = list(labels)
        self.features: Any = []  # those that are being evaluated

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.task.compute_metrics(prediction, self.features, self.labels)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What any Trainer computes; smoothed labels do not reach a model, whose decoder has its inputs of them.

        A held-out loss is the mean over its own batch: shares of all ranks' batches would be averaged as if they were
        means.
        """
        if not model.training:
            kwargs["num_items_in_batch"] = None
        if self.label_smoother is not None and self.task.model_task == "SEQ_2_SEQ_LM":
            backbone = self.accelerator.unwrap_model(model).backbone
            prepare = getattr(backbone, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:  # M2M100 and Blenderbot shift by themselves
                config = backbone.config
                first = {"pad_token_id": config.pad_token_id, "decoder_start_token_id": config.decoder_start_token_id}
                prepare = partial(shift_tokens_right, **first)
            inputs["decoder_input_ids"] = prepare(inputs["labels"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)  # predictions are measured by their place

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader[Any]:
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = asked and is_training  # every held-out row is measured
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as the Trainer does, then let the task measure what logits do not tell."""
        self.features = dataloader.dataset
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        further = self.task.measure_further(self, self.features)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in further.items()})
        return output
