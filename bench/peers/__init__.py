"""xccl beside the libraries that users would pick instead, on the same work, interleaved in one run.

    python -m bench.peers               the whole table (`make peers` installs what it needs first)
    python -m bench.peers --list        its cells, and which libraries are there

The parts, from what is compared to how:

    names       of libraries
    table       cells (operation, size, ranks), who takes part in each, and the targets
    work        what a library is asked to do in a cell; what cannot be compared says why
    collectives what is given and expected in a collective
    floor       the same bytes copied and nothing else, as one more that takes turns: the roofline
    on_xccl, on_mpi, on_gloo, on_multiprocessing      the cells in each library
    moe         dispatch and combine by alltoallv and numba, for libraries that have only that
    rank        what each rank runs: take orders from the driver, measure, answer
    session     the ranks of one library: starting them, talking to them, ending them by process id
    driver      rounds: every library measures a little, again and again, so that noise of the machine hits all of them
    statistics  medians, ratios and their bootstrap intervals
    report      lines and JSON
    published   figures measured elsewhere, for `bench.figures`

All times are emulated ones, of this machine. Ranks are processes, each bound to a core, one to a core if there are
enough and else in turn, whatever the library; every buffer begins at a page.
"""
