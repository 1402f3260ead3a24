/* Peers that speak TLS: real engines, fed and emptied at the peer's own pace, so that records and
   handshakes come in whatever pieces and with whatever delays a peer has. What such a peer decrypts
   must be what the program wrote, byte by byte, and an end must have been announced. */
#ifndef SIM_SECURE_H
#define SIM_SECURE_H

#include "peers.h"

/* What peers do is not the library's. */
#undef br_ssl_engine_inject_entropy
#undef br_ssl_engine_sendapp_ack
#undef br_ssl_engine_sendrec_ack
#undef br_ssl_engine_recvapp_ack
#undef br_ssl_engine_close

typedef enum secure_fault {
    SECURE_FINE,
    SECURE_ALERTS,              /* answers with a fatal alert in clear */
    SECURE_BREAKS,              /* sends one in the midst of what it encrypts */
    SECURE_DAMAGES,             /* flips a bit of what it has encrypted */
    SECURE_OLD,                 /* knows TLS 1.1 at most */
    SECURE_STRANGE,             /* offers a suite that nobody wants */
    SECURE_RENEGOTIATES,        /* wants another handshake later */
    SECURE_FAULTS
} secure_fault;

typedef enum secure_script {
    SECURE_BY_CHANCE, SECURE_NEVER, SECURE_AT_ONCE, SECURE_LATER /* as a scenario wants it */
} secure_script;

typedef struct secure_certificate { /* what a server has shown */
    const br_x509_class *vtable;
    size_t count, leaf_size;
} secure_certificate;

struct sim_secure {
    int client, begun, done, ended, error;
    int upgrades;               /* in clear up to upgrade_at; goes on when the program does */
    uint64_t upgrade_at;
    secure_fault fault;
    int damaged, alerted, renegotiated;
    uint64_t breaks_at;         /* how much it has encrypted then */
    int shows;                  /* its certificate, when a server asks for it */
    int empties;                /* sends empty records in between */
    int notifies, closing;      /* with close_notify */
    int resumes;
    const char *name;           /* that a client asks for; NULL: none */
    const char *session_name;   /* that its session was made for */
    uint16_t suite;
    uint64_t got;               /* up to where it has decrypted */
    size_t piece;               /* of what it sends, at most */
    br_ssl_engine_context *core;
    union {
        br_ssl_client_context client;
        br_ssl_server_context server;
    } context;
    secure_certificate shown;
    unsigned char records[BR_SSL_BUFSIZE_BIDI];
};

static struct sim_secure sim_secures[SIM_PEERS];

/* ---- what all of them have ------------------------------------------------------------------- */

/* One key, self-signed for localhost, race.sim and the addresses, and for b.sim. */
static const char secure_key_pem[] =
    "-----BEGIN EC PRIVATE KEY-----\n"
    "MHcCAQEEINoRnrcW/TfZXrSegZjkQ50Q5sEUc6boK+RTiCGSPSdooAoGCCqGSM49\n"
    "AwEHoUQDQgAERJxaccxB+0RRPBLmDnKChRHN/y4rfXKExhycByv/cyAXogRBy+13\n"
    "tWLKi4wRjWQwvX/EsDJqHJGJIBHZQ4nIBg==\n"
    "-----END EC PRIVATE KEY-----\n";
static const char secure_a_pem[] =
    "-----BEGIN CERTIFICATE-----\n"
    "MIIBlDCCATugAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv\n"
    "c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM\n"
    "CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABEScWnHMQftEUTwS\n"
    "5g5ygoURzf8uK31yhMYcnAcr/3MgF6IEQcvtd7ViyouMEY1kML1/xLAyahyRiSAR\n"
    "2UOJyAajfDB6MA8GA1UdEwEB/wQFMAMBAf8wSAYDVR0RBEEwP4IJbG9jYWxob3N0\n"
    "gghyYWNlLnNpbYcEfwAAAYcEfwAAAocEfwAAA4cEfwAABIcQAAAAAAAAAAAAAAAA\n"
    "AAAAATAdBgNVHQ4EFgQU9uBa+mxntr3MwzK8LWzM6vbudDAwCgYIKoZIzj0EAwID\n"
    "RwAwRAIgMg2sQKQFmOXVAzMgu0Q97SEGKhNJJOar9KQw0+Wu0VECIA4X5ybN6VDc\n"
    "8X/4zOdFpx0++Aa2wISqIJL90EIvp6bT\n"
    "-----END CERTIFICATE-----\n";
