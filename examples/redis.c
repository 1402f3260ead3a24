/* A small redis: strings in memory, spoken to in RESP2, so that redis-cli, redis-benchmark and
 * redis-cli --pipe are its clients.
 *
 *     cc -O2 examples/redis.c -o redis
 *     ./redis & redis-cli -p 8888 set greeting hello
 *
 * redis [PORT]: 8888, 0 for any free one. PING ECHO SET GET DEL EXISTS INCR MSET MGET DBSIZE
 * FLUSHALL QUIT, what those clients ask of COMMAND and CONFIG, and the same typed by hand (inline
 * commands, without redis's quoting).
 */
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_REQUEST = 64 << 20, /* a command with all its arguments */
    MAX_WORDS = 1 << 20,
    MAX_INLINE = 64 << 10,
    KEEP_WORDS = 64,        /* room that a connection keeps between commands */
    COMMANDS = 14
};

/* ---- the table: open addressing, any bytes as keys and values -------------------------------- */

/* A key and its value in one block. A reply that waits for its reader holds a reference, and what
   is held is replaced rather than changed. */
typedef struct entry {
    size_t references, key_size, size;
    char key[]; /* then the value */
} entry;

typedef struct slot {
    uint64_t hash;
    entry *entry; /* NULL: free */
} slot;

typedef struct table {
    slot *slots; /* a power of two of them, at most three quarters in use */
    size_t mask, count;
} table;

static uint64_t hash_of(tcpsrv_bytes key) {
    uint64_t hash = key.size * 0x9e3779b97f4a7c15u, word;
    size_t n;
    for (; key.size; key.data += n, key.size -= n) {
        n = key.size < sizeof word ? key.size : sizeof word;
        word = 0;
        memcpy(&word, key.data, n);
        hash = (hash ^ word) * 0xff51afd7ed558ccdu;
        hash ^= hash >> 32;
    }
    hash *= 0xc4ceb9fe1a85ec53u;
    return hash ^ hash >> 29;
}

/* Where a key is, or the free slot where it belongs. */
static slot *table_find(const table *t, tcpsrv_bytes key, uint64_t hash) {
    size_t i = hash & t->mask;
    for (; t->slots[i].entry; i = (i + 1) & t->mask)
        if (t->slots[i].hash == hash && t->slots[i].entry->key_size == key.size &&
            memcmp(t->slots[i].entry->key, key.data, key.size) == 0)
            break;
    return &t->slots[i];
}

static int table_resize(table *t, size_t slots) {
    slot *old = t->slots, *grown = calloc(slots, sizeof *grown);
    size_t i, to, old_slots = old ? t->mask + 1 : 0;
    if (!grown) return -ENOMEM;
    t->slots = grown;
    t->mask = slots - 1;
    for (i = 0; i < old_slots; i++) {
        if (!old[i].entry) continue;
        for (to = old[i].hash & t->mask; grown[to].entry; to = (to + 1) & t->mask) continue;
        grown[to] = old[i];
    }
    free(old);
    return 0;
}

static void entry_release(entry *e) {
    if (--e->references == 0) free(e);
}

static entry *entry_new(table *t, slot *s, tcpsrv_bytes key, size_t size) {
    entry *e = malloc(sizeof *e + key.size + size);
    if (!e) return NULL;
    e->references = 1;
    e->key_size = key.size;
    e->size = size;
    memcpy(e->key, key.data, key.size);
    if (s->entry) entry_release(s->entry);
    else t->count++;
    return s->entry = e;
}

static int table_set(table *t, tcpsrv_bytes key, tcpsrv_bytes value) {
    uint64_t hash = hash_of(key);
    slot *s;
    if (t->count > t->mask / 4 * 3 && table_resize(t, (t->mask + 1) * 2) != 0) return -ENOMEM;
    s = table_find(t, key, hash);
    if ((!s->entry || s->entry->references > 1 || s->entry->size != value.size) &&
        !entry_new(t, s, key, value.size))
        return -ENOMEM;
    s->hash = hash;
    memcpy(s->entry->key + key.size, value.data, value.size);
    return 0;
}

