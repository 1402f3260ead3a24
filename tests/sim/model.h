/* The promises, checked. A model keeps for each of the program's streams how far reads and writes
   have come, which requests wait and what has been asked for, and knows by itself what each read
   must give: the oracle looks at all the bytes that are there, from the first, each time. Numbers
   of promises are those of the documentation. */
#ifndef SIM_MODEL_H
#define SIM_MODEL_H

enum {
    MODEL_CONNS = 96,
    MODEL_INTO = 4096,          /* of a read into memory, at most */
    MODEL_BYTES = 1 << 22,
    MODEL_STARVED = 150         /* turns in which a ready stream may wait */
};

typedef enum model_kind {
    WANT_UNTIL, WANT_UNTIL_MEM, WANT_EXACTLY, WANT_SOME, WANT_INTO, WANT_CLOSE, WANT_FRAME,
    WANT_REGEX, WANT_READY, WANT_KINDS
} model_kind;

typedef struct model_want {
    model_kind kind;
    size_t size, max;           /* max: the effective one */
    const char *delimiter;
    size_t delimiter_size;
    const regex_t *regex;
    int frame;                  /* which framing */
} model_want;

typedef struct model_conn {
    int used, number;
    int64_t id;
    tcpsrv_stream *stream;
    tcpsrv_loop *loop;
    sim_link *link;
    sim_object *object;
    int side;
    int bound;                  /* 0: still connecting, and link and object are those below */
    sim_link no_link;
    sim_object no_object;
    int coroutine, client;      /* has a handler of its own; was connected by us */
    int drained;                /* a drain's time had come before it was called off */
    int outside;                /* is waited for outside coroutines: a stop ends that */
    size_t max_buffer, max_write, high_water, chunk;
    int64_t close_ms;

    uint64_t in_pos;            /* bytes that reads have given */
    size_t viewed;              /* those of the last read, as long as its view lives, */
    char *view;                 /* where it is, */
    size_t view_used;           /* and what of it has become the bytes of a write */
    int reading, in_call;       /* a read waits; its call has not returned */
    model_want want;
    uint64_t read_due;          /* its deadline; 0: none */
    int64_t read_ms, write_ms, idle_ms, connect_ms;
    size_t frame_asked;         /* the size that the framing said it needs */
    char into[MODEL_INTO];

    uint64_t out_pos;           /* bytes that writes have been given */
    int writing;                /* waiting writes */
    int mixed;                  /* also others than waiting writes */
    int torn, short_file, filed;
    int flushes;                /* calls back that are due */
    int shut;

    int closing, aborted, cancelled, close_set, close_told, gone;
    uint64_t begun_at, closing_at;
    int lost;                   /* input was dropped for want of memory, and said so */
    int starved;
    uint64_t seen_taken;
    int64_t child;              /* a coroutine that writes beside the handler */
    int secure;                 /* by TLS, once it is bound */
    int wrong_name;             /* that no certificate has */
    int64_t handshake_ms;
    uint64_t handshake_at;
} model_conn;

static struct model_state {
    model_conn conns[MODEL_CONNS];
    int count;
    int draining, ending;       /* the server, the loop */
    int signalled;              /* a signal may make it drain, or abort, at any time from now on */
    uint64_t drain_due;         /* when what is left of the server's streams is aborted */
    int coroutines;             /* that run */
    size_t memory_limit;
    int full;                   /* it is reached, or nearly so */
    int turns;
    unsigned char bytes[MODEL_BYTES];
} model;

/* ---- TLS ------------------------------------------------------------------------------------- */

#ifdef TCPSERVER_TLS

static int model_held_back(const model_conn *conn);

static const tcpsrv__engine *model_engine(const model_conn *conn) {
    const tcpsrv__source *source;
    if (!conn->secure || model.ending) return NULL;
    source = tcpsrv__source_by_id(conn->loop, conn->id);
    if (!source || !conn->stream->foreign || conn->stream->extra->io != &tcpsrv__tls_transport)
        return NULL;
    return tcpsrv__link_of(conn->stream)->engine;
}

/* Encrypts from out_pos on, and decrypts from in_pos on. */
static void model_secure_begin(model_conn *conn, uint64_t in_pos, uint64_t out_pos) {
    sim_dir *out = &conn->link->dir[conn->side], *in = &conn->link->dir[!conn->side];
    conn->secure = 1;
    conn->handshake_at = sim.now;
    out->clear = out->plain_sealed = out->plain_sent = out_pos;
    in->secure_from = in->plain_taken = in_pos;
    conn->link->mutual = model_engine(conn) && model_engine(conn)->tls == secure.mutual;
    SIM_TRACE("stream %d begins TLS: sends it from %llu on, gets it from %llu on", conn->number,
              (unsigned long long)out->clear, (unsigned long long)in->secure_from);
}

