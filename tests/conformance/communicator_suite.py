"""The contract of `xccl.Communicator`, whatever the fabric: symmetric memory, one-sided operations, signals, barriers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np
import pytest

import xccl
from tests.conformance.suite import Suite
from tests.multirank.support import assert_same, bits, error_of
from xccl.comm.core import Waiting
from xccl.errors import CapacityError, UsageError, WaitTimeout
from xccl.kernels import words
from xccl.layout.segment import CTL_YIELDS

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

    # -- signals ----------------------------------------------------------------------------------------------------

    def test_signals_start_at_zero_also_in_memory_used_before(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(1 << 12, np.uint8)
            a.local[:] = 0xFF
            comm.barrier()
            a.free()
            signals = comm.signals(32)
            assert len(signals) == 32
            assert [signals.read(i) for i in range(32)] == [0] * 32

        self.run(main)

    def test_set_and_add_and_64_bits(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            s = comm.signals(4)
            peer = 1 - comm.rank
            for value in (5, -5, INT64_MAX, INT64_MIN, 0, 1 << 40, -1):
                comm.signal(s, 2, value, peer=peer)
                assert comm.wait_until(s, 2, "eq", value) == value
                comm.barrier()
            comm.signal(s, 1, INT64_MAX, peer=peer)
            comm.signal(s, 1, 1, peer=peer, op="add")
            assert comm.wait_until(s, 1, "eq", INT64_MIN) == INT64_MIN  # 64 bits, and round they go
            comm.signal(s, 0, -3, peer=peer, op="add")
            assert comm.wait_until(s, 0, "lt", 0) == -3
            assert [s.read(i) for i in range(4)] == [-3, INT64_MIN, -1, 0]

        self.run(main)

    def test_adds_from_all_ranks_are_not_lost(self) -> None:
        def main(comm: xccl.Communicator) -> int:
            s = comm.signals(1)
            for i in range(1500):
                comm.signal(s, 0, 1 + comm.rank, peer=i % comm.size, op="add")
            return comm.wait_until(s, 0, "ge", 3000)

        assert self.run(main, 3) == [3000] * 3

    @pytest.mark.parametrize(("n", "rounds"), [(1, 300), (1 << 14, 300), (1 << 19, 20)])
    @pytest.mark.parametrize("polling", [False, True])
    def test_put_signal_never_overtakes_its_data(self, n: int, rounds: int, polling: bool) -> None:
        """The largest copy takes far longer than a rank takes to wake up, and a polling one sees the signal at once."""

        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(n, np.int64)
            s = comm.signals(2)
            a.local[:] = 0
            comm.barrier()
            peer = 1 - comm.rank
            for i in range(1, rounds + 1):
                size = 1 + (i * 997) % n if i % 2 else n
                if comm.rank == 0:
                    op, value = ("set", i) if i % 3 else ("add", 1)
                    comm.put_signal(a, np.full(size, i), peer, s, 0, value, op, offset=n - size)
                    comm.wait_until(s, 1, "ge", i)
                else:
                    while polling and s.read(0) < i:
                        comm.core.check_session(lambda: Waiting("polling"))
                    assert comm.wait_until(s, 0, "ge", i) == i
                    assert a.local[n - 1] == i, "the last element is behind the signal"
                    assert (a.local[n - size :] == i).all(), i
                    comm.signal(s, 1, 1, peer=peer, op="add")

        self.run(main)

    def test_a_signal_does_not_overtake_puts_before_it(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty((4, 5000), np.int32)
            s = comm.signals(2)
            comm.barrier()
            for i in range(1, 101):
                if comm.rank == 0:
                    for part in range(4):
                        comm.put(a, np.full(5000, i * 10 + part, np.int32), peer=1, offset=part * 5000)
                    comm.signal(s, 0, i, peer=1)
                    comm.wait_until(s, 1, "eq", i)
                else:
                    comm.wait_until(s, 0, "eq", i)
                    assert (a.local == i * 10 + np.arange(4)[:, None]).all()
                    comm.signal(s, 1, i, peer=0)

        self.run(main)

    @pytest.mark.parametrize(
        ("comparison", "value", "sent"),
        [("eq", 7, 7), ("ne", 0, -1), ("gt", 5, 6), ("ge", 6, 6), ("lt", 0, -1), ("le", -2, -2)],
    )
    def test_wait_until(self, comparison: str, value: int, sent: int) -> None:
        def main(comm: xccl.Communicator) -> int:
            s = comm.signals(2)
            if comm.rank == 0:
                comm.wait_until(s, 1, "eq", 1)  # rank 1 waits, or is about to
                time.sleep(0.02)
                comm.signal(s, 0, sent, peer=1)
                return sent
            comm.signal(s, 1, 1, peer=0)
            return comm.wait_until(s, 0, comparison, value)

        assert self.run(main) == [sent, sent]

    @pytest.mark.parametrize(
        ("comparison", "value"), [("eq", 4), ("ne", 3), ("gt", 3), ("ge", 4), ("lt", 3), ("le", 2), ("gt", INT64_MAX)]
    )
    def test_wait_until_times_out_with_what_it_saw(self, comparison: str, value: int) -> None:
        def main(comm: xccl.Communicator) -> tuple[BaseException | None, float]:
            s = comm.signals(2)
            comm.signal(s, 1, 3, peer=comm.rank)
            start = time.monotonic()
            error = error_of(comm.wait_until, s, 1, comparison, value, timeout_s=0.05)
            seconds = time.monotonic() - start
            comm.barrier()  # a rank that waits alone, when all others have left, is told so
            return error, seconds

        for rank, (error, seconds) in enumerate(self.run(main)):
            assert isinstance(error, WaitTimeout)
            assert isinstance(error, TimeoutError)
            assert (error.rank, error.expected, error.seen, error.timeout_s) == (rank, value, 3, 0.05)
            assert f"{comparison} {value}" in str(error)
            assert "seen 3" in str(error)
            assert 0.04 < seconds < 5

    def test_a_deadline_holds_before_a_rank_sleeps(self) -> None:
        """On a busy machine each yield gives the core away for milliseconds; here there are many that take none."""

        def main(comm: xccl.Communicator) -> float:
            s = comm.signals(1)
            words.store(comm.core.control + CTL_YIELDS, 50_000_000)
            start = time.monotonic()
            with pytest.raises(WaitTimeout):
                comm.wait_until(s, 0, "eq", 1, timeout_s=0.02)
            return time.monotonic() - start

        assert self.run(main, 1)[0] < 0.5

    def test_wait_until_returns_at_once_when_it_holds(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            s = comm.signals(1)
            comm.signal(s, 0, 3, peer=comm.rank)
            for comparison, value in (("eq", 3), ("ne", 2), ("gt", 2), ("ge", 3), ("lt", 4), ("le", 3)):
                assert comm.wait_until(s, 0, comparison, value, timeout_s=1e-9) == 3

        self.run(main, 1)

    def test_the_default_deadline(self) -> None:
        def main(comm: xccl.Communicator) -> BaseException | None:
            s = comm.signals(1)
            assert comm.op_timeout_s == 15
            comm.op_timeout_s = 0.05
            error = error_of(comm.wait_until, s, 0, "eq", 1)
            for bad in (0, -1, float("inf"), float("nan"), "soon"):
                with pytest.raises(UsageError):
                    comm.op_timeout_s = bad  # type: ignore[assignment]
            assert comm.op_timeout_s == 0.05
            comm.barrier(timeout_s=15)
            return error

        for error in self.run(main, op_timeout_s=15):
            assert isinstance(error, WaitTimeout)
            assert error.timeout_s == 0.05

    # -- order and barriers -----------------------------------------------------------------------------------------

    def test_quiet_completes_and_fence_orders(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(2, np.int64)
            s = comm.signals(1)
            a.local[:] = 0
            comm.barrier()
            peer = 1 - comm.rank
            for i in range(1, 201):
                comm.put(a, np.array([i]), peer=peer, offset=0)
                if i % 2:
                    comm.fence()
                else:
                    comm.quiet()
                comm.put(a, np.array([i]), peer=peer, offset=1)
                seen = np.empty(2, np.int64)
                comm.get(seen, a, peer=comm.rank)
                # Both words by load: the second, read first, is never ahead of the first.
                second = int(a.local[1])
                first = int(a.local[0])
                assert first >= second
                comm.quiet()
                comm.get(seen, a, peer=peer)
                assert seen.tolist() == [i, i]
            comm.signal(s, 0, 1, peer=peer)
            comm.wait_until(s, 0, "eq", 1)
            assert a.local.tolist() == [200, 200]

        self.run(main)

    def test_after_a_barrier_all_see_what_all_did(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(comm.size, np.int64)
            for i in range(150):
                for peer in range(comm.size):
                    comm.put(a, np.array([i * comm.size + comm.rank]), peer=peer, offset=comm.rank)
                comm.barrier()
                assert a.local.tolist() == [i * comm.size + r for r in range(comm.size)]
                comm.barrier()

        self.run(main, 4)

    def test_nobody_passes_a_barrier_before_the_last_arrives(self) -> None:
        def main(comm: xccl.Communicator) -> tuple[float, float]:
            comm.barrier()
            if comm.rank == 1:
                time.sleep(0.15)
            arrived = time.monotonic()
            comm.barrier()
            return arrived, time.monotonic()

        times = self.run(main, 3)
        assert min(left for _, left in times) >= max(arrived for arrived, _ in times)

    def test_a_barrier_of_one(self) -> None:
        def main(comm: xccl.Communicator) -> None:
            for _ in range(5):
                comm.barrier(timeout_s=1)

        self.run(main, 1)

    def test_a_barrier_goes_on_after_a_timeout(self) -> None:
        def main(comm: xccl.Communicator) -> list[BaseException | None]:
            s = comm.signals(1)
            errors: list[BaseException | None] = []
            for i in range(1, 4):
                if comm.rank == 0:
                    # Twice in vain, so it must not be counted three times; then the others come.
                    errors += [error_of(comm.barrier, timeout_s=0.02), error_of(comm.barrier, timeout_s=0.02)]
                    for peer in range(1, comm.size):
                        comm.signal(s, 0, i, peer=peer)
                else:
                    comm.wait_until(s, 0, "eq", i)
                comm.barrier()
            return errors

        errors = self.run(main, 3)[0]
        assert len(errors) == 6
        for error in errors:
            assert isinstance(error, WaitTimeout)
            assert (error.operation, error.rank, error.timeout_s) == ("barrier", 0, 0.02)

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
