"""A prompt that a batch shares has the same gradient when the batch is spread over ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from two_ranks_prompt import CASES, gradients

HERE = Path(__file__).parent


def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(HERE / "two_ranks_prompt.py"), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for (family, method, *_), found in zip(CASES, ranks[0], strict=True):
        alone = torch.tensor(gradients(family, method, slice(None), False, False, False), dtype=torch.float64)
        # the others normalise in float32, on the way back through the prompt's own layers too
        tolerance = 1e-10 if family == "gpt2" or method == "prefix_tuning" else 1e-6
        assert torch.allclose(torch.tensor(found, dtype=torch.float64), alone, rtol=0, atol=tolerance), (family, method)
