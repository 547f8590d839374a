"""What operations would cost on a machine with UB links: descriptions in, microseconds out."""

from __future__ import annotations
