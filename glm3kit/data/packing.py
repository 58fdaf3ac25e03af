"""Which rows stand together in one row of the window, so that little of it is padding.

    packs = pack_rows(tokens.lengths, 2048); print(len(tokens), "rows in", len(packs))
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_rows(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Share rows out among packs of at most `capacity` tokens: the longest first, each where it fits best.

    Best-fit decreasing needs at most 11/9 of the fewest packs possible, and one more (Johnson, 1973).
    lengths: tokens of each row, none longer than capacity. Returns the row numbers of each pack.
    Example: pack_rows([3, 5, 2], 5) -> [[1], [0, 2]]
    """
    lengths = np.asarray(lengths)
    assert lengths.max(initial=0) <= capacity
    packs: list[list[int]] = []
    rooms: list[int] = []  # free tokens of packs, each number once, rising
    packs_with: dict[int, list[int]] = {}  # free tokens -> packs
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del rooms[at]
        packs[pack].append(row)
        room -= length
        if room:
            holders = packs_with.setdefault(room, [])
            if not holders:
                insort(rooms, room)
            holders.append(pack)
    return packs