/* The first bytes of a stream that the model does not know yet: its handler has not begun. */
static void model_secure_unknown(sim_link *link, int side) {
    const tcpsrv_loop *loop = sim.loop;
    int i;
    for (i = 1; loop && i < (int)loop->slot_count; i++) {
        const tcpsrv__source *source = tcpsrv__slot_source(loop, &loop->slots[i]);
        if (!source || source->type != &tcpsrv__stream_class ||
            source->fd != link->end[side].object->fd)
            continue;
        if (((const tcpsrv_stream *)(const void *)source)->foreign &&
            ((const tcpsrv_stream *)(const void *)source)->extra->io == &tcpsrv__tls_transport)
            link->dir[side].clear = 0;
    }
}

static int model_handshakes(const model_conn *conn) {
    return model_engine(conn) && conn->stream->connecting;
}

static model_conn *model_of_engine(const br_ssl_engine_context *core) {
    int i;
    for (i = 0; i < model.count; i++) {
        const tcpsrv__engine *engine = model_engine(&model.conns[i]);
        if (engine && engine->core == core) return &model.conns[i];
    }
    return NULL;
}

static void model_secure_write(br_ssl_engine_context *core, size_t size) {
    const model_conn *conn = model_of_engine(core);
    size_t room;
    const unsigned char *data = br_ssl_engine_sendapp_buf(core, &room);
    sim_dir *out = conn ? &conn->link->dir[conn->side] : NULL;
    if (!conn) sim_broken(1, "something is encrypted for nobody");
    if (out->plain_sealed + size > conn->out_pos ||
        !sim_dir_equal(out, out->plain_sealed, data, size))
        sim_broken(1, "stream %d: the %zu bytes that are encrypted from %llu on are not those "
                   "written", conn->number, size, (unsigned long long)out->plain_sealed);
    out->plain_sealed += size;
    SIM_TRACE("stream %d encrypts %zu", conn->number, size);
}

static void model_secure_sent(br_ssl_engine_context *core) {
    const model_conn *conn = model_of_engine(core);
    size_t size;
    sim_dir *out = conn ? &conn->link->dir[conn->side] : NULL;
    if (!conn || br_ssl_engine_sendrec_buf(core, &size)) return;
    out->plain_sent = out->plain_sealed;
    if (out->notify_end == SIM_NEVER &&
        (out->notifies || (br_ssl_engine_current_state(core) == BR_SSL_CLOSED &&
                           !br_ssl_engine_last_error(core))))
        out->notify_end = out->sent;
}

static void model_secure_read(br_ssl_engine_context *core, size_t size) {
    const model_conn *conn = model_of_engine(core);
    size_t room;
    const unsigned char *data = br_ssl_engine_recvapp_buf(core, &room);
    sim_dir *in = conn ? &conn->link->dir[!conn->side] : NULL;
    if (!conn) sim_broken(1, "something is decrypted for nobody");
    if (in->clear != in->secure_from)
        sim_broken(1, "stream %d decrypts what was not encrypted", conn->number);
    if (in->plain_taken + size > in->plain_sealed ||
        !sim_dir_equal(in, in->plain_taken, data, size))
        sim_broken(1, "stream %d: the %zu bytes that are decrypted from %llu on are not those "
                   "sent", conn->number, size, (unsigned long long)in->plain_taken);
    in->plain_taken += size;
    SIM_TRACE("stream %d decrypts %zu", conn->number, size);
}

static void model_secure_close(br_ssl_engine_context *core) {
    const model_conn *conn = model_of_engine(core);
    if (!conn) return;
    if (conn->out_pos > conn->link->dir[conn->side].plain_sealed)
        sim_broken(1, "stream %d says close_notify, with %llu bytes not sent", conn->number,
                   (unsigned long long)(conn->out_pos -
                                        conn->link->dir[conn->side].plain_sealed));
    conn->link->dir[conn->side].notifies = 1;
    SIM_TRACE("stream %d says close_notify", conn->number);
}

static int model_notified(const model_conn *conn) {
    const sim_dir *in = &conn->link->dir[!conn->side];
    return in->taken >= in->notify_end;
}