static const char secure_b_pem[] =
    "-----BEGIN CERTIFICATE-----\n"
    "MIIBVTCB+6ADAgECAgECMAoGCCqGSM49BAMCMBAxDjAMBgNVBAMMBWIuc2ltMCAX\n"
    "DTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAQMQ4wDAYDVQQDDAViLnNp\n"
    "bTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABEScWnHMQftEUTwS5g5ygoURzf8u\n"
    "K31yhMYcnAcr/3MgF6IEQcvtd7ViyouMEY1kML1/xLAyahyRiSAR2UOJyAajRDBC\n"
    "MA8GA1UdEwEB/wQFMAMBAf8wEAYDVR0RBAkwB4IFYi5zaW0wHQYDVR0OBBYEFPbg\n"
    "WvpsZ7a9zMMyvC1szOr27nQwMAoGCCqGSM49BAMCA0kAMEYCIQC8EltFrxlJx5IP\n"
    "48v3TWWkbtSxbMdODDeELHBaQQzZMQIhAJ33ZMFPIHLtE860SjiUJTUw6DqtGwRV\n"
    "CflLsve25cOo\n"
    "-----END CERTIFICATE-----\n";

static struct secure_state {
    tcpsrv_tls *server, *client;
    tcpsrv_tls *strict;             /* refuses names that it does not know */
    tcpsrv_tls *mutual;             /* wants certificates of clients */
    tcpsrv_tls *serves;             /* what the server begins a run with */
    secure_script script;           /* what peers do */
    br_x509_pkey key;
    unsigned char point[144];
} secure;

static const char *const secure_names[4] = { NULL, "localhost", "b.sim", "other.sim" };
static const char *const secure_protocols[] = { "sim/1", "sim/2", NULL };

static int secure_on_sni(void *user, const char *name) {
    (void)user;
    if (!name || strcmp(name, "localhost") == 0) return 0;
    return strcmp(name, "b.sim") == 0 ? 1 : -1;
}

/* Once in a process, before the first run. */
static void secure_prepare(void) {
    tcpsrv_certificate pairs[2];
    tcpsrv_tls_options options;
    const br_ec_private_key *own;
    memset(pairs, 0, sizeof pairs);
    memset(&options, 0, sizeof options);
    pairs[0].certificate_pem = secure_a_pem;
    pairs[1].certificate_pem = secure_b_pem;
    pairs[0].key_pem = pairs[1].key_pem = secure_key_pem;
    options.ca_pem = secure_a_pem;
    secure.client = tcpsrv_tls_new(&options);
    options.certificates = pairs;
    options.certificate_count = 2;
    options.session_cache = 32;
    options.alpn = secure_protocols;
    secure.server = tcpsrv_tls_new(&options);
    options.on_sni = secure_on_sni;
    options.alpn = NULL;
    secure.strict = tcpsrv_tls_new(&options);
    options.on_sni = NULL;
    options.session_cache = -1;
    options.client_certificates = TCPSRV_TLS_REQUIRED;
    secure.mutual = tcpsrv_tls_new(&options);
    if (!secure.client || !secure.server || !secure.strict || !secure.mutual)
        sim_broken(0, "%s", tcpsrv_last_error());
    own = br_skey_decoder_get_ec(secure.server->pairs[0].key);
    secure.key.key_type = BR_KEYTYPE_EC;
    secure.key.key.ec.curve = own->curve;
    secure.key.key.ec.q = secure.point;
    secure.key.key.ec.qlen = sim_mulgen(secure.point, own->x, own->xlen, own->curve);
}

