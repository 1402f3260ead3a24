/* The workload: a server with random options, handlers that do random things, clients of its own,
   timers and coroutines beside them, and a random end. Everything is drawn as it goes. */
#ifndef SIM_WORLD_H
#define SIM_WORLD_H

enum { WORLD_TIMERS = 12, WORLD_PORT = 8000, WORLD_WRITE = 1 << 22 };

typedef struct world_timer {
    int used, calls, action;
    int64_t id;
    uint64_t due, period;
    uint64_t order;
} world_timer;

static struct world_state {
    tcpsrv_loop *loop;
    tcpsrv *server;
    tcpsrv_options options;
    int server_freed, over;
    int may_wait;               /* a stream that is another's may be waited for */
    size_t write_most;          /* bytes of one write at most, in this run */
    size_t steps_most;
    world_timer timers[WORLD_TIMERS];
    int timer_count;
    uint64_t timer_order, timer_last_due, timer_last_order;
    int posts, posts_done;
    int signal_drains;
    int64_t signal_drain_ms;
    int64_t signal_id;
    int secure;                 /* there is TLS */
    int signals, raised;        /* calls for SIGUSR1; it came and was not told yet */
    int watched_fd, watch_events, watch_calls;
    int64_t watch_id;
    uint64_t accept_since;      /* connections wait, and there is room for them */
    int turns_of_end;
    unsigned char scratch[WORLD_WRITE];
} world;

static regex_t world_regex[2];

static void world_random_step(void);
static void world_end_begin(void);

/* ---- streams of the model -------------------------------------------------------------------- */

static sim_object *world_object(const tcpsrv_stream *stream) {
    return sim_object_at(tcpsrv_fd(stream), CALL_FSTAT);
}

static void conn_place(model_conn *conn, const tcpsrv_stream *stream) {
    if (tcpsrv_fd(stream) >= 0) {
        conn->object = world_object(stream);
        conn->link = conn->object->link;
        conn->side = conn->object->side;
        conn->link->end[conn->side].owner = conn;
        conn->bound = 1;
        return;
    }
    conn->object = &conn->no_object;
    conn->object->link = conn->link = &conn->no_link;
    conn->object->connecting = 1;
    conn->link->end[0].object = conn->object;
    conn->link->dir[0].place = sim_below(SIM_TABLE);
}

/* The server's streams may speak TLS from behind the PROXY header on. */
static void world_secure_accepted(model_conn *conn) {
#ifdef TCPSERVER_TLS
    const sim_peer *other = conn->link->end[0].peer;
    int header = world.options.proxy_protocol != TCPSRV_PROXY_OFF && other;
    if (!conn->bound || !conn->stream->foreign ||
        conn->stream->extra->io != &tcpsrv__tls_transport)
        return;
    if (header && other->head_is == HEAD_NONE) header = 0;
    model_secure_begin(conn, header ? other->head_size : 0, 0);
    conn->handshake_at = conn->link->accepted_at; /* the header has used some of its time */
#else
    (void)conn;
#endif
}

static model_conn *conn_new(tcpsrv_stream *stream, int coroutine) {
    model_conn *conn = &model.conns[model.count];
    if (model.count == MODEL_CONNS) sim_broken(0, "too many streams");
    memset(conn, 0, offsetof(model_conn, into));
    memset(&conn->out_pos, 0, sizeof *conn - offsetof(model_conn, out_pos));
    conn->begun_at = sim.now;
    conn->used = 1;
    conn->number = model.count++;
    conn->stream = stream;
    conn->loop = world.loop;
    conn->id = tcpsrv_id(stream);
    conn_place(conn, stream);
    conn->coroutine = coroutine;
    conn->max_buffer = world.options.max_buffer_size ? world.options.max_buffer_size : 1 << 20;
    conn->max_write = world.options.max_write_buffer_size ? world.options.max_write_buffer_size
                                                          : 1 << 20;
    conn->high_water = world.options.write_high_water ? world.options.write_high_water : 1 << 16;
    conn->chunk = world.options.read_chunk_size ? world.options.read_chunk_size : 1 << 16;
    conn->close_ms = world.options.close_timeout_ms ? world.options.close_timeout_ms : 5000;
    conn->idle_ms = world.options.idle_timeout_ms;
    conn->handshake_ms = world.options.handshake_timeout_ms ? world.options.handshake_timeout_ms
                                                            : 10000;
    tcpsrv_set_user(stream, conn);
    world_secure_accepted(conn);
    SIM_TRACE("stream %d begins: descriptor %d, connection %d, %s", conn->number,
              tcpsrv_fd(stream), (int)(conn->link - sim_links),
              coroutine ? "a coroutine" : "callbacks");
    return conn;
}

/* What a PROXY header said, or must have said for the handler to begin. */
static void conn_check_peer(model_conn *conn, const tcpsrv_address *peer) {
    const sim_peer *other = conn->link->end[0].peer;
    int mode = world.options.proxy_protocol;
    if (mode == TCPSRV_PROXY_OFF || !other) return;
    if (other->head_is == HEAD_BAD) sim_broken(4, "a bad header was accepted");
    if (other->head_is == HEAD_NONE && mode == TCPSRV_PROXY_REQUIRED)
        sim_broken(4, "a connection without a header was accepted");
    conn->in_pos = other->head_is == HEAD_NONE ? 0 : other->head_size;
    if ((other->head_is == HEAD_1 || other->head_is == HEAD_2) &&
        (peer->port != other->told_port || memcmp(peer->ip, "\x0a\1\2\3", 4) != 0))
        sim_broken(4, "the header's address was not told");
}

/* A stream that may be used from elsewhere, or NULL. */
static model_conn *conn_random(tcpsrv_stream **stream) {
    model_conn *conn;
    if (!model.count) return NULL;
    conn = &model.conns[sim_below((size_t)model.count)];
    *stream = conn->used ? tcpsrv_by_id(world.loop, conn->id) : NULL;
    if (!*stream) return NULL;
    if (*stream != conn->stream) sim_broken(2, "an id names another stream than it did");
    if (conn->closing) sim_broken(2, "the id of a closed stream is alive");
    return conn;
}

static void conn_closing(model_conn *conn) {
    if (conn->closing) return;
    conn->closing = 1;
    conn->closing_at = sim.now;
}

/* The upgrade that the peer is waiting for, once its last plain byte is read. */
static int conn_may_upgrade(const model_conn *conn) {
    return !conn->secure && conn->bound && conn->link->upgrade_at &&
           conn->in_pos <= conn->link->upgrade_at && !conn->closing;
}

/* ---- reads ----------------------------------------------------------------------------------- */

static int64_t world_find_end(const char *data, size_t size, void *arg) {
    model_conn *conn = (model_conn *)arg;
    int64_t end;
    if (!size || !conn->reading) sim_broken(2, "framing is asked about nothing");
    if (size < conn->frame_asked)
        sim_broken(2, "framing is asked again with %zu bytes, after it wanted %zu", size,
                   conn->frame_asked);
    if (size > model_available(conn) ||
        !sim_in_equal(&conn->link->dir[!conn->side], conn->in_pos, data, size))
        sim_broken(1, "framing is shown bytes that were not sent");
    end = model_frame_end((const unsigned char *)data, size, conn->want.frame);
    if (end > 0) conn->frame_asked = (size_t)end;
    return end;
}

