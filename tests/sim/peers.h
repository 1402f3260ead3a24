/* The other ends: what the world plays of each connection. A peer sends so many bytes in pieces,
   reads at its own pace, and ends in one of a few ways; slow, silent, flooding, half-closing,
   resetting and trickling ones are all made of that. */
#ifndef SIM_PEERS_H
#define SIM_PEERS_H

#include "network.h"

typedef enum sim_peer_end {
    PEER_WAITS,                 /* sends all, reads to the end, then closes */
    PEER_HALF_CLOSES,           /* ends its sending side when all is sent, then as above */
    PEER_CLOSES,                /* closes when all is sent, whatever it has not read */
    PEER_RESETS,                /* at some time */
    PEER_HANGS                  /* never ends by itself */
} sim_peer_end;

struct sim_peer {
    int used, number, side, port, family, tries, end;
    sim_link *link;             /* NULL: not connected yet */
    uint64_t to_send, send_at, read_at, end_at;
    size_t send_piece, read_piece;
    uint64_t send_pause, read_pause;
    unsigned char head[120];    /* what it sends first */
    size_t head_size;
    int head_is;                /* of which kind, sim_head */
    int told_port;              /* that a good head tells */
    struct sim_secure *secure;  /* NULL: no TLS */
};

/* secure.h: those with TLS. */
#ifdef TCPSERVER_TLS
static uint64_t secure_due(const sim_peer *peer);
static void secure_step(sim_peer *peer);
static void secure_plan(sim_peer *peer);
static int secure_may_run(void);
#else
static uint64_t secure_due(const sim_peer *peer) {
    return peer->send_at;
}

static void secure_step(sim_peer *peer) {
    (void)peer;
}

static void secure_plan(sim_peer *peer) {
    (void)peer;
}

static int secure_may_run(void) {
    return 0;
}
#endif

typedef enum sim_head { HEAD_NONE, HEAD_1, HEAD_2, HEAD_LOCAL, HEAD_BAD, HEAD_KINDS } sim_head;

static sim_peer sim_peers[SIM_PEERS];
static int sim_peer_count;
static size_t sim_peer_bytes;   /* how much a peer sends at most, in this run */

static uint64_t peer_pause(void) {
    return sim_chance(2) ? 0 : SIM_MS(1) / 8 * (1 + sim_size(400));
}

static sim_peer *peer_new(int port) {
    sim_peer *peer = &sim_peers[sim_peer_count];
    if (sim_peer_count == SIM_PEERS) return NULL;
    memset(peer, 0, sizeof *peer);
    peer->number = sim_peer_count++;
    peer->used = 1;
    peer->port = port;
    peer->family = AF_INET;
    peer->tries = 1 + (int)sim_below(6);
    peer->to_send = sim_size(sim_peer_bytes);
    peer->send_at = sim.now + (sim_chance(2) ? 0 : SIM_MS(sim_size(200)));
    peer->read_at = sim.now;
    peer->send_piece = sim_chance(6) ? 1 : 1 + sim_size(sim_peer_bytes);
    peer->read_piece = sim_least_room + 1 + (sim_chance(8) ? sim_below(16) : sim_size(1 << 20));
    peer->send_pause = peer_pause();
    peer->read_pause = peer_pause();
    peer->end = (int)sim_below(5);
    if (peer->end == PEER_RESETS) peer->end_at = peer->send_at + SIM_MS(sim_size(300));
    /* A trickle of many bytes ends some day. */
    if (peer->to_send / peer->send_piece > 200) peer->to_send = peer->send_piece * 200;
    return peer;
}

/* A header of the PROXY protocol, or something like it. */
static void peer_head(sim_peer *peer, sim_head kind) {
    static const unsigned char two[] = "\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\1\2\3\x0a\4\5\6";
    int port = 1 + (int)sim_below(65000);
    peer->head_is = (int)kind;
    peer->told_port = port;
    if (kind == HEAD_1)
        peer->head_size = (size_t)sprintf((char *)peer->head,
                                          "PROXY TCP4 10.1.2.3 10.4.5.6 %d 80\r\n", port);
    if (kind == HEAD_BAD) peer->head_size = (size_t)sprintf((char *)peer->head, "PROXY TCP4 x\r\n");
    if (kind == HEAD_2 || kind == HEAD_LOCAL) {
        memcpy(peer->head, two, 24);
        if (kind == HEAD_LOCAL) peer->head[12] = 0x20;
        peer->head[24] = (unsigned char)(port >> 8);
        peer->head[25] = (unsigned char)port;
        peer->head[26] = peer->head[27] = 1;
        peer->head_size = 28;
    }
    peer->to_send += peer->head_size;
}

/* The other end of a descriptor that the workload has made. */
static void peer_of_foreign(sim_link *link, int side) {
    sim_peer *peer = peer_new(0);
    if (!peer) {
        end_close(link, side, 0);
        return;
    }
    if (link->is_pipe && side == 1) peer->to_send = 0;
    if (link->is_pipe && side == 1 && peer->end == PEER_HALF_CLOSES) peer->end = PEER_WAITS;
    if (link->is_pipe && side == 0 && peer->end == PEER_WAITS) peer->end = PEER_CLOSES;
    peer->link = link;
    peer->side = side;
    link->end[side].peer = peer;
}

