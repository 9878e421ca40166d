"""A text in the user's editor. Knows no chat."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from m2lite.chat import keys
from m2lite.errors import UsageError

_EDITORS = ("sensible-editor", "vim", "nano", "vi")


def edit(text: str) -> str | None:
    """The text as the user saved it; None where it was not saved. UsageError if there is no editor, or it failed."""
    name = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    try:
        command = shlex.split(name or next(filter(shutil.which, _EDITORS), "vi"))
        with tempfile.TemporaryDirectory(prefix="m2lite-") as folder:
            path = Path(folder) / "question.md"
            path.write_text(text + "\n" if text and not text.endswith("\n") else text, "utf-8", "replace")
            os.utime(path, ns=(0, 0))  # a file that has been saved is younger, whatever the clock's steps
            with keys.cooked():
                code = subprocess.run([*command, str(path)], check=False).returncode
            if code:
                raise UsageError(f"The editor {command[0]} ended with {code}.", "Set EDITOR.")
            return path.read_text("utf-8-sig") if path.stat().st_mtime_ns else None
    except UnicodeDecodeError as error:
        raise UsageError(f"What the editor saved is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"The editor {name} cannot be run: {error}.", "Set EDITOR.") from None