/* Moves back what would not be found across the gap, so that no tombstones are needed. */
static int table_remove(table *t, tcpsrv_bytes key) {
    size_t gap = (size_t)(table_find(t, key, hash_of(key)) - t->slots), i;
    if (!t->slots[gap].entry) return 0;
    entry_release(t->slots[gap].entry);
    for (i = (gap + 1) & t->mask; t->slots[i].entry; i = (i + 1) & t->mask) {
        size_t home = t->slots[i].hash & t->mask;
        if (((i - home) & t->mask) < ((i - gap) & t->mask)) continue;
        t->slots[gap] = t->slots[i];
        gap = i;
    }
    t->slots[gap].entry = NULL;
    t->count--;
    return 1;
}

/* ---- requests -------------------------------------------------------------------------------- */

typedef struct word {
    size_t at, size; /* in the request, whose bytes may move while it arrives */
    entry *found;
} word;

typedef struct client {
    tcpsrv_stream *stream;
    table *table;
    const char *data; /* the request */
    size_t at;        /* it is understood up to here */
    int64_t missing;  /* words still to come; -1: not known yet */
    word *words;
    size_t count, room;
    const char *error;
    char got[4];
} client;

static int64_t refuse(client *c, const char *error) {
    c->error = error;
    return TCPSRV_EREFUSED;
}

static int add_word(client *c, size_t at, size_t size) {
    if (c->count == c->room) {
        size_t room = c->room ? c->room * 2 : 8;
        word *grown = realloc(c->words, room * sizeof *grown);
        if (!grown) return (int)refuse(c, "out of memory");
        c->words = grown;
        c->room = room;
    }
    c->words[c->count].at = at;
    c->words[c->count++].size = size;
    return 0;
}

/* Reads "*3\r\n" or "$5\r\n": its length; 0 where its end is still to come; -1 for no number. */
static int read_header(const char *data, size_t size, int64_t *number) {
    size_t sign = size > 1 && data[1] == '-', i = sign + 1;
    if (size > 3 && data[2] == '\r' && data[3] == '\n' && data[1] >= '0' && data[1] <= '9') {
        *number = data[1] - '0'; /* as nearly always */
        return 4;
    }
    for (*number = 0; i < size && i < 12 && data[i] >= '0' && data[i] <= '9'; i++)
        *number = *number * 10 + (data[i] - '0');
    if (i < size && (i == sign + 1 || data[i] != '\r')) return -1;
    if (i + 1 >= size) return 0;
    if (sign) *number = -*number;
    return data[i + 1] == '\n' ? (int)i + 2 : -1;
}

static int64_t find_line_end(client *c, const char *data, size_t size) {
    const char *end = memchr(data + c->at, '\n', size - c->at);
    c->at = end ? (size_t)(end - data) + 1 : size;
    if (c->at > MAX_INLINE) return refuse(c, "too big inline request");
    return end ? (int64_t)c->at : 0;
}

/* The word whose header stands at c->at. 1; 0: the header's end is still to come; a code. */
static int64_t find_word(client *c, const char *data, size_t size) {
    int64_t length;
    int n;
    if (data[c->at] != '$') {
        c->got[0] = c->got[2] = '\'';
        c->got[1] = data[c->at];
        return refuse(c, "expected '$', got ");
    }
    n = read_header(data + c->at, size - c->at, &length);
    if (n == 0) return 0;
    if (n < 0 || length < 0 || length > MAX_REQUEST) return refuse(c, "invalid bulk length");
    if (add_word(c, c->at + (size_t)n, (size_t)length) != 0) return TCPSRV_EREFUSED;
    c->at += (size_t)n + (size_t)length + 2;
    return 1;
}