static tcpsrv_want want_until(model_want *want, size_t max) {
    static const char *const delimiters[] = { "\n", "\r\n", "\r\n\r\n", "END", "e", "\nEN" };
    want->delimiter = delimiters[sim_below(6)];
    want->delimiter_size = strlen(want->delimiter);
    if (want->kind == WANT_UNTIL) return tcpsrv_until(want->delimiter, max);
    if (sim_chance(4)) {
        want->delimiter = &"a\0b"[sim_below(2)];
        want->delimiter_size = 1 + sim_below(2);
    }
    return tcpsrv_until_mem(want->delimiter, want->delimiter_size, max);
}

static tcpsrv_want want_make(model_conn *conn, model_want *want) {
    size_t max = sim_chance(2) ? 0 : 1 + sim_size(conn->max_buffer);
    memset(want, 0, sizeof *want);
    if (conn_may_upgrade(conn) && sim_chance(2)) {
        want->kind = WANT_EXACTLY;
        want->size = (size_t)(conn->link->upgrade_at - conn->in_pos);
        want->max = conn->max_buffer;
        if (want->size <= conn->max_buffer) return tcpsrv_exactly(want->size);
    }
    want->kind = (model_kind)sim_below(WANT_KINDS);
    want->max = max ? max : conn->max_buffer;
    switch (want->kind) {
    case WANT_EXACTLY:
        want->size = sim_size(conn->max_buffer < 8192 ? conn->max_buffer : 8192);
        return tcpsrv_exactly(want->size);
    case WANT_SOME: return tcpsrv_some(max);
    case WANT_INTO:
        want->size = sim_size(MODEL_INTO);
        return tcpsrv_into(conn->into, want->size);
    case WANT_CLOSE:
        if (!sim_chance(4)) break;
        return tcpsrv_until_close(max);
    case WANT_FRAME:
        want->frame = (int)sim_below(3);
        return tcpsrv_frame(world_find_end, conn, max);
    case WANT_REGEX:
        if (!sim_chance(3)) break;
        want->regex = &world_regex[sim_below(2)];
        return tcpsrv_until_regex(want->regex, max);
    case WANT_READY: return tcpsrv_ready();
    default: break;
    }
    if (want->kind > WANT_UNTIL_MEM) want->kind = WANT_UNTIL;
    return want_until(want, max);
}

static void conn_refused_read(model_conn *conn, tcpsrv_stream *stream) {
    tcpsrv_bytes bytes;
    int err;
    if (!conn->reading || conn->closing || conn->outside) return;
    err = tcpsrv_read(stream, tcpsrv_some(0), NULL, NULL);
    if (err != TCPSRV_EBUSY) sim_broken(3, "a second read: %d", err);
    if (tcpsrv_peek(stream, &bytes)) sim_broken(3, "bytes are shown while a read waits");
}

static void conn_peek(model_conn *conn, tcpsrv_stream *stream) {
    tcpsrv_bytes bytes;
    if (conn->reading || conn->closing || conn->lost) return;
    if (tcpsrv_error(stream) && sim.alloc_failed) return; /* what it held may be lost with it */
    if (!tcpsrv_by_id(world.loop, conn->id)) return;      /* a drain has aborted it */
    tcpsrv_peek(stream, &bytes);
    if (bytes.size != model_available(conn) ||
        !sim_in_equal(&conn->link->dir[!conn->side], conn->in_pos, bytes.data, bytes.size))
        sim_broken(1, "stream %d: %zu bytes are shown, %llu are there", conn->number, bytes.size,
                   (unsigned long long)model_available(conn));
}

/* ---- writes ---------------------------------------------------------------------------------- */

typedef enum world_write {
    WRITE_PLAIN, WRITE_TRY, WRITE_VECTOR, WRITE_PRINT, WRITE_FILE, WRITE_KINDS
} world_write;

/* A stream's write of size bytes that lie at its place; the file is as long as it says, or not. */
static int write_file(model_conn *conn, tcpsrv_stream *stream, size_t size) {
    uint64_t skip = sim_size(1000), shorter = size && sim_chance(16) ? 1 + sim_below(size) : 0;
    int fd, err;
    fd = sim_open_file(skip + size - shorter, &conn->link->dir[conn->side], conn->out_pos - skip);
    if (fd < 0) return 1;
    if (shorter) conn->short_file = 1;
    conn->filed = 1;
    conn->out_pos += size;
    err = tcpsrv_sendfile(stream, fd, (int64_t)skip, size);
    sim_close(fd);
    return err;
}

static int write_vector(model_conn *conn, tcpsrv_stream *stream, const char *data, size_t size) {
    tcpsrv_bytes pieces[3];
    size_t first = sim_below(size + 1), second = sim_below(size - first + 1);
    pieces[0].data = data;
    pieces[0].size = first;
    pieces[1].data = data + first;
    pieces[1].size = second;
    pieces[2].data = data + first + second;
    pieces[2].size = size - first - second;
    conn->out_pos += size;
    return tcpsrv_writev(stream, pieces, 3);
}

static int write_call(model_conn *conn, tcpsrv_stream *stream, world_write kind, size_t size,
                      char *data) {
    if (kind == WRITE_FILE) return write_file(conn, stream, size);
    sim_dir_copy(&conn->link->dir[conn->side], conn->out_pos, data, size);
    if (kind == WRITE_PRINT && memchr(data, 0, size)) kind = WRITE_PLAIN;
    if (kind == WRITE_VECTOR) return write_vector(conn, stream, data, size);
    conn->out_pos += size;
    if (kind == WRITE_TRY) return tcpsrv_try_write(stream, data, size);
    if (kind == WRITE_PRINT) return tcpsrv_printf(stream, "%.*s", (int)size, data);
    return tcpsrv_write(stream, data, size);
}

/* Nothing was queued, unless the stream died in it. */
static void write_refused(model_conn *conn, int err, uint64_t before, size_t size, int was_dead) {
    if (err == 1) return; /* no file */
    if (err == TCPSRV_EBUFFULL && before - sim_sent(&conn->link->dir[conn->side]) + size <=
                                      conn->max_write)
        sim_broken(4, "stream %d: %zu bytes found no room", conn->number, size);
    if (err != TCPSRV_EBUFFULL) model_check_code(conn, err, "write");
    if (!was_dead && !model_is_open(conn)) {
        conn->torn = 1;
        return;
    }
    if (conn->out_pos != before + size || sim_sent(&conn->link->dir[conn->side]) > before)
        sim_broken(1, "stream %d: a refused write has left bytes", conn->number);
    conn->out_pos = before;
}

/* would: what is queued if nothing leaves meanwhile. */
static void write_done(model_conn *conn, int waited, uint64_t would) {
    uint64_t queued = model_queued(conn);
    if (waited && !conn->writing && !conn->mixed && model_is_open(conn) &&
        queued > conn->high_water)
        sim_broken(4, "stream %d: a write returned with %llu bytes queued", conn->number,
                   (unsigned long long)queued);
    if (!waited && !conn->filed && would > conn->max_write)
        sim_broken(4, "stream %d: a write made it %llu bytes queued", conn->number,
                   (unsigned long long)would);
}

/* How many bytes of the last read's view a write takes: often, as those of a server that changes
   what it got and sends it back. */
static size_t write_from_view(const model_conn *conn) {
    size_t left = conn->viewed && conn->view ? conn->viewed - conn->view_used : 0;
    if (!left || conn->closing || !model_is_open(conn) || sim_chance(3)) return 0;
    return sim_chance(2) ? left : 1 + sim_below(left);
}

