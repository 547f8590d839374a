"""KV-cache transfers among other work: many requests under way between all ranks, some of them cancelled, all bytes checked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import xccl
from tests.multirank.support import Array, assert_same, launch

RANKS, LAYERS, PAGES, PAGE_BYTES = 4, 4, 64, 5000
ROUNDS, REQUESTS = 25, 24
#: Pages below this hold what is sent, the others what is received.
FIRST_RECEIVED = PAGES // 2
SEED = 20


@dataclass(frozen=True)
class Planned:
    """One request, known to both sides.

    Attributes:
        number: of the request.
        source: its sender.
        destination: its receiver.
        here: pages of the sender.
        there: pages of the receiver.
        by_layer: layers become ready one by one.
        engine: of the sender.
        cancels: "source", "destination" or nobody.
    """

    number: int
    source: int
    destination: int
    here: list[int]
    there: list[int]
    by_layer: bool
    engine: Any
    cancels: str


def plan(number: int) -> list[Planned]:
    """The requests of a round: no page is written twice."""
    rng = np.random.default_rng((SEED, number))
    free = [rng.permutation(np.arange(FIRST_RECEIVED, PAGES)).tolist() for _ in range(RANKS)]
    found = []
    for i in range(REQUESTS):
        source, destination = rng.integers(0, RANKS, 2).tolist()
        count = min(int(rng.integers(0, 9)), len(free[destination]))
        there = [free[destination].pop() for _ in range(count)]
        here = rng.integers(0, FIRST_RECEIVED, count).tolist()
        cancels = str(rng.choice(["source", "destination", "nobody", "nobody", "nobody"]))
        engine = str(rng.choice(["dma", "dma", "mte"]))
        found.append(Planned(i, source, destination, here, there, bool(rng.random() < 0.5), engine, cancels))
    return found


def contents(rank: int) -> Array:
    """What a rank sends."""
    return np.random.default_rng((SEED, rank)).integers(0, 256, (LAYERS, PAGES, PAGE_BYTES), np.uint8)


def other_work(comm: xccl.Communicator, number: int) -> None:
    """A collective, and messages around the ring: they drive requests, and must not mix with them."""
    total = comm.allreduce(np.full(1000, comm.rank + number, np.int64))
    assert (total == sum(range(RANKS)) + RANKS * number).all()
    request = comm.isend(np.full(20_000, comm.rank), (comm.rank + 1) % RANKS, number, engine="dma")
    received = np.zeros(20_000, np.int64)
    comm.recv(received, (comm.rank - 1) % RANKS, number)
    assert (received == (comm.rank - 1) % RANKS).all()
    request.wait()


def run_round(comm: xccl.Communicator, kv: xccl.KVTransfer, number: int, sent: list[Array]) -> int:
    """Post, feed, cancel and check; how many requests have come to their end here as a receiver."""
    rng = np.random.default_rng((SEED, number, comm.rank))
    sends: list[tuple[Planned, xccl.KVSend]] = []
    receives: list[tuple[Planned, xccl.KVReceive]] = []
    requests = plan(number)
    for i in rng.permutation(REQUESTS):
        request = requests[i]
        if request.destination == comm.rank:
            receives.append((request, kv.irecv(request.there, request.source, request.number)))
        if request.source == comm.rank:
            options = {"by_layer": request.by_layer, "engine": request.engine}
            sends.append((request, kv.isend(request.here, request.destination, request.number, **options)))
    for layer in range(LAYERS):
        for request, send in sends:
            if request.by_layer:
                send.ready(layer)
        if layer == 1:
            other_work(comm, number)
    complete = 0
    for i in rng.permutation(len(receives)):
        request, receive = receives[i]
        pages = kv.pool.local[:, request.there]
        if request.cancels == "destination":
            time.sleep(float(rng.random()) * 1e-4)
            if receive.cancel():
                kv.pool.local[:, request.there] = 1  # and nobody writes there any more: looked at below
                continue
        try:
            receive.wait()
        except xccl.FabricError:
            assert request.cancels == "source"
            kv.pool.local[:, request.there] = 1
            continue
        pages = kv.pool.local[:, request.there]
        assert_same(pages, sent[request.source][:, request.here], f"round {number}, {request}")
        kv.pool.local[:, request.there] = 1
        complete += 1
    for request, send in sends:
        if request.cancels == "source":
            send.cancel()
        elif request.cancels == "nobody":
            send.wait()
    comm.barrier()
    for _, send in sends:
        send.cancel()  # those whose receiver had taken its announcement back
    assert not kv.under_way
    assert (kv.pool.local[:, FIRST_RECEIVED:][:, [p - FIRST_RECEIVED for r, _ in receives for p in r.there]] == 1).all()
    return complete


def test_soak(fabric: str) -> None:
    def main(comm: xccl.Communicator) -> int:
        pool = comm.empty((LAYERS, PAGES, PAGE_BYTES), np.uint8)
        pool.local[...] = contents(comm.rank)
        sent = [contents(rank) for rank in range(RANKS)]
        kv = xccl.KVTransfer(comm, pool, max_requests=REQUESTS)
        comm.barrier()
        complete = sum(run_round(comm, kv, number, sent) for number in range(ROUNDS))
        assert_same(pool.local[:, :FIRST_RECEIVED], sent[comm.rank][:, :FIRST_RECEIVED], "what is sent is not written")
        kv.free()
        return complete

    planned = [request for number in range(ROUNDS) for request in plan(number)]
    surely = sum(request.cancels == "nobody" for request in planned)
    assert surely <= sum(launch(main, RANKS, fabric)) <= len(planned)


def test_1000_blocks_arrive_while_the_receivers_compute(fabric: str) -> None:
    """By counting: the sender's last layer waits for a step of the receiver that began after the first had come.

    The receiver makes no call that moves anything from `irecv` until it has seen all layers.
    """
    pairs, layers, block_bytes = 4, 5, 64 << 10
    blocks = 1000 // (pairs * layers)

    def main(comm: xccl.Communicator) -> tuple[int, list[int]]:
        pool = comm.empty((layers, blocks + 3, block_bytes), np.uint8)
        kv, steps = xccl.KVTransfer(comm, pool), comm.signals(1)
        pages = np.random.default_rng(comm.rank).permutation(blocks + 3)[:blocks]
        if comm.rank < pairs:
            request = kv.isend(pages, comm.rank + pairs, 1, by_layer=True)
            for layer in range(layers):
                for i, page in enumerate(pages):
                    pool.local[layer, page] = (comm.rank * 31 + layer * 7 + i) % 251
                if layer == layers - 1:
                    comm.wait_until(steps, 0, "ge", 1)
                request.ready(layer)
            request.wait()
            return 0, []
        receive = kv.irecv(pages, comm.rank - pairs, 1)
        x, seen = np.ones((32, 32), np.float32), []
        while receive.layers_arrived < layers:
            x = np.tanh(x @ x)
            seen.append(receive.layers_arrived)
            if seen[-1] > 0 and seen.count(seen[-1]) == 1:
                comm.signal(steps, 0, 1, peer=comm.rank - pairs)
        receive.wait()
        right = 0
        for layer in range(layers):
            want = ((comm.rank - pairs) * 31 + layer * 7 + np.arange(blocks)) % 251
            right += int((pool.local[layer, pages] == want[:, None]).all(axis=1).sum())
        return right, seen

    results = launch(main, 2 * pairs, fabric)[pairs:]
    assert sum(right for right, _ in results) == 1000
    for _, seen in results:
        assert seen == sorted(seen)
        assert any(0 < arrived < layers for arrived in seen)  # steps were made between the first layer and the last
