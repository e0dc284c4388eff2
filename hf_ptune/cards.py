"""What a run found out, and the model card that says it."""

import json
import math
import re
import statistics
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ptune.adapter_file import staged
from hf_ptune.backbone import TASKS, is_hub_id
from hf_ptune.errors import PTuneError, naming
from hf_ptune.methods import get_method
from hf_ptune.templates import Template

FACTS_NAME = "run_facts.json"
TIMES = ("runtime", "per_second", "preparation_time")  # how names end that measure no model
CARD_NAME = "README.md"
CURVES_NAME = "curves.png"
_TEMPLATE = "adapter_card.md.jinja"
TEST = "test_"  # how names of metrics of test rows begin; others are of held-out rows
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "MULTIPLE_CHOICE": "multiple-choice",
    "SEQ_2_SEQ_LM": "text-generation",
    "CAUSAL_LM": "text-generation",
    "MASKED_LM": "fill-mask",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_DATA_ENDS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".conll", ".parquet", ".arrow", ".gz", ".zip")
# transformers 5 has no pipeline for these; the snippet calls the model
_WITHOUT_PIPELINE = ("QUESTION_ANS", "MULTIPLE_CHOICE", "SEQ_2_SEQ_LM")


@dataclass
class RunFacts:
    """Everything a card says of an adapter; kept as JSON beside it, so that the card can be made again.

    Args:
        method: name of the method.
        task: a key of `backbone.TASKS`.
        base: id of the base on the Hub, or what it is called.
        base_revision: its commit.
        options: options of the method, as in PTuneConfig.
        parameters: trained parameters.
        all_parameters: those of base and adapter together.
        adapter_bytes: size of the adapter's file.
        base_bytes: size of the base's weights, which full fine-tuning would write.
        base_parameters: those of the base, which full fine-tuning would train.
        example: an input for the snippet; of SEQ_CLS, where pairs were trained on, its `text` and `text_pair`, and of
            a template with a gap or virtual tokens its fields; of CAUSAL_LM, where conversations were, the messages
            before the answer.
        closing: tokens that the tokenizer puts behind every text, and that stood behind no prompt of CAUSAL_LM.
        datasets: ids or names of what it was trained on.
        languages: ISO codes.
        license: of the adapter; that of its base on the Hub where unset.
        hyperparameters: of the training.
        seeds: one a run.
        metrics: final metrics, one dict a seed.
        history: logged losses and metrics, each with step and epoch.
        memory: MiB by what holds it, the most of all ranks.
        memory_by_rank: the same for each of several ranks, as far as it differs.
        speed: seconds a step, tokens a second, seconds in all.
        hardware: device, number of processes, engine.
        versions: of the libraries.
        limits: what to know before use.
        tags: further ones of the card.
        dataset_ids: of datasets on the Hub, where `datasets` has other names for them.
        dataset_args: which part of each of them, as GLUE has several.
        split: of the rows that were held out, as their dataset calls it.
        name: the card's title; the repository's own when unset.
        license_name: of a licence that the Hub has no name for.
        license_link: to its text.
    """

    method: str
    task: str
    base: str | None = None
    base_revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    all_parameters: int = 0
    adapter_bytes: int = 0
    base_bytes: int = 0
    base_parameters: int = 0
    example: str | dict[str, str] | list[dict[str, str]] = "Prompts are cheap."
    closing: int = 0
    datasets: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    license: str | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    memory_by_rank: dict[str, dict[str, float]] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    dataset_ids: list[str] = field(default_factory=list)
    dataset_args: list[str] = field(default_factory=list)
    split: str = "validation"
    name: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    def save(self, folder: str | Path) -> Path:
        """Write the facts beside the adapter, in the place of older ones when they are on the disk."""
        text = json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False) + "\n"
        with staged(folder) as aside, naming(aside / FACTS_NAME):
            (aside / FACTS_NAME).write_text(text, encoding="utf-8")
        return Path(folder) / FACTS_NAME

    @classmethod
    def load(cls, folder: str | Path) -> "RunFacts":
        """Read the facts of a run.

        Raises:
            PTuneError: there are none, or they are not ours.
        """
        path = Path(folder) / FACTS_NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(cls)}
            facts = cls(**{k: v for k, v in found.items() if k in known})
            facts._check()
            return facts
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise PTuneError(f"{path} holds no facts of a run ({error}); train with ModelCardCallback.") from error

    def _example_names(self) -> tuple[str, ...]:
        """Names of the texts that an example may consist of; none where it is one text."""
        if (read := _template(self)) is not None:
            return tuple(read.fields)
        return ("text", "text_pair") if self.task == "SEQ_CLS" else ()

    def _has_parts(self) -> bool:
        """Whether the example is fields or messages, as the task may have them.

        Raises:
            ValueError: they are not of the task, or no texts.
        """
        value = self.example
        if isinstance(value, dict) and (names := self._example_names()):
            texts = all(isinstance(v, str) for v in value.values())
            if not texts or value.keys() not in (set(names), {"text", "text_pair"}):
                raise ValueError(f"example is {value!r}; expected a text, or {' and '.join(names)}, which are texts")
            return True
        if isinstance(value, list) and self.task == "CAUSAL_LM":
            if not value or not all(isinstance(m, dict) and {*map(type, m.values())} == {str} for m in value):
                raise ValueError(f"example is {value!r}; expected a text, or messages with role and content")
            return True
        return False

    def _check(self) -> None:
        """Refuse what no card can be made of.

        Raises:
            ValueError: says which field.
        """
        plain = RunFacts(self.method, self.task)
        for f in fields(self):
            value, unset = getattr(self, f.name), getattr(plain, f.name)
            if f.name == "example" and self._has_parts():
                continue
            kind = str if unset is None else type(unset)
            if not isinstance(value, kind) and (value is not None or unset is not None):
                raise ValueError(f"{f.name} is {value!r}; expected a {kind.__name__}")
        get_method(self.method)
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        for name in ("datasets", "languages", "limits", "tags", "dataset_ids", "dataset_args"):
            if strange := [v for v in getattr(self, name) if not isinstance(v, str)]:
                raise ValueError(f"{name} holds {strange[0]!r}; expected text")
        if strange := [v for v in self.seeds if not isinstance(v, int)]:
            raise ValueError(f"seeds holds {strange[0]!r}; expected whole numbers")
        measured = {"memory": [self.memory], "memory_by_rank": [*self.memory_by_rank.values()], "speed": [self.speed]}
        for name, rows in (measured | {"metrics": self.metrics, "history": self.history}).items():
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError(f"{name} holds {row!r}; expected numbers by their names")
                if strange := [k for k, v in row.items() if not isinstance(v, (int, float, type(None)))]:
                    raise ValueError(f"{strange[0]} in {name} is {row[strange[0]]!r}; expected a number")