/* The session that a client may go on with: one for each name and suite. */
static void secure_session(const struct sim_secure *end, br_ssl_session_parameters *session) {
    int number = 1000 + (end->session_name ? (int)end->session_name[0] : 0) + (int)end->suite;
    memset(session, 0, sizeof *session);
    sim_entropy(number, session->session_id, sizeof session->session_id);
    session->session_id_len = sizeof session->session_id;
    session->version = BR_TLS12;
    session->cipher_suite = end->suite;
    sim_entropy(number + 1, session->master_secret, sizeof session->master_secret);
}

static const uint16_t secure_suites[2] = {
    BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
};

/* A server remembers them, as from an earlier handshake. */
static void secure_remember(tcpsrv_tls *tls) {
    static struct sim_secure end;
    br_ssl_session_parameters session;
    tcpsrv__engine engine;
    int i;
    for (i = 0; i < 8; i++) {
        memset(&engine, 0, sizeof engine);
        engine.tls = tls;
        end.session_name = secure_names[i / 2];
        end.suite = secure_suites[i % 2];
        secure_session(&end, &session);
        tcpsrv__session_name(&engine, end.session_name ? end.session_name : "");
        tcpsrv__session_save(&engine.cache, NULL, &session);
    }
}

/* At the end of a run nobody may use it any more, and it forgets. */
static void secure_forget(tcpsrv_tls *tls) {
    if (tls->refs != 1) sim_broken(10, "%zu references to TLS were left", tls->refs - 1);
    sim_realloc(tls->sessions, 0);
    tls->sessions = NULL;
}

/* ---- engines --------------------------------------------------------------------------------- */

static secure_certificate *secure_certificate_of(const br_x509_class *const *vtable) {
    return (secure_certificate *)(uintptr_t)vtable; /* its first field */
}

static void secure_start_chain(const br_x509_class **vtable, const char *name) {
    (void)vtable, (void)name;
}

static void secure_start_cert(const br_x509_class **vtable, uint32_t size) {
    secure_certificate *shown = secure_certificate_of(vtable);
    if (!shown->count++) shown->leaf_size = size;
}

static void secure_append(const br_x509_class **vtable, const unsigned char *data, size_t size) {
    (void)vtable, (void)data, (void)size;
}

static void secure_end_cert(const br_x509_class **vtable) {
    (void)vtable;
}

static unsigned secure_end_chain(const br_x509_class **vtable) {
    (void)vtable;
    return 0;
}

static const br_x509_pkey *secure_get_key(const br_x509_class *const *vtable, unsigned *usages) {
    (void)vtable;
    if (usages) *usages = BR_KEYTYPE_SIGN | BR_KEYTYPE_KEYX;
    return &secure.key;
}

static const br_x509_class secure_certificate_class = {
    sizeof(secure_certificate), secure_start_chain, secure_start_cert, secure_append,
    secure_end_cert, secure_end_chain, secure_get_key
};

static void secure_set_up(struct sim_secure *end, int number) {
    br_ssl_engine_context *core = end->core;
    unsigned char seed[32];
    unsigned version = end->fault == SECURE_OLD ? BR_TLS11 : BR_TLS12;
    sim_entropy(100 + number, seed, sizeof seed);
    br_ssl_engine_set_versions(core, end->fault == SECURE_OLD ? BR_TLS10 : BR_TLS12, version);
    br_ssl_engine_set_suites(core, &end->suite, 1);
    br_ssl_engine_set_ec(core, sim_curves());
    br_ssl_engine_set_ecdsa(core, br_ecdsa_vrfy_asn1_get_default());
    br_ssl_engine_set_default_aes_gcm(core);
    br_ssl_engine_set_default_chapol(core);
    br_ssl_engine_set_hash(core, br_sha256_ID, &br_sha256_vtable);
    br_ssl_engine_set_hash(core, br_sha384_ID, &br_sha384_vtable);
    br_ssl_engine_set_prf_sha256(core, br_tls12_sha256_prf);
    br_ssl_engine_set_buffer(core, end->records, sizeof end->records, 1);
    sim_inject_entropy(core, seed, sizeof seed);
}

