/* Short runs without chance, in which everything that can fail fails once: every call, with each of
   its errors, and every allocation; and in which memory ends for good at every place. */
#ifndef SIM_SCENARIOS_H
#define SIM_SCENARIOS_H

static sim_peer *scenario_peer(uint64_t bytes, sim_peer_end end) {
    sim_peer *peer = peer_new(WORLD_PORT);
    peer->to_send = bytes;
    peer->send_piece = 40;
    peer->read_piece = 1000;
    peer->send_pause = SIM_MS(1);
    peer->read_pause = 0;
    peer->send_at = sim.now;
    peer->end = (int)end;
    peer->tries = 30;
    return peer;
}

static int scenario_read(model_conn *conn, tcpsrv_stream *stream, tcpsrv_want want,
                         model_kind kind, size_t size) {
    model_want model_wanted;
    tcpsrv_bytes bytes;
    int err;
    memset(&model_wanted, 0, sizeof model_wanted);
    model_wanted.kind = kind;
    model_wanted.size = size;
    model_wanted.max = conn->max_buffer;
    model_wanted.delimiter = "\n";
    model_wanted.delimiter_size = 1;
    if (conn->closing) return TCPSRV_ECLOSED;
    model_read_begin(conn, &model_wanted);
    err = tcpsrv_await(stream, want, &bytes);
    if (!err && kind == WANT_INTO) bytes.data = conn->into;
    model_read_end(conn, err, bytes);
    return err;
}

/* ---- handlers -------------------------------------------------------------------------------- */

/* Reads a little of each kind and answers, until the end. */
static int scenario_echo(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn = conn_new(stream, 1);
    int err = 0, i;
    (void)peer, (void)user;
    model.coroutines++;
    conn_on_close(conn, stream);
    for (i = 0; i < 40 && !err; i++) {
        if (i % 4 == 0) err = scenario_read(conn, stream, tcpsrv_some(0), WANT_SOME, 0);
        if (i % 4 == 1) err = scenario_read(conn, stream, tcpsrv_until("\n", 0), WANT_UNTIL, 0);
        if (i % 4 == 2) err = scenario_read(conn, stream, tcpsrv_exactly(30), WANT_EXACTLY, 30);
        if (i % 4 == 3) err = scenario_read(conn, stream, tcpsrv_into(conn->into, 50), WANT_INTO,
                                            50);
        if (!err) err = conn_write(conn, stream, 60, 1);
    }
    conn_closing(conn);
    model.coroutines--;
    return err;
}

static void scenario_on_read(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg);

static void scenario_ask(model_conn *conn, tcpsrv_stream *stream) {
    model_want want;
    int err;
    memset(&want, 0, sizeof want);
    want.kind = WANT_SOME;
    want.max = conn->max_buffer;
    model_read_begin(conn, &want);
    err = tcpsrv_read(stream, tcpsrv_some(0), scenario_on_read, conn);
    if (!err) return;
    conn->reading = 0;
    conn_close(conn, stream);
}

static void scenario_on_read(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg) {
    model_conn *conn = (model_conn *)arg;
    model_read_end(conn, err, bytes);
    if (conn->closing) return;
    if (!err) err = conn_write(conn, stream, 60, 0);
    if (err) conn_close(conn, stream);
    else scenario_ask(conn, stream);
}

static int scenario_on_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn = conn_new(stream, 0);
    (void)peer, (void)user;
    conn_on_close(conn, stream);
    if (!conn->secure) conn_timeouts(conn, stream); /* handshakes need their time */
    scenario_ask(conn, stream);
    return 0;
}

/* Leaves with much that the peer has not taken yet. */
static int scenario_close(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn = conn_new(stream, 1);
    int err;
    (void)peer, (void)user;
    model.coroutines++;
    conn_on_close(conn, stream);
    err = scenario_read(conn, stream, tcpsrv_some(0), WANT_SOME, 0);
    if (!err) err = conn_write(conn, stream, 3000, 1);
    if (!conn->closing && !err) conn_on_flush(conn, stream);
    if (!err) err = conn_write(conn, stream, 500, 1);
    conn_closing(conn);
    model.coroutines--;
    return err;
}

static int scenario_sleeper(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn = conn_new(stream, 1);
    int err;
    (void)peer, (void)user;
    model.coroutines++;
    if (model.count % 2) conn->child = tcpsrv_spawn(world.loop, world_writer, conn, 32768);
    err = scenario_read(conn, stream, tcpsrv_exactly(5000), WANT_EXACTLY, 5000);
    if (!err) err = handler_flush(conn, stream);
    if (!err) err = world_sleep(100);
    handler_join(conn);
    conn_closing(conn);
    model.coroutines--;
    return err;
}

