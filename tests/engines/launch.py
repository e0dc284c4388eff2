"""Start a script on several processes through `accelerate launch`, as a user does, and read what each rank found."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "recipes" / "accelerate"
# what turns a configuration for GPUs into two processes of gloo, and takes nothing else from it
_FILES = {
    "cpu": "cpu",
    "ddp": "two_cpu_processes",
    "fsdp2": "fsdp2",
    "zero2": "zero2",
    "zero3": "zero3",
}
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None


def environment(engine: str, **further: str) -> dict[str, str]:
    """The variables that keep an engine on the CPU."""
    path = os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    found = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    found |= {"DS_ACCELERATOR": "cpu"} if engine.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    return found | further


def command(engine: str, script: Sequence[object], port: int | None = None) -> list[str]:
    """The launch line of an engine; `script` is a file or `-m module`, and its arguments."""
    config = CONFIGS / f"{_FILES[engine]}.yaml"
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    line += ["--main_process_port", port or 0, "--num_cpu_threads_per_process", 1]
    return [str(part) for part in [*line, *script]]


def launch(engine: str, script: Sequence[object], timeout: float = 240, **further: str) -> Any:
    """Run to the end.

    Raises:
        AssertionError: it failed; says what it wrote.
    """
    done = subprocess.run(
        command(engine, script), env=environment(engine, **further), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def found_by(folder: Path, ranks: int = 2) -> list[Any]:
    """What each rank has written."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
