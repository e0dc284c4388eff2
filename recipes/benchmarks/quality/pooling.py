"""What a prompt among the inputs of MiniLM gains by what its head pools (TREC, 10 tokens).

python recipes/benchmarks/quality/pooling.py [--data FOLDER] [--epochs 2] [--seeds 0,1,2] [--lr 0.1] [--only PART]

Variants in plain torch, without either library: where the virtual tokens stand, how large they start, whether their
positions are counted (as PEFT does, which moves the own tokens on) or all that of [CLS] (as hf_ptune does), whether
[CLS] bears a trained offset, whether a virtual token that is pooled starts at the separator, and whether the mean of
the own tokens is pooled (hf_ptune's `pooling="mean"`). The schedule is that of five epochs; training stops after
`--epochs` of them.
"""

import argparse
import contextlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import columns
import torch
import transformers
from tasks import TASKS, load
from torch import Tensor, nn
from training import evaluate, fit
from transformers.modeling_outputs import SequenceClassifierOutput

# first: virtual tokens before [CLS], the first of them pooled; spread: deviation of their start;
# offset: deviation of what is added to [CLS], or none; separator: the first virtual token starts at [SEP]'s direction;
# mean: of the own tokens' last states, in place of the first one
VARIANTS: dict[str, dict[str, Any]] = {
    "virtual first, 0.056": {"first": True, "spread": 0.056},
    "virtual first, 1": {"first": True, "spread": 1.0},
    "virtual first, 1, counted (PEFT)": {"first": True, "spread": 1.0, "counted": True},
    "virtual first, 1, separator": {"first": True, "spread": 1.0, "separator": True},
    "virtual first, 1, counted, separator": {"first": True, "spread": 1.0, "counted": True, "separator": True},
    "after [CLS], 1": {"spread": 1.0},
    "after [CLS], 1, mean (hf_ptune)": {"spread": 1.0, "mean": True},
    "after [CLS], 1, counted": {"spread": 1.0, "counted": True},
    "after [CLS], 0.056, offset 0": {"spread": 0.056, "offset": 0.0},
    "after [CLS], 1, counted, offset 1": {"spread": 1.0, "counted": True, "offset": 1.0},
    "after [CLS], 1, offset 1": {"spread": 1.0, "offset": 1.0},
}


_SEPARATOR = 102  # [SEP] of MiniLM's vocabulary


class Prompted(nn.Module):
    """A frozen MiniLM with a head, a prompt, and an offset on [CLS]."""

    def __init__(
        self,
        labels: list[str],
        spread: float,
        first: bool = False,
        counted: bool = False,
        offset: float | None = None,
        separator: bool = False,
        mean: bool = False,
    ) -> None:
        super().__init__()
        self.model = columns.base_of(TASKS["trec"], labels).requires_grad_(False)
        self.model.classifier.requires_grad_(True)
        width = self.model.config.hidden_size
        self.prompt = nn.Parameter(torch.randn(10, width) * spread)
        if separator:
            row = self.model.base_model.embeddings.word_embeddings.weight[_SEPARATOR]
            self.prompt.data[0] = row / row.std() * spread
        self.offset = None if offset is None else nn.Parameter(torch.randn(width) * offset)
        self.before, self.counted, self.mean = 0 if first else 1, counted, mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None, **rest: Any) -> Any:
        embeds = self.model.base_model.embeddings.word_embeddings(input_ids)
        rows, own = input_ids.shape
        virtual, at = len(self.prompt), self.before
        if self.offset is not None:
            embeds = torch.cat([embeds[:, :1] + self.offset, embeds[:, 1:]], 1)
        embeds = torch.cat([embeds[:, :at], self.prompt[None].expand(rows, -1, -1), embeds[:, at:]], 1)
        mask = torch.cat([attention_mask.new_ones(rows, virtual), attention_mask], 1)
        positions = torch.arange(own + virtual)
        if not self.counted:
            positions = torch.cat([torch.arange(at), torch.zeros(virtual, dtype=torch.long), torch.arange(at, own)])
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions[None].expand(rows, -1)}
        if not self.mean:
            return self.model(**inputs, labels=labels)
        states = self.model.base_model(**inputs).last_hidden_state
        own = attention_mask[..., None].float()
        states = torch.cat([states[:, :at], states[:, at + virtual :]], 1) * own
        pooled = self.model.base_model.pooler(states.sum(1, keepdim=True) / own.sum(1, keepdim=True))
        logits = self.model.classifier(self.model.dropout(pooled))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class _EnoughError(Exception):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PTUNE_DATA", str(HERE.parents[3] / "shared" / "data")))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--only", default="", help="part of a variant's name")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = TASKS["trec"]
    data = load(task, Path(options.data), columns.tokenizer_of(task))
    names = [n for n in VARIANTS if options.only in n]
    for name, seed in itertools.product(names, (int(s) for s in options.seeds.split(","))):
        torch.manual_seed(seed)
        model = Prompted(data.labels, **VARIANTS[name])

        def after(epoch: int, loss: float, name: str = f"{name}, seed {seed}", model: Prompted = model) -> None:
            figure = evaluate(model, task, data.validation, data, 0)
            print(f"{name}: epoch {epoch}, loss {loss:.3f}, validation {figure:.4f}", flush=True)
            if epoch == options.epochs:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            fit(model, task, data.train, {"lr": options.lr}, seed, 0, after)


if __name__ == "__main__":
    main()
