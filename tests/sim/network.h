/* The simulated network, and the calls on sockets, pipes and files. A connection has two
   directions, each a few counters: its bytes are a fixed table seen from a place that the direction
   has to itself, so that every byte is known by its position and none is stored. What is sent lies
   in the sender's buffer until it arrives in the receiver's; the end of it (FIN) arrives behind the
   last byte, a reset overtakes all. One end of a connection may be a peer that the world plays.
   From some place on a direction may be encrypted: from there on its bytes are stored, and what
   was written and read is counted beside them. */
#ifndef SIM_NETWORK_H
#define SIM_NETWORK_H

#include "kernel.h"

enum { SIM_TABLE = 65521 };     /* a prime: no buffer's size is a multiple of it */

static unsigned char sim_table[2 * SIM_TABLE];

typedef struct sim_record {     /* one record of a peer's: where it and its plaintext end */
    uint64_t wire, plain;
} sim_record;

typedef struct sim_wire {
    unsigned char *bytes;
    size_t size, room;
    sim_record *records;
    size_t count, records_room;
} sim_wire;

struct sim_dir {
    size_t place;               /* in the table */
    uint64_t sent, arrived, taken;
    uint64_t window, room;      /* of the receiver's buffer, of the sender's */
    uint64_t next;              /* when more of it arrives */
    unsigned char fin, fin_arrived, head_size;
    unsigned char head[120];    /* bytes before those of the table */
    uint64_t clear;             /* what the writer sends from here on is encrypted */
    uint64_t secure_from;       /* what the reader takes from here on it decrypts */
    uint64_t plain_sealed, plain_sent, plain_taken; /* then: written, out as a whole, and read */
    uint64_t notify_end;        /* behind the writer's close_notify; SIM_NEVER: it sent none */
    uint64_t alert_end;         /* behind its fatal alert by the keys; SIM_NEVER: it sent none */
    unsigned char notifies;     /* close_notify is on its way */
    sim_wire wire;              /* what is sent from clear on */
};

typedef struct sim_end {
    sim_object *object;         /* the program's */
    sim_peer *peer;             /* or the world's */
    void *owner;                /* the model's connection */
    unsigned char closed;
    unsigned char in_order;     /* its end has come behind all that it has to say */
    uint64_t reset_at;          /* when a reset arrives here */
} sim_end;

struct sim_link {
    int used, family, port;
    unsigned char is_unix, is_pipe;
    sim_dir dir[2];             /* the one sent by end 0, by end 1 */
    sim_end end[2];             /* 0 began the connection */
    uint64_t latency, connect_at;   /* when the connecting end learns how it went */
    int connect_error;
    uint64_t accepted_at;
    int mutual;                 /* TLS with certificates of both sides */
    uint64_t upgrade_at;        /* where TLS is to begin in what a peer sends; 0: it is not */
};

static sim_link sim_links[SIM_LINKS];
static int sim_link_count;      /* of this run */
static size_t sim_least_room;   /* of their buffers: what is sent in a run must get through */

/* What the workload decides (peers.h), and what the model wants to know (model.h). */
static void peer_run(void);
static uint64_t peer_next(void);
static void peer_reset(sim_peer *peer);
static int peer_accepts(sim_link *link);
static void model_ended_in_order(sim_link *link, int side);
static void model_received(sim_link *link, int side);
static void model_bind(sim_link *link, int side); /* before the first byte of an end */

/* ---- bytes ----------------------------------------------------------------------------------- */

static void sim_table_make(void) {
    static const char *const ends[] = { "\n", "\r\n", "\r\n\r\n", "END" };
    size_t i, n, length;
    uint64_t x = 1;
    for (i = 0; i < SIM_TABLE;) {
        x = sim_mix(x);
        length = x % 8 == 0 ? x / 8 % 3000 : x / 8 % 60;
        for (n = 0; n < length && i < SIM_TABLE; n++) {
            x = sim_mix(x);
            sim_table[i++] = (unsigned char)(x % 7 ? 'a' + x % 26 : x % 256);
        }
        for (n = 0; ends[x % 4][n] && i < SIM_TABLE; n++)
            sim_table[i++] = (unsigned char)ends[x % 4][n];
    }
    memcpy(sim_table + SIM_TABLE, sim_table, SIM_TABLE);
}

static void sim_dir_copy(const sim_dir *dir, uint64_t from, void *memory, size_t size) {
    char *to = (char *)memory;
    for (; size && from < dir->head_size; size--) *to++ = (char)dir->head[from++];
    while (size) {
        size_t n = size < SIM_TABLE ? size : SIM_TABLE;
        memcpy(to, sim_table + (dir->place + from - dir->head_size) % SIM_TABLE, n);
        to += n;
        from += n;
        size -= n;
    }
}

static int sim_dir_equal(const sim_dir *dir, uint64_t from, const void *memory, size_t size) {
    const char *is = (const char *)memory;
    for (; size && from < dir->head_size; size--)
        if (*is++ != (char)dir->head[from++]) return 0;
    while (size) {
        size_t n = size < SIM_TABLE ? size : SIM_TABLE;
        if (memcmp(is, sim_table + (dir->place + from - dir->head_size) % SIM_TABLE, n) != 0)
            return 0;
        is += n;
        from += n;
        size -= n;
    }
    return 1;
}

/* Bytes as they go over the wire. */
static void sim_wire_copy(const sim_dir *dir, uint64_t from, void *memory, size_t size) {
    size_t clear = from < dir->clear ? size : 0;
    if (clear && dir->clear - from < size) clear = (size_t)(dir->clear - from);
    sim_dir_copy(dir, from, memory, clear);
    if (clear == size) return;
    memcpy((char *)memory + clear, dir->wire.bytes + (from + clear - dir->clear), size - clear);
}

static void sim_wire_add(sim_dir *dir, const void *memory, size_t size) {
    sim_wire *wire = &dir->wire;
    if (!size) return;
    while (wire->room - wire->size < size) wire->room = 2 * wire->room + 1024;
    wire->bytes = (unsigned char *)realloc(wire->bytes, wire->room);
    if (!wire->bytes) sim_broken(0, "no memory for what is sent");
    memcpy(wire->bytes + wire->size, memory, size);
    wire->size += size;
}

