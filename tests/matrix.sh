#!/bin/sh
# Compiles the header in the ways in which its users may, and runs what can be run. Each row counts
# as a test; what a row needs and the machine has not is skipped by name. An argument: only rows
# whose name contains it. Compilers are found in PATH; zig also through ZIG.

cd "$(dirname "$0")/.." || exit 1
root=$(pwd)
filter=${1:-}
jobs=${JOBS:-2}
strict='-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-qual -Werror'
strict_c="$strict -Wstrict-prototypes"
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

first_of() { # the first of these commands that exists
    for command; do
        command -v "$command" 2>/dev/null && return
    done
    echo "$1"
}

GCC=$(first_of gcc gcc-14 gcc-13 gcc-12)
GXX=$(echo "$GCC" | sed 's/gcc/g++/')
CLANG=$(first_of clang clang-22 clang-19 clang-16 clang-14)
CLANGXX=$(echo "$CLANG" | sed 's/clang/clang++/')
TCC=$(first_of tcc)
ZIG=$(first_of "${ZIG:-zig}" zig)
CC=${CC:-cc}
export TEST_SLOW=3 ZIG

# ---- rows ----------------------------------------------------------------------------------------

# Every worker counts all rows and runs its own share of them.
row() { # name, command and its arguments
    name=$1
    shift
    case $name in *"$filter"*) ;; *) return 0 ;; esac
    n=$((n + 1))
    [ $((n % jobs)) -eq "$worker" ] || return 0
    o=$tmp/row$n
    mkdir "$o"
    echo "$name" >"$o/name"
    (set -e; "$@") >"$o/log" 2>&1 </dev/null
    echo $? >"$o/status"
}

skip() {
    echo "skipped: $*"
    exit 77
}

need() {
    for needed; do
        command -v "$needed" >/dev/null 2>&1 || skip "no ${needed##*/}"
    done
}

# ---- sources -------------------------------------------------------------------------------------

mkdir "$tmp/src"
cp tcpserver.h "$tmp/src/" || exit 1

cat >"$tmp/src/impl.c" <<'END'
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"
END

cat >"$tmp/src/main.c" <<'END'
#include "tcpserver.h"
#include "tcpserver.h"
int other(void);
int main(void) { return tcpsrv_loop_free(tcpsrv_loop_default()) + other(); }
END

cat >"$tmp/src/other.c" <<'END'
#include "tcpserver.h"
int other(void);
int other(void) {
    tcpsrv_loop *loop = tcpsrv_loop_new();
    tcpsrv_loop_stop(loop);
    return tcpsrv_loop_run(loop) + tcpsrv_loop_free(loop);
}
END

cat >"$tmp/src/tls.c" <<'END'
#include "tcpserver.h"
#include <string.h>
int main(void) {
    tcpsrv_tls_options options;
    tcpsrv_certificate pair;
    memset(&options, 0, sizeof options);
    memset(&pair, 0, sizeof pair);
    pair.certificate_file = "nofile.pem";
    options.certificates = &pair;
    options.certificate_count = 1;
    if (tcpsrv_tls_new(&options)) return 1;
    return strcmp(tcpsrv_last_error(), "nofile.pem: No such file or directory") != 0;
}
END

cat >"$tmp/src/late.c" <<'END'
#include <stdio.h>
#include <string.h>
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"
int main(void) { return printf("%s\n", tcpsrv_strerror(TCPSRV_EOF)) < 0; }
END

(echo '#include <sys/socket.h>' && cat "$tmp/src/late.c") >"$tmp/src/later.c"

