"""Several processes, one a host, that train together: all compute, the first one alone speaks and writes.

Each runs the same command and so reaches the same collective operations in the same order; where they could take
different ways, they first agree: on what the first one found in the run's folder, and on whether a signal ends the
step.  With one process everything here is the identity.
"""

import builtins
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Value = TypeVar("Value")

AUTO = "auto"
"""Instead of an address, where the processes find each other: SLURM, Open MPI, Kubernetes, Cloud TPU."""


def join(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Wait until all processes are there.  To be called before JAX computes anything.

    Args:
      coordinator: HOST:PORT at which the first process listens, or `AUTO`.
      processes, process: how many, and which one this is, from 0 on; not with `AUTO`.
    Raises:
      ValueError: these do not fit together, or nothing is found automatically.
    """
    if coordinator == AUTO:
        if not (processes is process is None):
            raise ValueError(f"--processes and --process are found by themselves with --distributed {AUTO}: leave them")
        arguments: dict[str, Any] = {}
    else:
        if processes is None or process is None or not 0 <= process < processes:
            raise ValueError(
                f"--distributed {coordinator} needs --processes (={processes}) and --process (={process}), from 0 to "
                "one less"
            )
        arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    # Its handler would take SIGTERM, which train.host.interrupt answers.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the processes of --distributed {coordinator} do not find each other: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Value]) -> Value:
    """What the function returns, or the ValueError or OSError that it raises, in the first process; it runs only there.

    What travels is JSON: numbers, strings, lists and dictionaries; an error as the nearest one that Python has.
    Also a barrier: what the first process wrote is there when the others go on.
    """
    if jax.process_count() == 1:
        return function()
    message = b""
    answer: dict[str, Any]
    if is_first():
        try:
            answer = {"value": function()}
        except (ValueError, OSError) as error:
            name = next(kind.__name__ for kind in type(error).__mro__ if hasattr(builtins, kind.__name__))
            answer = {"error": name, "message": str(error)}
        message = json.dumps(answer).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    sent = np.frombuffer(message.ljust(length), np.uint8)
    answer = json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())
    if "error" in answer:
        raise getattr(builtins, answer["error"])(answer["message"])
    return answer["value"]


def largest(number: int) -> int:
    """Of the numbers that the processes give."""
    return number if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(number))))
