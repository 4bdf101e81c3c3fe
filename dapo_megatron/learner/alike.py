"""Which sequences are padded into one attention call: those whose lengths are alike."""

from collections.abc import Sequence

PADDING_ALLOWED = 1.25  # a group is padded to its longest as long as that costs at most this factor


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Places in `lengths`, grouped, the longest first in each group and among the groups; empty ones are left out."""
    groups: list[list[int]] = []
    real = 0
    for i in sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= PADDING_ALLOWED * (real + lengths[i]):
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            real = lengths[i]
    return groups
