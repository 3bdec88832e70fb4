"""Collectives over compressed payloads; none of them knows a compressor by name."""

if __name__ != "gck.collectives":
    raise ImportError(f"import gck.collectives, not {__name__}: this folder belongs to the package gck")

from gck.collectives.all_gather import sparse_all_gather
from gck.collectives.all_reduce import (
    all_reduce_,
    all_reduce_many_,
    packed_all_reduce_,
)
from gck.collectives.compute import measure_compute
from gck.collectives.cost import (
    Cost,
    HierarchicalCost,
    Link,
    all_reduce_cost,
    break_even_density,
    choose_algorithm,
    hierarchical_cost,
)
from gck.collectives.hierarchical import HierarchicalGroup
from gck.collectives.pieces import choose_piece_numel
from gck.collectives.scratch import empty_cache
from gck.collectives.transports import Transport, resolve
from gck.collectives.transports.nccl import NcclCommunicator
from gck.collectives.transports.simulated import SimulatedGroup, SimulatedMember
from gck.collectives.work import Work

__all__ = [
    "Cost",
    "HierarchicalCost",
    "HierarchicalGroup",
    "Link",
    "NcclCommunicator",
    "SimulatedGroup",
    "SimulatedMember",
    "Transport",
    "Work",
    "all_reduce_",
    "all_reduce_cost",
    "all_reduce_many_",
    "break_even_density",
    "choose_algorithm",
    "choose_piece_numel",
    "empty_cache",
    "hierarchical_cost",
    "measure_compute",
    "packed_all_reduce_",
    "resolve",
    "sparse_all_gather",
]
