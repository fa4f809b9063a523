"""Paged moments: the bits of resident ones whatever the order of the device, and nothing lost."""

import gc
import os
import re
import warnings
import weakref
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from fastlora.optim import arena as arenas
from fastlora.optim import devices, reference
from fastlora.optim.arena import StateArena
from fastlora.optim.budget import MemoryBudgetError, auto_budget, frame_count, page_elements
from fastlora.optim.devices import HostDevice, Times
from fastlora.optim.flat import Flat, Step, adamw_hypers, moments, nbytes
from fastlora.optim.pool import PagePool
from fastlora.optim.sim import POISON, SimDevice, SimEvent, SimOutOfMemory

pytestmark = pytest.mark.usefixtures("one_thread")

KIB, MIB = 2**10, 2**20
SCHEDULES = range(20)
FRAMES = [2, 5, 10, 19, 20]
PAGES = 20
SCANS = 3
ELEMENTS = 256  # of a page: one block
# page borders at the first element of a parameter, inside, and pages of several parameters
FLAT = Flat((700, 1, 67, 256, 3, 1500, 0, 37, 2400))
# waits that are needed: who waits, and for whom
WAITS = {
    "copy in for the owner before": ("in", "compute"),
    "copy in for the copy out": ("in", "out"),
    "visit for the copy in": ("compute", "in"),
    "copy out for the visit": ("out", "compute"),
    "owner after for the copy out": ("compute", "out"),
}


@cache
def randoms(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g) for size in sizes]


def make_params(sizes=FLAT.sizes, device="cpu"):
    return [x.to(device, copy=True) for x in randoms(sizes, 0)]


def make_steps(params):
    """Steps with gradients of their own; one parameter has none in the second."""
    flat = Flat(tuple(p.numel() for p in params))
    for t in range(1, SCANS + 1):
        grads = [x.to(p) for x, p in zip(randoms(flat.sizes, t), params, strict=True)]
        if t == 2:
            grads[3] = None
        hypers = [adamw_hypers(lr, (0.9, 0.99), 1e-8, 0.1, False, t) for lr in (1e-2, 3e-2)]
        rows = [i % 2 for i in range(len(params))]
        yield Step(flat, params, grads, rows, torch.tensor(hypers))


def resident(bits, params, adamw=reference):
    """What one span that holds everything gives: parameters, then moments."""
    numel = sum(p.numel() for p in params)
    buffer = torch.zeros(nbytes(numel, bits), dtype=torch.uint8, device=params[0].device)
    for step in make_steps(params):
        adamw.adamw(adamw.prepare(step), 0, moments(buffer, numel, bits))
    return [*params, *moments(buffer, numel, bits).tensors()]


@cache
def expected(bits):
    return resident(bits, make_params())


class Paged:
    """Parameters, and their moments in pages."""

    def __init__(self, bits, params, elements=ELEMENTS, adamw=reference, **arena):
        numel = sum(p.numel() for p in params)
        self.bits, self.params, self.elements, self.adamw = bits, params, elements, adamw
        self.counts = [min(elements, numel - i) for i in range(0, numel, elements)]
        self.arena = StateArena([nbytes(n, bits) for n in self.counts], **arena)

    def scan(self, pool, step):
        prepared = self.adamw.prepare(step)

        def visit(page, frame):
            here = moments(frame, self.counts[page], self.bits)
            self.adamw.adamw(prepared, page * self.elements, here)

        pool.scan(visit)

    def results(self):
        pages = [
            moments(self.arena[page], count, self.bits).tensors()
            for page, count in enumerate(self.counts)
        ]
        return [*self.params, *map(torch.cat, zip(*pages, strict=True))]


def paged(bits, device, frames, keep=False, flush=False):
    """As `resident`, through a pool."""
    work = Paged(bits, make_params())
    pool = PagePool(work.arena, device, frames * work.arena.sizes[0], keep)
    for step in make_steps(work.params):
        work.scan(pool, step)
        if flush:
            pool.flush()
    pool.release()
    return work.results()


def same(got, wanted):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))


class Counting(HostDevice):
    """Frames, and how many bytes of them there are."""

    def __init__(self):
        self.used = self.peak = 0

    def alloc(self, nbytes):
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return super().alloc(nbytes)

    def free(self, memory):
        self.used -= memory.numel()


