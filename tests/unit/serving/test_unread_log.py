"""A log that nobody reads does not hold up the launcher."""

from __future__ import annotations

import subprocess
import sys

FLOOD = """
import os, threading, time
from gptj_triton.serving.log import log
from gptj_triton.serving.relay import Relay
relay = Relay()
def flood():
    while True:
        os.write(relay.outlet, b"x" * 200 + b"\\n")
threading.Thread(target=flood, daemon=True).start()
time.sleep(0.5)
log.say("stopping")
log.say_ready("http://host:1")
"""


def test_who_does_not_read_holds_up_nobody() -> None:
    process = subprocess.Popen([sys.executable, "-c", FLOOD], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
