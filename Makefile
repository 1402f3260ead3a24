# make run        builds the echo server and starts it on port 8888
# make test       everything; the last line is the sum
# make unit       the tests of the header's parts alone, such as make unit SAN=address,undefined
# make sim        the simulated kernel: SEED=n replays one seed with a trace, SEEDS=n runs so many,
#                 from FROM=n on; POLLER=epoll, kqueue, netbsd or poll (all where many are run);
#                 TLS=1: with TLS (BearSSL)
# make exhaustive short scenarios on it, in which every call and allocation fails in its turn
# make fuzz       clang's libFuzzer over what strangers send and what files hold, and over the
#                 simulated kernel's chances
# make mutants    the header broken in one place at a time, each of which the tests must notice;
#                 ONLY="stream- poll-forget" for some of tests/mutants
# make coverage   how much of the header the units and the simulated kernel run (gcc, gcov)
# make certs      a key and a certificate for the TLS examples, into build
# make bench      the library beside others in one run, such as make bench ONLY="raw_epoll libuv"
# make bench-count, bench-lines, bench-check, bench-plot: see tests/bench/method.md
# make examples, make lint, make install, make clean

CC = cc
CFLAGS = -O1 -g
SAN =
BUILD = build
PREFIX = /usr/local
JOBS = 2

WARN = -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-qual \
       -Wstrict-prototypes -Werror
SANITIZE = $(if $(SAN),-fsanitize=$(SAN) -fno-sanitize-recover=all -fno-omit-frame-pointer)
COMPILE = $(CC) -std=c99 $(WARN) $(CFLAGS) $(SANITIZE)

