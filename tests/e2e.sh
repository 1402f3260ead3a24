#!/bin/sh
# End to end: the examples, built by their own compile lines, against clients that were written
# elsewhere and a few of tests/tools. One line for each claim; the last line is the sum.
#
#   CC=clang BUILD=build sh tests/e2e.sh [PART OF A NAME]

root=$(cd "$(dirname "$0")/.." && pwd)
only=${1:-}
mkdir -p "${BUILD:-$root/build}/e2e" || exit 1
bin=$(cd "${BUILD:-$root/build}/e2e" && pwd)
work=$(mktemp -d) || exit 1
passed=0 failed=0 skipped=0
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# ---- rows ----------------------------------------------------------------------------------------

# Runs a function in a directory and a process of its own; what it started ends with it. The file
# "note" there is shown with the name.
row() { # NAME FUNCTION [ARGUMENT...]
    name=$1
    shift
    case $name in *"$only"*) ;; *) return ;; esac
    rm -rf "$work/row" && mkdir "$work/row"
    (
        pids=
        trap 'end $pids' EXIT
        trap 'exit 130' INT TERM
        cd "$work/row" && "$@"
    ) </dev/null >"$work/log" 2>&1
    case $? in
    0) echo "ok $name$(sed 's/.*/ (&)/' "$work/row/note" 2>/dev/null)" && passed=$((passed + 1)) ;;
    77) echo "skip $name: $(tail -n 1 "$work/log")" && skipped=$((skipped + 1)) ;;
    130) exit 130 ;;
    *) echo "FAIL $name" && failed=$((failed + 1)) && sed 's/^/    /' "$work/log" ;;
    esac
}

end() {
    for one; do kill -CONT "$one" && kill "$one"; done 2>/dev/null
    for one; do wait_for 5 is_gone "$one" || kill -9 "$one"; done 2>/dev/null
}

fail() {
    echo "$*"
    for file in err answers; do [ ! -s $file ] || { echo "$file:" && head -n 20 $file; }; done
    exit 1
}

need() { # COMMAND...
    for one; do
        command -v "$one" >/dev/null || {
            echo "no $one here"
            exit 77
        }
    done
}

wait_for() { # SECONDS COMMAND...: until the command succeeds
    tries=$(($1 * 20))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $((tries -= 1)) -gt 0 ] || return 1
        sleep 0.05
    done
}

is_gone() { # a process that only waits to be collected has ended too
    case $(ps -o stat= -p "$1" 2>/dev/null) in '' | Z*) return 0 ;; esac
    return 1
}

background() {
    "$@" &
    pid=$!
    pids="$pids $pid"
}

serve() { # PROGRAM [ARGUMENT...]: starts it; sets pid and port
    background "$@" >out 2>err
    wait_for 10 grep -q '^listening on ' out || fail "$* does not listen"
    port=$(sed -n 's/^listening on .*:\([0-9]*\)$/\1/p' out)
}

bounded() { # SECONDS COMMAND...
    if command -v timeout >/dev/null; then timeout "$@"; else shift && "$@"; fi
}

client() { bounded 30 "$bin/client" 127.0.0.1 "$port"; }

same() { # WHAT EXPECTED-TEXT: compares the file "answers"
    printf "$2" | cmp -s - answers || fail "$1: not the answer that was expected"
}

contains() { grep -qF -- "$1" answers || fail "no answer says: $1"; }

answers_hello() {
    printf 'hello\n' | client >answers || return 1
    grep -q hello answers
}

