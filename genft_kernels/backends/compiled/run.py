"""Compilers are run here, so that none of them waits for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

LAST_LINES = 25
GRACE = 2.0  # seconds in which a command may stop what it has started


class BuildError(RuntimeError):
    """Code cannot be compiled or loaded here; the message says why, with the compiler's last lines where one ran."""


def run(who: str, command: Sequence[str | Path], limit: float, folder: Path | None = None) -> str:
    """The output of a command, standard error joined. Temporary files go to `folder`, where it runs, if that is given.

    Raises:
        BuildError: `who` cannot be run, failed, or was not done in `limit` seconds, when all its processes are killed.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "TMPDIR": "."} if folder else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise BuildError(f"{who} cannot be run: {error}") from error
    with process:
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException as error:  # an interrupt, too, must not leave compilers behind
            _kill(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"{who} was not done after {limit:g} s") from error
            raise
    if process.returncode:
        last = "\n".join(output.strip().splitlines()[-LAST_LINES:])
        raise BuildError(f"{who} failed with exit status {process.returncode}: {last or '(no output)'}")
    return output


def _kill(process: subprocess.Popen[str]) -> None:
    """End a command and all that it has started. Ninja's compilers are in groups of their own, which it alone ends."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(GRACE)
