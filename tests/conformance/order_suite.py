"""The contract of signals, waits and barriers, whatever the fabric."""

from __future__ import annotations

import time
from typing import Any, Final

import ml_dtypes
import numpy as np
import pytest

import xccl
from tests.conformance.suite import Suite
from tests.multirank.support import error_of
from xccl.comm.core import Waiting
from xccl.errors import UsageError, WaitTimeout
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


class OrderSuite(Suite):
    """What is seen when, and how long a wait lasts."""

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
