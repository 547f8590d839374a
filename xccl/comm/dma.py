"""The emulated DMA engine of a rank: a thread that copies while the rank computes.

A die's DMA engine works off a queue of descriptors without any of its cores, has a higher start-up, and moves up to
gigabytes a transfer (XDS section 3.1). Here it is a thread in a kernel that holds no lock of the interpreter
(`kernels.engine.serve`): a descriptor is an operation given to it with engine="dma". Starting an idle engine takes a
system call and the wake-up of a thread, which is the start-up. It is made by the first such operation, and ends with
the session.

The engine judges nothing: deadlines, dead peers and errors are seen by the rank, when it waits for the request.
"""

from __future__ import annotations

import threading
import time

from ..errors import FabricError
from ..kernels import engine as kernels, wait

#: The engine comes back from its kernel so often, so that it ends with the interpreter.
_SLICE_NS = 500_000_000
_STOP_S = 5.0


class DmaEngine:
    """A running engine.

    Args:
        driver: address of the driver's record, which must outlive the engine.
        rank: whose it is.
    """

    def __init__(self, driver: int, rank: int) -> None:
        self._driver = driver
        self._thread = threading.Thread(target=self._serve, name=f"xccl rank {rank} DMA engine", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while kernels.serve.call(self._driver, time.monotonic_ns() + _SLICE_NS) == wait.SLICE:
            pass

    def stop(self) -> None:
        """End it, in the middle of what it does.

        Raises:
            FabricError: it does not end.
        """
        kernels.stop.call(self._driver)
        self._thread.join(_STOP_S)
        if self._thread.is_alive():
            raise FabricError(f"{self._thread.name} does not stop")
