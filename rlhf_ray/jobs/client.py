"""Jobs of a Ray cluster through its dashboard: every request has a deadline, and every failure is one error."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from rlhf_ray.errors import JobError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 600.0
# A log that is silent for so long is asked for again, as a connection may be dead without either end knowing.
SILENCE_S = 60.0
# How long a job is followed over a dashboard that does not answer, as it does while it restarts.
LOST_AFTER_S = 60.0
RETRY_S = 2.0
# Shorter values of environment variables are no secrets, and occur in messages by chance.
SECRET_LENGTH = 8
STOPPED_EXIT_CODE = 143


class _Unreachable(JobError):
    """No answer, for now."""


class _NotFound(JobError):
    """The cluster knows nothing of that name."""


class _Client(JobSubmissionClient):
    """Ray's client, which by itself waits forever and raises whatever the HTTP library does."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        # The deadline of the connection also limits how long the body of a request may take.
        timeout = UPLOAD_TIMEOUT_S if method == "PUT" else (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S)
        try:
            return super()._do_request(method, endpoint, timeout=timeout, **options)
        except AuthenticationError as error:
            raise _unauthorised(self._address, error) from None
        except OSError as error:
            raise _Unreachable(
                f"--address: no Ray dashboard answers at {self._address} ({type(error).__name__}); check that the "
                "cluster runs and that its dashboard port (8265 by default) is open to this machine"
            ) from None

    def _raise_error(self, r: Any) -> None:
        # The server answers with a traceback, whose last line says what is wrong.
        what = (r.text.strip().splitlines() or ["no reason given"])[-1]
        error = _NotFound if r.status_code == 404 else JobError
        raise error(f"--address: {self._address} answered {r.status_code}: {what}")


@dataclass(frozen=True)
class Job:
    """What the cluster knows of one job.

    Attributes:
        name: chosen at its submission.
        status: "PENDING", "RUNNING", "STOPPED", "SUCCEEDED" or "FAILED".
        kind: the command that it runs, where `rlhf-ray` submitted it.
        run_dir: its run directory, likewise.
        started: when it was submitted.
        ended: when it ended, if it has.
        exit_code: as a shell would give it, if it has ended.
        message: what the cluster says about its state, without the values of its environment variables.
    """

    name: str
    status: str
    kind: str | None
    run_dir: str | None
    started: datetime | None
    ended: datetime | None
    exit_code: int | None
    message: str