#ifdef TCPSERVER_TLS
static void scenario_secure_client(tcpsrv_connect_options *options) {
    if (secure.script == SECURE_AT_ONCE) options->tls = secure.client;
}

static int scenario_start_tls(model_conn *conn, tcpsrv_stream *stream, tcpsrv_tls *tls);

static int scenario_client_upgrade(model_conn *conn, tcpsrv_stream *stream) {
    int err;
    if (secure.script != SECURE_LATER) return 0;
    err = scenario_read(conn, stream, tcpsrv_exactly(20), WANT_EXACTLY, 20);
    return err ? err : scenario_start_tls(conn, stream, secure.client);
}
#else
static void scenario_secure_client(tcpsrv_connect_options *options) {
    (void)options;
}

static int scenario_client_upgrade(model_conn *conn, tcpsrv_stream *stream) {
    (void)conn, (void)stream;
    return 0;
}
#endif

static int scenario_client(void *arg) {
    tcpsrv_connect_options options;
    tcpsrv_stream *stream;
    model_conn *conn;
    int err;
    memset(&options, 0, sizeof options);
    options.host = (const char *)arg;
    options.port = 9000;
    options.timeout_ms = 2500;
    scenario_secure_client(&options);
    stream = tcpsrv_connect(world.loop, &options);
    if (!stream) return 0;
    conn = conn_new(stream, 1);
    conn->secure = options.tls != NULL;
    conn->client = 1;
    conn->connect_ms = options.timeout_ms;
    conn->max_buffer = conn->max_write = 1 << 20;
    conn->high_water = conn->chunk = 1 << 16;
    conn->close_ms = 5000;
    model.coroutines++;
    conn_on_close(conn, stream);
    err = conn_write(conn, stream, 100, 1);
    if (!err) err = scenario_client_upgrade(conn, stream);
    if (!err) err = scenario_read(conn, stream, tcpsrv_until("\n", 0), WANT_UNTIL, 0);
    if (!err) err = conn_write(conn, stream, 100, 1);
    if (!err) err = handler_flush(conn, stream);
    if (!conn->closing) conn_close(conn, stream);
    model.coroutines--;
    return 0;
}

/* One write that is sent in part and queued for the rest, without a coroutine to wait in. */
static int scenario_large(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn = conn_new(stream, 0);
    (void)peer, (void)user;
    conn_on_close(conn, stream);
    conn->out_pos = 90000;
    sim_dir_copy(&conn->link->dir[conn->side], 0, world.scratch, 90000);
    if (tcpsrv_write(stream, world.scratch, 90000) != 0 && model_is_open(conn)) conn->out_pos = 0;
    conn_close(conn, stream);
    return 0;
}

#ifdef TCPSERVER_TLS
static int scenario_start_tls(model_conn *conn, tcpsrv_stream *stream, tcpsrv_tls *tls) {
    int err;
    if (conn->closing) return TCPSRV_ECLOSED;
    err = tcpsrv_start_tls(stream, tls, "localhost");
    SIM_TRACE("stream %d: start_tls = %d", conn->number, err);
    if (err && err != TCPSRV_ETLS_BUFFERED) model_check_code(conn, err, "start_tls");
    if (!err) model_secure_begin(conn, conn->in_pos, conn->out_pos);
    return err;
}

/* Goes on in TLS half-way, when the peer has said 20 bytes, and was answered. */
static int scenario_upgrade(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn = conn_new(stream, 1);
    int err, i;
    (void)peer, (void)user;
    model.coroutines++;
    conn_on_close(conn, stream);
    err = scenario_read(conn, stream, tcpsrv_exactly(20), WANT_EXACTLY, 20);
    if (!err) err = conn_write(conn, stream, 60, 1);
    if (!err) err = scenario_start_tls(conn, stream, secure.server);
    for (i = 0; i < 10 && !err; i++) {
        err = scenario_read(conn, stream, tcpsrv_some(0), WANT_SOME, 0);
        if (!err) err = conn_write(conn, stream, 60, 1);
    }
    conn_closing(conn);
    model.coroutines--;
    return err;
}
#endif

/* ---- scenarios ------------------------------------------------------------------------------- */

static void scenario_serve(tcpsrv_stream_fn *handler, tcpsrv_stream_fn *callback) {
    memset(&world.options, 0, sizeof world.options);
    world.options.loop = world.loop;
    world.options.log = world_log;
    world.options.handle_stream = handler;
    world.options.on_stream = callback;
    world.options.stack_size = 32768;
}