static void secure_begin_client(struct sim_secure *end, int number) {
    br_ssl_client_context *client = &end->context.client;
    const tcpsrv__pair *pair = &secure.server->pairs[0];
    br_ssl_session_parameters session;
    br_ssl_client_zero(client);
    end->core = &client->eng;
    secure_set_up(end, number);
    end->shown.vtable = &secure_certificate_class;
    br_ssl_engine_set_x509(end->core, &end->shown.vtable);
    if (number % 3) br_ssl_engine_set_protocol_names(end->core, (const char **)(uintptr_t)
                                                     &secure_protocols[number % 2], 1);
    if (end->shows)
        br_ssl_client_set_single_ec(client, pair->chain, pair->chain_length,
                                    br_skey_decoder_get_ec(pair->key), BR_KEYTYPE_SIGN,
                                    BR_KEYTYPE_EC, sim_curves(),
                                    br_ecdsa_sign_asn1_get_default());
    secure_session(end, &session);
    if (end->resumes) br_ssl_engine_set_session_parameters(end->core, &session);
    br_ssl_client_reset(client, end->name, end->resumes);
}

static void secure_begin_server(struct sim_secure *end, int number) {
    br_ssl_server_context *server = &end->context.server;
    const tcpsrv__pair *pair = &secure.server->pairs[0];
    br_ssl_server_zero(server);
    end->core = &server->eng;
    secure_set_up(end, number);
    br_ssl_server_set_single_ec(server, pair->chain, pair->chain_length,
                                br_skey_decoder_get_ec(pair->key), BR_KEYTYPE_SIGN, BR_KEYTYPE_EC,
                                sim_curves(), br_ecdsa_sign_asn1_get_default());
    br_ssl_server_reset(server);
}

/* Computing takes more stack than coroutines have. */
static int secure_may_run(void) {
    return !sim.loop || !sim.loop->current;
}

/* ---- plans ----------------------------------------------------------------------------------- */

/* The peer speaks TLS, from the beginning or from some place on. */
static void peer_secure(sim_peer *peer, int client, int upgrades) {
    struct sim_secure *end = &sim_secures[peer->number];
    memset(end, 0, offsetof(struct sim_secure, records));
    end->client = client;
    end->upgrades = upgrades;
    end->fault = sim_chance(6) ? (secure_fault)sim_below(SECURE_FAULTS) : SECURE_FINE;
    end->notifies = !sim_chance(4);
    end->resumes = !sim_chance(4);
    end->shows = !sim_chance(4);
    end->empties = sim_chance(8);
    end->breaks_at = sim_below((size_t)peer->to_send + 1);
    end->name = secure_names[sim_below(4)];
    end->session_name = sim_chance(8) ? secure_names[sim_below(4)] : end->name;
    end->suite = secure_suites[sim_below(2)];
    if (end->fault == SECURE_OLD) end->suite = BR_TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA;
    if (end->fault == SECURE_STRANGE) end->suite = BR_TLS_RSA_WITH_AES_128_GCM_SHA256;
    end->piece = sim_chance(6) ? 1 + peer->to_send / 100 + sim_below(40) : (size_t)-1;
    if (upgrades) peer->link->upgrade_at = peer->head_size + 1 + sim_size(300);
    end->upgrade_at = peer->link->upgrade_at;
    if (peer->to_send < end->upgrade_at) peer->to_send = end->upgrade_at;
    peer->secure = end;
}

/* Every second one with a handshake of its own. */
static void secure_scripted(sim_peer *peer) {
    struct sim_secure *end = &sim_secures[peer->number];
    if (secure.script == SECURE_NEVER) return;
    peer_secure(peer, peer->side == 0, secure.script == SECURE_LATER);
    end->fault = SECURE_FINE;
    end->notifies = 1;
    end->resumes = peer->number % 2 == 0;
    end->name = end->session_name = secure_names[1];
    end->suite = secure_suites[0];
    end->piece = 200;
    if (end->upgrades) end->upgrade_at = peer->link->upgrade_at = 20;
}

