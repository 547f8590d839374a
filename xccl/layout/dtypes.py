"""Element types of payloads, and the small integers by which kernels know them."""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np

BF16: Final = 0
FP16: Final = 1
FP32: Final = 2
INT8: Final = 3

#: NumPy dtype of each code.
DTYPE_OF: Final[dict[int, np.dtype]] = {
    BF16: np.dtype(ml_dtypes.bfloat16),
    FP16: np.dtype(np.float16),
    FP32: np.dtype(np.float32),
    INT8: np.dtype(np.int8),
}

#: Code of each NumPy dtype.
CODE_OF: Final[dict[np.dtype, int]] = {dtype: code for code, dtype in DTYPE_OF.items()}

#: Names used on the command line and in reports.
NAME_OF: Final[dict[int, str]] = {BF16: "bf16", FP16: "fp16", FP32: "fp32", INT8: "int8"}
CODE_BY_NAME: Final[dict[str, int]] = {name: code for code, name in NAME_OF.items()}
