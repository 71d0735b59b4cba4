"""Opens TensorRT-RTX or TensorRT and says what it can do. Sole importer of either.

Two libraries have nearly one API: ``tensorrt_rtx`` (workstation RTX GPUs; compiles engines with no
GPU present) and ``tensorrt`` 10 and 11 (data-centre GPUs). They differ in what they offer and in
the values of their enums, so members are looked up by name, and what only one has is a capability.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trtseg.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Module to the command that installs it; the first that is installed is the default.
LIBRARIES = {
    "tensorrt_rtx": "pip install 'trtseg[rtx]'",
    "tensorrt": "pip install 'trtseg[tensorrt]'",
}

_ERRORS = ("ERROR", "INTERNAL_ERROR")


@dataclass
class Messages:
    """What a library logged, in order.

    Attributes
    ----------
    lines : list of (str, str)
        Severity by name (``VERBOSE``, ``INFO``, ``WARNING``, ``ERROR``, ``INTERNAL_ERROR``), text.
    interrupted : bool
        Whether Ctrl-C came while the library was calling back; whoever called it must then raise
        KeyboardInterrupt, which cannot pass through the library itself.
    """

    lines: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def errors(self) -> list[str]:
        """The texts of what failed."""
        return [text for severity, text in self.lines if severity in _ERRORS]

    @property
    def reason(self) -> str:
        """The first failure on one line, for an error message."""
        return " ".join(self.errors[0].split()) if self.errors else "no reason given"

    def raise_if_interrupted(self) -> None:
        """Raise the KeyboardInterrupt that came during a callback, once."""
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Library:
    """An opened library.

    Attributes
    ----------
    trt : module
    name : str
        ``tensorrt_rtx`` or ``tensorrt``.
    version : str
    """

    trt: Any
    name: str
    version: str

    @property
    def compiles_without_gpu(self) -> bool:
        """Whether engines are compiled for named compute capabilities, with no GPU present."""
        return hasattr(self.trt, "ComputeCapability")

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What it can be asked to compile for, such as ``8.6``; empty where it cannot be asked."""
        members = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        names = [name[2:] for name in members if name.startswith("SM")]
        return tuple(f"{name[:-1]}.{name[-1]}" for name in names)

    @property
    def has_user_allocation(self) -> bool:
        """Whether an engine can promise to allocate nothing while it runs."""
        return self._member("BuilderFlag", "REQUIRE_USER_ALLOCATION") is not None

    @property
    def has_runtime_cache(self) -> bool:
        """Whether kernels are compiled at run time and can be kept (`IRuntimeConfig`)."""
        return self._attribute("IRuntimeConfig", "create_runtime_cache")

    @property
    def has_cuda_graph_strategy(self) -> bool:
        """Whether the library captures and replays CUDA graphs itself."""
        return self._attribute("IRuntimeConfig", "cuda_graph_strategy")

    @property
    def has_engine_validity(self) -> bool:
        """Whether a serialised engine can be judged for this machine without loading it."""
        return self._attribute("Runtime", "get_engine_validity")

    @property
    def has_progress_monitor(self) -> bool:
        """Whether a build reports its progress and can be cancelled."""
        return hasattr(self.trt, "IProgressMonitor")

    def flag(self, enum: str, name: str) -> Any:
        """Member of an enum by name.

        Raises
        ------
        DeviceError
            This version of the library lacks it.
        """
        member = self._member(enum, name)
        if member is None:
            raise DeviceError(
                f"{self.name} {self.version} has no {enum}.{name}",
                expected="a version of the library that trtseg supports",
                action=LIBRARIES[self.name],
            )
        return member

    def logger(self, messages: Messages) -> Any:
        """Make a logger of the library that keeps what it is told in `messages`, printing nothing.

        The caller holds the logger for as long as any object made with it lives.
        """
        base = self.trt.ILogger

        class Logger(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                try:
                    messages.lines.append((severity.name, text))
                except KeyboardInterrupt:
                    messages.interrupted = True

        return Logger()

    def progress_monitor(self, messages: Messages, report: Callable[[str, float], None]) -> Any:
        """Make a progress monitor that reports the outermost phases and lets Ctrl-C end a build.

        Parameters
        ----------
        messages : Messages
        report : callable
            Called with a phase's name and the part of it that is done, 0 to 1.
        """
        base = self.trt.IProgressMonitor

        class Monitor(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)
                self._steps: dict[str, int] = {}

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                if parent is None:
                    self._steps[name] = steps

            def step_complete(self, name: str, step: int) -> bool:
                if name in self._steps:
                    self._tell(name, min(1.0, (step + 1) / max(1, self._steps[name])))
                return not messages.interrupted

            def phase_finish(self, name: str) -> None:
                if self._steps.pop(name, None) is not None:
                    self._tell(name, 1.0)

            def _tell(self, name: str, part: float) -> None:
                try:
                    report(name, part)
                except KeyboardInterrupt:
                    messages.interrupted = True

        return Monitor()

    def _member(self, enum: str, name: str) -> Any:
        members = getattr(getattr(self.trt, enum, None), "__members__", {})
        return members.get(name)

    def _attribute(self, kind: str, name: str) -> bool:
        return hasattr(getattr(self.trt, kind, None), name)


def installed_libraries() -> list[str]:
    """Names of the libraries that are installed, without importing them."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def open_library(name: str | None = None) -> Library:
    """Import a library.

    Parameters
    ----------
    name : str, optional
        ``tensorrt_rtx`` or ``tensorrt``; default the first that is installed.

    Raises
    ------
    UsageError
        The name is neither.
    DeviceError
        It is not installed, or cannot be loaded; the message has the command that installs it.
    """
    if name is not None and name not in LIBRARIES:
        raise UsageError(f"library {name!r}", expected=" or ".join(LIBRARIES))
    installed = installed_libraries()
    chosen = name or next(iter(installed), None)
    if chosen is None or chosen not in installed:
        wanted = LIBRARIES if chosen is None else {chosen: LIBRARIES[chosen]}
        raise DeviceError(
            f"{' and '.join(wanted)}: not installed",
            expected="TensorRT-RTX (workstation GPUs) or TensorRT 10 or 11 (data-centre GPUs)",
            action="install it: " + " or ".join(wanted.values()),
        )
    try:
        trt = _import(chosen)
    except (ImportError, OSError) as error:  # its shared libraries are missing or of another CUDA
        raise DeviceError(
            f"{chosen}: cannot be loaded ({' '.join(str(error).split())})",
            expected="the library with the CUDA libraries it needs",
            action=f"install it again: {LIBRARIES[chosen]}",
        ) from error
    return Library(trt, chosen, str(trt.__version__))


def _import(name: str) -> ModuleType:
    if name == "tensorrt_rtx":
        import tensorrt_rtx as module
    else:
        import tensorrt as module
    return module  # type: ignore[no-any-return]