/* The request's length, known as soon as its last word's header is there. Each call goes on where
   the one before stopped, so that a request in many pieces costs no more than a whole one. */
static int64_t find_end(const char *data, size_t size, void *arg) {
    client *c = arg;
    int64_t err;
    int n;
    if (*data != '*') return find_line_end(c, data, size);
    if (c->missing < 0) {
        n = read_header(data, size, &c->missing);
        if (n < 0 || (n && c->missing > MAX_WORDS)) return refuse(c, "invalid multibulk length");
        c->at = (size_t)n;
        if (n == 0) c->missing = -1;
        if (n == 0 || c->missing <= 0) return n;
    }
    for (; c->missing; c->missing--) {
        if (c->at >= size) return 0;
        if ((err = find_word(c, data, size)) <= 0) return err;
    }
    return (int64_t)c->at;
}

static int is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

static int split_line(client *c, size_t size) {
    size_t i = 0, from;
    for (;;) {
        while (i < size && is_space(c->data[i])) i++;
        if (i == size) return 0;
        for (from = i; i < size && !is_space(c->data[i]); ) i++;
        if (add_word(c, from, i - from) != 0) return TCPSRV_EREFUSED;
    }
}

static int next_request(client *c) {
    tcpsrv_bytes bytes;
    int err;
    if (c->room > KEEP_WORDS) {
        free(c->words);
        c->words = NULL;
        c->room = 0;
    }
    c->count = c->at = 0;
    c->missing = -1;
    c->error = "too big request";
    err = tcpsrv_await(c->stream, tcpsrv_frame(find_end, c, 0), &bytes);
    c->data = bytes.data;
    return err || *bytes.data == '*' ? err : split_line(c, bytes.size);
}

/* ---- replies --------------------------------------------------------------------------------- */

static int reply(client *c, const char *text) {
    return tcpsrv_write(c->stream, text, strlen(text));
}

static int reply_arity(client *c, const char *name) {
    return tcpsrv_printf(c->stream, "-ERR wrong number of arguments for '%s' command\r\n", name);
}

static size_t put_number(char *out, int64_t number) {
    uint64_t rest = number < 0 ? 0 - (uint64_t)number : (uint64_t)number;
    char digits[20];
    size_t i = sizeof digits, sign = number < 0;
    do digits[--i] = (char)('0' + rest % 10);
    while ((rest /= 10) != 0);
    if (sign) *out = '-';
    memcpy(out + sign, digits + i, sizeof digits - i);
    return sign + sizeof digits - i;
}

static size_t put_header(char *out, char type, int64_t number) {
    size_t n = put_number(out + 1, number) + 1;
    *out = type;
    memcpy(out + n, "\r\n", 2);
    return n + 2;
}

static int reply_number(client *c, char type, int64_t number) {
    char header[32];
    return tcpsrv_write(c->stream, header, put_header(header, type, number));
}

static int reply_bulk(client *c, tcpsrv_bytes bulk) {
    int err = reply_number(c, '$', (int64_t)bulk.size);
    if (!err) err = tcpsrv_write(c->stream, bulk.data, bulk.size);
    return err ? err : reply(c, "\r\n");
}

/* The value of a held entry, or nil; lets go of it. */
static int reply_entry(client *c, entry *e) {
    tcpsrv_bytes value;
    int err;
    if (!e) return reply(c, "$-1\r\n");
    value.data = e->key + e->key_size;
    value.size = e->size;
    err = reply_bulk(c, value);
    entry_release(e);
    return err;
}

/* ---- commands -------------------------------------------------------------------------------- */

static tcpsrv_bytes word_at(const client *c, size_t i) {
    tcpsrv_bytes bytes = { c->data + c->words[i].at, c->words[i].size };
    return bytes;
}

static entry *find_entry(const client *c, size_t i) {
    tcpsrv_bytes key = word_at(c, i);
    return table_find(c->table, key, hash_of(key))->entry;
}

