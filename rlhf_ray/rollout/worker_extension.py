"""Loaded by vLLM in every engine worker, before the worker makes its weight-transfer engine.

Importing this module registers the `gloo` backend: that import is the only moment vLLM gives a plug-in. It also ties
the process to the one that started it: vLLM's own processes go on when that one is killed, and hold their memory.
"""

import multiprocessing
import os
from threading import Thread

from rlhf_ray.rollout import gloo_transfer


def _end_with_parent() -> None:
    """End this process, which vLLM started, when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:  # the engine runs in the actor itself
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, name="end with parent", daemon=True).start()


gloo_transfer.register()
_end_with_parent()


class WorkerExtension:
    """Adds nothing to vLLM's worker; it exists so that this module is imported there."""
