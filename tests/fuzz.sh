#!/bin/sh
# Fuzzes each tests/fuzz/fuzz_*.c with clang's libFuzzer, SECONDS_EACH (20) each, from seeds that
# are made here or kept in tests/fuzz/corpus, in an order that FUZZ_SEED gives (0: a new one). One
# line for each; the last line is the sum. What makes one fail stays in BUILD/fuzz.
#
#   BUILD=build sh tests/fuzz.sh [PART OF A NAME]

root=$(cd "$(dirname "$0")/.." && pwd)
only=${1:-}
mkdir -p "${BUILD:-$root/build}/fuzz" || exit 1
bin=$(cd "${BUILD:-$root/build}/fuzz" && pwd)
certificates=$bin/certificates
passed=0 failed=0 skipped=0

CLANG=clang
for name in clang-14 clang-16 clang-19 clang-22; do
    command -v $CLANG >/dev/null || CLANG=$name
done

# What real clients send first, behind a byte that says how it is cut.
seeds_hello() { # DIRECTORY
    python3 - "$1" <<'END'
import socket, ssl, sys
for i, protocols in enumerate(([], ["h2", "http/1.1"], ["spdy/1"])):
    context = ssl.create_default_context()
    if protocols: context.set_alpn_protocols(protocols)
    out = ssl.MemoryBIO()
    stream = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    try: stream.do_handshake()
    except ssl.SSLWantReadError: pass
    hello = out.read()
    for cut in (0, 7):
        with open("%s/hello%d_%d" % (sys.argv[1], i, cut), "wb") as file:
            file.write(bytes([cut]) + hello)
END
}

seeds_pem() { # DIRECTORY
    cp "$certificates"/*.pem "$certificates"/*.key "$certificates"/*.der "$1"/
}

seeds_sim() { # DIRECTORY
    cp "$root"/tests/fuzz/corpus/sim/* "$1"/
}

seeds_parsers() { # DIRECTORY
    cp "$root"/tests/fuzz/corpus/parsers/* "$1"/
}

fuzz() { # NAME
    source=$root/tests/fuzz/fuzz_$1.c
    grep -q '^#define TCPSERVER_TLS' "$source" && library=-lbearssl || library=
    $CLANG -g -O1 -Wno-static-in-inline -fsanitize=fuzzer,address,undefined \
        -fno-sanitize-recover=all -DTEST_CERTIFICATES="\"$certificates\"" "$source" \
        -o "$bin/$1" $library || return 1
    rm -rf "$bin/$1.corpus" && mkdir "$bin/$1.corpus"
    "seeds_$1" "$bin/$1.corpus"
    (cd "$bin" && "./$1" -max_total_time="${SECONDS_EACH:-20}" -timeout=10 -max_len=20000 \
        -seed="${FUZZ_SEED:-0}" \
        -print_final_stats=1 "$1.corpus") 2>&1
}

for source in "$root"/tests/fuzz/fuzz_*.c; do
    name=${source##*/fuzz_} name=${name%.c}
    case $name in *"$only"*) ;; *) continue ;; esac
    log=$bin/$name.log
    missing=
    command -v "$CLANG" >/dev/null || missing=clang
    if grep -q '^#define TCPSERVER_TLS' "$source" && [ -z "$missing" ]; then
        echo '#include <bearssl.h>' | $CLANG -E - >/dev/null 2>&1 || missing=bearssl.h
        command -v python3 >/dev/null || missing=python3
        [ -f "$certificates/done" ] || sh "$root/tests/tools/certs.sh" "$certificates" ||
            missing=openssl
    fi
    if [ -n "$missing" ]; then
        echo "skip $name: no $missing here" && skipped=$((skipped + 1))
    elif fuzz "$name" >"$log"; then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        echo "ok $name ($runs runs)" && passed=$((passed + 1))
    else
        echo "FAIL $name" && failed=$((failed + 1))
        tail -n 30 "$log" | sed 's/^/    /'
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && { [ "$skipped" -eq 0 ] || [ -z "${CI:-}${TEST_NO_SKIP:-}" ]; }
