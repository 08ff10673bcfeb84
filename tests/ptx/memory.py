"""Memory that knows, of every granule of it, who wrote and read it last and when, and reports what is not ordered.

Time is one counter of all memory instructions of a launch. An access happens before another one of thread u if it was
made by u, or before a barrier of the CTA that u has passed, or is known to u: `Cta.known[u, c]` is the time up to which
everything that CTA c did is ordered before u, and `Cta.direct` holds the same for single threads. Barriers join what
the threads of a CTA know; a release leaves with the address what its thread knows, an acquire picks it up.

Of the readers of a granule the last two threads are remembered, and of its writers the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes
HOST = -1


class PtxError(Exception):
    """What the interpreter will not let pass."""


class RaceError(PtxError):
    """Two accesses to the same memory, one of them a write, that nothing orders."""


class StaleError(PtxError):
    """A load that L1 may serve with what was there before."""


class OutsideError(PtxError):
    """An access outside what was allocated, or misaligned."""


class StuckError(PtxError):
    """Threads that wait for what does not come."""


@dataclass
class Message:
    """What a release leaves with an address."""

    known: np.ndarray  # [CTAs]
    direct: dict[int, int] = field(default_factory=dict)  # thread: time


def newest(*times: dict[int, int]) -> dict[int, int]:
    """The latest time of every thread; never changed in place, for threads share it."""
    joined: dict[int, int] = {}
    for each in times:
        for thread, time in each.items():
            joined[thread] = max(time, joined.get(thread, 0))
    return joined


class Memory:
    """Bytes with their history. Offsets are into `data`."""

    def __init__(self, size: int, granule: int, where: str) -> None:
        self.data = np.full(-(-size // 64) * 64 + 64, 0xA5, dtype=np.uint8)
        self.size, self.granule, self.where = size, granule, where
        count = len(self.data) // granule
        self.written = np.zeros(count, dtype=np.int64)
        self.writer = np.full(count, HOST, dtype=np.int32)
        self.strong = np.zeros(count, dtype=bool)  # the last write was atomic or volatile
        self.read = np.zeros(count, dtype=np.int64)
        self.reader = np.full(count, HOST, dtype=np.int32)
        self.read2 = np.zeros(count, dtype=np.int64)  # by another thread than `reader`
        self.reader2 = np.full(count, HOST, dtype=np.int32)
        self.pending = np.zeros(count, dtype=bool)  # cp.async on its way
        self.messages: dict[int, Message] = {}

    def granules(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """[accesses, granules] indices."""
        first = offsets // self.granule
        if size <= self.granule:
            return first[:, None]
        return first[:, None] + np.arange(size // self.granule)

    def name(self, offset: int) -> str:
        return f"{self.where} + {offset}"

    def gather(self, offsets: np.ndarray, dtype: np.dtype, vector: int) -> list[np.ndarray]:
        view = self.data.view(dtype)
        at = offsets // dtype.itemsize
        return [view[at + i] for i in range(vector)]

    def scatter(self, offsets: np.ndarray, values: Sequence[np.ndarray]) -> None:
        view = self.data.view(values[0].dtype)
        at = offsets // values[0].dtype.itemsize
        for i, value in enumerate(values):
            view[at + i] = value


class Arena(Memory):
    """Global memory: the tensors of a launch at their addresses, nothing between them."""

    def __init__(self, spans: list[tuple[int, int, str]], granule: int) -> None:
        """spans: first address, bytes and name of what may be accessed; they may overlap."""
        merged: list[list] = []
        for start, size, _ in sorted(span for span in spans if span[1]):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self.starts = np.array([m[0] for m in merged], dtype=np.int64)
        self.ends = np.array([m[1] for m in merged], dtype=np.int64)
        self.spans = spans
        places, end = [], 0
        for start, stop in merged:
            places.append(end + start % 256)  # alignment and sectors as in the real memory
            end = -(-(places[-1] + stop - start) // 256) * 256 + 256
        self.places = np.array(places, dtype=np.int64)
        super().__init__(end, granule, "global")

    def regions(self) -> list[tuple[int, int, int]]:
        """(address, place in `data`, bytes) of all."""
        return [(int(a), int(p), int(e - a)) for a, p, e in zip(self.starts, self.places, self.ends, strict=True)]

    def offsets(self, addresses: np.ndarray, size: int) -> np.ndarray:
        addresses = addresses.view(np.int64)
        i = np.searchsorted(self.starts, addresses, side="right") - 1
        if (i < 0).any() or (addresses + size > self.ends[i]).any():
            bad = addresses[(i < 0) | (addresses + size > self.ends[np.maximum(i, 0)])][0]
            nearest = min(self.spans, key=lambda s: min(abs(s[0] - int(bad)), abs(s[0] + s[1] - int(bad))))
            raise OutsideError(
                f"global access of {size} bytes at {int(bad) - nearest[0]} of {nearest[2]}[{nearest[1]}]"
            )
        if (addresses % size).any():
            raise OutsideError(f"global access of {size} bytes is misaligned")
        return addresses - self.starts[i] + self.places[i]

    def name(self, offset: int) -> str:
        i = int(np.searchsorted(self.places, offset, side="right")) - 1
        address = int(self.starts[i]) + offset - int(self.places[i])
        for start, size, name in self.spans:
            if start <= address < start + size:
                return f"{name} + {address - start}"
        return super().name(offset)


class Shared(Memory):
    BASE = 1024  # an address that is no offset by chance

    def __init__(self, size: int, granule: int) -> None:
        super().__init__(size, granule, "shared")

    def offsets(self, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - self.BASE
        if (offsets < 0).any() or (offsets + size > self.size).any():
            raise OutsideError(f"shared access of {size} bytes at {int(offsets.max())} of {self.size}")
        if (offsets % size).any():
            raise OutsideError(f"shared access of {size} bytes is misaligned")
        return offsets


class History:
    """The rules: what each access of some threads of one CTA must be ordered after."""

    def __init__(self, ctas: int, threads: int) -> None:
        self.now = 1
        self.ctas, self.threads = ctas, threads

    def unordered(self, cta, lanes: np.ndarray, by: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Whether an access `by` a thread at `time` [lanes, granules] is not ordered before the lane's."""
        known = cta.known[lanes[:, None], np.maximum(by, 0) // self.threads]
        mine = by == (cta.first + lanes)[:, None]
        suspect = (time > known) & ~mine
        if suspect.any():
            same_warp = by // 32 == ((cta.first + lanes) // 32)[:, None]
            suspect &= ~(same_warp & (time <= cta.warp_synced[lanes][:, None]))
            for i, j in zip(*np.nonzero(suspect), strict=True):
                if cta.direct[lanes[i]].get(int(by[i, j]), 0) >= time[i, j]:
                    suspect[i, j] = False
        return suspect

    def fail(self, kind: type, what: str, memory: Memory, cta, lane: int, granule: int, by: int) -> None:
        other = "the host" if by < 0 else f"thread {by % self.threads} of CTA {by // self.threads}"
        place = memory.name(int(granule) * memory.granule)
        raise kind(f"{what} at {place}: thread {lane} of CTA {cta.index} and {other}; {cta.at}")

    def check(self, what: str, memory: Memory, cta, lanes, at, by, time, excused=None, same=None) -> None:
        """same: of the granules, whether they hold already what is written; asked only if they are in question."""
        if not time.any():
            return
        bad = self.unordered(cta, lanes, by, time)
        if excused is not None:
            bad &= ~excused
        if same is not None and bad.any():
            bad &= ~same()
        if bad.any():
            i, j = (int(x[0]) for x in np.nonzero(bad))
            self.fail(RaceError, what, memory, cta, int(lanes[i]), at[i, j], int(by[i, j]))

    def on_read(self, memory: Memory, cta, lanes: np.ndarray, offsets: np.ndarray, size: int, strong: bool) -> None:
        self.now += 1
        at = memory.granules(offsets, size)
        written, writer = memory.written[at], memory.writer[at]
        excused = memory.strong[at] if strong else None
        self.check("read and unordered write", memory, cta, lanes, at, writer, written, excused)
        if memory.pending[at].any():
            i, j = (int(x[0]) for x in np.nonzero(memory.pending[at]))
            self.fail(RaceError, "read before the copy has arrived", memory, cta, int(lanes[i]), at[i, j], HOST)
        if strong:
            return
        me = np.broadcast_to((cta.first + lanes)[:, None], at.shape)
        moved = memory.reader[at] != me
        memory.read2[at] = np.where(moved, memory.read[at], memory.read2[at])
        memory.reader2[at] = np.where(moved, memory.reader[at], memory.reader2[at])
        memory.read[at] = self.now
        memory.reader[at] = me
        several = memory.reader[at] != me  # other threads of this instruction read the same
        if several.any():
            memory.read2[at[several]] = self.now
            memory.reader2[at[several]] = me[several]

    def on_write(
        self,
        memory: Memory,
        cta,
        lanes: np.ndarray,
        offsets: np.ndarray,
        size: int,
        strong: bool,
        *,
        copied: bool = False,
        values: Sequence[np.ndarray] = (),
    ) -> None:
        """values: of a plain store. Threads that write the same value to one place do no harm, and Triton's do."""
        self.now += 1
        at = memory.granules(offsets, size)
        excused = memory.strong[at] if strong else None

        def same() -> np.ndarray:
            new = np.stack(values, axis=1).view(np.uint8).reshape(len(offsets), size)
            equal = memory.data[offsets[:, None] + np.arange(size)] == new
            return equal.reshape(len(offsets), at.shape[1], -1).all(axis=2)

        by, time = memory.writer[at], memory.written[at]
        self.check("two unordered writes", memory, cta, lanes, at, by, time, excused, same if values else None)
        for reader, read in ((memory.reader, memory.read), (memory.reader2, memory.read2)):
            self.check("write and unordered read", memory, cta, lanes, at, reader[at], read[at])
        memory.written[at] = self.now
        memory.writer[at] = (cta.first + lanes)[:, None]
        memory.strong[at] = strong
        memory.pending[at] = copied

    def through_l1(self, memory: Memory, cta, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        """A load that may be served by the CTA's L1: what another CTA has written since the line came is not in it."""
        sector = offsets // SECTOR
        came = cta.l1[sector]
        at = memory.granules(offsets, size)
        other = (memory.writer[at] // self.threads != cta.index) & (memory.writer[at] >= 0)
        stale = other & (memory.written[at] > came[:, None]) & (came > 0)[:, None]
        if stale.any():
            i, j = (int(x[0]) for x in np.nonzero(stale))
            what = "load that L1 may serve with an older value"
            self.fail(StaleError, what, memory, cta, int(lanes[i]), at[i, j], int(memory.writer[at[i, j]]))
        cta.l1[sector] = np.where(came > 0, came, self.now)

    # --- what orders

    def release(self, memory: Memory, cta, lanes: np.ndarray, offsets: np.ndarray, keeps: bool) -> None:
        """keeps: a read-modify-write, which leaves in place what was released before."""
        for lane, offset in zip(lanes.tolist(), offsets.tolist(), strict=True):
            direct = {**cta.direct[lane], cta.first + lane: self.now}
            message = Message(cta.known[lane].copy(), direct)
            if keeps and offset in memory.messages:
                before = memory.messages[offset]
                np.maximum(message.known, before.known, out=message.known)
                message.direct = newest(before.direct, direct)
            memory.messages[offset] = message

    def acquire(self, memory: Memory, cta, lanes: np.ndarray, offsets: np.ndarray) -> None:
        for lane, offset in zip(lanes.tolist(), offsets.tolist(), strict=True):
            if (message := memory.messages.get(offset)) is not None:
                np.maximum(cta.known[lane], message.known, out=cta.known[lane])
                cta.direct[lane] = newest(cta.direct[lane], message.direct)

    def barrier(self, cta) -> None:
        self.now += 1
        cta.known[:] = cta.known.max(axis=0)
        cta.known[:, cta.index] = self.now
        distinct = {id(direct): direct for direct in cta.direct if direct}
        cta.direct = [newest(*distinct.values())] * self.threads
        self.now += 1
