"""The house's layers: imports go downwards only, lazy ones too."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import hf_ptune

ROOT = Path(hf_ptune.__file__).parent
LAYERS = [
    {"errors", "endings"},
    {
        "cells",
        "shapes",
        "cross_entropy",
        "auto",
        "sharding",
        "templates",
        "registry",
        "base_settings",
        "identity",
        "backbone_dropout",
        "patching",
        "overrides",
        "console",
    },
    {"methods"},
    {"adapter_file"},
    {"config_checks"},
    {"option_checks", "renamed_bodies"},
    {"configuration_ptune", "injection", "backbone"},
    {"cards", "placement", "loss_at_labels", "logits_at", "batch_share", "position_tables", "tokenization"},
    {"generation_checks", "hub", "loading", "pinning", "restoring", "adapter_tensors"},
    {"prompt_transfer", "facts"},
    {"publishing"},
    {"prompt_start", "resuming"},
    {"saving"},
    {"delegation"},
    {"modeling_ptune"},
    {"wrapping", "peft_files", "peft_words"},
    {"engines", "defaults"},
    {"multitask", "presets"},
    {"metrics", "cloze", "optimizer", "multitask_saving"},
    {"tasks"},
    {"recipe", "sources", "labels"},
    {"data"},
    {"callbacks"},
    {"interop", "info"},
    {"arguments", "convert", "row_checks", "fresh_base", "interruption"},
    {"train"},
    {"train_multitask", "sweep_table"},
    {"sweep", "evaluation"},
    {"cli"},
]
LEVEL = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# imported by name once transformers' own modules are there, with which they register themselves; nothing is asked of
# them
UPWARDS = {("auto", o) for o in ("configuration_ptune", "tokenization", "modeling_ptune", "callbacks", "interop")}


def imported(tree: ast.AST) -> set[str]:
    """Rooms that a module imports, or names in a string, as a module to be imported later."""
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_ptune":
            parts = (node.module or "").split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hf_ptune.")}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"hf_ptune(\.\w+)+", str(node.value)):
            rooms.add(node.value.split(".")[1])
    return rooms & set(LEVEL)


def test_imports_go_downwards_only() -> None:
    wrong, upwards = [], set()
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in LEVEL, f"{room} has no layer yet"
        rooms = {o for o in imported(ast.parse(path.read_text())) if o != room and LEVEL[o] >= LEVEL[room]}
        upwards |= {(room, other) for other in rooms} & UPWARDS
        wrong += [f"{relative} imports {other}" for other in rooms if (room, other) not in UPWARDS]
    assert not wrong and upwards == UPWARDS


def test_methods_import_no_transformers() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        assert "transformers" not in path.read_text().replace("huggingface", ""), path.name


def test_what_is_imported_is_declared() -> None:
    """Every package that an import at the top of a module names is among the dependencies of the wheel."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[\[<>=]", line)[0].lower() for line in project["dependencies"]}
    declared = named | {"yaml"} | set(sys.stdlib_module_names) | {"hf_ptune"}  # pyyaml is imported as yaml
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert {name.split(".")[0] for name in names} <= declared, path
