"""Agreement of the ranks of a process group on a head in shards, asked once a head, when a graph is compiled.

A fused head in shards waits for the other ranks, where the program's own ops may wait elsewhere or not at all. It is
fused only where every rank of the group compiles the same head. The ranks write to the group's key-value store, and the
first answer for a key is final:

| answer | written by                                                                                                |
|--------|-----------------------------------------------------------------------------------------------------------|
| yes    | the last rank to ask                                                                                      |
| no     | a rank that does not want the head, that sees another rank wait for an answer on another head, or that    |
|        | has waited too long for a rank that compiles no such head or is gone                                      |

A rank that compiles the same head again reads the answer. No collective is used, so that a missing rank only costs
time. Heads are compared as texts, which are equal on all ranks where the heads are.
"""

from __future__ import annotations

import time
import zlib
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from fusedhead.lowering.shards import group_of

WAIT = 300.0  # seconds; another rank may still compile earlier graphs
PAUSE = 0.02
YES, NO = "fused", "left"
minds: dict[tuple[str, int], tuple[bool, int]] = {}  # whether a head is wanted, and how often that changed
agreement_lock = Lock()


def store_of(group: str) -> Any:
    """The key-value store that all ranks of a group reach. Raises AttributeError where this torch does not say."""
    return dist.PrefixStore(f"fusedhead/{group}", dist.distributed_c10d._get_default_store())


def agreed(group: str, heads: str, wanted: bool) -> bool:
    """Whether every rank of a group fuses ``heads``: one answer for all. ``wanted``: whether this rank wants it."""
    of = group_of(group)
    if dist.get_backend(of) == "fake":  # one process that stands for all ranks
        return wanted
    try:
        store = store_of(group)
    except AttributeError:
        return False
    key = key_of(group, zlib.crc32(heads.encode()), wanted)
    if not wanted:
        first_answer(store, key, NO)
        return False
    rank, ranks = dist.get_rank(of), dist.get_world_size(of)
    if store.add(f"{key}/ranks/{rank}", 1) == 1 and store.add(f"{key}/ranks", 1) == ranks:
        return first_answer(store, key, YES) == YES
    store.set(f"waits/{rank}", key)
    deadline = time.monotonic() + patience(of)
    while not store.check([key]) and time.monotonic() < deadline and not ranks_apart(store, key, rank, ranks):
        time.sleep(PAUSE)
    store.set(f"waits/{rank}", "")
    return first_answer(store, key, NO) == YES


def patience(group: Any) -> float:
    """Seconds to wait for other ranks: half of the timeout of the group's collectives, or `WAIT`."""
    try:
        options = group._get_backend(torch.device(group._device_types[0])).options
        return min(WAIT, options._timeout.total_seconds() / 2)
    except (AttributeError, IndexError, RuntimeError):  # this torch or backend does not tell its timeout
        return WAIT


def ranks_apart(store: Any, key: str, rank: int, ranks: int) -> bool:
    """Whether another rank waits for an answer on another head: neither would reach the head of the other.

    That head is answered with no as well, since the other rank may look after this one has stopped waiting.
    """
    for other in range(ranks):
        if other != rank and store.check([f"waits/{other}"]):
            waits = store.get(f"waits/{other}").decode()
            # the answer on this head is read last: a rank that has it goes on
            if waits and waits != key and not store.check([key]) and first_answer(store, waits, NO) == NO:
                return True
    return False


def key_of(group: str, heads: int, wanted: bool) -> str:
    """The key of a head's answer. It changes whenever this process starts or stops to want the head."""
    with agreement_lock:
        before, changes = minds.get((group, heads), (wanted, 0))
        minds[group, heads] = wanted, changes + (before != wanted)
        return f"{heads:08x}/{minds[group, heads][1]}"


def first_answer(store: Any, key: str, word: str) -> str:
    """The first answer that a rank has stored under the key: ``word``, if there is none yet."""
    return store.compare_set(key, "", word).decode()  # type: ignore[no-any-return]