/* At the beginning of a connection. Some speak no TLS where it is wanted. */
static void secure_plan(sim_peer *peer) {
    static const char http[] = "GET / HTTP/1.1\r\n\r\n";
    int upgrades = peer->side == 0 ? !secure.serves : peer->link->port == 9000;
    if (peer->link->is_pipe) return;
    if (secure.script != SECURE_BY_CHANCE) {
        secure_scripted(peer);
    } else if (upgrades) {
        if (sim_chance(2)) peer_secure(peer, peer->side == 0, 1);
    } else if (!sim_chance(10)) {
        peer_secure(peer, peer->side == 0, 0);
    } else if (!peer->head_size && sim_chance(2)) {
        peer->head_size = sizeof http - 1;
        memcpy(peer->head, http, peer->head_size);
        peer->to_send += peer->head_size;
    }
}

static void secure_begin(sim_peer *peer) {
    struct sim_secure *end = peer->secure;
    sim_dir *out = &peer->link->dir[peer->side];
    out->clear = out->plain_sealed = out->plain_sent = out->sent;
    if (!end->upgrades) out->clear = out->plain_sealed = out->plain_sent = peer->head_size;
    end->begun = 1;
    SIM_TRACE("peer %d begins TLS as a %s%s%s at %d, fault %d", peer->number,
              end->client ? "client of " : "server", end->client && end->name ? end->name : "",
              end->client && end->resumes ? ", resuming," : "", (int)out->clear, (int)end->fault);
    if (end->client) secure_begin_client(end, peer->number);
    else secure_begin_server(end, peer->number);
}

/* An upgrade begins when the program's side of it has. */
static int secure_may_begin(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    const sim_dir *in = &peer->link->dir[!peer->side], *out = &peer->link->dir[peer->side];
    if (end->begun) return 0;
    if (!end->upgrades) return 1;
    return in->clear != SIM_NEVER && in->taken >= in->clear && out->sent == end->upgrade_at;
}

/* ---- reading --------------------------------------------------------------------------------- */

/* Whether the engine takes input: not while it has some to be read, or an answer to be sent. */
static int secure_reads(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    const sim_dir *in = &peer->link->dir[!peer->side];
    size_t size;
    if (in->taken < in->clear) return 1;
    if (!end->begun) return 0;
    return end->error || end->ended || br_ssl_engine_recvrec_buf(end->core, &size) != NULL;
}

static void secure_opened(sim_peer *peer) {
    struct sim_secure *end = peer->secure;
    const sim_dir *in = &peer->link->dir[!peer->side];
    unsigned char *data;
    size_t size;
    while ((data = br_ssl_engine_recvapp_buf(end->core, &size)) != NULL) {
        if (!sim_dir_equal(in, end->got, data, size))
            sim_broken(1, "peer %d: the %zu bytes from %llu on are not those written",
                       peer->number, size, (unsigned long long)end->got);
        end->got += size;
        if (end->got > in->plain_sealed)
            sim_broken(1, "peer %d has more than was written", peer->number);
        SIM_TRACE("peer %d decrypts %d", peer->number, (int)size);
        br_ssl_engine_recvapp_ack(end->core, size);
    }
}

/* Whether the other end has a reason to break off. */
static int secure_may_fail(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    const sim_dir *in = &peer->link->dir[!peer->side], *out = &peer->link->dir[peer->side];
    return end->fault != SECURE_FINE || in->clear == SIM_NEVER || out->secure_from != out->clear ||
           (end->client && end->name && strcmp(end->name, "other.sim") == 0) || sim.wrong_names ||
           (peer->link->mutual && !end->shows) ||
           (sim.alloc_failed && end->error >= 256);
}