class Deaf:
    """A device that one kind of wait is lost on, put before the class of a device."""

    deaf_to = None

    def record(self, queue):
        event = super().record(queue)
        event.queue = queue
        return event

    def wait(self, queue, event):
        if (queue, event.queue) != self.deaf_to:
            super().wait(queue, event)


class DeafSim(Deaf, SimDevice):
    pass


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("keep", [False, True], ids=["released", "kept"])
@pytest.mark.parametrize("frames", FRAMES)
def test_any_schedule_has_the_bits_of_resident_moments(bits, keep, frames):
    page = nbytes(ELEMENTS, bits)
    for seed in SCHEDULES:
        device = SimDevice(frames * page, seed)
        assert same(paged(bits, device, frames, keep, flush=seed % 2 == 1), expected(bits)), seed
        device.synchronize()
        assert (device.peak, device.used) == (frames * page, 0)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("keep", [False, True], ids=["released", "kept"])
def test_on_the_host(bits, keep):
    for frames in FRAMES:
        device = Counting()
        assert same(paged(bits, device, frames, keep), expected(bits))
        assert (device.peak, device.used) == (frames * nbytes(ELEMENTS, bits), 0)


# kept frames are given back after all is done, so that the owner after finds nothing
@pytest.mark.parametrize(
    ("wait", "keep"),
    [(wait, keep) for wait in WAITS for keep in (False, True) if not keep or "after" not in wait],
)
def test_a_dropped_wait_is_seen(wait, keep):
    # of few frames that are kept few are taken, of many that are not few are used twice
    frames = 10 if keep else 5
    caught = 0
    for seed in SCHEDULES:
        device = DeafSim(frames * nbytes(ELEMENTS, 32), seed)
        device.deaf_to = WAITS[wait]
        caught += not same(paged(32, device, frames, keep), expected(32))
    assert caught == len(SCHEDULES)


def test_these_are_all_waits():
    kinds = Counter()

    class Listening(DeafSim):
        def wait(self, queue, event):
            kinds[queue, event.queue] += 1
            super().wait(queue, event)

    for keep in (False, True):
        paged(32, Listening(5 * nbytes(ELEMENTS, 32)), 5, keep)
    # a queue need not wait for itself
    assert {kind for kind in kinds if kind[0] != kind[1]} == set(WAITS.values())


def add_one(page, frame):
    frame.add_(1)


def make_pool(device, frames=5, keep=False, pages=PAGES, page_bytes=64):
    arena = StateArena([page_bytes] * pages)
    return arena, PagePool(arena, device, frames * page_bytes, keep)


def held(arena):
    """The value of each page, all of whose bytes are equal."""
    values = [arena[page].unique().tolist() for page in range(len(arena))]
    assert all(len(value) == 1 for value in values)
    return [value[0] for value in values]


def test_pages_of_different_sizes():
    sizes = [100, 3, 0, 64, 7, 100]
    arena = StateArena(sizes)
    seen = {}

    def visit(page, frame):
        seen[page] = frame.numel()
        frame.fill_(page + 1)

    device = SimDevice(300)
    pool = PagePool(arena, device, 300)
    pool.scan(visit)
    pool.flush()
    assert [seen[page] for page in range(6)] == sizes
    for page, size in enumerate(sizes):
        assert arena[page].data_ptr() % 64 == 0
        assert torch.equal(arena[page], torch.full((size,), page + 1, dtype=torch.uint8))


def test_scans_go_forward_and_backward():
    order = []
    _, pool = make_pool(HostDevice(), pages=3)
    for _ in range(3):
        pool.scan(lambda page, frame: order.append(page))
    assert order == [0, 1, 2, 2, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("frames", FRAMES)
def test_kept_frames_are_hit(frames):
    arena, pool = make_pool(HostDevice(), frames, keep=True)
    for _ in range(5):
        pool.scan(add_one)
    stats = pool.stats()
    # as many as there are frames, at the beginning of each scan but the first
    assert stats.hits == 4 * frames
    assert (stats.pages, stats.frames, stats.page_bytes, stats.scans) == (20, frames, 64, 5)
    assert stats.misses == 100 - stats.hits
    assert stats.evictions == stats.misses - frames
    assert (stats.bytes_in, stats.bytes_out) == (64 * stats.misses, 64 * stats.evictions)
    pool.flush()
    assert held(arena) == [5] * 20
    assert pool.stats().bytes_out == 64 * stats.misses
    pool.flush()  # there is nothing more
    assert pool.stats().bytes_out == 64 * stats.misses


def test_released_frames_are_not_hit():
    arena, pool = make_pool(HostDevice())
    for _ in range(2):
        pool.scan(add_one)
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.evictions) == (0, 40, 30)
    assert stats.bytes_in == stats.bytes_out == 40 * 64
    assert held(arena) == [2] * 20


