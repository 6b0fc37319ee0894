"""Runs commands for test_commands.py, one at a time, each in a fork of this process.

What `python -m` would do, without the seconds of importing jax: everything heavy is imported here,
and no backend is started before the fork. One JSON line {"argv", "stdout", "stderr"} asks, the exit
code answers.
"""

import atexit
import gc
import json
import os
import runpy
import sys
import traceback

import experiments.studies.outcome  # noqa: F401
import experiments.studies.samples  # noqa: F401
import experiments.studies.scores  # noqa: F401
import meta_attention_jax.analysis  # noqa: F401
import meta_attention_jax.runs  # noqa: F401
import meta_attention_jax.training.loop  # noqa: F401

gc.freeze()  # What is here already is not looked at again by every fork, and so not copied.

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor in (1, 2):
            path = request["stdout" if descriptor == 1 else "stderr"]
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = request["argv"]
        code = 0
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        # The way out, but for taking all modules apart, which takes a second.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
