#!/bin/sh
# The house rules that a script can check, one row each, and what analysers find where they are
# installed. An analyser that is missing is skipped by name.

cd "$(dirname "$0")/.." || exit 1
header=tcpserver.h
sources=$(ls tcpserver.h tests/*.[ch] tests/*/*.[ch] tests/*/*/*.[ch] examples/*.[ch] 2>/dev/null)
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0 skipped=0

row() { # name, command: what it prints are the places that break the rule
    name=$1
    shift
    "$@" >"$tmp/found" 2>&1
    status=$?
    if [ $status -eq 77 ]; then
        skipped=$((skipped + 1))
        echo "skip $name: $(cat "$tmp/found")"
    elif [ $status -eq 0 ] && [ ! -s "$tmp/found" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $name"
        head -n 30 "$tmp/found" | sed 's/^/    /'
    fi
}

without() { # pattern, files: the places where it occurs
    pattern=$1
    shift
    grep -nE -- "$pattern" "$@" /dev/null
    [ $? -eq 1 ]
}

# The lines of one section or several, from the one's tag to the next other tag, as "number:line",
# without comments and strings.
code_outside() { # sections, as an expression
    awk -v skipped="$1" '
        /^\/\* ==== >>/ { section = substr($3, 3) }
        section == "" || section ~ ("^(" skipped ")$") { next }
        {
            line = $0
            gsub(/"([^"\\]|\\.)*"/, "\"\"", line)
            gsub(/\/\*[^*]*\*\//, "", line)
            if (inside) { if (!sub(/^.*\*\//, "", line)) next; inside = 0 }
            if (sub(/\/\*.*$/, "", line)) inside = 1
            print FILENAME ":" NR ": " line
        }' $header
}

long_lines() {
    awk 'length > 100 { print FILENAME ":" FNR ": " length " columns" }' $sources \
        tests/*.sh Makefile .ci/run
}

# Names of system calls and of the C library's memory: thin functions in these sections only.
system_calls() {
    calls='socket|bind|listen|accept4?|connect|shutdown|send|recv|sendto|recvfrom|sendmsg|recvmsg'
    calls="$calls|read|write|readv|writev|pread|open|close|dup|dup2|fcntl|ioctl|pipe2?|sendfile"
    calls="$calls|epoll_[a-z0-9]+|kevent|kqueue|poll|select|eventfd|timerfd_[a-z]+|signalfd"
    calls="$calls|mmap|munmap|mprotect|madvise|fork|waitpid|kill|raise|sigaction|sigprocmask"
    calls="$calls|pthread_sigmask|sigwait|sigpending|clock_gettime|gettimeofday|nanosleep|usleep"
    calls="$calls|getsockopt|setsockopt|getsockname|getpeername|getaddrinfo|freeaddrinfo"
    calls="$calls|unlink|l?stat|fstat|chmod|umask|getrlimit|sysconf|getpp?id|prctl"
    calls="$calls|sched_[a-z]+|malloc|calloc|realloc|free"
    code_outside 'api|platform|poller' >"$tmp/code"
    without "(^|[^A-Za-z0-9_.>])($calls)\(" "$tmp/code" | sed 's/^[^:]*:[0-9]*://'
}

sections_in_order() {
    tags='api platform poller loop coroutine buffer stream waiting tls sockets server process'
    for tag in $tags; do echo "$tag"; done >"$tmp/wanted"
    sed -n 's|^/\* ==== >>\([a-z]*\) =.*|\1|p' $header >"$tmp/there"
    sed -n 's|^ \*   >>\([a-z]*\) .*|\1|p' $header >"$tmp/table"
    diff "$tmp/wanted" "$tmp/there" && diff "$tmp/wanted" "$tmp/table"
}

documented() { # each group of prototypes has a comment
    awk '/^\/\* ==== >>platform/ { exit }
        /\/\*/ { open = 1 }
        /\*\// { open = 0 }
        /^$/ && !open { if (prototypes && !comment) print FILENAME ":" first ": no comment"
               prototypes = comment = 0; next }
        /^TCPSRV_API / { if (!prototypes++) first = FNR }
        /\/\*/ { comment = 1 }' $header
}

# A function begins with a line at the margin and ends with a brace there.
function_lengths() {
    awk 'FNR == 1 { start = 0 }
        /^[A-Za-z].*\(/ && !/;$/ { start = FNR }
        /^[A-Za-z]/ && /;$/ { start = 0 }
        /^}/ { size = FNR - start + 1
               if (start && size > 60) print FILENAME ":" start ": " size " lines"
               start = 0 }' $sources |
        while IFS=: read -r file line rest; do
            # A table of tests is as long as there are tests.
            sed -n "${line}p" "$file" | grep -q '^int main(' || echo "$file:$line:$rest"
        done
}

