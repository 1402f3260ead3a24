#!/usr/bin/env python3
"""Measures the library's servers beside others that do the same work.

    bench.py run       everything, interleaved, into BUILD/bench/results.jsonl; prints the report
    bench.py part NAME one part of it
    bench.py count     instructions and system calls a request, exact
    bench.py lines     the ten lines of the library that take most instructions of a request
    bench.py check     the same compared with tests/bench/expected.tsv; record writes that file
    bench.py plot      tables and pictures in tests/bench/results from the last run

Run by make bench and its kin, which build the programs. BUILD is where they are; ONLY names servers
and WORK works, all without them; ROUNDS says how many, PEER_ROUNDS how many of them for others than
raw epoll and ours. A run is made of parts that take less than two minutes: ALONE is a command that
each is run through, such as one that waits until the machine is quiet, and RESUME goes on with a
run that was interrupted.
"""

import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import report  # noqa: E402

BUILD = os.path.join(os.environ.get("BUILD") or os.path.join(HERE, "../../build"), "bench")
RESULTS = os.path.join(BUILD, "results.jsonl")
EXPECTED = os.path.join(HERE, "expected.tsv")
ONLY = os.environ.get("ONLY", "").split()
WORK = os.environ.get("WORK", "").split()
ROUNDS = int(os.environ.get("ROUNDS") or 15)
PEER_ROUNDS = int(os.environ.get("PEER_ROUNDS") or min(ROUNDS, 6))
ALONE = os.environ.get("ALONE", "").split()
RESUME = os.environ.get("RESUME")

OURS = ["ours_callbacks", "ours_coroutines"]
SCRIPTS = {
    "go": ["env", "GOMAXPROCS=1", os.path.join(BUILD, "go")],
    "node": ["node", os.path.join(HERE, "servers/node.js")],
    "tornado": ["/usr/bin/python3", os.path.join(HERE, "servers/tornado_echo.py")],
}
SERVERS = ["raw_epoll"] + OURS + ["libuv", "libevent", "libev"] + list(SCRIPTS)

REDIS = {
    "redis-server": ["redis-server", "--save", "", "--bind", "127.0.0.1", "--port"],
    "redis.c": [os.path.join(BUILD, "redis")],
}

FILE_SIZE = 64 << 20

LONGER = " warm=400 ms=700" # where all connections together take that long for one request each

# name: mode of the server, arguments of load
WORKS = {
    "1-connection": ("line", "work=keep connections=1"),
    "50-connections": ("line", "work=keep connections=50"),
    "1000-connections": ("line", "work=keep connections=1000"),
    "10000-connections": ("line", "work=keep connections=10000" + LONGER),
    "16-deep": ("line", "work=keep depth=16"),
    "64-deep": ("line", "work=keep depth=64"),
    "16-KB-lines": ("line", "work=keep size=16384"),
    "bulk": ("chunk", "work=keep connections=8 size=65536 depth=4"),
    "peer-closes": ("line", "work=peer connections=16"),
    "server-closes": ("once", "work=server connections=16"),
    "write": ("write", f"work=download connections=4 size={FILE_SIZE}"),
    "sendfile": ("file", f"work=download connections=4 size={FILE_SIZE}"),
    "15000-idle": ("line", "work=keep connections=50 idle=15000"),
    "two-cores": ("fork", "work=keep connections=100"),
}
NOT_ABLE = {"libuv": {"sendfile"}, "node": {"sendfile"}, "tornado": {"sendfile"}}

# name: mode of the server, arguments of lockstep, requests a round, rounds
COUNTED = {
    "1-connection": ("line", "keep 1 64 1".split(), 1, 200),
    "50-connections": ("line", "keep 50 64 1".split(), 50, 40),
    "16-deep": ("line", "keep 50 64 16".split(), 800, 10),
    "32-deep": ("line", "keep 50 64 32".split(), 1600, 10),
    "16-KB-lines": ("line", "keep 50 16384 1".split(), 50, 10),
    "peer-closes": ("line", "peer 64".split(), 1, 100),
    "server-closes": ("once", "server 64".split(), 1, 100),
}

