"""Benchmarks of xccl.

Three kinds:

    bench_*.py       pytest-benchmark suites: `pytest bench --benchmark-autosave`, then `--benchmark-compare`
    figures.py       `python -m bench.figures`: the figures that the project states of itself, beside those of its peers
    peers/           `python -m bench.peers`: xccl and other libraries on the same work, interleaved in one run

`measure` runs an operation on ranks and brings the times back; `figures_*` are what the ranks of `figures` run.
"""
