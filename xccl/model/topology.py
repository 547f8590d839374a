"""Where ranks are, what lies between them, and what a byte between two ranks uses.

A rank is a die. Two dies of a chip share the chip's interconnect; dies of a node reach each other through the level-1
switches of its board, one of each sub-plane; dies of different nodes through level 1, level 2 and level 1 (CM384 §3.3).
The seven sub-planes carry equal shares of every transfer, so they are modelled as one link of their sum.

Resources. Each die has five: the UB port out and in, the chip interconnect out and in, and its HBM. Each node has two:
its uplinks out and in. A byte from die to die uses the port out of one and the port in of the other, and the uplinks of
both nodes if they differ, or the interconnect of the chip; and the HBM of both. A byte that costs more than its size on
a resource (protocol overhead, congestion of the full mesh) uses 1 / efficiency bytes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .machine import Machine

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Tier(IntEnum):
    """What lies between two ranks."""

    SELF = 0
    CHIP = 1
    NODE = 2
    FABRIC = 3


class Resource(IntEnum):
    """Kinds of resources; the first five belong to a die, the others to a node."""

    PORT_OUT = 0
    PORT_IN = 1
    CHIP_OUT = 2
    CHIP_IN = 3
    HBM = 4
    UPLINK_OUT = 5
    UPLINK_IN = 6


_DIE_RESOURCES = 5


@dataclass(frozen=True, eq=False)
class Topology:
    """A machine with ranks placed on its dies.

    Attributes:
        machine: the machine.
        die: [ranks] the die of each rank.
    """

    machine: Machine
    die: Ints

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.die)

    @property
    def chip(self) -> Ints:
        """[ranks] the chip of each rank."""
        return self.die // int(self.machine["topology.dies_per_chip"])

    @property
    def node(self) -> Ints:
        """[ranks] the node of each rank."""
        return self.chip // int(self.machine["topology.chips_per_node"])

    def tier(self, source: Ints, destination: Ints) -> Ints:
        """What lies between each pair: a column of `Tier`."""
        chip, node = self.chip, self.node
        tier = np.full(np.shape(source), int(Tier.FABRIC), np.int64)
        tier[node[source] == node[destination]] = Tier.NODE
        tier[chip[source] == chip[destination]] = Tier.CHIP
        tier[source == destination] = Tier.SELF
        return tier

    def latency_us(self, source: Ints, destination: Ints) -> Floats:
        """Access latency of each pair: a round trip, as for a read. A write is there after half of it."""
        m = self.machine
        return np.array([0.0, m["latency.chip_us"], m["latency.node_us"], m["latency.fabric_us"]])[
            self.tier(source, destination)
        ]

    # -- resources --------------------------------------------------------------------------------------------------

    @property
    def n_nodes(self) -> int:
        """Nodes that have ranks, counted up to the last."""
        return int(self.node.max()) + 1

    def capacities(self) -> Floats:
        """Bytes per microsecond of every resource: each kind of a die for all ranks, then each kind of a node."""
        m = self.machine
        die_gbps = [m["link.bandwidth_gbps"]] * 2 + [m["chip.bandwidth_gbps"]] * 2
        die_gbps.append(m["hbm.bandwidth_gbps"] * m["hbm.efficiency"])
        per_die = np.repeat(np.array(die_gbps), self.ranks)
        # What-ifs on the die's links keep the fabric free of oversubscription, as it is built.
        uplink = m["link.uplink_gbps"]
        return np.concatenate([per_die, np.full(2 * self.n_nodes, uplink)]) * 1e3

    def resource_name(self, index: int) -> str:
        """A resource in words."""
        die_resources = _DIE_RESOURCES * self.ranks
        if index < die_resources:
            kind, rank = divmod(index, self.ranks)
            return f"{Resource(kind).name.lower().replace('_', ' ')} of rank {rank}"
        kind, node = divmod(index - die_resources, self.n_nodes)
        return f"{Resource(_DIE_RESOURCES + kind).name.lower().replace('_', ' ')} of node {node}"

    def usage(self, source: Ints, destination: Ints, n_bytes: Ints, *, is_mesh: bool) -> tuple[Ints, Ints, Floats]:
        """What each transfer uses: columns (row of the transfer, resource, bytes of the resource).

        Args:
            source: [n] ranks.
            destination: [n] ranks.
            n_bytes: [n] bytes.
            is_mesh: many pairs at once (full-mesh efficiency), or a few (that of a pair).
        """
        m, ranks = self.machine, self.ranks
        tier = self.tier(source, destination)
        rows = np.arange(len(source))
        size = n_bytes.astype(np.float64)
        pair = m["link.pair_efficiency"]
        efficiency = np.array([1.0, m["chip.efficiency"], pair, pair])
        if is_mesh:
            efficiency[Tier.NODE :] = m["link.node_efficiency"], m["link.fabric_efficiency"]
        cost = size / efficiency[tier]
        columns: list[tuple[Ints, Ints, Floats]] = []

        def add(where: npt.NDArray[np.bool_], resource: Ints, amount: Floats) -> None:
            columns.append((rows[where], resource[where], amount[where]))

        over_port, over_chip, over_fabric = tier >= Tier.NODE, tier == Tier.CHIP, tier == Tier.FABRIC
        add(over_port, Resource.PORT_OUT * ranks + source, cost)
        add(over_port, Resource.PORT_IN * ranks + destination, cost)
        add(over_chip, Resource.CHIP_OUT * ranks + source, cost)
        add(over_chip, Resource.CHIP_IN * ranks + destination, cost)
        everywhere = np.ones(len(rows), bool)
        add(everywhere, Resource.HBM * ranks + source, size)
        add(everywhere, Resource.HBM * ranks + destination, size)
        first_uplink = _DIE_RESOURCES * ranks
        add(over_fabric, first_uplink + self.node[source], cost)
        add(over_fabric, first_uplink + self.n_nodes + self.node[destination], cost)
        row, resource, amount = (np.concatenate(column) for column in zip(*columns, strict=True))
        return row, resource, amount


def place(machine: Machine, ranks: int, placement: str | Sequence[int] = "packed") -> Topology:
    """Put ranks on dies.

    Args:
        machine: the machine.
        ranks: number of ranks.
        placement: "packed" (die by die), "by-node" (round robin over all nodes), or the die of each rank.

    Raises:
        ModelError: there are not enough dies, or the placement is impossible.
    """
    dies_per_node = int(machine["topology.dies_per_chip"] * machine["topology.chips_per_node"])
    nodes = int(machine["topology.nodes"])
    dies = dies_per_node * nodes
    if not 1 <= ranks <= dies:
        raise ModelError(
            f"{ranks} ranks need as many dies, at least one, {machine.name} has {dies}", machine=machine.name
        )
    if isinstance(placement, str) and placement == "packed":
        die = np.arange(ranks, dtype=np.int64)
    elif isinstance(placement, str) and placement == "by-node":
        node, within = np.arange(ranks) % nodes, np.arange(ranks) // nodes
        die = (node * dies_per_node + within).astype(np.int64)
    elif isinstance(placement, str):
        raise ModelError(
            f"placement must be packed, by-node or a list of dies, got {placement!r}", machine=machine.name
        )
    else:
        die = np.asarray(placement, np.int64)
        if die.shape != (ranks,) or len(set(die.tolist())) != ranks or die.min() < 0 or die.max() >= dies:
            raise ModelError(f"a placement needs {ranks} different dies from 0 to {dies - 1}", machine=machine.name)
    return Topology(machine, die)
