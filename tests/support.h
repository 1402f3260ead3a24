/* What the tests' harness and the tests need of the system, before the library is seen. */
#ifndef SUPPORT_H
#define SUPPORT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Not every test file uses every helper. */
#if defined(__GNUC__)
#define TEST_PRIVATE static __attribute__((unused))
#else
#define TEST_PRIVATE static
#endif

TEST_PRIVATE uint64_t test_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

TEST_PRIVATE void test_sleep_ms(int ms) {
    struct timespec left;
    left.tv_sec = ms / 1000;
    left.tv_nsec = (long)(ms % 1000) * 1000000;
    while (nanosleep(&left, &left) != 0 && errno == EINTR) continue;
}

TEST_PRIVATE int test_open_descriptors(int limit) {
    int fd, count = 0;
    for (fd = 0; fd < limit; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

TEST_PRIVATE int test_set_nonblocking(int fd) {
    return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* A listening socket on a free loopback port; its address is left in *address. */
TEST_PRIVATE int test_listener(struct sockaddr_in *address) {
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)address, size) != 0 || listen(fd, 1024) != 0 ||
        getsockname(fd, (struct sockaddr *)address, &size) != 0)
        abort();
    return fd;
}

/* A blocking socket from 127.0.0.host to that port here. */
TEST_PRIVATE int test_client(int host, int port) {
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(0x7f000000u + (unsigned)host);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0) abort();
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)port);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) abort();
    return fd;
}

/* A connected pair of non-blocking loopback TCP sockets. 0, or -errno and no descriptors. */
TEST_PRIVATE int test_pair(int fds[2]) {
    struct sockaddr_in address;
    int err = 0, listener = test_listener(&address);
    fds[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fds[0], (struct sockaddr *)&address, sizeof address) != 0) err = -errno;
    fds[1] = err ? -1 : accept(listener, NULL, NULL);
    if (!err && fds[1] < 0) err = -errno;
    close(listener);
    if (!err && test_set_nonblocking(fds[0]) == 0 && test_set_nonblocking(fds[1]) == 0) return 0;
    if (fds[0] >= 0) close(fds[0]);
    if (fds[1] >= 0) close(fds[1]);
    return err;
}

#endif
