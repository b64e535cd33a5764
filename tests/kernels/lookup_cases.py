"""What every implementation of find_drafts must satisfy; used compiled, interpreted and on the CPU."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from kernels.prompt_lookup import find_drafts

# What lies in the arena outside of documents: no token of theirs.
NOBODY = -7


@dataclass(frozen=True)
class Lookup:
    """Documents of these lengths over few words, so that runs come again; prefixes of some of their tokens."""

    lengths: tuple[int, ...]
    words: int = 5
    drafts: int = 3
    longest: int = 4
    shortest: int = 2
    prefixes: tuple[int, ...] = ()


CASES = [
    Lookup((0, 1, 2, 3, 4, 5, 6)),
    Lookup((7, 0, 64, 65, 200), words=2),
    Lookup((129, 130, 131), words=9, drafts=7),
    Lookup((50, 51, 52, 0), words=3, longest=2, shortest=1, drafts=1),
    # Several blocks of the kernel, the best match anywhere.
    Lookup((2047, 2048, 2049, 5000), words=40),
    Lookup((3000, 2500), words=12, longest=8),
    Lookup((90, 40, 33, 70), words=4, prefixes=(64, 0, 32, 69)),
    Lookup((3000, 2100, 0), words=30, prefixes=(2060, 2090, 0)),
]


def expected(text: list[int], case: Lookup) -> list[int]:
    """The drafts of one document, word by word; none: []."""
    n = len(text)
    best, place = 0, 0
    for here in range(1, n):
        matched = 0
        while matched < min(case.longest, here) and text[here - 1 - matched] == text[n - 1 - matched]:
            matched += 1
        if matched >= max(best, case.shortest):
            best, place = matched, here
    if not best:
        return []
    going_on = list(text)
    for i in range(case.drafts):
        going_on.append(going_on[place + i])
    return going_on[n:]


def check(case: Lookup, impl: str, device: str) -> None:
    """Against a search word by word, in extents that lie in any order between what belongs to nobody."""
    draw = random.Random(str(case))
    prefixes = case.prefixes or (0,) * len(case.lengths)
    pieces: list[list[int]] = []
    texts = [[draw.randrange(case.words) for _ in range(length)] for length in case.lengths]
    for text, prefix in zip(texts, prefixes, strict=True):
        pieces += [text[:prefix], text[prefix:]]
    places, arena = [0] * len(pieces), [NOBODY] * 5
    for index in draw.sample(range(len(pieces)), len(pieces)):
        places[index] = len(arena)
        arena += pieces[index] + [NOBODY] * 3
    ids = torch.tensor(arena, dtype=torch.int32, device=device)
    before = {}
    if case.prefixes:
        before = {
            "prefix_starts": torch.tensor(places[::2], device=device),
            "prefix_lengths": torch.tensor(prefixes, device=device),
        }
    tokens, counts = find_drafts(
        ids, torch.tensor(places[1::2], device=device), torch.tensor(case.lengths, device=device),
        drafts=case.drafts, max_length=max(case.lengths), longest=case.longest, shortest=case.shortest, impl=impl,
        **before,
    )  # fmt: skip
    wanted = [expected(text, case) for text in texts]
    assert counts.tolist() == [len(drafts) for drafts in wanted]
    assert tokens.tolist() == [drafts or [0] * case.drafts for drafts in wanted]
    assert ids.tolist() == arena
    if max(case.lengths) > 6:
        assert any(wanted), "a case in which nothing is found checks nothing"
