/* The test harness. A test is a claim; each runs in a child process of its own with a watchdog, so
   that a crash or a hang fails that test alone, and must leave the open descriptors and the
   library's live bytes as they were. argv[1]: only tests whose name contains it. TEST_SLOW=n in
   the environment multiplies the watchdog's time, TEST_VERBOSE names the tests that pass,
   TEST_FIRST ends the program with the first test that fails. */
#ifndef TEST_H
#define TEST_H

#include "support.h"

#ifndef TEST_TIMEOUT_S
#define TEST_TIMEOUT_S 30
#endif
enum { TEST_SKIPPED = 77, TEST_ROOM = 16 / (int)sizeof(size_t), TEST_FD_SCAN = 20000 };

/* The sizes of the library's live blocks stand in front of them. test_fail_alloc_at = n lets the
   n-th allocation from then on fail, once; it is 0 again when that has happened. */
static pthread_mutex_t test_alloc_lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t test_live_bytes, test_fail_alloc_at;

TEST_PRIVATE void *test_realloc(void *memory, size_t size) {
    size_t *old = memory ? (size_t *)memory - TEST_ROOM : NULL, *block = NULL;
    int64_t growth = (int64_t)size - (old ? (int64_t)*old : 0);
    pthread_mutex_lock(&test_alloc_lock);
    if (!size) free(old);
    else if (test_fail_alloc_at <= 0 || --test_fail_alloc_at > 0)
        block = (size_t *)realloc(old, size + TEST_ROOM * sizeof *block);
    if (block || !size) test_live_bytes += growth;
    pthread_mutex_unlock(&test_alloc_lock);
    if (!block) return NULL;
    *block = size;
    return block + TEST_ROOM;
}

#define TCPSERVER_REALLOC(memory, size) test_realloc(memory, size)
#define TCPSERVER_IMPLEMENTATION
#include "../tcpserver.h"

/* Ends the test from wherever it is: a callback, a coroutine, a thread. */
TEST_PRIVATE void test_end(int status, const char *file, int line, const char *format, ...) {
    va_list arguments;
    printf("    %s:%d: ", file, line);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
    _exit(status);
}

TEST_PRIVATE void test_int(const char *file, int line, const char *text, intmax_t is,
                           intmax_t want) {
    if (is != want) test_end(1, file, line, "%s is %jd, expected %jd", text, is, want);
}

TEST_PRIVATE void test_mem(const char *file, int line, const char *text, const char *is,
                           size_t size, const char *want) {
    if (is && size == SIZE_MAX) size = strlen(is);
    if (is && size == strlen(want) && memcmp(is, want, size) == 0) return;
    test_end(1, file, line, "%s is \"%.*s\" (%zu bytes), expected \"%s\"", text,
             !is ? 6 : size < 200 ? (int)size : 200, is ? is : "(null)", is ? size : 0, want);
}

#define TEST_HERE(text) __FILE__, __LINE__, text
#define CHECK(cond) ((cond) ? (void)0 : test_end(1, TEST_HERE("%s"), #cond))
#define CHECK_INT(is, want) test_int(TEST_HERE(#is), (intmax_t)(is), (intmax_t)(want))
#define CHECK_STR(is, want) test_mem(TEST_HERE(#is), is, SIZE_MAX, want)
#define CHECK_MEM(is, size, want) test_mem(TEST_HERE(#is), is, size, want)
#define SKIP(reason) test_end(TEST_SKIPPED, TEST_HERE("skipped: %s"), reason)

typedef struct test_case {
    const char *name;
    void (*run)(void);
} test_case;
#define TEST(function) { #function, function }
#define TEST_COUNT(tests) ((int)(sizeof(tests) / sizeof *(tests)))

static void test_child(const test_case *test) {
    const char *slow = getenv("TEST_SLOW");
    int fds = test_open_descriptors(TEST_FD_SCAN);
    int64_t bytes = test_live_bytes;
    setpgid(0, 0);
    alarm((unsigned)(TEST_TIMEOUT_S * (slow && atoi(slow) > 0 ? atoi(slow) : 1)));
    test->run();
    CHECK_INT(test_open_descriptors(TEST_FD_SCAN), fds);
    CHECK_INT(test_live_bytes, bytes);
    exit(0); /* not _exit: leak checkers and coverage counters report then */
}

/* 0: passed, 1: failed, 2: skipped. What the test left running is ended with it. */
static int test_run(const test_case *test) {
    int status = 0, code, signo;
    pid_t pid;
    fflush(stdout);
    pid = fork();
    if (pid == 0) test_child(test);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) continue;
    if (pid > 0) kill(-pid, SIGKILL);
    code = pid > 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    signo = pid > 0 && WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    if (code == 0 && getenv("TEST_VERBOSE")) printf("ok   %s\n", test->name);
    if (code == TEST_SKIPPED) printf("skip %s\n", test->name);
    if (signo) printf("FAIL %s: signal %d (%s)%s\n", test->name, signo, strsignal(signo),
                      signo == SIGALRM ? ", the watchdog" : "");
    else if (code != 0 && code != TEST_SKIPPED) printf("FAIL %s: exit %d\n", test->name, code);
    return code == TEST_SKIPPED ? 2 : code != 0;
}

TEST_PRIVATE int test_main(int argc, char **argv, const test_case *tests, int count) {
    int counts[3] = { 0, 0, 0 }, i;
    for (i = 0; i < count && !(counts[1] && getenv("TEST_FIRST")); i++)
        if (argc < 2 || strstr(tests[i].name, argv[1])) counts[test_run(&tests[i])]++;
    printf("%d passed, %d failed, %d skipped\n", counts[0], counts[1], counts[2]);
    return counts[1] != 0 || counts[0] + counts[2] == 0;
}

#endif