# name: what redis-benchmark calls it, a request and its reply
COMMANDS = {
    "ping": ("ping_mbulk", "*1\r\n$4\r\nPING\r\n", "+PONG\r\n"),
    "set": ("set", "*3\r\n$3\r\nSET\r\n$16\r\nkey:000000001234\r\n$3\r\nVXK\r\n", "+OK\r\n"),
    "get": ("get", "*2\r\n$3\r\nGET\r\n$16\r\nkey:000000001234\r\n", "$3\r\nVXK\r\n"),
}
DEPTHS = (1, 16)
REDIS_COUNTED = {
    f"{name}-{depth}-deep": ("", ["talk", "50", str(depth), request, reply], 50 * depth, 800 // depth)
    for name, (_, request, reply) in COMMANDS.items() for depth in DEPTHS
}

GROWTH = [10, 100, 1000, 10000, 15000]
GROWTH_ROUNDS = 3
PIECES = [1, 64, 4096, 65536]
LONGEST_LINE = 64 << 20
IDLE = 10000


# ---- processes -----------------------------------------------------------------------------------

# A network of our own where that is allowed: nobody else's ports, and no congestion control that
# paces (bbr does, and hides the server's cost).
def enter_own_network():
    if "BENCH_NETWORK" in os.environ:
        return
    setup = "ip link set lo up && sysctl -qw net.ipv4.tcp_congestion_control=reno && exec \"$@\""
    words = ["unshare", "-n", "sh", "-c", setup, "sh"]
    allowed = subprocess.run(words + ["true"], stderr=subprocess.DEVNULL).returncode == 0
    os.environ["BENCH_NETWORK"] = "of its own, reno" if allowed else "shared"
    if allowed:
        os.execvp(words[0], words + [sys.executable] + sys.argv)


def free_port():
    """Below the ports that the system gives to clients."""
    for _ in range(1000):
        port = random.randrange(12000, 30000)
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    sys.exit("no free port")


def wait_until_listening(port, process):
    for _ in range(2000):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.01)
    sys.exit(f"{process.args}: does not listen")


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def program_of(process):
    """The program's pid: the tool's own under valgrind, the tool's child under strace."""
    return (children(process.pid) or [process.pid])[0]


def workers(process, server):
    """They may still have to be forked."""
    for _ in range(200):
        pids = children(process.pid)
        if len(pids) == {"raw_epoll": 1, "ours_coroutines": 2}.get(server, 0):
            break
        time.sleep(0.01)
    return pids


