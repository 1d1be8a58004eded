"""Every setting of the server, read once from `LAMAMBA_*` environment variables or given by the command line.

A variable that starts with LAMAMBA_ and is no setting stops the start: a misspelt limit must not pass
silently for the default one. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.api_keys import parse_key_hashes
from service.engine.scheduler import AGING_S
from service.errors import StartupError, shown

__all__ = ["ENVIRONMENT_PREFIX", "Settings", "load_settings"]

ENVIRONMENT_PREFIX = "LAMAMBA_"

_GPUS = re.compile(r"(all|\d+(,\d+)*)?")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_ORIGIN: Final = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_HIDDEN: Final = ("admin_key", "api_keys")
"""Whose values no message repeats: a key may stand there by mistake."""


class Settings(BaseSettings):
    """The server's settings; the environment variable of each is LAMAMBA_ and its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Model folders or hub ids, separated by commas; empty: the shipped models."
    )
    model_repository: Path | None = Field(
        None,
        description="A folder whose sub-folders are models, named as they are, all loaded at the start; "
        "beside models, where both are given.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    root_path: str = Field("", description="Path under which a reverse proxy serves this server.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may use this server from a browser, separated by commas, such as "
        "https://example.org; * for all; empty: none but its own.",
    )
    api_keys: Annotated[dict[str, str], NoDecode] = Field(
        {},
        repr=False,
        description="Keys that are accepted, as name:hash, separated by commas (`lamamba api-key NAME` makes "
        "one); empty, and no file: everybody is served.",
    )
    api_keys_file: Path | None = Field(
        None, description="A file of further keys, one name:hash a line; # begins a comment."
    )
    admin_key: str = Field(
        "",
        repr=False,
        description="The key that loads and unloads models, as name:hash (`lamamba api-key NAME` makes one); "
        "empty: nobody does.",
    )
    device: str = Field("auto", description="auto (CUDA where there is a device), cpu, cuda or cuda:N.")
    gpus: str = Field(
        "",
        description="In device's place: all, or CUDA devices' numbers, as in 0,1; an engine on each.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="The network's number format; auto: float32 on CPU, on CUDA what the model says."
    )
    scan_backend: Literal["auto", "reference", "vectorized", "mamba_cuda", "triton"] = Field(
        "auto", description="Implementation of the selective scan."
    )
    cuda_graphs: bool = Field(
        True, description="On CUDA, launch a denoising step, and the decoder, as one CUDA graph each."
    )
    compile: bool = Field(
        False,
        description="On CUDA, compile the network: a slower start, faster steps. What is compiled is kept in "
        "TORCHINDUCTOR_CACHE_DIR.",
    )
    deterministic: bool = Field(
        False,
        description="A seed fixes an image to the bit, whatever else is made with it: each step computes "
        "max_rows rows on CUDA (0: 16), filled up, and single rows on CPU.",
    )
    num_threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of the network; 0: as many as the cgroup's quota allows."
    )
    max_rows: int = Field(
        0,
        ge=0,
        le=4096,
        description="Network rows a step (a guided image takes 2); 0: 8 on CPU, on CUDA as many as fit its "
        "memory, up to 128.",
    )
    batching: Literal["continuous", "static"] = Field(
        "continuous",
        description="continuous: images join and leave at any step. static, to compare with: a batch is "
        "closed before it begins, and its images are answered together.",
    )
    batch_size: int = Field(
        0, ge=0, le=4096, description="Images of a static batch; 0: half of max_rows, guided ones."
    )
    batch_wait_ms: float = Field(
        20.0,
        ge=0,
        le=60_000,
        allow_inf_nan=False,
        description="Milliseconds that the first image of a static batch waits for others.",
    )
    max_queue_images: int = Field(256, ge=1, le=1_000_000, description="Images that may wait; beyond: 429.")
    max_images_per_request: int = Field(16, ge=1, le=1024, description="Largest num_images of a request.")
    rate_limit_images_per_minute: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Images a minute that one client (a key, else an address) may ask for; beyond: 429; "
        "0: no limit.",
    )
    quota_images_per_day: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="Images a day (UTC) that one client may ask for; beyond: 429; 0: no limit. Counted in "
        "memory: a restart begins anew.",
    )
    priority_aging_s: float = Field(
        AGING_S,
        ge=0,
        allow_inf_nan=False,
        description="Seconds of waiting that lift a request by one priority; 0: priorities are ignored.",
    )
    max_timeout_s: float = Field(
        600.0, gt=0, le=86_400, allow_inf_nan=False, description="Largest timeout_s of a request, in seconds."
    )
    default_timeout_s: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="timeout_s of a request that gives none; 0: it has as long as it takes.",
    )
    max_body_bytes: int = Field(65_536, ge=256, le=2**30, description="Largest request body; beyond: 413.")
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Time a client has to send a body, in seconds; a connection on which no request comes is "
        "closed after as long.",
    )
    idempotency_max_entries: int = Field(
        1000,
        ge=0,
        le=1_000_000,
        description="Answers that are kept for retries with the same Idempotency-Key; 0: none.",
    )
    idempotency_max_bytes: int = Field(
        67_108_864, ge=0, le=2**40, description="Bytes of all kept answers; a larger answer is not kept."
    )
    idempotency_ttl_s: float = Field(
        3600.0, gt=0, allow_inf_nan=False, description="Time that an answer is kept, in seconds."
    )
    drain_timeout_s: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="Time that accepted work has to finish after SIGTERM."
    )
    num_encoders: int = Field(2, ge=1, le=64, description="Threads that encode PNG, JPEG and WebP.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_json: bool = Field(False, description="Log records as JSON, one a line.")

    @field_validator("models", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_api_keys(cls, value: object) -> object:
        if isinstance(value, str):
            return parse_key_hashes(part for part in value.split(",") if part.strip())
        if isinstance(value, dict):
            return parse_key_hashes(f"{name}:{digest}" for name, digest in value.items())
        return value

    @field_validator("admin_key")
    @classmethod
    def _check_admin_key(cls, value: str) -> str:
        if value:
            parse_key_hashes([value])
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [origin for origin in value if not _ORIGIN.fullmatch(origin)]:
            raise ValueError(
                f"{shown(wrong[0])} is no origin: accepted are scheme://host, with a port or not, and *"
            )
        return value

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("accepted are auto, cpu, cuda and cuda:N")
        return value

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, value: str) -> str:
        if not _GPUS.fullmatch(value) or len(set(value.split(","))) < len(value.split(",")):
            raise ValueError("accepted are all, or different numbers as in 0,1")
        return value

    @field_validator("deterministic")
    @classmethod
    def _check_deterministic(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("compile"):
            raise ValueError("compile is true, and one of the two is accepted")
        return value

    @field_validator("batch_size", "batch_wait_ms")
    @classmethod
    def _check_static_batching(cls, value: float, info: ValidationInfo) -> float:
        default = cls.model_fields[str(info.field_name)].default
        if info.data.get("batching") == "continuous" and value != default:
            raise ValueError("batching is continuous, and static alone uses it")
        return value

    @field_validator("default_timeout_s")
    @classmethod
    def _check_default_timeout(cls, value: float, info: ValidationInfo) -> float:
        most = info.data.get("max_timeout_s", value)
        if value > most:
            raise ValueError(f"accepted is up to max_timeout_s, {most:g}")
        return value

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, value: str) -> str:
        if value and (not value.startswith("/") or value.endswith("/")):
            raise ValueError("a path starts with / and does not end with it")
        return value


def load_settings(**given: Any) -> Settings:
    """The settings of the environment, overridden by the given ones that are not None.

    Raises StartupError with one line that names the variable (or the option) and its value.
    """
    _reject_unknown_variables(os.environ)
    overrides = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        label = name if name in overrides else f"{ENVIRONMENT_PREFIX}{name.upper()}"
        reason = first["msg"].removeprefix("Value error, ")
        given_value = "a value that is not shown" if name in _HIDDEN else shown(first["input"])
        # The cause would show the value in a trace.
        raise StartupError(f"{label}: {given_value} given; {reason}") from None


def _reject_unknown_variables(environ: Mapping[str, str]) -> None:
    known = [name.upper() for name in Settings.model_fields]
    for variable in sorted(environ):
        name = variable.upper().removeprefix(ENVIRONMENT_PREFIX)
        if name == variable.upper() or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=3)
        hint = "did you mean" if near else "there are"
        names = ", ".join(f"{ENVIRONMENT_PREFIX}{known_name}" for known_name in near or sorted(known))
        raise StartupError(f"{variable}: no such setting; {hint} {names}{'?' if near else ''}")