def test_what_was_written_to_the_arena_is_read_after_discard():
    device = SimDevice(5 * 64)
    arena, pool = make_pool(device, keep=True)
    pool.scan(add_one)
    pool.discard()
    for page in range(20):
        arena[page].fill_(10 + page)
    pool.scan(add_one)
    pool.release()
    device.synchronize()
    assert held(arena) == [11 + page for page in range(20)]
    assert device.used == 0


def test_one_page_needs_one_frame():
    device = SimDevice(64)
    arena, pool = make_pool(device, frames=1, pages=1)
    for _ in range(2):
        pool.scan(add_one)
    pool.flush()
    assert held(arena) == [2]
    assert device.peak == 64


def test_no_page_needs_nothing():
    arena, pool = make_pool(SimDevice(0), pages=0)
    pool.scan(add_one)
    pool.release()
    assert len(arena) == 0
    assert pool.stats().frames == 0


def test_half_the_frames_if_memory_is_short(caplog):
    device = SimDevice(12 * 64)
    arena, pool = make_pool(device, frames=20)
    for _ in range(2):
        pool.scan(add_one)
    pool.flush()
    assert held(arena) == [2] * 20
    assert pool.stats().frames == 10
    assert device.used == 0
    # once, since fewer frames remain
    assert caplog.messages == ["out of memory with 20 frames of 64 bytes, trying 10"]


