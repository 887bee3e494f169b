"""vLLM's engine inside the actor's own process, on a thread of its own: for engines on a CPU.

vLLM's asynchronous engine (`AsyncLLM`) has its scheduler and worker in a second process. On a GPU the two run side by
side. On a CPU they share the engine's few cores, and the first, woken at every token to take it over, interrupts all
threads that compute: a fifth of a small model's time. Here the same scheduler, worker and sampler serve the methods of
`AsyncLLM` that a rollout engine uses, as calls that the thread answers between two of vLLM's steps.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import Thread
from typing import Any

logger = logging.getLogger(__name__)

_LATER = object()  # what a call returns that is answered in a later step


class InProcessEngine:
    """The part of vLLM's `AsyncLLM` that a rollout engine uses. Responses come whole, when they are finished.

    Args:
        args: what vLLM is started with.
        loggers: factories of vLLM's statistics loggers.

    Raises:
        Exception: what vLLM raised while it started.
    """

    def __init__(self, args: dict[str, Any], loggers: list[Any]) -> None:
        self.errored = False  # whether a step failed, after which vLLM answers nothing more
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._finished: dict[str, Future[Any]] = {}  # of the requests under way, by their names
        self._numbers = count()
        self._paused = False
        started: Future[None] = Future()
        # Threads of OpenMP belong to the thread that computes with them: this one loads the model and takes each step.
        Thread(target=self._work, args=(args, loggers, started), name="vllm", daemon=True).start()
        started.result()

    def _work(self, args: dict[str, Any], loggers: list[Any], started: "Future[None]") -> None:
        try:
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
            from vllm.v1.executor import Executor
            from vllm.v1.metrics.loggers import StatLoggerManager

            config = EngineArgs(**args).create_engine_config()
            self._engine = LLMEngine(config, Executor.get_class(config), log_stats=bool(loggers))
            # In place of vLLM's own loggers, which take longer than ours.
            self._loggers = StatLoggerManager(config, custom_stat_loggers=loggers, enable_default_loggers=False)
            self._keep_statistics(False)
            self._core: Any = self._engine.engine_core.engine_core  # type: ignore[attr-defined]
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while True:
                if self._paused or not self._finished or not self._calls.empty():
                    _answer(*self._calls.get())
                else:
                    self._step()
        except Exception:
            logger.exception("vLLM failed in a step")
            self._refuse()

    def _step(self) -> None:
        for output in self._engine.step():
            finished = self._finished.pop(output.request_id, None)
            if finished is not None:
                finished.set_result(output)

    def _refuse(self) -> None:
        """Answer all that is asked with vLLM's word that its engine is dead."""
        from vllm.v1.engine.exceptions import EngineDeadError

        def fail() -> None:
            raise EngineDeadError

        self.errored = True
        for finished in self._finished.values():
            finished.set_exception(EngineDeadError())
        while True:
            answer, _ = self._calls.get()
            _answer(answer, fail)

    async def keep_statistics(self, on: bool) -> None:
        """Whether the loggers hear of each step, which takes a part of it."""
        await self._call(self._keep_statistics, on)

    def _keep_statistics(self, on: bool) -> None:
        self._engine.log_stats = self._engine.output_processor.log_stats = on
        self._engine.logger_manager = self._loggers if on else None

    async def _call(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have the thread call something of the engine between two steps."""
        answer: Future[Any] = Future()
        self._calls.put((answer, partial(work, *args, **kwargs)))
        return await asyncio.wrap_future(answer)

    async def generate(self, prompt: dict[str, Any], params: Any, *, request_id: str) -> AsyncIterator[Any]:
        """Sample one response; yields vLLM's `RequestOutput` when it is finished."""
        name = f"{request_id}#{next(self._numbers)}"  # two may ask by the same name, and each gets its answer
        finished: Future[Any] = Future()
        self._calls.put((finished, partial(self._add, name, prompt, params, finished)))
        try:
            yield await asyncio.wrap_future(finished)
        except asyncio.CancelledError:
            self._calls.put((Future(), partial(self._abort, name)))
            raise

    def _add(self, name: str, prompt: Any, params: Any, finished: "Future[Any]") -> Any:
        self._engine.add_request(name, prompt, params)
        self._finished[name] = finished
        return _LATER

    def _abort(self, name: str) -> None:
        if self._finished.pop(name, None) is not None:
            self._engine.abort_request([name])

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Take no further step; requests under way freeze ("keep"), and their keys and values are computed again."""
        await self._call(self._pause, mode, clear_cache)

    def _pause(self, mode: str, clear_cache: bool) -> None:
        self._core.pause_scheduler(mode, clear_cache)
        self._paused = True

    async def resume_generation(self) -> None:
        """Go on."""
        await self._call(self._resume)

    def _resume(self) -> None:
        self._core.resume_scheduler()
        self._paused = False

    async def init_weight_transfer_engine(self, request: Any) -> None:
        """As `AsyncLLM`."""
        await self._on_worker("init_weight_transfer_engine", init_info=request.init_info)

    async def start_weight_update(self) -> None:
        """As `AsyncLLM`."""
        await self._on_worker("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        """As `AsyncLLM`."""
        await self._on_worker("update_weights", update_info=request.update_info)

    async def finish_weight_update(self, weight_version: str) -> None:
        """As `AsyncLLM`."""
        await self._on_worker("finish_weight_update")
        await self._call(self._core.set_weight_version, weight_version)

    async def collective_rpc(self, method: str) -> None:
        """As `AsyncLLM`."""
        await self._on_worker(method)

    async def _on_worker(self, method: str, **kwargs: Any) -> None:
        await self._call(self._core.collective_rpc, method, kwargs=kwargs)

    def shutdown(self) -> None:
        """Nothing but this process is to be ended."""


def _answer(answer: "Future[Any]", work: Callable[[], Any]) -> None:
    """Do what was asked for, unless nobody waits for it any more, and say what came of it."""
    if answer.set_running_or_notify_cancel():
        try:
            value = work()
        except Exception as error:
            answer.set_exception(error)
        else:
            if value is not _LATER:
                answer.set_result(value)
