import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_ranks.py")


def test_ranks_agree_and_are_reported(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        SCRIPT,
        tmp_path,
    ]
    root = str(SCRIPT.parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(c) for c in command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first["wrapper"] == second["wrapper"] == "DistributedDataParallel"
    assert first["moved"] and first["trainable"]
    assert first["sums"] == second["sums"]
    assert first["summary"] == second["summary"] and first["summary"]["world_size"] == 2
    for log in first["log"]:
        ranks = [log[f"mem_rss_mib_rank{r}"] for r in range(2)]
        assert log["mem_rss_mib"] == max(ranks) and min(ranks) > 1
    tokens = first["log"][-1]["tokens_per_second"] * first["log"][-1]["step_time_s"] * 4
    assert tokens == pytest.approx(8 * 7 + 8 * 5)
    assert "rank 1" in done.stdout and done.stdout.count("process, peak resident") == 1
