"""From what two ranks have measured of this machine to its profile: a rank is a core, which has one lane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from xccl.cli.host_measure import (
    COPIES,
    HIDDEN,
    NEAR_TIMES,
    NEAR_TOKENS,
    PINGS,
    RECORDING_STAGES,
    SMALL_ROW_BYTES,
    SMALL_ROWS,
)
from xccl.model.machine import HOST, Machine, Parameter

#: Words that a measured wait looks at.
_WAITED: Final = 2
#: A difference of two times may come out as next to nothing; it is taken to be at least this part of the longer one.
_LEAST: Final = 0.02
#: What is no limit here.
_UNLIMITED_GBPS: Final = 1e6


def host_machine(times_us: Mapping[str, float], cores: int) -> Machine:
    """The profile of this machine.

    Args:
        times_us: of each step of `HostMeter.round`, in microseconds.
        cores: a rank has one; there is no model of ranks that share cores.
    """
    return Machine(HOST, "this machine, a rank a core", _Profile(times_us, cores).parameters, {})


class _Profile:
    def __init__(self, times_us: Mapping[str, float], cores: int) -> None:
        self._times_us = times_us
        self.parameters: dict[str, Parameter] = {}
        self._add_what_there_is_not(cores)
        self._add_rows()
        self._add_work()
        self._add_python()

    def _add(self, name: str, value: float, source: str) -> None:
        self.parameters[name] = Parameter(name, value, source)

    def _measured(self, name: str, value: float, what: str) -> None:
        self._add(name, value, f"measured by xccl calibrate host, {what}")

    def _curve(self, name: str, points: Mapping[int, float], what: str) -> None:
        """A figure by working set; that of the largest one stands for all where it is needed as one figure."""
        source = f"measured by xccl calibrate host, {what}"
        curve = tuple(sorted((float(size), figure) for size, figure in points.items()))
        self.parameters[name] = Parameter(name, curve[-1][1], source, curve=curve)

    def _by_size(self, step: str) -> dict[int, float]:
        """Microseconds of a step by working set."""
        found = (name.rpartition(" ") for name in self._times_us if " " in name)
        return {int(size): self._times_us[f"{step} {size}"] for name, _, size in found if name == step}

    def _add_what_there_is_not(self, cores: int) -> None:
        for name, value in {"dies_per_chip": 1, "chips_per_node": max(cores, 2), "nodes": 1, "planes": 1}.items():
            self._add(f"topology.{name}", value, "a rank has a core of one machine")
        unlimited = "not a limit: rates are measured with both ranks at work"
        for name in ("link.bandwidth_gbps", "link.uplink_gbps", "chip.bandwidth_gbps", "hbm.bandwidth_gbps"):
            self._add(name, _UNLIMITED_GBPS, unlimited)
        for name in ("pair_efficiency", "node_efficiency", "fabric_efficiency"):
            self._add(f"link.{name}", 1.0, unlimited)
        self._add("chip.efficiency", 1.0, unlimited)
        self._add("hbm.efficiency", 1.0, unlimited)
        for name in ("chip", "node", "fabric"):
            self._add(f"latency.{name}_us", 0.0, "there is no fabric; part of rates and of sync.post_us")
        self._add("lane.count", 1, "a rank is one thread")
        self._add("lane.buffer_bytes", 1 << 40, "rows are copied whole")
        self._add("lane.header_us", 0.0, "rows are copied with what names them")
        self._add("sync.lane_barrier_us", 0.0, "a rank has one lane")

    def _add_rows(self) -> None:
        row_us = self._times_us["rows"] / SMALL_ROWS
        for name in ("lane.startup_us", "lane.local_startup_us"):
            self._measured(name, row_us, f"rows of {SMALL_ROW_BYTES} bytes")
        for name, step, share, what in (
            ("lane.rate_gbps", "put", 0.5, "put into the peer's segment"),
            ("lane.pull_rate_gbps", "get", 0.5, "get of what the peer has just written"),
            ("lane.fused_rate_gbps", "sum", 0.5, "sums of rows that the peer has just written"),
            ("lane.local_rate_gbps", "copy", 1.0, "copies of rows into the own segment"),
            ("lane.local_repeat_rate_gbps", "repeat", 1.0, f"rows to {COPIES} places each in the own segment"),
            ("lane.local_pull_rate_gbps", "local_get", 0.5, "copy of what this rank has just written"),
            ("lane.fused_local_rate_gbps", "local_sum", 0.5, "sums of rows that this rank has just written"),
        ):
            self._curve(name, {size: share * size / us / 1e3 for size, us in self._by_size(step).items()}, what)
        self._add("dma.startup_us", 0.0, "there is no DMA engine: a core copies")
        self._add("dma.outstanding", 1, "there is no DMA engine: a core copies")
        self._measured("dma.rate_gbps", self.parameters["lane.rate_gbps"].value, "as lane.rate_gbps: a core copies")

    def _add_work(self) -> None:
        quantised_us = _beyond(self._times_us["near_quantise"], self._times_us["near_copy"])
        gelements = 1e-3 * NEAR_TIMES * NEAR_TOKENS * HIDDEN / quantised_us
        what = "rows quantised in the nearest cache, beyond a copy of the result; 7 instructions an element"
        self._measured("vector.rate_gelements", 7 * gelements, what)
        self._add("vector.overlaps", 0, "a core copies or computes")
        self._add("vector.sums_apart", 0, "lane.fused_rate_gbps was measured with the sums")
        self._add("vector.scan_gelements", 1.0, "a scalar loop of about 1 ns an element")

    def _add_python(self) -> None:
        call_us, wait_us = self._by_size("call"), self._by_size("wait")
        record_us = {size: us / RECORDING_STAGES for size, us in self._by_size("record").items()}
        least = min(call_us)
        self._curve("kernel.launch_us", self._by_size("launch"), "checks of two arguments, an array for the result")
        what = "a record of what goes where, with its arrays, half of it in the stage that writes"
        self._curve("kernel.record_us", record_us, what)
        self._curve("kernel.stage_us", call_us, "a call with nothing to do, from Python")
        poll_us = _beyond(wait_us[least], call_us[least]) / _WAITED
        self._measured("sync.poll_us", poll_us, "a wait for what is there, beyond its call")
        trip_us = self._times_us["trip"] / PINGS / 2
        what = "half a round trip of a signal, beyond its call"
        self._measured("sync.post_us", _beyond(trip_us, call_us[least]), what)
        self._add("sync.signal_us", 0.0, "part of sync.post_us")


def _beyond(whole_us: float, part_us: float) -> float:
    """What is left of a time beyond a part of it."""
    return max(whole_us - part_us, _LEAST * whole_us)
