#!/bin/sh
# What of the header the unit tests and the simulated kernel run, measured by gcc's counters.
# COVERAGE_SEEDS: seeds a poller.
cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build}/coverage seeds=${COVERAGE_SEEDS:-2000} jobs=${JOBS:-2}
for needed in gcc gcov python3; do
    command -v $needed >/dev/null && continue
    echo "skip coverage: no $needed"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
done
# A function in line counts once, not at each of its places.
flags="-O0 -w --coverage -fprofile-update=atomic -Dalways_inline=unused -D_GNU_SOURCE"
flags="$flags -include tests/tools/coverage.h"
units=$(ls tests/test_*.c | sed 's|^tests/||; s|\.c$||')
sims="sim_epoll sim_kqueue sim_netbsd sim_poll"
programs=$sims
for unit in $units; do programs="$programs $unit"; done
programs="$programs poll/test_loop poll/test_loops"

umask 0 # tests of other users write their counters too
mkdir -p "$build"
find "$build" -name '*.gcda' -exec rm -f {} +
targets=
for program in $programs; do targets="$targets $build/$program"; done
make -k -s -j"$jobs" --no-print-directory BUILD="$build" CC=gcc CFLAGS="$flags" SAN= $targets ||
    exit 1
for program in $programs; do
    case $program in
    sim_*)
        timeout 600 "$build/$program" seeds 1 "$seeds" &&
            timeout 600 "$build/$program" exhaustive
        ;;
    *) timeout 900 "$build/$program" ;;
    esac >"$build/log" 2>&1 </dev/null || {
        echo "FAIL $program"
        grep FAIL "$build/log"
    }
    echo "$program: $(tail -n 1 "$build/log")"
done
python3 tests/tools/coverage.py "$build" tcpserver.h tests/coverage.txt
