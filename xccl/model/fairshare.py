"""Max-min fair rates of flows that share resources.

A flow f moves r[f] bytes per microsecond and uses a[i, f] * r[f] of each resource i. The rates are max-min fair: none
can be raised without lowering one that is not larger. They are found by progressive filling: all rates grow together; a
flow stops at its own cap, or when a resource that it uses is full (Bertsekas and Gallager, Data Networks, section
6.5.2).
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: A resource with less than this share of its capacity left is full.
_FULL = 1e-12


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def max_min_rates(
    first: Ints, resource: Ints, coefficient: Floats, capacity: Floats, cap: Floats, active: npt.NDArray[np.bool_]
) -> tuple[Floats, Ints]:
    """Fair rates, and what limits each flow.

    Args:
        first: [flows + 1] where each flow's entries start in the next two.
        resource: [entries] resource used.
        coefficient: [entries] how much of it a unit of rate uses.
        capacity: [resources] how much there is.
        cap: [flows] the most that each flow can do by itself; may be infinite.
        active: [flows] flows that take part; the others get 0.

    Returns:
        [flows] rates, and [flows] the resource that stopped each flow, -1 if it was its cap or it is not active.
    """
    flows = len(first) - 1
    rate = np.zeros(flows)
    limit = np.full(flows, -1, np.int64)
    growing = active.copy()
    left = capacity.copy()
    demand = np.zeros(len(capacity))
    users = np.zeros(len(capacity), np.int64)
    n_growing = 0
    for f in range(flows):
        if growing[f]:
            n_growing += 1
            for j in range(first[f], first[f + 1]):
                demand[resource[j]] += coefficient[j]
                users[resource[j]] += coefficient[j] > 0.0
    level = 0.0
    while n_growing > 0:
        step = np.inf
        for i in range(len(capacity)):
            if demand[i] > 0.0:
                step = min(step, left[i] / demand[i])
        for f in range(flows):
            if growing[f]:
                step = min(step, cap[f] - level)
        if step == np.inf:  # nothing limits what is left
            for f in range(flows):
                if growing[f]:
                    rate[f] = np.inf
            break
        level += step
        for i in range(len(capacity)):
            left[i] -= step * demand[i]
        for f in range(flows):
            if not growing[f]:
                continue
            stopped = level >= cap[f] * (1.0 - _FULL)  # never, if the cap is infinite
            if not stopped:
                for j in range(first[f], first[f + 1]):
                    i = resource[j]
                    if coefficient[j] > 0.0 and left[i] <= _FULL * capacity[i]:
                        stopped = True
                        limit[f] = i
                        break
            if stopped:
                growing[f] = False
                n_growing -= 1
                rate[f] = level
                for j in range(first[f], first[f + 1]):
                    demand[resource[j]] -= coefficient[j]
                    users[resource[j]] -= coefficient[j] > 0.0
        for i in range(len(capacity)):
            if users[i] == 0:  # what cancellation leaves of its demand must not stop anyone
                demand[i] = 0.0
    return rate, limit
