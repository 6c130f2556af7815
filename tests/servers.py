"""Real S3 servers on loopback, started and ended by the tests: rclone (a tenth of a second) and Ceph (some 15 s).

Both know one user, whose credentials are ``KEY`` and ``SECRET``, and begin without buckets.
"""

import secrets
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# A secret like no other text, so that tests can look for it where it must not be.
KEY, SECRET = "tester", secrets.token_hex(20)
CEPH_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
# Ceph's daemons need some seconds each to find one another; on a busy machine several times that.
PATIENCE = 120.0
# One of each daemon, everything in memory, nothing beside the folder. Without cephx the gateway never gets ready.
CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{monitor}]
public network = 127.0.0.0/8
ms bind ipv6 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
log file = {folder}/$name.log
run dir = {folder}
admin socket =
mon data = {folder}/mon
mon allow pool size one = true
mon max pg per osd = 5000
mon data avail crit = 1
mon data avail warn = 2
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw data = {folder}
rgw dns name = 127.0.0.1
rgw enable gc threads = false
rgw run sync thread = false
"""
CEPH_USERS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx"},
}


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def rclone(folder: Path, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """The endpoint of a server whose buckets are the folders in ``folder``."""
    program, port = str(Path(sys.executable).with_name("rclone")), port or free_port()
    with ExitStack() as running:
        _start(running, program, "serve", "s3", f"--addr={host}:{port}", f"--auth-key={KEY},{SECRET}", str(folder))
        _wait_for(port, host)
        yield f"http://{host}:{port}"


def missing_ceph() -> list[str]:
    """Ceph's programs that are not installed here."""
    return [name for name in CEPH_PROGRAMS if shutil.which(name) is None]


@contextmanager
def ceph(folder: Path) -> Iterator[str]:
    """The endpoint of a Ceph gateway over one monitor and one store in memory."""
    gateway, monitor = free_port(), free_port()
    conf, fsid = folder / "ceph.conf", str(uuid.uuid4())
    conf.write_text(CEPH_CONF.format(folder=folder, fsid=fsid, monitor=monitor, gateway=gateway))
    own = f"--conf={conf}"
    _write_keyring(folder / "keyring")
    with ExitStack() as running:
        monmap = str(folder / "monmap")
        _run("monmaptool", "--create", f"--fsid={fsid}", "--addv", "a", f"[v2:127.0.0.1:{monitor}]", monmap)
        _run("ceph-mon", own, "--mkfs", "--id=a", f"--monmap={monmap}", f"--keyring={folder / 'keyring'}")
        _start(running, "ceph-mon", own, "--id=a", "--foreground")
        store = str(uuid.uuid4())
        _run("ceph", own, f"--connect-timeout={PATIENCE:.0f}", "osd", "new", store)
        (folder / "osd").mkdir()
        shutil.copy(folder / "keyring", folder / "osd" / "keyring")
        _run("ceph-osd", own, "--id=0", "--mkfs", f"--osd-uuid={store}")
        _start(running, "ceph-osd", own, "--id=0", "--foreground")
        _start(running, "radosgw", own, "--name=client.rgw.a", "--foreground")
        _wait_for(gateway)
        user = ("--uid=tester", "--display-name=tester", f"--access-key={KEY}", f"--secret-key={SECRET}")
        _run("radosgw-admin", own, "user", "create", *user)
        yield f"http://127.0.0.1:{gateway}"


def _write_keyring(path: Path) -> None:
    path.touch()
    for name, capabilities in CEPH_USERS.items():
        rights = [part for service, right in capabilities.items() for part in ("--cap", service, right)]
        _run("ceph-authtool", str(path), f"--name={name}", "--gen-key", *rights)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _start(running: ExitStack, *command: str) -> None:
    """Starts a daemon that ends with ``running``."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running.callback(process.wait)
    running.callback(process.kill)


def _wait_for(port: int, host: str = "127.0.0.1") -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket() as client:
            if client.connect_ex((host, port)) == 0:
                return
        assert time.monotonic() < deadline, f"nothing listens on port {port}"
        time.sleep(0.05)
