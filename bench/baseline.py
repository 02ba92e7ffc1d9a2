"""What the daemon is compared with: a bare pika consumer that starts `python script argument`, and acknowledges.

A program of its own: `python baseline.py AMQP_URL QUEUE PYTHON SCRIPT`. One message at a time; two at a time are two of it.
The body of a message is the script's argument.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pika


def main(url: str, queue: str, python: str, script: str) -> None:
    """Consume for ever."""
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.basic_qos(prefetch_count=1)

    def run(channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        child = subprocess.Popen([python, script, body.decode()], stdout=subprocess.DEVNULL)
        child.wait()
        channel.basic_ack(method.delivery_tag)

    channel.basic_consume(queue, run)
    print("consuming", flush=True)
    channel.start_consuming()


if __name__ == "__main__":
    main(*sys.argv[1:])