/* How far the program that sends, or reads, has come with its own bytes. */
static uint64_t sim_sent(const sim_dir *dir) {
    return dir->sent < dir->clear ? dir->sent : dir->plain_sent;
}

static uint64_t sim_taken(const sim_dir *dir) {
    return dir->taken < dir->secure_from ? dir->taken : dir->plain_taken;
}

/* What the reader gets: as it went over the wire, or decrypted. */
static void sim_in_copy(const sim_dir *dir, uint64_t from, void *memory, size_t size) {
    size_t clear = from < dir->secure_from ? size : 0;
    if (clear && dir->secure_from - from < size) clear = (size_t)(dir->secure_from - from);
    sim_wire_copy(dir, from, memory, clear);
    sim_dir_copy(dir, from + clear, (char *)memory + clear, size - clear);
}

static int sim_in_equal(const sim_dir *dir, uint64_t from, const void *memory, size_t size) {
    char is[512];
    const char *at = (const char *)memory;
    if (from + size <= dir->clear || from >= dir->secure_from)
        return sim_dir_equal(dir, from, memory, size);
    while (size) {
        size_t n = size < sizeof is ? size : sizeof is;
        sim_in_copy(dir, from, is, n);
        if (memcmp(is, at, n) != 0) return 0;
        at += n;
        from += n;
        size -= n;
    }
    return 1;
}

/* ---- readiness ------------------------------------------------------------------------------- */

/* pollers.h: something has come about on the object, for those who wait for one of the bits. */
static void sim_wake(sim_object *object, int bits);

static sim_dir *sim_incoming(const sim_object *object) {
    return &object->link->dir[!object->side];
}

static sim_dir *sim_outgoing(const sim_object *object) {
    return &object->link->dir[object->side];
}

static uint64_t sim_free_room(const sim_dir *dir) {
    uint64_t used = dir->sent - dir->arrived;
    return used < dir->room ? dir->room - used : 0;
}

/* A socket counts as writable when a third of its buffer is free (sk_stream_is_writeable in Linux;
   on the BSDs SO_SNDLOWAT), although less may be written before that. */
static int sim_has_room(const sim_object *object) {
    const sim_dir *out = sim_outgoing(object);
    return sim_free_room(out) >= (out->room + 2) / 3;
}

static int sim_socket_state(const sim_object *object) {
    int state = object->error ? SIM_ERR : 0;
    if (object->reset) return state | SIM_IN | SIM_OUT | SIM_RDHUP | SIM_HUP;
    if (object->connecting) return state;
    if (!object->link) return state | SIM_OUT | SIM_HUP;
    if (sim_incoming(object)->arrived > sim_incoming(object)->taken) state |= SIM_IN;
    if (sim_incoming(object)->fin_arrived) {
        state |= SIM_IN | SIM_RDHUP;
        if (object->shut_wr) state |= SIM_HUP;
    }
    if (object->shut_wr || sim_has_room(object)) state |= SIM_OUT;
    return state;
}

/* Of a pipe the program holds one end; its reader sees a closed writer as a hang-up without
   RDHUP, its writer a closed reader as an error (pipe(7), poll(2)). */
static int sim_pipe_state(const sim_object *object) {
    int state = 0;
    if (object->side == 1) {
        if (sim_incoming(object)->arrived > sim_incoming(object)->taken) state |= SIM_IN;
        if (sim_incoming(object)->fin_arrived) state |= SIM_HUP;
    } else {
        if (object->link->end[1].closed) state |= SIM_ERR;
        if (object->link->end[1].closed || sim_has_room(object)) state |= SIM_OUT;
    }
    return state;
}

static int sim_state_of(const sim_object *object) {
    switch (object->kind) {
    case SIM_SOCKET: return sim_socket_state(object);
    case SIM_PIPE: return sim_pipe_state(object);
    case SIM_LISTENER: return object->waiting ? SIM_IN : 0;
    case SIM_COUNTER: return object->counter ? SIM_IN | SIM_OUT : SIM_OUT;
    default: return SIM_IN | SIM_OUT;
    }
}

/* ---- arrival --------------------------------------------------------------------------------- */

static void dir_plan(sim_link *link, sim_dir *dir) {
    uint64_t due;
    int pending = dir->sent > dir->arrived ? dir->arrived - dir->taken < dir->window
                                           : dir->fin && !dir->fin_arrived;
    if (!pending || dir->next != SIM_NEVER || link->connect_at != SIM_NEVER) return;
    due = sim.now;
    if (link->latency) due += sim_below((size_t)link->latency);
    dir->next = due;
}

static void link_reset(sim_link *link, int side);

/* Some or all of what is on its way arrives, as far as there is room for it. */
static void dir_arrive(sim_link *link, int from) {
    sim_dir *dir = &link->dir[from];
    sim_end *to = &link->end[!from];
    uint64_t n = dir->sent - dir->arrived, space = dir->window - (dir->arrived - dir->taken);
    dir->next = SIM_NEVER;
    if (n > space) n = space;
    if (n > 1 && sim_chance(3)) n = 1 + sim_below((size_t)n);
    if (to->closed && (n || dir->fin) && !link->is_pipe) {
        if (n) link_reset(link, from); /* nobody is there any more */
        else dir->fin_arrived = 1;
        return;
    }
    dir->arrived += n;
    if (n) sim_moved();
    if (dir->arrived == dir->sent && dir->fin && !dir->fin_arrived) {
        dir->fin_arrived = 1;
        sim_moved();
    }
    SIM_TRACE("net: connection %d, %d bytes reach end %d%s", (int)(link - sim_links), (int)n,
              !from, dir->fin_arrived ? ", and the end" : "");
    if (to->object && !to->closed)
        sim_wake(to->object, dir->fin_arrived ? SIM_IN | SIM_RDHUP | SIM_HUP | SIM_OUT : SIM_IN);
    if (n && link->end[from].object && (sim.bsd || link->end[from].object->nospace) &&
        sim_has_room(link->end[from].object)) {
        link->end[from].object->nospace = 0;
        sim_wake(link->end[from].object, SIM_OUT);
    }
    dir_plan(link, dir);
}

