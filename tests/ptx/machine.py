"""CTAs that run a program in an order drawn at random, and what one launch adds up to.

The threads of a CTA run block by block: those at the lowest block run it, all others wait for them to come by, so that
branches rejoin. Every so often some warps of a CTA run ahead to the next barrier alone. CTAs take turns of random
length, some far more often than others; a launch of which not all CTAs fit runs them in any order.
"""

import numpy as np

from .memory import HOST, SECTOR, Arena, History, PtxError, Shared, StuckError
from .parse import Kernel, Register
from .program import Program, guard_of

PATIENCE = 3000  # turns without a write to global memory or the end of a CTA, for each CTA that runs


class Cta:
    def __init__(self, machine: "Machine", index: int) -> None:
        kernel = machine.program.kernel
        self.machine, self.index, self.threads = machine, index, kernel.threads
        self.first = index * self.threads
        self.registers = [np.zeros(self.threads, f"u{bits // 8}" if bits > 1 else bool) for bits in kernel.widths]
        self.shared = Shared(machine.shared, machine.program.granule)
        self.known = np.zeros((self.threads, machine.history.ctas), np.int64)
        self.warp_synced = np.zeros(self.threads, np.int64)
        self.direct: list[dict[int, int]] = [{}] * self.threads
        self.l1 = np.zeros(len(machine.arena.data) // SECTOR, np.int64)
        self.block = np.zeros(self.threads, np.int64)  # where each thread is; past the last: gone
        self.waiting = np.zeros(self.threads, bool)
        self.ahead = self.draw()  # the warps whose turn it is
        self.open: list[list] = [[] for _ in range(self.threads // 32)]  # copies that are not committed, by warp
        self.groups: list[list[list]] = [[] for _ in self.open]
        self.at = ""
        self.everyone = np.arange(self.threads)

    def draw(self) -> np.ndarray | None:
        """None: all warps together, else some of them."""
        warps = self.threads // 32
        if warps == 1 or self.machine.random.random() > self.machine.split:
            return None
        some = self.machine.random.permutation(warps) < self.machine.random.integers(1, warps)
        return np.repeat(some, 32)

    # --- what steps ask for

    def spread(self, value: np.ndarray) -> np.ndarray:
        return value if value.ndim else np.full(self.threads, value)

    def lanes(self, mask: np.ndarray | None) -> np.ndarray:
        return self.everyone if mask is None else np.flatnonzero(mask)

    def special(self, name: str) -> np.ndarray:
        if name == "%tid.x":
            return self.everyone
        if name == "%laneid":
            return self.everyone % 32
        known = {"%ctaid.x": self.index, "%nctaid.x": self.machine.history.ctas, "%ntid.x": self.threads}
        known |= dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 0)
        if name not in known:
            raise NotImplementedError(f"register {name}")
        return np.array(known[name])

    def whole_warps(self, mask: np.ndarray | None, members: np.ndarray | None = None) -> None:
        if members is not None and (self.spread(members)[self.lanes(mask)] != 0xFFFFFFFF).any():
            raise NotImplementedError(f"part of a warp; {self.at}")
        if mask is not None and (mask.reshape(-1, 32).any(1) != mask.reshape(-1, 32).all(1)).any():
            raise PtxError(f"lanes are missing; {self.at}")

    def warp_barrier(self, mask: np.ndarray | None) -> None:
        self.whole_warps(mask)
        self.machine.history.now += 1
        self.warp_synced[self.lanes(mask)] = self.machine.history.now

    def issue(self, lanes: np.ndarray, offsets: np.ndarray, data: np.ndarray) -> None:
        for w in np.unique(lanes // 32):
            mine = lanes // 32 == w
            self.open[w].append((lanes[mine], offsets[mine], data[mine]))

    def commit(self, mask: np.ndarray | None) -> None:
        self.whole_warps(mask)
        for w in np.unique(self.lanes(mask) // 32):
            self.groups[w].append(self.open[w])
            self.open[w] = []

    def wait(self, mask: np.ndarray | None, newest: int) -> None:
        self.whole_warps(mask)
        history, memory = self.machine.history, self.shared
        for w in np.unique(self.lanes(mask) // 32):
            while len(self.groups[w]) > newest:
                for lanes, offsets, data in self.groups[w].pop(0):
                    size = data.shape[1]
                    memory.data[offsets[:, None] + np.arange(size)] = data
                    history.now += 1
                    at = memory.granules(offsets, size)
                    memory.written[at], memory.pending[at] = history.now, False
                    memory.writer[at] = (self.first + lanes)[:, None]

    # --- running

    @property
    def gone(self) -> bool:
        return bool((self.block == len(self.machine.program.blocks)).all())

    def turn(self) -> None:
        """One block, or a barrier that all have reached."""
        blocks = self.machine.program.blocks
        able = ~self.waiting & (self.block < len(blocks))
        if not able.any():
            places = np.unique(self.block[self.waiting])
            if len(places) > 1:
                raise StuckError(f"threads of CTA {self.index} wait at different barriers; {self.at}")
            self.machine.history.barrier(self)
            self.block[self.waiting] += 1
            self.waiting[:] = False
            self.ahead = self.draw()
            return
        if self.ahead is not None:
            if not (able & self.ahead).any():
                self.ahead = None  # the others follow
            else:  # now and then the others do a little: those ahead may wait for them
                late = able & ~self.ahead
                able = late if late.any() and self.machine.random.random() < 0.1 else able & self.ahead
        i = int(self.block[able].min())
        mask = able & (self.block == i)
        taking = None if mask.all() else mask
        body, end = blocks[i]
        for step, instruction in body:
            self.at = instruction
            step(self, taking)
        if end is None:
            self.block[mask] = i + 1
            return
        self.at = end
        chosen = mask
        if isinstance(end.guard, Register):
            chosen = mask & guard_of(end)(self)
        kind = end.parts[0]
        if kind == "bar":
            if end.guard is not None:
                raise NotImplementedError(f"a barrier for some; {end.text}")
            self.waiting |= mask
            return
        self.block[mask] = i + 1
        self.block[chosen] = self.machine.program.kernel.labels[end.operands[0].name] if kind == "bra" else len(blocks)


class Machine:
    """One launch: `run` raises what is wrong and leaves the results in `arena.data`.

    parameters: the bytes of each parameter. shared: bytes of dynamic shared memory. resident: all CTAs run side by
    side, else up to `window`. volatile_acquires: volatile loads order what follows them, as the hardware does; without
    it only what PTX promises counts. split: how often some warps run ahead to the next barrier.
    """

    def __init__(
        self,
        kernel: Kernel | Program,
        grid: int,
        parameters: dict[str, bytes],
        arena: Arena,
        shared: int,
        *,
        seed: int = 0,
        resident: bool = False,
        window: int = 3,
        volatile_acquires: bool = True,
        split: float = 0.2,
    ) -> None:
        self.program = kernel if isinstance(kernel, Program) else Program(kernel)
        self.parameters, self.arena, self.shared = parameters, arena, shared
        self.history = History(grid, self.program.kernel.threads)
        self.random = np.random.default_rng(seed)
        self.split, self.volatile_acquires = split, volatile_acquires
        self.window = grid if resident else window
        self.idle = 0
        self.turns = 0
        missing = set(self.program.kernel.parameters) - set(parameters)
        if missing:
            raise ValueError(f"parameters: expected one for each of {sorted(missing)}, got none")

    def progress(self) -> None:
        self.idle = 0

    def run(self) -> None:
        order = self.random.permutation(self.history.ctas).tolist()
        live: list[Cta] = []
        with np.errstate(all="ignore"):
            while live or order:
                while order and len(live) < self.window:
                    live.append(Cta(self, order.pop()))
                # A power of a random number: some CTAs are starved for long, then others
                cta = live[int(len(live) * self.random.random() ** 3)]
                for _ in range(int(self.random.integers(1, 40))):
                    cta.turn()
                    self.turns += 1
                    self.idle += 1
                    if cta.gone:
                        self.leave(cta)
                        live.remove(cta)
                        break
                if self.idle > PATIENCE * len(live) + PATIENCE:
                    raise StuckError(f"nothing has happened for {self.idle} turns; {live[0].at}")
                if self.random.random() < 0.1:
                    self.random.shuffle(live)

    def leave(self, cta: Cta) -> None:
        self.idle = 0
        if any(cta.open) or any(group for groups in cta.groups for group in groups):
            raise PtxError(f"CTA {cta.index} ends with copies on their way")


__all__ = ["HOST", "Arena", "Cta", "Machine"]