/* Up to where the records are whole that were received. */
static uint64_t model_deliverable(const sim_dir *in) {
    const sim_wire *wire = &in->wire;
    size_t i = 0;
    while (i < wire->count && wire->records[i].wire <= in->taken) i++;
    return i ? wire->records[i - 1].plain : in->secure_from;
}

/* All that came whole was decrypted, when a read waits for it. */
static void model_quiet_secure(const model_conn *conn) {
    const sim_dir *in = &conn->link->dir[!conn->side];
    if (!conn->secure || !model_engine(conn) || conn->stream->dead) return;
    if (conn->stream->connecting && !conn->closing && conn->handshake_ms > 0 &&
        sim.now > conn->handshake_at + SIM_MS(conn->handshake_ms) + sim_late())
        sim_broken(2, "stream %d: its handshake outlives its time", conn->number);
    if (!conn->reading || conn->stream->connecting || in->clear != in->secure_from ||
        model_held_back(conn) || model.full)
        return;
    if (model_notified(conn))
        sim_broken(2, "stream %d: a read outlives close_notify", conn->number);
    if (in->taken >= in->alert_end)
        sim_broken(2, "stream %d: a read outlives a fatal alert", conn->number);
    if (model_deliverable(in) > in->plain_taken && in->taken >= in->secure_from)
        sim_broken(2, "stream %d: a read waits, and %llu bytes wait to be decrypted",
                   conn->number, (unsigned long long)(model_deliverable(in) - in->plain_taken));
}

/* Whether its engine waits to send, or the clear text before it: then it takes nothing. */
static int model_secure_sends(const model_conn *conn) {
    const tcpsrv__engine *engine = model_engine(conn);
    const sim_dir *out = &conn->link->dir[conn->side];
    size_t size;
    if (engine && out->sent < out->clear) return 1;
    if (engine && engine->own_end) return 1;
    return engine && engine->started && engine->records &&
           br_ssl_engine_sendrec_buf(engine->core, &size) != NULL;
}

/* What ends before it is set up has nothing to announce. */
static int model_secure_is_done(const model_conn *conn) {
    const tcpsrv__engine *engine = model_engine(conn);
    return engine && engine->done;
}

/* Whether it has been told that nothing more comes. */
static int model_told_end(const model_conn *conn) {
    return conn->secure && conn->bound ? model_notified(conn) : conn->object->told_end;
}

/* By TLS it is told when it asks, which it may have died before, or have no memory for. */
static int model_input_ended(const model_conn *conn) {
    return model_told_end(conn) && (!conn->secure || conn->stream->eof);
}

static int model_lacks_randomness(int code) {
    return code == TCPSRV_ETLS - BR_ERR_NO_RANDOM &&
           (sim_noted(sim.injected, EIO) || sim_noted(sim.injected, ENOSYS));
}

/* Whether TLS may end with this code. */
static int model_secure_may_end(const model_conn *conn, int code) {
    const sim_dir *in = &conn->link->dir[!conn->side];
    const sim_peer *peer = conn->link->end[!conn->side].peer;
    const struct sim_secure *end = peer ? peer->secure : NULL;
    int number = TCPSRV_ETLS - code;
    if (!conn->secure) return 0;
    if (code == -EPIPE) return model_notified(conn);
    if (code == TCPSRV_ETLS_TRUNCATED)
        return conn->object->told_end && !model_notified(conn) && in->taken < in->alert_end;
    if (in->clear != in->secure_from || (peer && !end)) return number > 0 && number < 1000;
    if (sim.alloc_failed && number == BR_ERR_X509_LIMIT_EXCEEDED) return 1;
    if (number == BR_ERR_NO_CLIENT_AUTH ||
        (number >= BR_ERR_X509_OK && number <= BR_ERR_X509_NOT_TRUSTED))
        return conn->wrong_name || (!conn->client && !(end && end->shows));
    if (!end) return number > 0 && number < 1000; /* the other end is ours, and has its reasons */
    if (code == TCPSRV_ETLS_NAME) return !!end->name;
    if (code == TCPSRV_ETLS_VERSION || number == 512 + 70) return end->fault == SECURE_OLD;
    if (number == 256 + 80) return in->taken >= in->alert_end;
    if (number == 256 + 40) return end->fault == SECURE_ALERTS || end->fault >= SECURE_OLD;
    if (number == 256 + 70) return end->fault >= SECURE_OLD;
    if (end->fault == SECURE_STRANGE) return number == 512 + 40;
    if (end->renegotiated) return number > 0 && number < 1000;
    return end->fault == SECURE_DAMAGES && number > 0 && number < 256;
}

