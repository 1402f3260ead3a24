/* A chat room: every line goes to everybody. Who does not read is dropped once 256 KB wait for
 * him, so that one slow reader costs the others neither time nor memory.
 *
 *     cc examples/chat.c -o chat
 *     ./chat & nc 127.0.0.1 8888
 *
 * chat [PORT]: 8888, 0 for any free one. Two or more nc make it a chat.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LINE = 1024 };

/* try_write never waits: a full queue is refused, and its stream ended. */
static void tell(tcpsrv_stream *stream, void *arg) {
    const tcpsrv_bytes *line = arg;
    if (tcpsrv_try_write(stream, line->data, line->size) == TCPSRV_EBUFFULL) tcpsrv_abort(stream);
}

static int chat(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    char text[TCPSRV_ADDRESS_TEXT + 2 + MAX_LINE];
    size_t name;
    tcpsrv_bytes line;
    int err;
    tcpsrv_address_text(peer, text, TCPSRV_ADDRESS_TEXT);
    strcat(text, ": ");
    name = strlen(text);
    while ((err = tcpsrv_read_until(stream, "\n", MAX_LINE, &line)) == 0) {
        memcpy(text + name, line.data, line.size);
        line.data = text;
        line.size += name;
        tcpsrv_foreach(*(tcpsrv **)user, tell, &line);
    }
    if (err == TCPSRV_ETOOBIG)
        return tcpsrv_printf(stream, "a line has at most %d bytes\n", MAX_LINE);
    return err;
}

int main(int argc, char **argv) {
    tcpsrv *server;
    tcpsrv_options options = { .handle_stream = chat, .user = &server };
    options.max_write_buffer_size = 256 << 10;
    server = tcpsrv_new(&options);
    if (!server || tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