static void secure_settle(sim_peer *peer) {
    struct sim_secure *end = peer->secure;
    size_t size;
    if (br_ssl_engine_current_state(end->core) == BR_SSL_CLOSED) {
        if (end->error || end->ended) return;
        end->error = br_ssl_engine_last_error(end->core);
        end->ended = !end->error;
        SIM_TRACE("peer %d: TLS has ended, error %d", peer->number, end->error);
        if (end->error && !secure_may_fail(peer))
            sim_broken(1, "peer %d: TLS failed with %d", peer->number, end->error);
    } else if (!end->done && br_ssl_engine_sendapp_buf(end->core, &size)) {
        end->done = 1;
        end->got = peer->link->dir[!peer->side].clear;
        SIM_TRACE("peer %d: the handshake is over", peer->number);
        if (end->client && end->shown.count &&
            end->shown.leaf_size !=
                secure.server->pairs[end->name && *end->name == 'b'].chain[0].data_len)
            sim_broken(2, "peer %d was shown another certificate", peer->number);
        if (end->client && !end->shown.count && end->session_name != end->name)
            sim_broken(2, "peer %d goes on with the session of another name", peer->number);
    }
}

static void secure_read(sim_peer *peer) {
    struct sim_secure *end = peer->secure;
    sim_dir *in = &peer->link->dir[!peer->side];
    uint64_t left = in->arrived - in->taken, before = in->taken;
    unsigned char *to;
    size_t n;
    if (!left || peer->read_at > sim.now) return;
    if (left > peer->read_piece) left = peer->read_piece;
    while (left && secure_reads(peer)) {
        n = (size_t)left;
        if (in->taken < in->clear) {
            if (n > in->clear - in->taken) n = (size_t)(in->clear - in->taken);
        } else if (!end->error && !end->ended) {
            size_t room;
            to = br_ssl_engine_recvrec_buf(end->core, &room);
            if (n > room) n = room;
            sim_wire_copy(in, in->taken, to, n);
            br_ssl_engine_recvrec_ack(end->core, n);
            secure_opened(peer);
            secure_settle(peer);
        }
        in->taken += n;
        left -= n;
    }
    if (in->taken == before) return;
    peer->read_at = sim.now + peer->read_pause;
    dir_plan(peer->link, in);
    sim_moved();
}

/* ---- writing --------------------------------------------------------------------------------- */

/* So many plain bytes may still go. */
static uint64_t secure_in_clear(const sim_peer *peer) {
    const sim_dir *out = &peer->link->dir[peer->side];
    uint64_t to = peer->secure->upgrades ? peer->secure->upgrade_at : peer->head_size;
    return out->sent < to ? to - out->sent : 0;
}

static int secure_breaks(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    size_t size;
    return end->fault == SECURE_BREAKS && end->done && !end->alerted && !end->error &&
           !end->ended && !br_ssl_engine_sendrec_buf(end->core, &size) &&
           peer->link->dir[peer->side].plain_sealed >= end->breaks_at;
}

static int secure_alerts(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    const sim_dir *in = &peer->link->dir[!peer->side];
    if (secure_breaks(peer)) return 1;
    return end->fault == SECURE_ALERTS && end->begun && !end->alerted && in->taken > in->clear;
}

static int secure_is_sealed(const sim_peer *peer) {
    return peer->link->dir[peer->side].plain_sealed >= peer->to_send;
}

static int secure_has_out(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    size_t size;
    if (peer->link->dir[peer->side].fin) return 0;
    if (secure_in_clear(peer) || secure_alerts(peer)) return 1;
    if (!end->begun || end->alerted) return 0;
    if (br_ssl_engine_sendrec_buf(end->core, &size)) return 1;
    if (!end->done || end->error || end->ended || end->closing) return 0;
    if (!secure_is_sealed(peer)) return br_ssl_engine_sendapp_buf(end->core, &size) != NULL;
    return end->notifies && (peer->end == PEER_HALF_CLOSES || peer->end == PEER_CLOSES);
}

/* All is out, the announcement of the end as well. */
static int secure_is_out(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    if (secure_has_out(peer)) return 0;
    if (end->alerted || end->error || end->ended) return 1;
    return end->done && secure_is_sealed(peer);
}

static void secure_put(sim_peer *peer, const void *data, size_t size) {
    sim_dir *out = &peer->link->dir[peer->side];
    sim_wire_add(out, data, size);
    out->sent += size;
}

