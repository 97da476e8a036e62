"""Faults that NVIDIA's driver reports for a GPU, by their Xid numbers.

https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
"""

from __future__ import annotations

# Faults after which a GPU does not work, or computes wrongly, until it is reset or replaced (slurm/health_prologue.sh has
# the same list).
BROKEN = {
    48: "uncorrectable memory error",
    62: "its controller has halted",
    64: "faulty memory row that could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "unrecovered memory error",
}
# Faults of the application, or faults from which the GPU has recovered.
PASSING = {
    13: "a kernel failed, such as by reading out of bounds",
    31: "a kernel used an address that is not mapped",
    43: "a kernel failed and its process was stopped",
    45: "work was taken off the GPU, mostly after another fault",
    63: "a faulty memory row is remapped; reset the GPU when the run is over",
    94: "a memory error that ended only one process; reset the GPU when the run is over",
}

# The text for a GPU that the driver no longer finds, with or without an Xid.
LOST = "a GPU is lost"


def meaning(number: int) -> str:
    """Return the meaning of an Xid, for any number."""
    return BROKEN.get(number) or PASSING.get(number) or "see NVIDIA's catalog of Xid errors"