#else

static void model_secure_begin(model_conn *conn, uint64_t in_pos, uint64_t out_pos) {
    (void)conn, (void)in_pos, (void)out_pos;
}

static void model_secure_unknown(sim_link *link, int side) {
    (void)link, (void)side;
}

static int model_handshakes(const model_conn *conn) {
    (void)conn;
    return 0;
}

static void model_quiet_secure(const model_conn *conn) {
    (void)conn;
}

static int model_secure_sends(const model_conn *conn) {
    (void)conn;
    return 0;
}

static int model_secure_is_done(const model_conn *conn) {
    (void)conn;
    return 1;
}

static int model_told_end(const model_conn *conn) {
    return conn->object->told_end;
}

static int model_input_ended(const model_conn *conn) {
    return conn->object->told_end;
}

static int model_lacks_randomness(int code) {
    (void)code;
    return 0;
}

static int model_secure_may_end(const model_conn *conn, int code) {
    (void)conn, (void)code;
    return 0;
}
#endif

/* ---- the oracle ------------------------------------------------------------------------------ */

typedef struct model_answer {
    int code;                   /* 1: it waits; else as the read's */
    size_t size;
} model_answer;

/* A stream that connects has a descriptor only when it is connected: its place among the sent bytes
   goes over to the connection then. */
static void model_bind_conn(model_conn *conn, sim_link *link, int side) {
    link->dir[side].place = conn->no_link.dir[0].place;
    link->end[side].owner = conn;
    conn->link = link;
    conn->side = side;
    conn->object = link->end[side].object;
    conn->bound = 1;
    if (conn->secure) model_secure_begin(conn, 0, 0);
    SIM_TRACE("stream %d is on connection %d", conn->number, (int)(link - sim_links));
}

static void model_bind(sim_link *link, int side) {
    int i;
    for (i = 0; i < model.count; i++) {
        model_conn *conn = &model.conns[i];
        const tcpsrv__source *source;
        if (conn->bound || !conn->used || model.ending) continue;
        source = tcpsrv__source_by_id(conn->loop, conn->id);
        if (!source || source->fd < 0 || source->fd != link->end[side].object->fd) continue;
        model_bind_conn(conn, link, side);
        return;
    }
    model_secure_unknown(link, side);
}

/* Those that have a descriptor since the last turn. */
static void model_bind_all(void) {
    int i;
    for (i = 0; i < model.count; i++) {
        const model_conn *conn = &model.conns[i];
        const tcpsrv__source *source;
        if (conn->bound || !conn->used) continue;
        source = tcpsrv__source_by_id(conn->loop, conn->id);
        if (source && source->fd >= 0)
            model_bind(sim.fds[source->fd]->link, sim.fds[source->fd]->side);
    }
}

static uint64_t model_available(const model_conn *conn) {
    return sim_taken(&conn->link->dir[!conn->side]) - conn->in_pos;
}

/* The framings of the workload: by one byte, by two bytes after a second look, one that refuses. */
static int64_t model_frame_end(const unsigned char *data, size_t size, int frame) {
    if (frame == 0) return 1 + data[0] % 64;
    if (frame == 1) return size < 2 ? 0 : 2 + data[0] + 256 * (data[1] % 4);
    if (data[0] % 16 == 0) return -1;
    return size < 3 ? 0 : 3 + data[2] % 32;
}

static size_t model_find(const unsigned char *data, size_t size, const model_want *want) {
    size_t i;
    for (i = 0; i + want->delimiter_size <= size; i++)
        if (memcmp(data + i, want->delimiter, want->delimiter_size) == 0)
            return i + want->delimiter_size;
    return 0;
}

static size_t model_match(unsigned char *data, size_t size, const model_want *want) {
    regmatch_t match;
    match.rm_so = 0;
    match.rm_eo = (regoff_t)size;
    if (regexec(want->regex, (const char *)data, 1, &match, REG_STARTEND) != 0) return 0;
    return (size_t)match.rm_eo;
}

static model_answer model_within(size_t end, size_t size, size_t max) {
    model_answer answer = { 1, 0 };
    if (end > max || (!end && size > max)) answer.code = TCPSRV_ETOOBIG;
    else if (end && end <= size) {
        answer.code = 0;
        answer.size = end;
    }
    return answer;
}

static model_answer model_at_least(size_t size, size_t wanted, size_t given) {
    model_answer answer = { 1, 0 };
    if (size >= wanted) {
        answer.code = 0;
        answer.size = given;
    }
    return answer;
}

