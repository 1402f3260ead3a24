#!/usr/bin/env python3
"""Measures the library's servers beside others that do the same work.

    bench.py count [NAME...]    instructions and system calls a request, exact

Run by make bench-count, which builds the programs. BUILD is where they are.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(os.environ.get("BUILD") or os.path.join(HERE, "../../build"), "bench")

OURS = ["ours_callbacks", "ours_coroutines"]


# ---- processes -----------------------------------------------------------------------------------

# A network of our own where that is allowed: nobody else's ports, and no congestion control that
# paces (bbr does, and hides the server's cost).
def enter_own_network():
    if "BENCH_NETWORK" in os.environ:
        return
    setup = "ip link set lo up && sysctl -qw net.ipv4.tcp_congestion_control=reno && exec \"$@\""
    words = ["unshare", "-n", "sh", "-c", setup, "sh"]
    allowed = subprocess.run(words + ["true"], stderr=subprocess.DEVNULL).returncode == 0
    os.environ["BENCH_NETWORK"] = "own" if allowed else "shared"
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
    for _ in range(600):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    sys.exit(f"{process.args}: does not listen")


def program_of(process):
    """The program's pid: the tool's own under valgrind, the tool's child under strace."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return int((file.read().split() or [process.pid])[0])


def end(process):
    if process.poll() is None:
        os.kill(program_of(process), signal.SIGTERM)
        process.wait()


# ---- exact counts --------------------------------------------------------------------------------

# Client and server share a core, and the server never preempts the client: what the client sends
# before it waits is one batch for the server. As a real-time process, where that is allowed, the
# client is not preempted by anybody else either.
def below_the_client():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def above_the_server():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pass


# name, mode of the server, arguments of lockstep, requests a round, rounds
COUNTED = {
    "1 connection": ("line", "keep 1 64 1", 1, 200),
    "50 connections": ("line", "keep 50 64 1", 50, 40),
    "16 deep": ("line", "keep 50 64 16", 800, 10),
    "16 KB lines": ("line", "keep 50 16384 1", 50, 10),
    "peer closes": ("line", "peer 64", 1, 100),
    "server closes": ("once", "server 64", 1, 100),
}


def run_counted(server, mode, work, tool):
    port = free_port()
    process = subprocess.Popen(tool + [os.path.join(BUILD, server), str(port), mode],
                               preexec_fn=below_the_client, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port, process)
        subprocess.run([os.path.join(BUILD, "lockstep"), str(port), str(program_of(process))] +
                       work.split(), check=True, preexec_fn=above_the_server, timeout=120)
        process.wait(20)
    finally:
        end(process)


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


def counted(server, name):
    """Instructions, system calls and the calls by name, each for one request: what a run of twice
    the length has more than one of the simple length, so that start and end do not count."""
    mode, work, requests, rounds = COUNTED[name]
    more = requests * rounds
    short, long = f"{work} {rounds}", f"{work} {2 * rounds}"
    used = (instructions(server, mode, long) - instructions(server, mode, short)) / more
    few, many = system_calls(server, mode, short), system_calls(server, mode, long)
    by_name = {call: (many[call] - few.get(call, 0)) / more for call in many}
    by_name = {call: number for call, number in by_name.items() if number}
    return used, sum(by_name.values()), by_name


def count(servers):
    print(f"{'':16} {'':16} {'instructions':>12} {'system calls':>12}   a request")
    for server in servers or ["raw_epoll"] + OURS:
        for name in COUNTED:
            used, calls, by_name = counted(server, name)
            detail = " ".join(f"{call} {by_name[call]:.2f}"
                              for call in sorted(by_name, key=by_name.get, reverse=True))
            print(f"{server:16} {name:16} {used:12.1f} {calls:12.3f}   {detail}", flush=True)


# ---- command line --------------------------------------------------------------------------------

def main():
    command, words = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    enter_own_network()
    if command == "count":
        count(words)
    else:
        sys.exit(__doc__)


main()
