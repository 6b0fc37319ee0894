"""Runs commands for test_commands.py, one at a time, each in a fork of this process.

What `python -m` would do, without the seconds of importing jax: everything heavy is imported here,
and no backend is started before the fork. One JSON line {"argv", "stdout", "stderr"} asks, the exit
code answers.
"""

import json
import os
import runpy
import sys

import experiments.common  # noqa: F401
import meta_attention_jax.analysis  # noqa: F401
import meta_attention_jax.runs  # noqa: F401
import meta_attention_jax.training.loop  # noqa: F401

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor in (1, 2):
            path = request["stdout" if descriptor == 1 else "stderr"]
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = request["argv"]
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            if stop.code == 2:  # A mistake has started nothing: leave without the long way out.
                sys.stdout.flush()
                os._exit(2)
            raise
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
