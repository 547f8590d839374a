"""Figures of the libraries that users would pick instead of xccl, for comparison.

Source: measured on a 2-core machine of the same kind (x86-64 VM), medians, with Open MPI 5.0.11 and MPICH 5.0.2 through
mpi4py 4.1.2, gloo of torch 2.13 (CPU), Open MPI's OpenSHMEM 4.1 and UCX 1.13 in C; page-aligned buffers; 2 ranks
pinned, 4 and 8 oversubscribed. Where a range was seen, its middle stands here. None of it was measured on the machine
that `figures` runs on, and below 10 us the same library differed by up to 1.8 times between two runs: a ratio near 1
says nothing.
"""

from __future__ import annotations

from typing import Final

Values = tuple[float | None, ...]

SOURCE: Final = "a 2-core machine of the same kind"

#: 2 ranks, half round trip in us: 8 B, 1 KiB, 64 KiB.
LATENCY_US: Final[dict[str, Values]] = {
    "mpi4py send/recv, Open MPI": (1.00, 1.47, 9.1),
    "mpi4py send/recv, MPICH": (1.92, 2.00, 10.0),
    "mpi4py put + flush + flag, Open MPI": (1.65, 1.66, 3.2),
    "MPI window, NumPy copy + flag, Python spin": (0.81, 0.95, 2.3),
    "C send/recv, Open MPI": (0.17, 0.33, 7.6),
    "C put + fence + flag, OpenSHMEM": (0.195, 0.186, 1.8),
    "C put, UCX": (0.07, 0.10, 1.9),
    "gloo send/recv": (105, 104, 121),
}

#: 2 ranks, GB/s: 64 KiB, 1 MiB, 4 MiB, 16 MiB.
BANDWIDTH_GBPS: Final[dict[str, Values]] = {
    "mpi4py isend stream, Open MPI": (8.2, 10.6, 14.3, 11.6),
    "mpi4py put, Open MPI": (32, 29, 29, 15),
    "C put, OpenSHMEM": (42, 32, 31, 14),
    "one copy in one process": (None, 36, None, 16.5),
}

#: us a call: 2, 4, 8 ranks.
BARRIER_US: Final[dict[str, Values]] = {
    "mpi4py, Open MPI": (0.39, 8.7, 37),
    "C OpenSHMEM": (0.23, 5.6, 17),
}

#: Dispatch + combine back to back, us: (2, 4, 8 ranks) x (8, 64, 128 tokens a rank). Hidden 7168, 32 experts, top-8,
#: 2-byte elements, alltoallv both ways. "dedup" sends a token once to each rank, the others once to each expert.
MOE_US: Final[dict[str, Values]] = {
    "Open MPI + numba": (406, 3006, 6211, 1015, 7541, 14890, 2754, 16977, 32269),
    "Open MPI + numba, dedup": (214, 717, 1788, 907, 3819, 8214, 3060, 13019, 24087),
    "gloo": (3644, 14069, 26418, 9183, 27709, 53155, 16542, 47339, 89561),
}