/* A reset is sent to that end: what is still on its way there is lost. */
static void link_reset(sim_link *link, int side) {
    sim_dir *dir = &link->dir[!side];
    dir->next = SIM_NEVER;
    if (link->end[side].reset_at != SIM_NEVER || link->end[side].closed) return;
    link->end[side].reset_at = sim.now + (link->latency ? sim_below((size_t)link->latency) : 0);
}

/* What had arrived before stays readable. */
static void reset_arrive(sim_link *link, int side) {
    sim_end *end = &link->end[side];
    end->reset_at = SIM_NEVER;
    if (end->closed) return;
    sim_moved();
    SIM_TRACE("net: connection %d, a reset reaches end %d", (int)(link - sim_links), side);
    link->dir[0].next = link->dir[1].next = SIM_NEVER;
    if (end->peer) peer_reset(end->peer);
    if (!end->object || end->object->reset) return;
    end->object->reset = 1;
    end->object->error = end->object->connecting ? ECONNREFUSED : ECONNRESET;
    end->object->connecting = 0;
    sim_wake(end->object, SIM_IN | SIM_OUT | SIM_RDHUP | SIM_HUP | SIM_ERR);
}

static void connect_end(sim_link *link) {
    sim_object *object = link->end[0].object;
    link->connect_at = SIM_NEVER;
    if (!object || !object->connecting) return;
    sim_moved();
    object->connecting = 0;
    SIM_TRACE("net: connection %d: %s", (int)(link - sim_links),
              link->connect_error ? strerror(link->connect_error) : "connected");
    if (link->connect_error) {
        object->error = link->connect_error;
        object->reset = 1;
        sim_wake(object, SIM_IN | SIM_OUT | SIM_RDHUP | SIM_HUP | SIM_ERR);
    } else {
        dir_plan(link, &link->dir[0]);
        dir_plan(link, &link->dir[1]);
        sim_wake(object, SIM_OUT);
    }
}

static void link_run(sim_link *link) {
    int i;
    if (link->connect_at <= sim.now) connect_end(link);
    for (i = 0; i < 2; i++) {
        if (link->end[i].reset_at <= sim.now) reset_arrive(link, i);
        if (link->dir[i].next <= sim.now) dir_arrive(link, i);
    }
    if (link->end[0].closed && link->end[1].closed) link->used = 0;
}

/* All that is due happens. */
static void net_run(void) {
    int i;
    for (i = 0; i < sim_link_count; i++)
        if (sim_links[i].used) link_run(&sim_links[i]);
    peer_run();
}