def merge_seeds(runs: list[RunFacts]) -> RunFacts:
    """One set of facts of runs that differ by their seeds; the first one's curves and sizes are shown.

    Raises:
        PTuneError: runs of different methods, tasks, bases, data, settings or numbers of processes, the same seed
            twice, or one without metrics.
    """
    first = runs[0]
    for run in runs[1:]:
        if (run.method, run.task, run.base) != (first.method, first.task, first.base):
            raise PTuneError("a card is for one method, task and base; the runs differ in them.")
        if run.datasets != first.datasets:
            raise PTuneError(f"a card is for one set of data; the runs have {first.datasets} and {run.datasets}.")
        ours, theirs = (r.options | r.hyperparameters for r in (first, run))
        if differ := sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)):
            said = ", ".join(f"{k} ({ours.get(k)} and {theirs.get(k)})" for k in differ[:3])
            raise PTuneError(f"the runs of a card differ by their seeds alone; these differ in {said}.")
    for name, told in (
        ("base_revision", [run.base_revision for run in runs]),
        ("processes", [run.hardware.get("processes") for run in runs]),
    ):
        if len(known := list(dict.fromkeys(str(value) for value in told if value is not None))) > 1:
            said = f"{name} ({' and '.join(known)})"
            raise PTuneError(f"the runs of a card differ by their seeds alone; these differ in {said}.")
    seeds = [seed for run in runs for seed in run.seeds]
    if len(set(seeds)) < len(seeds):
        raise PTuneError(f"the runs have the seeds {seeds}; expected each once.")
    if len(runs) > 1 and (silent := [run.seeds for run in runs if len(run.metrics) < max(len(run.seeds), 1)]):
        raise PTuneError(f"the run of seed {silent[0]} has no metrics; evaluate it, or leave it out of the card.")
    merged = RunFacts(**asdict(first))
    merged.seeds = seeds
    merged.metrics = [metrics for run in runs for metrics in run.metrics]
    return merged