# Names that a program, a framework or an older compiler is known to have as macros.
cat >"$tmp/src/hostile.h" <<'END'
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define swap(a, b) do { int t = a; a = b; b = t; } while (0)
#define log(level, ...) @log
#define error(...) @error
#define warn(...) @warn
#define info(...) @info
#define debug(...) @debug
#define check(x) @check
#define likely(x) @likely
#define unlikely(x) @unlikely
#define container_of(pointer, type, member) @container_of
#define list_add(a, b) @list_add
#define new(type) @new
#define delete(object) @delete
#define self(x) @self
#define emit @emit
#define foreach(item, list) @foreach
#define forever @forever
#define near @near
#define far @far
#define interface @interface
#define small @small
#define yield @yield
#define await @await
#define coroutine @coroutine
#define string @string
#define byte @byte
#define MIN(a, b) @MIN
#define MAX(a, b) @MAX
#define READ @READ
#define WRITE @WRITE
#define ERROR @ERROR
#define DEBUG 1
#define INFO @INFO
#define LOG(x) @LOG
#define CHECK(x) @CHECK
#define TEST @TEST
#define UNUSED @UNUSED
#define TRUE @TRUE
#define FALSE @FALSE
#define OK @OK
#define OUT @OUT
#define CLOSED @CLOSED
#define EXPORT @EXPORT
END

cat >"$tmp/src/hostile.c" <<'END'
#include "hostile.h"
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"
int main(void) { return 0; }
END

# What a Qt program has as macros may hit the declarations only: the implementation is C.
cat >"$tmp/src/qt.cc" <<'END'
#define signals @signals
#define slots @slots
#include "hostile.h"
#include "tcpserver.h"
int main() { return 0; }
END

cat >"$tmp/src/static_main.c" <<'END'
#define TCPSERVER_STATIC
#include "tcpserver.h"
int other(void);
static int give(void *arg) { return arg ? 1 : 7; }
int main(void) {
    int64_t id = tcpsrv_spawn(tcpsrv_loop_default(), give, NULL, 0);
    return tcpsrv_join(id) != 7 || tcpsrv_loop_free(tcpsrv_loop_default()) != 0 || other() != 7;
}
END

sed 's/main(void) {/other(void) {/; s/|| other() != 7/? 1 : 7/' "$tmp/src/static_main.c" \
    >"$tmp/src/static_other.c"

cat >"$tmp/src/plain.c" <<'END'
#define TCPSERVER_NO_COROUTINES
#define TCPSERVER_IMPLEMENTATION
#include "tcpserver.h"
static int give(void *arg) { return arg ? 1 : 7; }
static int handle(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    return !stream || !peer || user;
}
int main(void) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    options.handle_stream = handle;
    if (tcpsrv_new(&options) || !strstr(tcpsrv_last_error(), strerror(ENOTSUP))) return 1;
    if (tcpsrv_spawn(tcpsrv_loop_default(), give, NULL, 0) != -ENOTSUP) return 2;
    if (tcpsrv_sleep(1) != 0) return 3;
    return tcpsrv_loop_free(tcpsrv_loop_default());
}
END

# ---- what rows do --------------------------------------------------------------------------------

c_units() { # compiler, standard, flags: declarations in two units, the implementation in a third
    cc=$1 std=$2
    shift 2
    need "$cc"
    for unit in main other impl; do
        $cc "-std=$std" $strict_c "$@" -I "$tmp/src" -c "$tmp/src/$unit.c" -o "$o/$unit.o"
    done
    $cc "$o/main.o" "$o/other.o" "$o/impl.o" -o "$o/program"
    "$o/program"
}

cxx_units() { # compiler, standard, flags: the same as C++, then C++ callers of the C object
    cxx=$1 std=$2 cc=$3
    shift 3
    need "$cxx" "$cc"
    for unit in main other impl; do
        $cxx -x c++ "-std=$std" $strict "$@" -I "$tmp/src" -c "$tmp/src/$unit.c" -o "$o/$unit.o"
    done
    $cxx "$o/main.o" "$o/other.o" "$o/impl.o" -o "$o/program"
    "$o/program"
    $cc -I "$tmp/src" -c "$tmp/src/impl.c" -o "$o/impl.o"
    $cxx "$o/main.o" "$o/other.o" "$o/impl.o" -o "$o/program"
    "$o/program"
}

build() { # compiler, source, flags
    cc=$1 source=$2
    shift 2
    need "$cc"
    $cc "$@" -I "$tmp/src" "$tmp/src/$source" -o "$o/program"
}

