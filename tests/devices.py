"""Jobs on other numbers of devices and processes than the suite's own."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable

DEADLINE_S = 400


def environment(devices: int) -> dict[str, str]:
    """The suite's environment, with another number of devices."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])}


def outputs_of_job(command: Callable[[str, int], list[str]], num_processes: int = 2, devices: int = 1) -> list[list[str]]:
    """Lines that each process printed of a job over loopback, so many devices each; ``command`` takes the coordinator and the number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    with contextlib.ExitStack() as opened:
        processes = []
        for number in range(num_processes):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command(coordinator, number), env=environment(devices), **pipes)
            processes.append(opened.enter_context(process))
            opened.callback(process.kill)  # JAX catches SIGTERM
        ended = [process.communicate(timeout=DEADLINE_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, ended
    return [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in ended]  # Gloo speaks for itself