cpu_ticks() { awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$1/stat"; }

# ---- each example --------------------------------------------------------------------------------

compiles_by_its_comment() { # NAME
    line=$(sed -n 's/^ \*     \(cc .*\)$/\1/p' "$root/examples/$1.c" | head -n 1)
    [ -n "$line" ] || fail "examples/$1.c has no compile line"
    ln -sfn "$root/examples" "$bin/examples"
    cd "$bin" && rm -f "$1" || exit 1
    eval "${CC:-cc} ${line#cc}" || fail "$line"
    [ -x "$1" ] || fail "$line: made no $1"
}

builds_tool() {
    ${CC:-cc} -O2 "$root/tests/tools/$1.c" -o "$bin/$1" || fail "tests/tools/$1.c"
}

answers() { # NAME TEXT EXPECTED
    serve "$bin/$1" 0
    printf "$2" | client >answers || fail "no answer"
    same "$1" "$3"
}

answers_like() { # NAME PATTERN
    serve "$bin/$1" 0
    printf 'hello\n' | client >answers || fail "no answer"
    grep -q "$2" answers && ! grep -qv "$2" answers || fail "$1: not the line expected"
}

refused() { # EXPECTED-PART COMMAND...: ends with 1 and says why
    part=$1
    shift
    bounded 10 "$@" >answers 2>&1
    status=$?
    [ $status -eq 1 ] || fail "$*: exit status $status"
    contains "$part"
}

client_connects_by_name() {
    serve "$bin/echo" 0
    printf 'hello\n' | bounded 30 "$bin/client" localhost "$port" >answers || fail "no answer"
    same client 'hello\n'
}

bad_input_is_refused() {
    serve "$bin/echo" 0
    for one in echo echo_callbacks chat redis prefork sockets http service upgrade; do
        refused 70000 "$bin/$one" 70000
        refused "$port: Address already in use" "$bin/$one" "$port"
    done
    refused 'usage' "$bin/client"
    refused 'resolve no.such.host' "$bin/client" no.such.host "$port"
    refused '70000' "$bin/client" 127.0.0.1 70000
    end "$pid"
    refused 'Connection refused' "$bin/client" 127.0.0.1 "$port"
}

# ---- streams -------------------------------------------------------------------------------------

nc_half_closes() {
    need nc
    nc -h 2>&1 | grep -q -- '-N' || { echo "nc has no -N" && exit 77; }
    serve "$bin/echo" 0
    printf 'a\nb\n' | bounded 10 nc -N 127.0.0.1 "$port" >answers
    same nc 'a\nb\n'
}

socat_half_closes() {
    need socat
    serve "$bin/echo" 0
    printf 'a\nb\n' | bounded 10 socat -t 5 - "TCP:127.0.0.1:$port" >answers
    same socat 'a\nb\n'
}

eight_mebibytes_come_back() { # SERVER
    serve "$bin/$1" 0
    awk 'BEGIN { for (i = 0; i < 131072; i++) printf "%063d\n", i }' >sent
    client <sent >answers || fail "the client failed"
    cmp sent answers || exit 1
}

crowd_is_served() { # SERVER MOST-BYTES-EACH
    [ -r /proc/self/smaps_rollup ] || { echo "no /proc/PID/smaps_rollup" && exit 77; }
    ulimit -n "$(ulimit -Hn)"
    serve "$bin/$1" 0
    bounded 60 "$bin/crowd" "$port" 15000 10 1 "$pid" >answers || fail "$(cat answers)"
    each=$(sed -n 's/^bytes-each //p' answers)
    echo "$(sed -n 's/^connections //p' answers) connections, $each bytes each" >note
    [ "$each" -le "$2" ] || fail "$each bytes each, at most $2 allowed"
    [ ! -s err ] || fail "it logged"
    answers_hello || fail "no service afterwards"
}

flood_is_held_back() { # SERVER
    [ -r /proc/self/smaps_rollup ] || { echo "no /proc/PID/smaps_rollup" && exit 77; }
    serve "$bin/$1" 0
    bounded 60 "$bin/flood" "$port" 512 "$pid" || fail "the flood"
}

calls() { awk -v names=" $* " 'index(names, " " $NF " ") { n += $4 } END { print n + 0 }' trace; }

traced() { # SERVER BURSTS DEPTH: how many calls of each kind that takes
    need strace
    strace -c -o /dev/null true 2>/dev/null || { echo "strace may not trace here" && exit 77; }
    serve strace -D -c -o trace "$bin/$1" 0
    "$bin/crowd" "$port" 1 "$2" "$3" >answers || fail "the client failed"
    kill "$pid"
    wait_for 5 grep -q total trace || fail "strace says nothing"
    receives=$(calls read readv recvfrom recvmsg)
    sends=$(calls write writev sendto sendmsg)
    waits=$(calls epoll_wait epoll_pwait epoll_pwait2 poll ppoll)
    controls=$(calls epoll_ctl)
    echo "$receives receives, $sends sends, $waits waits, $controls epoll_ctl" >note
}

near() { # NAME COUNT EXPECTED: at most 2 % more, and no fewer
    [ "$2" -ge "$3" ] && [ "$2" -le $(($3 + $3 / 50)) ] || fail "$1: $2, expected $3"
}

three_calls_a_request() { # SERVER
    traced "$1" 10000 1
    near receives "$receives" 10000
    near sends "$sends" 10000
    near waits "$waits" 10000
    [ "$controls" -le 6 ] || fail "$controls calls of epoll_ctl"
}

two_calls_a_burst() { # SERVER
    traced "$1" 2000 16
    near receives "$receives" 2000
    near sends "$sends" 2000
    [ "$controls" -le 6 ] || fail "$controls calls of epoll_ctl"
}

# ---- redis ---------------------------------------------------------------------------------------

cli() { bounded 10 redis-cli -p "$port" "$@" >answers || fail "redis-cli $*"; }

redis_cli_session() {
    need redis-cli
    serve "$bin/redis" 0
    cli PING && same PING 'PONG\n'
    cli SET greeting 'hello there' && same SET 'OK\n'
    cli GET greeting && same GET 'hello there\n'
    cli GET nothing && same 'GET of nothing' '\n'
    cli INCR greeting && contains 'ERR value is not an integer or out of range'
    cli SET number 9223372036854775807 && same SET 'OK\n'
    cli INCR number && contains 'ERR increment or decrement would overflow'
    cli INCR fresh && same INCR '1\n'
    cli MSET a 1 b 2 && same MSET 'OK\n'
    cli MSET a 1 b && contains "ERR wrong number of arguments for 'mset' command"
    cli MGET a b c && same MGET '1\n2\n\n'
    cli EXISTS a b c a && same EXISTS '3\n'
    cli DEL a b c && same DEL '2\n'
    cli DBSIZE && same DBSIZE '3\n'
    cli SET a 1 EX 10 && contains 'ERR syntax error'
    cli foo bar && contains "ERR unknown command 'foo', with args beginning with: 'bar' "
    cli GET && contains "ERR wrong number of arguments for 'get' command"
    cli COMMAND DOCS && cli COMMAND COUNT && same 'COMMAND COUNT' '14\n'
    cli FLUSHALL && cli DBSIZE && same DBSIZE '0\n'
}

redis_keeps_binary_values() {
    need redis-cli
    serve "$bin/redis" 0
    awk 'BEGIN { for (i = 0; i < 65536; i++) printf "%c%c\r\n", 0, i % 256 }' >value
    bounded 10 redis-cli -p "$port" -x SET value <value >answers && same SET 'OK\n'
    { cat value && echo; } >expected
    cli --raw GET value && cmp expected answers || fail "a value changed"
}

redis_benchmark_runs() {
    need redis-benchmark
    serve "$bin/redis" 0
    bounded 40 redis-benchmark -p "$port" -t ping,set,get,incr,mset -n 200000 -c 50 -P 16 -q \
        >raw 2>&1 || fail "exit status $?"
    tr '\r' '\n' <raw >answers
    [ "$(grep -c 'requests per second' answers)" -eq 6 ] || fail "not six results"
    ! grep -Ei 'error|warning' answers || fail "it complained"
}

redis_cli_pipe_loads() {
    need redis-cli
    serve "$bin/redis" 0
    awk 'BEGIN { for (i = 0; i < 100000; i++)
        printf "*3\r\n$3\r\nSET\r\n$10\r\nkey:%06d\r\n$6\r\n%06d\r\n", i, i }' |
        bounded 30 redis-cli -p "$port" --pipe >answers || fail "exit status $?"
    contains 'errors: 0, replies: 100000'
    cli DBSIZE && same DBSIZE '100000\n'
    cli GET key:099999 && same GET '099999\n'
}

