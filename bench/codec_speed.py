"""`python -m bench.codec_speed`: how fast index codecs are on one core, whatever else the machine does.

Gigabytes of int32 indices a second, encoded and decoded by one thread; the median of some turns. Counted is
the thread's own processor time, so that other processes cost the figures only what they take from the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.table import Table

from gck._native import load
from gck.coded_layout import INDEX_CODECS
from gck.kernels import index_codecs
from gck.kernels.topk import resolve_k

NUMEL = 25_000_000
RATIOS = (0.001, 0.01, 0.1)
TURNS = 21


def main(numel: int = NUMEL, turns: int = TURNS) -> None:
    """Prints a table; GCK_ISA chooses the instruction set."""
    torch.set_num_threads(1)
    table = Table("codec", "density", "k", "encode, GB/s", "decode, GB/s", title=f"{load().isa()}, 1 thread")
    for codec in INDEX_CODECS[1:]:
        for ratio in RATIOS:
            k = resolve_k("codec_speed", numel, ratio, None)
            encode, decode = speeds(codec, numel, k, turns)
            table.add_row(codec, f"{ratio:.1%}", f"{k:,}", f"{encode:.2f}", f"{decode:.2f}")
    Console().print(table)


def speeds(codec: str, numel: int, k: int, turns: int) -> tuple[float, float]:
    """(encoding, decoding) in gigabytes of int32 indices a second, at places drawn at random."""
    generator = torch.Generator().manual_seed(k)
    indices = torch.randperm(numel, generator=generator)[:k].sort().values.to(torch.int32)
    fields = index_codecs.encode(codec, indices, numel)
    out = torch.empty(1, k, dtype=torch.int32)
    rows = [field.view(1, -1) for field in fields]
    encoding = _seconds(lambda: index_codecs.encode_(codec, indices, numel, fields, "bench"), turns)
    decoding = _seconds(lambda: index_codecs.decode_(codec, rows, numel, out, "bench"), turns)
    if not torch.equal(out[0], indices):
        raise RuntimeError(f"{codec}: what was decoded is not what was encoded ({numel=}, {k=})")
    return 4e-9 * k / encoding, 4e-9 * k / decoding


def _seconds(run: Callable[[], None], turns: int) -> float:
    samples = []
    for _ in range(turns):
        begin = time.thread_time()
        run()
        samples.append(time.thread_time() - begin)
    return statistics.median(samples)


if __name__ == "__main__":
    typer.run(main)
