"""Full-parameter fine-tuning of Hugging Face models with DeepSpeed ZeRO-3."""

import atexit
import gc

__version__ = "0.1.0"

# Number of objects that are created, and not freed, before Python searches them for garbage; its default is 700.
_GC_THRESHOLD = 100_000


def collect_garbage_rarely() -> None:
    """Let Python search this process for garbage rarely, and not at its end.

    Imports, and builds of the data cache, create hundreds of thousands of objects but little garbage; by default, searches take a
    tenth of their time. Not for processes with tensors: garbage could keep them in memory.
    """
    gc.set_threshold(_GC_THRESHOLD)
    end_without_garbage_collection()


def end_without_garbage_collection() -> None:
    """Let Python not search this process for garbage at its end, when all memory is freed anyway.

    The search takes a sixth of the time of `plan`, and half a second of each process that has imported torch.
    """
    # Searches skip frozen objects. Exit functions that were registered earlier are called later.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