/* What the read must give, from what has been received; eof: and nothing more comes. */
static model_answer model_expect(const model_conn *conn, int eof) {
    const model_want *want = &conn->want;
    size_t size = (size_t)model_available(conn);
    model_answer answer = { 1, 0 };
    int64_t end;
    if (size > sizeof model.bytes) sim_broken(4, "%zu bytes are held", size);
    sim_in_copy(&conn->link->dir[!conn->side], conn->in_pos, model.bytes, size);
    switch (want->kind) {
    case WANT_EXACTLY: case WANT_INTO: return model_at_least(size, want->size, want->size);
    case WANT_SOME: return model_at_least(size, 1, size < want->max ? size : want->max);
    case WANT_READY: return model_at_least(1, conn->object->connecting ||
                                                         model_handshakes(conn) ? 2 : 0, 0);
    case WANT_CLOSE:
        if (size > want->max) answer.code = TCPSRV_ETOOBIG;
        else if (eof) answer = model_at_least(size, 0, size);
        return answer;
    case WANT_FRAME:
        end = size ? model_frame_end(model.bytes, size, want->frame) : 0;
        if (end < 0) answer.code = TCPSRV_EREFUSED;
        return end < 0 ? answer : model_within((size_t)end, size, want->max);
    case WANT_REGEX: return model_within(model_match(model.bytes, size, want), size, want->max);
    default: return model_within(model_find(model.bytes, size, want), size, want->max);
    }
}

/* ---- reasons --------------------------------------------------------------------------------- */

static int model_of_server(const model_conn *conn) {
    return !conn->client;
}

/* Whether a request may end with this code: nothing is reported that has no cause. */
static int model_may_end(const model_conn *conn, int code) {
    switch (code) {
    case 0: return 1;
    case -EINTR: return 0; /* whatever a signal interrupts goes on */
    case TCPSRV_EOF: return model_told_end(conn) ||
                            ((model.draining || model.signalled) && model_of_server(conn));
    case TCPSRV_ECLOSED: return conn->closing || conn->shut || conn->drained ||
                                (model_of_server(conn) &&
                                 (model.signalled ||
                                  (model.draining && sim.now >= model.drain_due)));
    case TCPSRV_ECANCELED: return conn->cancelled || model.ending || conn->outside;
    case TCPSRV_EBUFFULL: return model.memory_limit && model_of_server(conn);
    case TCPSRV_ETIMEDOUT: return conn->read_due || conn->read_ms > 0 || conn->write_ms > 0 ||
                                  conn->idle_ms > 0 || conn->connect_ms > 0 || conn->closing ||
                                  (conn->secure && sim.now >= conn->handshake_at +
                                                              SIM_MS(conn->handshake_ms));
    case -ENOMEM: if (sim.alloc_failed) return 1; break;
    case -EIO: if (conn->short_file) return 1; break;
    case -EPIPE: if (conn->link->is_pipe && conn->link->end[1].closed) return 1; break;
    default: break;
    }
    if (model_lacks_randomness(code)) return 1;
    if (conn->secure && model_secure_may_end(conn, code)) return 1;
    if (conn->client && (code <= TCPSRV_ERESOLVE ||
                         (code > -192 && sim_noted(sim.told_connecting, -code))))
        return 1;
    if (code > -192 && code < 0)
        return sim_noted(conn->object->told, -code) || sim_noted(sim.injected, -code);
    return 0;
}

static void model_check_code(const model_conn *conn, int code, const char *what) {
    if (!model_may_end(conn, code))
        sim_broken(2, "stream %d: a %s ended with %d (%s), for no reason", conn->number, what, code,
                   tcpsrv_strerror(code));
}

static int model_is_open(const model_conn *conn) {
    const tcpsrv__source *source;
    if (conn->bound) return conn->link->end[conn->side].object == conn->object;
    source = conn->loop ? tcpsrv__source_by_id(conn->loop, conn->id) : NULL;
    return source && !conn->stream->dead;
}

static uint64_t model_queued(const model_conn *conn) {
    return conn->out_pos - sim_sent(&conn->link->dir[conn->side]);
}

/* ---- reads ----------------------------------------------------------------------------------- */

static void model_read_begin(model_conn *conn, const model_want *want) {
    conn->want = *want;
    conn->reading = 1;
    conn->frame_asked = 0;
    conn->starved = 0;
    conn->view = NULL;
    /* What gives no bytes leaves the last ones where they are. */
    if (want->kind != WANT_READY && (want->kind != WANT_EXACTLY || want->size)) conn->viewed = 0;
    conn->read_due = conn->read_ms > 0 ? sim.now + SIM_MS(conn->read_ms) : 0;
}

