"""Apple's M chips in numbers, for predictions of time and of what fits; approximate, and none measured here.

Sources. GPU cores, memory bandwidth and memory sizes: Apple's technical specifications of each Mac, for the
largest GPU of each name; a smaller bin has less of the first two. GPU clocks: Apple does not publish them;
those of M1 and M2 are philipturner/metal-benchmarks', of M3 and later what public databases report, some 10 %
apart. Operations of a core and cycle: 128 multiply-adds, in half as in single precision (the same source); of
the matrix units of M5, 1024 half-precision operations (T. Zakharko, "Investigating the GPU Neural
Accelerators on Apple A19/M5", 2025).
"""

from dataclasses import dataclass

GIB = 2**30

# macOS gives the GPU two thirds of a small memory and three quarters of a large one; recent versions more
# (107.5 of 128 GiB are reported). `mx.device_info()["max_recommended_working_set_size"]` is the true value.
_SMALL_MEMORY_GIB, _SHARE_OF_SMALL, _SHARE_OF_LARGE = 36, 2 / 3, 3 / 4


@dataclass(frozen=True)
class Chip:
    """One chip with its largest GPU.

    Attributes:
        name: as in "Apple M2 Max", without "Apple".
        gpu_cores: cores of the GPU.
        gpu_ghz: its clock in GHz, approximate.
        gb_per_s: memory bandwidth in 10^9 bytes a second.
        memory_gib: memory sizes that Apple sells with it, in GiB.
        matrix_units: whether its GPU has matrix units ("neural accelerators"), which MLX uses for products of
            matrices and for attention but not for convolutions.
    """

    name: str
    gpu_cores: int
    gpu_ghz: float
    gb_per_s: float
    memory_gib: tuple[int, ...]
    matrix_units: bool = False

    @property
    def fp16_tflops(self) -> float:
        """Peak of the shader cores in 10^12 operations a second, two a multiply-add; fp32 has the same."""
        return self.gpu_cores * 128 * 2 * self.gpu_ghz / 1e3

    @property
    def matmul_tflops(self) -> float:
        """Peak of half-precision products of matrices; `fp16_tflops` where there are no matrix units."""
        return self.gpu_cores * 1024 * self.gpu_ghz / 1e3 if self.matrix_units else self.fp16_tflops

    def working_sets(self) -> dict[int, int]:
        """GiB of memory -> bytes that macOS lets the GPU use by default, for each size that is sold."""
        return {size: working_set(size) for size in self.memory_gib}


def working_set(memory_gib: float) -> int:
    """Bytes that macOS lets the GPU of a Mac of `memory_gib` use unless told otherwise, at a cautious guess.

    ValueError for a memory below 1 GiB.
    """
    if not memory_gib >= 1:
        raise ValueError(f"memory_gib={memory_gib!r} must be at least 1 (GiB)")
    share = _SHARE_OF_SMALL if memory_gib <= _SMALL_MEMORY_GIB else _SHARE_OF_LARGE
    return int(memory_gib * GIB * share)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("M1", 8, 1.278, 68.25, (8, 16)),
        Chip("M1 Pro", 16, 1.296, 200, (16, 32)),
        Chip("M1 Max", 32, 1.296, 400, (32, 64)),
        Chip("M1 Ultra", 64, 1.296, 800, (64, 128)),
        Chip("M2", 10, 1.398, 100, (8, 16, 24)),
        Chip("M2 Pro", 19, 1.398, 200, (16, 32)),
        Chip("M2 Max", 38, 1.398, 400, (32, 64, 96)),
        Chip("M2 Ultra", 76, 1.398, 800, (64, 128, 192)),
        Chip("M3", 10, 1.398, 100, (8, 16, 24)),
        Chip("M3 Pro", 18, 1.398, 150, (18, 36)),
        Chip("M3 Max", 40, 1.398, 400, (36, 48, 64, 96, 128)),
        Chip("M3 Ultra", 80, 1.398, 819, (96, 256, 512)),
        Chip("M4", 10, 1.578, 120, (16, 24, 32)),
        Chip("M4 Pro", 20, 1.578, 273, (24, 48, 64)),
        Chip("M4 Max", 40, 1.578, 546, (36, 48, 64, 128)),
        Chip("M5", 10, 1.6, 153, (16, 24, 32), matrix_units=True),
        Chip("M5 Pro", 20, 1.6, 307, (24, 48, 64), matrix_units=True),
        Chip("M5 Max", 40, 1.6, 614, (36, 48, 64, 128), matrix_units=True),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of a name such as "M2 Max", "m2-max", or MLX's device name "Apple M2 Max".

    ValueError for one that is not in the table.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    wanted = " ".join(words[1:] if words[:1] == ["apple"] else words)
    for chip in CHIPS.values():
        if chip.name.lower() == wanted:
            return chip
    raise ValueError(f"chip {name!r} is not in the table; use one of {', '.join(CHIPS)}")
