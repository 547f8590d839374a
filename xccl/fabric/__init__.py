"""Global memory behind one interface: POSIX shared memory between processes, anonymous memory between threads."""

from __future__ import annotations

from .base import Fabric
from .group import GroupFabric
from .local import LocalFabric, LocalWorld
from .shm import ShmFabric

__all__ = ["Fabric", "GroupFabric", "LocalFabric", "LocalWorld", "ShmFabric"]
