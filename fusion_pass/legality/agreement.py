"""Whether all ranks of a process group fuse the same heads in shards: asked once a head, when a graph is compiled.

A head in shards waits for the other ranks where the program's own ops, which it takes the place of, may have waited
elsewhere or not at all. So it is fused only where every rank of the group has compiled the same: the rank that comes
last says yes for all in the group's key-value store. A rank says no for all where it does not want the head, where
another rank waits for an answer on another head at the same time, or where it has waited too long for a rank that
compiles nothing of the kind, or is gone. Whoever says it first has said it, since a key of the store is set once. A
rank that compiles the same head again finds what was said. No collective is used: a rank that is not there costs time,
nothing more. This file knows no graphs; what is compared is text that is equal on all ranks where the heads are.
"""

from __future__ import annotations

import time
import zlib
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from fusedhead.lowering.shards import group_of

WAIT = 300.0  # seconds, for ranks that may still compile what comes before
PAUSE = 0.02
YES, NO = "fused", "left"
minds: dict[tuple[str, int], tuple[bool, int]] = {}  # whether this process last wanted a head, how often it changed
agreement_lock = Lock()


def store_of(group: str) -> Any:
    """The key-value store that all ranks of a group reach. Raises AttributeError where this torch does not say."""
    return dist.PrefixStore(f"fusedhead/{group}", dist.distributed_c10d._get_default_store())


def agreed(group: str, heads: str, wanted: bool) -> bool:
    """Whether every rank of a group fuses ``heads``; the same answer on all ranks that ask. ``wanted``: by this one."""
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
    """Seconds to wait for other ranks: half of what a collective of the group waits for one that is gone, or `WAIT`."""
    try:
        options = group._get_backend(torch.device(group._device_types[0])).options
        return min(WAIT, options._timeout.total_seconds() / 2)
    except (AttributeError, IndexError, RuntimeError):  # a torch, or a backend, that does not say
        return WAIT


def ranks_apart(store: Any, key: str, rank: int, ranks: int) -> bool:
    """Whether another rank waits for an answer on another head: neither would come to the other's.

    It is told so too, since it may look when this rank waits no more.
    """
    for other in range(ranks):
        if other != rank and store.check([f"waits/{other}"]):
            waits = store.get(f"waits/{other}").decode()
            # the answers to this head are read last: a rank that has them goes on
            if waits and waits != key and not store.check([key]) and first_answer(store, waits, NO) == NO:
                return True
    return False


def key_of(group: str, heads: int, wanted: bool) -> str:
    """Under which key it is said: another one whenever this process has changed its mind about a head."""
    with agreement_lock:
        before, changes = minds.get((group, heads), (wanted, 0))
        minds[group, heads] = wanted, changes + (before != wanted)
        return f"{heads:08x}/{minds[group, heads][1]}"


def first_answer(store: Any, key: str, word: str) -> str:
    """The first answer that a rank has stored under the key: ``word``, if there is none yet."""
    return store.compare_set(key, "", word).decode()  # type: ignore[no-any-return]
