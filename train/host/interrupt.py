"""SIGINT (Ctrl-C) and SIGTERM become a request that the training loop answers after its current step.

Outside the loop, and after the first one, they end the process at once, as SIGKILL does: every file is written whole
or not at all, so there is nothing to clean up, and an exception in the midst of an import or of a compilation would
leave by pages of traceback.
"""

import contextlib
import ctypes
import signal
import threading
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once() -> None:
    """Lets Ctrl-C end the process quietly, as SIGTERM does, instead of raising KeyboardInterrupt.

    For a program, never for a library: it is for the whole process. A SIGINT that is ignored stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Interrupted(Exception):
    """Training stopped on request, its state saved.

    Attributes:
      exit_status: 128 + the signal's number, as a shell reports it: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


class StopRequest:
    """Notes the first signal inside a `with` statement; the second one acts as it would have without it.

    A signal that the process ignores, as a background job of a shell ignores SIGINT, stays ignored.  Outside the main
    thread, where Python receives no signals, nothing is noted.

    While the main thread is in a compiler, Python answers no signal until that returns, which can take minutes. There
    the second one ends the process all the same, if it would have done so without the statement.

    Attributes:
      signal_number: Number of the signal, None before it.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._before = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
                    if self._before[number] is signal.SIG_DFL:
                        _handle_once(number)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number, _) -> None:
        self.signal_number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


def _handle_once(number: int) -> None:
    """Lets the system itself take a signal's handler away when it has run once, as System V did.

    Where the C library has no such call (glibc has), the handler stays until Python answers the signal.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        install = ctypes.CDLL(None).sysv_signal
        install.restype, install.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        install(number, install(number, None))
