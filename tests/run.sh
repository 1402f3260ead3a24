#!/bin/sh
# Runs each test program or script given, shows what it says, and ends with the sum of their last
# lines: "N passed, N failed, N skipped". Exit status 1 when anything failed; with CI set or
# TEST_NO_SKIP=1 also when anything was skipped. RUNNER: a command under which programs run.
# BESIDE: a script that runs at the same time, for one that only compiles.

log=$(mktemp)
trap 'rm -f "$log" "$log.beside"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0 skipped=0

# Where nobody watches, nothing may hang for ever.
limit=
[ -z "${CI:-}" ] || ! command -v timeout >/dev/null || limit='timeout -k 10 900'

add() { # the words of a sum
    passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + $5))
}

judge() { # program, what it said, its exit status
    sum=$(tail -n 1 "$2")
    if ! echo "$sum" | grep -Eqx '[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped'; then
        cat "$2"
        echo "FAIL $1: no sum at its end, exit status $3"
        failed=$((failed + 1))
        return
    fi
    sed '$d' "$2"
    echo "$1: $sum"
    add $sum
    case $sum in
    *' 0 failed'*) [ "$3" -eq 0 ] || {
        echo "FAIL $1: exit status $3"
        failed=$((failed + 1))
    } ;;
    esac
}

beside=${BESIDE:-}
if [ -n "$beside" ]; then
    $limit sh "$beside" >"$log.beside" 2>&1 </dev/null &
    pid=$!
fi

for program; do
    case $program in
    *.sh) $limit sh "$program" >"$log" 2>&1 ;;
    *) $limit ${RUNNER:-} "$program" >"$log" 2>&1 ;;
    esac </dev/null
    judge "$program" "$log" $?
done

if [ -n "$beside" ]; then
    wait "$pid"
    judge "$beside" "$log.beside" $?
fi

status=0
[ "$failed" -eq 0 ] || status=1
if [ "$skipped" -ne 0 ] && [ -n "${CI:-}${TEST_NO_SKIP:-}" ]; then
    echo "skips are failures here: CI or TEST_NO_SKIP is set"
    status=1
fi
echo "$passed passed, $failed failed, $skipped skipped"
exit $status
