"""Launch configurations are what accelerate's own loader takes, and say how to launch them."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from launch import CONFIGS

FILES = sorted(CONFIGS.glob("*.yaml"))


def test_every_engine_has_one() -> None:
    assert {f.stem for f in FILES} >= {"cpu", "gpu", "two_cpu_processes", "ddp", "fsdp2", "zero2", "zero3"}
    assert {f.stem for f in FILES} >= {"ddp_nodes", "fsdp2_nodes", "zero3_nodes"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_configuration_is_known_to_its_last_key(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    options = {a.dest for a in launch_command_parser()._actions}
    content = yaml.safe_load(path.read_text())
    for key in content.get("fsdp_config", {}):
        assert key in options, key
    for key in content.get("deepspeed_config", {}):
        assert key in options or f"deepspeed_{key}" in options, key
    assert config.num_processes % config.num_machines == 0
    assert (config.num_machines > 1) == path.stem.endswith("_nodes")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_configuration_says_its_launch_line(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file recipes/accelerate/{path.name}" in line for line in head)
    assert any("-m hf_ptune.train recipes/quickstart.yaml" in line for line in head)