redis_takes_inline_commands() {
    serve "$bin/redis" 0
    printf 'PING\r\nset a b\n\r\n  GET   a \r\nnope\r\nQUIT\r\nPING\r\n' | client >answers
    printf '+PONG\r\n+OK\r\n$1\r\nb\r\n' >expected
    printf "%s\r\n+OK\r\n" "-ERR unknown command 'nope', with args beginning with: " >>expected
    cmp expected answers || fail "inline commands"
}

# The server ends it: this client's input does not.
broken_frame() { # FRAME ERROR
    printf "$1" >&3
    bounded 5 "$bin/client" 127.0.0.1 "$port" <endless >answers || fail "$1: no end"
    same "$1" "+PONG\r\n-ERR Protocol error: $2\r\n"
}

redis_refuses_broken_frames() {
    serve "$bin/redis" 0
    mkfifo endless
    exec 3<>endless
    broken_frame '*1\r\n$4\r\nPING\r\n*x\r\n' 'invalid multibulk length'
    broken_frame 'PING\r\n*2000000000\r\n' 'invalid multibulk length'
    broken_frame 'PING\r\n*1\r\n:4\r\n' "expected '\$', got ':'"
    broken_frame 'PING\r\n*1\r\n$-5\r\n' 'invalid bulk length'
    broken_frame 'PING\r\n*2\r\n$4\r\nPING\r\n$99999999999\r\n' 'invalid bulk length'
    answers_hello || fail "no service afterwards"
}

# ---- http ----------------------------------------------------------------------------------------

http_answers_curl() {
    need curl
    serve "$bin/http" 0
    base=http://127.0.0.1:$port
    bounded 10 curl -s -d hello "$base/a" "$base/b?c=d" >answers || fail "curl"
    same POST 'POST /a, 5 bytes\nPOST /b?c=d, 5 bytes\n'
    bounded 10 curl -sI "$base/" >answers && contains 'HTTP/1.1 200 OK' || fail "HEAD"
    [ "$(bounded 10 curl -s "$base/large" | wc -c)" -eq 8388608 ] || fail "/large"
    printf 'GET / HTTP/1.0\r\n\r\n' | client >answers && contains 'Connection: close'
    contains 'GET /, 0 bytes'
}

http_refuses() { # REQUEST STATUS
    printf "$1" | client >answers || fail "no answer to $1"
    contains "HTTP/1.1 $2 "
}

http_refuses_what_it_must() {
    serve "$bin/http" 0 1
    http_refuses 'GET\r\n\r\n' 400
    http_refuses 'GET / HTTP/1.1\r\n\r\n' 400
    http_refuses 'GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n' 400
    http_refuses 'GET / HTTP/1.1\r\nHost: a\r\ncontent-length: 65537\r\n\r\n' 413
    http_refuses 'GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n' 501
    http_refuses "GET /$(printf '%0700d' 0) HTTP/1.1\r\nHost: a\r\n\r\n" 414
    http_refuses "GET / HTTP/1.1\r\nHost: a\r\nCookie: $(printf '%08200d' 0)\r\n\r\n" 431
    mkfifo endless
    exec 3<>endless
    printf 'GET / HTTP/1.1\r\nHo' >&3
    bounded 10 "$bin/client" 127.0.0.1 "$port" <endless >answers || fail "no end"
    contains 'HTTP/1.1 408 '
}

