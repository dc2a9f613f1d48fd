"""A worker that uses the channel in ways that a Node program cannot.

    raw.py hand-off STEP FAULT   listens, and fails at this step of the first hand-off
    raw.py send KIND              sends the data of KIND, and prints `attacks` and `sent`
    raw.py listen                 listens only
    raw.py wait                   does nothing, and reads nothing

The channel carries one JSON text per line. A descriptor is sent with the line that refers to it.
"""

import json
import os
import select
import signal
import socket
import sys
import time

LISTEN = {"cmd": "NODE_CLUSTER", "act": "queryServer", "index": 0, "data": None,
          "address": "127.0.0.1", "port": 0, "addressType": 4, "flags": 0}
FLOOD_SECONDS = 2.5
ENDLESS_BYTES = 200 << 20  # more bytes could exhaust the machine's memory


class Channel:
    def __init__(self):
        self.socket = socket.socket(fileno=int(os.environ["NODE_CHANNEL_FD"]))
        self.socket.setblocking(True)
        self.pending = b""
        self.received = []

    def send(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self):
        while b"\n" not in self.pending:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 16)
            if not data:
                sys.exit()
            self.pending += data
            self.received += descriptors
        line, _, self.pending = self.pending.partition(b"\n")
        return json.loads(line)

    def close(self):
        self.socket.close()
        for descriptor in self.received:
            os.close(descriptor)


def fault(channel, kind):
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "exit":
        os._exit(0)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "close":
        channel.close()
        print("closed", flush=True)
    elif kind == "garble":
        channel.socket.sendall(b"\x00\xffnot JSON\n")
    signal.pause()


def listen(channel):
    channel.send({**LISTEN, "seq": 1})
    reply = channel.receive()
    assert reply["ack"] == 1 and not reply.get("errno"), reply
    channel.send({**LISTEN, "act": "listening", "port": reply["sockname"]["port"]})


def hand_off(channel, step, kind):
    listen(channel)
    select.select([channel.socket], [], [])
    if step == "sent":
        fault(channel, kind)
    message = channel.receive()
    assert message["msg"]["act"] == "newconn" and len(channel.received) == 1, message
    if step == "read":
        fault(channel, kind)
    channel.send({"cmd": "NODE_HANDLE_ACK"})
    fault(channel, kind)


def send_descriptors(channel, descriptor):
    """Sends 250 descriptors per call, because the kernel allows at most 253 (SCM_MAX_FD)."""
    stock = [descriptor] * 250
    until = time.monotonic() + FLOOD_SECONDS
    while time.monotonic() < until:
        socket.send_fds(channel.socket, [b'{"hello":1}\n'], stock)


def flood(channel):
    data = b'{"hello":1}\n' * 4096
    until = time.monotonic() + FLOOD_SECONDS
    while time.monotonic() < until:
        channel.socket.sendall(data)


def endless(channel):
    data = b"x" * 65536
    for _ in range(ENDLESS_BYTES // len(data)):
        channel.socket.sendall(data)


def with_descriptor(channel, message):
    descriptor = os.open("/dev/null", os.O_RDONLY)
    socket.send_fds(channel.socket, [json.dumps(message).encode() + b"\n"], [descriptor])


SENDS = {
    "random": lambda channel: channel.socket.sendall(os.urandom(1 << 20)),
    "flood": flood,
    "endless": endless,
    "files": lambda channel: send_descriptors(channel, os.open("/dev/null", os.O_RDONLY)),
    "sockets": lambda channel: send_descriptors(channel, socket.socket().detach()),
    "null": lambda channel: channel.send(None),
    "unasked-acknowledgement": lambda channel: channel.send({"cmd": "NODE_HANDLE_ACK"}),
    "handle-without-descriptor": lambda channel: channel.send({"cmd": "NODE_HANDLE"}),
    "handle-of-unknown-type":
        lambda channel: with_descriptor(channel, {"cmd": "NODE_HANDLE", "type": "nonsense"}),
    "file-as-connection":
        lambda channel: with_descriptor(
            channel, {"cmd": "NODE_HANDLE", "type": "net.Socket", "msg": {}}),
    "listen-twice": lambda channel: [channel.send({**LISTEN, "seq": seq}) for seq in (1, 2)],
    "listen-without-address":
        lambda channel: channel.send({"cmd": "NODE_CLUSTER", "act": "queryServer"}),
    "listening-without-address":
        lambda channel: channel.send({"cmd": "NODE_CLUSTER", "act": "listening"}),
    "close-of-nothing":
        lambda channel: channel.send({"cmd": "NODE_CLUSTER", "act": "close", "key": "nothing"}),
    "unknown-act": lambda channel: channel.send({"cmd": "NODE_CLUSTER", "act": "nonsense"}),
    "reply-to-nothing": lambda channel: channel.send({"cmd": "NODE_CLUSTER", "ack": 999}),
}


def main():
    action, *rest = sys.argv[1:]
    channel = Channel()
    channel.send({"cmd": "NODE_CLUSTER", "act": "online"})
    if action == "hand-off":
        hand_off(channel, *rest)
    elif action == "listen":
        listen(channel)
    elif action == "send":
        print("attacks", flush=True)
        try:
            SENDS[rest[0]](channel)
            print("sent", flush=True)
        except (BrokenPipeError, ConnectionResetError):
            return  # the master has exited
    signal.pause()


main()