build_and_run() {
    build "$@"
    "$o/program"
}

two_static_copies() { # compiler, flags
    cc=$1
    shift
    need "$cc"
    if ! echo 'int main(void) { return 0; }' | $cc "$@" -x c - -o "$o/probe" 2>/dev/null; then
        skip "${cc##*/} cannot link with $*"
    fi
    $cc "$@" $strict_c -I "$tmp/src" "$tmp/src/static_main.c" "$tmp/src/static_other.c" \
        -o "$o/program"
    "$o/program"
}

public_functions() { # those of TLS are there with it alone
    sed "${1:-/^#ifdef TCPSERVER_TLS/,/^#endif/d}" tcpserver.h |
        sed -n 's/^TCPSRV_API [^(]*[ *]\(tcpsrv_[a-z0-9_]*\)(.*/\1/p' | sort
}

exported_symbols() { # compiler, flags
    cc=$1
    shift
    need "$cc" nm
    $cc -O2 -fPIC "$@" -I "$tmp/src" "$tmp/src/impl.c" -shared -o "$o/library.so"
    nm -D --defined-only "$o/library.so" | awk '{ print $3 }' | sort >"$o/exported"
    public_functions >"$o/public"
    [ "$(wc -l <"$o/public")" -gt 50 ]
    diff "$o/public" "$o/exported"
}

need_bearssl() { # compiler
    echo '#include <bearssl.h>' | "$@" -E - >/dev/null 2>&1 || skip "no bearssl.h"
}

tls_units() { # compiler of C, compiler of the implementation, flags
    cc=$1 compiler=$2
    shift 2
    need "$cc" "${compiler%% *}"
    need_bearssl "$cc"
    $compiler "$@" $strict -DTCPSERVER_TLS -I "$tmp/src" -c "$tmp/src/impl.c" -o "$o/impl.o"
    $compiler "$@" $strict -DTCPSERVER_TLS -I "$tmp/src" -c "$tmp/src/tls.c" -o "$o/tls.o"
    "${compiler%% *}" "$o/tls.o" "$o/impl.o" -o "$o/program" -lbearssl
    "$o/program"
}

tls_symbols() { # compiler, flags
    cc=$1
    shift
    need "$cc" nm
    need_bearssl "$cc"
    $cc -O2 -fPIC -DTCPSERVER_TLS "$@" -I "$tmp/src" "$tmp/src/impl.c" -shared \
        -o "$o/library.so" -lbearssl
    nm -D --defined-only "$o/library.so" | awk '{ print $3 }' | sort >"$o/exported"
    public_functions n | diff - "$o/exported"
}

global_symbols_of_the_object() {
    need "$GCC" nm
    "$GCC" -I "$tmp/src" -c "$tmp/src/impl.c" -o "$o/impl.o"
    nm -g --defined-only "$o/impl.o" | awk '{ print $3 }' | sort >"$o/exported"
    public_functions | diff - "$o/exported"
    "$GCC" -DTCPSERVER_STATIC -I "$tmp/src" -c "$tmp/src/impl.c" -o "$o/impl.o"
    [ -z "$(nm -g --defined-only "$o/impl.o")" ]
}

