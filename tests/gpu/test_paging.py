"""Paged moments on a real device: the bits of resident ones, and no byte of memory more."""

import gc

import pytest
import torch
from test_optim_paging import (
    WAITS,
    Deaf,
    Paged,
    add_one,
    held,
    make_params,
    make_steps,
    resident,
    same,
)

from fastlora.optim import gpu, reference
from fastlora.optim.arena import StateArena
from fastlora.optim.budget import MemoryBudgetError
from fastlora.optim.devices import CudaDevice, unified
from fastlora.optim.pool import PagePool
from fastlora.optim.sim import POISON

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
MIB = 2**20
SIZES = (1_000_003, 1, 700_000, 256, 3, 900_000)
ELEMENTS = 2**17  # 20 pages of 1 MiB in 32 bits
SLEEP = 10**7  # cycles, some ms


@pytest.fixture
def busy():
    """Another stream at work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.randn(2048, 2048, device=DEVICE)
        for _ in range(100):
            x @ x
    yield
    stream.synchronize()


@pytest.fixture
def allocated():
    """A function: bytes that are taken beyond those before the test."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return lambda: torch.cuda.memory_allocated() - before


def paged(bits, frames, adamw=reference, keep=False, device=None, **arena):
    """As `test_optim_paging.paged`, and whether the arena is locked."""
    work = Paged(bits, make_params(SIZES, DEVICE), ELEMENTS, adamw, **arena)
    pool = PagePool(work.arena, device or CudaDevice(DEVICE), frames * work.arena.sizes[0], keep)
    for step in make_steps(work.params):
        work.scan(pool, step)
    pool.release()
    return work.results(), work.arena.pinned


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize(
    "adamw", [reference, gpu], ids=lambda module: module.__name__.split(".")[-1]
)
@pytest.mark.parametrize("bits", [32, 8])
def test_the_bits_of_resident_moments(bits, adamw):
    expected = resident(bits, make_params(SIZES, DEVICE), adamw)
    for frames in (2, 5, 20):
        for keep in (False, True):
            got, pinned = paged(bits, frames, adamw, keep, pin=True)
            assert pinned
            assert same(got, expected), (frames, keep)


@pytest.mark.parametrize("bits", [32, 8])
def test_memory_that_is_not_locked(bits, tmp_path):
    expected = resident(bits, make_params(SIZES, DEVICE))
    for arena in ({}, {"folder": tmp_path}):
        got, pinned = paged(bits, 5, **arena)
        assert not pinned
        assert same(got, expected), arena


def test_another_stream_is_current():
    expected = resident(32, make_params(SIZES, DEVICE))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for keep in (False, True):
            got, _ = paged(32, 5, keep=keep, pin=True)
            stream.synchronize()
            assert same(got, expected), keep


class Slow(Deaf, CudaDevice):
    """A device one of whose queues is slow, so that whoever does not wait for it is too early."""

    slow = None

    def launch(self, queue, work):
        if queue == self.slow:
            super().launch(queue, lambda: torch.cuda._sleep(SLEEP))
        super().launch(queue, work)


def results_between_owners(deaf_to, slow):
    """Pages after a scan in memory that others write to right before and right after it."""
    device = Slow(DEVICE)
    device.deaf_to, device.slow = deaf_to, slow
    arena = StateArena([16 * MIB] * 6, pin=True)
    for page in range(6):
        arena[page].fill_(10 * page)
    torch.cuda.empty_cache()  # so that all of them get the same memory

    def others():
        parts = [torch.empty(16 * MIB, dtype=torch.uint8, device=DEVICE) for _ in range(3)]
        if slow == "compute":
            torch.cuda._sleep(SLEEP)
        for part in parts:
            part.fill_(POISON)

    others()
    pool = PagePool(arena, device, 3 * 16 * MIB)
    pool.scan(add_one)
    others()
    pool.flush()
    torch.cuda.synchronize()
    return [arena[page].clone() for page in range(6)]


@pytest.mark.parametrize("wait", WAITS)
def test_a_dropped_wait_is_seen(wait):
    waiting, slow = WAITS[wait]
    wanted = [torch.full((16 * MIB,), 10 * p + 1, dtype=torch.uint8) for p in range(6)]
    assert same(results_between_owners(None, slow), wanted)
    assert not same(results_between_owners((waiting, slow), slow), wanted)


@pytest.mark.parametrize("keep", [False, True], ids=["released", "kept"])
def test_memory_is_that_of_the_frames(keep, allocated):
    arena = StateArena([MIB] * 20, pin=True)
    pool = PagePool(arena, CudaDevice(DEVICE), 5 * MIB, keep)
    assert allocated() == 0
    before = torch.cuda.memory_allocated()
    for scans in (1, 2):
        pool.scan(add_one)
        assert torch.cuda.max_memory_allocated() - before == 5 * MIB
        assert allocated() == (5 * MIB if keep else 0)
        pool.flush()
        assert held(arena) == [scans] * 20
    pool.release()
    assert allocated() == 0


@pytest.fixture
def limit():
    """A function: let torch take so many bytes more than it has."""

    def limit(more):
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_is_short(limit, allocated, caplog):
    arena = StateArena([12 * MIB] * 8, pin=True)  # each has a segment of its own
    pool = PagePool(arena, CudaDevice(DEVICE), 8 * 12 * MIB)
    limit(20 * MIB)
    with pytest.raises(MemoryBudgetError, match="room for 4 pages of 12582912 bytes"):
        pool.scan(add_one)
    assert allocated() == 0
    limit(60 * MIB)
    pool.scan(add_one)
    assert allocated() == 0
    assert pool.stats().frames == 4
    assert len(caplog.messages) == 2
    pool.flush()
    assert held(arena) == [1] * 8


@pytest.mark.parametrize("keep", [False, True], ids=["released", "kept"])
def test_a_visit_that_raises(keep, allocated):
    arena = StateArena([MIB] * 20, pin=True)
    pool = PagePool(arena, CudaDevice(DEVICE), 5 * MIB, keep)
    pool.scan(add_one)

    def visit(page, frame):
        torch.cuda._sleep(SLEEP // 10)
        frame.add_(1)
        if page == 12:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pool.scan(visit)
    gc.collect()
    assert allocated() == 0
    assert held(arena) == [1] * 12 + [2] * 8
    pool.scan(add_one)
    pool.release()
    assert held(arena) == [2] * 12 + [3] * 8


def test_copies_run_beside_each_other_and_compute():
    arena = StateArena([16 * MIB] * 12, pin=True)
    pool = PagePool(arena, CudaDevice(DEVICE), 4 * 16 * MIB)
    assert pool.stats().times.together == 0
    for scans in (1, 2):
        before = pool.stats().times
        pool.scan(add_one)
        times = pool.stats().times
        parts = (times.copy_in, times.compute, times.copy_out)
        assert min(parts) > 0
        assert max(parts) <= times.together < 0.95 * sum(parts)
        assert times.together > before.together
        pool.flush()
        assert held(arena) == [scans] * 12


def test_what_a_device_says_of_itself():
    device = CudaDevice(DEVICE)
    assert 0 < device.auto_budget(10**12) <= 128 * MIB
    assert device.auto_budget(MIB) <= MIB
    assert unified(DEVICE) in (False, True)
