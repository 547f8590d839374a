"""Names of libraries; here, so that ranks of other libraries need not import xccl to know them."""

from __future__ import annotations

from typing import Final

XCCL: Final = "xccl"
#: Those that xccl is compared with, and what each stands for.
PEERS: Final = {
    "openmpi": "Open MPI through mpi4py",
    "mpich": "MPICH through mpi4py",
    "gloo": "gloo through torch.distributed",
    "multiprocessing": "pipes, barriers and shared memory of the standard library",
}
#: Not a library: the same bytes copied, and nothing else; see `bench.peers.floor`.
COPY: Final = "copy"
