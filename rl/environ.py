"""Environment variables of the run's processes: the driver has all of the user's, code of others next to none.

``/proc/<pid>/environ`` shows every process of a user the environment that another one began with, and Ray's workers
have ancestors that the driver started. So the driver blanks what is shown of its own, Ray's processes begin without
secrets, and workers for rewards and tools drop the rest.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rl.errors import RecipeError
from rl.secrets import is_secret_name

KEPT_VARIABLES = re.compile(
    "PATH|HOME|USER|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|SHELL|PWD|VIRTUAL_ENV|LD_LIBRARY_PATH|PYTHON.*|RAY_.*|OMP_.*|MKL_.*"
    "|CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|HF_HOME|HF_HUB_OFFLINE|XDG_.*|NLTK_DATA"
)
"""Variables that say where things are: what code of others is given."""
_TUNING_VARIABLES = re.compile(
    "LD_.*|CC|CXX|NVCC.*|CUDA.*|NVIDIA_.*|NCCL_.*|NVSHMEM_.*|GLOO_.*|UCX_.*|FI_.*|TORCH.*|PYTORCH_.*|TRITON_.*|VLLM_.*"
    "|DS_.*|DEEPSPEED_.*|HF_.*|TRANSFORMERS_.*|TOKENIZERS_.*|KMP_.*|GOMP_.*|OPENBLAS_.*|NUMEXPR_.*|MALLOC_.*"
)
"""Variables that engines and learner ranks are tuned with."""
_ENV_START = 47
"""Fields of /proc/<pid>/stat behind the command's name up to env_start, which env_end follows; proc(5) counts 50."""


def outside_environment() -> dict[str, str]:
    """What a process that runs code of others begins with: ``KEPT_VARIABLES``. Whatever else it needs comes later."""
    return {name: value for name, value in os.environ.items() if _is_public(name)}


def chosen_variables(names: Iterable[str]) -> dict[str, str]:
    """The variables of this process that are handed to code of others. Raises RecipeError for one that it lacks."""
    chosen = {}
    for name in names:
        if name not in os.environ:
            raise RecipeError(f"rewards and tools shall read {name}, but there is no such variable; export it")
        chosen[name] = os.environ[name]
    return chosen


def conceal_environment() -> None:
    """Blanks all but ``KEPT_VARIABLES`` in ``/proc/<pid>/environ``; this process itself still has every one."""
    for name in os.environ:
        if not _is_public(name):
            os.environ[name] = os.environ[name]  # a copy, elsewhere than where the kernel looks
    _blank_initial_values()


def forget_environment(*, keep: Mapping[str, str]) -> None:
    """Leaves this process, which is one of Ray's, ``KEPT_VARIABLES`` and ``keep`` only."""
    for name in list(os.environ):
        if not KEPT_VARIABLES.fullmatch(name):
            del os.environ[name]
    conceal_environment()
    os.environ.update(keep)


@contextmanager
def needed_environment() -> Iterator[None]:
    """Within the block, the environment is what Ray, engines and learner ranks need, without secrets."""
    hidden = {
        name: value
        for name, value in os.environ.items()
        if not KEPT_VARIABLES.fullmatch(name) and (is_secret_name(name) or not _TUNING_VARIABLES.fullmatch(name))
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_public(name: str) -> bool:
    if name == "RAY_JOB_CONFIG_JSON_ENV_VAR":  # holds the variables that a job was submitted with
        return False
    return KEPT_VARIABLES.fullmatch(name) is not None and not is_secret_name(name)


def _blank_initial_values() -> None:
    """In the block that the kernel laid out when the process began and shows to others. Linux only."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return
    start, end = int(fields[_ENV_START]), int(fields[_ENV_START + 1])
    for entry in re.finditer(rb"([^=\0]+)=([^\0]+)", ctypes.string_at(start, end - start)):
        if not _is_public(os.fsdecode(entry[1])):
            ctypes.memset(start + entry.start(2), 0, len(entry[2]))
