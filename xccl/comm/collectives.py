"""Collectives of a communicator. What goes where: `xccl.protocol.collectives`; how: `xccl.kernels.collectives`.

Rules
- A call is a sequence of steps, numbered through all collectives of a communicator. In step s a rank stages data in
  half s mod 2 of the staging area in its own segment, and publishes the step: it writes a record to every other rank,
  or, with many ranks, a record of its own and its arrival at rank 0. When all others have published step s, it reads
  what they have staged, and is done with the step.
- A record says which call its rank has made. If the calls of the first step differ, all ranks see it there, none goes
  on, and all have made one step.
- Results are reduced in the order of ranks, whoever does it, and in the same arithmetic, so every algorithm gives the
  same bits.

Theory of operation: nothing is overwritten while it is read. What a rank writes for step s + 2 goes where step s was:
its half of the staging area, its record in each other rank's block. It writes there after it has seen that all others
have published step s + 1, and each of them did so after it was done with step s. The results of a window in the
algorithm of two steps are written for the step that is to come, s + 1, while step s is read; they go where those of
step s - 1 were, and all others have published step s, so they are done with s - 1. A rank that refuses publishes a step
without waiting, and waits for the others' before its next one; so no rank is ever two steps ahead of another.

A large input is not staged: the record says where it lies, and the others read it there. That may be the own segment
(a symmetric array), or private memory, if all other ranks may read it, which they have tried when they joined: ranks
that are threads load it; those that are processes have the operating system's kernel copy it, so they can move, but not
reduce it. The caller may change it when the call returns, so a last step, which moves nothing, says that all have read
it; every rank sees in the first step whether anybody's input is read so. In the algorithm of two steps the last step
has that meaning anyway: the results of the last window are published after all operands were read. An input over which
its own rank writes results before that step, as in a mesh allreduce in place, is staged.

A rank that gives a call up does not publish the last step, so no rank returns what it read of an input that has changed
since: it waits in vain, and gets an error. If the memory is gone, processes fail to read it; for threads it is kept.

Every rank waits for every other in every step, also in a broadcast or a scatter: that is what makes a mistake in one
rank's arguments an error everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError
from ..kernels import collectives as kernels
from ..kernels.collective_calls import FILLED
from ..kernels.wait import OK
from ..layout.collectives import TB_CAME, TB_EXPECTED
from ..protocol.collective_cuts import Kind
from . import traced_collectives as traced
from .collective_input import checked, checked_rows, make_out, wrong_rows
from .core import require_timeout

if TYPE_CHECKING:
    from .core import Core
    from .exchange import Exchange
    from .known import DirectCalls

Array = npt.NDArray[Any]


class Collectives:
    """The collectives, as methods of `Communicator`.

    All ranks of the communicator call the same one, with arguments of the same size, dtype, root, operator and
    algorithm; if they don't, all get a UsageError, and nothing is moved. A rank that is given an impossible argument
    gets its UsageError at once, and the others one when they call.

    Arguments that all have in common: `out` is where the result goes, a writable C-contiguous array of its dtype and
    size (a new one if None); `algorithm` is "auto", "mesh" or, for allreduce and broadcast, "two-step"; `timeout_s` is
    a deadline in seconds (the communicator's if None). After a WaitTimeout no collective of this communicator is
    possible.

    All raise UsageError, CapacityError (no room for the staging area), WaitTimeout, PeerDied and SessionAborted.
    """

    core: Core
    rank: int
    size: int
    _exchange: Exchange
    _direct: DirectCalls

    def allgather(
        self, x: Array, *, out: Array | None = None, algorithm: str = "auto", timeout_s: float | None = None
    ) -> Array:
        """The arrays of all ranks, at all ranks.

        Args:
            x: an array of the same shape and dtype at all ranks.
            out: see `Collectives`; `x` may be `out[rank]`.
            algorithm: see `Collectives`.
            timeout_s: see `Collectives`.

        Returns:
            [size, *x.shape]: the arrays in the order of ranks.
        """
        status = self._direct.allgather(x, out, None, None, algorithm, timeout_s)
        if status == OK and out is not None:
            return out
        return self._collect(status, "allgather", x, out, None, None, algorithm, timeout_s)

    def allreduce(
        self, x: Array, op: str = "sum", *, out: Array | None = None, algorithm: str = "auto",
        timeout_s: float | None = None,
    ) -> Array:  # fmt: skip
        """The arrays of all ranks, reduced element by element, at all ranks.

        Args:
            x: bfloat16, float16, float32, float64, or integers of 8 to 64 bits; the same shape and dtype at all ranks.
            op: "sum", "prod", "max" or "min".
            out: see `Collectives`; it may be `x`.
            algorithm: see `Collectives`; the bits of the result do not depend on it.
            timeout_s: see `Collectives`.

        Returns:
            [*x.shape]: ((x0 op x1) op x2) ..., in the order of ranks. Bfloat16 and float16 are reduced in float32 and
            rounded once; integers wrap around. If an operand of max or min is NaN, so is the result; a NaN is the
            positive quiet NaN.
        """
        status = self._direct.allreduce(x, out, op, None, algorithm, timeout_s)
        if status == OK and out is not None:
            return out
        return self._collect(status, "allreduce", x, out, op, None, algorithm, timeout_s)

    def reduce_scatter(
        self, x: Array, op: str = "sum", *, out: Array | None = None, algorithm: str = "auto",
        timeout_s: float | None = None,
    ) -> Array:  # fmt: skip
        """Part r of the arrays of all ranks, reduced element by element, at rank r.

        Args:
            x: [size, ...], part by part; dtypes as for `allreduce`.
            op: "sum", "prod", "max" or "min".
            out: see `Collectives`.
            algorithm: see `Collectives`.
            timeout_s: see `Collectives`.

        Returns:
            [*x.shape[1:]], reduced as by `allreduce`.
        """
        status = self._direct.reduce_scatter(x, out, op, None, algorithm, timeout_s)
        if status == OK and out is not None:
            return out
        return self._collect(status, "reduce_scatter", x, out, op, None, algorithm, timeout_s)

    def alltoall(
        self, x: Array, *, out: Array | None = None, algorithm: str = "auto", timeout_s: float | None = None
    ) -> Array:
        """Part d of rank s goes to rank d, as its part s.

        Args:
            x: [size, ...], part by part, the same shape and dtype at all ranks.
            out: see `Collectives`; not `x`.
            algorithm: see `Collectives`.
            timeout_s: see `Collectives`.

        Returns:
            The shape of x: the parts for this rank in the order of ranks.
        """
        status = self._direct.alltoall(x, out, None, None, algorithm, timeout_s)
        if status == OK and out is not None:
            return out
        return self._collect(status, "alltoall", x, out, None, None, algorithm, timeout_s)

    def broadcast(self, x: Array, root: int, *, algorithm: str = "auto", timeout_s: float | None = None) -> Array:
        """The array of the root, at all ranks.

        Args:
            x: at the root what is given; elsewhere a writable, C-contiguous array of the same size and dtype, which is
                overwritten.
            root: the rank that gives.
            algorithm: see `Collectives`.
            timeout_s: see `Collectives`.

        Returns:
            x.
        """
        status = self._direct.broadcast(x, x, None, root, algorithm, timeout_s)
        if status == OK:
            return x
        return self._collect(status, "broadcast", x, x, None, root, algorithm, timeout_s)

    def gather(
        self, x: Array, root: int, *, out: Array | None = None, algorithm: str = "auto",
        timeout_s: float | None = None,
    ) -> Array | None:  # fmt: skip
        """The arrays of all ranks, at the root.

        Args:
            x: an array of the same shape and dtype at all ranks.
            root: the rank that takes.
            out: see `Collectives`; of the root only.
            algorithm: see `Collectives`.
            timeout_s: see `Collectives`.

        Returns:
            At the root [size, *x.shape], the arrays in the order of ranks; None elsewhere.
        """
        status = self._direct.gather(x, out, None, root, algorithm, timeout_s)
        if status == OK:
            return out
        return self._collect(status, "gather", x, out, None, root, algorithm, timeout_s)

    def scatter(
        self, x: Array | None, root: int, *, out: Array | None = None, algorithm: str = "auto",
        timeout_s: float | None = None,
    ) -> Array:  # fmt: skip
        """Part r of the root's array, at rank r.

        Args:
            x: at the root [size, ...], part by part; None elsewhere.
            root: the rank that gives.
            out: see `Collectives`; all ranks but the root must pass one.
            algorithm: see `Collectives`.
            timeout_s: see `Collectives`.

        Returns:
            At the root the shape of x[0]; elsewhere `out`.
        """
        status = self._direct.scatter(x, out, None, root, algorithm, timeout_s)
        if status == OK and out is not None:
            return out
        return self._collect(status, "scatter", x, out, None, root, algorithm, timeout_s)

    def _collect(
        self, status: int, kind: Kind, x: Any, out: Any, op: str | None, root: int | None, algorithm: str,
        timeout_s: float | None,
    ) -> Array:  # fmt: skip
        """Go on after a direct call that did not return OK: it was begun, or it lacks an output, or must be checked."""
        exchange = self._exchange
        result: Array = out
        if status == kernels.UNFIT and out is None and type(x) is np.ndarray:
            result = make_out(kind, x, self.size)
            status = getattr(exchange.known.direct, kind)(x, result, op, root, algorithm, timeout_s)
        if status == kernels.UNFIT:
            return self._collect_carefully(kind, x, out, op, root, algorithm, timeout_s)
        if status != OK:
            exchange.finish(exchange.under_way(), status, x, result)
        return result

    def _collect_carefully(
        self, kind: Kind, x: Any, out: Any, op: str | None, root: int | None, algorithm: str, timeout_s: float | None
    ) -> Array:
        """Any of them: check, run, and hand out the result."""
        exchange = self._exchange
        self.core.require_open()
        try:
            given, made, plan = checked(exchange, self.rank, self.size, kind, x, out, op, root, algorithm)
            if timeout_s is not None:
                timeout_s = require_timeout(timeout_s)
        except (UsageError, CapacityError) as error:
            exchange.refuse(error)
        exchange.prepare(plan)
        first = given if given is not None else made
        exchange.known.add(plan, first.dtype, first.nbytes, op, None if root is None else int(root), algorithm)
        with traced.metered(exchange, plan):
            exchange.run(plan, given, made, timeout_s)
        result: Array = made
        return result

    def alltoallv(
        self, x: Array, send_counts: npt.ArrayLike, *, out: Array | None = None,
        recv_counts: npt.ArrayLike | None = None, timeout_s: float | None = None,
    ) -> tuple[Array, npt.NDArray[np.int64]]:  # fmt: skip
        """Any number of rows from each rank to each other.

        Args:
            x: [rows, ...], the rows for rank 0 first, then those for rank 1, and so on; rows of the same shape and
                dtype at all ranks, at least a byte each.
            send_counts: [size] integers, the rows for each rank; they sum to the rows of x.
            out: see `Collectives`; with room for at least the rows that come; not `x`.
            recv_counts: [size] integers, how many rows must come from each rank; not looked at if None.
            timeout_s: see `Collectives`.

        Returns:
            The rows that came, in the order of ranks, and int64 [size], how many came from each. With `out`, the rows
            are the first ones of it.

        Raises:
            UsageError: also, at this rank alone, if other numbers of rows come than `recv_counts` says, or if `out` has
                no room for them. Nothing is written then; what this rank gave has reached the others.
        """
        status = self._direct.alltoallv(x, send_counts, recv_counts, out, timeout_s)
        if status == FILLED:
            return out, recv_counts.copy()  # type: ignore[return-value,union-attr]  # both are plain arrays
        if status == kernels.UNFIT:
            return self._alltoallv_carefully(x, send_counts, recv_counts, out, timeout_s)
        return self._rows_that_came(status, x, out, None)

    def _alltoallv_carefully(
        self, x: Any, send_counts: Any, recv_counts: Any, out: Any, timeout_s: float | None
    ) -> tuple[Array, npt.NDArray[np.int64]]:
        """Check, run, and hand out the result."""
        exchange = self._exchange
        self.core.require_open()
        try:
            x, plan, row_bytes = checked_rows(exchange, self.size, x, send_counts, recv_counts, out)
            if timeout_s is not None:
                timeout_s = require_timeout(timeout_s)
        except (UsageError, CapacityError) as error:
            exchange.refuse(error)
        exchange.prepare(plan)
        exchange.known.add(plan, x.dtype, row_bytes)
        with traced.metered(exchange, plan):
            status = exchange.run(plan, x, out, timeout_s)
            return self._rows_that_came(status, x, out, timeout_s)

    def _rows_that_came(
        self, status: int, x: Array, out: Array | None, timeout_s: float | None
    ) -> tuple[Array, npt.NDArray[np.int64]]:
        """The end of an alltoallv whose kernel has returned `status`."""
        exchange = self._exchange
        if status < OK or status in (kernels.BUSY, kernels.UNREACHABLE):
            status = exchange.finish(exchange.under_way(), status, x, out, timeout_s)
        if status == kernels.SIZES_KNOWN:
            out = np.empty((exchange.rows_that_came(), *x.shape[1:]), x.dtype)
            status = exchange.run(exchange.under_way(), x, out, timeout_s)
        came = exchange.table[TB_CAME].copy()
        if status == kernels.WRONG_ROWS:
            raise wrong_rows(self.rank, came, exchange.table[TB_EXPECTED], out)
        assert out is not None
        rows = exchange.rows_that_came()
        return out if len(out) == rows else out[:rows], came