/* own: by the stream's own coroutines; from others' only the form that never waits. */
static int conn_write(model_conn *conn, tcpsrv_stream *stream, size_t size, int own) {
    world_write kind = (world_write)sim_below(WRITE_KINDS);
    int in_coroutine = tcpsrv_self() != 0;
    uint64_t before = conn->out_pos, would;
    int was_dead = !model_is_open(conn), closing = conn->closing || conn->shut, err, waits;
    size_t echoed = write_from_view(conn);
    char few[512], *data = (char *)world.scratch, *at;
    if (echoed) size = echoed;
    if (echoed) kind = WRITE_PLAIN;
    if (in_coroutine && !own && !world.may_wait) kind = WRITE_TRY;
    would = size ? model_queued(conn) + size : 0;
    waits = in_coroutine && kind != WRITE_TRY;
    if (waits) data = size < sizeof few ? few : (char *)sim_heap_take(size + 1);
    if (!waits) conn->mixed = 1;
    if (waits) conn->writing++;
    SIM_TRACE("stream %d: write of kind %d, %zu bytes at %llu", conn->number, (int)kind, size,
              (unsigned long long)before);
    at = data;
    if (echoed && (!waits || would <= conn->high_water)) { /* the view may not last for a wait */
        at = conn->view + conn->view_used;
        conn->view_used += size;
    }
    err = write_call(conn, stream, kind, size, at);
    if (waits) conn->writing--;
    if (!conn->bound) model_bind_all();
    SIM_TRACE("stream %d: write = %d", conn->number, err);
    sim_moved();
    if (data != few && data != (char *)world.scratch) sim_realloc(data, 0);
    if (!err && closing && size) sim_broken(1, "stream %d: a closed stream took a write",
                                            conn->number);
    if (err) write_refused(conn, err, before, size, was_dead || closing);
    else write_done(conn, waits, kind == WRITE_FILE || was_dead ? 0 : would);
    return err == 1 ? 0 : err;
}

/* ---- other calls ----------------------------------------------------------------------------- */

static void world_on_flush(tcpsrv_stream *stream, int err, void *arg) {
    model_conn *conn = (model_conn *)arg;
    (void)stream;
    sim_moved();
    SIM_TRACE("stream %d: on_flush(%d)", conn->number, err);
    if (!conn->flushes) sim_broken(2, "stream %d: on_flush was called twice", conn->number);
    if (conn->in_call) sim_broken(2, "stream %d: on_flush inside its call", conn->number);
    conn->flushes--;
    if (err) model_check_code(conn, err, "flush");
    if (sim_chance(4)) world_random_step();
}

static void conn_on_flush(model_conn *conn, tcpsrv_stream *stream) {
    int err;
    conn->in_call++;
    err = tcpsrv_on_flush(stream, world_on_flush, conn);
    conn->in_call--;
    if (!err) conn->flushes++;
    else model_check_code(conn, err, "on_flush");
}

static void world_on_close(tcpsrv_stream *stream, int result, size_t unsent, void *arg) {
    model_conn *conn = (model_conn *)arg;
    model_closed(conn, result, unsent);
    if (sim_chance(8)) {
        conn_closing(conn);
        tcpsrv_close(stream);
    }
    if (sim_chance(8)) world_random_step();
}

static void conn_on_close(model_conn *conn, tcpsrv_stream *stream) {
    if (tcpsrv_on_close(stream, world_on_close, conn) == 0) conn->close_set = 1;
    else if (!sim.alloc_failed && !tcpsrv_closed(stream)) sim_broken(2, "on_close failed");
}

static void conn_close(model_conn *conn, tcpsrv_stream *stream) {
    SIM_TRACE("stream %d: close", conn->number);
    conn_closing(conn);
    if (conn->writing) conn->torn = 1;
    conn->in_call++;
    tcpsrv_close(stream);
    conn->in_call--;
}

static void conn_abort(model_conn *conn, tcpsrv_stream *stream) {
    SIM_TRACE("stream %d: abort", conn->number);
    conn_closing(conn);
    conn->aborted = 1;
    conn->in_call++;
    tcpsrv_abort(stream);
    conn->in_call--;
    if (model_is_open(conn)) sim_broken(2, "stream %d is open after its abort", conn->number);
}

static void conn_cancel(model_conn *conn, tcpsrv_stream *stream) {
    if (!conn->reading) return;
    conn->cancelled = 1;
    conn->in_call++;
    tcpsrv_cancel_read(stream);
    conn->in_call--;
}

static void conn_timeouts(model_conn *conn, tcpsrv_stream *stream) {
    int64_t read_ms = sim_chance(3) ? 0 : 1 + (int64_t)sim_size(500);
    int64_t write_ms = sim_chance(3) ? 0 : 1 + (int64_t)sim_size(500);
    if (tcpsrv_set_timeout(stream, read_ms, write_ms) != 0) {
        conn->write_ms = 1; /* without memory they may hold in part */
        return;
    }
    conn->read_ms = read_ms;
    if (!read_ms) conn->read_due = 0; /* also that of a read that waits */
    if (write_ms) conn->write_ms = write_ms;
}

static void conn_shutdown(model_conn *conn, tcpsrv_stream *stream) {
    int err;
    if (conn->writing) return; /* the writer is told; its message would be torn */
    err = tcpsrv_shutdown(stream);
    if (conn->secure && err == -ENOTSUP) return; /* TLS knows no half-closed connection */
    SIM_TRACE("stream %d: shutdown = %d", conn->number, err);
    if (!err) conn->shut = 1;
    else model_check_code(conn, err, "shutdown");
}

#ifdef TCPSERVER_TLS
/* What start_tls must say; 1: whatever the stream has died of. */
static int conn_upgrade_code(const model_conn *conn, const tcpsrv_stream *stream, int fit) {
    if (conn->closing) return TCPSRV_ECLOSED;
    if (!model_is_open(conn)) return 1;
    if (conn->reading || !conn->bound || conn->object->connecting || model_handshakes(conn))
        return TCPSRV_EBUSY;
    if (conn->secure) return -EALREADY;
    if (conn->object->kind != SIM_SOCKET) return -ENOTSOCK;
    if (conn->shut) return TCPSRV_ECLOSED;
    if (conn->object->told_end) return TCPSRV_EOF;
    if (tcpsrv__queue_memory(&stream->out) != stream->out.size) return TCPSRV_EBUSY;
    if (model_available(conn)) return TCPSRV_ETLS_BUFFERED;
    return fit ? 0 : TCPSRV_ETLS;
}

static void conn_upgrade(model_conn *conn, tcpsrv_stream *stream) {
    int client = conn->client, fit = !sim_chance(12);
    tcpsrv_tls *tls = client == fit ? secure.client : secure.server;
    int must = conn_upgrade_code(conn, stream, fit || client), err;
    if (conn->lost) return;
    err = tcpsrv_start_tls(stream, tls, client && !fit ? NULL : "localhost");
    SIM_TRACE("stream %d: start_tls = %d", conn->number, err);
    if (client && !fit && must == 0) must = TCPSRV_ETLS;
    if (!err && must)
        sim_broken(2, "stream %d: start_tls was not refused (%d)", conn->number, must);
    if (!err && client) conn->handshake_ms = 10000;
    if (!err) model_secure_begin(conn, conn->in_pos, conn->out_pos);
    else if (must == 1) model_check_code(conn, err, "start_tls");
    else if (err != must && !sim.alloc_failed && (must || !model_lacks_randomness(err)))
        sim_broken(2, "stream %d: start_tls = %d, expected %d", conn->number, err, must);
}

