"""A real etcd in the rig: one member or three, each on a witness host of its own (Rig.add_witness), data in memory.

    cluster = Etcd(rig, members=3); cluster.spec() -> "etcd:http://10.78.0.201:2379,..."
    cluster.kill(0), start(0), stop(1), cont(1), wait_leader(); rig.partition(rig.a, cluster.hosts[0])

Short times (heartbeat 50 ms, election 300 ms), as a witness next to its hosts would have. Needs etcd-server.
"""

import base64
import http.client
import json
import os
import shutil
import signal

from rig import RigError, read_tail, wait_for

PORT, PEER_PORT = 2379, 2380


class _Connection(http.client.HTTPConnection):
    """From inside a namespace."""

    def __init__(self, namespace, host, timeout_s):
        super().__init__(host, PORT, timeout=timeout_s)
        self.namespace = namespace

    def connect(self):
        self.sock = self.namespace.socket()
        self.sock.settimeout(self.timeout)
        self.sock.connect((self.host, self.port))


class Etcd:
    def __init__(self, rig, members=1, heartbeat_ms=50, election_ms=300):
        if not shutil.which("etcd"):
            raise RigError("etcd is missing: the package is etcd-server")
        self.rig, self.heartbeat_ms, self.election_ms = rig, heartbeat_ms, election_ms
        self.hosts = [rig.add_witness() for _ in range(members)]
        self.data = [rig.memory_dir(host.role) for host in self.hosts]
        for i in range(members):
            self.start(i)
        self.wait_ready()

    def spec(self):
        """For --witness."""
        return "etcd:" + ",".join("http://%s:%d" % (host.mig_ip, PORT) for host in self.hosts)

    def start(self, i):
        """Starts a member, for the first time or again with what it knew."""
        host = self.hosts[i]
        client, peer = ("http://%s:%d" % (host.mig_ip, port) for port in (PORT, PEER_PORT))
        everybody = ",".join("%s=http://%s:%d" % (h.role, h.mig_ip, PEER_PORT) for h in self.hosts)
        argv = ["etcd", "--name", host.role, "--data-dir", self.data[i], "--listen-client-urls", client,
                "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", everybody, "--heartbeat-interval", self.heartbeat_ms, "--election-timeout",
                self.election_ms, "--log-level", "warn"]
        with open(os.path.join(host.dir, "etcd.log"), "ab") as log:
            host.proc = host.popen(argv, stdout=log, stderr=log)

    def kill(self, i, number=signal.SIGKILL):
        """A member dies; by SIGTERM it ends in good order."""
        self.hosts[i].proc.send_signal(number)
        self.hosts[i].proc.wait()

    def stop(self, i):
        """A member stands still."""
        self.hosts[i].stop()

    def cont(self, i):
        self.hosts[i].cont()

    def alive(self):
        return [i for i, host in enumerate(self.hosts) if host.proc.poll() is None]

    def call(self, i, path, body=None, timeout_s=2):
        """POSTs to a member's JSON gateway, from its own host, and returns the answer."""
        connection = _Connection(self.hosts[i], self.hosts[i].mig_ip, timeout_s)
        try:
            connection.request("POST", path, json.dumps(body or {}))
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise RigError("etcd %s: %s" % (self.hosts[i].role, error))
        finally:
            connection.close()
        if answer.status != 200:
            raise RigError("etcd %s: %d %s" % (self.hosts[i].role, answer.status, text[:200]))
        return json.loads(text)

    def leader(self):
        """Index of the member that says it leads; None when none does."""
        for i in self.alive():
            try:
                status = self.call(i, "/v3/maintenance/status", timeout_s=0.5)
            except RigError:
                continue
            if status.get("leader") == status["header"]["member_id"]:
                return i
        return None

    def wait_leader(self, timeout_s=10):
        """Waits for leader() to be one, and returns it."""
        return wait_for(lambda: [i for i in [self.leader()] if i is not None], timeout_s, "a leader of etcd")[0]

    def wait_ready(self, timeout_s=20):
        """Waits until it answers a read that needs a majority."""
        def ready():
            dead = [i for i, host in enumerate(self.hosts) if host.proc.poll() is not None]
            if dead and len(dead) * 2 >= len(self.hosts):
                raise RigError("etcd ended: " + read_tail(os.path.join(self.hosts[dead[0]].dir, "etcd.log")))
            try:
                return self.alive() and self.keys() is not None
            except RigError:
                return False
        wait_for(ready, timeout_s, "an answer of etcd", 0.05)

    def keys(self, prefix="lifeboat/vm/"):
        """{key: what it says, with "revision"} of all VMs; asks every member until one answers."""
        start, end = prefix.encode(), prefix[:-1].encode() + bytes([ord(prefix[-1]) + 1])
        body = {"key": base64.b64encode(start).decode(), "range_end": base64.b64encode(end).decode()}
        why = "no member is alive"
        for i in self.alive():
            try:
                found = self.call(i, "/v3/kv/range", body)
            except RigError as error:
                why = error
                continue
            return {base64.b64decode(kv["key"]).decode():
                    dict(json.loads(base64.b64decode(kv["value"])), revision=int(kv["mod_revision"]))
                    for kv in found.get("kvs", [])}
        raise RigError("etcd does not answer: %s" % why)