static int equals(tcpsrv_bytes text, const char *name) {
    size_t i;
    for (i = 0; i < text.size && name[i] && (text.data[i] | 32) == name[i]; i++) continue;
    return i == text.size && !name[i];
}

static int run_ping(client *c) {
    if (c->count > 2) return reply_arity(c, "ping");
    return c->count == 2 ? reply_bulk(c, word_at(c, 1)) : reply(c, "+PONG\r\n");
}

static int run_echo(client *c) { return reply_bulk(c, word_at(c, 1)); }

static int run_get(client *c) {
    entry *e = find_entry(c, 1);
    if (e) e->references++;
    return reply_entry(c, e);
}

/* All are held before the first is sent: a reply that must wait still shows one moment. */
static int run_mget(client *c) {
    size_t i;
    int err;
    for (i = 1; i < c->count; i++) {
        c->words[i].found = find_entry(c, i);
        if (c->words[i].found) c->words[i].found->references++;
    }
    err = reply_number(c, '*', (int64_t)c->count - 1);
    for (i = 1; i < c->count; i++) {
        if (!err) err = reply_entry(c, c->words[i].found);
        else if (c->words[i].found) entry_release(c->words[i].found);
    }
    return err;
}

static int run_mset(client *c) {
    size_t i;
    if (c->count % 2 == 0) return reply_arity(c, "mset");
    for (i = 1; i < c->count; i += 2)
        if (table_set(c->table, word_at(c, i), word_at(c, i + 1)) != 0)
            return reply(c, "-ERR out of memory\r\n");
    return reply(c, "+OK\r\n");
}

static int run_set(client *c) {
    return c->count == 3 ? run_mset(c) : reply(c, "-ERR syntax error\r\n");
}

/* A number is what put_number would write: no spaces, no leading zeros, nothing out of range. */
static int read_number(const entry *e, int64_t *number) {
    const char *value = e->key + e->key_size;
    char text[24] = "";
    if (e->size > 20) return -EINVAL;
    memcpy(text, value, e->size);
    *number = strtoll(text, NULL, 10);
    return put_number(text, *number) == e->size && memcmp(text, value, e->size) == 0 ? 0 : -EINVAL;
}

static int run_incr(client *c) {
    entry *e = find_entry(c, 1);
    char digits[24];
    tcpsrv_bytes value = { digits, 0 };
    int64_t number = 0;
    if (e && read_number(e, &number) != 0)
        return reply(c, "-ERR value is not an integer or out of range\r\n");
    if (number == INT64_MAX) return reply(c, "-ERR increment or decrement would overflow\r\n");
    value.size = put_number(digits, ++number);
    if (table_set(c->table, word_at(c, 1), value) != 0) return reply(c, "-ERR out of memory\r\n");
    return reply_number(c, ':', number);
}

static int run_del(client *c) {
    int64_t removed = 0;
    size_t i;
    for (i = 1; i < c->count; i++) removed += table_remove(c->table, word_at(c, i));
    return reply_number(c, ':', removed);
}

static int run_exists(client *c) {
    int64_t found = 0;
    size_t i;
    for (i = 1; i < c->count; i++) found += find_entry(c, i) != NULL;
    return reply_number(c, ':', found);
}

static int run_dbsize(client *c) { return reply_number(c, ':', (int64_t)c->table->count); }

static int run_flushall(client *c) {
    size_t i;
    for (i = 0; i <= c->table->mask; i++) {
        if (c->table->slots[i].entry) entry_release(c->table->slots[i].entry);
        c->table->slots[i].entry = NULL;
    }
    c->table->count = 0;
    return reply(c, "+OK\r\n");
}

/* redis-benchmark asks for these two. */
static int run_config(client *c) {
    tcpsrv_bytes name = word_at(c, 2);
    if (!equals(word_at(c, 1), "get")) return reply(c, "-ERR CONFIG knows GET only\r\n");
    if (equals(name, "save")) return reply(c, "*2\r\n$4\r\nsave\r\n$0\r\n\r\n");
    if (equals(name, "appendonly")) return reply(c, "*2\r\n$10\r\nappendonly\r\n$2\r\nno\r\n");
    return reply(c, "*0\r\n");
}

