"""What all tests share: model files and a way to run the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import tinymodel
from tests.children import PATIENCE_S

# The same examples in every run; other ones with `pytest -m hypothesis --hypothesis-profile default`.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def nothing_is_remembered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which drafts paid in earlier runs, and what was found for this machine, is not known, nor kept for the user."""
    from m2lite.drafting import kept
    from m2lite.engine import tuned

    folder = tmp_path_factory.mktemp("drafts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "user_dir", lambda _: folder)
        patch.setattr(tuned, "machine_cache_dir", lambda: folder)
        yield


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by name: `random`, and the scripts of `tinymodel`."""
    folder = tmp_path_factory.mktemp("models")
    scripts = {"random": None, "reply": tinymodel.REPLY, "endless": tinymodel.ENDLESS}
    scripts["answer"] = tinymodel.ENDLESS_ANSWER
    return {name: tinymodel.write_model(folder / f"{name}.gguf", script) for name, script in scripts.items()}


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The trained model that travels with m2lite."""
    from m2lite.engine.locate import locate_model

    return locate_model(None)


@pytest.fixture(scope="session")
def command_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the command sees this checkout and none of the user's settings or history.

    The kernel cache stays where it is: compiling takes most of a minute.
    """
    home = tmp_path_factory.mktemp("home")
    env = {name: value for name, value in os.environ.items() if not name.startswith("M2LITE_") or "CACHE" in name}
    env.pop("NO_COLOR", None)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else each command compiles all modules of this checkout again
    return env | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_DATA_HOME": str(home / "data"),
        "M2LITE_HEAT": "off",
        "M2LITE_TUNING": "off",
        "M2LITE_KV_DISK": "0",
        "TERM": "xterm-256color",
        "COLUMNS": "80",
    }


@pytest.fixture(scope="session")
def run_m2lite(command_env: dict[str, str]) -> Run:
    """Run `m2lite ARGUMENTS...` to its end and return stdout, stderr and exit code."""

    def run(
        *arguments: str | Path, stdin: str | bytes = b"", env: dict[str, str] | None = None, timeout: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "m2lite", *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            env=command_env | (env or {}),
            timeout=timeout,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    return run


@pytest.fixture(scope="session")
def compiled(run_m2lite: Run, model_files: dict[str, Path], bundled_model: Path) -> None:
    """The kernels are in the cache, so that nothing more is said about compiling them."""
    for model in (model_files["reply"], bundled_model):
        assert run_m2lite("generate", model, "-p", "Hello", "-n", "1").returncode == 0


@pytest.fixture
def run_inline(command_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """As `run_m2lite`, but in this process, which saves its start; without stdin and signals."""
    from m2lite.cli import run as run_command

    for name in [name for name in os.environ if name.startswith("M2LITE_") and "CACHE" not in name]:
        monkeypatch.delenv(name)
    for name, value in command_env.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            code = run_command([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess([str(a) for a in arguments], code, out, err)

    return run


@pytest.fixture(scope="session")
def opened(model_files: dict[str, Path]) -> Iterator[Callable[[str], object]]:
    """Opened models by name, kept for the whole session; what earlier tests computed is forgotten."""
    from m2lite import Model

    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = Model.open(model_files[name], ctx=2048)
        models[name].loop.forget()
        models[name].loop.prefix_cache.disk = None
        return models[name]

    yield get
    for model in models.values():
        model.close()
