"""`xccl calibrate`: measure this machine as a profile, or fit a profile to published figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xccl._version import __version__
from xccl.cli.parsing import whole_number
from xccl.errors import UsageError

if TYPE_CHECKING:
    from xccl.comm.communicator import Communicator
    from xccl.model.machine import Machine

_HOST: Final = "host"
_TIMEOUT_S: Final = 600.0
#: With --check: what the model must predict.
_TOKENS: Final = (8, 32, 128)
_HIDDEN: Final = (2048, 7168)
_EXPERTS: Final = 32
_TOP_K: Final = 8


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.description = (
        "host: measure put, get, copies, sums, quantisation and signals on this machine with two ranks, and write "
        "them as a profile, on which `xccl project --machine host` and `xccl calibrate host --check` predict dispatch "
        "and combine. Any other profile: fit its free figures to the published ones, and print what they would be."
    )
    parser.add_argument("machine", metavar="MACHINE", help="host, cm384 or h800-rdma")
    parser.add_argument("-o", "--output", metavar="FILE", help="the profile (default for host: in the user's cache)")
    parser.add_argument("--rounds", type=whole_number(1), default=5, metavar="N", help="of measurements (default: 5)")
    parser.add_argument("--check", action="store_true", help="host: measure dispatch and combine, too, and compare")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    return _calibrate_host(args) if args.machine == _HOST else _fit(args)


# -- published figures ------------------------------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> int:
    from xccl.model.calibrate import IMPLEMENTATION_OF, compare, fit
    from xccl.model.machine import load_machine, profile_text
    from xccl.model.published import published_rows

    if args.check:
        raise UsageError("--check is for host; xccl validate compares a profile with published figures")
    if args.machine not in IMPLEMENTATION_OF:
        known = ", ".join([_HOST, *IMPLEMENTATION_OF])
        raise UsageError(f"there are no published figures of {args.machine!r}: one of {known}", value=args.machine)
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UsageError("fitting needs SciPy: pip install scipy") from None
    machine = load_machine(args.machine)
    values = fit(machine, published_rows(IMPLEMENTATION_OF[args.machine]))
    fitted = machine.with_values(values)
    print(f"# xccl {__version__} calibrate: {machine.title}, on {IMPLEMENTATION_OF[args.machine]}")
    for parameter in machine.free:
        print(f"  {parameter.name:<24} {parameter.value:>9.4g} -> {values[parameter.name]:>9.4g}")
    for item in compare(fitted):
        row = item.row
        print(f"  {row.operation:>9} {row.ep:>4} {row.latency_us:>8.1f} {item.model_us:>8.1f} {item.error:>+7.1%}")
    if args.output:
        _write(Path(args.output), profile_text(fitted))
    return 0


# -- this machine -----------------------------------------------------------------------------------------------------


def _calibrate_host(args: argparse.Namespace) -> int:
    from xccl.cli.host_measure import summarised
    from xccl.model.machine import host_path, profile_text
    from xccl.runtime import launch

    reports = launch(_measure, 2, args=(args.rounds, args.check), timeout_s=_TIMEOUT_S)
    machine = host_machine(summarised([found for rounds, _ in reports for found in rounds]))
    path = Path(args.output) if args.output else host_path()
    _write(path, profile_text(machine))
    print(f"# xccl {__version__} calibrate: this machine, 2 ranks, medians of {args.rounds} rounds")
    for parameter in machine.parameters.values():
        if parameter.source.startswith("measured"):
            curve = "".join(f" {value:.3g}@{int(n_bytes) >> 10}K" for n_bytes, value in parameter.curve)
            print(f"  {parameter.name:<28} {curve or f' {parameter.value:.4g}'}")
    print(f"# {path}")
    if args.check:
        _print_check(machine, [timed for _, timed in reports])
    sys.stdout.flush()
    return 0


def _measure(comm: Communicator, rounds: int, check: bool) -> tuple[list[dict[str, float]], dict[str, float]]:
    """What one rank runs: rounds of primitives, and between them dispatch and combine, if they are to be checked."""
    from statistics import median

    from xccl.cli.host_measure import HostMeter, pin
    from xccl.cli.host_moe import HostMoe

    pin(comm.rank)
    meter = HostMeter(comm)
    meter.round()  # pages are touched, kernels and caches warm
    shapes = [(hidden, quant, tokens) for hidden in _HIDDEN for quant in ("none", "int8") for tokens in _TOKENS]
    moe = [HostMoe(comm, *shape, experts=_EXPERTS, top_k=_TOP_K) for shape in shapes] if check else []
    found = []
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        found.append(meter.round())
        for one in moe:
            for name, time_us in one.round().items():
                times.setdefault(name, []).append(time_us)
    return found, {name: median(values) for name, values in times.items()}


def host_machine(measured: dict[str, float]) -> Machine:
    """The profile of this machine, from what was measured.

    Args:
        measured: what `HostMeter.round` has.
    """
    from xccl.model.machine import Machine, Parameter

    parameters: dict[str, Parameter] = {}

    def add(name: str, value: float, source: str, curve: tuple[tuple[float, float], ...] = ()) -> None:
        parameters[name] = Parameter(name, value, source, curve=curve)

    def rate(name: str, primitive: str, text: str) -> None:
        points = sorted((float(k.split()[1]), v) for k, v in measured.items() if k.split()[0] == primitive)
        add(name, points[0][1], f"measured: {text}", tuple(points))

    for name, value in {"dies_per_chip": 1, "chips_per_node": 1 << 10, "nodes": 1, "planes": 1}.items():
        add(f"topology.{name}", value, "ranks of one machine")
    unlimited = "not a limit: rates are measured with all cores busy"
    for name in ("link.bandwidth_gbps", "link.uplink_gbps", "chip.bandwidth_gbps", "hbm.bandwidth_gbps"):
        add(name, 1e6, unlimited)
    for name in ("link.pair_efficiency", "link.node_efficiency", "link.fabric_efficiency", "chip.efficiency"):
        add(name, 1.0, unlimited)
    add("hbm.efficiency", 1.0, unlimited)
    # A write is there after half an access latency, so the way of a signal is half of it.
    add("latency.chip_us", 0.0, "there are no chips in between")
    add("latency.node_us", 0.0, "part of sync.post_us")
    add("latency.fabric_us", 0.0, "there is no fabric in between")
    add("lane.count", 1, "a rank is one thread")
    add("lane.buffer_bytes", 1 << 40, "rows are copied whole")
    add("lane.startup_us", measured["row_us"], "measured: a row of a cache line")
    add("lane.local_startup_us", measured["row_us"], "measured: a row of a cache line")
    add("lane.header_us", 0.0, "rows are copied with what names them")
    rate("lane.rate_gbps", "put", "put of what the peer has just written over")
    rate("lane.pull_rate_gbps", "get", "get of what the peer has just written")
    rate("lane.fused_rate_gbps", "sum", "sums of rows that the peer has just written")
    rate("lane.local_rate_gbps", "local_put", "put into the own segment, over what the peer has read")
    rate("lane.local_repeat_rate_gbps", "write", "token after token, eight copies of each, into the own segment")
    rate("lane.local_pull_rate_gbps", "local_get", "copy of what this rank has just written")
    rate("lane.fused_local_rate_gbps", "local_sum", "sums of rows that this rank has just written")
    add("dma.startup_us", 0.0, "there is no DMA engine")
    add("dma.outstanding", 1, "there is no DMA engine")
    add("dma.rate_gbps", measured[min(k for k in measured if k.startswith("put "))], "there is no DMA engine")
    add("vector.rate_gelements", 7 * measured["quantise_gelements"], "measured: quantise, 7 instructions an element")
    add("vector.overlaps", 0, "a core copies or computes")
    add("vector.sums_apart", 0, "lane.fused_rate_gbps was measured with the sums")
    add("vector.scan_gelements", 1.0, "a scalar loop of about 1 ns an element")
    add("sync.lane_barrier_us", 0.0, "a rank has one lane")
    add("sync.post_us", measured["signal_us"], "measured: half a round trip of a signal, with its call")
    add("sync.signal_us", 0.0, "part of sync.post_us")
    add("sync.poll_us", 0.0, "part of sync.post_us")
    add("kernel.stage_us", measured["stage_us"], "measured: a call with nothing to do, after others used the caches")
    add("kernel.launch_us", measured["stage_us"], "measured: as kernel.stage_us")
    return Machine("host", "this machine, 2 ranks", parameters, {})


def _print_check(machine: Machine, timed: list[dict[str, float]]) -> None:
    """Measured dispatch and combine beside what the primitives predict; the slowest rank counts."""
    from xccl.cli.host_moe import describe
    from xccl.model.project import project

    print(
        f"# {'op':>9} {'quant':>5} {'tokens':>6} {'hidden':>6} {'measured':>9} {'predicted':>9} {'error':>7}  (p50, us)"
    )
    errors: list[float] = []
    for name in timed[0]:
        measured_us = max(times[name] for times in timed)
        operation, quant, tokens, hidden = name.split()
        described = describe(operation, int(hidden), quant, int(tokens), experts=_EXPERTS, top_k=_TOP_K)
        predicted_us = project(described, machine).time_us
        errors.append(predicted_us / measured_us - 1)
        figures = f"{measured_us:>9.1f} {predicted_us:>9.1f} {errors[-1]:>+7.1%}"
        print(f"  {operation:>9} {quant:>5} {tokens:>6} {hidden:>6} {figures}")
    sizes = [abs(error) for error in errors]
    print(f"# worst {max(sizes):.1%}, mean {sum(sizes) / len(sizes):.1%}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
