"""What tests of descriptions share: checks that hold for every one of them, and small sums over their columns."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from xccl.protocol.stage import Description, Signals, Transfers, Waits
from xccl.trace.entry import Entry

Ints = npt.NDArray[np.int64]

#: Awaited by the operation that sends it next time: what an operation waits for is that of the one before it.
OF_THE_ONE_BEFORE = ("pulled", "forward-pulled")


def check(description: Description) -> None:
    """Columns fit, ranks exist, what is awaited is what is signalled, and entries are the columns again."""
    sent: Counter[tuple[str, int, int]] = Counter()
    awaited: Counter[tuple[str, int, int]] = Counter()
    names = [stage.name for stage in description.stages]
    assert len(set(names)) == len(names)
    assert description.payload_bytes.shape == (description.ranks,)
    assert description.lanes >= 1
    for stage in description.stages:
        for transfers in stage.transfers:
            columns = [transfers.source, transfers.destination, transfers.units, transfers.n_bytes]
            _check_columns(description, columns, transfers.source, transfers.destination)
            assert (transfers.n_bytes[transfers.units == 0] == 0).all(), (stage.name, transfers.what)
            if transfers.lane is not None:
                assert transfers.lane.shape == transfers.source.shape
                assert ((transfers.lane >= 0) & (transfers.lane < description.lanes)).all()
        for signals in stage.signals:
            columns = [signals.source, signals.destination, signals.count]
            _check_columns(description, columns, signals.source, signals.destination)
            sent.update(_by_pair(signals))
        for waits in stage.waits:
            _check_columns(description, [waits.rank, waits.peer, waits.count], waits.rank)
            awaited.update(_by_pair(waits))
        for work in stage.work:
            _check_columns(description, [work.rank, work.units, work.n_bytes, work.elements], work.rank)
    assert_awaited_is_sent(awaited, sent)
    _check_entries(description)


def assert_awaited_is_sent(awaited: Counter[tuple[str, int, int]], sent: Counter[tuple[str, int, int]]) -> None:
    """Every awaited signal is sent, exactly as often; those that are sent may be more (nobody waits for CANN's counts)."""
    for (what, source, destination), count in awaited.items():
        if source >= 0:
            assert sent[what, source, destination] == count, (what, source, destination)
        else:  # any rank's
            assert count <= sum(n for (w, _, d), n in sent.items() if (w, d) == (what, destination))


def total(transfers: Transfers, by: str, ranks: int, *, away: bool = False) -> Ints:
    """[ranks] bytes by source or by destination; `away` leaves out what stays at a rank."""
    found = np.zeros(ranks, np.int64)
    moved = transfers.n_bytes * (transfers.source != transfers.destination) if away else transfers.n_bytes
    np.add.at(found, getattr(transfers, by), moved)
    return found


def the_transfers(description: Description, stage: str, what: str) -> Transfers:
    """The only transfers of that name in a stage."""
    (found,) = (t for t in description.stage(stage).transfers if t.what == what)
    return found


def the_signals(description: Description, stage: str, what: str) -> Signals:
    """The only signals of that name in a stage."""
    (found,) = (s for s in description.stage(stage).signals if s.what == what)
    return found


def written_by(signals: Signals, ranks: int) -> Ints:
    """[ranks] small writes of each rank."""
    found = np.zeros(ranks, np.int64)
    np.add.at(found, signals.source, signals.count)
    return found


def matrix(transfers: Transfers, ranks: int, column: str = "n_bytes") -> Ints:
    """[ranks, ranks] a column by source and destination."""
    found = np.zeros((ranks, ranks), np.int64)
    np.add.at(found, (transfers.source, transfers.destination), getattr(transfers, column))
    return found


def _by_pair(rows: Signals | Waits) -> Counter[tuple[str, int, int]]:
    """Number by (what, who signals, who is signalled)."""
    found: Counter[tuple[str, int, int]] = Counter()
    source, destination = (rows.source, rows.destination) if isinstance(rows, Signals) else (rows.peer, rows.rank)
    for s, d, n in zip(source.tolist(), destination.tolist(), rows.count.tolist(), strict=True):
        if n:
            found[rows.what, s, d] += n
    return found


def _check_columns(description: Description, columns: list[Ints], *ranks: Ints) -> None:
    for column in columns:
        assert column.dtype == np.int64
        assert column.shape == columns[0].shape
        assert column.ndim == 1
    for column in ranks:
        assert ((column >= 0) & (column < description.ranks)).all()
    assert all((column >= 0).all() for column in columns[2:])


def _check_entries(description: Description) -> None:
    """Entries of all ranks, taken together, have the sums of the columns; nothing is counted twice or lost."""
    entries = [entry for rank in range(description.ranks) for entry in description.entries(rank)]
    for stage in description.stages:
        mine = [entry for entry in entries if entry.stage == stage.name]
        assert _sum(mine, "transfer") == _columns_sum(stage.transfers, "units", "n_bytes")
        units, n_bytes = _sum(mine, "signal")
        assert units == sum(int(s.count.sum()) for s in stage.signals)
        assert n_bytes == sum(int(s.count.sum()) * s.size_bytes for s in stage.signals)
        assert _sum(mine, "wait") == (sum(int(w.count.sum()) for w in stage.waits), 0)
        assert _sum(mine, "work") == _columns_sum(list(stage.work), "units", "n_bytes", where="units")


def _sum(entries: list[Entry], kind: str) -> tuple[int, int]:
    mine = [entry for entry in entries if entry.kind == kind]
    return sum(entry.units for entry in mine), sum(entry.n_bytes for entry in mine)


def _columns_sum(rows: Any, units: str, n_bytes: str, where: str | None = None) -> tuple[int, int]:
    counts = [getattr(row, units) for row in rows]
    sizes = [getattr(row, n_bytes) * (1 if where is None else getattr(row, where) > 0) for row in rows]
    return sum(int(c.sum()) for c in counts), sum(int(s.sum()) for s in sizes)
