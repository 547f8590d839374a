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

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, UsageError
from ..kernels import collectives as kernels
from ..kernels.collective_calls import FILLED
from ..kernels.wait import OK
from ..layout.collectives import TB_CAME, TB_EXPECTED, TB_ROWS
from ..protocol.collectives import FLOWS, Kind
from . import traced_collectives as traced
from .buffers import address_of, readable, require_int, writable
from .core import require_timeout

if TYPE_CHECKING:
    from .core import Core
    from .exchange import Exchange
    from .known import DirectCalls
    from .plans import Plan

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
            result = _make_out(kind, x, self.size)
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
            given, made, plan = self._checked(kind, x, out, op, root, algorithm)
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
            x, plan, row_bytes = self._checked_rows(x, send_counts, recv_counts, out)
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
            raise self._wrong_rows(came, exchange.table[TB_EXPECTED], out)
        assert out is not None
        rows = exchange.rows_that_came()
        return out if len(out) == rows else out[:rows], came

    def _wrong_rows(self, came: Array, expected: Array, out: Array | None) -> UsageError:
        """Why the rows that came could not be taken."""
        wrong = np.flatnonzero((expected >= 0) & (came != expected))
        if wrong.size:
            peer = int(wrong[0])
            return UsageError(
                f"alltoallv: rank {peer} sends {came[peer]} rows to rank {self.rank}, which expects {expected[peer]}",
                peer=peer, value=int(came[peer]), bound=int(expected[peer]),
            )  # fmt: skip
        rows, room = int(came.sum()), 0 if out is None else len(out)
        return UsageError(f"alltoallv: out has room for {room} rows, {rows} come", value=room, bound=rows)

    def _checked_rows(self, x: Any, send_counts: Any, recv_counts: Any, out: Any) -> tuple[Array, Plan, int]:
        """Input, plan and size of a row of alltoallv, after all checks; the table holds the numbers of rows."""
        x = readable(x, "x")
        if x.ndim == 0:
            raise UsageError("alltoallv: x must have shape [rows, ...], got a single number", value=())
        row_bytes = x.dtype.itemsize * math.prod(x.shape[1:])
        if row_bytes == 0:
            raise UsageError(f"alltoallv: x has rows of no bytes, shape {x.shape}", value=x.shape)
        if out is not None:
            out = writable(out, "out")
            if out.dtype != x.dtype or out.ndim != x.ndim or out.shape[1:] != x.shape[1:]:
                raise UsageError(
                    f"alltoallv: out must have rows like x, {x.shape[1:]} of {x.dtype}, got {out.shape} of {out.dtype}",
                    value=(out.shape, str(out.dtype)), bound=x.shape[1:],
                )  # fmt: skip
            if _overlap(x, out):
                x = x.copy()
        plan = self._exchange.plan_rows(x.dtype, row_bytes)
        table = self._exchange.table
        counts = table[TB_ROWS]
        counts[:] = _counts(send_counts, "send_counts", self.size)
        table[TB_EXPECTED] = -1 if recv_counts is None else _counts(recv_counts, "recv_counts", self.size)
        if counts.min() < 0 or counts.sum() != len(x):
            raise UsageError(
                f"alltoallv: send_counts are {counts.tolist()} and sum to {counts.sum()}, x has {len(x)} rows",
                value=int(counts.sum()), bound=len(x),
            )  # fmt: skip
        return x, plan, row_bytes

    def _checked(
        self, kind: Kind, x: Any, out: Any, op: str | None, root: int | None, algorithm: str
    ) -> tuple[Array | None, Any, Plan]:
        """Input, output and plan of a call, after all checks."""
        flow, size = FLOWS[kind], self.size
        if flow.rooted:
            root = require_int(root, "root", 0, size - 1)
        gives, takes = not flow.from_root or root == self.rank, not flow.to_root or root == self.rank
        if kind == "broadcast":
            x = readable(x, "x") if gives else writable(x, "x")
            return x, x, self._exchange.plan(kind, x.nbytes, x.dtype, op, root, algorithm)
        shape: tuple[int, ...] = ()
        if gives:
            x = readable(x, "x")
            shape, n_bytes, dtype = x.shape, x.nbytes, x.dtype
            if flow.parts:
                if not shape or shape[0] != size:
                    raise UsageError(
                        f"{kind}: x must have shape [{size}, ...], a part for each rank, got {shape}",
                        value=shape, bound=size,
                    )  # fmt: skip
                shape = shape[1:]
                n_bytes //= size
        else:
            if x is not None:
                raise UsageError(f"{kind}: only the root (rank {root}) gives x; it must be None elsewhere", value=root)
            if out is None:
                raise UsageError(f"{kind}: all ranks but the root (rank {root}) must pass out", value=None)
            out = writable(out, "out")
            n_bytes, dtype = out.nbytes, out.dtype
        plan = self._exchange.plan(kind, n_bytes, dtype, op, root, algorithm)
        if not takes:
            return x, None, plan
        if out is None:
            return x, np.empty((*plan.leads, *shape), dtype), plan
        out = writable(out, "out")
        needed_bytes = n_bytes * size if flow.keeps else n_bytes
        if out.dtype != dtype or out.nbytes != needed_bytes:
            raise UsageError(
                f"{kind}: out must hold {needed_bytes // max(dtype.itemsize, 1)} elements of {dtype}, got shape "
                f"{out.shape} of {out.dtype}",
                value=(out.shape, str(out.dtype)), bound=needed_bytes,
            )  # fmt: skip
        if x is not None and _overlap(x, out):
            own = address_of(out) + (self.rank * n_bytes if flow.keeps and not flow.parts else 0)
            # The output would overwrite what is still to be read.
            if address_of(x) != own or kind not in ("allgather", "allreduce", "gather"):
                x = x.copy()
        return x, out, plan


def _make_out(kind: Kind, x: Array, size: int) -> Array:
    """A new array for the output of a call with that input."""
    flow = FLOWS[kind]
    part = x.shape[1:] if flow.parts else x.shape
    return np.empty((size, *part) if flow.keeps else part, x.dtype)


def _overlap(x: Array, out: Array) -> bool:
    """Do two contiguous arrays share bytes?"""
    start, other = address_of(x), address_of(out)
    return start < other + out.nbytes and other < start + x.nbytes


def _counts(values: Any, name: str, size: int) -> npt.NDArray[np.int64]:
    """[size] numbers of rows.

    Raises:
        UsageError: they are something else.
    """
    counts = np.asarray(values)
    if counts.shape != (size,) or counts.dtype.kind not in "iu":
        raise UsageError(
            f"alltoallv: {name} must be {size} integers, got shape {counts.shape} of {counts.dtype}",
            value=counts.shape, bound=size,
        )  # fmt: skip
    return counts
