"""Kernels are compiled before ranks start. Somebody who waits for that at a terminal is told so."""

from __future__ import annotations

import sys

from ..kernels import cache_dir, warm


def compile_kernels() -> None:
    """Compile kernels, or load them from the cache; says so on a terminal if none are there, since it takes long."""
    if sys.stderr.isatty() and not any((folder := cache_dir()).glob("*.nbi")):
        sys.stderr.write(f"xccl: compiling kernels into {folder}, once: that takes up to 40 s on two cores\n")
        sys.stderr.flush()
    warm()
