"""How much of a device pages may take, and how large they are then."""

from fastlora.optim.flat import BLOCK, StateBits, nbytes

KIB, MIB = 2**10, 2**20
MIN_PAGE = 64 * KIB  # below, starting a copy costs more than the copy
MAX_PAGE = 16 * MIB  # from 4 MiB on a copy is as fast as the bus
AUTO_FRAMES = 8


class MemoryBudgetError(ValueError):
    """The budget, or what is free of the device, holds too few pages to work with."""


def auto_budget(state_bytes: int, free_bytes: int | None = None) -> int:
    """A budget for whoever names none.

    Args:
        state_bytes: of the moments.
        free_bytes: of the device; None: do not care.

    Returns:
        Bytes: 8 of the largest pages, but no more than all moments and a quarter of what is free,
        and at least two of the smallest pages.
    """
    budget = min(AUTO_FRAMES * MAX_PAGE, state_bytes)
    if free_bytes is not None:
        budget = min(budget, free_bytes // 4)
    return max(budget, 2 * MIN_PAGE)


def page_elements(numel: int, bits: StateBits, budget: int) -> int:
    """How many elements share a page.

    Args:
        numel: elements of the vector, at least 1.
        bits: of a moment.
        budget: bytes of the device that pages may take.

    Returns:
        As many as fill a quarter of the budget, but 64 KiB to 16 MiB of moments; a multiple of
        256, or `numel` where that fits into one page.

    Raises:
        MemoryBudgetError: the budget holds fewer than two of the smallest pages.
    """
    block_bytes = nbytes(BLOCK, bits)
    blocks = max(MIN_PAGE, min(MAX_PAGE, budget // 4)) // block_bytes
    elements = min(blocks * BLOCK, numel)
    frame_count(budget, nbytes(elements, bits), -(-numel // elements))
    return elements


def frame_count(budget: int, page_bytes: int, pages: int) -> int:
    """How many frames a budget pays for.

    Args:
        budget: bytes.
        page_bytes: of the largest page.
        pages: how many there are.

    Returns:
        No more than there are pages.

    Raises:
        MemoryBudgetError: fewer than two, or than one where one page is all.
    """
    frames = min(pages, budget // max(page_bytes, 1))
    if frames < min(pages, 2):
        raise MemoryBudgetError(
            f"the page budget must be at least {min(pages, 2) * page_bytes} bytes, "
            f"{min(pages, 2)} of {pages} pages of {page_bytes} bytes, got {budget}"
        )
    return frames