static void model_check_data(model_conn *conn, tcpsrv_bytes bytes) {
    model_answer answer = model_expect(conn, model_input_ended(conn));
    if (conn->want.kind == WANT_READY && !conn->bound) return; /* it was, and is dead already */
    if (answer.code != 0 || (answer.size != bytes.size && conn->want.kind != WANT_SOME))
        sim_broken(1, "stream %d: a read of kind %d gave %zu bytes, of %d; expected: code %d, %zu",
                   conn->number, (int)conn->want.kind, bytes.size, (int)model_available(conn),
                   answer.code, answer.size);
    if (bytes.size > answer.size || (conn->want.kind == WANT_SOME && !bytes.size))
        sim_broken(1, "stream %d: %zu of %zu bytes were given", conn->number, bytes.size,
                   answer.size);
    if (!sim_in_equal(&conn->link->dir[!conn->side], conn->in_pos, bytes.data, bytes.size))
        sim_broken(1, "stream %d: the %zu bytes from %llu on are not those sent", conn->number,
                   bytes.size, (unsigned long long)conn->in_pos);
    conn->in_pos += bytes.size;
    if (!bytes.size) return;
    conn->viewed = bytes.size;
    conn->view = (char *)(uintptr_t)bytes.data;
    conn->view_used = 0;
}

/* Whether its stream is dead. After a wait outside coroutines it may be gone, and is not asked. */
static int model_is_dead(const model_conn *conn) {
    return conn->outside || tcpsrv_error(conn->stream) != 0;
}

/* A read that ended with a code could not have been answered with what had come. */
static void model_check_read_code(model_conn *conn, int code) {
    model_answer answer = model_expect(conn, model_input_ended(conn));
    int oracle = code == TCPSRV_ETOOBIG || code == TCPSRV_EREFUSED;
    if (oracle && answer.code != code)
        sim_broken(4, "stream %d: a read ended with %s, expected %d with %zu of %d bytes",
                   conn->number, tcpsrv_strerror(code), answer.code, answer.size,
                   (int)model_available(conn));
    if (oracle) return;
    model_check_code(conn, code, "read");
    if (code == TCPSRV_ETIMEDOUT && !model_is_dead(conn) && !sim.alloc_failed &&
        (!conn->read_due || sim.now < conn->read_due))
        sim_broken(2, "stream %d: a read timed out before its time", conn->number);
    if (code == -ENOMEM) conn->lost = 1;
    if (conn->want.kind == WANT_INTO && sim.alloc_failed && model_is_dead(conn))
        conn->lost = 1; /* a dead stream had no memory to take them back */
    if (code == TCPSRV_ECLOSED || code == TCPSRV_ECANCELED || conn->lost) return;
    if ((code == TCPSRV_ETIMEDOUT || code == TCPSRV_EBUFFULL) && !conn->coroutine)
        return; /* it may have been held back */
    if (answer.code != 1 && conn->want.kind != WANT_READY)
        sim_broken(1, "stream %d: a read ended with %s, but %d bytes are there for it",
                   conn->number, tcpsrv_strerror(code), (int)model_available(conn));
}

static void model_read_end(model_conn *conn, int err, tcpsrv_bytes bytes) {
    if (!conn->bound) model_bind_all();
    if (!conn->reading) sim_broken(2, "stream %d: a read ended twice", conn->number);
    sim_moved();
    SIM_TRACE("stream %d: read of kind %d ends: %d, %zu bytes", conn->number, (int)conn->want.kind,
              err, bytes.size);
    if (!err && conn->closing && !conn->outside)
        sim_broken(2, "stream %d: a closed stream was read", conn->number);
    if (err) model_check_read_code(conn, err);
    else model_check_data(conn, bytes);
    conn->reading = 0;
    conn->cancelled = 0;
}

/* Called by the kernel for each byte that the library takes. */
static void model_received(sim_link *link, int side) {
    model_conn *conn = (model_conn *)link->end[side].owner;
    uint64_t held;
    if (!conn || conn->closing || model.ending) return;
    if (!conn->reading && !model_handshakes(conn))
        sim_broken(4, "stream %d: bytes were received while nobody reads", conn->number);
    held = model_available(conn);
    if (held > conn->max_buffer + conn->want.size + conn->chunk + 262144)
        sim_broken(4, "stream %d: %llu bytes were received ahead", conn->number,
                   (unsigned long long)held);
}

