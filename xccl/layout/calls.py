"""Layouts of what calls look at that go from Python straight into a kernel (`xccl.kernels.calls`)."""

from __future__ import annotations

from .record import Record

CALLS = Record(
    "call state",
    "Private to a rank, one for each of its communicators: what direct calls need to know. Types, strings and None are "
    "known by the addresses of their objects, which live as long as the process.",
)
CA_DETOUR = CALLS.add(
    "detour", 8, "not 0 if calls must go the long way: the session is over, or operations are recorded"
)
CA_CONTROL = CALLS.add("control", 8, "address of the own control area")
CA_RANK = CALLS.add("rank", 8, "this rank")
CA_RANKS = CALLS.add("ranks", 8, "number of ranks")
CA_CONTROLS = CALLS.add("controls", 8, "address of [ranks] addresses of control areas")
CA_DRIVER = CALLS.add("driver", 8, "address of the driver of send and receive")
CA_SEND_CHANNELS = CALLS.add("send_channels", 8, "address of [ranks] addresses of channels, 0 where there is none")
CA_RECEIVE_CHANNELS = CALLS.add("receive_channels", 8, "the same, of those that receive")
CA_SPINS = CALLS.add("spins", 8, "looks at the awaited word before the interpreter's lock is given up")
CA_SLICE_NS = CALLS.add("slice_ns", 8, "longest wait before Python looks at signals, deadlines and peers")
CA_BEGAN_NS = CALLS.add("began_ns", 8, "when the last wait began that did not end while it spun; 0 if it did")
CA_TYPE_INT = CALLS.add("type_int", 8, "`int`")
CA_TYPE_ARRAY = CALLS.add("type_array", 8, "`numpy.ndarray`")
CA_NONE = CALLS.add("none", 8, "`None`")
CA_INT64 = CALLS.add("int64", 8, "the dtype int64")
CA_AUTO = CALLS.add("auto", 8, "the string auto")
CA_MTE = CALLS.add("mte", 8, "the string mte")
CA_REQUEST_BYTES = CALLS.add("request_bytes", 8, "size of a `Request` object")
CA_REQUEST_BUFFER = CALLS.add("request_buffer", 8, "where in it the reference to its buffer is")
CA_REQUEST_RECORD = CALLS.add("request_record", 8, "the same, to its `OperationRecord`; to None once it was collected")
CA_REQUEST_ERROR = CALLS.add("request_error", 8, "the same, to its error or None")
CA_RECORD_REQUEST = CALLS.add("record_request", 8, "where in an `OperationRecord` the reference to its request is")
CA_RECORD_ADDRESS = CALLS.add("record_address", 8, "the same, to its address")
CA_OPS = CALLS.add("ops", 2 * 8, "the strings set and add")
CA_COMPARISONS = CALLS.add("comparisons", 6 * 8, "the strings eq, ne, gt, ge, lt, le")

SYMMETRIC = Record("symmetric memory", "Private to a rank: one for each symmetric array, and for each set of signals.")
SY_ALIVE = SYMMETRIC.add("alive", 8, "1 until it is freed")
SY_CALLS = SYMMETRIC.add("calls", 8, "address of the call state of its communicator")
SY_COUNT = SYMMETRIC.add("count", 8, "elements of a rank's copy, or words")
SY_ITEM_BYTES = SYMMETRIC.add("item_bytes", 8, "bytes of an element, or from word to word")
SY_ADDRESSES = SYMMETRIC.add("addresses", 8, "address of [ranks] addresses of the copies")
SY_DTYPE = SYMMETRIC.add("dtype", 8, "address of the dtype object; 0 for signals")

COLLECTIVE_CALLS = Record(
    "collective calls", "Private to a rank: one for each kind of collective of a communicator, with the calls it knows."
)
CC_CALLS = COLLECTIVE_CALLS.add("calls", 8, "address of the call state of its communicator")
CC_STATE = COLLECTIVE_CALLS.add("state", 8, "address of its collective state")
CC_KERNEL = COLLECTIVE_CALLS.add("kernel", 8, "address of the kernel that makes all of them")
COLLECTIVE_CALLS.pad_to(64)

KNOWN_CALL = Record("known call", "[KNOWN_CALLS] behind each of these: arguments, and the plan of a call with them.")
KC_PLAN = KNOWN_CALL.add("plan", 8, "address of the plan; 0: nothing here")
KC_DTYPE = KNOWN_CALL.add("dtype", 8, "address of the dtype object of input or output")
KC_BYTES = KNOWN_CALL.add("bytes", 8, "bytes of the input, of the output where there is none; alltoallv: of a row")
KC_OP = KNOWN_CALL.add("op", 8, "address of the string, or of None")
KC_ROOT = KNOWN_CALL.add("root", 8, "the root; -1 for none")
KC_ALGORITHM = KNOWN_CALL.add("algorithm", 8, "address of the string")
KNOWN_CALL.pad_to(64)
KNOWN_CALLS = 16

BARRIER = Record("barrier state", "Private to a rank: one for each communicator.")
BA_CALLS = BARRIER.add("calls", 8, "address of the call state of its communicator")
BA_ARRIVALS = BARRIER.add("arrivals", 8, "address of the word at rank 0 that counts arrivals")
BA_RELEASES = BARRIER.add("releases", 8, "address of [ranks] addresses of release words")
BA_EPOCH = BARRIER.add("epoch", 8, "barriers that this rank has left")
BA_ARRIVED = BARRIER.add("arrived", 8, "number of the last barrier at which this rank was counted")
BA_RELEASED = BARRIER.add("released", 8, "number of the last barrier that it ended, as the last to come")
