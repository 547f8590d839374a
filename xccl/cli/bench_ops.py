"""The operations that `xccl bench` knows. To add one, write an `Operation` and add a line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from xccl.cli.bench_a2e import A2E
from xccl.cli.bench_collectives import Collective
from xccl.cli.bench_kv import KV
from xccl.cli.bench_moe import Moe
from xccl.cli.bench_part import Operation
from xccl.cli.bench_sized import Barrier, Get, Put, PutSignal, SendRecv
from xccl.cli.options import BenchOptions, Case
from xccl.layout.dtypes import CODE_BY_NAME, DTYPE_OF


@dataclass(frozen=True)
class Benchmark:
    """An entry of the registry.

    Attributes:
        summary: What one iteration is.
        make: What a rank runs.
        sweep: Over what: message sizes, tokens, or nothing.
        rows: Rows of each case.
        default_ranks: Ranks if none are asked for.
        min_ranks: Ranks needed.
        parted: Do sizes stand for a part for each rank?
        is_deployed: Has it the options of a deployment, attention and experts on different dies?
        in_pairs: Does half of the ranks send to the other half?
        default_engine: What moves bytes if nothing is asked for.
    """

    summary: str
    make: type[Operation]
    sweep: Literal["bytes", "tokens", "nothing"]
    rows: tuple[str, ...]
    default_ranks: int = 8
    min_ranks: int = 1
    parted: bool = False
    is_deployed: bool = False
    in_pairs: bool = False
    default_engine: str = "mte"

    def cases(self, options: BenchOptions) -> list[Case]:
        """The cases of a run, in order."""
        if self.sweep == "bytes":
            itemsize = DTYPE_OF[CODE_BY_NAME[options.dtype]].itemsize
            return [Case(size_bytes=size) for size in options.sizes(itemsize * (options.ranks if self.parted else 1))]
        if self.sweep == "tokens":
            return [Case(tokens=tokens) for tokens in options.tokens]
        return [Case()]


def _neighbours(summary: str, make: type[Operation], row: str) -> Benchmark:
    return Benchmark(summary, make, "bytes", (row,), default_ranks=2, min_ranks=2)


def _collective(summary: str, row: str, *, parted: bool = True) -> Benchmark:
    return Benchmark(summary, Collective, "bytes", (row,), parted=parted)


BENCHMARKS: Final[dict[str, Benchmark]] = {
    "put": _neighbours("every rank writes to the next, until complete there", Put, "put"),
    "get": _neighbours("every rank reads from the next", Get, "get"),
    "put-signal": _neighbours("put with a signal, and a wait for the own signal", PutSignal, "put-signal"),
    "sendrecv": _neighbours("every rank sends to the next and receives from the previous", SendRecv, "sendrecv"),
    "kv": Benchmark(
        "paged blocks of a KV cache, from prefill to decode ranks",
        KV,
        "bytes",
        ("kv",),
        default_ranks=2,
        min_ranks=2,
        in_pairs=True,
        default_engine="dma",
    ),
    "barrier": Benchmark("all ranks meet", Barrier, "nothing", ("barrier",)),
    "dispatch": Benchmark("tokens to the ranks of their experts", Moe, "tokens", ("dispatch",)),
    "combine": Benchmark("expert outputs back, weighted and summed", Moe, "tokens", ("combine",)),
    "moe": Benchmark("dispatch, combine, and the round trip of both", Moe, "tokens", ("dispatch", "combine", "moe")),
    "a2e": Benchmark("tokens from attention dies to expert dies", A2E, "tokens", ("a2e",), is_deployed=True),
    "e2a": Benchmark("outputs of experts back, weighted and summed", A2E, "tokens", ("e2a",), is_deployed=True),
    "allgather": _collective("the arrays of all ranks, at all ranks", "allgather"),
    "allreduce": _collective("the arrays of all ranks, reduced, at all ranks", "allreduce", parted=False),
    "reduce-scatter": _collective("the arrays of all ranks, reduced, a part at each rank", "reduce-scatter"),
    "alltoall": _collective("a part of each rank's array to each rank", "alltoall"),
    "alltoallv": _collective("alltoall with numbers of rows, known to both sides", "alltoallv"),
    "broadcast": _collective("the array of rank 0, at all ranks", "broadcast", parted=False),
    "gather": _collective("the arrays of all ranks, at rank 0", "gather"),
    "scatter": _collective("a part of the array of rank 0 at each rank", "scatter"),
}
