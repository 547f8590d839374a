"""Element types of payloads, and the small integers by which kernels know them."""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np

BF16: Final = 0
FP16: Final = 1
FP32: Final = 2
INT8: Final = 3
FP64: Final = 4
INT16: Final = 5
INT32: Final = 6
INT64: Final = 7
UINT8: Final = 8
UINT16: Final = 9
UINT32: Final = 10
UINT64: Final = 11

#: NumPy dtype of each code.
DTYPE_OF: Final[dict[int, np.dtype]] = {
    BF16: np.dtype(ml_dtypes.bfloat16),
    FP16: np.dtype(np.float16),
    FP32: np.dtype(np.float32),
    INT8: np.dtype(np.int8),
    FP64: np.dtype(np.float64),
    INT16: np.dtype(np.int16),
    INT32: np.dtype(np.int32),
    INT64: np.dtype(np.int64),
    UINT8: np.dtype(np.uint8),
    UINT16: np.dtype(np.uint16),
    UINT32: np.dtype(np.uint32),
    UINT64: np.dtype(np.uint64),
}

#: Code of each NumPy dtype.
CODE_OF: Final[dict[np.dtype, int]] = {dtype: code for code, dtype in DTYPE_OF.items()}

#: Names used on the command line and in reports.
NAME_OF: Final[dict[int, str]] = {
    BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64",
    INT8: "int8", INT16: "int16", INT32: "int32", INT64: "int64",
    UINT8: "uint8", UINT16: "uint16", UINT32: "uint32", UINT64: "uint64",
}  # fmt: skip
CODE_BY_NAME: Final[dict[str, int]] = {name: code for code, name in NAME_OF.items()}
