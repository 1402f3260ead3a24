/* libev: what raw_epoll does, over ev_io watchers. */
#include "peer.h"
#include <ev.h>
#include <sys/sendfile.h>

typedef struct connection {
    ev_io readable, writable;
    peer_bytes rest, unsent;
    size_t sent;           /* of unsent, or of the file */
} connection;

static void connection_close(struct ev_loop *loop, connection *c) {
    ev_io_stop(loop, &c->readable);
    ev_io_stop(loop, &c->writable);
    close(c->readable.fd);
    bytes_free(&c->rest);
    bytes_free(&c->unsent);
    free(c);
}

static void wait_to_send(struct ev_loop *loop, connection *c, int on) {
    if (on == ev_is_active(&c->writable)) return;
    if (on) {
        ev_io_stop(loop, &c->readable);
        ev_io_start(loop, &c->writable);
    } else {
        ev_io_stop(loop, &c->writable);
        ev_io_start(loop, &c->readable);
    }
}

/* Each of these gives -1 when the connection is to be closed. */
static int send_answer(struct ev_loop *loop, connection *c, const char *data, size_t size) {
    ssize_t n = write(c->readable.fd, data, size);
    if (n == (ssize_t)size) return mode == ONCE ? -1 : 0;
    if (n < 0 && errno != EAGAIN) return -1;
    if (n < 0) n = 0;
    bytes_add(&c->unsent, data + n, size - (size_t)n);
    wait_to_send(loop, c, 1);
    return 0;
}

static int send_unsent(struct ev_loop *loop, connection *c) {
    ssize_t n = write(c->readable.fd, c->unsent.data + c->sent, c->unsent.size - c->sent);
    if (n < 0) return errno == EAGAIN ? 0 : -1;
    c->sent += (size_t)n;
    if (c->sent < c->unsent.size) return 0;
    c->sent = 0;
    bytes_free(&c->unsent);
    wait_to_send(loop, c, 0);
    return mode == ONCE ? -1 : 0;
}

static int send_file(struct ev_loop *loop, connection *c) {
    while (c->sent < served_file.size) {
        off_t offset = (off_t)c->sent;
        size_t left = served_file.size - c->sent;
        ssize_t n = mode == WRITE ? write(c->readable.fd, served_file.data + c->sent, left)
                                  : sendfile(c->readable.fd, served_file.fd, &offset, left);
        if (n < 0 && errno != EAGAIN) return -1;
        if (n < 0) {
            wait_to_send(loop, c, 1);
            return 0;
        }
        c->sent += (size_t)n;
    }
    c->sent = 0;
    wait_to_send(loop, c, 0);
    return 0;
}

static int read_and_answer(struct ev_loop *loop, connection *c) {
    ssize_t n = read(c->readable.fd, read_buffer, READ_SIZE);
    const char *data;
    size_t size;
    if (n <= 0) return n < 0 && errno == EAGAIN ? 0 : -1;
    if (mode >= SEND_FILE) return send_file(loop, c);
    data = answers(&c->rest, read_buffer, (size_t)n, &size);
    return size ? send_answer(loop, c, data, size) : 0;
}

static void on_readable(struct ev_loop *loop, ev_io *watcher, int events) {
    (void)events;
    if (read_and_answer(loop, watcher->data) != 0) connection_close(loop, watcher->data);
}

static void on_writable(struct ev_loop *loop, ev_io *watcher, int events) {
    connection *c = watcher->data;
    (void)events;
    if ((mode >= SEND_FILE ? send_file(loop, c) : send_unsent(loop, c)) != 0)
        connection_close(loop, c);
}

static void on_acceptable(struct ev_loop *loop, ev_io *watcher, int events) {
    int fd, i;
    (void)events;
    for (i = 0; i < 64; i++) {
        connection *c;
        fd = accept4(watcher->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        c = calloc(1, sizeof *c);
        if (!c) abort();
        ev_io_init(&c->readable, on_readable, fd, EV_READ);
        ev_io_init(&c->writable, on_writable, fd, EV_WRITE);
        c->readable.data = c->writable.data = c;
        ev_io_start(loop, &c->readable);
    }
}

int main(int argc, char **argv) {
    struct ev_loop *loop = EV_DEFAULT;
    ev_io acceptable;
    ev_io_init(&acceptable, on_acceptable, peer_listen(peer_setup(argc, argv)), EV_READ);
    ev_io_start(loop, &acceptable);
    return !ev_run(loop, 0);
}