descriptors() { ls "/proc/$server/fd" | wc -l; }

has_descriptors() { [ "$(descriptors)" -ge "$1" ]; }

# Its own count of connections is no measure: it goes on reading what the kernel had for it.
slow_clients_are_gone() { # SLOWHTTPTEST'S OPTIONS
    need slowhttptest curl
    [ -d /proc/self/fd ] || { echo "no /proc" && exit 77; }
    serve "$bin/http" 0 2
    server=$pid
    before=$(descriptors)
    start=$(date +%s)
    background slowhttptest "$@" -c 100 -r 200 -i 1 -p 3 -l 60 -u "http://127.0.0.1:$port/large" \
        >slow 2>&1
    wait_for 10 has_descriptors $((before + 20)) || fail "the slow clients do not get in"
    tries=0
    while has_descriptors $((before + 1)); do
        [ $((tries += 1)) -le 150 ] || fail "$(descriptors) descriptors, $before before"
        bounded 5 curl -s "http://127.0.0.1:$port/" >answers && same curl 'GET /, 0 bytes\n'
        sleep 0.1
    done
    [ $(($(date +%s) - start)) -ge 2 ] || fail "they were gone before their deadline"
    echo "$tries others served meanwhile" >note
}

# ---- TLS -----------------------------------------------------------------------------------------

serve_tls() { # PROGRAM, an example or a tool: with a certificate of its own
    need openssl
    source=$root/examples/$1.c
    [ -f "$source" ] || source=$root/tests/tools/$1.c
    echo '#include <bearssl.h>' | ${CC:-cc} -E - >/dev/null 2>&1 || {
        echo "no BearSSL here"
        exit 77
    }
    ${CC:-cc} "$source" -o "$bin/$1" -lbearssl || fail "$source"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
        -subj /CN=localhost -keyout key.pem -out certificate.pem || fail "no certificate"
    serve "$bin/$1" 0 certificate.pem key.pem
}

renegotiation_is_refused() {
    serve_tls tls_echo
    mkfifo typed
    exec 3<>typed
    bounded 30 openssl s_client -connect "127.0.0.1:$port" -tls1_2 <typed >answers 2>&1 &
    pids="$pids $!"
    echo hello >&3
    wait_for 10 grep -qx hello answers || fail "no answer"
    echo R >&3
    wait_for 10 grep -q 'no renegotiation' answers || fail "not refused"
}

page_comes_to() { # COMMAND...: which prints what it got; @ stands for the address
    need "$1"
    serve_tls https
    set -- "$(echo "$*" | sed "s#@#https://127.0.0.1:$port/#")"
    bounded 60 sh -c "$1" >answers 2>err || fail "$1: exit $?"
    contains 'Hello over TLSv1.2.'
}

curl_verifies_and_agrees_on_http_1_1() {
    need curl
    serve_tls https
    curl -sv --cacert certificate.pem "https://localhost:$port/" >answers 2>err || fail "curl"
    contains 'Server name: localhost'
    contains 'ALPN: http/1.1'
    ! curl -s "https://localhost:$port/" >answers 2>&1 || fail "trusted although nobody vouches"
}

sessions_resume() {
    serve_tls https
    for turn in first second; do
        [ $turn = first ] && with='-sess_out session' || with='-sess_in session'
        { printf 'GET / HTTP/1.1\r\nHost: x\r\n\r\n' && sleep 1; } |
            bounded 10 openssl s_client -quiet $with -connect "127.0.0.1:$port" -tls1_2 \
                -servername localhost >answers 2>err
    done
    contains 'Session: resumed'
}

certificates_are_renewed() {
    serve_tls https
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=renewed -keyout key.pem \
        -out certificate.pem
    kill -HUP "$pid"
    renewed() {
        bounded 5 openssl s_client -connect "127.0.0.1:$port" </dev/null >answers 2>err
        grep -q 'CN = renewed' answers
    }
    wait_for 10 renewed || fail "the old certificate is still shown"
    echo 'no certificate' >certificate.pem
    kill -HUP "$pid"
    wait_for 10 grep -q 'no PEM object in the file; the old certificate stays' err || fail "silent"
    renewed || fail "the server lost its certificate"
}

plain_http_is_dropped() {
    need curl
    serve_tls https
    curl -s "http://127.0.0.1:$port/" >answers && fail "answered"
    curl -sk "https://127.0.0.1:$port/" >answers
    contains 'Hello over TLSv1.2.'
}

old_and_new_versions_are_told_so() {
    serve_tls https
    for version in 1_1 1_3; do
        openssl s_client -connect "127.0.0.1:$port" -tls$version -cipher ALL:@SECLEVEL=0 \
            </dev/null >answers 2>&1
        contains 'alert protocol version'
    done
}

nmap_grades_a() {
    need nmap
    serve_tls https
    nmap -p "$port" --script ssl-enum-ciphers 127.0.0.1 >answers 2>err
    contains 'least strength: A'
    contains 'cipher preference: server'
    ! grep -Eq 'TLSv1\.[01]|SSLv| - [B-F]$' answers || fail "something weak"
}