private_names() {
    awk '/^\/\* ==== >>platform/ { inside = 1 }
        inside && /^static [^=]*\(/ && !/tcpsrv__[a-z0-9_]*\(/ && !/^static [^(]*\[/ {
            print FILENAME ":" FNR ": " $0 }' $header
}

version_is_one() {
    version=$(sed -n 's/^#define TCPSRV_VERSION "\(.*\)"$/\1/p' $header)
    parts=$(sed -n 's/^#define TCPSRV_VERSION_M[AI][JN]OR \([0-9]*\)$/\1/p
        s/^#define TCPSRV_VERSION_PATCH \([0-9]*\)$/\1/p' $header | paste -s -d . -)
    [ "$version" = "$parts" ] || echo "TCPSRV_VERSION is $version, its parts are $parts"
    head -n 1 $header | grep -qF "tcpserver.h $version:" || echo "the first line has another"
}

# What is of no use to who reads the repository: where and in what course of work it was made, and
# addresses other than those of this machine.
repository_words() {
    git ls-files -co --exclude-standard 2>/dev/null | grep -v '^tests/lint\.sh$' >"$tmp/files"
    [ -s "$tmp/files" ] || echo "$sources" >"$tmp/files"
    words='([Tt]his|[Ll]ast|[Nn]ext|[Pp]revious|[Ee]arlier|[Ll]ater) sessions?([^a-z]|$)'
    words="$words|(^|[^a-z])([Ii]ssue *#?[0-9]+|PR *#?[0-9]+|GH-[0-9]+)([^a-z]|$)"
    words="$words|(^|[^A-Za-z0-9_.\$}/])/(work|home|root|opt|Users)/[A-Za-z]"
    words="$words|https?://"
    allowed='https?://(127\.0\.0\.1|localhost|\[::1\]|example\.(com|org)|www\.w3\.org)'
    while read -r file; do
        [ ! -f "$file" ] || grep -nE -- "$words" "$file" /dev/null
    done <"$tmp/files" | grep -vE "$allowed"
    return 0
}

top_level() {
    git ls-files -co --exclude-standard 2>/dev/null | cut -d/ -f1 | sort -u |
        grep -Evx 'tcpserver\.h|tests|examples|Makefile|README\.md|LICENSE|\..*'
    return 0
}

scripts_parse() {
    for script in tests/*.sh; do sh -n "$script"; done
    ! command -v bash >/dev/null || bash -n .ci/run
}

mutants_apply() (
    command -v patch >/dev/null || { echo "no patch"; exit 77; }
    for patch in tests/mutants/*.patch; do
        patch --dry-run -s -F3 -p1 <"$patch" >/dev/null 2>&1 || echo "$patch"
    done
)

have() {
    command -v "$1" >/dev/null || { echo "no $1"; exit 77; }
}

# The system's headers are not read: what the header asks of them is defined. Waiters live on the
# stack of who waits, and the loop knows their addresses meanwhile: autoVariables is no fault.
run_cppcheck() (
    have cppcheck
    cppcheck --quiet --std=c99 --language=c --enable=warning,performance,portability \
        --suppress=missingInclude --suppress=missingIncludeSystem --suppress=autoVariables \
        -DTCPSERVER_IMPLEMENTATION -D__linux__ -D__GNUC__=12 -D__x86_64__ -D__LP64__ \
        -DCLOCK_MONOTONIC -DSA_RESTART -DMAP_PRIVATE -DAI_PASSIVE -DF_DUPFD_CLOEXEC \
        -D_SC_PAGESIZE -DWNOHANG '-DS_ISSOCK(mode)=(mode)' -DMAP_ANONYMOUS \
        -UTCPSERVER_STATIC -U__cplusplus -U__has_feature \
        --error-exitcode=1 $header 2>&1
)

run_clang_tidy() (
    tidy=
    for name in clang-tidy clang-tidy-22 clang-tidy-19 clang-tidy-16 clang-tidy-14; do
        [ -n "$tidy" ] || ! command -v $name >/dev/null || tidy=$name
    done
    [ -n "$tidy" ] || { echo "no clang-tidy"; exit 77; }
    checks='-*,bugprone-macro-*,bugprone-misplaced-widening-cast,bugprone-suspicious-*'
    checks="$checks,bugprone-sizeof-*,bugprone-undefined-memory-manipulation,bugprone-infinite-loop"
    checks="$checks,bugprone-signed-char-misuse,bugprone-integer-division"
    checks="$checks,bugprone-not-null-terminated-result,misc-redundant-expression"
    $tidy --quiet --checks="$checks" $header -- -x c -std=c99 -DTCPSERVER_IMPLEMENTATION \
        2>/dev/null
)

row "no reminders or dead code" without 'TODO|FIXME|(^|[^X])XXX([^X]|$)|^ *# *if 0' $sources
row "no line is longer than 100 columns" long_lines
row "no tabs and no blanks at line ends" without "$(printf '\t')|[ ]$" $sources tests/*.sh
row "comments are block comments" without '(^|[^:"])//' $sources
row "sections stand in their order, in the file and in its table" sections_in_order
row "every group of prototypes has a comment" documented
row "system calls are named in platform and poller only" system_calls
row "private functions bear the prefix" private_names
row "no function is longer than 60 lines" function_lengths
row "the version is one" version_is_one
row "no words about how it was made" repository_words
row "nothing else at the top level" top_level
row "scripts parse" scripts_parse
row "mutants apply" mutants_apply
row "cppcheck" run_cppcheck
row "clang-tidy" run_clang_tidy

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && { [ "$skipped" -eq 0 ] || [ -z "${CI:-}${TEST_NO_SKIP:-}" ]; }