static void scenario_listen(void) {
    world.server = tcpsrv_new(&world.options);
    if (world.server) tcpsrv_listen(world.server, WORLD_PORT, "127.0.0.1");
    tcpsrv_call_later(world.loop, 4000, world_on_end, NULL);
}

static void scenario_begin_echo(void) {
    scenario_serve(scenario_echo, NULL);
    scenario_listen();
    scenario_peer(200, PEER_HALF_CLOSES);
}

static void scenario_begin_callbacks(void) {
    scenario_serve(NULL, scenario_on_stream);
    world.options.idle_timeout_ms = 1000;
    scenario_listen();
    scenario_peer(200, PEER_HALF_CLOSES);
    scenario_peer(80, PEER_HANGS);
}

static void scenario_begin_close(void) {
    scenario_serve(scenario_close, NULL);
    world.options.write_high_water = 800;
    scenario_listen();
    scenario_peer(100, PEER_WAITS)->read_pause = SIM_MS(20);
    scenario_peer(2000, PEER_HANGS)->send_pause = SIM_MS(30);
}

static void scenario_begin_large(void) {
    scenario_serve(NULL, scenario_large);
    sim_least_room = 20000;
    scenario_listen();
    scenario_peer(10, PEER_WAITS)->read_piece = 1 << 20;
}

static void scenario_begin_limit(void) {
    scenario_serve(scenario_echo, NULL);
    world.options.max_connections = 1;
    scenario_listen();
    scenario_peer(50, PEER_HALF_CLOSES);
    scenario_peer(50, PEER_CLOSES);
    scenario_peer(50, PEER_HALF_CLOSES);
}

static void scenario_begin_descriptors(void) {
    scenario_serve(NULL, scenario_on_stream);
    scenario_listen();
    sim.fd_limit = SIM_FIRST_FD + sim.open_fds + 1;
    scenario_peer(50, PEER_HALF_CLOSES);
    scenario_peer(50, PEER_HALF_CLOSES);
    scenario_peer(50, PEER_HALF_CLOSES);
}

static void scenario_begin_connect(void) {
    static char host[] = "127.0.0.1";
    tcpsrv_spawn(world.loop, scenario_client, host, 32768);
    tcpsrv_call_later(world.loop, 4000, world_on_end, NULL);
}

static void scenario_begin_race(void) {
    static char host[] = "race.sim";
    tcpsrv_spawn(world.loop, scenario_client, host, 32768);
    tcpsrv_call_later(world.loop, 4000, world_on_end, NULL);
}

static void scenario_drain(void *arg) {
    (void)arg;
    if (world.server) world_drain(50);
}

static void scenario_begin_drain(void) {
    scenario_serve(scenario_sleeper, NULL);
    scenario_listen();
    scenario_peer(200, PEER_WAITS);
    scenario_peer(0, PEER_WAITS);
    tcpsrv_call_later(world.loop, 30, scenario_drain, NULL);
}

/* The loop is freed while handlers wait in every way. */
static void scenario_begin_free(void) {
    scenario_serve(scenario_sleeper, NULL);
    world.server = tcpsrv_new(&world.options);
    if (world.server) tcpsrv_listen(world.server, WORLD_PORT, "127.0.0.1");
    scenario_peer(200, PEER_WAITS);
    scenario_peer(6000, PEER_WAITS)->send_piece = 3000;
    world_timer_new();
    world_post();
    tcpsrv_call_later(world.loop, 30, world_on_end, NULL);
}

#ifdef TCPSERVER_TLS
static void scenario_secure(secure_script script) {
    secure.script = script;
    sim_least_room = 150;
    if (script == SECURE_AT_ONCE) world.options.tls = secure.server;
    secure_remember(secure.server);
}

static void scenario_begin_tls_echo(void) {
    scenario_serve(scenario_echo, NULL);
    scenario_secure(SECURE_AT_ONCE);
    scenario_listen();
    scenario_peer(200, PEER_HALF_CLOSES);
    scenario_peer(100, PEER_WAITS);
}

static void scenario_begin_tls_callbacks(void) {
    scenario_serve(NULL, scenario_on_stream);
    scenario_secure(SECURE_AT_ONCE);
    world.options.idle_timeout_ms = 1000;
    scenario_listen();
    scenario_peer(200, PEER_HALF_CLOSES);
    scenario_peer(80, PEER_HANGS);
}