testssl_finds_nothing() {
    need testssl
    serve_tls https
    bounded 300 testssl -U --quiet --color 0 --warnings off "127.0.0.1:$port" >answers 2>err
    [ "$(grep -c 'not vulnerable (OK)' answers)" -ge 10 ] || fail "not tested"
    ! grep -i vulnerable answers | grep -qv 'not vulnerable' || fail "vulnerable"
}

gnutls_talks() {
    need gnutls-cli
    serve_tls tls_echo
    { echo hello && sleep 1; } |
        bounded 10 gnutls-cli --x509cafile certificate.pem -p "$port" localhost >answers 2>err
    contains 'The certificate is trusted'
    grep -qx hello answers || fail "no answer"
}

python_echoes_megabytes_and_unwraps() {
    need python3
    serve_tls tls_echo
    bounded 60 python3 - "$port" >answers 2>err <<'END' || fail "python"
import socket, ssl, sys, threading
context = ssl.create_default_context(cafile="certificate.pem")
context.check_hostname = False
stream = context.wrap_socket(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
line, lines = b"x" * 999 + b"\n", 3000
writer = threading.Thread(target=lambda: [stream.sendall(line) for _ in range(lines)])
writer.start()
got = b""
while len(got) < len(line) * lines:
    more = stream.recv(65536)
    if not more: break
    got += more
writer.join()
assert got == line * lines, len(got)
stream.unwrap()
print("whole")
END
    contains whole
}

# Its own memory for each, the sockets' is the kernel's.
idle_tls_connections_are_small() { # PROGRAM BYTES
    need python3
    serve_tls "$1"
    bounded 120 python3 - "$port" "$pid" 1000 >answers 2>err <<'END' || fail "python"
import socket, ssl, sys, time
port, pid, count = (int(word) for word in sys.argv[1:])
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
def resident():
    with open("/proc/%d/status" % pid) as status:
        return [int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS")][0]
def talk(stream):
    stream.sendall(b"hello\n")
    assert stream.recv(100) == b"hello\n"
    return stream
def connect():
    return talk(context.wrap_socket(socket.create_connection(("127.0.0.1", port))))
warm = [connect() for _ in range(20)]
before = resident()
streams = [connect() for _ in range(count)]
time.sleep(0.2)
print((resident() - before) // count)
for stream in streams: talk(stream)
END
    echo "$(cat answers) bytes" >note
    [ "$(cat answers)" -le "$2" ] || fail "$(cat answers) bytes each"
}

# ---- chat ----------------------------------------------------------------------------------------

joins() { # NAME DESCRIPTOR: a client that says what is written to that descriptor
    mkfifo "$1.in"
    eval "exec $2<>$1.in" # for both, since that never waits for the other side
    "$bin/client" 127.0.0.1 "$port" <"$1.in" >"$1.out" &
    pid=$!
    pids="$pids $pid"
}

has() { grep -q "$2" "$1.out"; }

everybody_hears_everybody() {
    serve "$bin/chat" 0
    joins a 3
    joins b 4
    joins c 5
    for one in a b c; do
        case $one in a) fd=3 ;; b) fd=4 ;; c) fd=5 ;; esac
        echo "I am $one" >&$fd
        wait_for 5 has $one "I am $one" || fail "$one does not hear itself"
    done
    for one in a b c; do wait_for 5 has $one "I am c" || fail "$one does not hear c"; done
    echo "bye" >&3
    wait_for 5 has b bye && wait_for 5 has c bye || fail "not everybody hears a"
}

has_lines() { [ "$(wc -l <"$1.out")" -ge "$2" ]; }

slow_reader_is_dropped() {
    serve "$bin/chat" 0
    joins slow 3
    slow=$pid
    joins quick 4
    echo ready >&4 && wait_for 5 has quick ready || fail "quick does not hear itself"
    echo here >&3 && wait_for 5 has quick here || fail "slow is not heard"
    kill -STOP "$slow"
    awk 'BEGIN { for (i = 0; i < 1000; i++) printf "%0999d\n", i }' >chunk
    i=0
    while [ $((i += 1)) -le 50 ]; do
        cat chunk >&4
        wait_for 10 has_lines quick $((i * 1000 + 2)) || fail "quick stopped hearing at $i"
    done
    kill -CONT "$slow"
    wait_for 10 is_gone "$slow" || fail "slow is still there"
    echo after >&4 && wait_for 5 has quick after || fail "quick suffered"
}

# ---- processes -----------------------------------------------------------------------------------

worker() { sed -n "s/^task $1: pid //p" err | tail -n 1; }

both_work() { [ -n "$(worker 0)" ] && [ -n "$(worker 1)" ]; }

starts_two() { # PROGRAM
    serve "$bin/$1" 0 2
    wait_for 5 both_work || fail "not two workers"
    pids="$pids $(worker 0) $(worker 1)"
}

is_replaced() { [ "$(worker 1)" != "$1" ]; }

killed_worker_is_restarted() { # PROGRAM
    starts_two "$1"
    old=$(worker 1)
    "$bin/crowd" "$port" 50 2000 4 >load 2>&1 & load=$!
    pids="$pids $load"
    sleep 0.2
    kill -9 "$old"
    wait_for 10 is_replaced "$old" || fail "task 1 is not restarted"
    pids="$pids $(worker 1)"
    end $load
    for i in 1 2 3 4 5 6 7 8; do answers_hello || fail "no service afterwards"; done
    [ "$(grep -c '^listening on ' out)" -eq 1 ] || fail "more than one line says listening"
}

