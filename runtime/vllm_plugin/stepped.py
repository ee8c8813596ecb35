"""The installed vLLM's scheduler as an engine of `viisim.conform`, behind a pair of pipes."""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.vllm_plugin import version_warning
from viisim.conform import Difference, EngineFailed, Observation, first_difference, recorded
from viisim.errors import InputError
from viisim.golden import GoldenConfig, GoldenRequest, Scenario, write_scenario

_SCRIPT = Path(__file__).with_name("golden.py")


class VllmProcess:
    """An interpreter with vLLM that runs `golden.py`; a context manager.

    It says its version first; then its answers, one a call, are the engine's results and its
    state after them.
    """

    version: str
    """Of the vLLM that answers."""

    def __init__(self, python: Path) -> None:
        """Starts `python`. Raises InputError when that fails; entering does so without vLLM."""
        self._python = python
        self._log = tempfile.TemporaryFile(  # noqa: SIM115 - lives as long as the process
            mode="w+", encoding="utf-8", errors="replace"
        )
        try:
            self._process = subprocess.Popen(
                [python, _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise InputError(
                f"--python {python}: cannot be started ({error.strerror}); "
                "name the interpreter of an environment with vLLM"
            ) from error

    def __enter__(self) -> Self:
        try:
            self.version = self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def warning(self) -> str | None:
        """One line where this vLLM is not the tested one."""
        return version_warning(self.version)

    def call(self, method: str, argument: object = None) -> Any:
        """One call of the engine's. Raises InputError when vLLM fails or the process ends."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps([method, argument]) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # that it has ended, and why, is said when no answer comes
        return self._answer()

    def _answer(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise InputError(f"--python {self._python}: {self._last_words()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise InputError(
                f"--python {self._python}: says {line.strip()!r}, which an interpreter of Python "
                "would not; name the one that has vLLM"
            ) from None
        if isinstance(answer, dict) and "error" in answer:
            raise InputError(f"this vLLM cannot be driven: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"has ended, saying: {lines[-1]}" if lines else "has ended and said nothing"

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class SteppedVllm:
    """A `viisim.conform.StepEngine`, numbering blocks too, that is vLLM itself."""

    def __init__(self, process: VllmProcess, config: GoldenConfig) -> None:
        self._process = process
        self._state: dict[str, Any] = {}
        self._call("new", _asked_for(config))

    @property
    def configuration(self) -> dict[str, Any]:
        """The scheduler's values, by the names of a trace's config line."""
        configuration: dict[str, Any] = self._call("configuration")
        return configuration

    @property
    def has_requests(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._state["has_requests"])

    @property
    def batches_in_flight(self) -> int:
        """Batches scheduled whose output is not processed yet."""
        return int(self._state["batches_in_flight"])

    @property
    def free_blocks(self) -> int:
        """Blocks that no request uses, cached ones included."""
        return int(self._state["free_blocks"])

    def freeq_crc(self) -> int:
        """CRC-32 of the free queue's block numbers."""
        return int(self._call("freeq_crc"))

    def add(self, request: GoldenRequest) -> None:
        """A request arrives."""
        self._call("add", asdict(request))

    def abort(self, request_id: str) -> None:
        """End a request that is running or waiting."""
        self._call("abort", request_id)

    def schedule(self) -> Observation:
        """Form the next batch."""
        return Observation(**self._call("schedule"))

    def update(self) -> list[str]:
        """Process the output of the oldest batch in flight."""
        finished: list[str] = self._call("update")
        return finished

    def _call(self, method: str, argument: object = None) -> Any:
        answer = self._process.call(method, argument)
        self._state = answer["state"]
        return answer["result"]


def _asked_for(config: GoldenConfig) -> dict[str, Any]:
    """The scenario's values, with those that its rules do not read filled in."""
    values = asdict(config)
    if values["max_num_seqs"] is None:
        values["max_num_seqs"] = config.max_num_active_seqs
    if values["watermark"] is None:
        # vLLM takes the whole blocks of this share; half a block more survives the rounding.
        whole = config.watermark_blocks
        values["watermark"] = (whole + 0.5) / config.num_blocks if whole else 0.0
    return values


def record_golden(vllm: VllmProcess, scenario: Scenario, path: Path) -> Difference | None:
    """Write the trace that this vLLM makes of a scenario; where it leaves the scenario's own
    steps first, the free queue's order included.

    Raises InputError when vLLM fails.
    """
    engine = SteppedVllm(vllm, scenario.config)
    try:
        trace = recorded(scenario, engine)
    except EngineFailed as failure:
        raise InputError(f"{scenario.name}: {failure}: {failure.__cause__}") from failure
    write_scenario(path, trace, engine.configuration)
    return first_difference(scenario.steps, trace.steps, ignored=frozenset())