static void conn_ask_tls(const model_conn *conn, const tcpsrv_stream *stream) {
    const sim_peer *peer = conn->link->end[!conn->side].peer;
    const struct sim_secure *end = peer && !conn->client ? peer->secure : NULL;
    tcpsrv_tls_info info;
    int err = tcpsrv_get_tls_info(stream, &info);
    if (!conn->secure || !conn->bound || model_handshakes(conn)) {
        if (err != -ENOTCONN) sim_broken(2, "stream %d: tls_info = %d", conn->number, err);
    } else if (!err && end && (strcmp(info.server_name, end->name ? end->name : "") != 0 ||
                               (end->done && info.resumed == !!end->shown.count))) {
        sim_broken(2, "stream %d: another client is told of", conn->number);
    }
}
#else
static void conn_upgrade(model_conn *conn, tcpsrv_stream *stream) {
    (void)conn, (void)stream;
}

static void conn_ask_tls(const model_conn *conn, const tcpsrv_stream *stream) {
    (void)conn, (void)stream;
}
#endif

/* Questions. */
static void conn_ask(const model_conn *conn, tcpsrv_stream *stream) {
    tcpsrv_address address;
    char text[TCPSRV_ADDRESS_TEXT];
    int err = tcpsrv_local(stream, &address);
    if (err && !*tcpsrv_last_error()) sim_broken(7, "a failure left no words");
    if (tcpsrv_peer(stream, &address) == 0) tcpsrv_address_text(&address, text, sizeof text);
    tcpsrv_set_nodelay(stream, (int)sim_below(2));
    conn_ask_tls(conn, stream);
    if (tcpsrv_user(stream) != conn) sim_broken(2, "a stream's user is another");
    if (tcpsrv_stream_loop(stream) != world.loop) sim_broken(2, "a stream's loop is another");
    if (!conn->closing && !conn->outside && conn->reading != tcpsrv_reading(stream))
        sim_broken(2, "stream %d: tcpsrv_reading says %d", conn->number, tcpsrv_reading(stream));
}

/* What may be done to a stream from anywhere without waiting. */
static void conn_poke(model_conn *conn, tcpsrv_stream *stream) {
    switch (sim_below(16)) {
    case 0: conn_on_flush(conn, stream); break;
    case 1: conn_on_close(conn, stream); break;
    case 2: conn_cancel(conn, stream); break;
    case 3: conn_timeouts(conn, stream); break;
    case 4: if (sim_chance(4)) conn_shutdown(conn, stream); break;
    case 5: if (sim_chance(4)) conn_close(conn, stream); break;
    case 6: if (sim_chance(6)) conn_abort(conn, stream); break;
    case 7: case 8: conn_refused_read(conn, stream); break;
    case 9: case 10: conn_peek(conn, stream); break;
    case 11: conn_ask(conn, stream); break;
    case 12:
        if (world.secure && sim_chance(6)) {
            conn_upgrade(conn, stream);
            break;
        }
        conn_write(conn, stream, sim_size(world.write_most), 0);
        break;
    default: conn_write(conn, stream, sim_size(world.write_most), 0); break;
    }
}

/* ---- handlers with callbacks ----------------------------------------------------------------- */

static void callback_step(model_conn *conn, tcpsrv_stream *stream);

static void world_on_read(tcpsrv_stream *stream, int err, tcpsrv_bytes bytes, void *arg) {
    model_conn *conn = (model_conn *)arg;
    if (conn->in_call) sim_broken(2, "stream %d: a callback inside its call", conn->number);
    if (stream != conn->stream) sim_broken(2, "a callback names another stream");
    if (!err && model_held_back(conn))
        sim_broken(4, "stream %d: a read was answered above the high water", conn->number);
    model_read_end(conn, err, bytes);
    if (err && conn->closing) return;
    if (err && sim_chance(2)) conn_close(conn, stream);
    else callback_step(conn, stream);
    conn->viewed = 0;
}

static void callback_read(model_conn *conn, tcpsrv_stream *stream) {
    model_want model_wanted;
    tcpsrv_want want = want_make(conn, &model_wanted);
    int err, was_closed = conn->closing;
    if (conn->reading) return;
    if (!was_closed) model_read_begin(conn, &model_wanted);
    conn->in_call++;
    err = tcpsrv_read(stream, want, world_on_read, conn);
    conn->in_call--;
    SIM_TRACE("stream %d: asks for kind %d, %zu, max %zu: %d", conn->number,
              (int)model_wanted.kind, model_wanted.size, model_wanted.max, err);
    if (!err) return;
    conn->reading = 0;
    if (err != -ENOMEM || !sim.alloc_failed) model_check_code(conn, err, "call of read");
}

static void callback_step(model_conn *conn, tcpsrv_stream *stream) {
    size_t n = sim_below(4);
    if (conn_may_upgrade(conn) && conn->in_pos == conn->link->upgrade_at && sim_chance(2))
        conn_upgrade(conn, stream);
    while (n-- && !conn->closing) conn_poke(conn, stream);
    if (conn->closing) return;
    if (sim_chance(30)) conn_close(conn, stream);
    else if (sim_chance(60)) conn_abort(conn, stream);
    else if (!sim_chance(20)) callback_read(conn, stream);
}

static int world_on_stream(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn;
    (void)user;
    if (tcpsrv_fd(stream) < 0) return -ENOMEM; /* died of that behind its PROXY header */
    conn = conn_new(stream, 0);
    conn_check_peer(conn, peer);
    sim_moved();
    callback_step(conn, stream);
    if (!sim_chance(40) || conn->closing) return 0;
    conn_closing(conn);
    return TCPSRV_EREFUSED;
}

/* ---- handlers with coroutines ---------------------------------------------------------------- */

/* By the value, or by the call that has its name. */
static int read_await(tcpsrv_stream *stream, const model_want *model_wanted, tcpsrv_want want,
                      tcpsrv_bytes *bytes) {
    int named = sim_chance(2);
    switch (named ? model_wanted->kind : WANT_KINDS) {
    case WANT_UNTIL: return tcpsrv_read_until(stream, model_wanted->delimiter, want.max, bytes);
    case WANT_EXACTLY: return tcpsrv_read_bytes(stream, model_wanted->size, bytes);
    case WANT_SOME: return tcpsrv_read_some(stream, want.max, bytes);
    case WANT_CLOSE: return tcpsrv_read_until_close(stream, want.max, bytes);
    case WANT_INTO:
        bytes->size = model_wanted->size;
        return tcpsrv_read_into(stream, want.memory, model_wanted->size);
    default: return tcpsrv_await(stream, want, bytes);
    }
}

static int handler_read(model_conn *conn, tcpsrv_stream *stream) {
    model_want model_wanted;
    tcpsrv_want want = want_make(conn, &model_wanted);
    tcpsrv_bytes bytes;
    int err;
    SIM_TRACE("stream %d: awaits kind %d, %zu, max %zu", conn->number, (int)model_wanted.kind,
              model_wanted.size, model_wanted.max);
    if (conn->closing) {
        err = read_await(stream, &model_wanted, want, &bytes);
        if (!err) sim_broken(2, "stream %d: a closed stream was read", conn->number);
        return err;
    }
    model_read_begin(conn, &model_wanted);
    err = read_await(stream, &model_wanted, want, &bytes);
    if (!err && conn->want.kind == WANT_INTO) bytes.data = conn->into;
    model_read_end(conn, err, bytes);
    return err;
}

