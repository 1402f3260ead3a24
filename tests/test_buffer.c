/* The output queue: what was appended leaves in order, whatever the sizes and the steps. */
#include "test.h"

static tcpsrv_loop *loop;
static tcpsrv__queue queue;
static size_t appended, consumed;

static char pattern(size_t at) {
    return (char)(at * 2654435761u >> 11);
}

static void begin(void) {
    loop = tcpsrv_loop_default();
    memset(&queue, 0, sizeof queue);
    appended = consumed = 0;
}

static void end(void) {
    tcpsrv__queue_drop(loop, &queue, 0);
    CHECK_INT(queue.size, 0);
    CHECK(queue.last == NULL);
    CHECK_INT(tcpsrv_loop_free(loop), 0);
}

static void append(size_t size) {
    static char data[100000];
    size_t i;
    for (i = 0; i < size; i++) data[i] = pattern(appended + i);
    CHECK_INT(tcpsrv__queue_append(loop, &queue, data, size), 0);
    appended += size;
}

static void consume(size_t size) {
    tcpsrv__queue_consume(loop, &queue, size);
    consumed += size;
}

/* The size is right, and what a send would be given is what comes next. */
static void check(void) {
    struct iovec pieces[TCPSRV__SEND_PIECES];
    size_t total, at = consumed, j;
    int i, n = tcpsrv__queue_gather(&queue, pieces, &total);
    CHECK_INT(queue.size, appended - consumed);
    CHECK(total == queue.size || n == TCPSRV__SEND_PIECES || total == TCPSRV__SEND_SIZE);
    for (i = 0; i < n; i++)
        for (j = 0; j < pieces[i].iov_len; j++, at++)
            if (((const char *)pieces[i].iov_base)[j] != pattern(at)) CHECK_INT(at, -1);
    CHECK_INT(at - consumed, total);
}

static int blocks(void) {
    const tcpsrv__block *block = tcpsrv__queue_first(&queue);
    int n = 0;
    for (; block; block = tcpsrv__queue_next(&queue, block)) n++;
    return n;
}

static unsigned seed = 1;

static size_t random_below(size_t limit) {
    seed = seed * 1103515245u + 12345u;
    return (seed >> 8) % limit;
}

static void many_small_appends_are_gathered_in_order(void) {
    int i;
    begin();
    for (i = 0; i < 3000; i++) {
        append(random_below(20));
        check();
        consume(random_below(16) < queue.size ? random_below(4) % (queue.size + 1) : queue.size);
        check();
    }
    consume(queue.size);
    check();
    end();
}

static void large_and_small_appends_keep_their_order(void) {
    int i;
    begin();
    for (i = 0; i < 300; i++) {
        append(random_below(10) ? random_below(300) : random_below(100000));
        check();
        consume(random_below(queue.size + 1));
        check();
    }
    end();
}

static void small_appends_share_a_block_and_it_goes_when_it_is_out(void) {
    begin();
    append(9);
    append(9);
    CHECK_INT(blocks(), 1);
    consume(10);
    CHECK_INT(blocks(), 1);
    consume(8);
    CHECK_INT(blocks(), 0);
    append(50000);
    append(11);
    CHECK(blocks() <= 2);
    append(1);
    CHECK(blocks() <= 2);
    consume(queue.size - 2);
    CHECK_INT(blocks(), 1);
    consume(2);
    CHECK_INT(blocks(), 0);
    end();
}

static void an_append_without_memory_leaves_the_queue_as_it_was(void) {
    static const char data[200000];
    size_t size;
    begin();
    append(10);
    size = queue.size;
    test_fail_alloc_at = 1;
    CHECK_INT(tcpsrv__queue_append(loop, &queue, data, sizeof data), -ENOMEM);
    CHECK_INT(test_fail_alloc_at, 0);
    CHECK_INT(queue.size, size);
    check();
    end();
}

int main(int argc, char **argv) {
    static const test_case tests[] = {
        TEST(many_small_appends_are_gathered_in_order),
        TEST(large_and_small_appends_keep_their_order),
        TEST(small_appends_share_a_block_and_it_goes_when_it_is_out),
        TEST(an_append_without_memory_leaves_the_queue_as_it_was),
    };
    return test_main(argc, argv, tests, TEST_COUNT(tests));
}
