"""One training loop for every column, and what its model predicts."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from columns import DEVICE, FeatureHead
from tasks import IGNORED, Data, Row, Task, score
from torch import Tensor, nn
from transformers import get_scheduler

_CLIP = 1.0
_LONGEST_ANSWER = 20  # tokens
_HEADS = ("classifier", "score", "qa_outputs", "window")
_PADDING = {"labels": IGNORED}


def pad(rows: Sequence[Row], padding_id: int) -> dict[str, Tensor]:
    """Rows as tensors `[B, T]` on the device, padded on the right to the longest."""
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "truth":
            continue
        if isinstance(values[0], Tensor):
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        elif isinstance(values[0], list):
            longest = max(map(len, values))
            fill = padding_id if name == "input_ids" else _PADDING.get(name, 0)
            batch[name] = torch.tensor([v + [fill] * (longest - len(v)) for v in values])
        else:
            batch[name] = torch.tensor(values)
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def batches(rows: Sequence[Row], size: int, seed: int | None = None) -> Iterator[list[int]]:
    """Numbers of rows, batch by batch, near in length; shuffled by a seed, or longest first."""
    numbers = list(range(len(rows)))

    def length(n: int) -> int:
        return len(rows[n]["input_ids"])

    if seed is None:
        numbers.sort(key=length, reverse=True)
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))
        return
    generator = random.Random(seed)
    generator.shuffle(numbers)
    made = []
    for start in range(0, len(numbers), 8 * size):
        pool = sorted(numbers[start : start + 8 * size], key=length)
        made += [pool[i : i + size] for i in range(0, len(pool), size)]
    generator.shuffle(made)
    yield from made


def freeze_features(model: FeatureHead, rows: Sequence[Row], padding_id: int) -> list[Row]:
    """Rows with the states that a head reads in place of a base's pass."""
    made: list[Row] = [dict(row) for row in rows]
    for numbers in batches(rows, 64):
        batch = pad([rows[n] for n in numbers], padding_id)
        for n, states in zip(numbers, model.features(batch), strict=True):
            made[n]["features"] = states if states.dim() == 1 else states[: len(rows[n]["input_ids"])].clone()
    return made


def inputs_of(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a column's model takes."""
    if isinstance(model, FeatureHead):
        return {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask", "token_type_ids")}
    return batch


def groups_of(model: Any, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups; the task's head may have a learning rate of its own."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [p for n, p in trained if any(s in n for s in _HEADS)]
    rest = [p for n, p in trained if not any(s in n for s in _HEADS)]
    rates = ((rest, setting["lr"]), (head, setting.get("head_lr", setting["lr"])))
    return [{"params": p, "lr": rate} for p, rate in rates if p]


def steps_of(task: Task, rows: Sequence[Row], setting: dict[str, Any]) -> int:
    """Steps that a setting trains for."""
    return round(setting.get("part", 1) * task.epochs * -(-len(rows) // task.batch))


def products(lower: bool) -> torch.autocast:
    """Multiply in bfloat16, if so; for one step, as casts of weights that train are kept for as long as it lasts."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=lower)


def keep_head_exact(model: nn.Module) -> None:
    """Let the head of a task multiply in float32 all the same: logits of bfloat16 often tie."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _HEADS:
            module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
            module.forward = torch.autocast(DEVICE.type, enabled=False)(module.forward)


def fit(model: Any, task: Task, rows: Sequence[Row], setting: dict[str, Any], seed: int,
        padding_id: int, after: Callable[[int, float], None], lower: bool = False) -> None:  # fmt: skip
    """Train with AdamW, a warm-up, a schedule, and gradients clipped at 1.

    Args:
        model: what requires a gradient in it is trained.
        task: epochs and batch.
        rows: to train on.
        setting: `lr`, and `head_lr`, `schedule`, `warmup` (part of the steps), `part` (of the usual steps, over which
            the rate falls to zero) where they are not the usual ones.
        seed: order of the batches.
        padding_id: of the tokenizer.
        after: told the number of epochs and their mean loss.
        lower: multiply in bfloat16.
    """
    steps = steps_of(task, rows, setting)
    optimizer = torch.optim.AdamW(groups_of(model, setting), weight_decay=0.0)
    schedule = get_scheduler(
        setting.get("schedule", "linear"), optimizer, round(setting.get("warmup", 0.06) * steps), steps
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    done = 0
    for epoch in range(task.epochs):
        if done == steps:
            break
        model.train()
        losses = []
        for numbers in islice(batches(rows, task.batch, 1000 * seed + epoch), steps - done):
            with products(lower):
                loss = model(**inputs_of(model, pad([rows[n] for n in numbers], padding_id))).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, _CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            done += 1
        after(epoch + 1, float(torch.stack(losses).mean()))


@torch.no_grad()
def evaluate(model: Any, task: Task, rows: Sequence[Row], data: Data, padding_id: int, lower: bool = False) -> float:
    """The task's score on rows."""
    model.eval()
    predictions: list[Any] = [None] * len(rows)
    for numbers in batches(rows, 128 if task.kind != "CAUSAL_LM" else 8):
        chosen = [rows[n] for n in numbers]
        batch = pad(chosen, padding_id)
        labels = batch["labels"] if task.kind == "CAUSAL_LM" else None
        # labels would make some peers' models fail, and a loss is not asked for
        with products(lower):
            outputs = model(**{k: v for k, v in inputs_of(model, batch).items() if labels is not None or k in _INPUTS})
        if labels is not None:
            count = (labels[:, 1:] != IGNORED).sum()
            predictions[numbers[0]] = (float(outputs.loss) * int(count), int(count))
            continue
        found = _spans(outputs, chosen) if task.kind == "QUESTION_ANS" else outputs.logits.argmax(-1).tolist()
        for n, one in zip(numbers, found, strict=True):
            predictions[n] = one
    if task.kind == "CAUSAL_LM":
        predictions = [p for p in predictions if p is not None]
    return score(task, rows, predictions, data.labels)


_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "features")


def _spans(outputs: Any, rows: Sequence[Row]) -> list[tuple[int, int]]:
    """The likeliest span of the context in each row, start and end token."""
    found = []
    for start, end, row in zip(outputs.start_logits.cpu(), outputs.end_logits.cpu(), rows, strict=True):
        spans = row["truth"]["spans"]
        outside = torch.tensor([s is None for s in spans])
        both = start[: len(spans), None].masked_fill(outside[:, None], -1e9) + end[None, : len(spans)].masked_fill(
            outside[None], -1e9
        )
        allowed = torch.ones_like(both, dtype=torch.bool).triu().tril(_LONGEST_ANSWER)
        best = int(both.masked_fill(~allowed, -3e9).argmax())
        found.append((best // len(spans), best % len(spans)))
    return found


@torch.no_grad()
def write_answers(model: Any, rows: Sequence[Row], padding_id: int, tokenizer: Any, new: int = 60) -> list[str]:
    """What a language model answers greedily to the rows' prompts; those of one length go together, without pads."""
    model.eval()
    written = [""] * len(rows)
    prompts = [row["truth"]["prompt"] for row in rows]
    for length in sorted({len(p) for p in prompts}):
        numbers = [n for n, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[n] for n in numbers], device=DEVICE)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=padding_id,
        )
        for n, text in zip(numbers, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True):
            written[n] = text
    return written