static void secure_seal(sim_peer *peer) {
    struct sim_secure *end = peer->secure;
    sim_dir *out = &peer->link->dir[peer->side];
    uint64_t left = peer->to_send - out->plain_sealed;
    unsigned char *to;
    size_t room;
    if (secure_is_sealed(peer)) {
        SIM_TRACE("peer %d says close_notify", peer->number);
        end->closing = 1;
        br_ssl_engine_close(end->core);
        return;
    }
    if (end->fault == SECURE_RENEGOTIATES && !end->renegotiated) {
        end->renegotiated = 1;
        SIM_TRACE("peer %d wants another handshake", peer->number);
        br_ssl_engine_renegotiate(end->core);
        return;
    }
    if (end->empties && sim_chance(2)) {
        br_ssl_engine_flush(end->core, 1);
        SIM_TRACE("peer %d encrypts nothing", peer->number);
        return;
    }
    to = br_ssl_engine_sendapp_buf(end->core, &room);
    if (room > peer->send_piece) room = peer->send_piece;
    if (room > left) room = (size_t)left;
    sim_dir_copy(out, out->plain_sealed, to, room);
    out->plain_sealed += room;
    br_ssl_engine_sendapp_ack(end->core, room);
    br_ssl_engine_flush(end->core, 0);
    SIM_TRACE("peer %d encrypts %d", peer->number, (int)room);
}

static void secure_note_record(sim_dir *out) {
    sim_wire *wire = &out->wire;
    if (wire->count == wire->records_room) {
        wire->records_room = 2 * wire->records_room + 64;
        wire->records = (sim_record *)realloc(wire->records,
                                              wire->records_room * sizeof *wire->records);
        if (!wire->records) sim_broken(0, "no memory for records");
    }
    wire->records[wire->count].wire = out->sent;
    wire->records[wire->count++].plain = out->plain_sealed;
}

/* A piece of what the engine has to send. */
static void secure_push(sim_peer *peer, size_t room) {
    struct sim_secure *end = peer->secure;
    sim_dir *out = &peer->link->dir[peer->side];
    unsigned char *data;
    size_t size;
    if (!br_ssl_engine_sendrec_buf(end->core, &size)) secure_seal(peer);
    data = br_ssl_engine_sendrec_buf(end->core, &size);
    if (!data) return;
    if (size > end->piece) size = end->piece;
    if (size > room) size = room;
    if (end->fault == SECURE_DAMAGES && end->done && !end->damaged && sim_chance(3)) {
        data[sim_below(size)] ^= (unsigned char)(1 << sim_below(8));
        end->damaged = 1;
    }
    secure_put(peer, data, size);
    SIM_TRACE("peer %d sends %d of TLS%s", peer->number, (int)size,
              end->damaged ? ", damaged" : "");
    br_ssl_engine_sendrec_ack(end->core, size);
    if (!br_ssl_engine_sendrec_buf(end->core, &size)) {
        if (!end->damaged) secure_note_record(out);
        if (end->closing && !end->damaged && !end->renegotiated && out->notify_end == SIM_NEVER)
            out->notify_end = out->sent;
    }
    secure_settle(peer);
    if (end->ended && !end->closing && out->notify_end == SIM_NEVER &&
        !br_ssl_engine_sendrec_buf(end->core, &size))
        out->notify_end = out->sent; /* its answer to one */
}

/* A fatal alert; with what there is no room for it is cut, and the peer gone. */
static void secure_alert(sim_peer *peer, size_t room) {
    unsigned char bytes[64] = { 21, 3, 3, 0, 2, 2, 40 }, *record = bytes;
    struct sim_secure *end = peer->secure;
    const br_sslrec_out_class **keys = &end->core->out.vtable;
    sim_dir *out = &peer->link->dir[peer->side];
    size_t size = 7, from = 5, to = sizeof bytes;
    int breaks = secure_breaks(peer);
    if (breaks) { /* the engine as such sends none by its keys: it has nothing to say but the end */
        (*keys)->max_plaintext(keys, &from, &to);
        bytes[from] = 2;
        bytes[from + 1] = 80;
        size = 2;
        record = (*keys)->encrypt(keys, 21, BR_TLS12, bytes + from, &size);
    }
    secure_put(peer, record, room < size ? room : size);
    if (breaks && room >= size) out->alert_end = out->sent;
    end->alerted = 1;
    SIM_TRACE("peer %d sends an alert%s", peer->number, breaks ? " by its keys" : "");
}