prefixed_macros() { # every macro that the header itself defines, in the order of the preprocessor
    need "$GCC"
    "$GCC" -dD -E -I "$tmp/src" "$tmp/src/impl.c" | awk '
        /^# [0-9]+ "/ { ours = $3 ~ /tcpserver\.h"$/ }
        ours && $1 == "#define" { sub(/\(.*/, "", $2); print $2 }' | sort -u |
        grep -Ev '^(TCPSRV_|TCPSERVER_)' >"$o/macros" || true
    # Feature-test macros, and what a system may lack of names that POSIX or others give it.
    ! grep -Evx '_GNU_SOURCE|_DARWIN_C_SOURCE|_NETBSD_SOURCE|MAP_[A-Z]+|POLLRDHUP' "$o/macros"
}

mac() { # target: every example and the loop's tests link; nothing can run
    need "$ZIG"
    for source in examples/*.c tests/test_loop.c tests/test_coroutine.c; do
        echo "$source"
        ! grep -q '^#define TCPSERVER_TLS' "$source" || continue
        "$ZIG" cc -target "$1" -std=c99 -Wall -Wextra -Wpedantic -Werror \
            -Wno-newline-eof "$source" -o "$o/program"
    done
    "$ZIG" c++ -target "$1" -x c++ -std=c++17 $strict -I "$tmp/src" -c "$tmp/src/impl.c" \
        -o "$o/impl.o"
}

old_glibc() { # no flags, although threads were a library of their own then
    need "$ZIG"
    "$ZIG" cc -target x86_64-linux-gnu.2.17 -std=c99 -fno-sanitize=undefined examples/echo.c \
        -o "$o/program"
}

units_run() { # the command that runs a program, or ""; compiler and flags
    runner=$1
    shift
    need "$1" $runner
    echo '#include <stdio.h>
int main(void) { return puts("") < 0; }' >"$o/probe.c"
    "$@" "$o/probe.c" -o "$o/probe" 2>/dev/null || skip "no C library for $*"
    for unit in test_loop test_coroutine; do
        "$@" -std=c99 -pthread "tests/$unit.c" -o "$o/$unit"
        $runner "$o/$unit"
    done
}

emulated() { # processor as qemu names it, compiler
    export TEST_EMULATED=1
    units_run "qemu-$1" "$2" -O1 -static
}

after_each_header() { # compiler, flags: compiles after it, or says what to do
    need "$1"
    for header in stdlib signal time unistd fcntl pthread sched netdb sys/mman sys/stat sys/wait; do
        (echo "#include <$header.h>" && cat "$tmp/src/late.c") >"$o/after.c"
        "$@" -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I "$tmp/src" "$o/after.c" \
            2>"$o/errors" && continue
        case $* in *-std=c99*)
            grep -m 1 'error' "$o/errors" | grep -q 'read in strict ISO mode before' && continue
        esac
        echo "after $header.h:"
        cat "$o/errors"
        return 1
    done
}

example() { # by the compile line of its own first comment, and strictly
    mkdir -p "$o/examples"
    cp tcpserver.h "$o/"
    cp examples/*.[ch] "$o/examples/" 2>/dev/null || true
    line=$(sed -n '1,/\*\//s/^[ *\/]*\(cc .*\)$/\1/p' "$1" |
        sed 's/ && .*//; s/ *\*\/.*//; s/ *;.*//' | head -n 1)
    [ -n "$line" ] || { echo "no compile line in the first comment"; return 1; }
    library=
    case $line in *-lbearssl*) need_bearssl "$CC" && library=-lbearssl ;; esac
    case $line in *examples/*) cd "$o" ;; *) cd "$o/examples" ;; esac
    echo "$line"
    eval "$CC ${line#cc }"
    cd "$root"
    $CC -std=c99 $strict_c "$1" -o "$o/program" $library
}

snippet() { # a C block of the README: a program, a unit, or statements inside a function
    grep -q '[^ ]' "$1"
    if ! grep -q '#include "tcpserver.h"' "$1"; then
        printf '%s\n' '#define TCPSERVER_STATIC' '#include "tcpserver.h"'
    fi >"$o/unit.c"
    cp "$o/unit.c" "$o/function.c"
    cat "$1" >>"$o/unit.c"
    {
        echo 'int snippet(tcpsrv *server, tcpsrv_loop *loop, tcpsrv_stream *stream, int fd) {'
        cat "$1"
        echo '(void)server, (void)loop, (void)stream, (void)fd; return 0; }'
    } >>"$o/function.c"
    flags='-std=c99 -Wall -Wextra -Wno-unused-variable -Wno-unused-function'
    flags="$flags -Wno-unused-but-set-variable -Werror"
    if grep -q 'tcpsrv_tls' "$1"; then
        need_bearssl "$CC"
        flags="$flags -DTCPSERVER_TLS"
    fi
    if grep -q 'int main(' "$1"; then
        $CC $flags -I "$tmp/src" "$o/unit.c" -o "$o/program"
        if grep -q '#include "tcpserver.h"' "$1" && command -v g++ >/dev/null; then # as it is told
            g++ -std=c++11 -Wall -Werror -I "$tmp/src" -x c++ "$o/unit.c" -o "$o/program"
        fi
    elif ! $CC $flags -I "$tmp/src" -c "$o/unit.c" -o "$o/unit.o"; then
        echo "as statements:"
        $CC $flags -I "$tmp/src" -c "$o/function.c" -o "$o/unit.o"
    fi
}

small_echo() {
    need strip size
    $CC -O2 examples/echo.c -o "$o/echo"
    strip "$o/echo"
    bytes=$(size "$o/echo" | awk 'NR == 2 { print $1 }')
    echo "text: $bytes bytes; 90,000 is the goal"
    [ "$bytes" -le 90000 ]
}

installed() {
    make -s install "DESTDIR=$o" PREFIX=/usr
    sed 's/"tcpserver.h"/<tcpserver.h>/' "$tmp/src/late.c" >"$o/late.c"
    $CC -I "$o/usr/include" "$o/late.c" -o "$o/program"
    "$o/program"
}

# ---- the matrix ----------------------------------------------------------------------------------

rows() {
    for target in aarch64-macos.12.0 x86_64-macos.11.0; do
        row "$target: examples and tests link" mac $target
    done
    row "glibc 2.17: links without flags" old_glibc
    row "aarch64: tests of loop and coroutines" emulated aarch64 aarch64-linux-gnu-gcc
    row "arm: tests of loop and coroutines" emulated arm arm-linux-gnueabihf-gcc
    row "riscv64: tests of loop and coroutines" emulated riscv64 riscv64-linux-gnu-gcc
    row "s390x (big-endian): tests of loop and coroutines" emulated s390x s390x-linux-gnu-gcc
    row "i386: tests of loop and coroutines" units_run "" "$GCC" -m32 -O1 \
        -idirafter "/usr/include/$("$GCC" -print-multiarch 2>/dev/null)"
    row "musl: tests of loop and coroutines" units_run "" musl-gcc -O1 -static
    row "tcc: tests of loop and coroutines" units_run "" "$TCC"
    for std in c99 c11 c17; do
        row "gcc $std" c_units "$GCC" $std -O2
        row "clang $std" c_units "$CLANG" $std -O1
        row "tcc $std" c_units "$TCC" $std
    done
    for std in c++11 c++17 c++20; do
        row "g++ $std" cxx_units "$GXX" $std "$GCC"
        row "clang++ $std" cxx_units "$CLANGXX" $std "$CLANG"
    done
    for cc in "$GCC" "$CLANG" "$TCC"; do
        short=${cc##*/}
        row "$short: after stdio.h, no flags" build_and_run "$cc" late.c
        case $short in tcc*) pedantic= ;; *) pedantic=-pedantic-errors ;; esac
        row "$short: after stdio.h, -std=c99 $pedantic" build_and_run "$cc" late.c \
            -std=c99 $pedantic
        row "$short: after sys/socket.h" build_and_run "$cc" later.c
    done
    row "after each system header, no flags" after_each_header "$GCC"
    row "after each system header, musl, no flags" after_each_header musl-gcc
    row "after each system header, -std=c99" after_each_header "$GCC" -std=c99
    row "after each system header, strict POSIX" after_each_header "$GCC" -std=c99 \
        -D_POSIX_C_SOURCE=200809L
    row "after stdio.h, strict POSIX" build_and_run "$GCC" late.c -std=c99 \
        -D_POSIX_C_SOURCE=200809L
    row "gcc: between hostile macros" build "$GCC" hostile.c
    row "clang: between hostile macros" build "$CLANG" hostile.c -std=c99
    row "g++: declarations between Qt's macros" build "$GXX" qt.cc
    row "gcc: two static copies" two_static_copies "$GCC" -O2
    row "gcc: two static copies, -flto" two_static_copies "$GCC" -O2 -flto
    row "clang: two static copies" two_static_copies "$CLANG" -O2
    row "clang: two static copies, -flto" two_static_copies "$CLANG" -O2 -flto
    row "tcc: two static copies" two_static_copies "$TCC"
    row "gcc: exported symbols" exported_symbols "$GCC"
    row "gcc: exported symbols, -flto" exported_symbols "$GCC" -flto
    row "clang: exported symbols" exported_symbols "$CLANG"
    row "gcc: TLS, c99" tls_units "$GCC" "$GCC" -std=c99 -Wstrict-prototypes
    row "gcc: TLS, c17, -O3" tls_units "$GCC" "$GCC" -std=c17 -O3
    row "gcc: TLS, poll, no coroutines" tls_units "$GCC" "$GCC" -std=c99 \
        -DTCPSERVER_USE_POLL -DTCPSERVER_NO_COROUTINES
    row "clang: TLS, c99" tls_units "$CLANG" "$CLANG" -std=c99
    row "tcc: TLS" tls_units "$TCC" "$TCC"
    row "g++: TLS, c++11" tls_units "$GCC" "$GXX -x c++" -std=c++11
    row "g++: TLS, c++20" tls_units "$GCC" "$GXX -x c++" -std=c++20
    row "clang++: TLS, c++11" tls_units "$CLANG" "$CLANGXX -x c++" -std=c++11
    row "gcc: TLS, exported symbols" tls_symbols "$GCC"
    row "clang: TLS, exported symbols" tls_symbols "$CLANG"
    row "gcc: global symbols of the object, static and not" global_symbols_of_the_object
    row "macros bear the prefix" prefixed_macros
    row "gcc: no coroutines" build_and_run "$GCC" plain.c -std=c99 $strict_c
    row "clang: no coroutines" build_and_run "$CLANG" plain.c -std=c99 $strict_c
    row "gcc: poll" c_units "$GCC" c99 -DTCPSERVER_USE_POLL -O1
    row "clang: poll" c_units "$CLANG" c99 -DTCPSERVER_USE_POLL
    row "gcc: no assertions" c_units "$GCC" c99 -DNDEBUG -O3
    row "clang: no assertions" c_units "$CLANG" c99 -DNDEBUG -Os
    for source in examples/*.c; do
        row "$source by its own compile line" example "$source"
    done
    row "README.md has C blocks" test -f "$tmp/block01.c"
    for block in "$tmp"/block*.c; do
        [ ! -f "$block" ] || row "README.md, C block at line $(cat "${block%.c}.where")" \
            snippet "$block"
    done
    row "echo is small" small_echo
    row "make install" installed
}

[ ! -f README.md ] || awk -v to="$tmp/block" '
    /^```c$/ { inside = 1; file = sprintf("%s%02d", to, ++count)
               print NR >(file ".where"); printf "" >(file ".c"); next }
    /^```/ { inside = 0 }
    inside { print >(file ".c") }' README.md

worker=0
while [ $worker -lt "$jobs" ]; do
    (n=0; rows) &
    worker=$((worker + 1))
done
wait

passed=0 failed=0 skipped=0 i=1
while [ -d "$tmp/row$i" ]; do
    status=$(cat "$tmp/row$i/status" 2>/dev/null)
    name=$(cat "$tmp/row$i/name")
    case $status in
    0) passed=$((passed + 1)) ;;
    77)
        skipped=$((skipped + 1))
        echo "skip $name: $(sed -n "\$s/^skipped: //p" "$tmp/row$i/log")"
        ;;
    *)
        failed=$((failed + 1))
        echo "FAIL $name: exit ${status:-of the shell}"
        sed 's/^/    /' "$tmp/row$i/log" | tail -n 40
        ;;
    esac
    i=$((i + 1))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ $((passed + skipped)) -gt 0 ]
