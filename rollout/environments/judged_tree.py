"""Makes the tree that a task's tests judge; runs by itself in a sandbox that the policy never was in.

The working directory holds ``repository`` (the task's files as they were), ``policy.tar.gz`` (the policy's) and
``tests.patch``. Standard input brings ``{"protected", "max_patch"}``: patterns, and characters of the patch to tell.
Standard output takes ``{"patch", "set_back"}``: all that the policy changed, and which of those files are the task's
again. ``repository`` is then what the policy made of it, without what Git ignores, with the task's own tests.
"""

import fnmatch
import json
import os
import pkgutil
import subprocess
import sys
import sysconfig


def git(*arguments: str, stdin: bytes = b"") -> bytes:
    command = ["git", "-c", "user.name=task", "-c", "user.email=task@localhost", *arguments]
    environment = {**os.environ, "GIT_LITERAL_PATHSPECS": "1"}
    return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, check=True, env=environment).stdout


def commit(message: str) -> str:
    git("commit", "-q", "--allow-empty", "-m", message)
    return git("rev-parse", "HEAD").decode().strip()


def changes(*arguments: str) -> list[str]:
    names = git("diff", "--name-only", "--no-renames", "-z", *arguments)
    return [os.fsdecode(name) for name in names.split(b"\0") if name]


def is_protected(path: str, patterns: list[str]) -> bool:
    """A pattern with a slash is for the whole path, one without for the name of a file or of a folder above it."""
    parts = path.split("/")
    return any(
        fnmatch.fnmatchcase(path, pattern)
        if "/" in pattern
        else any(fnmatch.fnmatchcase(part, pattern) for part in parts)
        for pattern in patterns
    )


def shadows(path: str, known: set[str], importable: set[str]) -> bool:
    """Whether it is in a new module beside the tests that takes the place of one that is installed, such as pytest."""
    top = path.split("/")[0]
    return top not in known and top.split(".")[0] in importable


def installed_modules() -> set[str]:
    paths = sysconfig.get_paths()
    found = pkgutil.iter_modules([paths["purelib"], paths["platlib"]])
    return {module.name for module in found} | set(sys.stdlib_module_names)


def empty() -> None:
    subprocess.run(
        ["find", ".", "-mindepth", "1", "-maxdepth", "1", "!", "-name", ".git", "-exec", "rm", "-rf", "{}", "+"],
        check=True,
    )


def main() -> None:
    """Makes ``repository`` the tree to judge: the task with the policy's changes and the tests as the task has them.

    Reads a JSON object from standard input, {"protected": patterns of paths, "max_patch": characters}; beside the
    folder lie ``tests.patch`` and ``policy.tar.gz``. Prints {"patch": the policy's changes, "set_back": paths that it
    may not change}. Raises CalledProcessError where git or tar fails.
    """
    job = json.load(sys.stdin)
    os.chdir("repository")
    git("init", "-q", ".")
    git("add", "-A", "-f")
    begins = commit("the task begins here")
    if os.path.getsize("../tests.patch"):
        git("apply", "--index", "--whitespace=nowarn", "../tests.patch")
    judged = commit("the tests that judge")
    tests = set(changes(begins, judged))

    git("read-tree", begins)
    empty()
    subprocess.run(["tar", "-xzf", "../policy.tar.gz"], check=True)
    os.unlink("../policy.tar.gz")
    git("add", "-A")
    patch = git("diff", "--cached", begins)
    known = {os.fsdecode(name) for name in git("ls-tree", "-z", "--name-only", begins).split(b"\0")}
    importable = installed_modules()
    set_back = [
        path
        for path in changes("--cached", begins)
        if path in tests or is_protected(path, job["protected"]) or shadows(path, known, importable)
    ]
    names = b"".join(os.fsencode(path) + b"\0" for path in sorted(tests.union(set_back)))
    if names:
        git("reset", "-q", "--pathspec-from-file=-", "--pathspec-file-nul", judged, stdin=names)
    empty()
    git("checkout-index", "-a", "-f")
    print(json.dumps({"patch": patch.decode("utf-8", "replace")[: job["max_patch"]], "set_back": set_back}))


if __name__ == "__main__":
    main()
