"""The first thing that runs: ``python -I -S -c '...' CONFIG``, see :class:`rewards.sandbox.Sandbox`.

CONFIG is a JSON object:

    argv, env, cwd      the program
    limits              see :class:`rewards.sandbox.Limits`
    namespaces          what :func:`jail.namespaces.enter` takes, or null where bubblewrap made them, or nobody
    shares_host         whether nobody did
    uid                 the user to become, or null to stay who one is
    landlock            the paths that :func:`jail.landlock.restrict` takes, or null
    copied              {from, to}: a folder of files to copy before the program starts, or null
    owned               paths that are handed to ``uid``, before anything of the program runs
    watched             folders whose size is limited
    status_fd           where the outcome is written, as one JSON object
    control_fd          whose closing ends everything
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from . import namespaces
from .supervise import supervise


def main() -> None:
    """Enters the namespaces that its argument describes, prepares the folder, and supervises the program."""
    config: dict[str, Any] = json.loads(sys.argv[1])
    try:
        if config["namespaces"] is not None:
            namespaces.enter(**config["namespaces"])
        if config["copied"] is not None:
            shutil.copytree(config["copied"]["from"], config["copied"]["to"], symlinks=True, dirs_exist_ok=True)
        if config["uid"] is not None:
            _give(config["owned"], config["uid"], deep=config["copied"]["to"] if config["copied"] else None)
        supervise(config, is_init=not config["shares_host"])
    except BaseException as error:
        os.write(config["status_fd"], json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(126)


def _give(paths: Sequence[str], uid: int, *, deep: str | None) -> None:
    for path in paths:
        os.chown(path, uid, uid)
    for folder, folders, files in os.walk(deep) if deep else ():
        for name in (*folders, *files):
            os.chown(os.path.join(folder, name), uid, uid, follow_symlinks=False)