@pytest.mark.parametrize("frames", [2, 3, 20])
def test_too_little_memory_for_half_the_frames(frames, caplog):
    fewer = max(frames // 2, 2)
    device = SimDevice(frames * 64)
    arena, pool = make_pool(device, frames)
    pool.scan(add_one)
    pool.flush()
    others = device.alloc((frames - fewer + 1) * 64)
    for take in (pool.open, lambda: pool.scan(add_one)):
        with pytest.raises(MemoryBudgetError, match=f"room for {fewer} pages of 64 bytes"):
            take()
        device.synchronize()
        assert device.used == others.numel()
        assert held(arena) == [1] * 20
    device.free(others)
    pool.scan(add_one)
    pool.flush()
    assert held(arena) == [2] * 20
    assert pool.stats().frames == frames


def test_open_takes_the_frames_once():
    device = SimDevice(5 * 64)
    arena, pool = make_pool(device)
    for _ in range(2):
        pool.open()
        assert device.used == 5 * 64
    pool.scan(add_one)
    assert device.used == 0
    pool.flush()
    assert held(arena) == [1] * 20


@pytest.mark.parametrize("keep", [False, True], ids=["released", "kept"])
@pytest.mark.parametrize("failing", [0, 7, 19])
def test_a_visit_that_raises_on_the_host(keep, failing):
    device = Counting()
    arena, pool = make_pool(device, keep=keep)
    pool.scan(add_one)

    def visit(page, frame):
        if page == failing:
            raise ZeroDivisionError
        frame.add_(1)

    with pytest.raises(ZeroDivisionError):
        pool.scan(visit)
    assert device.used == 0
    # the second scan goes backward
    done = [1] * (failing + 1) + [2] * (19 - failing)
    assert held(arena) == done
    pool.scan(add_one)
    pool.release()
    assert held(arena) == [value + 1 for value in done]


@pytest.mark.parametrize("keep", [False, True], ids=["released", "kept"])
@pytest.mark.parametrize("launched", [False, True])
def test_a_visit_that_raises_while_the_device_is_at_work(keep, launched):
    class Failing(SimDevice):
        countdown = 0

        def launch(self, queue, work):
            self.countdown -= queue == "compute"
            fails = queue == "compute" and self.countdown == 0
            if launched or not fails:
                super().launch(queue, work)
            if fails:
                raise ZeroDivisionError

    for seed in SCHEDULES:
        device = Failing(5 * 64, seed)
        arena, pool = make_pool(device, keep=keep)
        pool.scan(add_one)
        device.countdown = 8
        with pytest.raises(ZeroDivisionError):
            pool.scan(add_one)
        done = 7 + launched
        assert held(arena) == [1] * (20 - done) + [2] * done
        assert device.used == 0
        pool.scan(add_one)
        pool.release()
        assert held(arena) == [2] * (20 - done) + [3] * done


def test_a_device_that_fails_is_left_with_nothing():
    class Broken(Counting):
        broken = False

        def synchronize(self):
            if self.broken:
                raise RuntimeError("broken")

    device = Broken()
    _, pool = make_pool(device, keep=True)
    pool.scan(add_one)
    device.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        pool.release()
    assert device.used == 0


def test_stats_for_people():
    class Timed(HostDevice):
        def times(self):
            return Times(0.003, 0.002, 0.001, 0.0042)

    _, pool = make_pool(Timed(), keep=True, page_bytes=MIB)
    for _ in range(2):
        pool.scan(add_one)
    text = re.sub(r"waited \d+ ms", "waited 0 ms", str(pool.stats()))
    assert text == (
        "5 frames for 20 pages of 1.05 MB (pageable); 2 scans, 12% hits, 36.7 MB in, 31.5 MB out, "
        "host waited 0 ms; device: 3.0 ms in, 2.0 ms compute, 1.0 ms out, 4.2 ms together"
    )
    assert pool.stats().stall_seconds > 0
    assert "device" not in str(make_pool(HostDevice())[1].stats())


def test_overlapping_times_count_once():
    assert devices._covered([]) == 0
    assert devices._covered([(5, 6), (0, 2), (1, 4), (2, 3)]) == 5


# --- the simulated device ------------------------------------------------------------------------


def test_simulated_memory_is_poisoned_while_nobody_has_it():
    device = SimDevice(8)
    memory = device.alloc(8)
    with pytest.raises(SimOutOfMemory, match="1 bytes must be free, got 0 of 8"):
        device.alloc(1)
    assert (memory == POISON).all()
    device.synchronize()
    memory.zero_()
    device.free(memory)
    device.synchronize()
    assert (memory == POISON).all()
    assert (device.used, device.peak) == (0, 8)


def test_simulated_queues_keep_their_order_and_no_other():
    seen = set()
    for seed in range(100):
        order = []
        device = SimDevice(0, seed)
        for name in ("in 1", "out 1", "in 2", "out 2"):
            device.launch(name.split()[0], lambda name=name, order=order: order.append(name))
        device.synchronize()
        assert order.index("in 1") < order.index("in 2")
        assert order.index("out 1") < order.index("out 2")
        seen.add(tuple(order))
    assert len(seen) == 6


def test_a_simulated_deadlock_is_an_error():
    device = SimDevice(0)
    device.wait("in", SimEvent())
    with pytest.raises(RuntimeError, match=r"got a deadlock with \{'in': 1, 'compute': 0"):
        device.synchronize()


# --- the arena -----------------------------------------------------------------------------------


def test_memory_is_given_back():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("memory is read from /proc")

    def cycle():
        _, pool = make_pool(HostDevice(), keep=True, page_bytes=32 * KIB)
        pool.scan(add_one)
        pool.release()

    def cycles(count):
        for _ in range(count):
            cycle()
        gc.collect()
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = cycles(100)
    assert cycles(1000) - before < MIB


@pytest.mark.parametrize("bits", [32, 8])
def test_pages_in_a_file(bits, tmp_path):
    work = Paged(bits, make_params(), folder=tmp_path)
    assert not work.arena.pinned
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) in maps.read_text()
    pool = PagePool(work.arena, HostDevice(), 5 * work.arena.sizes[0])
    for step in make_steps(work.params):
        work.scan(pool, step)
        assert not list(tmp_path.iterdir())  # whoever kills us leaves nothing behind
    assert same(work.results(), expected(bits))
    del work, pool
    gc.collect()
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def test_a_file_needs_room(tmp_path):
    size = 2**60
    with pytest.raises(OSError, match=rf"{size} bytes needed, \d+ free: '{tmp_path}'"):
        StateArena([size], folder=tmp_path)
    with pytest.raises(FileNotFoundError):
        StateArena([1], folder=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="pin must be False for pages in a file"):
        StateArena([1], pin=True, folder=tmp_path)


class Locked(list):
    """How many bytes were locked each time, and weak references to them."""

    def __init__(self):
        super().__init__()
        self.memory = []


