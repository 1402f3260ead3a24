/* Loops among others: servers and clients inside a foreign poll loop, and one loop a thread. */
#include "test.h"

enum { CLIENTS = 25, ROUNDS = 20, THREADS = 4 };

/* A server and clients of one loop. The clients of all talk to all servers in turn. */
typedef struct site {
    tcpsrv_loop *loop;
    tcpsrv *server;
    pthread_t thread;
    int number, port, left;
    long answers;
} site;

static site sites[THREADS];
static int site_count;
static pthread_mutex_t sites_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sites_changed = PTHREAD_COND_INITIALIZER;
static int listening, finished;

static int echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    tcpsrv_bytes line;
    int err;
    (void)peer, (void)user;
    while ((err = tcpsrv_read_until(stream, "\n", 0, &line)) == 0)
        if ((err = tcpsrv_write(stream, line.data, line.size)) != 0) break;
    return err;
}

static void open_site(site *own) {
    tcpsrv_options options;
    memset(&options, 0, sizeof options);
    options.handle_stream = echo;
    options.loop = own->loop;
    own->server = tcpsrv_new(&options);
    CHECK(own->server != NULL);
    CHECK_INT(tcpsrv_listen(own->server, 0, "127.0.0.1"), 0);
    own->port = tcpsrv_port(own->server, 0);
    own->left = CLIENTS;
}

static void close_site(site *own) {
    tcpsrv_free(own->server);
    CHECK_INT(tcpsrv_loop_free(own->loop), 0);
}

static void ask(tcpsrv_stream *stream, site *own) {
    tcpsrv_bytes line;
    char text[32];
    int i;
    for (i = 0; i < ROUNDS; i++) {
        snprintf(text, sizeof text, "question %d\n", i);
        CHECK_INT(tcpsrv_write(stream, text, strlen(text)), 0);
        CHECK_INT(tcpsrv_read_until(stream, "\n", 0, &line), 0);
        CHECK_MEM(line.data, line.size, text);
        own->answers++;
        if (i % 5 == 0) CHECK_INT(tcpsrv_sleep(1), 0);
    }
}

static void stop_site(void *arg) {
    tcpsrv_loop_stop(((site *)arg)->loop);
}

/* The last client of all posts to every loop; until then each has work. */
static void site_is_done(void) {
    int i, all;
    pthread_mutex_lock(&sites_lock);
    all = ++finished == site_count;
    pthread_mutex_unlock(&sites_lock);
    for (i = 0; all && i < site_count; i++)
        CHECK_INT(tcpsrv_post(sites[i].loop, stop_site, &sites[i]), 0);
}

/* By name every other time, so that lookups run in their threads too. */
static int be_client(void *arg) {
    site *own = (site *)arg;
    int nth = own->left--;
    tcpsrv_connect_options options;
    tcpsrv_stream *stream;
    memset(&options, 0, sizeof options);
    options.host = nth % 2 ? "localhost" : "127.0.0.1";
    options.family = AF_INET;
    options.port = sites[(own->number + nth) % site_count].port;
    stream = tcpsrv_connect(own->loop, &options);
    CHECK(stream != NULL);
    ask(stream, own);
    tcpsrv_close(stream);
    if (own->answers == (long)CLIENTS * ROUNDS) site_is_done();
    return 0;
}

static void spawn_clients(site *own) {
    int i;
    for (i = 0; i < CLIENTS; i++) CHECK(tcpsrv_spawn(own->loop, be_client, own, 0) > 0);
}

/* ---- one loop a thread ----------------------------------------------------------------------- */

static void *run_site(void *arg) {
    site *own = (site *)arg;
    own->loop = own->number % 2 ? tcpsrv_loop_new() : tcpsrv_loop_default();
    CHECK(own->loop != NULL);
    open_site(own);
    pthread_mutex_lock(&sites_lock);
    listening++;
    pthread_cond_broadcast(&sites_changed);
    while (listening < site_count) pthread_cond_wait(&sites_changed, &sites_lock);
    pthread_mutex_unlock(&sites_lock);
    spawn_clients(own);
    CHECK_INT(tcpsrv_loop_run(own->loop), 0);
    close_site(own);
    return NULL;
}

static void four_loops_in_four_threads_serve_each_other(void) {
    int i;
    site_count = THREADS;
    for (i = 0; i < THREADS; i++) {
        sites[i].number = i;
        CHECK_INT(pthread_create(&sites[i].thread, NULL, run_site, &sites[i]), 0);
    }
    for (i = 0; i < THREADS; i++) CHECK_INT(pthread_join(sites[i].thread, NULL), 0);
    for (i = 0; i < THREADS; i++) CHECK_INT(sites[i].answers, CLIENTS * ROUNDS);
}

/* ---- inside another loop --------------------------------------------------------------------- */

#if !defined(TCPSERVER_USE_POLL)
static int stopped;

static void note_stop(void *arg) {
    (void)arg;
    stopped = 1;
}

/* One turn of a loop that knows descriptors and a timeout, and nothing of this library. */
static void foreign_turn(int loop_fd, int timeout_ms, int own_fd, int *own_events) {
    struct pollfd entries[2];
    char byte;
    entries[0].fd = loop_fd;
    entries[1].fd = own_fd;
    entries[0].events = entries[1].events = POLLIN;
    entries[0].revents = entries[1].revents = 0;
    if (poll(entries, 2, timeout_ms) < 0) CHECK_INT(errno, EINTR);
    if (entries[1].revents && ++*own_events < 10) return;
    if (entries[1].revents) CHECK_INT(read(own_fd, &byte, 1), 1);
}

static void a_server_and_its_clients_live_in_a_foreign_poll_loop(void) {
    int fds[2], events = 0, waits = 0;
    CHECK_INT(pipe(fds), 0);
    CHECK_INT(write(fds[1], "x", 1), 1);
    site_count = 1;
    sites[0].loop = tcpsrv_loop_default();
    open_site(&sites[0]);
    spawn_clients(&sites[0]);
    CHECK(tcpsrv_call_later(sites[0].loop, 30, note_stop, NULL) > 0);
    while (!finished || !stopped) {
        int timeout_ms = tcpsrv_loop_timeout(sites[0].loop);
        waits += timeout_ms != 0;
        foreign_turn(tcpsrv_loop_fd(sites[0].loop), timeout_ms, fds[0], &events);
        CHECK_INT(tcpsrv_loop_poll(sites[0].loop, 0), 0);
    }
    CHECK_INT(sites[0].answers, CLIENTS * ROUNDS);
    CHECK(events > 0 && waits > 0);
    close_site(&sites[0]);
    close(fds[0]);
    close(fds[1]);
}
#endif

/* Without a descriptor to wait on, turns of a bounded length do. */
static void short_turns_do_where_a_foreign_loop_cannot_wait_for_it(void) {
    site_count = 1;
    sites[0].loop = tcpsrv_loop_default();
    open_site(&sites[0]);
    spawn_clients(&sites[0]);
    while (!finished) CHECK_INT(tcpsrv_loop_poll(sites[0].loop, 5), 0);
    CHECK_INT(sites[0].answers, CLIENTS * ROUNDS);
    close_site(&sites[0]);
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(four_loops_in_four_threads_serve_each_other),
#if !defined(TCPSERVER_USE_POLL)
        TEST(a_server_and_its_clients_live_in_a_foreign_poll_loop),
#endif
        TEST(short_turns_do_where_a_foreign_loop_cannot_wait_for_it),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
