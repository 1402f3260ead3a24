#!/bin/sh
# Breaks the header in one place at a time, as each patch in tests/mutants says, and wants the tests
# to fail. What is broken is built as make builds it, but unoptimised; the simulated kernel tries it
# first, then the units, those of the broken part before the others, until one fails. A claim that
# fails must fail twice, and each program that killed something must pass on the whole header.
# Arguments: only mutants whose name contains one of them.
# JOBS: how many at a time. MUTANT_SEEDS: seeds a poller.

cd "$(dirname "$0")/.." || exit 1
root=$(pwd) jobs=${JOBS:-2} seeds=${MUTANT_SEEDS:-2000}
certificates=$root/${BUILD:-build}/certificates
case ${BUILD:-build} in /*) certificates=$BUILD/certificates ;; esac
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
export TEST_FIRST=1

units=$(ls tests/test_*.c | sed 's|^tests/||; s|\.c$||')

# What is tried for a mutant of a section, in this order.
programs() {
    own=test_${1%%-*}
    case $1 in
    kqueue-*) echo sim_kqueue sim_netbsd sim_kqueue:exhaustive && return ;;
    poll-*) echo sim_poll poll/test_loop poll/test_stream poll/test_loops && return ;;
    epoll-*) own="test_loop test_loops" ;;
    timers-*) own=test_loop ;;
    stream-*) own="test_stream test_server" ;;
    waiting-*) own="test_stream test_server test_coroutine" ;;
    server-*) own="test_server test_operators" ;;
    esac
    case $1 in
    process-* | proxy-* | sockets-*) echo $own ;;
    tls-*) echo sim_epoll_tls sim_poll_tls sim_epoll_tls:exhaustive $own ;;
    *) echo sim_epoll sim_poll $own sim_kqueue sim_epoll:exhaustive ;;
    esac
    for unit in $units; do case " $own " in *" $unit "*) ;; *) echo "$unit" ;; esac; done
}

copy() { # to which directory
    mkdir -p "$1/tests" "$1/build" && cp -p Makefile tcpserver.h "$1" &&
        cp -pR tests/*.h tests/test_*.c tests/sim tests/tools "$1/tests" || exit 1
    [ ! -d "$certificates" ] || ln -s "$certificates" "$1/build/certificates"
}

# In the directory of the broken header: is the program there, and does it fail? Its last words.
fails() { # program, or program:exhaustive
    program=${1%%:*}
    if ! make -s BUILD=build CFLAGS='-O0 -w' SAN= "build/$program" >make.log 2>&1; then
        echo "does not compile: $program: $(grep -m 1 error make.log)"
        return 2
    fi
    case $1 in
    *:exhaustive) set -- "$program" exhaustive ;;
    sim_*) set -- "$program" seeds 1 "$seeds" ;;
    *)
        timeout -k 5 600 "build/$program" >log 2>&1 </dev/null && return 1
        claim=$(sed -n 's/^FAIL \([A-Za-z0-9_]*\):.*/\1/p' log | head -n 1)
        ! timeout -k 5 120 "build/$program" $claim >log 2>&1 </dev/null || return 1
        echo "$program $claim"
        return 0
        ;;
    esac
    timeout -k 5 120 "build/$@" >log 2>&1 && return 1
    echo "$*: exit $?: $(tail -n 1 log | cut -c 1-200)"
}

mutant() { # name
    dir=$tmp/$1
    copy "$dir"
    cd "$dir" || exit 1
    if ! patch -s -F3 -p1 <"$root/tests/mutants/$1.patch" >patch.log 2>&1; then
        echo "FAIL $1: the patch does not apply"
        cat patch.log
    else
        result=SURVIVED
        for program in $(programs "$1"); do
            words=$(fails "$program")
            case $? in
            0) result="killed by $words" && echo "$program" >"$dir.killer" && break ;;
            2) result=$words && break ;;
            esac
        done
        case $result in killed*) echo "$1: $result" ;; *) echo "FAIL $1: $result" ;; esac
    fi
    cd "$root" && rm -rf "$dir"
}

wanted() { # name, filters
    name=$1
    shift
    [ $# -gt 0 ] || return 0
    for filter; do case $name in *"$filter"*) return 0 ;; esac; done
    return 1
}

worker() { # number, filters
    number=$1 n=0
    shift
    for patch in tests/mutants/*.patch; do
        name=$(basename "$patch" .patch)
        wanted "$name" "$@" || continue
        n=$((n + 1))
        [ $((n % jobs)) -ne "$number" ] || (mutant "$name") 2>&1 | tee -a "$tmp/report.$number"
    done
}

# Only what passes on the whole header can kill.
whole() {
    copy "$tmp/whole.dir"
    cd "$tmp/whole.dir" || exit 1
    for program in $(cat "$tmp"/*.killer 2>/dev/null | sort -u); do
        words=$(fails "$program") && echo "FAIL the whole header: $words" ||
            echo "the whole header: passes $program"
    done
}

if [ "$(uname -s)" != Linux ]; then
    echo "skip mutants: the simulated kernel needs Linux"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
if ! command -v patch >/dev/null || ! command -v timeout >/dev/null; then
    echo "skip mutants: no patch or no timeout"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
start=$(date +%s) number=0
while [ $number -lt "$jobs" ]; do
    worker $number "$@" &
    number=$((number + 1))
done
wait
(whole) | tee "$tmp/report.whole"
failed=$(cat "$tmp"/report.* | grep -c '^FAIL')
passed=$(cat "$tmp"/report.* | grep -c ': killed by\|: passes')
echo "$(cat "$tmp"/report.* | grep -c ': killed by') killed in $(($(date +%s) - start)) s"
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