@pytest.fixture
def locking(monkeypatch):
    """Lock memory as a driver would that has 1000 bytes."""
    zeros, locked = torch.zeros, Locked()

    def fake(count, *, dtype, pin_memory=False):
        memory = zeros(count, dtype=dtype)
        if pin_memory:
            if sum(locked) + count > 1000:
                raise RuntimeError("no more\nsome more words")
            locked.append(count)
            locked.memory.append(weakref.ref(memory.untyped_storage()))
        return memory

    monkeypatch.setattr(torch, "zeros", fake)
    monkeypatch.setattr(arenas, "CHUNK", 256)
    return locked


def test_memory_is_locked_in_chunks(locking):
    arena = StateArena([100, 100, 100, 10, 300, 1, 1], pin=True)
    assert locking == [256, 192, 320, 128]
    assert arena.pinned
    assert [arena[page].numel() for page in range(7)] == [*arena.sizes]
    pool = PagePool(arena, HostDevice(), 900)
    pool.scan(add_one)
    assert held(arena) == [1] * 7
    assert pool.stats().pinned


def test_memory_that_cannot_be_locked(locking, monkeypatch):
    left = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator,
        "empty_host_cache",
        lambda: left.append([memory() for memory in locking.memory]),
        raising=False,
    )
    with pytest.warns(RuntimeWarning, match="only 600 of 1200 bytes") as caught:
        work = StateArena([200] * 6, pin=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message).endswith(": no more")
    assert left == [[None] * 3]  # torch can give back what nobody holds
    assert not work.pinned
    pool = PagePool(work, HostDevice(), 400)
    pool.scan(add_one)
    assert held(work) == [1] * 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be locked here")
def test_memory_cannot_be_locked_without_a_gpu():
    with pytest.warns(RuntimeWarning, match="could be locked in memory"):
        assert not StateArena([64], pin=True).pinned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not StateArena([64]).pinned


# --- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numel", "bits", "budget", "elements"),
    [
        (10**9, 32, 128 * MIB, 2 * MIB),  # 16 MiB
        (10**9, 32, 10**12, 2 * MIB),  # never more
        (10**9, 32, 8 * MIB, 256 * KIB),  # a quarter
        (10**9, 32, 128 * KIB, 8 * KIB),  # never less
        (10**9, 8, 128 * MIB, 16 * MIB // 520 * 256),  # scales are of whole blocks
        (10**9, 8, 128 * KIB, 126 * 256),
        (10_000, 32, 10**12, 10_000),  # no more than there are
        (1, 8, 128 * KIB, 1),
        (100, 32, 800, 100),  # less than the smallest page is enough for all
    ],
)
def test_page_elements(numel, bits, budget, elements):
    assert page_elements(numel, bits, budget) == elements


@pytest.mark.parametrize(
    ("numel", "bits", "budget", "message"),
    [
        (10**6, 32, 128 * KIB - 1, "at least 131072 bytes, 2 of 123 pages of 65536 bytes, got 131"),
        (10**6, 8, 100_000, "at least 131040 bytes, 2 of 32 pages of 65520 bytes, got 100000"),
        (10**6, 32, 0, "got 0"),
        (10**6, 32, -5, "got -5"),
        (100, 32, 799, "at least 800 bytes, 1 of 1 pages of 800 bytes, got 799"),
    ],
)
def test_a_budget_that_is_too_small(numel, bits, budget, message):
    with pytest.raises(MemoryBudgetError, match=message):
        page_elements(numel, bits, budget)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_budget_is_kept(bits):
    for budget in range(128 * KIB, 130 * MIB, MIB // 3):
        elements = page_elements(10**8, bits, budget)
        page = nbytes(elements, bits)
        assert elements % 256 == 0
        assert 64 * KIB - 520 < page <= 16 * MIB
        assert 2 <= frame_count(budget, page, 10**8 // elements) <= budget // page


def test_a_pool_checks_its_budget():
    with pytest.raises(MemoryBudgetError, match="at least 128 bytes, 2 of 20 pages of 64 bytes"):
        make_pool(HostDevice(), frames=1)


def test_auto_budget():
    assert auto_budget(10**9) == 128 * MIB
    assert auto_budget(20 * MIB) == 20 * MIB
    assert auto_budget(10**9, 100 * MIB) == 25 * MIB
    assert auto_budget(1000) == auto_budget(10**9, 0) == 128 * KIB
    assert HostDevice().auto_budget(10**9) == 128 * MIB
    device = SimDevice(100 * MIB)
    device.alloc(60 * MIB)
    assert device.auto_budget(10**9) == 10 * MIB
