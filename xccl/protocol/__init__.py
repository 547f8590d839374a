"""What must happen in each operation: pure descriptions, and the routings that MoE operations are described for.

Nothing here touches memory. `comm` executes what is described, and a test asserts that its trace equals `entries`;
`model` says what it would cost.

    describing function                                           stages, in order
    onesided.put(ranks, source, destination, n_bytes)             put
    onesided.get(ranks, source, destination, n_bytes)             get
    onesided.put_signal(ranks, source, destination, n_bytes)      put-signal
    onesided.signal(ranks, source, destination)                   signal
    onesided.wait_until(ranks, rank)                              wait
    onesided.barrier(ranks, last=None)                            arrive, release, await-release
    p2p.send_recv(ranks, source, destination, n_bytes,            write, announce, copy, acknowledge,
                  lanes=, engine=, slot_bytes=, ring_slots=)        await-acknowledgements
    p2p.zero_copy(ranks, source, destination, n_bytes,            announce, accept, pull, push, acknowledge,
                  lanes=, engine=, pushed=, answered=)              await-acknowledgement
    kv.kv_transfer(ranks, source, destination, pages,             announce, push, notify, await-layers
                   layers=, page_bytes=, lanes=, engine=)
    moe.dispatch(routing, hidden=, item_bytes=, quant=, lanes=)   await-pulled, write, announce, await-fields, pull,
    moe.combine(routing, hidden=, item_bytes=, lanes=)              release
    moe_push.dispatch(routing, ..., header_bytes=, flags_per=)    send, notify, await-flags, assemble
    moe_push.combine(routing, ..., header_bytes=, shared_expert=) send, flag, await-flags, reduce
    moe_direct.dispatch(routing, ..., rows=, cached=)             count, announce, await-counts, plan, write, notify,
                                                                    await-rows
    moe_direct.combine(routing, ..., shared_expert=, in_place=)   return, announce, await-ready, reduce, release,
                                                                    await-read
    moe_push.buffer_size_hint(ranks=, local_batch=, ...)          (bytes of buffers, no stages)
    a2e.a2e(routing, hidden=, ..., trampolines=, copies=,         those of moe.dispatch; with trampolines those of the
            engine=, forward_engine=)                               second leg too, "forward-" before their names
    a2e.e2a(routing, hidden=, ..., the same)                      the same, and reduce

`ranks` is the number of ranks; source, destination, n_bytes are columns, or single numbers. `routing` is a
`counts.RoutingCounts`:

    RoutingCounts.from_topk(topk_idxs, experts)                   real choices, ragged, -1 for none (see routing.py)
    RoutingCounts.from_counts(counts, tokens)                     a matrix of rows [sources, experts]
    RoutingCounts.uniform(sources, experts=, tokens=, top_k=)     the expectation, in whole rows
        .tokens .sending .sent [sources]; .counts [sources, experts]; .rows .runs [sources, destinations]; .received

Each returns a `stage.Description`: operation, protocol, ranks, stages, lanes, payload_bytes [ranks], window; its stages
hold columns (see `stage`):

    Transfers  source destination units n_bytes | lane or None | mover "source" or "destination", engine, what
    Signals    source destination count | size_bytes, what, atomic, fetches
    Waits      rank peer (-1: any rank) count | what
    Work       rank units n_bytes elements | kind "quantise" "reduce" "scan" "dequantise"

Rows with no units may occur. A stage is `streamed` where it follows, piece by piece, the stage before it or what it
waits for; only send/receive, layers of KV-cache transfers and the flags of the push combine are. What a wait waits for
has the same `what` as the signals; waits for "pulled" and "forward-pulled" are for those of the operation before, and
true at the start of a single one.
"""
