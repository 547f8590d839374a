"""The fast path beside the simulation."""

from __future__ import annotations

import numpy as np
import pytest

from xccl.errors import ModelError
from xccl.model.analytic import estimate, is_regular
from xccl.model.machine import Machine, load_machine
from xccl.model.project import describe_moe, describe_send
from xccl.model.simulate import simulate
from xccl.model.topology import place
from xccl.protocol import a2e, moe_push, onesided
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.stage import Description

MACHINE = load_machine("cm384")


def descriptions() -> dict[str, Description]:
    """Regular cases of every operation, by name."""
    found = {}
    for ranks in (8, 16, 48, 128):
        for tokens in (4, 32, 128):
            for operation in ("dispatch", "combine"):
                for protocol in ("push", "pull"):
                    found[f"{operation}-{protocol}-{ranks}-{tokens}"] = describe_moe(
                        operation, ranks=ranks, tokens=tokens, protocol=protocol
                    )
    routing = RoutingCounts.uniform(40, experts=64, tokens=96, top_k=8, shared=8, destinations=72)
    for trampolines in (0, 40):
        found[f"a2e-{trampolines}"] = a2e.a2e(routing, hidden=7168, trampolines=trampolines)
        found[f"e2a-{trampolines}"] = a2e.e2a(routing, hidden=7168, trampolines=trampolines)
    for lanes in (2, 48):
        for n_bytes in (0, 1 << 20, 9 << 20):
            found[f"send-{n_bytes}-{lanes}"] = describe_send(MACHINE, n_bytes=n_bytes, lanes=lanes)
    found["barrier"] = onesided.barrier(64)
    found["put"] = onesided.put(32, np.arange(16), 31 - np.arange(16), 1 << 20)
    return found


DESCRIPTIONS = descriptions()


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_it_agrees_with_the_simulation(name: str) -> None:
    described = DESCRIPTIONS[name]
    topology = place(MACHINE, described.ranks)
    assert is_regular(described, topology)
    simulated, estimated = simulate(described, topology), estimate(described, topology)
    assert estimated.total_us == pytest.approx(simulated.total_us, rel=0.03)
    assert estimated.stages == simulated.stages
    np.testing.assert_allclose(estimated.end_us, simulated.end_us, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("setting", [{"link.bandwidth_gbps": 50}, {"lane.startup_us": 5}, {"latency.fabric_us": 20}])
def test_it_agrees_on_other_machines(setting: dict[str, float]) -> None:
    machine: Machine = MACHINE.with_values(setting)
    for described in (DESCRIPTIONS["dispatch-push-48-32"], DESCRIPTIONS["combine-pull-48-32"]):
        topology = place(machine, described.ranks)
        times = [run(described, topology).total_us for run in (simulate, estimate)]
        assert times[1] == pytest.approx(times[0], rel=0.03)


def test_a_hot_expert_is_not_regular() -> None:
    rng = np.random.default_rng(5)
    skewed = RoutingCounts.from_topk([np.minimum(rng.integers(0, 64, (t, 8)), 40) for t in rng.integers(1, 99, 32)], 64)
    described = moe_push.dispatch(skewed, hidden=7168)
    assert not is_regular(described, place(MACHINE, 32))


def test_the_placement_must_fit() -> None:
    with pytest.raises(ModelError, match="48 ranks, the placement 8"):
        estimate(DESCRIPTIONS["dispatch-push-48-32"], place(MACHINE, 8))
