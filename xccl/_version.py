"""The version: read by the build, printed by the command line, written into every JSON report."""

__version__ = "0.1.0.dev0"