UNITS = $(patsubst tests/%.c,$(BUILD)/%,$(sort $(wildcard tests/test_*.c)))
EXAMPLES = $(patsubst examples/%.c,$(BUILD)/examples/%,$(sort $(wildcard examples/*.c)))

# TLS needs BearSSL (Debian: libbearssl-dev); without it what needs TLS is left out.
BEARSSL := $(shell echo '\#include <bearssl.h>' | $(CC) -E - >/dev/null 2>&1 && echo yes)
TLS_EXAMPLES = $(BUILD)/examples/tls_echo $(BUILD)/examples/https
TLS_UNITS = $(foreach unit,test_tls test_tls_faults test_tornado,\
    $(BUILD)/$(unit) $(BUILD)/poll/$(unit))
ifeq ($(BEARSSL),yes)
$(TLS_EXAMPLES): LIBS = -lbearssl
$(TLS_UNITS): LIBS = -DTEST_HAS_BEARSSL -DTEST_CERTIFICATES='"$(abspath $(BUILD))/certificates"' \
                     -lbearssl
$(TLS_UNITS): | $(BUILD)/certificates
else
EXAMPLES := $(filter-out $(TLS_EXAMPLES),$(EXAMPLES))
endif

# The same claims hold for the poller that systems without a better one get.
ifeq ($(shell uname -s),Linux)
POLL_UNITS = $(patsubst $(BUILD)/%,$(BUILD)/poll/%,$(UNITS))
# The library on a simulated kernel, once for each poller.
SIM_PLAIN = $(BUILD)/sim_epoll $(BUILD)/sim_kqueue $(BUILD)/sim_netbsd $(BUILD)/sim_poll
SIM = $(if $(TLS),,$(SIM_PLAIN)) $(if $(filter yes,$(BEARSSL)),$(addsuffix _tls,$(SIM_PLAIN)))
endif
TLS =
SIM_SOURCES = $(wildcard tests/sim/*.[ch] tests/sim/include/sys/*.h)
POLLER = epoll
SEEDS = 1000
FROM = 1

export CC CFLAGS BUILD JOBS ROUNDS PEER_ROUNDS ONLY WORK ALONE RESUME RECORD

all: examples

run: $(BUILD)/echo
	@echo "An echo server listens on port 8888. Try it from another terminal: nc 127.0.0.1 8888"
	@echo "(or: telnet 127.0.0.1 8888). Each line that you send comes back. Ctrl-C ends the server."
	@$(BUILD)/echo

$(BUILD)/echo: examples/echo.c tcpserver.h
	@mkdir -p $(BUILD)
	$(CC) examples/echo.c -o $@

examples: $(EXAMPLES)

$(BUILD)/examples/%: examples/%.c tcpserver.h $(BUILD)/flags
	@mkdir -p $(BUILD)/examples
	$(COMPILE) $< -o $@ $(LIBS)

$(BUILD)/test_%: tests/test_%.c $(wildcard tests/*.h) tcpserver.h $(BUILD)/flags
	@rm -f $@
	$(COMPILE) -pthread $< -o $@ $(LIBS)

$(BUILD)/poll/test_%: tests/test_%.c $(wildcard tests/*.h) tcpserver.h $(BUILD)/flags
	@mkdir -p $(BUILD)/poll
	@rm -f $@
	$(COMPILE) -DTCPSERVER_USE_POLL -pthread $< -o $@ $(LIBS)

# Without openssl the directory is empty, and the tests that need it skip.
$(BUILD)/certificates: tests/tools/certs.sh
	@mkdir -p $(BUILD)
	-@sh tests/tools/certs.sh $@.new || mkdir -p $@.new
	@rm -rf $@ && mv $@.new $@ && touch $@

# A certificate for this machine that nobody vouches for, for the examples.
certs: $(BUILD)/certificate.pem

$(BUILD)/certificate.pem:
	@mkdir -p $(BUILD)
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 365 \
	    -subj /CN=localhost -addext 'subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1' \
	    -addext extendedKeyUsage=serverAuth -keyout $(BUILD)/key.pem -out $@

# kqueue twice: with the types of most systems, and with NetBSD's.
$(BUILD)/sim_epoll: SIM_POLLER = EPOLL
$(BUILD)/sim_kqueue: SIM_POLLER = KQUEUE
$(BUILD)/sim_netbsd: SIM_POLLER = KQUEUE -DSIM_NETBSD
$(BUILD)/sim_poll: SIM_POLLER = POLL
$(BUILD)/sim_%_tls: SIM_TLS = -DTCPSERVER_TLS
$(BUILD)/sim_%_tls: LIBS = -lbearssl
$(BUILD)/sim_epoll_tls: SIM_POLLER = EPOLL
$(BUILD)/sim_kqueue_tls: SIM_POLLER = KQUEUE
$(BUILD)/sim_netbsd_tls: SIM_POLLER = KQUEUE -DSIM_NETBSD
$(BUILD)/sim_poll_tls: SIM_POLLER = POLL

$(BUILD)/sim_%: $(SIM_SOURCES) tcpserver.h $(BUILD)/flags
	@mkdir -p $(BUILD)
	@rm -f $@
	$(COMPILE) -Itests/sim/include -DTCPSERVER_USE_$(SIM_POLLER) $(SIM_TLS) -pthread \
	    tests/sim/sim.c -o $@ $(LIBS)

sim: $(SIM)
ifdef SEED
	@$(BUILD)/sim_$(POLLER)$(if $(TLS),_tls) seed $(SEED)
else
	@for program in $(SIM); do echo "$$program:"; $$program seeds $(FROM) $(SEEDS) || exit 1; done
endif

exhaustive: $(SIM)
	@for program in $(SIM); do echo "$$program:"; $$program exhaustive || exit 1; done

# A change of compiler or flags makes all programs old.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@echo '$(COMPILE)' | cmp -s - $@ || echo '$(COMPILE)' > $@

programs: $(UNITS) $(POLL_UNITS)

# -k: a test program that does not compile fails by name, and the others still run.
unit:
	-@$(MAKE) -k -j$(JOBS) --no-print-directory programs
	@sh tests/run.sh $(UNITS) $(POLL_UNITS)

test:
	-@$(MAKE) -k -j$(JOBS) --no-print-directory programs $(SIM)
	@BESIDE=tests/matrix.sh sh tests/run.sh $(UNITS) $(POLL_UNITS) tests/tornado.sh tests/sim.sh \
		tests/e2e.sh

bench bench-count bench-lines bench-check bench-plot:
	@$(MAKE) --no-print-directory -f tests/bench/Makefile $@

# SECONDS_EACH: how long each target.
fuzz:
	@FUZZ_SEED='$(FUZZ_SEED)' SECONDS_EACH='$(SECONDS_EACH)' sh tests/fuzz.sh

coverage: $(if $(filter yes,$(BEARSSL)),$(BUILD)/certificates)
	@sh tests/coverage.sh

mutants: $(if $(filter yes,$(BEARSSL)),$(BUILD)/certificates)
	@sh tests/mutants.sh $(ONLY)

lint:
	@sh tests/lint.sh

install:
	mkdir -p '$(DESTDIR)$(PREFIX)/include'
	cp tcpserver.h '$(DESTDIR)$(PREFIX)/include/tcpserver.h'
	chmod 644 '$(DESTDIR)$(PREFIX)/include/tcpserver.h'

clean:
	rm -rf '$(BUILD)'

FORCE:
.PHONY: all run certs examples programs unit sim exhaustive fuzz mutants coverage test bench \
        bench-count bench-lines bench-check bench-plot lint install clean FORCE