/* ---- writes ---------------------------------------------------------------------------------- */

/* The end of the sending side goes out only behind everything that was written. */
static void model_ended_in_order(sim_link *link, int side) {
    const model_conn *conn = (const model_conn *)link->end[side].owner;
    if (!conn || link->end[side].object->reset) return;
    link->end[side].in_order = conn->stream->error == 0 && model_secure_is_done(conn);
    if (model_queued(conn))
        sim_broken(1, "stream %d ends as if whole, with %llu bytes not sent", conn->number,
                   (unsigned long long)model_queued(conn));
}

static void model_closed(model_conn *conn, int result, size_t unsent) {
    const sim_object *object;
    if (!conn->bound) model_bind_all();
    object = conn->object;
    SIM_TRACE("stream %d: on_close(%d, %zu)", conn->number, result, unsent);
    sim_moved();
    if (conn->close_told) sim_broken(2, "stream %d: on_close was called twice", conn->number);
    /* Outside coroutines a read has ended by now, and returns when the turn is over. */
    if (conn->reading && !conn->outside)
        sim_broken(2, "stream %d: on_close while a read waits", conn->number);
    if (conn->flushes) sim_broken(2, "stream %d: on_close before on_flush", conn->number);
    if (model_is_open(conn)) sim_broken(2, "stream %d: on_close while it is open", conn->number);
    conn->close_told = 1;
    model_check_code(conn, result, "stream");
    if (unsent != model_queued(conn) && !(conn->torn && unsent <= model_queued(conn)))
        sim_broken(1, "stream %d: on_close says %zu bytes were not sent, %llu were not",
                   conn->number, unsent, (unsigned long long)model_queued(conn));
    if (!result && unsent) sim_broken(1, "stream %d: on_close hides a loss", conn->number);
    if (!result && !conn->closing) sim_broken(2, "stream %d ended by itself", conn->number);
    if (!result && !object->told_end && !model_input_ended(conn) && !object->reset &&
        object->shut_wr &&
        object->swallowed < 65536 && sim.now < object->shut_at + SIM_MS(2000) &&
        !object->told[0] && !object->told[1] && !object->told[2])
        sim_broken(1, "stream %d was closed before the peer could read all", conn->number);
}

/* ---- turns, and when everything waits -------------------------------------------------------- */

static int model_held_back(const model_conn *conn) {
    return !conn->coroutine && model_is_open(conn) && model_queued(conn) > conn->high_water;
}

static void model_conn_turn(model_conn *conn) {
    const sim_dir *in = &conn->link->dir[!conn->side];
    int ready = conn->reading && !conn->closing && !model.memory_limit && model_is_open(conn) &&
                !model_held_back(conn) && !conn->object->connecting && in->arrived > in->taken &&
                !model_secure_sends(conn);
    if (!ready || in->taken + in->plain_taken != conn->seen_taken) conn->starved = 0;
    else if (++conn->starved > MODEL_STARVED)
        sim_broken(5, "stream %d was ready for %d turns and not served", conn->number,
                   conn->starved);
    conn->seen_taken = in->taken + in->plain_taken;
}

static void model_turn(void) {
    int i;
    model_bind_all();
    for (i = 0; i < model.count; i++)
        if (model.conns[i].used) model_conn_turn(&model.conns[i]);
    if (sim.progress != sim.progress_seen) sim.idle_waits = 0;
    else if (++sim.idle_waits > SIM_SPIN) sim_broken(5, "%d turns and nothing moved", SIM_SPIN);
    sim.progress_seen = sim.progress;
    if (++model.turns > 200000) sim_broken(5, "the run does not end");
}

/* Nothing can happen now, and time is about to pass: whatever could have been done must be. What is
   due in time may be late by the poller's grain, a millisecond, and by a turn. */
static void model_quiet_read(const model_conn *conn) {
    const sim_dir *in = &conn->link->dir[!conn->side];
    int full = model.full && model_of_server(conn);
    if (!conn->reading || model_held_back(conn)) return;
    if (conn->closing) sim_broken(2, "stream %d: a read outlives its stream", conn->number);
    if (conn->cancelled) sim_broken(2, "stream %d: a cancelled read waits", conn->number);
    if (conn->read_due && conn->read_due + sim_late() < sim.now)
        sim_broken(2, "stream %d: a read outlives its deadline", conn->number);
    if (!model_is_open(conn)) sim_broken(2, "stream %d: a read of a dead stream waits",
                                         conn->number);
    if (!conn->object->connecting && !full && (in->arrived > in->taken || in->fin_arrived) &&
        !(model_handshakes(conn) && model_secure_sends(conn)))
        sim_broken(2, "stream %d: a read waits, and input waits in the kernel", conn->number);
    if (!conn->lost && model_expect(conn, 0).code != 1)
        sim_broken(2, "stream %d: a read of kind %d waits, and its %d bytes are there",
                   conn->number, (int)conn->want.kind, (int)model_available(conn));
}

