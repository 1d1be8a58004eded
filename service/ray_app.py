"""The server's app inside Ray Serve (extra `ray`): replicas of it on the nodes of a Ray cluster.

    serve run service.ray_app:build_app cpus=2     # replicas on the CPU, of two cores each
    serve deploy k8s/ray/serve.yaml                # on a running cluster, one replica a GPU

What Ray Serve does is not done here: its proxies spread requests, its autoscaler counts the unanswered ones,
its controller replaces a replica whose engine has died, and one that is to go gets no further requests and
ends when it has answered what it had. Settings are the LAMAMBA_* variables of the replicas (`runtime_env`);
address, port, and the time to drain after a signal are Ray Serve's matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from service.app import create_app
from service.logs import configure_logging
from service.runtime import MAX_ROWS_ON_CPU
from service.settings import Settings, load_settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

    from service.runtime import Runtime

__all__ = ["LaMamba", "RayArguments", "build_app"]

_ROWS_ON_CUDA: Final = 128  # what a server takes where the memory allows it
_ROWS_OF_A_REQUEST: Final = 2  # a guided image
_OCCUPANCY: Final = 0.75  # of a step, above which there are to be more replicas
_GRACE_S: Final = 15.0  # for answers that are made and still being sent


class RayArguments(BaseModel):
    """`args` of the application in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    cpus: int = Field(0, ge=0, le=1024, description="Cores of a replica on the CPU; 0: each has a GPU.")


class LaMamba:
    """One replica: the app, with its models loaded before the first request."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = load_settings(**settings)
        configure_logging(self._settings.log_level, as_json=self._settings.log_json)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._app = create_app(self._settings, load_first=True)
        return self._app

    def check_health(self) -> None:
        """Raises EngineFailure once the engine has died, for which Ray Serve starts another replica."""
        runtime: Runtime = self._app.state.runtime
        runtime.check_alive()


def build_app(given: dict[str, Any]) -> Application:
    """The application that `serve run` and Serve configs name; a config overrides each option of it.

    `given`: RayArguments, as a mapping. Raises ValueError for a wrong one, StartupError for a wrong setting.
    """
    arguments = RayArguments.model_validate(given)
    # Not auto: a replica whose GPU does not work must fail, not serve on its CPU.
    own = {"device": "cpu", "num_threads": arguments.cpus} if arguments.cpus else {"device": "cuda"}
    resources = {"num_cpus": arguments.cpus} if arguments.cpus else {"num_gpus": 1}
    settings = load_settings(**own)
    deployment = serve.deployment(
        serve.ingress()(LaMamba),
        ray_actor_options=resources,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 16,
            "target_ongoing_requests": _busy_requests(settings),
        },
        # Steps are shared by all requests that are there, and the engine refuses what is too much, with the
        # time to come back after: nothing is to wait outside of it.
        max_ongoing_requests=settings.max_queue_images + _ROWS_ON_CUDA,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _GRACE_S,
    )
    return deployment.bind(own)


def _busy_requests(settings: Settings) -> float:
    """Unanswered requests of a replica whose steps are as full as they should be."""
    rows = settings.max_rows or (MAX_ROWS_ON_CPU if settings.device == "cpu" else _ROWS_ON_CUDA)
    return max(1.0, _OCCUPANCY * rows / _ROWS_OF_A_REQUEST)
