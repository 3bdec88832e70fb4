"""What only whole processes show: death, standstill, fork, and the end of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.collectives import launcher
from tests.nccl.library import ROOT, fake_library
from tests.nccl.ranks import assert_refused

TIMEOUT = 2.0

PRELUDE = """
import os, sys, threading, time
import torch, gck
def join(timeout=20.0):
    return gck.NcclCommunicator(gck.NcclCommunicator.create_unique_id(), 0, 1, timeout=timeout)
def wait(comm):
    try:
        comm.barrier()
    except gck.errors.GckError:
        pass
"""


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCK_NCCL_LIBRARY", str(fake_library()))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("kill", {"PeerLostError"}),
        ("midway", {"PeerLostError"}),
        # The first whose wait ends closes its connections, which the other may see first.
        ("stop", {"CollectiveTimeoutError", "PeerLostError"}),
    ],
)
def test_survivors_raise_in_time(mode: str, expected: set[str], tmp_path: Path) -> None:
    reports = launcher.run_ranks("tests.nccl.fault_worker", 3, tmp_path, mode, lost=(2,))
    for report in reports[:2]:
        for algorithm, result in report.items():
            assert result["error"] in expected, (algorithm, result)
            assert result["seconds"] < TIMEOUT + 2, (algorithm, result)
            assert result["unchanged"], (algorithm, result)
            assert "the group cannot be used any more" in result["after"]
            assert result["seconds_after"] < 1
    if mode == "stop":
        for algorithm in reports[0]:
            assert "CollectiveTimeoutError" in [report[algorithm]["error"] for report in reports[:2]]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-X", "faulthandler", "-c", PRELUDE + code]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def test_a_forked_process_cannot_use_it() -> None:
    done = run("""
comm = join()
comm.barrier()
child = os.fork()
if child == 0:
    for call in (comm.barrier, comm.synchronize, lambda: comm.split(0)):
        try:
            call()
        except gck.errors.GroupUnusableError as error:
            assert f"made in process {os.getppid()}, before a fork" in str(error), error
        else:
            os._exit(3)
    comm.abort("here")
    comm.close()
    assert "before a fork" in repr(comm)
    del comm
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
comm.barrier()
print("parent goes on")
""")
    assert done.stdout == "parent goes on\n", done.stderr
    assert done.returncode == 0


ENDINGS = {
    "never closed": "comm = join(); comm.barrier()",
    "closed": "comm = join(); comm.close()",
    "aborted": "comm = join(); comm.abort('enough')",
    "dropped": "comm = join(); comm.barrier(); del comm",
    "in a cycle": "comm = join(); cycle = [comm]; cycle.append(cycle); del comm, cycle",
    "split": "comm = join(); child = comm.split(0); child.barrier()",
    "a thread waits": """
os.environ["FAKE_NCCL_STALL_AT"] = "1"
comm = join()
threading.Thread(target=wait, args=[comm], daemon=True).start()
time.sleep(0.3)
""",
    "a thread is stuck in the library": """
os.environ["FAKE_NCCL_HANG_AT"] = "1"
comm = join()
threading.Thread(target=wait, args=[comm], daemon=True).start()
time.sleep(0.3)
""",
    "a thread reduces": """
from gck.collectives import two_phase
def busy(*arguments, **options):
    end = time.monotonic() + 6
    while time.monotonic() < end:
        pass
two_phase.reduce_ = busy
comm, state = join(), gck.ErrorFeedback()
work = gck.all_reduce_(torch.ones(1000), state, gck.Sign(64), comm, algorithm="two_phase", async_op=True)
time.sleep(0.3)
""",
    "an abort hangs": """
os.environ["FAKE_NCCL_ABORT_HANGS"] = "1"
comm = join()
comm.abort("enough")
""",
    "failed": """
os.environ["FAKE_NCCL_REMOTE_ERROR_AT"] = "1"
comm = join()
try:
    comm.barrier()
except gck.errors.PeerLostError:
    pass
""",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_interpreter_ends_well(name: str) -> None:
    done = run(f"{ENDINGS[name]}\nprint('end')")
    assert done.stdout == "end\n"
    assert done.returncode == 0, done.stderr
    for word in ("Fatal", "terminate called", "Segmentation", "Traceback"):
        assert word not in done.stderr


def test_two_that_do_not_belong_together(tmp_path: Path) -> None:
    reports = launcher.run_ranks("tests.nccl.stranger_worker", 2, tmp_path, "2")
    assert_refused(reports, timeout=2, late=2)
    for report in reports:
        assert {report[case][0] for case in ("no id", "other sizes")} == {"CollectiveError"}