sigterm_ends_all() { # PROGRAM [EXIT-STATUS]
    starts_two "$1"
    parent=$pid first=$(worker 0) second=$(worker 1)
    kill "$parent"
    wait_for 10 is_gone "$parent" || fail "the parent stays"
    wait "$parent"
    status=$?
    is_gone "$first" && is_gone "$second" || fail "orphans"
    [ "$status" -eq 0 ] || fail "the parent's exit status is $status"
}

sigterm_lets_a_request_finish() {
    starts_two prefork
    parent=$pid
    joins late 3
    printf 'half a' >&3
    sleep 0.3
    kill "$parent"
    sleep 0.3
    printf ' line\n' >&3
    wait_for 5 has late 'half a line' || fail "the request was cut"
    wait_for 10 is_gone "$parent" || fail "the parent stays"
}

visitors_come() { # four of them, until visitors_end
    mkfifo hold
    exec 3<>hold
    "$bin/visits" "$port" 4 <hold >visits 2>&1 3>&- &
    visitors=$!
    pids="$pids $visitors"
}

visitors_end() {
    exec 3>&-
    wait "$visitors" || fail "a visit failed: $(cat visits)"
    echo "$(sed -n 's/^visits //p' visits) visits" >note
}

is_another() { [ -n "$(worker "$1")" ] && [ "$(worker "$1")" != "$2" ]; }

sighup_replaces_the_workers() {
    starts_two prefork
    visitors_come
    for round in 1 2; do
        first=$(worker 0) second=$(worker 1)
        kill -HUP "$pid"
        wait_for 10 is_another 0 "$first" && wait_for 10 is_another 1 "$second" ||
            fail "not all are replaced"
        pids="$pids $(worker 0) $(worker 1)"
        wait_for 10 is_gone "$first" && wait_for 10 is_gone "$second" || fail "old workers stay"
    done
    visitors_end
}

runs_alone() { # under which parent does that worker run; 0: it is gone
    case $1 in -1) worker -1 ;; *) ps -o ppid= -p "$(worker "$1")" | tr -d ' ' ;; esac
}

changes_itself_twice() { # WORKERS
    case $1 in 1) task=-1 ;; *) task=0 ;; esac
    serve "$bin/upgrade" 0 "$1"
    wait_for 5 is_another "$task" "" || fail "no worker"
    visitors_come
    old=$pid
    for round in 1 2; do
        before=$(worker "$task")
        kill -USR2 "$old"
        wait_for 10 is_another "$task" "$before" || fail "no successor"
        fresh=$(runs_alone "$task")
        pids="$pids $fresh $(worker "$task")"
        wait_for 10 is_gone "$old" || fail "the old one stays"
        old=$fresh
    done
    sleep 0.3
    visitors_end
    answers_hello || fail "no service afterwards"
    kill "$old" && wait_for 10 is_gone "$old" || fail "the last one stays"
}

# Each connection stays; what the least and the most of four workers have.
shared_out() { # CONNECTIONS PAUSE_MS
    "$bin/share" "$port" "$1" "$2" >answers || fail "a client failed"
    awk -v all="$1" '{ if ($3 > most) most = $3; if (NR == 1 || $3 < least) least = $3; sum += $3 }
        END { print least " to " most; exit !(sum == all && most <= all / 2) }' answers >note ||
        fail "$(cat answers)"
}

workers_share() {
    serve "$bin/sockets" 0 4
    shared_out 1000 0
}

one_connection_wakes_one_worker() {
    need strace
    strace -c -o /dev/null true 2>/dev/null || { echo "strace may not trace here" && exit 77; }
    serve strace -D -f -c -o trace "$bin/sockets" 0 4
    shared_out 500 3
    kill "$pid"
    wait_for 10 grep -q total trace || fail "strace says nothing"
    accepts=$(calls accept4)
    waits=$(calls epoll_wait epoll_pwait epoll_pwait2)
    echo "$accepts accepts, $waits waits for 500 connections" >note
    [ "$waits" -gt 0 ] || { echo "not epoll" && exit 77; }
    [ "$accepts" -le 550 ] || fail "$accepts accepts"
    [ "$waits" -le 1200 ] || fail "$waits waits"
}

workers_end_with_a_killed_parent() { # PROGRAM
    starts_two "$1"
    first=$(worker 0) second=$(worker 1)
    kill -9 "$pid"
    wait_for 5 is_gone "$first" && wait_for 5 is_gone "$second" || fail "orphans"
}

# ---- other loops ---------------------------------------------------------------------------------

lives_in_glibs_main_loop() {
    need pkg-config
    pkg-config --exists glib-2.0 || { echo "no glib-2.0 here" && exit 77; }
    ${CC:-cc} "$root/tests/tools/glib.c" $(pkg-config --cflags --libs glib-2.0) -o "$bin/glib" ||
        fail "tests/tools/glib.c"
    bounded 60 "$bin/glib" >note || fail "exit status $?: $(cat note)"
}