static int handler_flush(model_conn *conn, tcpsrv_stream *stream) {
    uint64_t queued_to = conn->out_pos;
    int err;
    conn->writing++;
    err = tcpsrv_flush(stream);
    conn->writing--;
    if (!conn->bound) model_bind_all();
    sim_moved();
    if (err) model_check_code(conn, err, "flush");
    else if (sim_sent(&conn->link->dir[conn->side]) < queued_to)
        sim_broken(1, "stream %d: a flush returned before all was out", conn->number);
    return err;
}

static int world_sleep(size_t ms) {
    uint64_t due = sim.now + SIM_MS(ms);
    int err = tcpsrv_sleep((int64_t)ms);
    sim_moved();
    if (!err && sim.now < due) sim_broken(2, "a sleep ended early");
    if (err && err != TCPSRV_ECANCELED && err != -ENOMEM) sim_broken(2, "a sleep ended: %d", err);
    return err;
}

static int handler_step(model_conn *conn, tcpsrv_stream *stream) {
    if (conn_may_upgrade(conn) && conn->in_pos == conn->link->upgrade_at && sim_chance(2))
        conn_upgrade(conn, stream);
    switch (sim_below(12)) {
    case 0: return world_sleep(sim_size(60));
    case 1: sim_moved(); return tcpsrv_yield();
    case 2: return handler_flush(conn, stream);
    case 3: conn_poke(conn, stream); return 0;
    case 4: world_random_step(); return 0;
    case 5: case 6: case 7: return conn_write(conn, stream, sim_size(world.write_most), 1);
    default: return handler_read(conn, stream);
    }
}

/* Writes beside the handler, which reads meanwhile and joins it before it returns. */
static int world_writer(void *arg) {
    model_conn *conn = (model_conn *)arg;
    size_t steps = 1 + sim_below(4);
    model.coroutines++;
    while (steps-- && !model.ending) {
        int err = sim_chance(3) ? world_sleep(sim_size(20))
                                : conn_write(conn, conn->stream, sim_size(world.write_most), 1);
        if (err) break;
    }
    model.coroutines--;
    return conn->number + 7;
}

static void handler_join(model_conn *conn) {
    int result;
    if (conn->child <= 0) return;
    result = tcpsrv_join(conn->child);
    sim_moved();
    /* A result is not kept while the loop ends, nor without memory for it. */
    if ((model.ending || sim.alloc_failed) && (result == -ESRCH || result == TCPSRV_ECANCELED))
        result = conn->number + 7;
    if (result != conn->number + 7)
        sim_broken(2, "a join gave %d, expected %d", result, conn->number + 7);
    conn->child = 0;
}

static int world_handler(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    model_conn *conn;
    size_t steps = 1 + sim_size(world.steps_most);
    int err = 0;
    (void)user;
    if (tcpsrv_fd(stream) < 0) return -ENOMEM;
    conn = conn_new(stream, 1);
    conn_check_peer(conn, peer);
    sim_moved();
    model.coroutines++;
    if (sim_chance(2)) conn_on_close(conn, stream);
    if (sim_chance(6)) conn->child = tcpsrv_spawn(world.loop, world_writer, conn, 32768);
    while (steps-- && !model.ending) {
        err = handler_step(conn, stream);
        if (err && !sim_chance(4)) break;
    }
    handler_join(conn);
    conn_closing(conn);
    if (conn->writing) conn->torn = 1; /* by another, whose call ends now */
    model.coroutines--;
    SIM_TRACE("stream %d: its handler returns", conn->number);
    return sim_chance(20) ? TCPSRV_EREFUSED : err;
}

/* ---- connections of our own ------------------------------------------------------------------ */

/* Whether a client speaks TLS; mostly where somebody else does. */
static int client_secure(tcpsrv_connect_options *options) {
#ifdef TCPSERVER_TLS
    int wanted = options->port == WORLD_PORT ? secure.serves != NULL : options->port > 9000;
    if (!world.secure || wanted == sim_chance(12)) return 0;
    options->tls = secure.client;
    if (sim_chance(12)) options->tls_name = "wrong.sim";
    if (options->tls_name) sim.wrong_names = 1;
    return 1;
#else
    (void)options;
    return 0;
#endif
}

static model_conn *client_new(tcpsrv_connect_options *options, int coroutine) {
    static const char *const hosts[] = { "127.0.0.1", "127.0.0.1", "127.0.0.1", "::1", "race.sim",
                                         "race.sim", "localhost", "nowhere.sim" };
    tcpsrv_stream *stream;
    model_conn *conn;
    int secured;
    memset(options, 0, sizeof *options);
    options->host = hosts[sim_below(8)];
    options->port = sim_chance(2) ? WORLD_PORT : 9000 + (int)sim_below(3);
    options->timeout_ms = sim_chance(2) ? 0 : 1 + (int64_t)sim_size(2000);
    options->max_buffer_size = world.options.max_buffer_size;
    options->max_write_buffer_size = world.options.max_write_buffer_size;
    options->write_high_water = world.options.write_high_water;
    secured = client_secure(options);
    stream = tcpsrv_connect(world.loop, options);
    if (!stream && tcpsrv__thread()->error == -EINTR)
        sim_broken(2, "an interrupted connect has failed");
    if (!stream) return NULL;
    conn = conn_new(stream, coroutine);
    conn->client = 1;
    conn->chunk = 1 << 16;
    conn->close_ms = 5000;
    conn->idle_ms = 0;
    conn->connect_ms = options->timeout_ms;
    conn->handshake_ms = options->timeout_ms ? 0 : 10000;
    conn->secure = secured;
    conn->wrong_name = secured && options->tls_name != NULL;
    return conn;
}

static void handler_first(model_conn *conn) {
    model_want want;
    tcpsrv_bytes none;
    int err;
    memset(&want, 0, sizeof want);
    want.kind = WANT_READY;
    model_read_begin(conn, &want);
    err = tcpsrv_await(conn->stream, tcpsrv_ready(), &none);
    model_read_end(conn, err, none);
}

static int world_client(void *arg) {
    tcpsrv_connect_options options;
    model_conn *conn;
    size_t steps = 1 + sim_size(world.steps_most);
    (void)arg;
    if (model.count + 8 > MODEL_CONNS) return 0;
    conn = client_new(&options, 1);
    if (!conn) return 0;
    model.coroutines++;
    handler_first(conn); /* from now on it is the coroutine's */
    while (steps-- && !model.ending) {
        int err = handler_step(conn, conn->stream);
        if (err || conn->closing) break;
    }
    if (!conn->closing) conn_close(conn, conn->stream);
    model.coroutines--;
    return 0;
}

/* Without a coroutine of its own. */
static void world_connect(void) {
    tcpsrv_connect_options options;
    model_conn *conn;
    if (model.count + 8 > MODEL_CONNS) return;
    conn = client_new(&options, 0);
    if (conn) callback_step(conn, conn->stream);
}

/* ---- timers and posts ------------------------------------------------------------------------ */

static void world_on_timer(void *arg) {
    world_timer *timer = (world_timer *)arg;
    sim_moved();
    if (!timer->used) sim_broken(2, "a timer that is no more has run");
    if (sim.now < timer->due) sim_broken(2, "a timer has run early");
    if (!timer->period && timer->due == world.timer_last_due &&
        timer->order < world.timer_last_order)
        sim_broken(2, "timers of one time have run out of order");
    if (!timer->period) {
        world.timer_last_due = timer->due;
        world.timer_last_order = timer->order;
        timer->used = 0;
    } else {
        timer->due += ((sim_clock() - timer->due) / timer->period + 1) * timer->period;
        if (++timer->calls > 20) {
            tcpsrv_cancel(world.loop, timer->id);
            timer->used = 0;
        }
    }
    world_random_step();
}

