/* Hand-written epoll, the practical limit: level-triggered, one read for each wake-up (a short one
 * proves the socket empty), one write from where the bytes lie, EPOLLOUT only while the kernel's
 * buffer is full, memory only for an unfinished line and unsent output. Its mode fork is line in
 * two processes that share the listening socket.
 */
#include "peer.h"
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>

enum { EVENTS = 512, ACCEPTS = 64 };

typedef struct connection {
    int fd, waits_to_send;
    peer_bytes rest, unsent;
    size_t sent;           /* of unsent, or of the file */
} connection;

static int poller;

static void connection_close(connection *c) {
    close(c->fd);
    bytes_free(&c->rest);
    bytes_free(&c->unsent);
    free(c);
}

static void watch(connection *c, int operation, unsigned events) {
    struct epoll_event event;
    event.events = events;
    event.data.ptr = c;
    epoll_ctl(poller, operation, c->fd, &event);
    c->waits_to_send = (events & EPOLLOUT) != 0;
}

/* Each of these gives -1 when the connection is to be closed. */
static int send_answer(connection *c, const char *data, size_t size) {
    ssize_t n = write(c->fd, data, size);
    if (n == (ssize_t)size) return mode == ONCE ? -1 : 0;
    if (n < 0 && errno != EAGAIN) return -1;
    if (n < 0) n = 0;
    bytes_add(&c->unsent, data + n, size - (size_t)n);
    watch(c, EPOLL_CTL_MOD, EPOLLOUT);
    return 0;
}

static int send_unsent(connection *c) {
    ssize_t n = write(c->fd, c->unsent.data + c->sent, c->unsent.size - c->sent);
    if (n < 0) return errno == EAGAIN ? 0 : -1;
    c->sent += (size_t)n;
    if (c->sent < c->unsent.size) return 0;
    c->sent = 0;
    bytes_free(&c->unsent);
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
    return mode == ONCE ? -1 : 0;
}

static int send_file(connection *c) {
    while (c->sent < served_file.size) {
        off_t offset = (off_t)c->sent;
        size_t left = served_file.size - c->sent;
        ssize_t n = mode == WRITE ? write(c->fd, served_file.data + c->sent, left)
                                  : sendfile(c->fd, served_file.fd, &offset, left);
        if (n < 0 && errno != EAGAIN) return -1;
        if (n < 0) {
            if (!c->waits_to_send) watch(c, EPOLL_CTL_MOD, EPOLLOUT);
            return 0;
        }
        c->sent += (size_t)n;
    }
    c->sent = 0;
    if (c->waits_to_send) watch(c, EPOLL_CTL_MOD, EPOLLIN);
    return 0;
}

static int on_readable(connection *c) {
    ssize_t n = read(c->fd, read_buffer, READ_SIZE);
    const char *data;
    size_t size;
    if (n <= 0) return n < 0 && errno == EAGAIN ? 0 : -1;
    if (mode >= SEND_FILE) return send_file(c);
    data = answers(&c->rest, read_buffer, (size_t)n, &size);
    return size ? send_answer(c, data, size) : 0;
}

static int on_writable(connection *c) {
    return mode >= SEND_FILE ? send_file(c) : send_unsent(c);
}

static void on_acceptable(int listener) {
    int i, fd;
    for (i = 0; i < ACCEPTS; i++) {
        connection *c;
        fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        c = calloc(1, sizeof *c);
        if (!c) abort();
        c->fd = fd;
        watch(c, EPOLL_CTL_ADD, EPOLLIN);
    }
}

int main(int argc, char **argv) {
    int listener = peer_listen(peer_setup(argc, argv)), i, n;
    struct epoll_event events[EVENTS], event;
    if (argc > 2 && strcmp(argv[2], "fork") == 0 && fork() == 0) prctl(PR_SET_PDEATHSIG, SIGTERM);
    poller = epoll_create1(EPOLL_CLOEXEC);
    event.events = EPOLLIN | EPOLLEXCLUSIVE;
    event.data.ptr = NULL;
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        n = epoll_wait(poller, events, EVENTS, -1);
        for (i = 0; i < n; i++) {
            connection *c = events[i].data.ptr;
            if (!c) on_acceptable(listener);
            else if ((c->waits_to_send ? on_writable(c) : on_readable(c)) != 0) connection_close(c);
        }
    }
}