/* For a connection that the program begins. */
static int peer_accepts(sim_link *link) {
    sim_peer *peer;
    if (sim_chance(6)) return sim_chance(2) ? ECONNREFUSED : ETIMEDOUT;
    peer = peer_new(link->port);
    if (!peer) return ECONNREFUSED;
    peer->link = link;
    peer->side = 1;
    link->end[1].peer = peer;
    secure_plan(peer);
    return 0;
}

static void peer_close(sim_peer *peer, int reset) {
    SIM_TRACE("peer %d %s", peer->number, reset ? "resets" : "closes");
    if (peer->link) end_close(peer->link, peer->side, reset);
    peer->used = 0;
}

static void peer_reset(sim_peer *peer) {
    if (!peer->used) return;
    end_close(peer->link, peer->side, 0);
    peer->used = 0;
}

static void peer_connect(sim_peer *peer) {
    sim_object *listener = listener_at(peer->port, peer->family);
    sim_link *link;
    int refused = !listener || listener->waiting >= SIM_QUEUE ||
                  listener->waiting > listener->backlog;
    if (refused) {
        peer->send_at = sim.now + SIM_MS(5 + sim_below(100));
        if (--peer->tries == 0) peer->used = 0;
        return;
    }
    link = link_new();
    link->port = peer->port;
    link->family = peer->family;
    link->is_unix = peer->family == AF_UNIX;
    link->end[0].peer = peer;
    peer->link = link;
    peer->side = 0;
    secure_plan(peer);
    memcpy(link->dir[0].head, peer->head, peer->head_size);
    link->dir[0].head_size = (unsigned char)peer->head_size;
    SIM_TRACE("peer %d begins connection %d: sends %d", peer->number, (int)(link - sim_links),
              (int)peer->to_send);
    listener_push(listener, link);
}

/* When a peer does something next, as things are. */
static uint64_t peer_due(const sim_peer *peer) {
    const sim_dir *in, *out;
    uint64_t due = SIM_NEVER;
    if (!peer->used) return SIM_NEVER;
    if (!peer->link) return peer->send_at;
    if (peer->link->connect_at != SIM_NEVER) return SIM_NEVER;
    if (peer->secure) return secure_due(peer);
    in = &peer->link->dir[!peer->side];
    out = &peer->link->dir[peer->side];
    if (in->arrived > in->taken && peer->end != PEER_CLOSES) due = peer->read_at;
    if (out->sent < peer->to_send && sim_free_room(out)) due = sim_earlier(due, peer->send_at);
    if (out->sent >= peer->to_send && (peer->end == PEER_CLOSES ||
                                       (peer->end == PEER_HALF_CLOSES && !out->fin)))
        due = sim_earlier(due, peer->send_at);
    if (in->fin_arrived && in->arrived == in->taken && peer->end != PEER_HANGS)
        due = sim_earlier(due, peer->read_at);
    if (peer->end == PEER_RESETS) due = sim_earlier(due, peer->end_at);
    return due;
}

static void peer_read(sim_peer *peer) {
    sim_dir *in = &peer->link->dir[!peer->side];
    uint64_t n = in->arrived - in->taken;
    if (!n || peer->read_at > sim.now) return;
    if (n > peer->read_piece) n = peer->read_piece;
    in->taken += n;
    peer->read_at = sim.now + peer->read_pause;
    dir_plan(peer->link, in);
    sim_moved();
}

static void peer_send(sim_peer *peer) {
    sim_dir *out = &peer->link->dir[peer->side];
    uint64_t n = peer->to_send - out->sent, room = sim_free_room(out);
    if (out->sent >= peer->to_send || peer->send_at > sim.now || !room) return;
    if (n > peer->send_piece) n = peer->send_piece;
    if (n > room) n = room;
    out->sent += n;
    peer->send_at = sim.now + peer->send_pause;
    SIM_TRACE("peer %d sends %d", peer->number, (int)n);
    dir_plan(peer->link, out);
    sim_moved();
}

static void peer_step(sim_peer *peer) {
    sim_dir *in, *out;
    if (!peer->link) {
        peer_connect(peer);
        return;
    }
    in = &peer->link->dir[!peer->side];
    out = &peer->link->dir[peer->side];
    if (peer->end == PEER_RESETS && peer->end_at <= sim.now) {
        peer_close(peer, 1);
        return;
    }
    if (peer->secure) {
        secure_step(peer);
        return;
    }
    if (peer->end != PEER_CLOSES) peer_read(peer);
    peer_send(peer);
    if (out->sent >= peer->to_send && peer->send_at <= sim.now) {
        if (peer->end == PEER_HALF_CLOSES) end_shut(peer->link, peer->side);
        if (peer->end == PEER_CLOSES) {
            peer_close(peer, 0);
            return;
        }
    }
    if (in->fin_arrived && in->arrived == in->taken && peer->end != PEER_HANGS)
        peer_close(peer, 0);
}

static void peer_run(void) {
    int i;
    for (i = 0; i < sim_peer_count; i++) {
        if (!sim_peers[i].used || peer_due(&sim_peers[i]) > sim.now) continue;
        if (!sim_peers[i].secure || secure_may_run()) peer_step(&sim_peers[i]);
    }
}

static uint64_t peer_next(void) {
    uint64_t due = SIM_NEVER;
    int i;
    for (i = 0; i < sim_peer_count; i++) due = sim_earlier(due, peer_due(&sim_peers[i]));
    return due;
}

#endif