class JobClient:
    """The jobs of one cluster.

    Args:
        address: of its dashboard, such as http://HEAD:8265. Where the cluster asks for a token, it is taken from the
            environment as Ray itself does (`RAY_AUTH_MODE=token` and `RAY_AUTH_TOKEN`).

    Raises:
        JobError: the address is none of a dashboard, or nothing answers there, or it refuses this user.
    """

    def __init__(self, address: str):
        if not address.startswith(("http://", "https://")):
            raise JobError(f"--address: found {address!r}, expected the dashboard's URL, such as http://HEAD:8265")
        # Ray's own notes about an upload and the end of a log; what goes wrong is raised.
        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
        # Ray would let these variables win over the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        try:
            self._client = _Client(address)
        except AuthenticationError as error:
            raise _unauthorised(address, error) from None
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise JobError(
                f"--address: what answers at {address} is no Ray dashboard that takes jobs ({error}); name the "
                "dashboard's URL, such as http://HEAD:8265"
            ) from None
        self.address = address

    def submit(
        self,
        name: str,
        entrypoint: str,
        package: Path,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        """Uploads the package and starts the job.

        Args:
            name: no job of the cluster may have it.
            entrypoint: shell command, run in the unpacked package.
            package: a zip archive.
            environment: variables of all processes of the job. The cluster keeps their values with the job.
            metadata: kept with the job, for all to see.

        Raises:
            JobError: the name is taken, or the cluster refuses.
        """
        try:
            taken = _job(self._client.get_job_info(name))
        except _NotFound:
            pass
        else:
            raise self._name_taken(name, taken.status)
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(package), "env_vars": dict(environment)},
                metadata=dict(metadata),
            )
        except JobError as error:
            if "already exists" in str(error):
                raise self._name_taken(name, "new") from None
            if "No available agent" in str(error):
                raise JobError(
                    f"--address: the head node behind {self.address} takes no jobs: its job agent does not answer. "
                    "Where the cluster has just started, try again; else see logs/dashboard_agent.log in its session's "
                    "folder there, as another process may have the agent's port (`ray start "
                    "--dashboard-agent-listen-port`, 52365 by default)"
                ) from None
            raise JobError(_without(str(error), environment)) from None

    def jobs(self) -> list[Job]:
        """All jobs that were submitted to the cluster, the oldest first."""
        jobs = [_job(info) for info in self._client.list_jobs() if info.type == JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: (job.started or datetime.min.replace(tzinfo=UTC), job.name))

    def job(self, name: str) -> Job:
        """One job.

        Raises:
            JobError: there is none of that name.
        """
        try:
            return _job(self._client.get_job_info(name))
        except _NotFound:
            raise JobError(
                f"no job at {self.address} is named {name!r}; `rlhf-ray jobs --address {self.address}` lists them"
            ) from None

    def logs(self, name: str) -> str:
        """All that the job has printed.

        Raises:
            JobError: there is no job of that name.
        """
        self.job(name)
        return self._client.get_job_logs(name)

    def stop(self, name: str) -> bool:
        """Asks the job to end; whether it was still running.

        Raises:
            JobError: there is no job of that name.
        """
        self.job(name)
        return self._client.stop_job(name)

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        """Writes what the job prints, from its beginning, until it ends; returns it as it ended.

        A connection that breaks is made anew, and what was written is not written again.

        Raises:
            JobError: there is no such job, or the cluster does not answer for `LOST_AFTER_S`.
        """
        self.job(name)
        shown = 0
        answered = time.monotonic()

        def note(text: str, position: int) -> None:
            nonlocal shown
            fresh = text[max(0, shown - position) :]
            if fresh:
                write(fresh)
                shown += len(fresh)

        while True:
            try:
                asyncio.run(self._tail(name, note))
                job = self.job(name)
                answered = time.monotonic()
                if JobStatus(job.status).is_terminal():
                    note(self._client.get_job_logs(name), 0)
                    return job
            except _Unreachable as error:
                if time.monotonic() - answered > LOST_AFTER_S:
                    raise JobError(f"{error}. The job {name} may still be running") from None
            time.sleep(RETRY_S)

    async def _tail(self, name: str, note: Callable[[str, int], None]) -> None:
        """Passes on the job's log with positions in characters, until it ends, breaks off or falls silent."""
        position = 0
        try:
            async with aclosing(cast(AsyncGenerator[str, None], self._client.tail_job_logs(name))) as stream:
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        text = await anext(stream, None)
                    if text is None:
                        return
                    note(text, position)
                    position += len(text)
        except (aiohttp.ClientError, OSError, RuntimeError):
            return  # The caller asks how the job is, and learns more from that.

    def _name_taken(self, name: str, status: str) -> JobError:
        return JobError(
            f"--name: {name!r} is taken by a job that is {status.lower()}; choose another name (the same run.dir "
            f"continues the run), or follow that job with `rlhf-ray logs {name} --follow --address {self.address}`"
        )


def _unauthorised(address: str, error: AuthenticationError) -> JobError:
    what = str(error).splitlines()[0].partition(". ")[0]
    return JobError(
        f"--address: no access to {address} ({what}); set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
        "RAY_AUTH_TOKEN_PATH) to the cluster's token, which `ray get-auth-token` prints there"
    )


def _job(info: JobDetails) -> Job:
    metadata = info.metadata or {}
    return Job(
        name=str(info.submission_id),
        status=str(info.status.value),
        kind=metadata.get("kind"),
        run_dir=metadata.get("run_dir"),
        started=_time(info.start_time),
        ended=_time(info.end_time),
        exit_code=_exit_code(info),
        message=_without(info.message or "", (info.runtime_env or {}).get("env_vars") or {}),
    )


def _exit_code(info: JobDetails) -> int | None:
    """The job's exit code as a shell would give it; 1 for a job that failed without having one."""
    if not info.status.is_terminal():
        return None
    if info.status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    code = info.driver_exit_code
    if code is None:
        return 0 if info.status == JobStatus.SUCCEEDED else 1
    return code if code >= 0 else 128 - code


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _without(text: str, environment: Mapping[str, str]) -> str:
    """The text with the values of environment variables taken out."""
    for name, value in environment.items():
        if len(value) >= SECRET_LENGTH:
            text = text.replace(value, f"<{name}>")
    return text
