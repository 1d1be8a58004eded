"""A real server in a process of its own, on a free port of the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Final

import httpx

__all__ = [
    "PORT",
    "RunningServer",
    "ServerNotStarted",
    "free_port",
    "running_command",
    "running_server",
    "serve_command",
]

PORT: Final = "{port}"
"""What stands for the port in a command."""

_ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.02
_START_LIMIT_S = 120.0
_END_LIMIT_S = 30.0


class ServerNotStarted(RuntimeError):
    """The server ended, or was not ready in time; the message is one line and ends with its last words."""


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes] = field(repr=False)
    live_s: float
    """From the start of the process to the first answer to a probe."""
    ready_s: float
    """From the start of the process to readiness: models loaded and warm."""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory now, and its peak so far."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return {
            name: int(fields[key].split()[0]) * 1024
            for name, key in (("rss_bytes", "VmRSS"), ("peak_rss_bytes", "VmHWM"))
        }


@contextmanager
def running_server(
    models: Sequence[Path] = (), *, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Start `lamamba serve` on `models` (none: the shipped ones), wait until it is ready, end it after use.

    `environment`: further LAMAMBA_* variables; those of this process are not passed on.
    """
    options = [argument for model in models for argument in ("--models", str(model.resolve()))]
    with running_command(serve_command(options), environment=environment) as server:
        yield server


def serve_command(options: Sequence[str]) -> list[str]:
    """The command of `lamamba serve` with further options."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", PORT, "--log-level", "warning"]
    return [*command, *options]


@contextmanager
def running_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cores: Collection[int] = (),
    log: IO[bytes] | None = None,
) -> Iterator[RunningServer]:
    """Start a server that has our probes, wait until it is ready, end it after use.

    `{port}` in the command stands for a free port; it runs in the folder of this process, and imports from
    the repository's root. What it writes to stderr goes to `log`; without one it is repeated when the server
    has ended. `cores`: those it may run on, where there are any. Raises ServerNotStarted where it ends, or is
    not ready after two minutes.
    """
    port = str(free_port())
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LAMAMBA_")}
    arguments = [argument.replace(PORT, port) for argument in command]
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with nullcontext(log) if log is not None else TemporaryFile() as written:
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                arguments,
                env=inherited | {"PYTHONPATH": os.pathsep.join(paths)} | dict(environment or {}),
                stderr=written,
                start_new_session=True,
            )
        except OSError as error:
            raise ServerNotStarted(f"{arguments[0]}: it cannot be run ({error.strerror})") from error
        failure: ServerNotStarted | None = None
        try:
            if cores:  # before it has a second thread: those inherit it
                os.sched_setaffinity(process.pid, cores)
            url = f"http://127.0.0.1:{port}"
            live_s = _wait_for(process, f"{url}/health/live", started)
            ready_s = _wait_for(process, f"{url}/health/ready", started)
            yield RunningServer(url=url, process=process, live_s=live_s, ready_s=ready_s)
        except ServerNotStarted as error:
            failure = error
        finally:
            _end(process)
            written.seek(0)
            lines = written.read().decode(errors="replace").splitlines(keepends=True)
            last = lines.pop().strip() if failure and lines else ""
            if log is None:
                sys.stderr.writelines(lines)
        if failure:
            raise ServerNotStarted(f"{failure}: {last}" if last else str(failure))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server, and whatever it leaves behind of processes that it has started."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait_for(process: subprocess.Popen[bytes], url: str, started: float) -> float:
    """Seconds from `started` until `url` answers 200. Raises ServerNotStarted where it never does."""
    while time.monotonic() - started < _START_LIMIT_S:
        if process.poll() is not None:
            raise ServerNotStarted(f"the server ended with {process.returncode} before it was ready")
        try:
            if httpx.get(url, timeout=5.0, trust_env=False).status_code == 200:
                return time.monotonic() - started
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(_POLL_S)
    raise ServerNotStarted(f"the server was not ready after {_START_LIMIT_S:.0f} s")


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])
