#!/bin/sh
# `docker run launcher plan ...` is `python -m launcher plan ...`; a program that the image has is run as it is.
set -eu
case "${1:-}" in
  ray | python | python3 | bash | sh | launcher) exec "$@" ;;
  *) exec python -m launcher "$@" ;;
esac
