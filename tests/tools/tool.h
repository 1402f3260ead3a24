/* What the load tools share: blocking loopback sockets in which no wait is longer than ten seconds,
 * and a process's resident memory. */
#ifndef TOOL_H
#define TOOL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static void tool_fail(const char *step) {
    fprintf(stderr, "%s: %s\n", step, errno ? strerror(errno) : "not what was expected");
    exit(1);
}

static int tool_connect(int port) {
    struct sockaddr_in address;
    struct timeval limit = { 10, 0 };
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0) tool_fail("socket");
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) tool_fail("connect");
    return fd;
}

static void tool_send(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n < 0) tool_fail("send");
        data += n;
        size -= (size_t)n;
    }
}

/* Receives exactly those bytes, or ends the program. */
static void tool_expect(int fd, const char *data, size_t size) {
    char got[4096];
    while (size) {
        ssize_t n = recv(fd, got, size < sizeof got ? size : sizeof got, 0);
        if (n < 0) tool_fail("recv");
        errno = 0;
        if (n == 0) tool_fail("the peer's end");
        if (memcmp(got, data, (size_t)n) != 0) tool_fail("bytes");
        data += n;
        size -= (size_t)n;
    }
}

/* In bytes. smaps_rollup counts pages; the counters in status lag behind by some for each core. */
static inline long tool_rss(long pid) {
    char path[64], line[128];
    long kilobytes = -1;
    FILE *file;
    snprintf(path, sizeof path, "/proc/%ld/smaps_rollup", pid);
    file = fopen(path, "r");
    if (!file) tool_fail(path);
    while (kilobytes < 0 && fgets(line, sizeof line, file))
        if (strncmp(line, "Rss:", 4) == 0) kilobytes = strtol(line + 4, NULL, 10);
    fclose(file);
    return kilobytes * 1024;
}

#endif
