"""Python processes that find PyTorch and Triton imported: each is forked from one that has done nothing else.

`run` takes what follows `python` on a command line, and saves more than a second of every process that tests start.
Nothing is interpreted there and PyTorch has one thread. What is about importing needs a process of its own.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types
from functools import cache
from pathlib import Path

LEFT_OUT = ("TRITON_INTERPRET",)


@cache
def _parent():
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    command = [sys.executable, __file__]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**environment, "OMP_NUM_THREADS": "1"}
    )

    @atexit.register
    def end():
        process.communicate()

    return process


def run(*arguments, cwd=None, **environment):
    """A Python process with these arguments ("-c" and code, "-m" and a module, or a script) and those that follow.

    Args:
        cwd: the folder to begin in; None is that of this process.
        environment: variables, beside those of this process without LEFT_OUT.

    Returns:
        a subprocess.CompletedProcess with text.
    """
    given = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    environment, cwd = {**given, "OMP_NUM_THREADS": "1", **environment}, str(cwd or os.getcwd())
    command = [str(argument) for argument in arguments]
    if not sys.platform.startswith("linux"):  # where forking is missing, or takes what a system's libraries forbid
        return subprocess.run([sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = dict(arguments=command, environment=environment, folder=cwd, out=str(out), err=str(err))
        parent = _parent()
        print(json.dumps(request), file=parent.stdin, flush=True)
        code = json.loads(parent.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, out.read_text("utf-8"), err.read_text("utf-8"))


def _program(first, *arguments):
    """What `python first ...` does."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if first in ("-c", "-m"):
        paths = [os.getcwd(), *paths]
        what, *arguments = arguments
        sys.argv = [first, *arguments]
    else:
        paths = [os.path.dirname(first), *paths]
        sys.argv = [first, *arguments]
    sys.path[:0] = filter(None, paths)
    if first == "-c":
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
    elif first == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(first, run_name="__main__")


def _child(request):
    """Become the process that is asked for; does not return."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        try:
            _program(*request["arguments"])
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _serve():
    """Fork a process for each line, one after the other, and tell how it ended."""
    import torch  # noqa: F401

    try:
        import triton  # noqa: F401
    except ImportError:
        pass  # where there is none
    sys.path.remove(os.path.dirname(__file__))
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(json.loads(line))
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)


if __name__ == "__main__":
    _serve()
