#!/bin/sh
# Runs each test program or script given, shows what it says, and ends with the sum of their last
# lines: "N passed, N failed, N skipped". Exit status 1 when anything failed; with CI set or
# TEST_NO_SKIP=1 also when anything was skipped. RUNNER: a command under which programs run.

log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0 skipped=0

# Where nobody watches, nothing may hang for ever.
limit=
[ -z "${CI:-}" ] || ! command -v timeout >/dev/null || limit='timeout -k 10 900'

add() { # the words of a sum
    passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + $5))
}

for program; do
    case $program in
    *.sh) $limit sh "$program" >"$log" 2>&1 ;;
    *) $limit ${RUNNER:-} "$program" >"$log" 2>&1 ;;
    esac </dev/null
    status=$?
    sum=$(tail -n 1 "$log")
    if ! echo "$sum" | grep -Eqx '[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped'; then
        cat "$log"
        echo "FAIL $program: no sum at its end, exit status $status"
        failed=$((failed + 1))
        continue
    fi
    sed '$d' "$log"
    echo "$program: $sum"
    add $sum
    case $sum in
    *' 0 failed'*) [ "$status" -eq 0 ] || {
        echo "FAIL $program: exit status $status"
        failed=$((failed + 1))
    } ;;
    esac
done

status=0
[ "$failed" -eq 0 ] || status=1
if [ "$skipped" -ne 0 ] && [ -n "${CI:-}${TEST_NO_SKIP:-}" ]; then
    echo "skips are failures here: CI or TEST_NO_SKIP is set"
    status=1
fi
echo "$passed passed, $failed failed, $skipped skipped"
exit $status
