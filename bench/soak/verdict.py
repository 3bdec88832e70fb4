"""What the ranks of a soak reported, put side by side."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from bench.soak.plan import DAMAGES, FREEZE_TIMEOUT, STOPS, Operation

__all__ = ["Verdict"]

Report = dict[str, Any]
# What a fault must end in, on every rank; "late" and "stopped" ranks are waited for.
EXPECTED = dict.fromkeys(DAMAGES, "CorruptPayloadError") | {"mismatch": "CollectiveMismatchError"}
LOST = ("PeerLostError", "CollectiveTimeoutError", "GroupUnusableError")


@dataclass
class Verdict:
    """Counts of a soak.

    Attributes:
        injected, detected: faults by kind; those detected ended as they must on every rank.
        kills: ranks killed.
        survivors: typed errors on those that remained.
        slowest: seconds until the last of them.
        freezes: ranks stopped for longer than their peers wait.
        frozen: typed errors, on all ranks, where one was.
        slowest_frozen: seconds until the last of those on the ranks that were not stopped.
        wrong: texts of everything that was not as it must be; empty after a good run.
        memory, descriptors: of each rank, in the order of time; of the processes that live longest.
        rebuilt: descriptors of each rank of the crew that is frozen, in the order of time: one after each new
            group.
    """

    operations: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    detected: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    survivors: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    freezes: int = 0
    frozen: Counter[str] = field(default_factory=Counter)
    slowest_frozen: float = 0.0
    wrong: list[str] = field(default_factory=list)
    memory: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    descriptors: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    rebuilt: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def look(self, rank: int, report: Report, rebuilds: bool) -> None:
        """What the process of a rank holds, where it told."""
        if "memory" in report and rebuilds:
            self.rebuilt[rank].append(report["descriptors"])
        elif "memory" in report:
            self.memory[rank].append(report["memory"])
            self.descriptors[rank].append(report["descriptors"])

    def add(self, operation: Operation, reports: dict[int, Report]) -> None:
        """The reports of all ranks on one operation."""
        self.operations += 1
        fault = operation.fault
        if fault is not None and fault.kind == "frozen":
            self._add_frozen(operation, fault.rank, reports)
            return
        injected = fault is not None and reports[fault.rank]["injected"]
        if fault is not None and injected:
            self.injected[fault.kind] += 1
        errors = {report["error"] for report in reports.values()}
        expected = EXPECTED.get(fault.kind, "") if fault is not None and injected else ""
        if errors != {expected}:
            self._wrong(operation, f"ended in {sorted(errors)}, not {expected or 'a result'}")
        elif expected:
            if all(report["unchanged"] for report in reports.values()):
                self.detected[fault.kind if fault else ""] += 1
            else:
                self._wrong(operation, "an error left gradients or residuals changed")
        else:
            result, states = reports[0]["right"]
            if len({report["result"] for report in reports.values()}) != 1:
                self._wrong(operation, "ranks have different results")
            # Of a dense sum the order of additions is the backend's.
            if reports[0]["result"] != result and not reports[0]["near"]:
                self._wrong(operation, "results differ from the simulated ones")
            if any(report["state"] != states[rank] for rank, report in reports.items()):
                self._wrong(operation, "residuals differ from the simulated ones")
            if fault is not None and injected:
                self.detected[fault.kind] += 1

    def add_killed(self, operation: Operation, victim: int, reports: dict[int, Report], ranks: int) -> None:
        """What the other ones of `ranks` reported after `victim` was killed."""
        self.kills += 1
        for rank in set(range(ranks)) - {victim}:
            report = reports.get(rank)
            if report is None or report["error"] not in LOST or not report["unchanged"]:
                said = None if report is None else (report["error"], report.get("unchanged"))
                self._wrong(operation, f"rank {rank} after the end of rank {victim}: {said}")
                continue
            self.survivors[report["error"]] += 1
            self.slowest = max(self.slowest, report["seconds"])

    def _add_frozen(self, operation: Operation, victim: int, reports: dict[int, Report]) -> None:
        self.freezes += 1
        if not reports[victim]["injected"]:
            self._wrong(operation, f"rank {victim} was not stopped")
        for rank, report in reports.items():
            if report["error"] not in LOST or not report["unchanged"]:
                said = report["error"], report.get("unchanged")
                self._wrong(operation, f"rank {rank} beside rank {victim}, which stopped: {said}")
                continue
            self.frozen[report["error"]] += 1
            seconds = report["seconds"] - (STOPS["frozen"] if rank == victim else 0)
            if seconds > FREEZE_TIMEOUT + 2:
                self._wrong(operation, f"rank {rank} took {seconds:.1f} s")
            if rank != victim:
                self.slowest_frozen = max(self.slowest_frozen, seconds)

    def growth(self, values: list[int]) -> int:
        """From the first quarter, when buffers of all sizes have been made, to the end."""
        return values[-1] - values[len(values) // 4] if len(values) > 3 else 0

    def _wrong(self, operation: Operation, text: str) -> None:
        self.wrong.append(f"operation {operation.index} ({operation}): {text}")
