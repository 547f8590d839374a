"""Simulations: what must hold whatever the figures of the machine are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xccl.errors import ModelError
from xccl.model.machine import Machine, load_machine
from xccl.model.simulate import Timeline, simulate
from xccl.model.topology import Tier, place
from xccl.protocol import moe, moe_direct, moe_push, onesided, p2p
from xccl.protocol.counts import RoutingCounts
from xccl.protocol.stage import Description, Signals, Stage, Waits, ints

HIDDEN = 7168
NODE = 16
SIZES = (8, 16, 32, 64)
MESSAGE = 9216 << 10
#: The end of a flow is known to a nanosecond; an operation has a handful of them one after the other.
ROUNDING_US = 0.01


def descriptions() -> dict[str, Description]:
    """By name: every MoE operation at every size, with uniform routing, and the others once."""
    found: dict[str, Description] = {}
    for ranks in SIZES:
        routing = RoutingCounts.uniform(ranks, experts=64, tokens=64, top_k=8)
        assert len(np.unique(routing.counts)) == 1
        found[f"push-dispatch-{ranks}"] = moe_push.dispatch(routing, hidden=HIDDEN)
        found[f"push-combine-{ranks}"] = moe_push.combine(routing, hidden=HIDDEN)
        found[f"direct-dispatch-{ranks}"] = moe_direct.dispatch(routing, hidden=HIDDEN)
        found[f"direct-combine-{ranks}"] = moe_direct.combine(routing, hidden=HIDDEN)
        found[f"pull-dispatch-{ranks}"] = moe.dispatch(routing, hidden=HIDDEN)
        found[f"pull-combine-{ranks}"] = moe.combine(routing, hidden=HIDDEN)
    rng = np.random.default_rng(5)
    skewed = RoutingCounts.from_topk([np.minimum(rng.integers(0, 64, (t, 8)), 40) for t in rng.integers(1, 99, 32)], 64)
    found["push-dispatch-skewed"] = moe_push.dispatch(skewed, hidden=HIDDEN)
    found["push-combine-skewed"] = moe_push.combine(skewed, hidden=HIDDEN)
    found["pull-dispatch-skewed"] = moe.dispatch(skewed, hidden=HIDDEN, quant="none")
    found["pull-combine-skewed"] = moe.combine(skewed, hidden=HIDDEN)
    found["put"] = onesided.put(32, [0, 1, 2, 5], [1, 17, 3, 17], 1 << 20)
    found["get"] = onesided.get(32, [1, 17, 3, 17], [0, 1, 2, 5], 1 << 20)
    found["put_signal-dma"] = onesided.put_signal(32, [0, 1], [31, 2], 1 << 20, engine="dma")
    found["barrier"] = onesided.barrier(32)
    found["send_recv"] = p2p.send_recv(32, np.arange(16), 31 - np.arange(16), 1 << 20, lanes=8)
    found["send_recv-dma"] = p2p.send_recv(32, 0, 31, MESSAGE, lanes=2, engine="dma")
    return found


DESCRIPTIONS = descriptions()
UNIFORM = [name for name in DESCRIPTIONS if name.rsplit("-")[-1].isdecimal()]
every_operation = pytest.mark.parametrize("name", DESCRIPTIONS)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return load_machine("cm384")


@pytest.fixture(scope="module")
def timelines(machine: Machine) -> dict[str, Timeline]:
    """Of every description, packed, all ranks starting at once."""
    return {name: run(name, machine) for name in DESCRIPTIONS}


def run(name: str, machine: Machine) -> Timeline:
    return simulate(DESCRIPTIONS[name], place(machine, DESCRIPTIONS[name].ranks))


@every_operation
def test_same_bits_on_every_run(name: str, machine: Machine, timelines: dict[str, Timeline]) -> None:
    first, second = timelines[name], run(name, machine)
    assert first.stages == second.stages == tuple(stage.name for stage in DESCRIPTIONS[name].stages)
    assert first.limits == second.limits
    for a, b in ((first.begin_us, second.begin_us), (first.moving_us, second.moving_us), (first.end_us, second.end_us)):
        assert a.tobytes() == b.tobytes()


@every_operation
def test_stages_follow_each_other(name: str, timelines: dict[str, Timeline]) -> None:
    found = timelines[name]
    assert np.isfinite(found.end_us).all()
    assert (found.begin_us <= found.moving_us).all()
    assert (found.moving_us <= found.end_us + ROUNDING_US).all()
    np.testing.assert_array_equal(found.begin_us[1:], found.end_us[:-1])
    assert found.total_us == found.end_us.max() > 0
    assert sum(found.stage_us().values()) == pytest.approx(found.total_us)


@pytest.mark.parametrize("name", [name for name in DESCRIPTIONS if name.startswith("push-dispatch")])
def test_a_push_dispatch_is_not_faster_than_the_port(
    name: str, machine: Machine, timelines: dict[str, Timeline]
) -> None:
    (sent,) = DESCRIPTIONS[name].stage("send").transfers
    topology = place(machine, DESCRIPTIONS[name].ranks)
    n_bytes = sent.n_bytes * (topology.tier(sent.source, sent.destination) >= Tier.NODE)
    busiest = max(np.bincount(sent.source, n_bytes).max(), np.bincount(sent.destination, n_bytes).max())
    port_us = busiest / (machine["link.bandwidth_gbps"] * 1e3)
    assert port_us > 0
    assert timelines[name].stage_us()["send"] >= port_us
    assert timelines[name].total_us > port_us


@every_operation
@pytest.mark.parametrize(
    ("parameter", "factor"),
    [
        ("link.bandwidth_gbps", 2.0),
        ("latency.chip_us", 0.5),
        ("latency.node_us", 0.5),
        ("latency.fabric_us", 0.5),
    ],
)
def test_a_better_machine_is_not_slower(
    name: str, parameter: str, factor: float, machine: Machine, timelines: dict[str, Timeline]
) -> None:
    better = machine.with_values({parameter: factor * machine[parameter]})
    assert run(name, better).total_us <= 1.01 * timelines[name].total_us


@pytest.mark.parametrize("name", UNIFORM)
def test_places_within_a_node_do_not_matter_when_routing_is_uniform(
    name: str, machine: Machine, timelines: dict[str, Timeline]
) -> None:
    described, rng = DESCRIPTIONS[name], np.random.default_rng(7)
    ranks = described.ranks
    dies = [start + rng.permutation(min(NODE, ranks - start)) for start in range(0, ranks, NODE)]
    permuted = simulate(described, place(machine, ranks, np.concatenate(dies).tolist()))
    assert permuted.total_us == pytest.approx(timelines[name].total_us, rel=1e-9)
    assert permuted.stage_us() == pytest.approx(timelines[name].stage_us(), rel=1e-9, abs=1e-9)
    assert permuted.limits == timelines[name].limits


@every_operation
def test_skew_delays_the_end_by_the_skew_at_most(name: str, machine: Machine, timelines: dict[str, Timeline]) -> None:
    described, rng = DESCRIPTIONS[name], np.random.default_rng(11)
    one_late = np.zeros(described.ranks)
    one_late[3] = 40.0
    for skew in (rng.uniform(0.0, 20.0, described.ranks), one_late, np.full(described.ranks, 5.0)):
        late = simulate(described, place(machine, described.ranks), skew)
        np.testing.assert_array_equal(late.begin_us[0], skew)
        assert late.total_us <= timelines[name].total_us + skew.max() + ROUNDING_US
        assert (late.end_us[-1] >= skew).all()
    assert late.total_us == pytest.approx(timelines[name].total_us + 5.0, abs=ROUNDING_US)


def test_waiting_for_what_nobody_sends_is_an_error(machine: Machine) -> None:
    """Rank 0 flags rank 1; rank 2 waits for a flag, too."""
    flag = Signals(ints(0), ints(1), ints(1), 8, "flag")
    stages = (
        Stage("flag", signals=(flag,)),
        Stage("await-flag", waits=(Waits(ints([1, 2]), ints([0, 0]), ints([1, 1]), "flag"),)),
    )
    described = Description("odd", "test", 3, stages, 1, np.zeros(3, np.int64))
    with pytest.raises(ModelError, match="rank 2 waits in stage await-flag for signals that nobody sends"):
        simulate(described, place(machine, 3))


def test_waiting_for_an_earlier_operation_is_none(machine: Machine) -> None:
    stages = (Stage("await", waits=(Waits(ints(0), ints(1), ints(1), "pulled"),)),)
    described = Description("odd", "test", 2, stages, 1, np.zeros(2, np.int64))
    assert simulate(described, place(machine, 2)).total_us < 10


def test_another_number_of_ranks_is_an_error(machine: Machine) -> None:
    with pytest.raises(ModelError, match=r"8 ranks.*9"):
        simulate(DESCRIPTIONS["push-dispatch-8"], place(machine, 9))


@pytest.mark.parametrize("peer", [1, 5, 20], ids=["chip", "node", "fabric"])
def test_send_receive_stops_gaining_at_24_lanes(machine: Machine, peer: int) -> None:
    def total_us(lanes: int) -> float:
        return simulate(p2p.send_recv(32, 0, peer, MESSAGE, lanes=lanes), place(machine, 32)).total_us

    few, enough, most = total_us(2), total_us(24), total_us(48)
    assert most < few / 2
    assert most <= enough * 1.01
    assert enough < most * 1.05
    assert enough < total_us(32) * 1.05


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@pytest.mark.parametrize("protocol", [moe, moe_push, moe_direct], ids=["pull", "push", "direct"])
def test_results_do_not_depend_on_the_order_of_events(operation: str, protocol: Any, machine: Machine) -> None:
    """Events of one moment are handled by rank: other numbers for the same dies, and so another order, change nothing."""
    ranks, rng = 32, np.random.default_rng(3)
    counts = rng.integers(0, 9, (ranks, ranks))
    counts[:, 5] *= 4
    renumbered = rng.permutation(ranks)
    other = np.zeros_like(counts)
    other[np.ix_(renumbered, renumbered)] = counts
    make = getattr(protocol, operation)
    first, second = (make(RoutingCounts.from_counts(c, 64), hidden=HIDDEN) for c in (counts, other))
    die = np.empty(ranks, np.int64)
    die[renumbered] = np.arange(ranks)
    a, b = simulate(first, place(machine, ranks)), simulate(second, place(machine, ranks, die.tolist()))
    np.testing.assert_allclose(b.end_us[:, renumbered], a.end_us, rtol=1e-6, atol=ROUNDING_US)
