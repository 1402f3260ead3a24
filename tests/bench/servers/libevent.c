/* libevent: bufferevents, evbuffer_search for the delimiter, moving chains from input to output. */
#include "peer.h"
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>

static void send_file(struct evbuffer *out) {
    if (mode == WRITE) evbuffer_add_reference(out, served_file.data, served_file.size, NULL, NULL);
    else evbuffer_add_file(out, dup(served_file.fd), 0, (ev_off_t)served_file.size);
}

static void on_written(struct bufferevent *stream, void *arg) {
    (void)arg;
    bufferevent_free(stream);
}

static void on_event(struct bufferevent *stream, short what, void *arg) {
    (void)what;
    (void)arg;
    bufferevent_free(stream);
}

static void on_read(struct bufferevent *stream, void *arg) {
    struct evbuffer *in = bufferevent_get_input(stream), *out = bufferevent_get_output(stream);
    struct evbuffer_ptr end;
    (void)arg;
    if (mode == CHUNK) {
        evbuffer_add_buffer(out, in);
        return;
    }
    for (;;) {
        end = evbuffer_search(in, "\n", 1, NULL);
        if (end.pos < 0) return;
        if (mode >= SEND_FILE) {
            evbuffer_drain(in, (size_t)end.pos + 1);
            send_file(out);
        } else {
            evbuffer_remove_buffer(in, out, (size_t)end.pos + 1);
            if (mode == ONCE) bufferevent_setcb(stream, NULL, on_written, on_event, NULL);
        }
    }
}

static void on_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *peer,
                      int size, void *arg) {
    struct bufferevent *stream;
    int on = 1;
    (void)peer;
    (void)size;
    (void)arg;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    stream = bufferevent_socket_new(evconnlistener_get_base(listener), fd, BEV_OPT_CLOSE_ON_FREE);
    bufferevent_set_max_single_read(stream, READ_SIZE);
    bufferevent_set_max_single_write(stream, mode >= SEND_FILE ? SERVED_PIECE : READ_SIZE);
    bufferevent_setcb(stream, on_read, NULL, on_event, NULL);
    bufferevent_enable(stream, EV_READ | EV_WRITE);
}

int main(int argc, char **argv) {
    int fd = peer_listen(peer_setup(argc, argv));
    struct event_base *base = event_base_new();
    if (!base || !evconnlistener_new(base, on_accept, NULL, LEV_OPT_CLOSE_ON_FREE, 0, fd)) return 1;
    return event_base_dispatch(base);
}
