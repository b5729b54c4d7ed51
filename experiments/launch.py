"""Runs an experiment in several processes of this machine.

python -m experiments.launch --num_processes=4 -- experiments.train --num_devices=4 --size=tiny

What a process prints is shown with its number before each line. If one fails the others are
stopped, and so they are by Ctrl-C.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from absl import app, flags

STOP_S = 5.0  # how long the processes may take to stop before they are killed

NUM_PROCESSES = flags.DEFINE_integer("num_processes", 2, "Processes to run.", lower_bound=1)
DEVICES_PER_PROCESS = flags.DEFINE_integer(
    "devices_per_process",
    1,
    "Devices of each: the first process has the machine's first ones, and so on.",
    lower_bound=1,
)
PIN = flags.DEFINE_bool("pin", False, "Give each process a core of its own.")

Child = subprocess.Popen[str]


def main(argv: list[str]) -> None:
    """Starts the processes and waits for them; exits with 1 if one fails."""
    if len(argv) < 2 or argv[1].startswith("-"):
        raise app.UsageError("name an experiment: [flags] -- experiments.train [its flags]")
    for number in signal.SIGINT, signal.SIGTERM:  # a shell's background jobs ignore the former
        signal.signal(number, _interrupt)
    cores = os.sched_getaffinity(0)
    if PIN.value and NUM_PROCESSES.value > len(cores):
        raise app.UsageError(
            f"--pin: {NUM_PROCESSES.value} processes, but {len(cores)} cores; start fewer, or drop "
            "--pin"
        )
    address = f"127.0.0.1:{free_port()}"
    children: list[Child] = []
    try:
        for index in range(NUM_PROCESSES.value):
            children.append(start(argv[1:], address, index))
        failure = wait(children)
    except KeyboardInterrupt:
        failure = "interrupted"
    finally:
        stop(children)
    if failure is not None:
        sys.exit(f"experiments.launch: {failure}; all processes are stopped")


def free_port() -> int:
    """Returns a port that nothing listens on now."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


def start(command: Sequence[str], address: str, index: int) -> Child:
    """Starts one process of `command`, a module and its flags."""
    module, *arguments = command
    first = index * DEVICES_PER_PROCESS.value
    local = ",".join(str(first + i) for i in range(DEVICES_PER_PROCESS.value))
    cores = sorted(os.sched_getaffinity(0))
    return subprocess.Popen(
        [
            *(sys.executable, "-u", "-m", module, *arguments),
            f"--coordinator_address={address}",
            f"--process_count={NUM_PROCESSES.value}",
            f"--process_index={index}",
            f"--local_device_ids={local}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that Ctrl-C reaches this process only, which stops them
        preexec_fn=(lambda: pin(cores[index])) if PIN.value else None,
    )


def pin(core: int) -> None:
    """Gives this process a core, before anything else, since what it starts inherits that.

    There no thread interrupts another when it wakes up: that of Gloo, which finds a lock taken,
    would spin for milliseconds while the one that it has interrupted holds the lock.
    """
    os.sched_setaffinity(0, {core})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def wait(children: Sequence[Child]) -> str | None:
    """Shows what the processes print until all have ended, or one has failed: returns how."""
    ended: queue.Queue[int] = queue.Queue()
    for index, child in enumerate(children):
        threading.Thread(target=_show, args=(child, index, ended), daemon=True).start()
    for _ in children:
        index = ended.get()
        code = children[index].returncode
        if code < 0:
            return f"process {index} was ended by {signal.Signals(-code).name}"
        if code > 0:
            return f"process {index} failed with exit status {code}; its output says why"
    return None


def stop(children: Sequence[Child]) -> None:
    """Ends the processes that still run, whatever else this one is told."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    for child in children:
        child.terminate()
    end_s = time.monotonic() + STOP_S
    for child in children:
        try:
            child.wait(max(0.0, end_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _show(child: Child, index: int, ended: queue.Queue[int]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        # One write a line: the lines of two processes must not mix.
        sys.stdout.write(f"[{index}] {line.rstrip()}\n")
        sys.stdout.flush()
    child.wait()
    ended.put(index)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    app.run(main)
