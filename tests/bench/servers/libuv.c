/* libuv: one read buffer for all, uv_try_write first, uv_write for what is left. There is no mode
 * file: its sendfile takes a thread.
 */
#include "peer.h"
#include <uv.h>

typedef struct connection {
    uv_tcp_t tcp;
    uv_write_t request;
    peer_bytes rest, unsent;
    size_t sent; /* of the file */
} connection;

static void on_closed(uv_handle_t *handle) {
    connection *c = (connection *)handle;
    bytes_free(&c->rest);
    bytes_free(&c->unsent);
    free(c);
}

static void connection_close(connection *c) {
    if (!uv_is_closing((uv_handle_t *)c)) uv_close((uv_handle_t *)c, on_closed);
}

static void on_alloc(uv_handle_t *handle, size_t size, uv_buf_t *buffer) {
    (void)handle;
    (void)size;
    *buffer = uv_buf_init(read_buffer, READ_SIZE);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buffer);

static void on_written(uv_write_t *request, int err) {
    connection *c = request->data;
    bytes_free(&c->unsent);
    if (err || mode == ONCE) connection_close(c);
    else uv_read_start((uv_stream_t *)c, on_alloc, on_read);
}

static void send_answer(connection *c, const char *data, size_t size) {
    uv_buf_t buffer = uv_buf_init((char *)data, (unsigned)size);
    int n = uv_try_write((uv_stream_t *)c, &buffer, 1);
    if (n == (int)size) {
        if (mode == ONCE) connection_close(c);
        return;
    }
    if (n < 0 && n != UV_EAGAIN) {
        connection_close(c);
        return;
    }
    if (n < 0) n = 0;
    bytes_add(&c->unsent, data + n, size - (size_t)n);
    buffer = uv_buf_init(c->unsent.data, (unsigned)c->unsent.size);
    c->request.data = c;
    uv_read_stop((uv_stream_t *)c);
    uv_write(&c->request, (uv_stream_t *)c, &buffer, 1, on_written);
}

static void send_file(connection *c) {
    uv_buf_t buffer = uv_buf_init((char *)served_file.data, (unsigned)served_file.size);
    c->request.data = c;
    uv_write(&c->request, (uv_stream_t *)c, &buffer, 1, on_written);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buffer) {
    connection *c = (connection *)stream;
    const char *data;
    size_t size;
    if (n < 0) {
        connection_close(c);
    } else if (n > 0 && mode == WRITE) {
        send_file(c);
    } else if (n > 0) {
        data = answers(&c->rest, buffer->base, (size_t)n, &size);
        if (size) send_answer(c, data, size);
    }
}

static void on_connection(uv_stream_t *listener, int err) {
    connection *c;
    if (err) return;
    c = calloc(1, sizeof *c);
    if (!c) abort();
    uv_tcp_init(listener->loop, &c->tcp);
    if (uv_accept(listener, (uv_stream_t *)c) != 0) {
        connection_close(c);
        return;
    }
    uv_tcp_nodelay(&c->tcp, 1);
    uv_read_start((uv_stream_t *)c, on_alloc, on_read);
}

int main(int argc, char **argv) {
    int port = peer_setup(argc, argv);
    uv_loop_t *loop = uv_default_loop();
    struct sockaddr_in address;
    uv_tcp_t listener;
    uv_tcp_init(loop, &listener);
    uv_ip4_addr("127.0.0.1", port, &address);
    uv_tcp_bind(&listener, (struct sockaddr *)&address, 0);
    if (uv_listen((uv_stream_t *)&listener, BACKLOG, on_connection) != 0) return 1;
    return uv_run(loop, UV_RUN_DEFAULT);
}
