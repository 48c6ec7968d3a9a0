"""The compiled inner loop of LtHash (`lattice.c`), where there is one: built for Linux on x86-64, run where the
processor has AVX2. `setup.py` builds it at installation; without it `lthash` takes the `blake3` package alone, with the
same result.

It is called through ctypes: no header of Python's is needed to build it, one build serves every version, and the
interpreter is not held while it runs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Lanes = npt.NDArray[np.uint16]
Sum = Callable[[Sequence[bytes]], Lanes]
"""Elements to the sum of their lanes, 1,024 of u16."""

ELEMENT_BYTES_MAX: Final = 1024
"""The longest element that the loop takes: one chunk of BLAKE3."""
_LIBRARY = Path(__file__).with_name("lattice.so")


def load() -> Sum | None:
    """The loop, or None where it was not built or cannot run. It takes elements of up to ELEMENT_BYTES_MAX.

    Raises ImportError if what stands there is not the library that belongs here.
    """
    if sys.platform != "linux" or not _LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        runs_here, add_up = library.lattice_runs_here, library.lattice_sum
    except (OSError, AttributeError) as error:
        raise ImportError(f"{_LIBRARY} cannot be loaded: {error}; install stateferry again") from error
    if not runs_here():
        return None
    add_up.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    add_up.restype = None

    def total(elements: Sequence[bytes]) -> Lanes:
        lanes = np.empty(1024, np.uint16)
        sizes = np.fromiter(map(len, elements), np.uint32, len(elements))
        add_up(b"".join(elements), sizes.ctypes.data, len(elements), lanes.ctypes.data)
        return lanes

    return total
