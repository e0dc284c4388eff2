"""Tasks whose answers are written: options of generation, and the metrics of what is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from hf_ptune.endings import end_ids
from hf_ptune.errors import RecipeError
from hf_ptune.injection import device_of
from hf_ptune.metrics import Bleu, RougeL
from hf_ptune.metrics.texts import bleu_tokenizers
from hf_ptune.position_tables import writing_room
from hf_ptune.tasks.base import Feature, Row, Task, missing


@dataclass(frozen=True)
class GenerationTask(Task):
    """Write an answer; held-out rows may have several `references`, all of which are right.

    A feature knows its `source_ids`, which the answer is written for, and its `references`.

    Args:
        generate: whether held-out rows are answered at every evaluation, and scored by BLEU and ROUGE-L.
        max_new_tokens: tokens of the longest answer that is written.
        num_beams: beams of the search; 1 is greedy.
        length_penalty: exponent of the length by which scores of beams are divided.
        no_repeat_ngram_size: n of the n-grams that may occur once; 0 for any.
        bleu_tokenize: sacrebleu's tokenizer: "13a", "zh" for Chinese, "char", "intl" or "none".
    """

    generate: bool = False
    max_new_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bleu_tokenize: str = "13a"

    lists: ClassVar[tuple[str, ...]] = ("references",)
    target_role: ClassVar[str]  # the answer
    main_metric = "accuracy"
    percent = ("bleu",)

    def __post_init__(self) -> None:
        for option, least in (("max_new_tokens", 1), ("num_beams", 1), ("no_repeat_ngram_size", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"task_options.{option} is {getattr(self, option)}; expected {least} or more.")
        if self.bleu_tokenize != "13a" and (known := bleu_tokenizers()) and self.bleu_tokenize not in known:
            raise RecipeError(
                f"task_options.bleu_tokenize is {self.bleu_tokenize!r}; expected one of {', '.join(known)}."
            )

    @property
    def metric(self) -> str:
        return "bleu" if self.generate else self.main_metric

    def check_row(self, row: Row, where: str) -> Row:
        """Give the row its references: those it has, or its answer alone."""
        own = row.get(self.target_role)
        if isinstance(own, (list, tuple)):  # several answers under the one's name
            row = {"references": own} | {role: value for role, value in row.items() if role != self.target_role}
            own = None
        elif own == "" and "references" in row:
            row = {role: value for role, value in row.items() if role != self.target_role}
            own = None
        given = row.get("references", own)
        references = [str(r) for r in (given if isinstance(given, (list, tuple)) else [given]) if not missing(r)]
        references = [r for r in references if r.strip()]
        if not references or own == "":
            raise RecipeError(f"{where}: has no {self.target_role} and no reference that is not empty; expected one.")
        return row | {"references": references}

    def pairs(self, rows: Sequence[Row], held_out: bool) -> list[tuple[Row, str]]:
        """Rows with the answer to learn: each reference in training, the first one where rows are measured."""
        return [
            (row, target)
            for row in rows
            for target in (
                [str(row[self.target_role])]
                if self.target_role in row
                else row["references"][:1]
                if held_out
                else row["references"]
            )
        ]

    def measure_further(self, trainer: Any, features: Sequence[Feature]) -> dict[str, float]:
        """BLEU (0 to 100) and ROUGE-L (0 to 1) of what is written for the features, where that is asked for."""
        if not self.generate:
            return {}
        accelerator = trainer.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        model = accelerator.unwrap_model(trainer.model)
        own = features[rank::ranks]
        # where ranks hold parts of the base, each of them has to generate as often
        filling = features[: -(-len(features) // ranks) - len(own)]
        sources = [f["source_ids"] for f in (*own, *filling)]
        written = self.write(model, trainer.processing_class, sources, trainer.args.per_device_eval_batch_size)
        both = gather_object(list(zip(written[: len(own)], [f["references"] for f in own], strict=True)))
        pairs = {"predictions": [text for text, _ in both], "references": [references for _, references in both]}
        bleu: dict[str, float] = Bleu(self.bleu_tokenize, keep_in_memory=True).compute(**pairs)
        return bleu | RougeL(keep_in_memory=True).compute(**pairs)

    def write(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, sources: Sequence[list[int]], batch_size: int
    ) -> list[str]:
        """Generate an answer for each source, without sampling, as far as the base has positions.

        Args:
            model: of the task.
            tokenizer: its own.
            sources: ids, `[S]` each.
            batch_size: sources at once; those of like length share a batch.

        Returns:
            Texts, without special tokens and surrounding space.
        """
        device = device_of(model)
        decoder = not model.config.is_encoder_decoder
        was_training = model.training
        model.eval()
        written = [""] * len(sources)
        order = sorted(range(len(sources)), key=lambda n: len(sources[n]))
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            # a decoder goes on behind its last token, so padding stands before the first
            batch = _pad([sources[n] for n in chosen], tokenizer.pad_token_id or 0, left=decoder)
            room = writing_room(model, batch["input_ids"].shape[1])
            with torch.no_grad():
                ids = model.generate(
                    **{name: tensor.to(device) for name, tensor in batch.items()},
                    max_new_tokens=self.max_new_tokens if room is None else min(self.max_new_tokens, room),
                    num_beams=self.num_beams,
                    do_sample=False,
                    length_penalty=self.length_penalty if self.num_beams > 1 else None,
                    no_repeat_ngram_size=self.no_repeat_ngram_size,
                    pad_token_id=tokenizer.pad_token_id,
                    **_end(model, tokenizer),
                )
            ids = ids[:, batch["input_ids"].shape[1] :] if decoder else ids
            for n, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                written[n] = text.strip()
        model.train(was_training)
        return written


def _end(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Where an answer ends: at the model's own end tokens, and at the one that answers were trained to end with."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), *end_ids(tokenizer)} - {None}
    return {"eos_token_id": sorted(ends)} if ends else {}


def _pad(rows: Sequence[list[int]], pad: int, left: bool) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        filling = [pad] * (longest - len(row))
        ids.append(filling + row if left else row + filling)
        mask.append([0] * len(filling) + [1] * len(row) if left else [1] * len(row) + [0] * len(filling))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
