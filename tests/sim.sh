#!/bin/sh
# The library on a simulated kernel, for each poller: with fixed seeds, and with every call failing
# in its turn. A seed that breaks a promise is printed, and make sim SEED=n POLLER=p shows its run.
# SIM_FROM, SIM_SEEDS: other seeds. With TLS there are a quarter as many of them.
cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build} from=${SIM_FROM:-1} seeds=${SIM_SEEDS:-3000}
passed=0 failed=0 skipped=0

case $(uname -s) in
Linux) ;;
*)
    echo "skip sim: it simulates with Linux's headers"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
    ;;
esac
try() { # program, its arguments
    if said=$("$build/$@" 2>&1); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $*"
        echo "$said" | tail -n 40
    fi
}

for poller in epoll kqueue netbsd poll; do
    try "sim_$poller" seeds "$from" "$seeds"
    [ $poller = netbsd ] || try "sim_$poller" exhaustive
done
if echo '#include <bearssl.h>' | ${CC:-cc} -E - >/dev/null 2>&1; then
    for poller in epoll kqueue netbsd poll; do
        try "sim_${poller}_tls" seeds "$from" $((seeds / 4))
    done
    try sim_epoll_tls exhaustive
else
    echo "skip sim with TLS: no bearssl.h here"
    skipped=$((skipped + 1))
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
