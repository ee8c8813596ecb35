"""Named random streams: one seed, one independent generator for every purpose."""

from __future__ import annotations

from zlib import crc32

import numpy as np
from numpy.random import Generator

from viisim.errors import InputError


class Streams:
    """The random streams of one seed, made when first asked for.

    A stream depends on the seed and its own name only. So a new stream disturbs no other, and
    runs that differ in policy, rate or number of replicas still draw the same requests (common
    random numbers).
    """

    def __init__(self, seed: int) -> None:
        """Raises InputError for a negative seed."""
        if seed < 0:
            raise InputError(f"seed: {seed} is negative; use a whole number from 0")
        self.seed = seed
        self._generators: dict[str, Generator] = {}

    def __getitem__(self, name: str) -> Generator:
        """The stream called `name`: the same generator each time, going on where it stopped."""
        generator = self._generators.get(name)
        if generator is None:
            # crc32 and not hash(): Python salts the hash of a string anew in every process.
            sequence = np.random.SeedSequence([self.seed, crc32(name.encode())])
            # PCG64 by name: numpy may change what default_rng stands for.
            generator = self._generators[name] = Generator(np.random.PCG64(sequence))
        return generator