/* redis-cli asks for COMMAND DOCS, and does without. */
static int run_command(client *c) {
    if (c->count > 1 && equals(word_at(c, 1), "count")) return reply_number(c, ':', COMMANDS);
    return reply(c, "*0\r\n");
}

static int run_quit(client *c) {
    int err = reply(c, "+OK\r\n");
    return err ? err : TCPSRV_EOF;
}

typedef struct command {
    const char *name;
    int arity; /* with the name itself; negative: that many or more */
    int (*run)(client *c);
} command;

static const command *find_command(tcpsrv_bytes name) {
    static const command commands[COMMANDS] = {
        { "get", 2, run_get }, { "set", -3, run_set }, { "incr", 2, run_incr },
        { "ping", -1, run_ping }, { "mset", -3, run_mset }, { "mget", -2, run_mget },
        { "del", -2, run_del }, { "exists", -2, run_exists }, { "echo", 2, run_echo },
        { "dbsize", 1, run_dbsize }, { "flushall", -1, run_flushall }, { "quit", -1, run_quit },
        { "config", -3, run_config }, { "command", -1, run_command }
    };
    int i = 0;
    while (i < COMMANDS && !equals(name, commands[i].name)) i++;
    return i < COMMANDS ? &commands[i] : NULL;
}

static size_t put_quoted(char *out, tcpsrv_bytes text, size_t most) {
    size_t i, n = text.size < most ? text.size : most;
    for (i = 0; i < n; i++) out[i + 1] = is_space(text.data[i]) ? ' ' : text.data[i];
    out[0] = out[n + 1] = '\'';
    return n + 2;
}

static int reply_unknown(client *c) {
    char name[132], words[300];
    size_t i, n = 0;
    name[put_quoted(name, word_at(c, 0), 128)] = '\0';
    for (i = 1; i < c->count && n < 128; i++) {
        n += put_quoted(words + n, word_at(c, i), 128 - n);
        words[n++] = ' ';
    }
    words[n] = '\0';
    return tcpsrv_printf(c->stream,
                         "-ERR unknown command %s, with args beginning with: %s\r\n", name, words);
}

static int execute(client *c) {
    const command *found = find_command(word_at(c, 0));
    int count = (int)c->count;
    if (!found) return reply_unknown(c);
    if (found->arity < 0 ? count < -found->arity : count != found->arity)
        return reply_arity(c, found->name);
    return found->run(c);
}

static int serve(tcpsrv_stream *stream, const tcpsrv_address *peer, void *user) {
    client c = { .stream = stream, .table = user };
    int err;
    (void)peer;
    while ((err = next_request(&c)) == 0)
        if (c.count && (err = execute(&c)) != 0) break;
    if (err == TCPSRV_EREFUSED || err == TCPSRV_ETOOBIG)
        err = tcpsrv_printf(stream, "-ERR Protocol error: %s%s\r\n", c.error, c.got);
    free(c.words);
    return err;
}

int main(int argc, char **argv) {
    table strings = { NULL, 0, 0 };
    tcpsrv_options options = { .handle_stream = serve, .user = &strings };
    tcpsrv *server;
    options.max_buffer_size = MAX_REQUEST;
    server = tcpsrv_new(&options);
    if (!server || table_resize(&strings, 1024) != 0 ||
        tcpsrv_listen(server, argc > 1 ? atoi(argv[1]) : 8888, "127.0.0.1") != 0) {
        fprintf(stderr, "%s\n", tcpsrv_last_error());
        return 1;
    }
    printf("listening on 127.0.0.1:%d\n", tcpsrv_port(server, 0));
    fflush(stdout);
    return tcpsrv_loop_run(tcpsrv_loop_default());
}