def end(process, program=None):
    if process.poll() is None:
        os.kill(program or process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def allow_descriptors():
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def cores():
    """For the server, for the load."""
    allowed = sorted(os.sched_getaffinity(0))
    return {allowed[0]}, {allowed[-1]}


def start(server, mode, tool=(), prepare=None):
    port = free_port()
    words = SCRIPTS.get(server) or [os.path.join(BUILD, server)]
    if mode == "fork" and server in OURS:
        words = [os.path.join(BUILD, "prefork"), str(port), "2"]
    elif server in REDIS:
        words = REDIS[server] + [str(port)]
    elif mode == "fork" and server == "go":
        words = ["env", "GOMAXPROCS=2", words[-1], str(port), "line"]
    else:
        words = words + [str(port), mode]
    if mode in ("file", "write"):
        words.append(os.path.join(BUILD, "file"))

    def before():
        allow_descriptors()
        if prepare:
            prepare()
        elif mode != "fork":
            os.sched_setaffinity(0, cores()[0])

    process = subprocess.Popen(list(tool) + words, preexec_fn=before, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_until_listening(port, process)
    return process, port


def can(server, work):
    if work == "two-cores":
        return server in ("raw_epoll", "ours_coroutines", "go")
    return work not in NOT_ABLE.get(server, ())


def installed(server):
    if server == "node":
        return shutil.which("node") is not None
    if server == "tornado":
        return subprocess.run(["/usr/bin/python3", "-c", "import tornado"],
                              stderr=subprocess.DEVNULL).returncode == 0
    return os.path.exists(os.path.join(BUILD, server))


def chosen_servers():
    names = ONLY or SERVERS
    for name in names:
        if not installed(name):
            print(f"no {name} here", flush=True)
    return [name for name in names if installed(name)]


def first_line(*words):
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout.split("\n")[0]
    except OSError:
        return ""


# ---- exact counts --------------------------------------------------------------------------------

# Client and server share a core, and the server never preempts the client: what the client sends
# before it waits is one batch for the server. As a real-time process, where that is allowed, the
# client is not preempted by anybody else either.
def below_the_client():
    os.sched_setaffinity(0, cores()[0])
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def above_the_server():
    allow_descriptors()
    os.sched_setaffinity(0, cores()[0])
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pass


def set_key(port):
    _, request, reply = COMMANDS["set"]
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.sendall(request.encode())
        if one.recv(100) != reply.encode():
            sys.exit("SET: not the reply that was expected")


def run_counted(server, mode, work, tool):
    process, port = start(server, mode, tool, below_the_client)
    program = program_of(process)
    try:
        if server in REDIS:
            set_key(port)
        subprocess.run([os.path.join(BUILD, "lockstep"), str(port), str(program)] + work,
                       check=True, preexec_fn=above_the_server, timeout=300)
        process.wait(30)
    finally:
        end(process, program)


def instructions(server, mode, work):
    with tempfile.NamedTemporaryFile("r") as log:
        run_counted(server, mode, work, ["valgrind", "--tool=callgrind", "--log-file=" + log.name,
                                         "--callgrind-out-file=/dev/null"])
        return int(re.search(r"Collected : (\d+)", log.read()).group(1))


def system_calls(server, mode, work):
    with tempfile.NamedTemporaryFile("r") as log:
        run_counted(server, mode, work, ["strace", "-f", "-qq", "-c", "-U", "calls,name",
                                         "-o", log.name])
        lines = re.findall(r"^ *(\d+) (\w+)", log.read(), re.M)
        return {name: int(calls) for calls, name in lines if name != "total"}


# Of one request: what a run of twice the length has more than one of the simple length, so that
# start and end do not count.
def instructions_each(server, mode, work, requests, rounds):
    if server in ("go", "node", "tornado"):
        return None
    more = instructions(server, mode, work + [str(2 * rounds)])
    return (more - instructions(server, mode, work + [str(rounds)])) / (requests * rounds)


def system_calls_each(server, mode, work, requests, rounds):
    few = system_calls(server, mode, work + [str(rounds)])
    many = system_calls(server, mode, work + [str(2 * rounds)])
    each = {name: (many[name] - few.get(name, 0)) / (requests * rounds) for name in many}
    return {name: calls for name, calls in each.items() if calls}


def count(servers):
    for server in servers:
        counted = REDIS_COUNTED if server in REDIS else COUNTED
        for work in [work for work in counted if work in WORK] or counted:
            calls = system_calls_each(server, *counted[work])
            yield {"kind": "count", "server": server, "work": work,
                   "instructions": instructions_each(server, *counted[work]),
                   "system_calls": sum(calls.values()),
                   "by_name": " ".join(f"{name} {calls[name]:.2f}" for name in
                                       sorted(calls, key=calls.get, reverse=True))}


def print_counts(servers):
    print(f"{'':16} {'':16} {'instructions':>12} {'system calls':>12}   a request")
    for row in count(servers):
        print("{server:16} {work:16} {instructions:12.1f} {system_calls:12.3f}   {by_name}"
              .format(**dict(row, instructions=row["instructions"] or 0)), flush=True)


# ---- where the time goes -------------------------------------------------------------------------

HEADER = os.path.join(HERE, "../../tcpserver.h")


def line_costs(server, mode, work):
    """Instructions by (function, file, line), from what callgrind writes; an inlined function's
    lines are its own, under the function that they are inlined in."""
    costs, function, file, called = {}, "", "", False
    with tempfile.NamedTemporaryFile("r") as out:
        run_counted(server, mode, work, ["valgrind", "--tool=callgrind", "--log-file=/dev/null",
                                         "--callgrind-out-file=" + out.name, "--compress-pos=no",
                                         "--compress-strings=no"])
        for line in out:
            name, equals, value = line.rstrip("\n").partition("=")
            if equals and name in ("fl", "fi", "fe"):
                file = os.path.basename(value)
            elif equals and name == "fn":
                function = value
            elif equals and name == "calls":
                called = True # the next line says what the call cost, which is not the line's own
            elif line[0].isdigit():
                place, cost = line.split()[:2]
                if not called:
                    key = function, file, int(place)
                    costs[key] = costs.get(key, 0) + int(cost)
                called = False
    return costs


def lines_each(server, mode, work, requests, rounds):
    few, many = (line_costs(server, mode, work + [str(n * rounds)]) for n in (1, 2))
    return {key: (many[key] - few.get(key, 0)) / (requests * rounds) for key in many}


def summed(costs, key_of):
    sums = {}
    for key, cost in costs.items():
        if key_of(key):
            sums[key_of(key)] = sums.get(key_of(key), 0) + cost
    return sorted(sums.items(), key=lambda item: -item[1])


def most_expensive(server, work, most=10):
    """Rows of functions, the C library's among them, and of the library's own lines."""
    with open(HEADER) as file:
        text = [""] + file.read().split("\n")
    costs = lines_each(server, *COUNTED[work])
    yield {"kind": "lines", "server": server, "work": work, "of": "all",
           "instructions": sum(costs.values())}
    for function, cost in summed(costs, lambda key: re.sub(r"'\d+$", "", key[0]))[:most]:
        yield {"kind": "lines", "server": server, "work": work, "of": "function",
               "text": function, "instructions": cost}
    lines = summed(costs, lambda key: key[1] == "tcpserver.h" and key[2])
    for number, cost in lines[:most]:
        yield {"kind": "lines", "server": server, "work": work, "of": "line", "number": number,
               "text": text[number].strip(), "instructions": cost}


def print_lines(servers):
    for server in servers:
        for work in WORK or ["50-connections"]:
            print("\n".join(report.lines_tables(most_expensive(server, work))), flush=True)


# ---- kept ----------------------------------------------------------------------------------------

ALLOWED = 1.03


def compiler():
    """Its version; gcc says by which name it was called, which may be cc."""
    line = first_line(*(os.environ.get("CC") or "cc").split(), "--version")
    return re.sub(r"^\S+ \(", "gcc (", line)


def record():
    with open(EXPECTED, "w") as file:
        file.write(f"# {compiler()}, {platform.machine()}\n")
        file.write("# server\twork\tinstructions a request\tsystem calls a request\n")
        for row in count(OURS):
            file.write("{server}\t{work}\t{instructions:.1f}\t{system_calls:.3f}\n".format(**row))
    print(f"written: {os.path.relpath(EXPECTED)}")


def check():
    for tool in ("valgrind", "strace"):
        if not shutil.which(tool):
            print(f"skip bench-check: no {tool}\n0 passed, 0 failed, 1 skipped")
            return 1 if os.environ.get("CI") or os.environ.get("TEST_NO_SKIP") else 0
    with open(EXPECTED) as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    expected = {(words[0], words[1]): (float(words[2]), float(words[3])) for words in lines[2:]}
    same = lines[0] == [f"# {compiler()}, {platform.machine()}"]
    passed, failed, skipped = 0, 0, 0
    if not same:
        print(f"skip instructions: counted with {lines[0][0][2:]}")
        skipped = 1
    for row in count(OURS):
        before = expected[row["server"], row["work"]]
        for name, allowed in (("instructions", before[0]), ("system_calls", before[1])):
            if name == "instructions" and not same:
                continue
            figure = f"{row['server']}, {row['work']}: {row[name]:.2f} {name} a request"
            if row[name] > allowed * ALLOWED:
                print(f"FAIL {figure}, expected {allowed:.2f} ({row['by_name']})", flush=True)
                failed += 1
            else:
                passed += 1
                if row[name] * ALLOWED < allowed:
                    print(f"better: {figure}, stored are {allowed:.2f}: make bench-check RECORD=1")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


# ---- the run -------------------------------------------------------------------------------------

pending = [] # a part's rows are written together, when it has ended


def keep(row):
    pending.append(row)


def write_pending():
    with open(RESULTS, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in pending))
    pending.clear()


def load(server, mode, work, ms=250):
    process, port = start(server, mode)
    try:
        pids = [process.pid] + (workers(process, server) if mode == "fork" else [])
        words = [os.path.join(BUILD, "load"), f"port={port}", f"ms={ms}", "warm=80",
                 "pids=" + ",".join(map(str, pids))] + work.split()
        on = cores()[0] | cores()[1] if mode == "fork" else cores()[1]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120,
                              preexec_fn=lambda: os.sched_setaffinity(0, on))
        if done.returncode:
            return {"error": done.stderr.strip()}
        row = json.loads(done.stdout)
        return row if row["cpu_us"] > 0 else {"error": "the server's CPU is not known"}
    finally:
        end(process)


