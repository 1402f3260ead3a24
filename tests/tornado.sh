#!/bin/sh
# Whether every test that tests/tornado.txt names exists and is run, and every line is one of those
# that its head allows. Each number counts as a test.

cd "$(dirname "$0")/.." || exit 1
map=tests/tornado.txt
passed=0 failed=0

exists() { # FILE/NAME
    case $1 in
    test_*/*) grep -Fqx "        TEST(${1#*/})," "tests/${1%%/*}.c" ;;
    e2e/*)
        grep -q "^${1#*/}() {" tests/e2e.sh &&
            grep -Eq "^(    )?row .* ${1#*/}( |\$)" tests/e2e.sh
        ;;
    *) return 1 ;;
    esac 2>/dev/null
}

is_proved() { # what a line has behind its number
    case $1 in
    n/a:) [ $# -gt 1 ] && return ;;
    esac
    [ $# -gt 0 ] || return 1
    for test; do
        exists "$test" || { echo "no such test: $test"; return 1; }
    done
}

set -f
while read -r number rest; do
    case $number in '' | '#'*) continue ;; esac
    if expr "$number" : '[TLUG]-[0-9][0-9]*$' >/dev/null && is_proved $rest; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $map: $number $rest"
    fi
done <$map

# The list's gaps are its own: so many numbers of each kind there are.
count() { sed -n "s/^\($1-[0-9]*\) .*/\1/p" $map | sort -u | wc -l; }
for kind in T:151 L:12 U:2 G:20; do
    [ "$(count "${kind%:*}")" -eq "${kind#*:}" ] && continue
    failed=$((failed + 1))
    echo "FAIL $map: $(count "${kind%:*}") numbers ${kind%:*}-, expected ${kind#*:}"
done

echo "$passed passed, $failed failed, 0 skipped"
[ $failed -eq 0 ]