def make_card(facts: RunFacts, repo_id: str = "user/adapter", curves: str | None = None) -> ModelCard:
    """Render the card of an adapter.

    Args:
        facts: of the run, or runs.
        repo_id: where the adapter will be; its name is the title.
        curves: name of an image beside the card.

    Returns:
        A card that the Hub takes.
    """
    facts = RunFacts(**_finite(asdict(facts)))
    facts.datasets = [public_name(name) for name in facts.datasets]
    method = get_method(facts.method)
    read, epochs = _template(facts), _by_epoch(facts.history)
    template = resources.files("hf_ptune").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    card: ModelCard = ModelCard.from_template(
        _metadata(facts, repo_id),
        template_str=template,
        facts=facts,
        method=method,
        repo_id=repo_id,
        name=facts.name or repo_id.split("/")[-1],
        base_known=is_hub_id(facts.base),
        base_name=facts.base and public_name(facts.base),
        pinned=facts.base_revision is not None and _COMMIT.fullmatch(facts.base_revision) is not None,
        trained=bool(facts.seeds or facts.history),
        auto_class=TASKS[facts.task].__name__,
        pipeline=None if facts.task in _WITHOUT_PIPELINE or facts.closing else _PIPELINES[facts.task],
        read=read,
        row=read and _row(facts, read),
        percent=100 * facts.parameters / max(facts.all_parameters, 1),
        summary=summarise(facts.metrics),
        epochs=epochs,
        columns=list(dict.fromkeys(name for row in epochs for name in row)),
        curves=curves,
        human=human_bytes,
        literal=_literal,
        cell=_cell,
    )
    return card


def draw_curves(facts: RunFacts, path: Path) -> str | None:
    """Draw losses and metrics over steps; nothing where matplotlib is missing or nothing was logged.

    Returns:
        The image's name, or `None`.
    """
    history = _of_training(facts.history)
    losses = [(e["step"], e["loss"]) for e in history if "loss" in e and "step" in e]
    measured: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith("eval_") and not name.endswith(TIMES) and "step" in entry:
                measured.setdefault(name, []).append((entry["step"], value))
    if not losses and not measured:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 3.2))
    left, right = figure.subplots(1, 2)
    left.set_title("loss")
    right.set_title("evaluation")
    if losses:
        left.plot(*zip(*losses, strict=True), label="train")
    for name, points in measured.items():
        (left if name == "eval_loss" else right).plot(*zip(*points, strict=True), label=name, marker="o")
    for axes in (left, right):
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path.name


def _template(facts: RunFacts) -> Template | None:
    """The template by which an adapter's rows are to be written: one with a gap, or virtual tokens of its own."""
    template = facts.options.get("template")
    read = Template.parse(template) if template else None
    return read if read is not None and (read.has_mask or read.num_virtual_tokens) else None


def _row(facts: RunFacts, read: Template) -> dict[str, Any]:
    """The example by the fields of a template."""
    if isinstance(facts.example, dict) and facts.example.keys() >= set(read.fields):
        return facts.example
    text = facts.example if isinstance(facts.example, str) else RunFacts.example
    return dict.fromkeys(read.fields, text)


def _literal(example: Any) -> str:
    """An example as Python reads it, in its own letters."""
    return json.dumps(example, ensure_ascii=False)


