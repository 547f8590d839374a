"""Ranks: start them, join a session, notice their end, clean up after them."""

from __future__ import annotations

from .init import init
from .launch import launch

__all__ = ["init", "launch"]