static void model_quiet_write(const model_conn *conn) {
    if (!model_is_open(conn)) {
        if (conn->writing) sim_broken(2, "stream %d: a write of a dead stream waits", conn->number);
        if (conn->flushes) sim_broken(2, "stream %d: a flush of a dead stream waits",
                                      conn->number);
        return;
    }
    if (conn->object->connecting || model_handshakes(conn)) return;
    if (model_queued(conn) && sim_has_room(conn->object) && !conn->torn)
        sim_broken(2, "stream %d: output waits, and the kernel has room", conn->number);
    if (!model_queued(conn) && conn->flushes)
        sim_broken(2, "stream %d: all is out, and on_flush waits", conn->number);
    if (!model_queued(conn) && (conn->shut || conn->closing) && !conn->object->shut_wr &&
        conn->object->kind == SIM_SOCKET && !conn->object->reset &&
        (!conn->secure || sim_has_room(conn->object)))
        sim_broken(2, "stream %d: all is out, and its end is not sent", conn->number);
}

static void model_quiet_close(const model_conn *conn) {
    if (!conn->bound && conn->connect_ms && model_is_open(conn) &&
        sim.now > conn->begun_at + SIM_MS(conn->connect_ms) + sim_late())
        sim_broken(2, "stream %d connects beyond its deadline", conn->number);
    if (conn->closing && model_is_open(conn) &&
        sim.now > conn->closing_at + SIM_MS(conn->close_ms) + sim_late())
        sim_broken(2, "stream %d is not closed in its time", conn->number);
    if (conn->closing && !model_is_open(conn) && conn->close_set && !conn->close_told)
        sim_broken(2, "stream %d: on_close was not called", conn->number);
}

/* A stream holds at most four times what is unread or viewed, and 512 bytes; its home, which it has
   anyway as a part of its coroutine's page, is not counted. */
static void model_quiet_memory(const model_conn *conn) {
    const tcpsrv__block *in = model_is_open(conn) && !conn->closing ? conn->stream->in : NULL;
    size_t kept = (size_t)model_available(conn) + conn->viewed;
    if (!in || in->pool == TCPSRV__POOL_HOME || sim.alloc_failed) return;
    if (conn->want.kind == WANT_INTO) kept += conn->want.size;
    if (in->capacity > 4 * kept + 512)
        sim_broken(4, "stream %d holds %zu bytes for %zu", conn->number, in->capacity, kept);
}

static void world_quiet(void);
static int world_is_full(void);

static void model_quiet(void) {
    int i;
    model.full = world_is_full();
    for (i = 0; i < model.count; i++) {
        const model_conn *conn = &model.conns[i];
        if (!conn->used) continue;
        model_quiet_read(conn);
        model_quiet_write(conn);
        model_quiet_close(conn);
        model_quiet_memory(conn);
        model_quiet_secure(conn);
    }
    world_quiet();
}

/* ---- the end of a run ------------------------------------------------------------------------ */

static void model_check_end(void) {
    int i;
    for (i = 0; i < model.count; i++) {
        const model_conn *conn = &model.conns[i];
        if (conn->reading) sim_broken(2, "stream %d: a read never ended", conn->number);
        if (conn->writing) sim_broken(2, "stream %d: a write never ended", conn->number);
        if (conn->flushes) sim_broken(2, "stream %d: on_flush was not called", conn->number);
        if (conn->close_set && !conn->close_told)
            sim_broken(2, "stream %d: on_close was never called", conn->number);
    }
    if (model.coroutines) sim_broken(10, "%d coroutines never ended", model.coroutines);
    if (sim.open_fds) sim_broken(10, "%d descriptors were left open", sim.open_fds);
    if (sim.live_blocks) sim_broken(10, "%zu blocks of %zu bytes were not freed", sim.live_blocks,
                                    sim.live_bytes);
    if (sim.maps) sim_broken(10, "%zu mappings of stacks were left", sim.maps);
    if (sim.sigpipe_blocked) sim_broken(8, "SIGPIPE was left blocked");
}

#endif
