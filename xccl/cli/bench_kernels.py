"""Which kernels a benchmark does without: they are not compiled before it begins.

Into an empty cache all of them take some 40 s of one core's time, those of one benchmark a third of it.
"""

from __future__ import annotations

from typing import Final

from xccl.cli.options import BenchOptions

_A2E: Final = frozenset({"a2e", "trampoline"})
_KV: Final = frozenset({"kv"})
#: Send, receive, put and get, and their direct calls.
_POINT_TO_POINT: Final = frozenset({"calls", "transfer_calls", "driver", "operations", "zerocopy"})
#: Of each protocol of dispatch and combine.
_PROTOCOLS: Final = {
    "pull": frozenset({"moe_pull", "moe_pull_combine"}),
    "push": frozenset({"moe_push", "moe_push_combine"}),
    "direct": frozenset({"moe_direct", "moe_direct_combine", "expert_calls"}),
}
_EXPERTS: Final = frozenset({"moe_routing", "moe_sums", "quantise", "reduce", "rows"}).union(*_PROTOCOLS.values())

_EXPERT_PARALLEL: Final = ("dispatch", "combine", "moe")
_DISAGGREGATED: Final = ("a2e", "e2a")


def not_needed(options: BenchOptions) -> frozenset[str]:
    """Modules of kernels that the ranks of this benchmark do not call; if one does, it is compiled by then."""
    if options.op in _EXPERT_PARALLEL:
        used = "direct" if options.protocol == "auto" else options.protocol
        others = (modules for name, modules in _PROTOCOLS.items() if name != used)
        return frozenset().union(_A2E, _KV, _POINT_TO_POINT, *others)
    if options.op in _DISAGGREGATED:
        return frozenset().union(_KV, _POINT_TO_POINT, *_PROTOCOLS.values())
    return _A2E | _EXPERTS if options.op == "kv" else _A2E | _EXPERTS | _KV
