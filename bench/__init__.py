"""Benchmarks of xccl.

Two kinds:

    bench_*.py       pytest-benchmark suites: `pytest bench --benchmark-autosave`, then `--benchmark-compare`
    figures.py       `python -m bench.figures`: the figures that the project states of itself, beside those of its peers

`measure` runs an operation on ranks and brings the times back; `figures_*` are what the ranks of `figures` run.
"""
