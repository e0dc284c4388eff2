"""Every engine trains as one process does, and writes and reads the same checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import NO_DEEPSPEED, found_by, launch
from setup_engines import ODD, adapter, generated, load, save_bases, scores, trainer
from worker import FAMILY, GENERATING, METHOD, counts

from hf_ptune.adapter_file import read_tensors

HERE = Path(__file__).parent
needs_deepspeed = pytest.mark.skipif(NO_DEEPSPEED, reason="deepspeed is not installed")
ENGINES = ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPModule", "zero2": "DeepSpeedEngine"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one process does with whole batches."""
    folder = tmp_path_factory.mktemp("alone")
    save_bases(folder / "bases", [FAMILY, "t5"])
    found: dict[str, Any] = {}
    bases = folder / "bases"
    run = trainer(bases, FAMILY, METHOD, folder / "alone", 1, compute_metrics=counts, use_cpu=True)
    run.train()
    found["whole"], found["evaluation"] = adapter(run), run.evaluate()
    found["losses"] = [e["loss"] for e in run.state.log_history if "loss" in e]
    for family in (FAMILY, "t5"):
        run = trainer(bases, family, "p_tuning", folder / "generated", 1, use_cpu=True, **GENERATING)
        run.train()
        found[family] = generated(run, family), scores(run, family)
        assert len(set(map(len, found[family][0]))) > 1
    return folder, found


def assert_near(found: dict[str, list[float]], expected: dict[str, list[float]], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(values), rtol=0, atol=tolerance), name


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_does_what_one_process_does(engine: str, alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, expected = alone
    for name in ("bases", "alone"):
        (tmp_path / name).symlink_to(folder / name)
    done = launch(engine, [HERE / "worker.py", tmp_path])
    ranks = found_by(tmp_path)
    first = ranks[0]
    assert WRAPPERS.get(engine, "DeepSpeedEngine") in first["wrapper"]
    assert first["world"] == 2 and first["engine"] == NAMES[engine]
    assert first["split_when_loaded"] == (engine == "zero3")
    sizes = [r["local"] for r in ranks]
    total = sum(p.numel() for p in load(folder / "bases", FAMILY, METHOD).backbone.parameters())
    assert sizes == [total, total] if engine in ("ddp", "zero2") else max(sizes) < 0.6 * total
    assert "find_unused_parameters" not in done.stderr and "asked for" not in done.stderr
    for name in ("whole", "resumed", "from_one", "best"):
        assert ranks[1][name] == first[name], name
    for name in ("whole", "resumed", "from_one"):
        assert_near(first[name], expected["whole"])
    losses = [e["loss"] for e in first["log"] if "loss" in e]
    assert losses == pytest.approx(expected["losses"], abs=1e-5)
    check_memory(first["log"], done.stdout)
    for rank in ranks:
        assert rank["evaluation"]["eval_rows"] == ODD
        assert rank["evaluation"]["eval_sum"] == expected["evaluation"]["eval_sum"]
        # the Trainer averages a batch's loss with the row that was repeated to fill it
        assert rank["evaluation"]["eval_loss"] == pytest.approx(expected["evaluation"]["eval_loss"], rel=0.1)
        answers, measured = expected[FAMILY if engine == "fsdp2" else "t5"]
        assert rank["generated"] == answers and rank["scores"] == measured
    check_files(tmp_path, folder, expected)
    check_best(tmp_path, first)


def check_memory(log: list[dict[str, Any]], printed: str) -> None:
    """Logs tell each rank's memory and the most of them; the table is printed once."""
    for entry in (e for e in log if "loss" in e):
        each = [entry[f"mem_rss_mib_rank{rank}"] for rank in range(2)]
        assert entry["mem_rss_mib"] == max(each) and min(each) > 1
    assert printed.count("process, peak resident") == 1


def check_files(there: Path, alone: Path, expected: dict[str, Any]) -> None:
    """The same files as one process writes, with the same bytes, and one process goes on from them."""
    ours, theirs = there / "whole" / "checkpoint-2", alone / "alone" / "checkpoint-2"
    own_states = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert {f.name for f in ours.iterdir()} - own_states == {f.name for f in theirs.iterdir()} - own_states
    model = load(alone / "bases", FAMILY, METHOD)
    model.load_adapter_state_dict(read_tensors(ours / "model.safetensors"))
    model.save_pretrained(there / "again")
    assert (there / "again" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
    optimizer, other = (torch.load(f / "optimizer.pt", weights_only=True) for f in (ours, theirs))
    assert optimizer["state"].keys() == other["state"].keys()
    for number, state in other["state"].items():
        assert state.keys() == optimizer["state"][number].keys()
        assert all(torch.allclose(v, optimizer["state"][number][k], atol=1e-6) for k, v in state.items())
    for group, like in zip(optimizer["param_groups"], other["param_groups"], strict=True):
        assert {k: v for k, v in group.items() if k in like} == like
    run = trainer(alone / "bases", FAMILY, METHOD, there / "one", 1, use_cpu=True)
    run.train(resume_from_checkpoint=str(ours))
    assert_near(adapter(run), expected["whole"])


def check_best(there: Path, found: dict[str, Any]) -> None:
    """The best adapter is back at the end, from checkpoints that hold the model alone."""
    best = there / "best" / f"checkpoint-{found['best_step']}"
    assert found["best_step"] < 4 and found["best_loss"][0] == pytest.approx(found["best_loss"][1], abs=1e-6)
    kept = read_tensors(best / "model.safetensors")
    assert_near(found["best"], {n: t.double().flatten().tolist() for n, t in kept.items()}, 0)
    assert not list(best.glob("*optimizer*")) and not list(best.glob("global_step*"))
    assert json.loads((best / "trainer_state.json").read_text())["global_step"] == found["best_step"]