def run_round(number, servers):
    for work, (mode, words) in WORKS.items():
        if WORK and work not in WORK:
            continue
        able = [server for server in servers if can(server, work)]
        # Each round begins with another one.
        for i in range(len(able)):
            server = able[(i + number) % len(able)]
            row = load(server, mode, words)
            keep(dict(kind="load", work=work, server=server, round=number, **row))


def process_cpu(pid):
    return time.clock_gettime((~pid << 3) | 2) # the kernel's name for a process's CPU clock


def run_redis_benchmark(port, program, test, depth, core):
    """What it says, and what both used. The client's CPU is known when it has ended."""
    requests = 48000 if depth == 1 else 480000
    words = ["redis-benchmark", "-p", str(port), "-c", "50", "-P", str(depth), "-n", str(requests),
             "-r", "10000", "-t", test, "--csv"]
    before, began = process_cpu(program), time.monotonic()
    client = subprocess.Popen(words, stdout=subprocess.PIPE, text=True,
                              preexec_fn=lambda: os.sched_setaffinity(0, core))
    figures = client.stdout.read().strip().split("\n")[-1].replace('"', "").split(",")
    used = os.wait4(client.pid, 0)[2]
    seconds, server_cpu = time.monotonic() - began, process_cpu(program) - before
    client.returncode = 0
    client_cpu = used.ru_utime + used.ru_stime
    return {"rate": float(figures[1]), "cpu_us": server_cpu * 1e6 / requests,
            "client_us": client_cpu * 1e6 / requests, "p50_us": float(figures[4]) * 1e3,
            "p99_us": float(figures[6]) * 1e3, "server_use": server_cpu / seconds,
            "client_use": client_cpu / seconds}