# ---- descriptors ---------------------------------------------------------------------------------

stays_calm() { # while 100 clients are there that cannot all be served
    mkfifo hold
    exec 3<>hold
    "$bin/crowd" "$port" 100 0 1 <hold >crowd.out 3>&- &
    pids="$pids $!"
    wait_for 10 grep -q 'connections 100' crowd.out || fail "the clients do not get in"
    server=$1
    before=$(cpu_ticks "$server")
    sleep 2
    ticks=$(($(cpu_ticks "$server") - before))
    [ "$ticks" -le 10 ] || fail "$ticks of 200 ticks of CPU time"
    [ "$(wc -l <err)" -le 8 ] || fail "$(wc -l <err) lines logged"
    exec 3>&-
    wait_for 10 answers_hello || fail "no service afterwards"
    [ "$(wc -l <err)" -le 12 ] || fail "$(wc -l <err) lines logged"
    echo "$ticks ticks, $(wc -l <err) lines logged" >note
}

few_descriptors() { # SERVER
    [ -r /proc/self/stat ] || { echo "no /proc" && exit 77; }
    hard=$(ulimit -Hn)
    ulimit -Sn 40
    serve "$bin/$1" 0
    ulimit -Sn "$hard"
    stays_calm "$pid"
}

descriptors_run_out() { # SERVER: its limit falls below what it counted on
    need prlimit
    [ -r /proc/self/stat ] || { echo "no /proc" && exit 77; }
    serve "$bin/$1" 0
    prlimit --pid "$pid" --nofile=24 || fail "prlimit"
    stays_calm "$pid"
}

# ---- operators -----------------------------------------------------------------------------------

asks_by() { # SOCAT-ADDRESS: one line and its answer
    printf 'hello\n' | bounded 10 socat -t 5 - "$1" >answers
}

is_up() { asks_by "TCP:127.0.0.1:$1" && grep -q hello answers; }

behind_haproxy() { # send-proxy or send-proxy-v2
    need haproxy socat
    serve "$bin/service" 0 127.0.0.1
    cat >haproxy.cfg <<EOF
global
    maxconn 100
defaults
    mode tcp
    timeout connect 5s
    timeout client 30s
    timeout server 30s
listen front
    bind fd@3
    server back 127.0.0.1:$port $1 check check-send-proxy inter 100
EOF
    background "$bin/pass" haproxy -db -f haproxy.cfg >front 2>proxy.log
    wait_for 10 grep -q '^listening on ' front || fail "no port for haproxy"
    front=$(sed -n 's/^listening on .*:\([0-9]*\)$/\1/p' front)
    wait_for 10 is_up "$front" || fail "no answer through haproxy: $(cat proxy.log)"
    asks_by "TCP:127.0.0.1:$front,bind=127.0.0.3" || fail "no answer to 127.0.0.3"
    grep -qx '127\.0\.0\.3:[0-9]*: hello' answers || fail "not the client's address"
    sleep 0.5 # the proxy's own checks go on meanwhile
    [ ! -s err ] || fail "it logged"
    printf 'hello\n' | client >answers
    [ ! -s answers ] || fail "answered without a header"
    grep -q 'connection refused from 127\.0\.0\.1:[0-9]*: not a PROXY header' err || fail "no log"
}

has_ended_well() { # PID: with status 0
    wait_for 10 is_gone "$1" || fail "it stays"
    wait "$1" || fail "exit status $?"
}

activated_by_a_manager() {
    need systemd-socket-activate socat
    socat -u "UNIX-RECV:$PWD/notify" - >states 2>socat.log &
    pids="$pids $!"
    wait_for 5 test -S notify || fail "socat does not listen"
    background "$bin/pass" systemd-socket-activate -E "NOTIFY_SOCKET=$PWD/notify" -l "$PWD/sock" \
        "$bin/service" >out 2>err
    service=$pid
    wait_for 5 grep -q 'Listening on' err || fail "systemd-socket-activate does not listen"
    asks_by "UNIX:$PWD/sock" || fail "no answer by the Unix socket"
    same "by the Unix socket" 'unix:: hello\n'
    port=$(sed -n 's/^listening on .*:\([0-9]*\)$/\1/p' out | tail -n 1)
    printf 'hello\n' | client >answers || fail "no answer on port $port"
    grep -qx '127\.0\.0\.1:[0-9]*: hello' answers || fail "not by TCP"
    wait_for 5 grep -q 'READY=1' states || fail "not told that it is ready"
    joins late 3
    printf 'half ' >&3
    sleep 0.3
    kill "$service"
    wait_for 5 grep -q 'STOPPING=1' states || fail "not told that it stops"
    printf 'a line\n' >&3
    wait_for 5 has late 'half a line' || fail "the request was cut"
    exec 3>&-
    has_ended_well "$service"
}

idle_clients_end_at_sigterm() {
    serve "$bin/service" 0
    service=$pid
    joins idle 3
    echo hello >&3
    wait_for 5 has idle hello || fail "no answer"
    kill "$service"
    has_ended_well "$service"
}

# ---- the table -----------------------------------------------------------------------------------

