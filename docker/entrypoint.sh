#!/bin/sh
# `docker run launcher plan ...` runs `python -m launcher plan ...`; the programs listed below run directly.
set -eu
case "${1:-}" in
  ray | python | python3 | bash | sh | launcher) exec "$@" ;;
  *) exec python -m launcher "$@" ;;
esac
