"""What the tests of send and receive share: rings, messages, guarded buffers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

#: A ring of 128 bytes: nearly every message is far larger.
TINY = {"ring_slots": 2, "slot_bytes": 64}
RINGS = [
    pytest.param({}, id="default"),
    pytest.param(TINY, id="2x64"),
    pytest.param({"ring_slots": 1, "slot_bytes": 128}, id="1x128"),
    pytest.param({"ring_slots": 7, "slot_bytes": 1024}, id="7x1024"),
]


def message(n_bytes: int, seed: int) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8)


def guarded(n_bytes: int) -> tuple[np.ndarray, Callable[[], None]]:
    """A buffer at an odd address, and a check that the bytes around it were left alone."""
    memory = np.full(n_bytes + 129, 0xA7, np.uint8)
    buffer = memory[65 : 65 + n_bytes]

    def check() -> None:
        assert (memory[:65] == 0xA7).all()
        assert (memory[65 + n_bytes :] == 0xA7).all()

    return buffer, check
