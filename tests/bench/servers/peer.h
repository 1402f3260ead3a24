/* What the peers written in C share, so that they differ only in the library under them: modes, the
 * listening socket, splitting into lines, gathering output.
 *
 *     PEER PORT [line|chunk|once|file FILE|write FILE]
 *
 * line (without an argument too) sends lines back, all that one read brought with one write; chunk
 * whatever came; once one line, and then closes. file and write answer each line with the file, by
 * sendfile and from memory.
 */
#ifndef PEER_H
#define PEER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "served_file.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PEER_UNUSED __attribute__((unused))

enum { READ_SIZE = 1 << 16, BACKLOG = 4096 };
enum peer_mode { LINE, CHUNK, ONCE, SEND_FILE, WRITE };

static enum peer_mode mode;
static PEER_UNUSED char read_buffer[READ_SIZE]; /* one for the loop */

/* The port. */
static PEER_UNUSED int peer_setup(int argc, char **argv) {
    static const char *const names[] = { "line", "chunk", "once", "file", "write" };
    size_t i;
    if (argc < 2) exit(2);
    for (i = 0; argc > 2 && i < sizeof names / sizeof *names; i++)
        if (strcmp(argv[2], names[i]) == 0) mode = (enum peer_mode)i;
    if (mode >= SEND_FILE) open_served_file(argc > 3 ? argv[3] : "");
    signal(SIGPIPE, SIG_IGN);
    return atoi(argv[1]);
}

static PEER_UNUSED int peer_listen(int port) {
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* accepted ones inherit it here */
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, BACKLOG) != 0) {
        perror("listen");
        exit(1);
    }
    return fd;
}

/* ---- bytes that grow ------------------------------------------------------------------------- */

typedef struct peer_bytes {
    char *data;
    size_t size, capacity;
} peer_bytes;

static PEER_UNUSED void bytes_add(peer_bytes *bytes, const char *data, size_t size) {
    if (bytes->size + size > bytes->capacity) {
        size_t capacity = bytes->capacity ? bytes->capacity : 256;
        while (capacity < bytes->size + size) capacity *= 2;
        bytes->data = realloc(bytes->data, capacity);
        bytes->capacity = capacity;
        if (!bytes->data) abort();
    }
    memcpy(bytes->data + bytes->size, data, size);
    bytes->size += size;
}

static PEER_UNUSED void bytes_free(peer_bytes *bytes) {
    free(bytes->data);
    memset(bytes, 0, sizeof *bytes);
}

/* ---- lines ----------------------------------------------------------------------------------- */

/* The answers to what one read brought: a single whole line lies where it was read, else they are
   gathered here. *rest is a connection's unfinished line. */
static PEER_UNUSED peer_bytes gathered;

static PEER_UNUSED const char *answers(peer_bytes *rest, const char *data, size_t size,
                                       size_t *answer_size) {
    const char *last;
    *answer_size = size;
    if (mode == CHUNK) return data;
    if (!rest->size && memchr(data, '\n', size) == data + size - 1) return data;
    last = memrchr(data, '\n', size);
    gathered.size = 0;
    if (last) {
        bytes_add(&gathered, rest->data, rest->size);
        bytes_free(rest);
    }
    while (last && data <= last) { /* line by line, as a protocol would */
        const char *end = (const char *)memchr(data, '\n', size) + 1;
        bytes_add(&gathered, data, (size_t)(end - data));
        size -= (size_t)(end - data);
        data = end;
    }
    if (size) bytes_add(rest, data, size);
    *answer_size = gathered.size;
    return gathered.data;
}

#endif
