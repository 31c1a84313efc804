"""Finds groups whose sizes have a sum as near as possible to a target, in linear time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple


class _Sums(NamedTuple):
    """The sums of all subsets of a list of sizes.

    The functions below also take `total`, the sum of all sizes in the list, and `period`, a number that
    `nearest_subset` chooses and that is the same for all lists. A few bits describe the sums of any number of sizes,
    because two rules give the other bits:

    - symmetry: s is a sum if and only if total - s is a sum
    - repetition: if s >= `start` and s + period <= total - `start`, then s is a sum if and only if s + period is a sum
    """

    start: int
    bits: int  # bit s is set if s is a sum, for s < start + period


def nearest_subset(sizes: Sequence[int], target: int, limit: int) -> list[int]:
    """Choose some of `sizes` (each >= 1) whose sum is as near as possible to `target`, and return their positions.

    The sum is at least 1 and at most `limit`.

    If two sums are equally near, the smaller sum is used. If several subsets have this sum, the result is the subset
    with the earliest positions. Returns no positions if no sum is possible.
    """
    period = Counter(sizes).most_common(1)[0][0]  # the most frequent size
    totals = [*accumulate(reversed(sizes), initial=0)][::-1]  # totals[i] is the sum of sizes[i:]
    sums = _sums_of_ends(sizes, totals, period)
    bound = min(limit, target + max(sizes))
    remaining = next((s for s in _nearest(target, bound) if _is_sum(s, totals[0], sums[0], period)), 0)
    chosen = []
    for position, size in enumerate(sizes):
        if not remaining:
            break
        if _is_sum(remaining - size, totals[position + 1], sums[position + 1], period):
            chosen.append(position)
            remaining -= size
    return chosen


def _nearest(target: int, bound: int) -> Iterator[int]:
    """Yield the integers from 1 to `bound`, in the order of their distance to `target`.

    If two integers have the same distance, the smaller one comes first.
    """
    for distance in range(max(target, bound - target) + 1):
        for each in dict.fromkeys((target - distance, target + distance)):
            if 1 <= each <= bound:
                yield each


def _sums_of_ends(sizes: Sequence[int], totals: Sequence[int], period: int) -> list[_Sums]:
    """Return the sums of sizes[i:] for each i from 0 to len(sizes).

    Repeated results share one object, which saves memory.
    """
    found = [_Sums(0, 1)]
    known: dict[tuple[_Sums, int], _Sums] = {}
    for size, total in zip(reversed(sizes), totals[:0:-1], strict=True):
        last = found[-1]
        if total < 2 * last.start + size + period:  # the result depends on `total`, too
            found.append(_add(last, total, size, period))
            continue
        if (last, size) not in known:
            known[last, size] = _add(last, total, size, period)
        found.append(known[last, size])
    return found[::-1]


def _add(sums: _Sums, total: int, size: int, period: int) -> _Sums:
    """Return the sums after `size` is added to a list. `sums` and `total` describe the list without `size`."""
    # `regular` is a valid `start` of the new sums (see `_Sums`). The smallest valid `start` is found below.
    regular = max((total + size - period) // 2 + 1, 0)
    if total >= 2 * sums.start + size + period:
        regular = min(regular, sums.start + size)
    length = regular + period
    before = _bits(sums, total, period, length)
    bits = (before | before << size) & _ones(length)
    start = ((bits ^ bits >> period) & _ones(regular)).bit_length()
    return _Sums(start, bits & _ones(start + period))


def _bits(sums: _Sums, total: int, period: int, length: int) -> int:
    """Return the integer with bit s set if s is a sum, for s < `length`."""
    start, bits = sums
    if length <= start + period:
        return bits & _ones(length)
    times = -(-(length - start) // period)
    repeated = (bits >> start) * (_ones(times * period) // _ones(period))
    lower = (bits & _ones(start) | repeated << start) & _ones(max(total // 2 + 1, start + period))
    mirrored = int(f"{lower & _ones(total // 2 + 1):0{total + 1}b}"[::-1], 2) if length > total // 2 else 0
    return (lower | mirrored) & _ones(length)


def _ones(count: int) -> int:
    return (1 << count) - 1


def _is_sum(value: int, total: int, sums: _Sums, period: int) -> bool:
    if not 0 <= value <= total:
        return False
    value = min(value, total - value)
    beyond = value - sums.start
    return bool(sums.bits >> (value if beyond < period else sums.start + beyond % period) & 1)
