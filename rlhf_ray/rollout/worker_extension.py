"""Loaded by vLLM in every engine worker, before the worker makes its weight-transfer engine.

Importing this module registers the `gloo` backend: that import is the only moment vLLM gives a plug-in. It also ties
the process to those that it works for: vLLM's own processes go on when those are killed, and hold their memory.
"""

import multiprocessing
import os
import select
import signal
from contextlib import suppress
from threading import Thread
from typing import Any

from rlhf_ray.rollout import gloo_transfer
from rlhf_ray.rollout.further_nodes import ACTOR_PROCESS


def _end_with_actor() -> None:
    """End this process, which vLLM started, when the one that started it is gone, or the engine's actor is.

    Between the two there may be vLLM's engine process, which ends with nobody: it is ended here.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:  # the engine runs in the actor itself
        return
    starter = os.pidfd_open(parent.pid)
    actor = os.pidfd_open(int(os.environ.get(ACTOR_PROCESS, parent.pid)))

    def wait() -> None:
        select.select([starter, actor], [], [])
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(starter, signal.SIGKILL)
        os._exit(1)

    Thread(target=wait, name="end with the actor", daemon=True).start()


gloo_transfer.register()
_end_with_actor()


class WorkerExtension:
    """What vLLM's worker has besides its own; it exists also so that this module is imported there."""

    _weight_update_active: bool  # vLLM's own
    weight_transfer_engine: Any

    def abandon_weight_update(self) -> None:
        """Close an update that was opened and into which nothing came: vLLM would refuse to open another one."""
        if self._weight_update_active:
            self._weight_update_active = False
            self.weight_transfer_engine.reset_weight_update_target()
