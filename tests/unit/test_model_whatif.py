"""What-ifs: other figures, as far as a machine can have them."""

from __future__ import annotations

import pytest

from xccl.errors import ModelError
from xccl.model.machine import load_machine, profile_names
from xccl.model.project import describe_moe, project
from xccl.model.whatif import what_if


def test_figures_are_changed_and_nothing_else() -> None:
    machine = load_machine("cm384")
    changed = what_if(machine, ["link.bandwidth_gbps=100", "latency.fabric_us=0", "link.bandwidth_gbps=400"])
    assert (changed["link.bandwidth_gbps"], changed["latency.fabric_us"]) == (400, 0)
    assert changed["lane.rate_gbps"] == machine["lane.rate_gbps"]
    assert what_if(machine, []) == machine


@pytest.mark.parametrize("profile", profile_names())
def test_what_a_profile_says_is_possible(profile: str) -> None:
    """The rules go by names: no figure of a known machine may break one."""
    machine = load_machine(profile)
    again = what_if(machine, [f"{name}={parameter.value!r}" for name, parameter in machine.parameters.items()])
    assert {name: again[name] for name in machine.parameters} == {name: machine[name] for name in machine.parameters}


@pytest.mark.parametrize(
    "setting",
    [
        "link.bandwidth_gbps=0",
        "lane.rate_gbps=1e-300",
        "vector.rate_gelements=0",
        "dma.outstanding=0",
        "link.node_efficiency=0",
        "link.node_efficiency=1.01",
        "hbm.efficiency=0",
        "lane.count=0",
        "lane.count=2.5",
        "lane.buffer_bytes=0",
        "topology.nodes=1.5",
        "topology.dies_per_chip=0",
        "lane.startup_us=1e300",
        "latency.fabric_us=-1",
        "latency.fabric_us=nan",
        "latency.fabric_us=inf",
        "latency.fabric_us",
        "latency.fabric_us=",
        "latency.fabric_us=1=2",
        "=1",
        "link.colour=1",
    ],
)
def test_what_no_machine_has(setting: str) -> None:
    with pytest.raises(ModelError):
        what_if(load_machine("cm384"), [setting])


@pytest.mark.parametrize("name", [name for name in load_machine("cm384").parameters if name.endswith("efficiency")])
def test_worse_links_are_never_faster(name: str) -> None:
    """An efficiency of 0 would be an infinite cost that nobody has to pay."""
    machine = load_machine("cm384")
    described = describe_moe("dispatch", ranks=32, tokens=16)
    times = [project(described, what_if(machine, [f"{name}={value}"])).time_us for value in (1e-3, 0.1, 1.0)]
    assert times == sorted(times, reverse=True)
