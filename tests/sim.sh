#!/bin/sh
# The library on a simulated kernel, with fixed seeds, for each poller: a seed that breaks a promise
# is printed, and make sim SEED=n POLLER=p shows its run. SIM_FROM, SIM_SEEDS: other seeds.
cd "$(dirname "$0")/.." || exit 1
build=${BUILD:-build} from=${SIM_FROM:-1} seeds=${SIM_SEEDS:-5000}
passed=0 failed=0 skipped=0

case $(uname -s) in
Linux) ;;
*)
    echo "skip sim: it simulates with Linux's headers"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
    ;;
esac
for poller in epoll kqueue poll; do
    if said=$("$build/sim_$poller" seeds "$from" "$seeds" 2>&1); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL sim_$poller"
        echo "$said" | tail -n 40
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
