/* A client of a line echo server that sends and never reads, until it has not been able to send for
 * two seconds; then it reads all, sends the rest, and compares every byte.
 *
 * flood PORT MEBIBYTES PID: fails where the server, whose PID it is, grew by 2 MiB or more, did not
 * serve another client meanwhile, or lost or changed a byte.
 */
#include "tool.h"

enum { LINE = 1024, CHUNK = 64 * LINE, STALL_MS = 2000, MAX_GROWTH = 2 << 20 };

/* The flood's bytes from a place on: lines that each begin with their number. */
static void make_bytes(char *out, uint64_t at, size_t size) {
    static char line[LINE];
    static uint64_t number = UINT64_MAX;
    size_t i, n;
    for (i = 0; i < size; i += n) {
        size_t offset = (size_t)((at + i) % LINE);
        if (number != (at + i) / LINE) {
            number = (at + i) / LINE;
            memset(line, 'x', LINE);
            snprintf(line, sizeof line, "%016llx", (unsigned long long)number);
            line[16] = ' ';
            line[LINE - 1] = '\n';
        }
        n = LINE - offset < size - i ? LINE - offset : size - i;
        memcpy(out + i, line + offset, n);
    }
}

static uint64_t send_some(int fd, uint64_t at, uint64_t end) {
    char chunk[CHUNK];
    size_t size = end - at < CHUNK ? (size_t)(end - at) : CHUNK;
    ssize_t n;
    make_bytes(chunk, at, size);
    n = send(fd, chunk, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN) tool_fail("send");
    return n > 0 ? (uint64_t)n : 0;
}

/* How many came; 0 at the peer's end. */
static uint64_t receive_some(int fd, uint64_t at) {
    char chunk[CHUNK], expected[CHUNK];
    ssize_t n = recv(fd, chunk, CHUNK, 0);
    if (n < 0) tool_fail("recv");
    make_bytes(expected, at, (size_t)n);
    errno = 0;
    if (memcmp(chunk, expected, (size_t)n) != 0) tool_fail("bytes");
    return (uint64_t)n;
}

static int wait_for(int fd, int events, int timeout_ms) {
    struct pollfd one;
    one.fd = fd;
    one.events = (short)events;
    one.revents = 0;
    if (poll(&one, 1, timeout_ms) < 0) tool_fail("poll");
    return one.revents;
}

static void check_growth(long pid, long before) {
    long growth = tool_rss(pid) - before;
    printf("the server grew by %ld KiB\n", growth / 1024);
    errno = 0;
    if (growth >= MAX_GROWTH) tool_fail("the server's memory");
}

static void greet(int port) {
    int fd = tool_connect(port);
    tool_send(fd, "hello\n", 6);
    tool_expect(fd, "hello\n", 6);
    close(fd);
}

static void read_everything(int fd, uint64_t sent, uint64_t total) {
    uint64_t received = 0, n = 1;
    while (n) {
        int events = wait_for(fd, sent < total ? POLLIN | POLLOUT : POLLIN, 10000);
        errno = ETIMEDOUT;
        if (!events) tool_fail("reading everything");
        if (events & POLLOUT && sent < total) {
            sent += send_some(fd, sent, total);
            if (sent == total) shutdown(fd, SHUT_WR);
        }
        if (events & ~POLLOUT) received += n = receive_some(fd, received);
    }
    errno = 0;
    if (received != total) tool_fail("the number of bytes that came back");
}

int main(int argc, char **argv) {
    uint64_t sent = 0, total = argc == 4 ? (uint64_t)atol(argv[2]) << 20 : 0;
    int fd, port = argc == 4 ? atoi(argv[1]) : 0;
    long before, pid = argc == 4 ? atol(argv[3]) : 0;
    if (!total) return 2;
    greet(port);
    before = tool_rss(pid);
    fd = tool_connect(port);
    while (sent < total && wait_for(fd, POLLOUT, STALL_MS)) sent += send_some(fd, sent, total);
    printf("blocked after %llu MiB\n", (unsigned long long)(sent >> 20));
    errno = 0;
    if (sent == total) tool_fail("being blocked");
    check_growth(pid, before);
    greet(port);
    read_everything(fd, sent, total);
    check_growth(pid, before);
    return 0;
}