static void secure_send(sim_peer *peer) {
    sim_dir *out = &peer->link->dir[peer->side];
    uint64_t n = secure_in_clear(peer);
    size_t room = (size_t)sim_free_room(out);
    if (peer->send_at > sim.now || !room || !secure_has_out(peer)) return;
    if (n) {
        if (n > peer->send_piece) n = peer->send_piece;
        if (n > room) n = room;
        out->sent += n;
        SIM_TRACE("peer %d sends %d", peer->number, (int)n);
    } else if (secure_alerts(peer)) {
        secure_alert(peer, room);
    } else {
        secure_push(peer, room);
    }
    peer->send_at = sim.now + peer->send_pause;
    dir_plan(peer->link, out);
    sim_moved();
}

/* ---- a peer's step --------------------------------------------------------------------------- */

static int secure_is_dead(const struct sim_secure *end) {
    return end->alerted || end->error;
}

static int secure_does_read(const sim_peer *peer) {
    return peer->end != PEER_CLOSES || !peer->secure->done;
}

static int secure_sees_end(const sim_peer *peer) {
    const sim_dir *in = &peer->link->dir[!peer->side];
    return in->fin_arrived && in->arrived == in->taken && peer->end != PEER_HANGS;
}

static uint64_t secure_due(const sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    const sim_dir *in = &peer->link->dir[!peer->side], *out = &peer->link->dir[peer->side];
    uint64_t due = SIM_NEVER;
    if (in->arrived > in->taken && secure_does_read(peer) && secure_reads(peer))
        due = peer->read_at;
    if (secure_may_begin(peer)) due = sim_earlier(due, peer->send_at);
    if (sim_free_room(out) && secure_has_out(peer)) due = sim_earlier(due, peer->send_at);
    if (secure_is_out(peer) && (peer->end == PEER_CLOSES || secure_is_dead(end) ||
                                (peer->end == PEER_HALF_CLOSES && !out->fin)))
        due = sim_earlier(due, peer->send_at);
    if (secure_sees_end(peer)) due = sim_earlier(due, peer->read_at);
    if (peer->end == PEER_RESETS) due = sim_earlier(due, peer->end_at);
    return due;
}

/* The program's end of an orderly close has been announced. (The engine says so only when its own
   answer is out, which nobody waits for.) */
static void secure_check_end(sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    size_t size;
    while (end->begun && br_ssl_engine_sendrec_buf(end->core, &size))
        br_ssl_engine_sendrec_ack(end->core, size);
    if (end->begun) secure_settle(peer);
    if (peer->link->end[!peer->side].in_order && end->done && !end->error && !end->ended &&
        !end->closing && end->fault == SECURE_FINE)
        sim_broken(1, "peer %d: the end comes without close_notify", peer->number);
}

static void secure_act(sim_peer *peer) {
    const struct sim_secure *end = peer->secure;
    if (secure_may_begin(peer) && peer->send_at <= sim.now) secure_begin(peer);
    if (secure_does_read(peer)) secure_read(peer);
    secure_send(peer);
    if (secure_is_out(peer) && peer->send_at <= sim.now) {
        if (peer->end == PEER_HALF_CLOSES) end_shut(peer->link, peer->side);
        if (peer->end == PEER_CLOSES || secure_is_dead(end)) {
            peer_close(peer, 0);
            return;
        }
    }
    if (!secure_sees_end(peer)) return;
    secure_check_end(peer);
    peer_close(peer, 0);
}

static void secure_step(sim_peer *peer) {
    sim.peers_compute = 1;
    secure_act(peer);
    sim.peers_compute = 0;
}

#endif
