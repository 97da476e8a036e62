"""Where runs run: submits, watches and cancels attempts on each backend; open backends.py first."""
