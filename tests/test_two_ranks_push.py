"""From two ranks: one repository, one upload, and no rank waits for one that failed."""

import subprocess
import sys
from pathlib import Path

from hub import HubServer, client_environment

HERE = Path(__file__).parent


def test_two_ranks_push_once(tmp_path: Path) -> None:
    with HubServer() as server:
        server.add_user("alice", "alice-writes")
        server.add_repo("alice/base")
        server.fail("POST", "alice/failing/preupload", 403, times=None)
        environment = client_environment(
            server,
            tmp_path / "home",
            "alice-writes",
            HF_HUB_DISABLE_XET="1",
            OMP_NUM_THREADS="1",
            PYTHONPATH=f"{HERE.parent}:{HERE}",
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*command, str(HERE / "two_ranks_push.py"), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
        assert found == [f"{server.url}/alice/by-model True", "None False"]
        for name in ("alice/by-trainer", "alice/by-model"):
            assert len(server.repos[name].commits) == 2, name  # the Hub's first one, and ours
            assert len(server.requests("POST", f"{name}/commit/main")) == 1
        assert len(server.requests("POST", "/api/repos/create")) == 3
