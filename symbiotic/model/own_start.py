"""Loading weights into a model whose groups have more parts of their own than the checkpoint has.

A mixture-of-transformers usually starts from a model without a second branch, whose attention and norms the new
branch copies (BAGEL, LMFusion: method.md section 7). Keys of own parts differ from those of the shared ones by
``own.<group>.`` alone, so a missing part is read from the key that it copies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from symbiotic.errors import CheckpointError

log = logging.getLogger(__name__)

OWN = re.compile(r"(?<=\.)own\.(?P<group>[^.]+)\.")
COPY_FROM = "copy_from:"

State = dict[str, dict[str, Any]]
"""Model chunk -> name -> Megatron's sharded entry."""


def owner_of(key: str) -> str | None:
    """The group that has the tensor ``key`` for itself, None for a shared one."""
    match = OWN.search(key)
    return match["group"] if match else None


def copied_key(key: str, *, group: str, available: Collection[str]) -> str:
    """What an own part copies: the same part of ``group``, which is the shared one where that group has none."""
    own = OWN.sub(f"own.{group}.", key, count=1)
    return own if own in available else OWN.sub("", key, count=1)


def load_with_own_parts(
    states: State,
    *,
    load: Callable[[State], dict[str, Any]],
    available: Collection[str],
    starts: Mapping[str, str | None],
    source: str,
) -> dict[str, Any]:
    """Load a checkpoint, and start the own parts that it lacks as configured. Collective.

    Args:
        states: what this rank's model chunks ask for.
        load: loads a checkpoint into such a request, every tensor of the checkpoint exactly once.
        available: keys of all tensors in the checkpoint.
        starts: group -> ``copy_from:<group>``, ``random``, or None where nothing is configured.
        source: the checkpoint's name, for messages.

    Returns:
        What ``load`` returned, with the missing own parts.

    Raises:
        CheckpointError: a group's own part is missing and nothing says how it starts.
    """
    missing = {
        (chunk, name): entry
        for chunk, state in states.items()
        for name, entry in state.items()
        if owner_of(entry.key) and entry.key not in available
    }
    keys = _keys_by_group([entry.key for entry in missing.values()])
    if not keys:
        return load(states)
    for group, group_keys in keys.items():
        if starts[group] is None:
            raise CheckpointError(
                f"{source}: it has no {group_keys[0]}, which group {group!r} has for itself; set "
                f"groups.{group}.own_start to copy_from:GROUP or random"
            )
        log.info("%s: %d own tensors of group %s start as %s", source, len(group_keys), group, starts[group])
    known = {
        chunk: {name: entry for name, entry in state.items() if (chunk, name) not in missing}
        for chunk, state in states.items()
    }
    loaded = load(known)
    for group in keys:
        mine = {place: entry for place, entry in missing.items() if owner_of(entry.key) == group}
        if starts[group] == "random":
            found = {place: entry.data for place, entry in mine.items()}
        else:
            found = _load_copies(known, mine, load=load, available=available, start=starts[group])
        for (chunk, name), value in found.items():
            loaded[chunk][name] = value
    return loaded


def _load_copies(
    known: State,
    mine: Mapping[tuple[str, str], Any],
    *,
    load: Callable[[State], dict[str, Any]],
    available: Collection[str],
    start: str,
) -> dict[tuple[str, str], Any]:
    """Load once more, the missing parts in place of those that they copy: a request has every tensor just once."""
    group = start.removeprefix(COPY_FROM)
    copies = {
        place: replace(entry, key=copied_key(entry.key, group=group, available=available))
        for place, entry in mine.items()
    }
    taken = {entry.key for entry in copies.values()}
    request = {
        chunk: {name: entry for name, entry in state.items() if entry.key not in taken}
        for chunk, state in known.items()
    }
    for (chunk, name), entry in copies.items():
        request[chunk][name] = entry
    loaded = load(request)
    return {(chunk, name): loaded[chunk][name] for chunk, name in copies}


def _keys_by_group(keys: list[str]) -> dict[str, list[str]]:
    """Group -> its missing keys on all ranks, sorted; the same on every rank."""
    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, keys)
    found: dict[str, list[str]] = {}
    for key in sorted({key for rank_keys in gathered for key in rank_keys}):
        found.setdefault(owner_of(key), []).append(key)
    return found
