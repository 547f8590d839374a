"""Sizes of the rows that go to experts and come back."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np


class RowSizes:
    """What follows from three attributes of the shape that has it as its base.

    Attributes:
        hidden: elements of a token.
        dtype: of tokens and outputs.
        is_int8: are tokens sent as INT8?
    """

    hidden: int
    dtype: np.dtype[Any]
    is_int8: bool

    @cached_property
    def token_dtype(self) -> np.dtype[Any]:
        """Of the rows that experts get."""
        return np.dtype(np.int8) if self.is_int8 else self.dtype

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row sent to an expert."""
        return self.hidden * self.token_dtype.itemsize

    @cached_property
    def return_bytes(self) -> int:
        """Bytes of a row that comes back."""
        return self.hidden * self.dtype.itemsize
