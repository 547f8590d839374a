"""The contract of `xccl.Communicator`, whatever the fabric: symmetric memory, one-sided operations, signals, barriers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np
import pytest

import xccl
from tests.conformance.suite import Suite
from tests.multirank.support import assert_same, bits, error_of
from xccl.errors import CapacityError, UsageError

RECORD: Final = np.dtype([("key", np.int16), ("value", np.float64), ("tag", "S3")])  # 13 bytes, fields not aligned
DTYPES: Final = [
    np.dtype(code)
    for code in ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16", ">i4", "M8[us]",
    "S5", "U3", "V7")
] + [np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), RECORD]  # fmt: skip
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def pattern(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random bytes as elements of a dtype, NaNs and all; 0 and 1 for bool, ASCII for text."""
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind == "U":
        return rng.integers(32, 127, (n, dtype.itemsize // 4), np.uint32).view(dtype).reshape(shape)
    return rng.integers(0, 256, (n, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


class CommunicatorSuite(Suite):
    """Everything but send/receive and expert parallelism, which have tests of their own."""

    # -- symmetric arrays -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", [7, (7,), (), (0,), (2, 0, 3), (3, 4, 5), np.int32(4), (1,) * 10])
    def test_empty_has_shape_and_dtype_at_all_ranks(self, shape: Any) -> None:
        expected = np.empty(shape, np.float64)

        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(shape, np.float64)
            assert (a.shape, a.dtype, a.size, a.nbytes) == (
                expected.shape, expected.dtype, expected.size, expected.nbytes,
            )  # fmt: skip
            for view in (a.local, *(a.peer(r) for r in range(comm.size))):
                assert (view.shape, view.dtype) == (expected.shape, expected.dtype)
                assert view.flags.c_contiguous
                assert view.flags.writeable

        self.run(main)

    def test_local_and_peer_are_the_same_memory(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty((5, 3), np.int32)
            b = comm.empty((5, 3), np.int32)
            a.local[:] = comm.rank + 1
            b.local[:] = 10 * (comm.rank + 1)
            comm.barrier()
            for r in range(comm.size):
                assert (a.peer(r) == r + 1).all()
                assert (b.peer(r) == 10 * (r + 1)).all()
            comm.barrier()
            a.peer((comm.rank + 1) % comm.size)[comm.rank, 1] = 99
            comm.barrier()
            before = (comm.rank - 1) % comm.size
            assert (a.local == 99).sum() == 1
            assert a.local[before, 1] == 99

        self.run(main, 3)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_is_moved_bit_for_bit(self, dtype: np.dtype[Any]) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty((4, 6), dtype)
            a.local[...] = np.zeros((), dtype)
            comm.barrier()
            peer, other = 1 - comm.rank, pattern(dtype, (13,), 10 + comm.rank)
            comm.put(a, other, peer=peer, offset=5)
            comm.barrier()
            expected = np.zeros(24, dtype)
            expected[5:18] = pattern(dtype, (13,), 10 + peer)
            assert_same(a.local.reshape(-1), expected, "put")
            back = np.zeros((2, 6), dtype)
            comm.get(back, a, peer=peer, offset=6)
            assert_same(back.reshape(-1), other[1:13], "get")
            if comm.rank == 0:
                comm.send(other, dst=1, event_id=1)
            else:
                out = np.zeros(13, dtype)
                comm.recv(out, src=0, event_id=1)
                assert_same(out, pattern(dtype, (13,), 10), "send")

        self.run(main)

    # -- allocation -------------------------------------------------------------------------------------------------

    def test_blocks_are_aligned_apart_and_at_the_same_offset(self) -> None:
        def main(comm: xccl.Communicator) -> list[tuple[int, int]]:
            fabric = comm.core.fabric
            sizes = [1, 127, 128, 129, 0, 3, 4096, 5000, 64]
            arrays = [comm.empty(n, np.uint8) for n in sizes]
            words = comm.signals(3)
            blocks = []
            for a, n in [*((a, a.nbytes) for a in arrays), (words, 3 * 128)]:
                offsets = np.array(a.addresses) - fabric.segments
                assert (offsets == offsets[0]).all()
                blocks.append((int(offsets[0]), n))
            for offset, _ in blocks:
                assert offset % 128 == 0
            for (start, n), (behind, _) in zip(sorted(blocks), sorted(blocks)[1:], strict=False):
                assert start + max(n, 1) <= behind
            return blocks

        first, second = self.run(main)
        assert first == second

    def test_freed_memory_is_used_again_and_merged(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            whole = 1 << 20
            for _ in range(3):
                parts = [comm.empty(whole // 4, np.uint8) for _ in range(4)]
                for i in (2, 0, 3, 1):
                    parts[i].free()
                comm.empty(whole, np.uint8).free()

        self.run(main, app_bytes=1 << 20)

    def test_exhaustion_says_the_numbers_at_all_ranks_and_leaks_nothing(self) -> None:
        def main(comm: xccl.Communicator) -> BaseException | None:
            kept = comm.empty(1 << 18, np.uint8)
            kept.local[:] = comm.rank + 1
            error = error_of(comm.empty, (1 << 20) - (1 << 18) + 1, np.uint8)
            rest = comm.empty((1 << 20) - (1 << 18), np.uint8)
            rest.local[:] = 0xFF
            comm.barrier()
            assert (kept.local == comm.rank + 1).all()
            return error

        for error in self.run(main, 3, app_bytes=1 << 20):
            assert isinstance(error, CapacityError)
            needed, available = error.needed_bytes, error.available_bytes
            assert needed == (1 << 20) - (1 << 18) + 128
            assert available == (1 << 20) - (1 << 18)
            assert str(needed) in str(error)
            assert str(available) in str(error)

    def test_exhaustion_by_signals(self) -> None:
        def main(comm: xccl.Communicator) -> BaseException | None:
            error = error_of(comm.signals, 1 << 16)
            comm.signals((1 << 20) // 128)
            return error

        for error in self.run(main, app_bytes=1 << 20):
            assert isinstance(error, CapacityError)

    def test_free_is_final(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(4, np.int64)
            data = np.zeros(4, np.int64)
            a.free()
            calls: list[Callable[[], Any]] = [
                lambda: a.local, lambda: a.peer(0), a.free, lambda: comm.put(a, data, peer=0),
                lambda: comm.get(data, a, peer=0),
            ]  # fmt: skip
            for call in calls:
                with pytest.raises(UsageError, match="freed"):
                    call()
            comm.barrier()

        self.run(main)

    # -- put and get ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("n_bytes", [0, 1, 31, 64, 4097, 1 << 20, (1 << 22) + 5])
    def test_sizes_and_offsets_touch_nothing_else(self, n_bytes: int) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(n_bytes + 77, np.uint8)
            peer = 1 - comm.rank
            for offset in (0, 1, 33, 77):
                a.local[:] = 0xEE
                comm.barrier()
                data = pattern(np.dtype(np.uint8), (n_bytes + 3,), comm.rank)[3:]  # at an odd address
                comm.put(a, data, peer=peer, offset=offset)
                comm.barrier()
                theirs = pattern(np.dtype(np.uint8), (n_bytes + 3,), peer)[3:]
                assert_same(a.local[offset : offset + n_bytes], theirs)
                assert (a.local[:offset] == 0xEE).all()
                assert (a.local[offset + n_bytes :] == 0xEE).all()
                into = np.full(n_bytes + 64, 0xDD, np.uint8)
                comm.get(into[33 : 33 + n_bytes], a, peer=peer, offset=offset)
                assert_same(into[33 : 33 + n_bytes], data)
                assert (into[:33] == 0xDD).all()
                assert (into[33 + n_bytes :] == 0xDD).all()
                comm.barrier()

        self.run(main)

    def test_strided_sources(self) -> None:
        base = np.arange(240, dtype=np.int32).reshape(6, 5, 8)
        sources = [
            base[::2], base[:, ::-1], base.T, base[1:3, 2], base[..., 3], np.asfortranarray(base),
            np.broadcast_to(np.int32(5), (4, 3)), base[0, 0, 0:0],
        ]  # fmt: skip

        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(240, np.int32)
            signals = comm.signals(1)
            for i, source in enumerate(sources):
                a.local[:] = -1
                comm.barrier()
                if i % 2:
                    comm.put(a, source, peer=1 - comm.rank)
                    comm.barrier()
                else:
                    comm.put_signal(a, source, peer=1 - comm.rank, signals=signals, index=0, value=i + 1)
                    comm.wait_until(signals, 0, "eq", i + 1)
                assert_same(a.local[: source.size], source.reshape(-1), f"source {i}")
                assert (a.local[source.size :] == -1).all()
                comm.barrier()

        self.run(main)

    def test_read_only_sources(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(3, np.int64)
            source = np.arange(3)
            source.flags.writeable = False
            comm.put(a, source, peer=comm.rank)
            assert a.local.tolist() == [0, 1, 2]

        self.run(main)

    @pytest.mark.parametrize(("start", "offset"), [(0, 1), (1, 0), (0, 0), (0, 4000), (4000, 0), (100, 101)])
    def test_put_to_and_get_from_self_with_overlap(self, start: int, offset: int) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(12_000, np.int32)
            before = np.arange(12_000, dtype=np.int32) * 7
            a.local[:] = before
            comm.put(a, a.local[start : start + 8000], peer=comm.rank, offset=offset)
            expected = before.copy()
            expected[offset : offset + 8000] = before[start : start + 8000]
            assert_same(a.local, expected, "put")
            a.local[:] = before
            comm.get(a.local[offset : offset + 8000], a, peer=comm.rank, offset=start)
            assert_same(a.local, expected, "get")
            signals = comm.signals(1)
            a.local[:] = before
            comm.put_signal(
                a, a.local[start : start + 8000], peer=comm.rank, signals=signals, index=0, value=1, offset=offset
            )
            assert_same(a.local, expected, "put_signal")
            # Every second element of itself: the source is strided, and lies under its own destination.
            a.local[:] = before
            comm.put(a, a.local[::2], peer=comm.rank, offset=offset)
            expected = before.copy()
            expected[offset : offset + 6000] = before[::2]
            assert_same(a.local, expected, "strided put")

        self.run(main, 1)

    def test_the_whole_array_is_the_limit(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty((2, 5), np.int16)
            a.local[:] = -1
            data = np.arange(10, dtype=np.int16)
            comm.put(a, data, peer=comm.rank)
            comm.put(a, data[:0], peer=comm.rank, offset=10)
            for count, offset in ((11, 0), (1, 10), (10, 1), (0, 11)):
                source = np.zeros(count, np.int16)
                for call in (
                    lambda s=source, o=offset: comm.put(a, s, peer=0, offset=o),
                    lambda s=source, o=offset: comm.get(s, a, peer=0, offset=o),
                ):
                    with pytest.raises(UsageError) as caught:
                        call()
                    assert "10" in str(caught.value)
            assert a.local.reshape(-1).tolist() == list(range(10))

        self.run(main, 1)

    # -- the end ----------------------------------------------------------------------------------------------------

    def test_after_close_nothing_is_possible(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a, s = comm.empty(4, np.int64), comm.signals(1)
            data = np.zeros(4, np.int64)
            ep = xccl.ExpertParallel(
                comm, num_experts=2, hidden=4, top_k=1, max_tokens=1, dtype=np.float32, quant="none"
            )
            x, idx = np.zeros((0, 4), np.float32), np.zeros((0, 1), np.int64)
            d = ep.dispatch(x, idx)
            out = np.zeros((len(d.source), 4), np.float32)
            comm.barrier()
            comm.close()
            comm.close()  # twice is once
            calls: list[Callable[[], Any]] = [
                lambda: comm.empty(1, np.int8), lambda: comm.signals(1), lambda: a.local, lambda: a.peer(0), a.free,
                lambda: comm.put(a, data, peer=0), lambda: comm.get(data, a, peer=0),
                lambda: comm.put_signal(a, data, peer=0, signals=s, index=0, value=1),
                lambda: comm.signal(s, 0, 1, peer=0), lambda: comm.wait_until(s, 0, "eq", 0), lambda: s.read(0),
                comm.fence, comm.quiet, comm.barrier,
                lambda: comm.send(data, dst=1 - comm.rank, event_id=0),
                lambda: comm.recv(data, src=1 - comm.rank, event_id=0),
                lambda: comm.isend(data, dst=0, event_id=0), lambda: comm.irecv(data, src=0, event_id=0),
                lambda: ep.dispatch(x, idx), lambda: ep.combine(out, d, np.zeros((0, 1), np.float32)),
                lambda: xccl.ExpertParallel(comm, num_experts=2, hidden=4, top_k=1, max_tokens=1, dtype=np.float32),
            ]  # fmt: skip
            for i, call in enumerate(calls):
                with pytest.raises(UsageError, match="left its session"):
                    call()
                    pytest.fail(f"call {i} was possible after close()")

        self.run(main)

    def test_results_and_arguments(self) -> None:
        def main(comm: xccl.Communicator, a: int, *, b: int) -> tuple[int, int, str]:
            return comm.rank, a * b, repr(comm)

        for rank, (found, product, text) in enumerate(self.run(main, 3, args=(6,), kwargs={"b": 7})):
            assert (found, product) == (rank, 42)
            assert f"rank={rank}" in text
            assert "size=3" in text

    def test_bits_that_are_moved_stay(self) -> None:
        """Signalling NaNs and padding survive put, get and send."""
        data = np.frombuffer(bytes(range(256)) * 4, np.float32)

        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(256, np.float32)
            comm.put(a, data, peer=1 - comm.rank)
            comm.barrier()
            assert (bits(a.local) == bits(data)).all()

        self.run(main)
