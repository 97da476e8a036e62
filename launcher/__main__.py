import os
import sys

# `python -m` searches the working directory first, which may belong to somebody else. A checkout is found there.
if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from launcher.cli.main import main

sys.exit(main())
