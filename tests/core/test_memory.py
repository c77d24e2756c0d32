"""Memory kept and guarded: numbers do not change, an allocation beyond the guard is an error, and the limit is lifted again."""

import resource

import pytest
import torch

from pennyweight.core import memory


def test_what_is_freed_stays_until_the_end_and_nests() -> None:
    before = memory._inside  # runners of other tests in this process may still be open
    with memory.kept():
        with memory.kept():
            x = torch.ones(1 << 22)
        assert memory._inside == before + 1 or memory._glibc() is None
        del x
        assert torch.equal(torch.ones(1 << 22), torch.ones(1 << 22))
    assert memory._inside == before


def test_an_allocation_beyond_the_guard_is_an_error_that_is_known_as_such() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.guarded(64 << 20):
        torch.ones(1 << 20)
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            torch.ones(1 << 28)
    assert memory.short(caught.value) and not memory.short(RuntimeError("shapes differ"))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert torch.ones(1 << 20).sum() == 1 << 20


def test_large_pages_hold_the_same_numbers_and_small_tensors_are_left_alone() -> None:
    large = memory.huge(torch.empty(1 << 20)).fill_(3.0)
    assert large.sum() == 3 << 20
    assert memory.huge(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


def test_free_memory_is_a_share_of_what_there_is() -> None:
    assert 0 < memory.free() < 1 << 50