static void world_timer_new(void) {
    world_timer *timer = &world.timers[world.timer_count];
    int64_t ms = (int64_t)sim_size(200);
    if (world.timer_count == WORLD_TIMERS) return;
    memset(timer, 0, sizeof *timer);
    timer->period = sim_chance(4) && ms ? SIM_MS(ms) : 0;
    timer->due = sim_clock() + SIM_MS(ms);
    timer->order = world.timer_order++;
    if (timer->period) timer->id = tcpsrv_call_every(world.loop, ms, world_on_timer, timer);
    else if (ms) timer->id = tcpsrv_call_later(world.loop, ms, world_on_timer, timer);
    else timer->id = tcpsrv_call_soon(world.loop, world_on_timer, timer);
    if (timer->id <= 0) return;
    timer->used = 1;
    world.timer_count++;
}

static void world_timer_cancel(void) {
    world_timer *timer;
    if (!world.timer_count) return;
    timer = &world.timers[sim_below((size_t)world.timer_count)];
    tcpsrv_cancel(world.loop, timer->id); /* also of one that is gone */
    timer->used = 0;
}

static void world_on_post(void *arg) {
    sim_moved();
    if ((int)(intptr_t)arg != world.posts_done++) sim_broken(2, "posted calls run out of order");
    if (sim_chance(4)) world_random_step();
}

static void world_post(void) {
    if (tcpsrv_post(world.loop, world_on_post, (void *)(intptr_t)world.posts) == 0) world.posts++;
}

static int world_is_full(void) {
    tcpsrv_stats stats;
    if (!model.memory_limit || !world.server || world.server_freed) return 0;
    tcpsrv_get_stats(world.server, &stats);
    return stats.buffer_memory >= model.memory_limit - model.memory_limit / 8;
}

static void world_quiet_stats(const tcpsrv_stats *stats) {
    uint64_t closed = stats->closed_in_order + stats->closed_by_reset + stats->closed_by_timeout +
                      stats->closed_by_abort + stats->closed_by_error;
    if (stats->active > tcpsrv_get_options(world.server)->max_connections)
        sim_broken(4, "%zu connections are open, over the limit", stats->active);
    if (stats->accepted - closed != stats->active)
        sim_broken(6, "%llu accepted, %llu closed, %zu active", (unsigned long long)stats->accepted,
                   (unsigned long long)closed, stats->active);
}

/* Connections that wait while there is room for them are accepted within the longest pause. */
static void world_quiet_accept(void) {
    tcpsrv_stats stats;
    int fd, waiting = 0;
    if (!world.server || world.server_freed) return;
    tcpsrv_get_stats(world.server, &stats);
    world_quiet_stats(&stats);
    for (fd = SIM_FIRST_FD; fd < sim.fd_top; fd++)
        if (sim.fds[fd] && sim.fds[fd]->kind == SIM_LISTENER) waiting += sim.fds[fd]->waiting;
    if (!waiting || model.full ||
        stats.active >= tcpsrv_get_options(world.server)->max_connections)
        world.accept_since = sim.now;
    if (world.accept_since < sim.accept_trouble_at) world.accept_since = sim.accept_trouble_at;
    if (sim.now > world.accept_since + SIM_MS(1001) + sim_late())
        sim_broken(6, "%d connections wait, and there is room for them", waiting);
}

/* Asked when everything waits. */
static void world_quiet(void) {
    int i;
    if (model.ending) return;
    if (world.posts != world.posts_done) sim_broken(2, "posted calls wait");
    if (world.raised) sim_broken(2, "a signal was not told");
    if (world.watch_id && (world.watch_events & TCPSRV_READ) &&
        (sim_state_of(sim.fds[world.watched_fd]) & SIM_IN))
        sim_broken(2, "a watched descriptor is readable, and nobody is told");
    world_quiet_accept();
    for (i = 0; i < world.timer_count; i++)
        if (world.timers[i].used && world.timers[i].due + sim_late() < sim.now)
            sim_broken(2, "a timer is late");
}

/* ---- foreign descriptors, signals ------------------------------------------------------------ */

static int world_foreign(void) {
    sim_foreign kind = (sim_foreign)sim_below(FOREIGN_KINDS);
    sim_link *link;
    int fd = sim_foreign_open(kind, &link);
    if (fd >= 0 && kind != FOREIGN_FILE) peer_of_foreign(link, !sim.fds[fd]->side);
    return fd;
}

/* A stream over a descriptor of elsewhere, with callbacks. */
static void world_stream_from_fd(void) {
    int fd = model.count + 8 > MODEL_CONNS ? -1 : world_foreign();
    tcpsrv_stream *stream = fd >= 0 ? tcpsrv_stream_from_fd(world.loop, fd) : NULL;
    model_conn *conn;
    if (!stream) {
        if (fd >= 0) sim_close(fd);
        return;
    }
    conn = conn_new(stream, 0);
    conn->client = 1;
    conn->max_buffer = conn->max_write = 1 << 20;
    conn->high_water = conn->chunk = 1 << 16;
    conn->close_ms = 5000;
    conn->idle_ms = 0;
    callback_step(conn, stream);
}

static void world_watch_end(void) {
    if (!world.watch_id) return;
    tcpsrv_cancel(world.loop, world.watch_id);
    sim_close(world.watched_fd);
    world.watch_id = 0;
}

/* Readiness is told as long as it lasts: what is there is taken, an end ends the watch. */
static void world_on_watch(int fd, int events, void *arg) {
    char bytes[100];
    (void)arg;
    sim_moved();
    if (!world.watch_id || fd != world.watched_fd) sim_broken(2, "a watch that is no more is told");
    if (!events || (events & ~(world.watch_events | TCPSRV_HANGUP)))
        sim_broken(2, "a watch is told %d", events);
    if ((events & TCPSRV_READ) && sim_read(fd, bytes, sizeof bytes) == 0) events |= TCPSRV_HANGUP;
    if ((events & TCPSRV_HANGUP) || ++world.watch_calls > 10) world_watch_end();
    if (sim_chance(3)) world_random_step();
}

static void world_watch(void) {
    int fd, events = 1 + (int)sim_below(3);
    int64_t id;
    if (world.watch_id) {
        if (sim_chance(3)) world_watch_end();
        return;
    }
    fd = world_foreign();
    if (fd < 0) return;
    sim.fds[fd]->nonblock = sim.fds[fd]->was_nonblock = 1;
    id = tcpsrv_watch_fd(world.loop, fd, events, world_on_watch, NULL);
    if (id <= 0) {
        sim_close(fd);
        return;
    }
    world.watch_id = id;
    world.watched_fd = fd;
    world.watch_events = events;
    world.watch_calls = 0;
}

static void world_on_signal(int signo, void *arg) {
    (void)arg;
    sim_moved();
    if (signo != SIGUSR1 || !world.raised) sim_broken(2, "a signal is told that did not come");
    world.raised = 0;
    if (sim_chance(3)) world_random_step();
}

static void world_signal(void) {
    if (world.signal_id <= 0) {
        world.signal_id = tcpsrv_on_signal(world.loop, SIGUSR1, world_on_signal, NULL);
    } else if (sim_chance(3)) {
        tcpsrv_cancel(world.loop, world.signal_id);
        world.signal_id = world.raised = 0;
        if (sim_handlers[SIGUSR1]) sim_broken(8, "a signal's handler was left");
    } else {
        world.raised = 1;
        sim_raise(SIGUSR1);
    }
}

