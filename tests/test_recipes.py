"""The repository's recipes: what each header says, and a small run of each on rows of its own columns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_train import ROWS, write_base
from tokenizers_of import tokenizer_of

from hf_ptune import train_multitask
from hf_ptune.backbone import TASKS
from hf_ptune.cards import CARD_NAME
from hf_ptune.recipe import DataRecipe, make_recipe, read_content, read_recipe
from hf_ptune.tasks import Task, get_task, task_names
from hf_ptune.train import run

FOLDER = Path(__file__).parents[1] / "recipes"
SMALL = sorted(p for p in FOLDER.glob("*.yaml") if p.stem != "quickstart")
PATHS = [*SMALL, *sorted(FOLDER.glob("untried/*.yaml"))]
SEVERAL = sorted(FOLDER.glob("several/*.yaml"))
FAMILIES = {"CAUSAL_LM": "gpt2", "CLOZE_CAUSAL_LM": "gpt2", "SEQ_2_SEQ_LM": "t5"}


def test_every_recipe_is_told_of() -> None:
    table = (FOLDER / "README.md").read_text()
    assert all(f"`{path.relative_to(FOLDER)}`" in table for path in [FOLDER / "quickstart.yaml", *PATHS, *SEVERAL])
    assert {read_recipe(path).task for path in PATHS} <= set(task_names())


@pytest.mark.parametrize("path", [*PATHS, *SEVERAL], ids=lambda p: p.stem)
def test_a_header_holds_paper_data_and_launch_line(path: Path) -> None:
    comments = re.findall(r"^# (.*)", path.read_text(), re.M)
    launched = comments[-1].split()
    assert launched[:2] == ["accelerate", "launch"] and launched[-1] == f"recipes/{path.relative_to(FOLDER)}"
    assert (FOLDER.parent / launched[3]).is_file()
    assert any(c.startswith("Paper: ") for c in comments) and any(c.startswith("Data: ") for c in comments)
    assert launched[5] == ("hf_ptune.train_multitask" if path in SEVERAL else "hf_ptune.train")
    content = read_content(path)
    assert path.stem.endswith(content["method"]) and content["output_dir"] == f"outputs/{path.stem}"


def rows_for(task: Task, data: DataRecipe, held_out: bool) -> list[dict[str, Any]]:
    """Rows in a recipe's own columns."""
    kind = task.name
    if "unscored" in vars(task) and task.unscored:  # type: ignore[attr-defined]
        kind = "roles"
    if kind == "CAUSAL_LM" and "prompt" not in data.columns:
        kind = "instructions"
    rows = []
    for n in range(12):
        if kind.startswith("CLOZE"):
            told = {"label": n % len(data.labels or "a"), "answer": ["Paris", "Rome"][n % 2]}
            row = {role: told.get(role, "hello world") for role in task.roles()} | data.where
            rows.append({data.columns.get(role, role): value for role, value in row.items()})
            continue
        row = ROWS[kind](n) | ({"text_pair": "c"} if "text_pair" in data.columns else {})
        if kind == "TOKEN_CLS" and data.labels:
            row["tags"] = [n % len(data.labels) for _ in row["tags"]]
        elif task.label_role == "label" and data.labels:
            row["label"] = n % len(data.labels)
        if "references" in data.columns and (held_out or "answer" not in data.columns):
            row["references"] = [row.pop("answer"), "a"]
        written: dict[str, Any] = {}
        for role, value in row.items():
            column = data.columns.get(role, role)
            if isinstance(column, list):
                written |= dict(zip(column, value, strict=True))
            elif "." in column:
                outer, inner = column.split(".")
                written[outer] = {inner: value}
            else:
                written[column] = value
        rows.append(written)
    return rows


@pytest.mark.parametrize("variant", [[], ["--variant=small"]], ids=["own base", "small"])
@pytest.mark.parametrize("path", SEVERAL, ids=lambda p: p.stem)
def test_a_recipe_of_several_tasks_trains(path: Path, variant: list[str], tmp_path: Path) -> None:
    content = read_content(path, variant)
    for entry in content["tasks"]:
        one = make_recipe({k: v for k, v in (content | entry).items() if k not in ("tasks", "name")}, folder=FOLDER)
        rows = rows_for(one.build_task(), one.data, held_out=False)
        (tmp_path / f"{entry['name']}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources = {key: f"{entry['name']}.jsonl" for key in ("source", "eval_source", "test_source")}
        entry["data"] = entry["data"] | sources | {"max_length": 32}
    base = write_base(tmp_path / "base", "bert", "TOKEN_CLS")
    training = content["training"] | {"max_steps": 4, "use_cpu": True}
    content |= {"base": base, "training": training, "output_dir": str(tmp_path / "out")}
    found = train_multitask.run(train_multitask.make_multitask_recipe(content, path.name, tmp_path))
    assert set(found) == {entry["name"] for entry in content["tasks"]}
    for name, metrics in found.items():
        assert {"f1", "test_f1"} <= set(metrics) and (tmp_path / "out" / "adapter" / name / CARD_NAME).is_file()


RUNS = [*((path, []) for path in PATHS), *((path, ["--variant=small"]) for path in SMALL)]


@pytest.mark.parametrize(("path", "variant"), RUNS, ids=lambda v: v.stem if isinstance(v, Path) else "".join(v)[10:])
def test_a_recipe_trains(path: Path, variant: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny base; and the snippet of the card of its small variant runs with what came out."""
    content, recipe = read_content(path, variant), read_recipe(path, variant)
    if content.get("task_options", {}).get("generate"):
        pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
        content["task_options"] |= {"max_new_tokens": 3, "num_beams": 2}
    for part in ("train", "held_out"):
        rows = rows_for(recipe.build_task(), recipe.data, part == "held_out")
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    virtual = {"num_virtual_tokens": 4}
    family = FAMILIES.get(recipe.task, "bert")
    # pipelines write 256 tokens, and a card asks of a whole passage
    longer = {"gpt2": {"n_positions": 1024}, "bert": {"max_position_embeddings": 512}}.get(family, {})
    base = write_base(tmp_path / "base", family, get_task(recipe.task).model_task, **longer)
    if recipe.task.startswith("CLOZE"):
        virtual = {}  # the template has them
        mask = recipe.task == "CLOZE_MASKED_LM"
        tokenizer_of("wordpiece", mask, "true false neither").save_pretrained(base)
    named = {k: v for k, v in content["data"].items() if k not in ("config", "revision", "eval_split", "test_split")}
    files = {"source": "train.jsonl", "eval_source": "held_out.jsonl", "test_source": "held_out.jsonl"}
    content |= {
        "base": base,
        "options": content["options"] | virtual,
        "data": named | files | {"max_length": 32},
        "training": content["training"] | {"max_steps": 2, "use_cpu": True},
        "output_dir": str(tmp_path / "out"),
    }
    outcome = run(make_recipe(content, path.name, tmp_path))
    task = get_task(recipe.task)
    for metrics in (outcome.before, outcome.after, outcome.test):
        assert {"loss", recipe.build_task().metric} <= set(metrics)
    TASKS[task.model_task].from_pretrained(outcome.folder)
    assert outcome.answers
    if variant:
        card = ModelCard.load(FOLDER.parent / "model_cards" / path.stem / CARD_NAME).text
        snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
        capsys.readouterr()
        exec(snippet.replace(f"user/{path.stem}", str(outcome.folder)), {})
        assert capsys.readouterr().out