def _cell(value: Any) -> str:
    """A value as a table's cell holds it: in one line, without an end of the cell."""
    return "<br>".join(str(value).replace("|", "\\|").splitlines())


def summarise(metrics: list[dict[str, float]]) -> dict[str, tuple[float, float | None]]:
    """Mean and sample deviation of every metric over seeds; no deviation of one."""
    # a run that diverged tells no mean; what was not finite is none in JSON
    names = [n for n in (metrics[0] if metrics else {}) if all(_is_finite(m.get(n)) for m in metrics)]
    found = {}
    for name in names:
        values = [m[name] for m in metrics]
        found[name] = (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return found


def public_name(name: str) -> str:
    """What to call a base or a dataset before others: of a file or folder of this machine its own name alone."""
    name = name.removeprefix("file://").rstrip("\\/")
    parts = re.split(r"[\\/]", name)
    local = name.startswith(("/", ".", "~")) or "\\" in name or name[1:2] == ":" or name.endswith(_DATA_ENDS)
    return parts[-1] if local else name


def human_bytes(size: float) -> str:
    """A size with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _metadata(facts: RunFacts, repo_id: str) -> ModelCardData:
    ids = [*facts.dataset_ids, *facts.datasets]
    part: Any = next(iter(facts.dataset_args), None)  # a name, as the Trainer's own cards have it
    results = [
        EvalResult(
            task_type=_PIPELINES[facts.task],
            dataset_type=_slug(ids[0]) if ids else "held-out",
            dataset_name=facts.datasets[0] if facts.datasets else "held-out rows",
            dataset_split="test" if name.startswith(TEST) else facts.split,
            dataset_args=part,
            metric_type=name.removeprefix(TEST),
            metric_name=name.removeprefix(TEST),
            metric_value=round(mean, 4),
        )
        for name, (mean, _) in summarise(facts.metrics).items()
        if not name.endswith((*TIMES, "epoch"))
    ]
    known = is_hub_id(facts.base)
    datasets = [d for d in facts.datasets if is_hub_id(d) and "/" in d] + facts.dataset_ids
    tags = ["hf_ptune", "prompt-learning", facts.method.replace("_", "-"), *facts.tags]
    return ModelCardData(
        base_model=facts.base if known else None,
        base_model_relation="adapter" if known else None,
        library_name="transformers",
        pipeline_tag=_PIPELINES[facts.task],
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.languages or None,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=list(dict.fromkeys(tags)),
        model_name=(facts.name or repo_id.split("/")[-1]) if results else None,
        eval_results=results or None,
    )


def _slug(name: str) -> str:
    """A name as an id may be written; an id of the Hub stays as it is."""
    return re.sub(r"[^\w./-]+", "-", name).strip("-") or "held-out"


def ends_training(logs: dict[str, Any]) -> bool:
    """Whether a log is the one that the Trainer ends a training with."""
    # `train_runtime` is also in every log where tokens are counted, and `train_loss` in that of an evaluation "train"
    return "total_flos" in logs


def _of_training(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """A history without what was measured again after training, maybe of the best model, at steps measured before."""
    end = max((n for n, entry in enumerate(history) if ends_training(entry)), default=len(history))
    known = {(e.get("step"), name) for e in history[:end] for name in e if name.startswith("eval_")}
    return history[:end] + [e for e in history[end:] if not any((e.get("step"), name) in known for name in e)]


def _by_epoch(history: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Evaluations, each with the last training loss before it; those of several datasets at a step are one row."""
    rows: list[dict[str, Any]] = []
    loss: float | None = None  # nothing has been trained before the first one
    for entry in _of_training(history):
        loss = entry.get("loss", loss)
        measured = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
        measured = {k: v for k, v in measured.items() if not k.endswith(TIMES)}
        if not measured:
            continue
        step = entry.get("step", 0)
        if rows and rows[-1]["step"] == step and not measured.keys() & rows[-1].keys():
            rows[-1] |= measured
        else:
            rows.append({"epoch": entry.get("epoch", 0.0), "step": step, "train loss": loss} | measured)
    return rows


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
