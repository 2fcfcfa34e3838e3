"""A loaded model that outlasts its child processes: started when needed, again where one died, adapters set again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from converters.errors import Error, LlamaError, system_reason
from safelora_gguf.smoke.parent.process import LlamaProcess
from safelora_gguf.smoke.parent.replies import Loaded
from safelora_gguf.smoke.protocol import AdapterChoice, ModelOptions

MOST_KILLED = 3
"""Children, one after another, that may be killed from outside while they load the same."""

_Stamped = tuple[AdapterChoice, tuple[int, int, int] | None]


class LoadedModel:
    """What llama.cpp could not load once is not tried again: the same error is raised at once. An adapter file that was
    written anew is another adapter. A child that is killed from outside meanwhile says nothing of what it loaded: it is
    replaced.

    Attributes:
        loads: how often the model was loaded.
        loaded: what the child said of it; None before the first time.
        notes: on children that were killed while they loaded, and replaced.
    """

    def __init__(self, options: ModelOptions, timeout: float, command: Sequence[str]) -> None:
        self.loads = 0
        self.loaded: Loaded | None = None
        self.notes: list[str] = []
        self._options = options
        self._timeout = timeout
        self._command = command
        self._process: LlamaProcess | None = None
        self._set: tuple[_Stamped, ...] | None = None  # in the child that runs; None: unknown
        self._unloadable: Error | None = None
        self._unusable: dict[tuple[_Stamped, ...], Error] = {}

    @property
    def pid(self) -> int | None:
        """The child's, while there is one."""
        return self._process.pid if self._process is not None and self._process.alive else None

    @property
    def hung(self) -> bool:
        """The last child was stopped because it hung."""
        return self._process is not None and self._process.hung

    def running(self) -> LlamaProcess:
        """A child with the model loaded and any adapters; raises what `LlamaProcess.load` does."""
        if self._unloadable is not None:
            raise self._unloadable
        if self._process is None or not self._process.alive:
            try:
                return self._tried(self._load)
            except Error as error:
                self._unloadable = error
                raise
        return self._process

    def ready(self, adapters: Sequence[AdapterChoice]) -> LlamaProcess:
        """A child with the model and these adapters, which it is asked to set where it has not; raises what
        `LlamaProcess` does."""
        wanted = _stamped(adapters)
        if wanted in self._unusable:
            raise self._unusable[wanted]

        def adapted() -> LlamaProcess:
            process = self.running()
            if self._set != wanted:
                self._set = None
                process.set_adapters(adapters, self._timeout)
                self._set = wanted
            return process

        try:
            return self._tried(adapted)
        except Error as error:
            if self._unloadable is None:
                self._unusable[wanted] = error
            raise

    def lost_at_work(self, adapters: Sequence[AdapterChoice]) -> bool:
        """After an error: the child died of what it was asked, not of its files, and did not just refuse."""
        return self.pid is None and self._unloadable is None and _stamped(adapters) not in self._unusable

    def _load(self) -> LlamaProcess:
        self.close()
        process = self._process = self._started()
        self._set = ()
        self.loaded = process.load(self._options, self._timeout)
        self.loads += 1
        return process

    def _tried(self, load: Callable[[], LlamaProcess]) -> LlamaProcess:
        """Again, where the child is killed from outside meanwhile: where memory runs out that ends, too."""
        for _ in range(MOST_KILLED - 1):
            try:
                return load()
            except Error as error:
                if self._process is None or not self._process.killed:
                    raise
                self.notes.append(f"llama.cpp was killed while it loaded, and started again: {error}")
        return load()

    def _started(self) -> LlamaProcess:
        try:
            return LlamaProcess(self._command)
        except OSError as error:
            told = f"the process for llama.cpp could not be started: {system_reason(error)}"
            raise LlamaError(told, file=self._options.model) from error

    def close(self) -> None:
        if self._process is not None:
            self._process.close()


def _stamped(adapters: Sequence[AdapterChoice]) -> tuple[_Stamped, ...]:
    return tuple((adapter, _stamp(Path(adapter.path))) for adapter in adapters)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Tells a file from the one that stood there before; None: there is none, which llama.cpp shall say."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
