# Sourced by every journey. The commands of README and docs are typed in an empty folder, with an installed launcher on PATH.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# step NAME COMMAND...: run it and print its seconds; where it fails, print its output and end the journey.
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

# refused NAME TEXT COMMAND...: it ends with exit code 2, says TEXT and shows no traceback.
refused() {
  local name=$1 text=$2 code=0
  shift 2
  "$@" >output 2>&1 || code=$?
  [ "$code" = 2 ] || fail "$name: exit code $code instead of 2: $*"
  says "$text"
  ! grep -q Traceback output || fail "$name: a traceback"
  printf '%-28s refused\n' "$name"
}

# says TEXT: the last command has printed it.
says() {
  grep -qF -- "$1" output || fail "the output lacks: $1"
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || fail "waited too long for: $*"
    sleep 0.5
  done
}

# field RUN KEY: a value that `status --json` shows.
field() {
  python -m launcher status "$1" --json | python -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$2"
}

# Both are waited for: a command each time would take the processor from the run.
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
