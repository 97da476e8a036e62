import os
import sys
from contextlib import suppress

# `python -m` searches the working directory first, which may belong to somebody else. A checkout is found there.
# One that was deleted is not searched.
with suppress(OSError):
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
        del sys.path[0]

import signal

# No traceback while modules are imported. A command that ignores the signal, as under nohup, goes on ignoring it.
_handler = signal.getsignal(signal.SIGINT)
if _handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from launcher.cli.main import main  # noqa: E402

signal.signal(signal.SIGINT, _handler)
sys.exit(main())