/* ---- coroutines beside streams --------------------------------------------------------------- */

static int64_t world_parked;

static int world_parker(void *arg) {
    int err;
    (void)arg;
    model.coroutines++;
    world_parked = tcpsrv_self();
    err = tcpsrv_park(sim_chance(2) ? -1 : (int64_t)sim_size(200));
    sim_moved();
    if (err && err != TCPSRV_ETIMEDOUT && err != TCPSRV_ECANCELED && err != -ENOMEM)
        sim_broken(2, "a park ended: %d", err);
    model.coroutines--;
    return 0;
}

static int world_fd_waiter(void *arg) {
    int fd = world_foreign(), told, state;
    (void)arg;
    if (fd < 0) return 0;
    model.coroutines++;
    sim.fds[fd]->nonblock = sim.fds[fd]->was_nonblock = 1;
    told = tcpsrv_wait_fd(fd, 1 + (int)sim_below(3), sim_chance(2) ? -1 : (int64_t)sim_size(300));
    state = sim_state_of(sim.fds[fd]);
    sim_moved();
    if (told == 0 || (told > 0 && (told & TCPSRV_WRITE) &&
                      !(state & (SIM_OUT | SIM_ERR | SIM_HUP))))
        sim_broken(2, "waiting for a descriptor gave %d", told);
    sim_close(fd);
    model.coroutines--;
    return 0;
}

static void world_spawn(void) {
    size_t stack = sim_chance(3) ? 0 : 16384;
    if (sim_chance(4)) {
        tcpsrv_spawn(world.loop, world_fd_waiter, NULL, stack);
        return;
    }
    if (sim_chance(2)) tcpsrv_spawn(world.loop, world_client, NULL, stack);
    else tcpsrv_spawn(world.loop, world_parker, NULL, stack);
}

/* ---- the server ------------------------------------------------------------------------------ */

/* A drain is called off, or another takes its place; what its end has aborted stays so. */
static void world_drain_over(void) {
    int i;
    for (i = 0; i < model.count && model.draining && sim.now >= model.drain_due; i++)
        model.conns[i].drained = !model.conns[i].client;
    model.draining = 0;
}

static void world_drain(int64_t timeout_ms) {
    world_drain_over();
    model.draining = 1;
    model.drain_due = timeout_ms < 0 ? SIM_NEVER : sim.now + SIM_MS(timeout_ms);
    SIM_TRACE("drain(%d)", (int)timeout_ms);
    tcpsrv_drain(world.server, timeout_ms);
}

static void world_peer(void) {
    sim_peer *peer = peer_new(WORLD_PORT);
    if (!peer) return;
    if (sim.path_exists && sim_chance(2)) {
        peer->family = AF_UNIX;
        peer->port = 70000;
    }
    if (world.options.proxy_protocol) peer_head(peer, (sim_head)sim_below(HEAD_KINDS));
}

static void world_listen_unix(void) {
    int fd;
    if (!world.server || world.server_freed) return;
    fd = tcpsrv_bind_unix_socket("/run/sim.sock", 0, 0);
    if (fd >= 0 && tcpsrv_add_socket(world.server, fd) == 0) world_drain_over();
}

/* At the first signal it drains, at the second it aborts. */
static void world_drain_on_signal(void) {
    int64_t timeout_ms = (int64_t)sim_size(300);
    if (!world.signal_drains) {
        if (tcpsrv_drain_on_signal(world.server, SIGTERM, timeout_ms) == 0) world.signal_drains = 1;
        world.signal_drain_ms = timeout_ms;
        return;
    }
    if (!sim_raise(SIGTERM)) return;
    model.signalled = 1;
}

#ifdef TCPSERVER_TLS
static tcpsrv_tls *world_any_tls(void) {
    if (sim_chance(4)) return NULL;
    return sim_chance(6) ? secure.mutual : sim_chance(4) ? secure.strict : secure.server;
}
#endif

/* New connections speak TLS from now on, or other TLS, or none. */
static void world_swap_tls(void) {
#ifdef TCPSERVER_TLS
    secure.serves = world_any_tls();
    SIM_TRACE("the server's TLS is another");
    if (tcpsrv_set_tls(world.server, secure.serves) != 0) sim_broken(2, "set_tls failed");
#endif
}

static void world_server_step(void) {
    if (!world.server || world.server_freed) return;
    switch (sim_below(8)) {
    case 0: tcpsrv_stop(world.server); break;
    case 1: case 2:
        if (tcpsrv_listen(world.server, WORLD_PORT, "127.0.0.1") == 0) world_drain_over();
        break;
    case 3:
        if (!sim_chance(3)) break;
        world_drain(sim_chance(2) ? -1 : (int64_t)sim_size(100));
        break;
    case 4:
        if (sim_chance(3)) world_end_begin();
        else world_drain_on_signal();
        break;
    case 5: world_listen_unix(); break;
    case 6:
        if (world.secure && sim_chance(3)) world_swap_tls();
        else world_peer();
        break;
    default: world_peer(); break;
    }
}

/* One thing that may be done from any callback or coroutine without waiting. */
static void world_random_step(void) {
    tcpsrv_stream *stream;
    model_conn *conn;
    if (model.ending || world.over) return;
    switch (sim_below(13)) {
    case 0: world_timer_new(); break;
    case 1: world_timer_cancel(); break;
    case 2: world_post(); break;
    case 3: if (sim_chance(3)) world_spawn(); break;
    case 4: if (world_parked) tcpsrv_wake(world.loop, world_parked); break;
    case 5: if (sim_chance(2)) world_server_step(); break;
    case 6: if (sim_chance(3)) world_connect(); break;
    case 7: if (sim_chance(3)) world_stream_from_fd(); break;
    case 8: world_watch(); break;
    case 9: world_signal(); break;
    default:
        conn = conn_random(&stream);
        world.may_wait = tcpsrv_self() != 0 && sim_chance(3);
        if (conn) conn_poke(conn, stream);
        world.may_wait = 0;
    }
}

/* ---- a run ----------------------------------------------------------------------------------- */

static void world_server_free(void) {
    int i;
    if (world.server_freed) return;
    world.server_freed = 1;
    for (i = 0; i < model.count; i++) {
        if (model.conns[i].client) continue;
        conn_closing(&model.conns[i]);
        model.conns[i].aborted = 1;
    }
    tcpsrv_free(world.server);
}

static void world_end_begin(void) {
    if (sim_chance(3) && !world.server_freed && world.server) world_server_free();
    world.over = 1;
    tcpsrv_loop_stop(world.loop);
}

static void world_on_end(void *arg) {
    (void)arg;
    sim_moved();
    world_end_begin();
}

/* Nothing will ever happen again. */
static void world_stuck(void) {
    sim_moved();
    if (++world.turns_of_end > 3) sim_broken(2, "the loop does not stop");
    tcpsrv_loop_stop(world.loop);
    world.over = 1;
}

static void world_log(int level, const char *line, void *user) {
    (void)user;
    SIM_TRACE("log %d: %s", level, line);
}

static size_t world_limit(size_t most) {
    return sim_chance(2) ? 0 : 1 + sim_size(most);
}

