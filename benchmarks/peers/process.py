"""A worker process as the benchmark sees it: started when it is needed, stopped between its turns.

Between turns a worker gets no processor at all (SIGSTOP): threads that spin while they wait would
slow down whoever is measured. It runs in a session of its own, so that an interrupt reaches the
benchmark alone, which then ends every worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker answered with an error, ended, or took too long."""


class WorkerProcess:
    """One worker. What it writes to stderr goes to the end of `log`.

    A worker that ends or takes too long is started anew by the next `start`.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float
    ) -> None:
        self.command, self.environment, self.log = list(command), dict(environment), log
        self.timeout = timeout
        self.process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, load: Mapping[str, Any]) -> Answer:
        """Start the process and have it load.

        Raises:
            WorkerError: it cannot.
        """
        self.close()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self._unread = b""
        try:
            return self.ask({"command": "load", **load})
        except BaseException:
            self.close()
            raise

    def ask(self, command: Mapping[str, Any]) -> Answer:
        """Let the worker run until it has answered, and return the answer.

        Raises:
            WorkerError: the answer is an error; or the worker ended or took too long, and is gone.
        """
        if self.process is None or self.process.stdin is None:
            raise WorkerError("the worker is not running")
        try:
            self._signal(signal.SIGCONT)
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
            line = self._read_line(time.monotonic() + self.timeout)
        except OSError:
            line = b""
        except BaseException:
            self.close()
            raise
        if not line:
            status = self._end()
            raise WorkerError(f"the worker ended with {status}, see {self.log.name}")
        self._signal(signal.SIGSTOP)
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def memory_bytes(self) -> int | None:
        """Resident memory of the process itself; None where the system does not tell."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, AttributeError):
            return None
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """End the process and its children, at once."""
        self._end()

    def _end(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)  # one that ended by itself has a status of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        return process.returncode

    def _signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _read_line(self, deadline: float) -> bytes:
        """The next line, or nothing if the worker has ended.

        Raises:
            WorkerError: none came in time.
        """
        assert self.process is not None
        assert self.process.stdout is not None
        stream = self.process.stdout.fileno()
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                raise WorkerError(f"no answer in {self.timeout:g} seconds")
            part = os.read(stream, 1 << 16)
            if not part:
                return b""
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line
