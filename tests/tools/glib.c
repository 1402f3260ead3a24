/* A server and its clients in GLib's main loop: the library's loop is one GSource of it.
 *
 *     cc tests/tools/glib.c $(pkg-config --cflags --libs glib-2.0) -o glib
 *
 * Prints how many answers came, and how many ticks of GLib's own timer beside them.
 */
#define TCPSERVER_IMPLEMENTATION
#include "../../tcpserver.h"
#include <glib.h>
#include <stdio.h>

enum { CLIENTS = 50, ROUNDS = 40 };

typedef struct loop_source {
    GSource source;
    tcpsrv_loop *loop;
    gpointer tag;
} loop_source;

static GMainLoop *main_loop;
static int port, left = CLIENTS, answers, ticks;

static gboolean prepare(GSource *source, gint *timeout_ms) {
    *timeout_ms = tcpsrv_loop_timeout(((loop_source *)source)->loop);
    return *timeout_ms == 0;
}

static gboolean check(GSource *source) {
    loop_source *own = (loop_source *)source;
    return g_source_query_unix_fd(source, own->tag) != 0 || tcpsrv_loop_timeout(own->loop) == 0;
}

static gboolean dispatch(GSource *source, GSourceFunc fn, gpointer arg) {
    (void)fn, (void)arg;
    return tcpsrv_loop_poll(((loop_source *)source)->loop, 0) == 0;
}

static GSourceFuncs source_functions = { .prepare = prepare, .check = check, .dispatch = dispatch };

static int echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer, (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    return err;
}

static int ask(void *loop) {
    tcpsrv_connect_options options = { .host = "localhost", .family = AF_INET, .port = port };
    tcpsrv_stream *stream = tcpsrv_connect(loop, &options);
    tcpsrv_bytes line;
    int i;
    for (i = 0; stream && i < ROUNDS; i++) {
        if (tcpsrv_write(stream, "hello\n", 6) != 0) break;
        if (tcpsrv_read_until(stream, "\n", 0, &line) != 0) break;
        answers++;
        tcpsrv_sleep(1);
    }
    if (stream) tcpsrv_close(stream);
    if (--left == 0) g_main_loop_quit(main_loop);
    return 0;
}

static gboolean tick(gpointer arg) {
    (void)arg;
    ticks++;
    return G_SOURCE_CONTINUE;
}

static void run(tcpsrv_loop *loop) {
    GSource *source = g_source_new(&source_functions, sizeof(loop_source));
    guint ticker = g_timeout_add(5, tick, NULL);
    ((loop_source *)source)->loop = loop;
    ((loop_source *)source)->tag = g_source_add_unix_fd(source, tcpsrv_loop_fd(loop), G_IO_IN);
    g_source_attach(source, NULL);
    main_loop = g_main_loop_new(NULL, FALSE);
    g_main_loop_run(main_loop);
    g_main_loop_unref(main_loop);
    g_source_destroy(source);
    g_source_unref(source);
    g_source_remove(ticker);
}

int main(void) {
    tcpsrv_options options = { .handle_stream = echo };
    tcpsrv_loop *loop = tcpsrv_loop_default();
    tcpsrv *server = tcpsrv_new(&options);
    int i;
    if (!server || tcpsrv_listen(server, 0, "127.0.0.1") != 0) return 1;
    port = tcpsrv_port(server, 0);
    for (i = 0; i < CLIENTS; i++)
        if (tcpsrv_spawn(loop, ask, loop, 0) < 0) return 1;
    run(loop);
    tcpsrv_free(server);
    tcpsrv_loop_free(loop);
    printf("%d answers, %d ticks\n", answers, ticks);
    return answers != CLIENTS * ROUNDS || ticks == 0;
}