/* The run's TLS: its server has it or not. */
static void world_secure_options(tcpsrv_options *options) {
#ifdef TCPSERVER_TLS
    world.secure = 1;
    secure.script = SECURE_BY_CHANCE;
    secure.serves = world_any_tls();
    secure.server->session_ttl_ns = sim_chance(3) ? SIM_MS(1 + sim_size(100)) : SIM_MS(300000);
    options->tls = secure.serves;
    options->handshake_timeout_ms = (int64_t)(sim_chance(8) ? 1 + sim_size(1500) : 0);
    sim.tight = sim_chance(2);
    sim.curve_ns = sim_chance(4) ? SIM_MS(1) / 2 : 0;
    secure_remember(secure.server);
    secure_remember(secure.strict);
#else
    (void)options;
#endif
}

static void world_options(tcpsrv_options *options) {
    memset(options, 0, sizeof *options);
    options->loop = world.loop;
    options->log = world_log;
    if (sim_chance(2)) options->handle_stream = world_handler;
    else options->on_stream = world_on_stream;
    options->max_buffer_size = world_limit(20000);
    options->max_write_buffer_size = world_limit(100000);
    options->write_high_water = world_limit(20000);
    options->read_chunk_size = world_limit(100000);
    if (options->read_chunk_size) options->read_chunk_size += sim_least_room;
    options->stack_size = sim_chance(2) ? 0 : 32768;
    options->max_connections = world_limit(8);
    options->idle_timeout_ms = (int64_t)(sim_chance(3) ? 1 + sim_size(2000) : 0);
    options->close_timeout_ms = (int64_t)world_limit(8000);
    options->memory_limit = sim_chance(8) ? 500 + sim_size(100000) : 0;
    model.memory_limit = options->memory_limit;
    options->max_connections_per_ip = sim_chance(6) ? 1 + sim_below(3) : 0;
    world_secure_options(options);
    if (!sim_chance(6)) return;
    options->proxy_protocol = sim_chance(2) ? TCPSRV_PROXY_REQUIRED : TCPSRV_PROXY_OPTIONAL;
    options->trusted = "127.0.0.0/8, ::1, unix";
    options->handshake_timeout_ms = (int64_t)world_limit(1000);
}

static void world_begin(void) {
    size_t peers = 1 + sim_size(24), parked = sim_chance(200) ? 100 : 0;
    world_options(&world.options);
    world.server = tcpsrv_new(&world.options);
    if (world.server) tcpsrv_listen(world.server, WORLD_PORT, "127.0.0.1");
    if (sim_chance(8)) world_listen_unix();
    while (peers--) world_peer();
    if (sim_chance(2)) world_timer_new();
    while (parked--) tcpsrv_spawn(world.loop, world_parker, NULL, 16384);
    while (sim_chance(2)) world_random_step();
    if (sim_chance(3)) world_spawn();
    if (sim_chance(4)) world_connect();
    tcpsrv_call_later(world.loop, 1 + (int64_t)sim_size(4000), world_on_end, NULL);
}

static void world_loop_free(void) {
    int i;
    model.ending = 1;
    for (i = 0; i < model.count; i++) conn_closing(&model.conns[i]);
    if (tcpsrv_loop_free(world.loop) != 0) sim_broken(2, "a loop is not freed");
    world.loop = NULL;
    sim.loop = NULL;
}

/* A straight main: its calls run the thread's own loop until they are done. */
static void world_outside(void) {
    tcpsrv_connect_options options;
    model_conn *conn = client_new(&options, 1);
    size_t steps = 1 + sim_size(8);
    if (!conn) return;
    conn->outside = 1;
    handler_first(conn);
    while (steps-- && !world.over && !conn->closing)
        if (handler_step(conn, conn->stream) != 0) break;
    if (!conn->closing) conn_close(conn, conn->stream);
}

/* As within somebody else's loop. */
static void world_poll(void) {
    while (!world.over) {
        int timeout_ms = tcpsrv_loop_timeout(world.loop);
        if (sim_chance(8)) timeout_ms = 0;
        if (tcpsrv_loop_poll(world.loop, timeout_ms) != 0) sim_broken(2, "a turn failed");
    }
}

static void world_secure_end(void) {
#ifdef TCPSERVER_TLS
    secure_forget(secure.server);
    secure_forget(secure.strict);
    secure_forget(secure.client);
    secure_forget(secure.mutual);
#endif
}

/* One run of what begins, with whatever sim.run asks for. */
static void world_run(void (*begin)(void)) {
    int i, own = begin == world_begin && sim_chance(6);
    world.loop = own ? tcpsrv_loop_default() : tcpsrv_loop_new();
    sim.loop = world.loop;
    if (world.loop) {
        begin();
        if (own) world_outside();
        if (begin == world_begin && sim_chance(8)) world_poll();
        else if (!world.over) tcpsrv_loop_run(world.loop); /* over: the end came outside */
        world.over = 1;
        if (world.server && sim_chance(2)) world_server_free();
        world_loop_free();
        if (world.watch_id) sim_close(world.watched_fd);
    }
    if (world.server && !world.server_freed) world_server_free();
    sim_threads_run(1);
    for (i = 0; i < 65; i++)
        if (sim_handlers[i]) sim_broken(8, "the handler of signal %d was left", i);
    world_secure_end();
    model_check_end();
}

static void sim_reset(uint64_t seed, const struct sim_options_of_run *run) {
    int i;
    for (i = 0; i < sim.object_top; i++) sim.objects[i].kind = SIM_FREE;
    memset(&sim, 0, offsetof(struct sim_state, objects));
    sim.object_count = sim.object_top = 0;
    for (i = 0; i < SIM_POLLERS; i++) sim_pollers[i].used = 0;
    memset(sim_handlers, 0, sizeof sim_handlers);
    memset(&world, 0, offsetof(struct world_state, scratch));
    model.count = model.draining = model.ending = model.coroutines = model.turns = model.full = 0;
    model.signalled = 0;
    model.memory_limit = 0;
    sim_wires_forget();
    sim_link_count = sim_peer_count = 0;
    world_parked = 0;
    sim.seed = seed;
    sim.chance = sim_mix(seed) | 1;
    sim.run = *run;
    sim.last_failed = -1;
    sim.fd_limit = SIM_FDS;
    sim.fd_top = SIM_FIRST_FD + 1;
#ifdef TCPSERVER_USE_KQUEUE
    sim.bsd = 1;
#endif
    sim.now = 1000000000u;
}

/* A random run: its character first. */
static void world_any(void) {
    if (!sim.run.fail_call && !sim.run.fault_rate && !sim.run.alloc_rate && !sim_chance(2)) {
        sim.run.fault_rate = sim_chance(3) ? 0 : 20 + sim_size(2000);
        sim.run.alloc_rate = sim_chance(2) ? 0 : 20 + sim_size(2000);
    }
    sim.interleave = sim_chance(3) ? 0 : 1 + sim_below(8);
    sim.spurious = sim_chance(3) ? 2 + sim_below(30) : 0;
    if (sim_chance(6)) sim.fd_limit = 6 + (int)sim_below(20);
    sim_peer_bytes = sim_chance(20) ? 400000 : sim_chance(4) ? 40000 : 3000;
    world.write_most = sim_chance(40) ? 2000000 : sim_chance(5) ? 100000 : 4000;
    sim_least_room = (sim_peer_bytes + world.write_most) / 1000;
    world.steps_most = sim_chance(6) ? 60 : 12;
    world_run(world_begin);
}

/* Once in a process. */
static void world_prepare(void) {
    sim_table_make();
    if (regcomp(&world_regex[0], "\r?\n", REG_EXTENDED) != 0 ||
        regcomp(&world_regex[1], "[aeiou]{3}", REG_EXTENDED) != 0)
        abort();
#ifdef TCPSERVER_TLS
    secure_prepare();
#endif
}

#endif
