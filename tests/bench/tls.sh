#!/bin/sh
# TLS beside openssl s_server and stunnel4, in one run: handshakes a second, full and resumed, and
# downloads; each server's processor time for a handshake or a megabyte, of which "in the kernel"
# is a part. All speak TLS 1.2 with the same suite and key. ROUNDS (3) are interleaved, the best
# counts.
#
# With "latency": how long 50 open streams wait for answers, each asking 10 ms after the last one
# came, while CROWD (30) clients make full handshakes as fast as they can; the server has one core,
# the clients another. Beside stunnel4 and the library with its rationing of handshakes taken out.
# openssl s_server does not take part: it serves one connection at a time.
#
# With "share": what of a saturated server's processor time BearSSL has, and what the kernel, libc
# (BearSSL copies and clears by it too) and the library, in percent by perf: CROWD clients make full
# handshakes with P-256 on one core, the server has the other. "floor" is a blocking loop of accept,
# BearSSL's own calls, close. Medians of ROUNDS.
#
#   BUILD=build sh tests/bench/tls.sh [ec|rsa] [latency|share]

root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(cd "${BUILD:-$root/build}" && pwd) || exit 1
kind=${1:-ec}
works=${2:-speed}
rounds=${ROUNDS:-3}
crowd=${CROWD:-30}
seconds=2
megabytes=256
work=$(mktemp -d) || exit 1
pids=
trap 'kill $pids 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

commands='openssl stunnel4 curl'
[ "$works" = share ] && commands='openssl perf taskset'
for command in $commands; do
    command -v $command >/dev/null || { echo "no $command here"; exit 77; }
done
sh "$root/tests/tools/certs.sh" "$work/certificates" || exit
pem=$work/certificates/$kind.pem key=$work/certificates/$kind.key
[ "$kind" = rsa ] && suite=ECDHE-RSA-AES128-GCM-SHA256 || suite=ECDHE-ECDSA-AES128-GCM-SHA256

listening() { # FILE: the port that a server of ours says
    tries=100
    until grep -q '^listening' "$1" 2>/dev/null; do
        [ $((tries -= 1)) -gt 0 ] || { cat "$1" >&2; exit 1; }
        sleep 0.05
    done
    sed -n 's/^listening on .*:\([0-9]*\)$/\1/p' "$1"
}