static uint64_t sim_earlier(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

static uint64_t net_next(void) {
    uint64_t due = peer_next();
    int i;
    for (i = 0; i < sim_link_count; i++) {
        const sim_link *link = &sim_links[i];
        if (!link->used) continue;
        due = sim_earlier(due, link->connect_at);
        due = sim_earlier(due, sim_earlier(link->dir[0].next, link->dir[1].next));
        due = sim_earlier(due, sim_earlier(link->end[0].reset_at, link->end[1].reset_at));
    }
    return due;
}

/* ---- making and ending connections ----------------------------------------------------------- */

static uint64_t link_room(void) {
    return sim_least_room + 1 + (sim_chance(sim.tight ? 2 : 4) ? sim_below(64) : sim_size(1 << 18));
}

/* Of the last run. */
SIM_PRIVATE void sim_wires_forget(void) {
    int i;
    for (i = 0; i < 2 * sim_link_count; i++) {
        sim_wire *wire = &sim_links[i / 2].dir[i % 2].wire;
        free(wire->bytes);
        free(wire->records);
        memset(wire, 0, sizeof *wire);
    }
}

static sim_link *link_new(void) {
    sim_link *link;
    int i;
    if (sim_link_count == SIM_LINKS) sim_broken(0, "too many connections");
    link = &sim_links[sim_link_count++];
    memset(link, 0, sizeof *link);
    link->used = 1;
    link->family = AF_INET;
    link->latency = sim_chance(3) ? 0 : SIM_MS(1) / 4 * (1 + sim_below(16));
    link->connect_at = SIM_NEVER;
    for (i = 0; i < 2; i++) {
        link->dir[i].place = sim_below(SIM_TABLE);
        link->dir[i].next = link->end[i].reset_at = SIM_NEVER;
        link->dir[i].clear = link->dir[i].secure_from = link->dir[i].notify_end = SIM_NEVER;
        link->dir[i].alert_end = SIM_NEVER;
        link->dir[i].window = link_room();
        link->dir[i].room = link_room();
    }
    return link;
}

static sim_object *listener_at(int port, int family) {
    int fd;
    for (fd = SIM_FIRST_FD; fd < sim.fd_top; fd++) {
        sim_object *object = sim.fds[fd];
        if (object && object->kind == SIM_LISTENER && object->port == port &&
            object->family == family)
            return object;
    }
    return NULL;
}

/* A connection waits to be accepted. 0, or ECONNREFUSED, or EAGAIN when the backlog is full. */
static int listener_push(sim_object *listener, sim_link *link) {
    if (!listener) return ECONNREFUSED;
    if (listener->waiting >= SIM_QUEUE || listener->waiting > listener->backlog) return EAGAIN;
    listener->queue[listener->waiting++] = link;
    sim_moved();
    sim_wake(listener, SIM_IN);
    return 0;
}

static sim_link *listener_pop(sim_object *listener) {
    sim_link *link = listener->queue[0];
    listener->waiting--;
    memmove(listener->queue, listener->queue + 1,
            (size_t)listener->waiting * sizeof listener->queue[0]);
    return link;
}

/* The sending side ends behind what was sent. */
static void end_shut(sim_link *link, int side) {
    if (link->dir[side].fin) return;
    link->dir[side].fin = 1;
    dir_plan(link, &link->dir[side]);
}

/* An end goes. With unread input, or when asked for, the other side gets a reset (RFC 1122
   4.2.2.13); what the other side has not received by then is lost with it. */
static void end_close(sim_link *link, int side, int reset) {
    sim_end *end = &link->end[side], *other = &link->end[!side];
    const sim_dir *in = &link->dir[!side];
    if (end->closed) return;
    end->closed = 1;
    end->object = NULL;
    sim_moved();
    if (link->is_pipe) {
        if (side == 1 && other->object) sim_wake(other->object, SIM_OUT | SIM_ERR);
        if (side == 0) end_shut(link, 0);
    } else if (reset || in->arrived > in->taken) {
        link_reset(link, !side);
    } else {
        end_shut(link, side);
    }
}

/* ---- socket calls ---------------------------------------------------------------------------- */

SIM_PRIVATE int sim_socket(int family, int type, int protocol) {
    sim_object *object;
    int fd, error = sim_enter(CALL_SOCKET);
    (void)protocol;
    if (error) return sim_fail(error);
    fd = sim_open(SIM_SOCKET, &object);
    if (fd < 0) return fd;
    object->family = (unsigned char)family;
    object->nonblock = (type & SOCK_NONBLOCK) != 0;
    SIM_TRACE("socket() = %d", fd);
    return fd;
}

static int sim_port_of(const struct sockaddr *name) {
    if (name->sa_family == AF_INET)
        return ntohs(((const struct sockaddr_in *)(const void *)name)->sin_port);
    if (name->sa_family == AF_INET6)
        return ntohs(((const struct sockaddr_in6 *)(const void *)name)->sin6_port);
    return 70000; /* the one Unix socket that there is */
}

SIM_PRIVATE int sim_bind(int fd, const struct sockaddr *name) {
    sim_object *object = sim_object_at(fd, CALL_BIND);
    int error = sim_enter(CALL_BIND);
    if (error) return sim_fail(error);
    object->port = sim_port_of(name);
    if (object->family == AF_UNIX) {
        if (sim.path_exists) return sim_fail(EADDRINUSE);
        sim.path_exists = 1;
        sim.path_inode++;
        object->bound = 1;
        return 0;
    }
    if (!object->port) object->port = 40000 + fd;
    if (listener_at(object->port, object->family)) return sim_fail(EADDRINUSE);
    object->bound = 1;
    return 0;
}

SIM_PRIVATE int sim_listen(int fd, int backlog) {
    sim_object *object = sim_object_at(fd, CALL_LISTEN);
    int error = sim_enter(CALL_LISTEN);
    if (!error && object->family != AF_UNIX && listener_at(object->port, object->family))
        error = EADDRINUSE;
    if (error) return sim_fail(error);
    object->kind = SIM_LISTENER;
    object->backlog = backlog;
    SIM_TRACE("listen(%d), port %d", fd, object->port);
    return 0;
}

static void sim_name_make(struct sockaddr *name, socklen_t *size, int family, int port, int host) {
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    const void *made = &in;
    socklen_t full = sizeof in;
    memset(&in, 0, sizeof in);
    memset(&in6, 0, sizeof in6);
    in.sin_family = AF_INET;
    in.sin_port = htons((uint16_t)port);
    in.sin_addr.s_addr = htonl(0x7f000001u + (uint32_t)host);
    in6.sin6_family = AF_INET6;
    in6.sin6_port = htons((uint16_t)port);
    in6.sin6_addr.s6_addr[15] = (unsigned char)(1 + host);
    if (family == AF_INET6) made = &in6;
    if (family == AF_INET6) full = sizeof in6;
    if (family == AF_UNIX) full = sizeof(sa_family_t);
    memcpy(name, made, *size < full ? *size : full);
    if (family == AF_UNIX) name->sa_family = AF_UNIX;
    *size = full;
}

/* Errors of one connection take it from the queue with them. */
static int accept_fault(sim_object *listener, int error) {
    int of_connection = error != EINTR && error != EAGAIN && error != EMFILE && error != ENFILE &&
                        error != ENOBUFS && error != ENOMEM;
    sim.accept_trouble_at = sim.now;
    if (of_connection && listener->waiting) end_close(listener_pop(listener), 1, 1);
    return sim_fail(error);
}

SIM_PRIVATE int sim_accept(int fd, struct sockaddr *name, socklen_t *size, int flags) {
    sim_object *listener = sim_object_at(fd, CALL_ACCEPT), *object;
    int error = sim_enter(CALL_ACCEPT), accepted;
    sim_link *link;
    if (listener->kind != SIM_LISTENER) sim_broken(0, "accept on %d, which does not listen", fd);
    if (error) return accept_fault(listener, error);
    if (!listener->waiting) return sim_fail(EAGAIN);
    sim.accept_trouble_at = sim.now;
    if (sim.open_fds + SIM_FIRST_FD >= sim.fd_limit) return sim_fail(EMFILE);
    link = listener_pop(listener);
    accepted = sim_open(SIM_SOCKET, &object);
    object->family = listener->family;
    object->port = listener->port;
    object->nonblock = (flags & SOCK_NONBLOCK) != 0;
    object->link = link;
    object->side = 1;
    link->end[1].object = object;
    link->accepted_at = sim.now;
    if (link->end[1].reset_at <= sim.now) reset_arrive(link, 1);
    if (name) sim_name_make(name, size, object->family, 50000 + (int)(link - sim_links),
                            (int)(link - sim_links) % 3);
    sim_moved();
    SIM_TRACE("accept(%d) = %d, connection %d", fd, accepted, (int)(link - sim_links));
    return accepted;
}

/* Where nobody of the program listens, a peer of the world may. */
static int connect_to(sim_object *object, sim_link *link, int port) {
    sim_object *listener = listener_at(port, object->family);
    object->link = link;
    object->side = 0;
    object->connecting = 1;
    link->end[0].object = object;
    link->family = object->family;
    link->port = port;
    link->is_unix = object->family == AF_UNIX;
    link->connect_error = listener ? listener_push(listener, link) : peer_accepts(link);
    if (link->connect_error == EAGAIN) link->connect_error = ETIMEDOUT;
    link->connect_at = sim.now + (link->connect_error == ETIMEDOUT ? SIM_MS(3000) : link->latency);
    return sim_fail(EINPROGRESS);
}

SIM_PRIVATE int sim_connect(int fd, const struct sockaddr *name) {
    sim_object *object = sim_object_at(fd, CALL_CONNECT);
    int error = sim_enter(CALL_CONNECT), result;
    if (error && error != EINTR) return sim_tell(object, error);
    if (object->link) return sim_fail(EALREADY);
    if (object->family == AF_UNIX && !sim.path_exists) return sim_tell(object, ENOENT);
    if (object->family == AF_UNIX && !listener_at(70000, AF_UNIX))
        return sim_tell(object, ECONNREFUSED);
    result = connect_to(object, link_new(), sim_port_of(name));
    if (error == EINTR) errno = EINTR; /* it goes on all the same (connect(2)) */
    SIM_TRACE("connect(%d), connection %d", fd, (int)(object->link - sim_links));
    if (object->link->latency || object->link->connect_error || sim_chance(2)) return result;
    connect_end(object->link);
    return 0;
}

/* ---- reading --------------------------------------------------------------------------------- */

static size_t sim_pieces_size(const struct iovec *pieces, int count) {
    size_t size = 0;
    int i;
    for (i = 0; i < count; i++) size += pieces[i].iov_len;
    return size;
}

/* A kernel that says EAGAIN will say "ready" later: so does an injected one. */
static int sim_fault_io(sim_object *object, int error, int direction) {
    if (error == ECONNRESET || error == EPIPE || error == ETIMEDOUT) {
        if (object->link && !object->link->is_pipe) {
            object->reset = 1;
            object->error = 0;
            link_reset(object->link, !object->side);
        }
    }
    if (error == EAGAIN) sim_wake(object, direction);
    if (error == EAGAIN || error == EINTR) return sim_fail(error);
    sim_wake(object, SIM_IN | SIM_OUT | SIM_HUP | SIM_ERR);
    return sim_tell(object, error);
}

static void sim_take(sim_object *object, const struct iovec *pieces, size_t size) {
    sim_dir *in = sim_incoming(object);
    size_t left = size;
    for (; left; pieces++) {
        size_t n = pieces->iov_len < left ? pieces->iov_len : left;
        sim_wire_copy(in, in->taken, pieces->iov_base, n);
        in->taken += n;
        left -= n;
    }
    if (object->shut_wr) object->swallowed += size;
    if (!object->link->end[object->side].owner) model_bind(object->link, object->side);
    model_received(object->link, object->side);
    dir_plan(object->link, in);
    sim_moved();
}

static ssize_t sim_read_link(sim_object *object, const struct iovec *pieces, size_t asked) {
    sim_dir *in = sim_incoming(object);
    size_t n = (size_t)(in->arrived - in->taken);
    int error = object->error;
    if (object->connecting) return sim_fail(EAGAIN);
    if (n > asked) n = asked;
    /* Unix sockets and pipes may give less than there is (between the pieces of two senders). */
    if (n > 1 && (object->link->is_unix || object->link->is_pipe) && sim_chance(4))
        n = 1 + sim_below(n);
    if (n) {
        sim_take(object, pieces, n);
        return (ssize_t)n;
    }
    if (error) {
        object->error = 0;
        return sim_tell(object, error);
    }
    if (in->fin_arrived || object->reset) {
        object->told_end = 1;
        return 0;
    }
    return sim_fail(EAGAIN);
}

SIM_PRIVATE ssize_t sim_readv(int fd, const struct iovec *pieces, int count) {
    sim_object *object = sim_object_at(fd, CALL_READ);
    size_t asked = sim_pieces_size(pieces, count);
    int error = sim_enter(CALL_READ);
    ssize_t n;
    if (object->kind == SIM_PIPE && object->side == 0) return sim_tell(object, EBADF);
    if (error == EAGAIN && object->link && (sim_incoming(object)->fin_arrived || object->reset))
        error = 0; /* never said of a socket that has ended */
    if (error) {
        n = sim_fault_io(object, error, SIM_IN);
    } else if (object->kind == SIM_COUNTER) {
        if (!object->counter) return sim_fail(EAGAIN);
        object->counter = 0;
        sim_moved();
        return 8;
    } else {
        if (!object->link) return sim_tell(object, ENOTCONN);
        n = sim_read_link(object, pieces, asked);
    }
    SIM_TRACE("read(%d, %zu) = %zd%s%s", fd, asked, n, n < 0 ? " " : "",
              n < 0 ? strerror(errno) : "");
    return n;
}

SIM_PRIVATE ssize_t sim_read(int fd, void *memory, size_t size) {
    struct iovec piece;
    piece.iov_base = memory;
    piece.iov_len = size;
    return sim_readv(fd, &piece, 1);
}

SIM_PRIVATE ssize_t sim_recv(int fd, void *memory, size_t size) {
    if (sim_object_at(fd, CALL_READ)->kind != SIM_SOCKET) return sim_fail(ENOTSOCK);
    return sim_read(fd, memory, size);
}

/* ---- writing --------------------------------------------------------------------------------- */

/* SIGPIPE never reaches the program: raised where it is not blocked, it would end it. */
static int sim_broken_pipe(sim_object *object, int flags) {
    if (!(flags & MSG_NOSIGNAL)) {
        if (!sim.sigpipe_blocked) sim_broken(8, "SIGPIPE was raised");
        sim.sigpipe_pending = 1;
    }
    return sim_tell(object, EPIPE);
}

/* Each byte must be the one that the stream's writer wrote at this place; encrypted ones are
   looked at where they are decrypted. */
static void sim_put(sim_object *object, const struct iovec *pieces, size_t size) {
    sim_dir *out = sim_outgoing(object);
    if (!object->link->end[object->side].owner) model_bind(object->link, object->side);
    for (; size; pieces++) {
        size_t n = pieces->iov_len < size ? pieces->iov_len : size, clear = n;
        if (out->sent + n > out->clear)
            clear = out->sent < out->clear ? (size_t)(out->clear - out->sent) : 0;
        sim_wire_add(out, (const char *)pieces->iov_base + clear, n - clear);
        if (!sim_dir_equal(out, out->sent, pieces->iov_base, clear))
            sim_broken(1, "connection %d: the %zu bytes from %llu on are not those written",
                       (int)(object->link - sim_links), n, (unsigned long long)out->sent);
        out->sent += n;
        size -= n;
    }
    dir_plan(object->link, out);
    sim_moved();
}

/* How many bytes a write may take: all that has room, seldom less (memory pressure), and then
   writability will be told. */
static size_t sim_write_room(sim_object *object, size_t asked) {
    uint64_t room = sim_free_room(sim_outgoing(object));
    size_t n = room < asked ? (size_t)room : asked;
    if (n < asked) object->nospace = 1;
    if (n > 1 && sim_chance(32)) {
        n = 1 + sim_below(n);
        if (n < asked) sim_wake(object, SIM_OUT);
    }
    return n;
}

static ssize_t sim_write_link(sim_object *object, const struct iovec *pieces, size_t asked,
                              int flags) {
    int error = object->error;
    size_t n;
    if (!object->link) return sim_broken_pipe(object, flags);
    if (object->connecting) return sim_fail(EAGAIN);
    if (error) {
        object->error = 0;
        return sim_tell(object, error);
    }
    if (object->reset || object->shut_wr ||
        (object->link->is_pipe && object->link->end[1].closed))
        return sim_broken_pipe(object, flags);
    n = sim_write_room(object, asked);
    if (!n && asked) return sim_fail(EAGAIN);
    if (n && pieces) sim_put(object, pieces, n);
    return (ssize_t)n;
}

SIM_PRIVATE ssize_t sim_sendv(int fd, const struct iovec *pieces, int count, int flags,
                              sim_call call) {
    sim_object *object = sim_object_at(fd, call);
    size_t asked = sim_pieces_size(pieces, count);
    int error = sim_enter(call);
    ssize_t n;
    if (object->kind == SIM_FILE || (object->kind == SIM_PIPE && object->side == 1))
        return sim_tell(object, EBADF);
    if (error == EAGAIN && object->reset) error = 0;
    if (error == EPIPE) {
        sim_fault_io(object, error, SIM_OUT);
        n = sim_broken_pipe(object, flags);
    } else if (error) {
        n = sim_fault_io(object, error, SIM_OUT);
    } else {
        n = sim_write_link(object, pieces, asked, flags);
    }
    SIM_TRACE("%s(%d, %zu) = %zd%s%s", sim_calls[call].name, fd, asked, n, n < 0 ? " " : "",
              n < 0 ? strerror(errno) : "");
    return n;
}

SIM_PRIVATE ssize_t sim_send(int fd, const void *data, size_t size, int flags) {
    struct iovec piece;
    piece.iov_base = (void *)(uintptr_t)data;
    piece.iov_len = size;
    return sim_sendv(fd, &piece, 1, flags, CALL_SEND);
}

/* To a counter or the waker's pipe. */
SIM_PRIVATE ssize_t sim_write(int fd, const void *data, size_t size) {
    sim_object *object = sim_object_at(fd, CALL_WAKE);
    int error = sim_enter(CALL_WAKE);
    (void)data;
    if (error == EAGAIN) error = 0; /* only a full counter says so, and that wakes as well */
    if (error) return sim_fail(error);
    object->counter++;
    sim_wake(object, SIM_IN);
    return (ssize_t)size;
}

/* ---- files ----------------------------------------------------------------------------------- */

SIM_PRIVATE ssize_t sim_pread(int fd, void *memory, size_t size, off_t offset) {
    sim_object *object = sim_object_at(fd, CALL_PREAD);
    int error = sim_enter(CALL_PREAD);
    uint64_t left = (uint64_t)offset < object->size ? object->size - (uint64_t)offset : 0;
    if (error) return sim_tell(object, error);
    if (left < size) size = (size_t)left;
    sim_dir_copy(object->file_dir, object->file_base + (uint64_t)offset, memory, size);
    return (ssize_t)size;
}

SIM_PRIVATE ssize_t sim_sendfile(int fd, int file, off_t *offset, size_t size) {
    sim_object *object = sim_object_at(fd, CALL_SENDFILE);
    const sim_object *from = sim_object_at(file, CALL_SENDFILE);
    int error = sim_enter(CALL_SENDFILE);
    uint64_t left = (uint64_t)*offset < from->size ? from->size - (uint64_t)*offset : 0;
    ssize_t n;
    if (error == EINVAL || error == ENOSYS) return sim_fail(error);
    if (error == EAGAIN && object->reset) error = 0;
    if (error == EPIPE) {
        sim_fault_io(object, error, SIM_OUT);
        return sim_broken_pipe(object, 0);
    }
    if (error) return sim_fault_io(object, error, SIM_OUT);
    if (left < size) size = (size_t)left;
    if (!size) return 0;
    n = sim_write_link(object, NULL, size, 0);
    if (n > 0) {
        sim_dir *out = sim_outgoing(object);
        if (!object->link->end[object->side].owner) model_bind(object->link, object->side);
        if (from->file_dir->place != out->place || from->file_base + (uint64_t)*offset != out->sent)
            sim_broken(1, "a file's bytes are sent at another place than they were written");
        out->sent += (uint64_t)n;
        dir_plan(object->link, out);
        sim_moved();
    }
    SIM_TRACE("sendfile(%d, %zu) = %zd", fd, size, n);
    return n;
}

SIM_PRIVATE int sim_open_null(void) {
    sim_object *object;
    int error = sim_enter(CALL_OPEN);
    return error ? sim_fail(error) : sim_open(SIM_NULL, &object);
}

SIM_PRIVATE int sim_open_file(uint64_t size, const sim_dir *dir, uint64_t base) {
    sim_object *object;
    int fd = sim_open(SIM_FILE, &object);
    if (fd < 0) return fd;
    object->size = size;
    object->file_dir = dir;
    object->file_base = base;
    return fd;
}

/* ---- ends ------------------------------------------------------------------------------------ */

SIM_PRIVATE int sim_shutdown(int fd, int how) {
    sim_object *object = sim_object_at(fd, CALL_SHUTDOWN);
    int error = sim_enter(CALL_SHUTDOWN);
    (void)how;
    if (!object->link || object->reset || object->connecting) error = ENOTCONN;
    else if (error == ENOBUFS) error = 0; /* of no kernel that has begun to close */
    if (error == ENOTCONN && object->link && !object->reset) {
        object->reset = 1;
        link_reset(object->link, !object->side);
        sim_wake(object, SIM_IN | SIM_OUT | SIM_HUP);
    }
    SIM_TRACE("shutdown(%d)%s", fd, error ? " fails" : "");
    if (error) return sim_tell(object, error);
    if (object->shut_wr) return 0;
    model_ended_in_order(object->link, object->side);
    object->shut_wr = 1;
    object->shut_at = sim.now;
    end_shut(object->link, object->side);
    sim_wake(object, SIM_OUT | SIM_HUP);
    return 0;
}

static void sim_poller_forget(int fd);

static void sim_object_end(sim_object *object) {
    int i;
    if (object->link && object->kind != SIM_LISTENER) {
        const sim_dir *in = sim_incoming(object);
        int reset = object->linger_zero;
        /* Of a pipe or file the reader cannot be told that something is missing. */
        if (!reset && !object->reset && !object->shut_wr && !object->connecting &&
            !object->link->is_pipe)
            model_ended_in_order(object->link, object->side);
        if (object->connecting || in->arrived > in->taken) reset = !object->link->is_pipe;
        end_close(object->link, object->side, reset);
    }
    for (i = 0; object->kind == SIM_LISTENER && i < object->waiting; i++)
        end_close(object->queue[i], 1, 1);
    object->kind = SIM_FREE;
}

/* The descriptor is free again whatever close returns (close(2) on Linux). */
SIM_PRIVATE int sim_close(int fd) {
    sim_object *object = sim_object_at(fd, CALL_CLOSE);
    int error = sim_enter(CALL_CLOSE);
    SIM_TRACE("close(%d)", fd);
    if (object->foreign && object->nonblock != object->was_nonblock &&
        !sim_noted(sim.injected, EPERM))
        sim_broken(2, "descriptor %d is closed with another O_NONBLOCK than it had", fd);
    sim.fds[fd] = NULL;
    sim.open_fds--;
    sim_poller_forget(fd);
    if (--object->refs == 0) sim_object_end(object);
    return error ? sim_fail(error) : 0;
}

/* ---- small calls ----------------------------------------------------------------------------- */

SIM_PRIVATE int sim_setsockopt(int fd, int level, int option, const void *value) {
    sim_object *object = sim_object_at(fd, CALL_SETSOCKOPT);
    int error;
    if (level == SOL_SOCKET && option == SO_LINGER) {
        const struct linger *linger = (const struct linger *)value;
        object->linger_zero = linger->l_onoff && !linger->l_linger;
        return 0;
    }
    error = sim_enter(CALL_SETSOCKOPT);
    return error ? sim_fail(error) : 0;
}

SIM_PRIVATE int sim_getsockopt(int fd, int level, int option, void *value) {
    sim_object *object = sim_object_at(fd, CALL_GETSOCKOPT);
    int error = sim_enter(CALL_GETSOCKOPT), result = 0;
    (void)level;
    if (error) return sim_tell(object, error);
    if (option == SO_ACCEPTCONN) result = object->kind == SIM_LISTENER;
    if (option == SO_ERROR) {
        result = object->error;
        object->error = 0;
        if (result) sim_tell(object, result);
    }
    memcpy(value, &result, sizeof result);
    return 0;
}

SIM_PRIVATE int sim_getsockname(int fd, struct sockaddr *name, socklen_t *size) {
    sim_object *object = sim_object_at(fd, CALL_NAME);
    int error = sim_enter(CALL_NAME);
    if (!error && object->kind != SIM_SOCKET && object->kind != SIM_LISTENER) error = ENOTSOCK;
    if (error) return sim_fail(error);
    sim_name_make(name, size, object->family, object->port, 0);
    return 0;
}

SIM_PRIVATE int sim_getpeername(int fd, struct sockaddr *name, socklen_t *size) {
    sim_object *object = sim_object_at(fd, CALL_NAME);
    if (!object->link || object->connecting || object->reset) return sim_fail(ENOTCONN);
    sim_name_make(name, size, object->family, object->link->port, 0);
    return 0;
}

SIM_PRIVATE int sim_fcntl(int fd, int command, ...) {
    sim_object *object = sim_object_at(fd, CALL_FCNTL);
    int error, argument;
    va_list arguments;
    va_start(arguments, command);
    argument = command == F_GETFL ? 0 : va_arg(arguments, int);
    va_end(arguments);
    error = sim_enter(command == F_DUPFD_CLOEXEC ? CALL_DUP : CALL_FCNTL);
    if (error) return sim_fail(error);
    if (command == F_DUPFD_CLOEXEC) return sim_fd_take(object);
    if (command == F_GETFL) return object->nonblock ? O_NONBLOCK : 0;
    if (command == F_SETFL) object->nonblock = (argument & O_NONBLOCK) != 0;
    return 0;
}

SIM_PRIVATE int sim_ioctl_unread(int fd, int *unread) {
    sim_object *object = sim_object_at(fd, CALL_IOCTL);
    int error = sim_enter(CALL_IOCTL);
    if (error) return sim_fail(error);
    *unread = object->link ? (int)(sim_incoming(object)->arrived - sim_incoming(object)->taken) : 0;
    return 0;
}

SIM_PRIVATE int sim_fstat(int fd, struct stat *status) {
    sim_object *object = sim_object_at(fd, CALL_FSTAT);
    int error = sim_enter(CALL_FSTAT);
    if (error) return sim_fail(error);
    memset(status, 0, sizeof *status);
    if (object->kind == SIM_SOCKET) status->st_ino = 1;
    status->st_mode = object->kind == SIM_SOCKET || object->kind == SIM_LISTENER ? S_IFSOCK
                      : object->kind == SIM_FILE ? S_IFREG
                      : object->kind == SIM_PIPE ? S_IFIFO : S_IFCHR;
    return 0;
}

/* The one path that there is. */
SIM_PRIVATE int sim_lstat(struct stat *status) {
    int error = sim_enter(CALL_PATH);
    if (!error && !sim.path_exists) error = ENOENT;
    if (error) return sim_fail(error);
    memset(status, 0, sizeof *status);
    status->st_mode = S_IFSOCK;
    status->st_ino = (ino_t)sim.path_inode;
    return 0;
}

SIM_PRIVATE int sim_chmod(void) {
    int error = sim_enter(CALL_PATH);
    return error ? sim_fail(error) : 0;
}

SIM_PRIVATE int sim_unlink(void) {
    int error = sim_enter(CALL_PATH);
    if (!error && !sim.path_exists) error = ENOENT;
    if (error) return sim_fail(error);
    sim.path_exists = 0;
    return 0;
}

SIM_PRIVATE int sim_eventfd(void) {
    sim_object *object;
    int error = sim_enter(CALL_EVENTFD);
    return error ? sim_fail(error) : sim_open(SIM_COUNTER, &object);
}

/* The waker's pipe: a counter with two descriptors. */
SIM_PRIVATE int sim_pipe(int fds[2]) {
    sim_object *object;
    int error = sim_enter(CALL_PIPE);
    if (error) return sim_fail(error);
    fds[0] = sim_open(SIM_COUNTER, &object);
    if (fds[0] < 0) return -1;
    fds[1] = sim_fd_take(object);
    if (fds[1] >= 0) return 0;
    sim_close(fds[0]);
    return sim_fail(EMFILE);
}

SIM_PRIVATE int sim_getrlimit(struct rlimit *limit) {
    limit->rlim_cur = limit->rlim_max = (rlim_t)sim.fd_limit;
    return 0;
}

/* ---- signals --------------------------------------------------------------------------------- */

static void (*sim_handlers[65])(int);

SIM_PRIVATE int sim_sigaction(int signo, const struct sigaction *action, struct sigaction *old) {
    int error = action && action->sa_handler != SIG_DFL ? sim_enter(CALL_SIGACTION) : 0;
    if (error) return sim_fail(error);
    if (old) memset(old, 0, sizeof *old);
    if (old) old->sa_handler = sim_handlers[signo];
    if (action) sim_handlers[signo] = action->sa_handler;
    return 0;
}

SIM_PRIVATE int sim_sigpending(sigset_t *set) {
    sigemptyset(set);
    if (sim.sigpipe_pending) sigaddset(set, SIGPIPE);
    return 0;
}

SIM_PRIVATE int sim_sigmask(int how, const sigset_t *set, sigset_t *old) {
    int has = sigismember(set, SIGPIPE) == 1;
    if (old) {
        sigemptyset(old);
        if (sim.sigpipe_blocked) sigaddset(old, SIGPIPE);
    }
    if (how == SIG_BLOCK && has) sim.sigpipe_blocked = 1;
    if (how == SIG_SETMASK) sim.sigpipe_blocked = has;
    if (!sim.sigpipe_blocked && sim.sigpipe_pending) sim_broken(8, "SIGPIPE was let through");
    return 0;
}

SIM_PRIVATE int sim_sigwait(int *signo) {
    if (!sim.sigpipe_pending) sim_broken(8, "a signal is awaited that is not there");
    sim.sigpipe_pending = 0;
    *signo = SIGPIPE;
    return 0;
}

/* A signal comes to the process. */
SIM_PRIVATE int sim_raise(int signo) {
    if (!sim_handlers[signo]) return 0; /* the world does not kill itself */
    SIM_TRACE("signal %d", signo);
    sim_handlers[signo](signo);
    return 1;
}

/* ---- descriptors made elsewhere -------------------------------------------------------------- */

typedef enum sim_foreign {
    FOREIGN_READER, FOREIGN_WRITER, FOREIGN_PAIR, FOREIGN_FILE, FOREIGN_KINDS
} sim_foreign;

/* One end of a pipe, of a pair of sockets, or a file; the other end is a peer's. -1: none. */
SIM_PRIVATE int sim_foreign_open(sim_foreign kind, sim_link **made) {
    sim_object *object;
    sim_link *link;
    int fd = sim_open(kind == FOREIGN_PAIR ? SIM_SOCKET : kind == FOREIGN_FILE ? SIM_FILE
                                                                              : SIM_PIPE, &object);
    if (fd < 0) return fd;
    *made = link = link_new();
    object->link = link;
    object->side = kind == FOREIGN_READER || kind == FOREIGN_FILE;
    object->foreign = 1;
    object->was_nonblock = (unsigned char)sim_chance(2);
    object->nonblock = object->was_nonblock;
    object->family = AF_UNIX;
    link->end[object->side].object = object;
    link->is_unix = kind == FOREIGN_PAIR;
    link->is_pipe = kind != FOREIGN_PAIR;
    link->latency = 0;
    if (kind != FOREIGN_FILE) return fd;
    link->dir[0].sent = link->dir[0].arrived = sim_size(5000);
    link->dir[0].fin = link->dir[0].fin_arrived = 1;
    link->dir[1].room = SIM_NEVER / 2;
    link->end[0].closed = 1;
    return fd;
}

/* ---- names ----------------------------------------------------------------------------------- */

/* "localhost" and "race.sim", which has several addresses; everything else must be a number. */
static int sim_name_families(const char *host, const struct addrinfo *hints, int families[4]) {
    static const int race[] = { AF_INET6, AF_INET, AF_INET, AF_INET6 };
    unsigned char ip[16];
    int i, n = 0, count = 1, first = AF_INET;
    if (host && inet_pton(AF_INET6, host, ip) == 1) first = AF_INET6;
    else if (!host && hints->ai_family == AF_INET6) first = AF_INET6;
    else if (host && inet_pton(AF_INET, host, ip) != 1) {
        if (hints->ai_flags & AI_NUMERICHOST) return 0;
        if (strcmp(host, "race.sim") == 0) count = 4;
        else if (strcmp(host, "localhost") != 0) return 0;
    }
    for (i = 0; i < count; i++) {
        int family = count > 1 ? race[i] : first;
        if (hints->ai_family == AF_UNSPEC || hints->ai_family == family) families[n++] = family;
    }
    return n;
}

SIM_PRIVATE int sim_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints,
                                struct addrinfo **list) {
    int families[4], n = sim_name_families(host, hints, families);
    *list = NULL;
    if (sim_enter(CALL_RESOLVE)) return EAI_MEMORY;
    if (!n) return EAI_NONAME;
    while (n--) {
        struct sockaddr_storage *name;
        socklen_t size = sizeof *name;
        struct addrinfo *info = (struct addrinfo *)sim_heap_take(sizeof *info + sizeof *name);
        memset(info, 0, sizeof *info + sizeof *name);
        name = (struct sockaddr_storage *)(void *)(info + 1);
        sim_name_make((struct sockaddr *)name, &size, families[n], atoi(port), n);
        info->ai_family = families[n];
        info->ai_addr = (struct sockaddr *)name;
        info->ai_addrlen = size;
        info->ai_next = *list;
        *list = info;
    }
    return 0;
}

SIM_PRIVATE void sim_freeaddrinfo(struct addrinfo *list) {
    while (list) {
        struct addrinfo *next = list->ai_next;
        sim_realloc(list, 0);
        list = next;
    }
}

#endif