for example in client echo echo_callbacks prefork sockets chat redis http service upgrade; do
    row "$example: its own compile line works" compiles_by_its_comment $example
done
for tool in crowd flood pass share visits; do row "tools: $tool compiles" builds_tool $tool; done

row "echo: answers" answers echo 'hello\n\nworld\n' 'hello\n\nworld\n'
row "echo_callbacks: answers" answers echo_callbacks 'hello\n\nworld\n' 'hello\n\nworld\n'
row "prefork: answers" answers prefork 'hello\n' 'hello\n'
row "upgrade: answers" answers upgrade 'hello\n' 'hello\n'
row "sockets: answers" answers_like sockets '^task [0-9]*: hello$'
row "redis: answers" answers redis 'PING\r\n' '+PONG\r\n'
row "chat: answers" answers_like chat '^127\.0\.0\.1:[0-9]*: hello$'
row "client: connects by name" client_connects_by_name
row "bad input ends with a message and exit status 1" bad_input_is_refused

row "a half-closing nc gets its answers" nc_half_closes
row "a half-closing socat gets its answers" socat_half_closes
for server in echo echo_callbacks; do
    row "$server: 8 MiB come back to a half-closing client" eight_mebibytes_come_back $server
done
row "echo: idle connections, at most 4.5 KB each" crowd_is_served echo 4608
row "echo_callbacks: idle connections, at most 256 bytes each" crowd_is_served echo_callbacks 256
for server in echo echo_callbacks; do
    row "$server: 512 MiB from who does not read, in 2 MiB" flood_is_held_back $server
    row "$server: three system calls a request" three_calls_a_request $server
    row "$server: one receive and one send for 16 requests" two_calls_a_burst $server
done

row "redis: a redis-cli session" redis_cli_session
row "redis: binary values" redis_keeps_binary_values
row "redis: redis-benchmark" redis_benchmark_runs
row "redis: redis-cli --pipe loads 100,000 keys" redis_cli_pipe_loads
row "redis: inline commands" redis_takes_inline_commands
row "redis: broken frames" redis_refuses_broken_frames

row "http: curl's requests" http_answers_curl
row "http: refuses what it must" http_refuses_what_it_must
row "http: slow heads end at their deadline" slow_clients_are_gone -H
row "http: slow bodies end at their deadline" slow_clients_are_gone -B
row "http: slow readers end at their deadline" slow_clients_are_gone -X -w 512 -y 1024 -n 1 -z 32

row "tls_echo: a renegotiation is refused" renegotiation_is_refused
row "tls_echo: gnutls-cli" gnutls_talks
row "tls_echo: Python's ssl, 3 MB and unwrap" python_echoes_megabytes_and_unwraps
row "tls_echo: 1,000 idle connections, at most 11 KB each" \
    idle_tls_connections_are_small tls_echo 11264
row "TLS with callbacks: 1,000 idle connections, at most 6 KB each" \
    idle_tls_connections_are_small tls_callbacks 6144
row "https: curl" curl_verifies_and_agrees_on_http_1_1
row "https: wget" page_comes_to wget -qO- --no-check-certificate @
row "https: headless Chromium" page_comes_to chromium --headless --no-sandbox --disable-gpu \
    --user-data-dir="$work/profile" --ignore-certificate-errors --dump-dom @
row "https: sessions resume" sessions_resume
row "https: SIGHUP renews the certificate, or keeps it" certificates_are_renewed
row "https: plain HTTP is dropped" plain_http_is_dropped
row "https: TLS 1.1 and 1.3 get alert 70" old_and_new_versions_are_told_so
row "https: nmap grades it A" nmap_grades_a
row "https: testssl.sh finds no vulnerability" testssl_finds_nothing

row "chat: everybody hears everybody" everybody_hears_everybody
row "chat: a slow reader is dropped, the others hear all" slow_reader_is_dropped

for program in prefork sockets; do
    row "$program: a killed worker is restarted under its number" killed_worker_is_restarted \
        $program
    row "$program: SIGTERM ends parent and workers" sigterm_ends_all $program
    row "$program: workers end with a killed parent" workers_end_with_a_killed_parent $program
done
row "prefork: SIGTERM lets a request finish" sigterm_lets_a_request_finish
row "prefork: SIGHUP replaces the workers twice under load, no visit fails" \
    sighup_replaces_the_workers
row "upgrade: one process changes itself twice under load, no visit fails" changes_itself_twice 1
row "upgrade: two workers do, no visit fails" changes_itself_twice 2
row "sockets: of 1,000 connections no worker has more than twice its share" workers_share
row "sockets: a connection wakes one worker" one_connection_wakes_one_worker

row "a server and its clients live in GLib's main loop" lives_in_glibs_main_loop
row "service: behind haproxy with send-proxy" behind_haproxy send-proxy
row "service: behind haproxy with send-proxy-v2" behind_haproxy send-proxy-v2
row "service: sockets and states of a service manager" activated_by_a_manager
row "service: SIGTERM ends an idle client's connection" idle_clients_end_at_sigterm

for server in echo echo_callbacks; do
    row "$server: 100 clients on 40 descriptors" few_descriptors $server
    row "$server: descriptors run out" descriptors_run_out $server
done

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
