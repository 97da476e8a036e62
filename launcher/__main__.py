import os
import sys
from contextlib import suppress

if sys.version_info < (3, 11):  # noqa: UP036, in a clone nothing else refuses
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write(f"Python 3.11 or newer is needed\n  where:  {sys.executable}\n  value:  {version}\n")
    sys.exit(2)

# `python -m` searches the working directory first, which may belong to another user. A checkout is found there.
# A deleted working directory is not searched.
with suppress(OSError):
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
        del sys.path[0]

import signal

# Print no traceback during imports. A command that ignores the signal, as under nohup, keeps ignoring it.
_handler = signal.getsignal(signal.SIGINT)
if _handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from launcher.cli.main import main  # noqa: E402

signal.signal(signal.SIGINT, _handler)
sys.exit(main())
