"""One rank of test_given_up.py: rank 1 stops, as by SIGSTOP; rank 0 gets an error and ends as programs do.

argv: directory, elements, a piece's elements.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

import gck
from gck.errors import CollectiveError
from tests.collectives import launcher

if __name__ == "__main__":
    directory, rank, _ = launcher.init(timeout=60)
    grad, state, compressor = torch.ones(int(sys.argv[2])), gck.ErrorFeedback(), gck.Sign()
    options = {"algorithm": "two_phase", "piece_numel": int(sys.argv[3])}
    gck.all_reduce_(grad, state, compressor, **options)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        gck.all_reduce_(grad, state, compressor, timeout=1, **options)
    except CollectiveError as error:
        launcher.report(directory, rank, type(error).__name__)
