/* The echo server as a user would write it with callbacks.
 *
 * ours_callbacks PORT [line|timed|chunk|once|file FILE|write FILE]: line (without an argument too)
 * sends lines back, timed too but ends idle connections, chunk sends back whatever came, once one
 * line and then closes. file and write answer each line with the file, by tcpsrv_sendfile and from
 * memory.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../../../tcpserver.h"
#include "served_file.h"
#include <stdio.h>

static void on_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg) {
    if (!err) err = tcpsrv_write(stream, line.data, line.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, arg);
    if (err) tcpsrv_close(stream);
}

static void on_chunk(tcpsrv_stream *stream, int err, tcpsrv_bytes chunk, void *arg) {
    if (!err) err = tcpsrv_write(stream, chunk.data, chunk.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_some(0), on_chunk, arg);
    if (err) tcpsrv_close(stream);
}

static void on_only_line(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg) {
    (void)arg;
    if (!err) tcpsrv_write(stream, line.data, line.size);
    tcpsrv_close(stream);
}

static void on_file_asked(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg) {
    (void)line;
    if (!err) err = tcpsrv_sendfile(stream, served_file.fd, 0, served_file.size);
    if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 0), on_file_asked, arg);
    if (err) tcpsrv_close(stream);
}

static void on_bytes_asked(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg);

/* A write outside a coroutine never waits: what does not fit goes on when the queue is flushed. */
static void send_more(tcpsrv_stream *stream, int err, void *arg) {
    size_t sent = (size_t)(uintptr_t)tcpsrv_user(stream);
    size_t size = served_file.size - sent < SERVED_PIECE ? served_file.size - sent : SERVED_PIECE;
    if (!err) err = tcpsrv_write(stream, served_file.data + sent, size);
    sent += size;
    tcpsrv_set_user(stream, (void *)(uintptr_t)sent);
    if (!err && sent < served_file.size) err = tcpsrv_on_flush(stream, send_more, arg);
    else if (!err) err = tcpsrv_read(stream, tcpsrv_until("\n", 0), on_bytes_asked, arg);
    if (err) tcpsrv_close(stream);
}

static void on_bytes_asked(tcpsrv_stream *stream, int err, tcpsrv_bytes line, void *arg) {
    (void)line;
    tcpsrv_set_user(stream, NULL);
    if (err) tcpsrv_close(stream);
    else send_more(stream, 0, arg);
}

static int on_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    (void)user;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_line, NULL);
}

static int on_chunk_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    (void)user;
    return tcpsrv_read(stream, tcpsrv_some(0), on_chunk, NULL);
}

static int on_once_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    (void)user;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_only_line, NULL);
}

static int on_file_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    (void)user;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_file_asked, NULL);
}

static int on_bytes_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    (void)peer;
    (void)user;
    return tcpsrv_read(stream, tcpsrv_until("\n", 0), on_bytes_asked, NULL);
}

static tcpsrv_stream_fn *handler_of(const char *mode) {
    if (strcmp(mode, "chunk") == 0) return on_chunk_stream;
    if (strcmp(mode, "once") == 0) return on_once_stream;
    if (strcmp(mode, "file") == 0) return on_file_stream;
    if (strcmp(mode, "write") == 0) return on_bytes_stream;
    return on_stream;
}

int main(int argc, char **argv) {
    tcpsrv_options options = { 0 };
    tcpsrv *server;
    if (argc < 2) return 2;
    options.on_stream = handler_of(argc > 2 ? argv[2] : "line");
    options.max_write_buffer_size = 2 << 20; /* a line of 1 MiB beside write_high_water */
    if (argc > 2 && strcmp(argv[2], "timed") == 0) options.idle_timeout_ms = 60000;
    if (argc > 3) open_served_file(argv[3]);
    server = tcpsrv_new(&options);
    if (!server || tcpsrv_listen(server, atoi(argv[1]), "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