/* Of little room, so that records and the end go out in parts. */
static void scenario_begin_tls_close(void) {
    scenario_serve(scenario_close, NULL);
    scenario_secure(SECURE_AT_ONCE);
    sim_least_room = 20;
    world.options.write_high_water = 800;
    scenario_listen();
    scenario_peer(100, PEER_WAITS)->read_pause = SIM_MS(2);
    scenario_peer(2000, PEER_HANGS)->send_pause = SIM_MS(30);
}

static void scenario_begin_start_tls(void) {
    scenario_serve(scenario_upgrade, NULL);
    scenario_secure(SECURE_LATER);
    scenario_listen();
    scenario_peer(200, PEER_HALF_CLOSES);
    scenario_peer(100, PEER_WAITS);
}

static void scenario_begin_tls_connect(void) {
    secure.script = SECURE_AT_ONCE;
    sim_least_room = 100;
    scenario_begin_connect();
}

static void scenario_begin_start_tls_client(void) {
    secure.script = SECURE_LATER;
    sim_least_room = 100;
    scenario_begin_connect();
}

static void scenario_begin_tls_drain(void) {
    scenario_serve(scenario_sleeper, NULL);
    scenario_secure(SECURE_AT_ONCE);
    scenario_listen();
    scenario_peer(200, PEER_WAITS);
    scenario_peer(0, PEER_WAITS);
    tcpsrv_call_later(world.loop, 30, scenario_drain, NULL);
}
#endif

#ifdef TCPSERVER_TLS
enum { SIM_SECURE = 1 };
#else
enum { SIM_SECURE = 0 };
#endif

typedef struct scenario {
    const char *name;
    void (*begin)(void);
    int secure;
} scenario;

static const scenario scenarios[] = {
    { "echo", scenario_begin_echo, 0 },
    { "callbacks", scenario_begin_callbacks, 0 },
    { "close", scenario_begin_close, 0 },
    { "large", scenario_begin_large, 0 },
    { "limit", scenario_begin_limit, 0 },
    { "descriptors", scenario_begin_descriptors, 0 },
    { "connect", scenario_begin_connect, 0 },
    { "race", scenario_begin_race, 0 },
    { "drain", scenario_begin_drain, 0 },
    { "free", scenario_begin_free, 0 },
#ifdef TCPSERVER_TLS
    { "tls echo", scenario_begin_tls_echo, 1 },
    { "tls callbacks", scenario_begin_tls_callbacks, 1 },
    { "tls close", scenario_begin_tls_close, 1 },
    { "tls connect", scenario_begin_tls_connect, 1 },
    { "tls drain", scenario_begin_tls_drain, 1 },
    { "start_tls", scenario_begin_start_tls, 1 },
    { "start_tls client", scenario_begin_start_tls_client, 1 },
#endif
    { NULL, NULL, 0 }
};

/* ---- all of them ----------------------------------------------------------------------------- */

/* k -1: no memory from the n-th call on. */
static void scenario_run(const scenario *what, int n, int k,
                         const struct sim_options_of_run *base) {
    struct sim_options_of_run run = *base;
    if (k >= 0) run.fail_call = n;
    else run.no_memory_from = n;
    run.fail_errno = k;
    sim_reset(7, &run);
    sim.what = what->name;
    sim_peer_bytes = 1000;
    world.write_most = 300;
    sim_least_room = 0;
#ifdef TCPSERVER_TLS
    secure.script = SECURE_NEVER;
    secure.serves = NULL;
#endif
    world_run(what->begin);
}

static int scenario_all(const scenario *what) {
    struct sim_options_of_run run;
    int n = 0, k, runs = 0, reached;
    memset(&run, 0, sizeof run);
    do {
        n++;
        k = 0;
        do {
            scenario_run(what, n, k, &run);
            runs++;
        } while (++k < sim.errno_count);
        reached = sim.errno_count > 0 || sim.calls >= n;
        scenario_run(what, n, -1, &run);
        runs++;
    } while (reached);
    printf("%s: %d calls, %d runs\n", what->name, n - 1, runs);
    return runs;
}

static int scenarios_run(void) {
    const scenario *what;
    int runs = 0;
    for (what = scenarios; what->name; what++) {
        if (what->secure != SIM_SECURE) continue; /* the others are the plain program's */
        alarm(600);
        runs += scenario_all(what);
    }
    printf("%d runs: every promise kept\n", runs);
    return 0;
}

static int scenario_show(const char *name, int n, int k, const struct sim_options_of_run *run) {
    const scenario *what = scenarios;
    while (what->name && strcmp(what->name, name) != 0) what++;
    if (!what->name) return 2;
    scenario_run(what, n, k, run);
    return 0;
}

#endif
