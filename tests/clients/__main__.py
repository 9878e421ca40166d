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
from collections.abc import Callable
from pathlib import Path

from tests.clients.agents import AGENTS
from tests.clients.checks import Client, Report, Trial
from tests.clients.evaluation import NAME, PACKAGE, evaluate
from tests.clients.install import install
from tests.clients.packages import PACKAGES

Try = Callable[[Path, int | None], Report]


def _short(name: str) -> str:
    return name.lower().replace(" ", "-")


def _trial(client: Client) -> Try:
    return lambda root, n_layers: Trial(client, root, n_layers).run()


# Name -> package, and what runs it in a directory that is not there yet.
CLIENTS: dict[str, tuple[str, Try]] = {
    **{_short(client.name): (client.package, _trial(client)) for client in [*AGENTS, *PACKAGES]},
    NAME: (PACKAGE, evaluate),
}
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(CLIENTS)}; all by default")
    parser.add_argument("--keep", metavar="DIRECTORY", type=Path, help="where what was said and logged stays")
    parser.add_argument("--layers", metavar="N", type=int, help="of a slow model, which is asked one question only")
    parser.add_argument("--alone", action="store_true", help="no network but loopback, which is given already")
    options = parser.parse_args()
    unknown = set(options.names) - set(CLIENTS)
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}")
    chosen = options.names or list(CLIENTS)
    if options.alone:
        _raise_loopback()
    else:
        for name in chosen:
            install(CLIENTS[name][0])
        command = _isolated()
        if command:
            arguments = [sys.executable, "-m", "tests.clients", "--alone", *sys.argv[1:]]
            return subprocess.call([*command, *arguments])
        print("unshare cannot make a network of its own here: nothing keeps clients from other addresses")
    with tempfile.TemporaryDirectory(prefix="m2lite-clients-") as folder:
        reports = [_try(name, options.keep or Path(folder), options.layers) for name in chosen]
    _print(reports)
    return 0 if all(report.is_good for report in reports) else 1


def _try(name: str, root: Path, n_layers: int | None) -> Report:
    print(f"{name} ...", flush=True)
    place = root.resolve() / name
    if place.exists():
        shutil.rmtree(place)
    return CLIENTS[name][1](place, n_layers)


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
    names = list(dict.fromkeys(name for report in reports for name in report.steps))
    head = ["client", "package", *names, "prompt tokens", "s", "cached in the follow-up", "after a restart"]
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for report in reports:
        shown = [{"ok": "yes", "-": "-"}.get(report.steps.get(name, "-"), "NO") for name in names]
        prompt = f"{report.n_prompt:,}" if report.n_prompt else "-"
        hits = [(report.n_cached, report.n_known), (report.n_cached_later, report.n_known_later)]
        numbers = [f"{report.seconds:.1f}", *(f"{n:,} of {known:,}" if known else "-" for n, known in hits)]
        print(f"| {' | '.join([report.name, report.package, *shown, prompt, *numbers])} |")
    for report in reports:
        for name, how in report.steps.items():
            if how != "ok":
                print(f"\n{report.name}, {name}: {how}")
        for line in report.refused:
            print(f"\n{report.name}, refused: {line}")


if __name__ == "__main__":
    sys.exit(main())
