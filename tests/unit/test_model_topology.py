"""Machine profiles; places, tiers, and what bytes use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from xccl.errors import ModelError
from xccl.model.machine import Machine, load_machine, parse_machine, profile_names
from xccl.model.topology import Resource, Tier, Topology, place
from xccl.protocol.stage import ints

#: Nodes x dies of a node.
DIES = 48 * 16


@pytest.fixture(scope="module")
def machine() -> Machine:
    return load_machine("cm384")


def tier(topology: Topology, source: int, destination: int) -> Tier:
    return Tier(int(topology.tier(ints(source), ints(destination))[0]))


# -- machine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profile_names())
def test_profiles_are_sourced_and_bounded(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert machine.title
    for full, parameter in machine.parameters.items():
        assert parameter.name == full
        assert parameter.source.strip()
        assert np.isfinite(parameter.value)
        assert parameter.value > 0 or (parameter.source == "not used" and parameter.value == 0)
        assert (parameter.low is None) == (parameter.high is None)
        if parameter.low is not None and parameter.high is not None:
            assert parameter.is_free
            assert 0 <= parameter.low <= parameter.value <= parameter.high
    assert len(machine.free) <= 8
    assert [p.name for p in machine.free] == [n for n, p in machine.parameters.items() if p.is_free]


@pytest.mark.parametrize(
    "text",
    [
        "name = ",
        "title = 'no name'",
        "name = 'no title'",
        "name = 'x'\ntitle = 'x'\nloose = 1.0",
        "name = 'x'\ntitle = 'x'\n[link]\nbandwidth_gbps = 196.0",
        "name = 'x'\ntitle = 'x'\n[link.bandwidth_gbps]\nvalue = 196.0",
        "name = 'x'\ntitle = 'x'\n[link.bandwidth_gbps]\nsource = 'CM384'",
        "name = 'x'\ntitle = 'x'\n[link.bandwidth_gbps]\nvalue = 'fast'\nsource = 'CM384'",
        "name = 'x'\ntitle = 'x'\n[link.bandwidth_gbps]\nvalue = [196.0]\nsource = 'CM384'",
    ],
)
def test_what_is_no_profile_is_said_to_be_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="here is not a machine profile"):
        parse_machine(text, "here")
    path = tmp_path / "profile.toml"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"profile\.toml is not a machine profile"):
        load_machine(str(path))


def test_a_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    whole = "name = 'x'\ntitle = 'y'\n" + "".join(
        f"[{name}]\nvalue = 2\nsource = 's'\n" for name in load_machine("cm384").parameters
    )
    path.write_text(f"{whole}[a.b_us]\nvalue = 2\nsource = 's'\nlow = 1\nhigh = 3\n[calibration]\nn = 1")
    machine = load_machine(str(path))
    assert (machine.name, machine.title, dict(machine.calibration)) == ("x", "y", {"n": 1})
    assert machine["a.b_us"] == 2.0
    assert [(p.low, p.high) for p in machine.free] == [(1, 3)]
    for value in ("-1", "nan", "inf", "4"):
        path.write_text(f"{whole}[a.b_us]\nvalue = {value}\nsource = 's'\nlow = 1\nhigh = 3")
        with pytest.raises(ModelError, match=r"a\.b_us is"):
            load_machine(str(path))
    path.write_text(whole.replace("[lane.rate_gbps]", "[lane.speed]"))
    with pytest.raises(ModelError, match=r"it has no lane\.rate_gbps"):
        load_machine(str(path))


def test_an_unknown_profile_names_those_that_exist(tmp_path: Path) -> None:
    for name in ("cm385", str(tmp_path)):
        with pytest.raises(ModelError, match=r"use one of .*cm384"):
            load_machine(name)


def test_with_values(machine: Machine) -> None:
    faster = machine.with_values({"link.bandwidth_gbps": 392})
    assert faster["link.bandwidth_gbps"] == 392.0
    assert machine["link.bandwidth_gbps"] == 196.0
    assert faster.parameters["link.bandwidth_gbps"].source == machine.parameters["link.bandwidth_gbps"].source
    others = set(machine.parameters) - {"link.bandwidth_gbps"}
    assert all(faster.parameters[name] == machine.parameters[name] for name in others)


def test_with_values_names_the_neighbours_of_an_unknown_parameter(machine: Machine) -> None:
    with pytest.raises(ModelError, match=r"no parameter latency\.board_us") as raised:
        machine.with_values({"latency.board_us": 1.0})
    message = str(raised.value)
    assert all(name in message for name in ("latency.chip_us", "latency.node_us", "latency.fabric_us"))
    assert "link." not in message
    with pytest.raises(ModelError) as raised:
        machine.with_values({"speed": 1.0})
    assert all(name in str(raised.value) for name in machine.parameters)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_with_values_refuses_what_is_no_figure(machine: Machine, value: float) -> None:
    with pytest.raises(ModelError, match=r"link\.bandwidth_gbps must be"):
        machine.with_values({"link.bandwidth_gbps": value})


# -- places and tiers --------------------------------------------------------------------------------------------------


def test_tiers_when_packed(machine: Machine) -> None:
    topology = place(machine, 40)
    assert topology.ranks == 40
    assert topology.n_nodes == 3
    assert tier(topology, 5, 5) is Tier.SELF
    assert tier(topology, 0, 1) is Tier.CHIP
    assert tier(topology, 1, 2) is Tier.NODE
    assert tier(topology, 15, 0) is Tier.NODE
    assert tier(topology, 15, 16) is Tier.FABRIC
    assert tier(topology, 0, 39) is Tier.FABRIC
    source, destination = np.divmod(np.arange(40 * 40), 40)
    found = topology.tier(source, destination).reshape(40, 40)
    np.testing.assert_array_equal(found, found.T)
    # Of rank 3, in a full node: itself, 1 die of its chip, 14 of its node, 24 elsewhere.
    assert np.bincount(found[3], minlength=4).tolist() == [1, 1, 14, 24]


def test_tiers_by_node(machine: Machine) -> None:
    topology = place(machine, 100, "by-node")
    assert topology.n_nodes == 48
    assert topology.die[[0, 1, 47, 48, 96]].tolist() == [0, 16, 47 * 16, 1, 2]
    assert tier(topology, 0, 1) is Tier.FABRIC
    assert tier(topology, 0, 48) is Tier.CHIP
    assert tier(topology, 48, 96) is Tier.NODE
    assert tier(topology, 3, 3) is Tier.SELF


@pytest.mark.parametrize("placement", ["packed", "by-node"])
def test_all_dies_have_a_rank(machine: Machine, placement: str) -> None:
    topology = place(machine, DIES, placement)
    assert sorted(topology.die.tolist()) == list(range(DIES))
    assert np.bincount(topology.node).tolist() == [16] * 48


def test_latency_is_that_of_the_tier(machine: Machine) -> None:
    topology = place(machine, 40)
    found = topology.latency_us(ints([0, 0, 0, 0]), ints([0, 1, 2, 16]))
    assert found.tolist() == [0.0, *(machine[f"latency.{n}_us"] for n in ("chip", "node", "fabric"))]


@pytest.mark.parametrize("placement", ["packed", "by-node", range(DIES + 1)])
def test_too_many_ranks(machine: Machine, placement: str | Sequence[int]) -> None:
    with pytest.raises(ModelError, match=f"{DIES + 1}.*{DIES}"):
        place(machine, DIES + 1, placement)


@pytest.mark.parametrize("placement", ["packed", "by-node", []])
def test_no_ranks(machine: Machine, placement: str | Sequence[int]) -> None:
    with pytest.raises(ModelError):
        place(machine, 0, placement)


@pytest.mark.parametrize("placement", ["scattered", [0, 1], [0, 1, 1], [-1, 0, 1], [0, 1, DIES], [0, 1, 2, 3]])
def test_bad_placements(machine: Machine, placement: str | Sequence[int]) -> None:
    with pytest.raises(ModelError, match="placement"):
        place(machine, 3, placement)


# -- bytes on resources ------------------------------------------------------------------------------------------------


def used(topology: Topology, source: int, destination: int, *, is_mesh: bool) -> dict[str, float]:
    """Bytes by the name of the resource, of a transfer of 1000 bytes."""
    row, resource, amount = topology.usage(ints(source), ints(destination), ints(1000), is_mesh=is_mesh)
    assert not row.any()
    found: dict[str, float] = {}
    for index, n_bytes in zip(resource.tolist(), amount.tolist(), strict=True):
        name = topology.resource_name(index)
        found[name] = found.get(name, 0.0) + n_bytes
    return found


@pytest.mark.parametrize("is_mesh", [False, True])
def test_bytes_by_hand(machine: Machine, is_mesh: bool) -> None:
    topology = place(machine, 40)
    within = 1000 / machine["link.node_efficiency" if is_mesh else "link.pair_efficiency"]
    across = 1000 / machine["link.fabric_efficiency" if is_mesh else "link.pair_efficiency"]
    chip = 1000 / machine["chip.efficiency"]
    assert used(topology, 4, 4, is_mesh=is_mesh) == {"hbm of rank 4": 2000}
    assert used(topology, 4, 5, is_mesh=is_mesh) == pytest.approx(
        {"chip out of rank 4": chip, "chip in of rank 5": chip, "hbm of rank 4": 1000, "hbm of rank 5": 1000}
    )
    assert used(topology, 5, 6, is_mesh=is_mesh) == pytest.approx(
        {"port out of rank 5": within, "port in of rank 6": within, "hbm of rank 5": 1000, "hbm of rank 6": 1000}
    )
    assert used(topology, 39, 2, is_mesh=is_mesh) == pytest.approx(
        {
            "port out of rank 39": across,
            "port in of rank 2": across,
            "hbm of rank 39": 1000,
            "hbm of rank 2": 1000,
            "uplink out of node 2": across,
            "uplink in of node 0": across,
        }
    )


def test_rows_are_kept_apart(machine: Machine) -> None:
    topology = place(machine, 40)
    row, resource, amount = topology.usage(ints([0, 0, 0]), ints([1, 2, 16]), ints([10, 20, 0]), is_mesh=False)
    ports = resource == Resource.PORT_OUT * 40
    assert row[ports].tolist() == [1, 2]
    np.testing.assert_allclose(amount[ports], [20 / machine["link.pair_efficiency"], 0.0])


def test_capacities_are_in_the_order_of_the_names(machine: Machine) -> None:
    topology = place(machine, 40)
    capacity = topology.capacities()
    expected = {
        "port out": machine["link.bandwidth_gbps"],
        "port in": machine["link.bandwidth_gbps"],
        "chip out": machine["chip.bandwidth_gbps"],
        "chip in": machine["chip.bandwidth_gbps"],
        "hbm": machine["hbm.bandwidth_gbps"] * machine["hbm.efficiency"],
        "uplink out": machine["link.uplink_gbps"],
        "uplink in": machine["link.uplink_gbps"],
    }
    names = [topology.resource_name(index) for index in range(len(capacity))]
    assert len(set(names)) == len(names) == 5 * 40 + 2 * 3
    for name, bytes_per_us in zip(names, capacity.tolist(), strict=True):
        assert bytes_per_us == pytest.approx(1e3 * expected[name.split(" of ")[0]])
