# Sourced by every journey, which runs commands from the README and docs in an empty folder, with an installed launcher on PATH.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# step NAME COMMAND...: run the command and print how long it took; if it fails, print its output and end the journey.
step() {
  local name=$1 code=0 started ended
  shift
  started=$(date +%s.%N)
  "$@" >output 2>&1 || code=$?
  ended=$(date +%s.%N)
  awk -v name="$name" -v a="$started" -v b="$ended" 'BEGIN { printf "%-28s %6.1f s\n", name, b - a }'
  if [ "$code" != 0 ]; then
    fail "$name: exit code $code: $*"
  fi
}

# refused NAME TEXT COMMAND...: check that the command exits with 2 and prints TEXT and no traceback.
refused() {
  local name=$1 text=$2 code=0
  shift 2
  "$@" >output 2>&1 || code=$?
  [ "$code" = 2 ] || fail "$name: exit code $code instead of 2: $*"
  says "$text"
  ! grep -q Traceback output || fail "$name: a traceback"
  printf '%-28s refused\n' "$name"
}

# says TEXT: check that the last command printed TEXT.
says() {
  grep -qF -- "$1" output || fail "the output lacks: $1"
}

# wait_for SECONDS COMMAND...: repeat the command until it succeeds, for this long at most.
wait_for() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || fail "waited too long for: $*"
    sleep 0.5
  done
}

# field RUN KEY: print a value from `status --json`.
field() {
  python -m launcher status "$1" --json | python -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$2"
}

# These two read files, because wait_for repeats them: a launcher command each time would take CPU time from the run.
has_reached() {
  grep -qs "\"trainer/step\": $2," "runs/$1/metrics.jsonl"
}

has_state() {
  grep -qs "\"state\": \"$2\"" "runs/$1/status.json"
}

fail() {
  echo "FAILED: $*"
  [ ! -f output ] || tail -60 output
  exit 1
}
