"""Requests to stop are answered. Of what was started, only that to which they are given on gets them."""

import signal
import subprocess
import sys

from spell_megatron.processes.signals import answering

# A process of its own: Python starts its resource tracker once, and unblocks signals then.
STARTS = """
import multiprocessing, os, queue, signal, subprocess, time
from spell_megatron.processes.signals import REQUESTS, answering, given_on

before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
answers = queue.Queue()
with answering(answers.put):
    spawned = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    spawned.start()
    helper = subprocess.Popen(["sleep", "60"])
    with given_on():
        engine = subprocess.Popen(["sleep", "60"])
    for pid in (spawned.pid, helper.pid, engine.pid):
        for number in REQUESTS:
            os.kill(pid, number)
    assert -engine.wait(60) in (signal.SIGINT, signal.SIGTERM)
    assert spawned.is_alive() and helper.poll() is None
    spawned.kill(), helper.kill()
    for number in REQUESTS:
        os.kill(os.getpid(), number)
        assert answers.get(timeout=60) is number
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
print("well")
"""


def test_requests_are_kept_from_what_is_started():
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=100)
    assert done.stdout == "well\n", done.stderr


def test_a_process_that_a_launcher_has_started_can_be_ended_before_it_answers():
    code = (
        "import os, signal; from spell_megatron.processes.signals import expect_requests; expect_requests()\n"
        "os.kill(os.getpid(), signal.SIGUSR1); print('on', flush=True); os.kill(os.getpid(), signal.SIGTERM)"
    )
    with answering(print), subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=60)[0] == "on\n"
    assert process.returncode == -signal.SIGTERM