def run_redis(number, server, depth, place):
    process, port = start(server, "")
    try:
        for name, (test, _, _) in COMMANDS.items():
            core = cores()[place == "apart"]
            row = run_redis_benchmark(port, process.pid, test, depth, core)
            keep(dict(kind="load", work=f"{name}-{depth}-deep-{place}", server=server, round=number,
                      **row))
    finally:
        end(process)


def redis_round(number):
    for place in ("together", "apart"):
        for depth in DEPTHS:
            for i in range(len(REDIS)):
                run_redis(number, list(REDIS)[(i + number) % len(REDIS)], depth, place)


def private_memory(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        text = file.read()
    return 1024 * sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.M))


def wait_for_descriptors(pid, at_most):
    for _ in range(400):
        if len(os.listdir(f"/proc/{pid}/fd")) <= at_most:
            break
        time.sleep(0.05)
    time.sleep(0.5)


def crowd(port, connections):
    process = subprocess.Popen([os.path.join(BUILD, "crowd"), str(port), str(connections), "1", "1"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               preexec_fn=allow_descriptors)
    if not process.stdout.readline():
        sys.exit("crowd: failed")
    return process


def measure_memory(server):
    """After one echo on each connection, and after all of them are closed."""
    process, port = start(server, "line")
    try:
        time.sleep(0.5 if server in SCRIPTS else 0.05)
        crowd(port, 3).communicate()
        time.sleep(0.2)
        descriptors, before = len(os.listdir(f"/proc/{process.pid}/fd")), private_memory(process.pid)
        many = crowd(port, IDLE)
        with_many = private_memory(process.pid)
        many.communicate()
        wait_for_descriptors(process.pid, descriptors)
        return {"kind": "memory", "server": server, "each": (with_many - before) / IDLE,
                "kept": private_memory(process.pid) - before}
    finally:
        end(process)


GROWING = [("raw_epoll", "line")] + [(server, mode) for server in OURS for mode in ("line", "timed")]


def growth_round(number):
    """The cost of a request with the number of connections."""
    for connections in GROWTH:
        for server, mode in GROWING:
            row = load(server, mode, f"work=keep connections={connections}" +
                       (LONGER if connections >= 10000 else ""))
            keep(dict(kind="growth", server=server, mode=mode, connections=connections,
                      round=number, **row))


def count_growth(server, mode):
    for connections in GROWTH:
        keep({"kind": "growth", "server": server, "mode": mode, "connections": connections,
              "instructions": instructions_each(server, mode, f"keep {connections} 64 1".split(),
                                                connections, max(1, 1000 // connections))})


def measure_inside(*arguments):
    done = subprocess.run([os.path.join(BUILD, "inside")] + [str(word) for word in arguments],
                          capture_output=True, text=True, check=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, cores()[0]))
    for line in done.stdout.splitlines():
        keep(dict(kind="inside", **json.loads(line)))


def versions():
    found = {"libuv": first_line("pkg-config", "--modversion", "libuv"),
             "libevent": first_line("pkg-config", "--modversion", "libevent"),
             "libev": first_line("dpkg-query", "-W", "-f", "${Version}", "libev-dev"),
             "Go": first_line("go", "version").replace("go version ", ""),
             "Node": first_line("node", "--version"),
             "Tornado": first_line("/usr/bin/python3", "-c",
                                   "import tornado; print(tornado.version)"),
             "redis": first_line("redis-server", "--version")}
    found["redis"] = "".join(re.findall(r"v=([\d.]+)", found["redis"]))
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def keep_method():
    with open("/proc/cpuinfo") as file:
        processor = re.search(r"^model name\s*: (.*)$", file.read(), re.M)
    keep({"kind": "method", "rounds": ROUNDS, "peer_rounds": PEER_ROUNDS,
          "growth_rounds": GROWTH_ROUNDS,
          "processor": processor.group(1) if processor else platform.machine(),
          "cores": len(os.sched_getaffinity(0)), "system": f"Linux {platform.release()}",
          "compiler": compiler(), "versions": versions(),
          "network": os.environ["BENCH_NETWORK"]})


def keep_lines(server):
    for row in most_expensive(server, "50-connections"):
        keep(row)


def prepare():
    if os.path.exists(RESULTS):
        os.remove(RESULTS)
    with open(os.path.join(BUILD, "file"), "wb") as file:
        subprocess.run([os.path.join(BUILD, "load"), "work=file", f"size={FILE_SIZE}"],
                       stdout=file, check=True)
    keep_method()


def parts_of_rounds(servers):
    ours = [server for server in servers if server in ["raw_epoll"] + OURS]
    peers_by = max(1, ROUNDS // PEER_ROUNDS)
    if not WORK or set(WORK) & set(WORKS):
        for n in range(ROUNDS):
            with_peers = n % peers_by == 0 and n // peers_by < PEER_ROUNDS
            yield f"round-{n + 1}", run_round, (n, servers if with_peers else ours)
    if not WORK or "redis" in WORK:
        if shutil.which("redis-server") and shutil.which("redis-benchmark"):
            for n in range(ROUNDS):
                yield f"redis-{n + 1}", redis_round, (n,)
            for server in REDIS:
                yield f"count-{server}", lambda one: [keep(row) for row in count([one])], (server,)
        else:
            print("no redis here")


def parts_of_figures(servers):
    if not WORK or "count" in WORK:
        for server in servers:
            yield f"count-{server}", lambda one: [keep(row) for row in count([one])], (server,)
    if not WORK or "lines" in WORK:
        for server in [server for server in servers if server in OURS]:
            yield f"lines-of-{server}", keep_lines, (server,)
    if not WORK or "memory" in WORK:
        for server in servers:
            yield f"memory-{server}", lambda one: keep(measure_memory(one)), (server,)
    if not WORK or "growth" in WORK:
        for n in range(GROWTH_ROUNDS):
            yield f"growth-{n + 1}", growth_round, (n,)
        for server, mode in GROWING:
            yield f"growth-{server}-{mode}", count_growth, (server, mode)
        for piece in PIECES:
            yield f"lines-{piece}", measure_inside, ("lines", piece, LONGEST_LINE)
    if not WORK or "growth" in WORK or "switch" in WORK:
        yield "switch", measure_inside, ("switch",)


def parts():
    """Names, functions and arguments, in their order."""
    servers = chosen_servers()
    return list(parts_of_rounds(servers)) + list(parts_of_figures(servers))


def run_part(name):
    began = time.monotonic()
    for one, function, arguments in parts():
        if one == name:
            function(*arguments)
            keep({"kind": "part", "part": name, "seconds": round(time.monotonic() - began, 1)})
            write_pending()
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def run():
    if not RESUME or not os.path.exists(RESULTS):
        prepare()
        write_pending()
    done = [row["part"] for row in report.of_kind(report.read(RESULTS), "part")]
    names = [name for name, _, _ in parts() if name not in done]
    for name in names:
        words = ALONE + [sys.executable, os.path.abspath(__file__), "part", name]
        subprocess.run(words, check=True)
    report.print_report(report.read(RESULTS))


# ---- command line --------------------------------------------------------------------------------

def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "plot":
        return report.plot(RESULTS)
    enter_own_network()
    if command == "count":
        print_counts(ONLY or ["raw_epoll"] + OURS)
    elif command == "lines":
        print_lines(ONLY or OURS)
    elif command == "check":
        return check()
    elif command == "record":
        record()
    elif command == "run":
        run()
    elif command == "part":
        run_part(sys.argv[2])
    else:
        sys.exit(__doc__)
    return 0


sys.exit(main())