wait_for() { # PIDS...: and for nothing else
    [ $# -eq 0 ] || wait "$@" 2>/dev/null
}

answers() { # NAME PORT: waits until it does
    tries=100
    until curl -sk -o "$work/null" "https://127.0.0.1:$2/0"; do
        [ $((tries -= 1)) -gt 0 ] || { echo "$1 does not answer"; exit 1; }
        sleep 0.05
    done
}

free_port() { # one that nobody has now
    "$build/bench/ours_tls" 0 >"$work/probe" &
    probe=$!
    listening "$work/probe"
    kill $probe
    wait $probe 2>/dev/null
}

cc=${CC:-cc}
server_core='' client_core=''
if [ "$works" != speed ] && command -v taskset >/dev/null && [ "$(nproc)" -gt 1 ]; then
    server_core='taskset -c 0' client_core='taskset -c 1'
fi
mkdir -p "$build/bench"
$cc -O2 "$root/tests/bench/servers/ours_tls.c" -o "$build/bench/ours_tls" -lbearssl || exit
$cc -O2 "$root/tests/bench/tls_latency.c" -o "$build/bench/tls_latency" -lbearssl || exit

crowd_begins() { # PORT CLIENTS SECONDS: full handshakes; their ids in $clients
    clients='' i=0
    while [ $((i += 1)) -le "$2" ]; do
        $client_core openssl s_time -connect "127.0.0.1:$1" -new -time "$3" -tls1_2 \
            -cipher $suite >"$work/client.$i" 2>&1 &
        clients="$clients $!"
    done
    [ "$2" -eq 0 ] || sleep 0.5
}

crowd_ends() { # how many it made a second, in $made
    wait_for $clients
    made=$(cat "$work"/client.* 2>/dev/null |
        awk '/real seconds/ { n += $1; t = $4 } END { printf "%.0f", t ? n / t : 0 }')
    rm -f "$work"/client.*
}

median() { # COLUMN, lines on the standard input
    sort -n -k"$1,$1" | awk -v c="$1" '{ v[NR] = $c } END { print v[int((NR + 1) / 2)] }'
}

# ---- share ---------------------------------------------------------------------------------------

share() { # NAME PROGRAM
    $server_core "$build/bench/$2" 0 "$pem" "$key" >"$work/$1" 2>&1 &
    server=$! pids="$pids $!"
    crowd_begins "$(listening "$work/$1")" "$crowd" $((seconds + 1))
    perf record -q -e cpu-clock -F 4000 -o "$work/samples" -p "$server" sleep $seconds \
        >"$work/perf" 2>&1
    recorded=$?
    crowd_ends
    kill "$server"
    [ $recorded -eq 0 ] || { echo "perf cannot record here: $(head -n 1 "$work/perf")"; exit 77; }
    perf report -i "$work/samples" --stdio --sort dso 2>/dev/null |
        awk -v name="$1" -v program="$2" -v made="$made" '
            /^ *[0-9]/ {
                part = $2 ~ /bearssl/ ? 1 : $2 ~ /kernel/ ? 2 : $2 == program ? 4 : 3
                share[part] += $1
            }
            END { print name, made, share[1] + 0, share[2] + 0, share[3] + 0, share[4] + 0 }' \
            >>"$work/shares"
}

if [ "$works" = share ]; then
    $cc -O2 "$root/tests/tools/tls_callbacks.c" -o "$build/bench/tls_callbacks" -lbearssl || exit
    $cc -O2 "$root/tests/bench/servers/raw_tls.c" -o "$build/bench/raw_tls" -lbearssl || exit
    round=0
    while [ $((round += 1)) -le "$rounds" ]; do
        share coroutines ours_tls
        share callbacks tls_callbacks
        share floor raw_tls
    done
    printf '%-12s %12s %9s %8s %6s %8s   medians of %d rounds\n' "" handshakes/s BearSSL kernel \
        libc library "$rounds"
    for server in coroutines callbacks floor; do
        grep "^$server " "$work/shares" >"$work/those"
        printf '%-12s %12s %8s%% %7s%% %5s%% %7s%%\n' $server "$(median 2 <"$work/those")" \
            "$(median 3 <"$work/those")" "$(median 4 <"$work/those")" \
            "$(median 5 <"$work/those")" "$(median 6 <"$work/those")"
    done
    exit
fi

# ---- servers -------------------------------------------------------------------------------------

$server_core "$build/bench/ours_tls" 0 "$pem" "$key" >"$work/ours" 2>&1 &
ours=$! pids="$pids $!"
"$build/bench/ours_tls" 0 >"$work/behind" 2>&1 &
pids="$pids $!"
ours_port=$(listening "$work/ours") behind_port=$(listening "$work/behind")

openssl_port=$(free_port)
truncate -s ${megabytes}M "$work/$((megabytes << 20))"
: >"$work/0"
(cd "$work" && exec openssl s_server -quiet -accept "$openssl_port" -cert "$pem" -key "$key" \
    -tls1_2 -WWW) >/dev/null 2>&1 &
openssl=$! pids="$pids $!"
answers "openssl s_server" "$openssl_port" # and has its port, before another is looked for

stunnel_port=$(free_port)
cat "$key" "$pem" >"$work/both.pem"
cat >"$work/stunnel.conf" <<END
foreground = yes
pid =
debug = 0
sslVersion = TLSv1.2
[tls]
accept = 127.0.0.1:$stunnel_port
connect = 127.0.0.1:$behind_port
cert = $work/both.pem
END
$server_core stunnel4 "$work/stunnel.conf" >/dev/null 2>&1 &
stunnel=$! pids="$pids $!"
answers stunnel "$stunnel_port"

# ---- measuring -----------------------------------------------------------------------------------

ticks() { # PID: in all, and in the kernel
    awk '{ sub(/.*\) /, ""); print $12 + $13, $13 }' "/proc/$1/stat"
}

measure() { # NAME PID COMMAND...: the command says on its last line how much was done
    name=$1 pid=$2
    shift 2
    set -- "$(ticks "$pid")" "$("$@" 2>/dev/null | tail -n 1)" "$(ticks "$pid")"
    echo "$name $1 $2 $3" >>"$work/results"
}

handshakes() { # PORT -new|-reuse: how many, and in which time
    openssl s_time -connect "127.0.0.1:$1" "$2" -time $seconds -tls1_2 -cipher $suite |
        awk '/real seconds/ { n = $1 } END { print n, '$seconds' }'
}

download() { # PORT
    curl -sk --tls-max 1.2 --ciphers $suite -o /dev/null -w '%{size_download} %{time_total}\n' \
        "https://127.0.0.1:$1/$((megabytes << 20))" | awk '{ print $1 / 1048576, $2 }'
}

# ---- latency -------------------------------------------------------------------------------------

# The same server made of a header whose handshakes may take all of a turn.
unrationed() {
    mkdir -p "$work/all/tests/bench/servers"
    sed 's/STEPS_NS = 1000000 /STEPS_NS = 2000000000 /' "$root/tcpserver.h" >"$work/all/tcpserver.h"
    cmp -s "$root/tcpserver.h" "$work/all/tcpserver.h" && { echo "no ration found"; exit 1; }
    cp "$root/tests/bench/servers/ours_tls.c" "$work/all/tests/bench/servers"
    $cc -O2 "$work/all/tests/bench/servers/ours_tls.c" -o "$work/unrationed" -lbearssl || exit
    $server_core "$work/unrationed" 0 "$pem" "$key" >"$work/unrationed.said" 2>&1 &
    pids="$pids $!"
    unrationed_port=$(listening "$work/unrationed.said")
}

latency() { # NAME PORT CLIENTS
    crowd_begins "$2" "$3" $((seconds + 1))
    took=$($client_core "$build/bench/tls_latency" "$2" 50 10 $((seconds * 1000))) || took=failed
    crowd_ends
    echo "$1 $3 $took $made" >>"$work/latencies"
}

if [ "$works" = latency ]; then
    unrationed
    round=0
    while [ $((round += 1)) -le "$rounds" ]; do
        for server in ours unrationed stunnel; do
            eval "port=\$${server}_port"
            for clients_now in 0 "$crowd"; do latency $server "$port" "$clients_now"; done
        done
    done
    printf '%-12s %7s %10s %8s %8s %12s   medians of %d rounds\n' "" clients "median ms" p99 \
        longest handshakes/s "$rounds"
    for server in ours unrationed stunnel; do
        for clients_now in 0 "$crowd"; do
            grep "^$server $clients_now " "$work/latencies" >"$work/those"
            printf '%-12s %7d %10s %8s %8s %12s\n' $server "$clients_now" \
                "$(median 3 <"$work/those")" "$(median 4 <"$work/those")" \
                "$(median 5 <"$work/those")" "$(median 7 <"$work/those")"
        done
    done
    exit
fi

# ---- speed ---------------------------------------------------------------------------------------

round=0
while [ $((round += 1)) -le "$rounds" ]; do
    for server in ours openssl stunnel; do
        eval "port=\$${server}_port pid=\$$server"
        measure "full $server" "$pid" handshakes "$port" -new
        measure "resumed $server" "$pid" handshakes "$port" -reuse
        measure "MB $server" "$pid" download "$port"
    done
done

awk -v tick="$(getconf CLK_TCK)" '
    {
        k = $1 " " $2; n = $5; used = ($7 - $3) / tick; kernel = ($8 - $4) / tick
        if (!(k in rate)) order[++count] = k
        if (n / $6 > rate[k]) rate[k] = n / $6
        if (n && (!(k in cost) || used / n < cost[k])) {
            cost[k] = used / n; inside[k] = used ? kernel / used : 0
        }
    }
    END {
        printf "%-18s %10s %14s %14s\n", "", "a second", "CPU ms each", "in the kernel"
        for (i = 1; i <= count; i++)
            printf "%-18s %10.0f %14.3f %13.0f%%\n", order[i], rate[order[i]],
                1000 * cost[order[i]], 100 * inside[order[i]]
    }' "$work/results" | sort -s -k1,1
