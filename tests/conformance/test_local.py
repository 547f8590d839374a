"""Fabric `local`: ranks are threads of this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import pytest

import xccl
from tests.conformance.communicator_suite import CommunicatorSuite
from tests.conformance.fabric_suite import FabricSuite
from tests.conformance.order_suite import OrderSuite
from tests.conformance.suite import Suite
from tests.multirank.support import launch
from xccl.errors import CapacityError


class Local(Suite):
    """Ranks are threads; one dies when it exits by SystemExit, which nothing but its own thread can do to it."""

    def run(self, main: Callable[..., Any], ranks: int = 2, **options: Any) -> list[Any]:
        return launch(main, ranks, "local", **options)

    def die(self) -> NoReturn:
        sys.exit(3)


class TestLocalFabric(Local, FabricSuite):
    """The interface."""

    def test_results_need_not_pickle(self) -> None:
        results = self.run(lambda comm: lambda: comm.rank)
        assert [f() for f in results] == [0, 1]

    def test_more_address_space_than_there_is(self) -> None:
        with pytest.raises(CapacityError) as caught:
            self.run(lambda comm: None, 1024, app_bytes=1 << 40)
        assert caught.value.needed_bytes is not None
        assert caught.value.needed_bytes > 1024 << 40
        assert str(caught.value.needed_bytes) in str(caught.value)


class TestLocalOrder(Local, OrderSuite):
    """Signals, waits and barriers."""


class TestLocalCommunicator(Local, CommunicatorSuite):
    """The operations."""

    def test_a_source_that_another_rank_made(self) -> None:
        """Ranks share one address space here, so one may put what another one holds."""
        shared = np.arange(100)

        def main(comm: xccl.Communicator) -> None:
            a = comm.empty(100, np.int64)
            comm.put(a, shared, peer=1 - comm.rank)
            comm.barrier()
            assert (a.local == shared).all()

        self.run(main)
