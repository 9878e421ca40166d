"""Install clients, run them, print a table of what worked."""

from __future__ import annotations

import argparse
import fcntl
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.agents import AGENTS
from tests.clients.checks import Client, Report, Trial
from tests.clients.install import install

CLIENTS = {client.name.lower().replace(" ", "-"): client for client in AGENTS}
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(CLIENTS)}; all by default")
    parser.add_argument("--keep", metavar="DIRECTORY", type=Path, help="where what was said and logged stays")
    parser.add_argument("--alone", action="store_true", help="no network but loopback, which is given already")
    options = parser.parse_args()
    unknown = set(options.names) - set(CLIENTS)
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}")
    chosen = [CLIENTS[name] for name in options.names or CLIENTS]
    if options.alone:
        _raise_loopback()
    else:
        for client in chosen:
            install(client.package)
        command = _isolated()
        if command:
            arguments = [sys.executable, "-m", "tests.clients", "--alone", *sys.argv[1:]]
            return subprocess.call([*command, *arguments])
        print("unshare cannot make a network of its own here: nothing keeps clients from other addresses")
    with tempfile.TemporaryDirectory(prefix="m2lite-clients-") as folder:
        reports = [_try(client, options.keep or Path(folder)) for client in chosen]
    _print(reports)
    return 0 if all(report.is_good for report in reports) else 1


def _try(client: Client, root: Path) -> Report:
    print(f"{client.name} ...", flush=True)
    place = root.resolve() / client.name.lower().replace(" ", "-")
    if place.exists():
        shutil.rmtree(place)
    return Trial(client, place).run()


def _isolated() -> list[str]:
    """The beginning of a command that runs in a network of its own, where that can be had."""
    command = ["unshare", "--map-root-user", "--net"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        return []
    return command


def _raise_loopback() -> None:
    """In a new network it is down."""
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _print(reports: list[Report]) -> None:
    names = list(reports[0].steps)
    head = ["client", "package", *names, "prompt tokens", "cached in the follow-up"]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for report in reports:
        hit = f"{report.n_cached:,} of {report.n_known:,}" if report.n_known else "-"
        shown = ["yes" if report.steps.get(name) == "ok" else "NO" for name in names]
        package = report.client.package.lstrip("@")
        print(f"| {' | '.join([report.client.name, package, *shown, f'{report.n_prompt:,}', hit])} |")
    for report in reports:
        for name, how in report.steps.items():
            if how != "ok":
                print(f"\n{report.client.name}, {name}: {how}")
        for line in report.refused:
            print(f"\n{report.client.name}, refused: {line}")


if __name__ == "__main__":
    sys.exit(main())
