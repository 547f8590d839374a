"""A full /dev/shm is a CapacityError with numbers in it, at the rank concerned, and never SIGBUS.

Cases run in a process with a /dev/shm of its own, of 8 MiB: its mount namespace is its alone, and needs root or user
namespaces. One process serves all cases, one after the other, since it has to load all kernels first.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.support import PATIENCE_S, Script

SIZE_MIB = 8
_MOUNT = f"mount -t tmpfs -o size={SIZE_MIB}m tmpfs /dev/shm"
_NAMESPACES = (["unshare", "--mount"], ["unshare", "--mount", "--user", "--map-root-user"])


@pytest.fixture(scope="module")
def small_shm() -> tuple[str, ...]:
    """What to run a command with, so that it has a small /dev/shm of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("a small /dev/shm needs unshare(1): install util-linux to run this")
    said = ""
    for namespace in _NAMESPACES:
        tried = subprocess.run(
            [*namespace, "sh", "-c", _MOUNT], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        if tried.returncode == 0:
            return (*namespace, "sh", "-c", f'{_MOUNT} && exec "$@"', "sh")
        said += tried.stderr
    pytest.skip(f"run this as root, or where users may make namespaces, to mount a small /dev/shm: {said.strip()}")


_SERVER = """
def numbers(error):
    return [type(error).__name__, error.needed_bytes, error.available_bytes, str(error)]

def outcome(main, ranks, **options):
    # What launch raises, what each rank saw, and what is left.
    seen = {}
    options = {"timeout_s": 20.0, "app_bytes": 1 << 30, "heap_bytes": 1 << 30} | options
    start = time.monotonic()
    try:
        result = xccl.launch(main, ranks, on_report=lambda rank, message: seen.update({rank: message}), **options)
        raised = None
    except xccl.CapacityError as error:
        result, raised = None, numbers(error)
    except xccl.XcclError as error:
        result, raised = None, [type(error).__name__, str(error)]
    say({
        "raised": raised, "seen": seen, "result": result, "left": sorted(segment_names()),
        "children": children(os.getpid()), "seconds": time.monotonic() - start,
    })

for line in sys.stdin:  # serves all tests of its module
    exec(json.loads(line), dict(globals()))
"""
Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def server(small_shm: tuple[str, ...]) -> Iterator[Script]:
    """It runs each line that it is sent; it dies of what a case does not catch, and that is found with the next word."""
    with Script(_SERVER, wrapper=small_shm, stdin=subprocess.PIPE) as script:
        yield script
        assert script.process.stdin is not None
        script.process.stdin.close()
        script.process.stdin = None
        assert script.finish() == (0, [], "")


@pytest.fixture
def run(server: Script) -> Run:
    """Run a case; what it says, with nothing left behind."""
    return lambda code: run_case(server, code)


def run_case(server: Script, code: str) -> dict[str, Any]:
    server.tell(code)
    (found,) = server.hear()
    assert (found["left"], found["children"]) == ([], [])
    assert found["seconds"] < 3.0
    result: dict[str, Any] = found
    return result


def assert_says_how_much(numbers: list[Any], at_least: int) -> None:
    kind, needed_bytes, available_bytes, text = numbers
    assert kind == "CapacityError"
    assert needed_bytes >= at_least
    assert 0 <= available_bytes < SIZE_MIB << 20
    assert str(needed_bytes) in text
    assert str(available_bytes) in text
    assert "/dev/shm is full" in text


def test_empty_and_the_session_goes_on(run: Run) -> None:
    """No rank gets the array, not even one that had room for it, and all can go on."""
    found = run(
        """
def main(comm):
    try:
        comm.empty(16 << 20, np.uint8)
    except xccl.CapacityError as error:
        comm.report(numbers(error))
    comm.barrier()
    try:
        comm.empty(3 << 20, np.uint8)  # there is room at one rank or two, not at three
    except xccl.CapacityError as error:
        pass
    else:
        return -1
    comm.barrier()
    array = comm.empty(64 << 10, np.uint8)
    comm.put(array, np.full(64 << 10, comm.rank, np.uint8), peer=(comm.rank + 1) % comm.size)
    comm.barrier()
    return int(array.local.min()), int(array.local.max())
outcome(main, 3)
""",
    )
    assert found["raised"] is None
    assert found["result"] == [[2, 2], [0, 0], [1, 1]]
    assert len(found["seen"]) == 3
    assert [numbers[0] for numbers in found["seen"].values()] == ["CapacityError"] * 3
    for numbers in found["seen"].values():
        assert_says_how_much(numbers, 16 << 20)


def test_memory_that_was_not_granted_is_given_back(run: Run) -> None:
    """A rank that had room, in a call that failed at another, does not keep what it took."""
    found = run(
        """
def main(comm):
    for _ in range(20):
        try:
            comm.empty(3 << 20, np.uint8)
        except xccl.CapacityError:
            pass
        else:
            return False
    a = comm.empty(3 << 19, np.uint8)  # 6 MiB at all ranks together
    a.local[:] = 1
    comm.barrier()
    return True
outcome(main, 4)
""",
    )
    assert (found["raised"], found["result"]) == (None, [True] * 4)


def test_signals(run: Run) -> None:
    found = run(
        """
def main(comm):
    comm.signals(1 << 18)
outcome(main, 2)
""",
    )
    assert_says_how_much(found["raised"], 128 << 18)


def test_expert_parallel(run: Run) -> None:
    found = run(
        """
def main(comm):
    xccl.ExpertParallel(comm, num_experts=1 << 19, hidden=8, top_k=1, max_tokens=1 << 18, dtype=np.float32)
outcome(main, 2)
""",
    )
    assert_says_how_much(found["raised"], 1 << 20)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_dispatch_and_combine(run: Run, operation: str) -> None:
    """At rank 1 alone: it has more than fits. The others are in the call already, and end."""
    found = run(
        f"""
operation = {operation!r}
def main(comm):
    # INT8 rows go out in a quarter of the bytes: dispatch fits, and combine does not.
    tokens = 1024 if operation == "dispatch" else 280
    source = 1 if operation == "dispatch" else 0
    x = np.zeros((tokens if comm.rank == source else 1, 7168), np.float32)
    try:
        ep = xccl.ExpertParallel(
            comm, num_experts=3, hidden=7168, top_k=1, max_tokens=1024, dtype=np.float32,
            quant="none" if operation == "dispatch" else "int8",
        )
        d = ep.dispatch(x, np.ones((len(x), 1), int))
        ep.combine(np.zeros((len(d.source), 7168), np.float32), d, np.ones((len(x), 1), np.float32))
    except xccl.CapacityError as error:
        comm.report(numbers(error))
        raise
    except xccl.SessionAborted as error:
        comm.report([type(error).__name__, error.peer, error.reason])
        raise
outcome(main, 3)
""",
    )
    assert_says_how_much(found["raised"], 6 << 20)
    assert found["seen"]["1"] == found["raised"]
    for rank in "02":
        kind, peer, reason = found["seen"][rank]
        assert (kind, peer) == ("SessionAborted", 1)
        assert reason.startswith("raised CapacityError: ")


def test_a_dispatch_that_does_not_fit_may_be_made_smaller(run: Run) -> None:
    """Nothing was sent when it failed, and the others still wait."""
    found = run(
        """
def main(comm):
    ep = xccl.ExpertParallel(
        comm, num_experts=2, hidden=7168, top_k=1, max_tokens=1024, dtype=np.float32, quant="none"
    )
    if comm.rank == 1:
        try:
            ep.dispatch(np.zeros((1024, 7168), np.float32), np.zeros((1024, 1), int))
        except xccl.CapacityError as error:
            comm.report(numbers(error))
    d = ep.dispatch(np.full((4, 7168), comm.rank, np.float32), np.zeros((4, 1), int))
    return len(d.source), float(d.tokens.sum())
outcome(main, 2)
""",
    )
    assert found["raised"] is None
    assert found["result"] == [[8, 4 * 7168.0], [0, 0.0]]
    assert_says_how_much(found["seen"]["1"], 1024 * 7168 * 4)


@pytest.mark.parametrize("whose", ["of a peer", "of its own"])
def test_push_that_does_not_fit_may_be_made_smaller(run: Run, whose: str) -> None:
    """The sender has no room in a peer's memory, or in its own for what is to return; it has sent nothing."""
    found = run(
        f"""
of_its_own = {whose == "of its own"!r}
def main(comm):
    # INT8 rows go out in a quarter of the bytes: in the second case they fit.
    ep = xccl.ExpertParallel(
        comm, num_experts=2, hidden=7168, top_k=1, max_tokens=1024, dtype=np.float32, protocol="push",
        quant="int8" if of_its_own else "none",
    )
    tokens = 280 if of_its_own else 1024
    if comm.rank == 1:
        try:
            ep.dispatch(np.zeros((tokens, 7168), np.float32), np.zeros((tokens, 1), int))
        except xccl.CapacityError as error:
            comm.report(numbers(error))
    comm.barrier()  # while the system looks for memory in vain, others find none
    d = ep.dispatch(np.full((4, 7168), comm.rank, np.float32), np.zeros((4, 1), int))
    y = ep.combine(np.full((len(d.source), 7168), 3, np.float32), d, np.ones((4, 1), np.float32))
    return len(d.source), float(y.sum())
outcome(main, 2)
""",
    )
    assert found["raised"] is None
    assert found["result"] == [[8, 12 * 7168.0], [0, 12 * 7168.0]]
    assert_says_how_much(found["seen"]["1"], 280 * 7168 * 4 if whose == "of its own" else 1024 * 7168 * 4)


def test_direct_rows_that_do_not_fit(run: Run) -> None:
    """Ranks find out together when all have counted: none writes, and the object says that it cannot be used again."""
    found = run(
        """
def main(comm):
    ep = xccl.ExpertParallel(
        comm, num_experts=2, hidden=7168, top_k=1, max_tokens=512, dtype=np.float32, protocol="direct", quant="none"
    )
    tokens = 512 if comm.rank == 1 else 0
    errors = []
    for _ in range(2):
        try:
            ep.dispatch(np.zeros((tokens, 7168), np.float32), np.zeros((tokens, 1), int))
        except xccl.XcclError as error:
            errors.append(error)
    comm.report(numbers(errors[0]))
    comm.barrier()
    other = xccl.ExpertParallel(
        comm, num_experts=2, hidden=7168, top_k=1, max_tokens=512, dtype=np.float32, protocol="direct", quant="none"
    )
    d = other.dispatch(np.full((4, 7168), comm.rank, np.float32), np.zeros((4, 1), int))
    return str(errors[1]), float(d.tokens.sum())
outcome(main, 2)
""",
    )
    assert found["raised"] is None
    for said, _ in found["result"]:
        assert "unusable" in said
    assert [total for _, total in found["result"]] == [4 * 7168.0, 0.0]
    for rank in "01":
        assert_says_how_much(found["seen"][rank], 512 * 7168 * 4)


def test_the_first_send_of_a_pair(run: Run) -> None:
    """A ring is made then, and not before."""
    found = run(
        """
def main(comm):
    try:
        comm.barrier()
        if comm.rank == 0:
            comm.send(np.zeros(4), dst=1, event_id=1)
        comm.barrier()
    except xccl.CapacityError as error:
        comm.report(numbers(error))
        raise
    except xccl.SessionAborted as error:
        comm.report([type(error).__name__, error.peer])
        raise
outcome(main, 3, ring_slots=64, slot_bytes=1 << 20)
""",
    )
    assert_says_how_much(found["raised"], 64 << 20)
    assert found["seen"]["0"] == found["raised"]
    assert found["seen"]["1"] == found["seen"]["2"] == ["SessionAborted", 0]


def test_start(run: Run) -> None:
    """Some ranks have their segments, for one there is no room."""
    found = run(
        """
with open("/dev/shm/filler", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, (8 << 20) - (20 << 10))
outcome(lambda comm: comm.barrier(), 4)
os.remove("/dev/shm/filler")
""",
    )
    assert_says_how_much(found["raised"], 4096)


def test_start_by_init(run: Run) -> None:
    found = run(
        """
with open("/dev/shm/filler", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, 8 << 20)
start = time.monotonic()
try:
    xccl.init(0, 2, "nobody", join_timeout_s=5.0)
except xccl.CapacityError as error:
    raised = numbers(error)
os.remove("/dev/shm/filler")
say({"raised": raised, "left": sorted(segment_names()), "children": [], "seconds": time.monotonic() - start})
""",
    )
    assert_says_how_much(found["raised"], 4096)


def test_the_benchmark_says_so_in_one_line(small_shm: tuple[str, ...]) -> None:
    code = """
from xccl.cli.main import main
say(main("bench put --ranks 2 -b 16M -e 16M -n 1".split()))
"""
    with Script(code, wrapper=small_shm) as script:
        status, said, err = script.finish()
    assert (status, said[-1]) == (0, [2])
    assert err.startswith("xccl bench: error: /dev/shm is full: ")
    assert err.count("\n") == 1
