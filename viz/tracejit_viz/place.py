"""Where trainers and the viewer meet: a private directory with a unix socket, or (Windows) a loopback port and a token.

Called by ``client`` (connects), ``hub`` (listens). A directory that others could write to is refused.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import socket
import stat
import tempfile
from pathlib import Path

from .errors import ViewerError

USE_UNIX = hasattr(socket, "AF_UNIX") and os.name != "nt"


def meeting_dir(create: bool = True) -> Path:
    """The private directory (mode 0700, owned by this user). ``TRACEJIT_VIEWER_DIR`` overrides it."""
    chosen = os.environ.get("TRACEJIT_VIEWER_DIR")
    if chosen:
        path = Path(chosen)
    else:
        who = str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
        path = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"tracejit-viewer-{who}"
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and hasattr(os, "getuid"):
        info = os.lstat(path)
        if stat.S_ISLNK(info.st_mode) or info.st_uid != os.getuid():
            raise ViewerError(f"{path} belongs to another user: refusing to use it; set TRACEJIT_VIEWER_DIR")
        if info.st_mode & 0o077:
            os.chmod(path, 0o700)
    return path


def use_unix() -> bool:
    """Unix socket, or loopback TCP (Windows, or ``TRACEJIT_VIEWER_TCP=1``)."""
    return USE_UNIX and not os.environ.get("TRACEJIT_VIEWER_TCP")


def listen(directory: Path) -> socket.socket | None:
    """A listening socket, or None when another viewer already listens there."""
    if use_unix():
        path = directory / "viewer.sock"
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        for _ in range(2):
            try:
                server.bind(str(path))
                break
            except OSError:
                if _answers(directory):
                    server.close()
                    return None
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()  # left behind by a viewer that was killed
        else:
            server.close()
            raise ViewerError(f"cannot listen on {path}")
        os.chmod(path, 0o600)
    else:
        if _answers(directory):
            return None
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        server.bind(("127.0.0.1", 0))
        token = secrets.token_hex(16)
        note = directory / "viewer.json"
        note.touch(mode=0o600)
        note.write_text(json.dumps({"port": server.getsockname()[1], "token": token}))
    server.listen(16)
    server.setblocking(False)
    return server


def _answers(directory: Path) -> bool:
    s = connect(directory)
    if s is not None:
        s.close()
    return s is not None


def token(directory: Path) -> str:
    """What a trainer must say on TCP; empty on unix sockets, whose directory is private."""
    if use_unix():
        return ""
    try:
        return str(json.loads((directory / "viewer.json").read_text())["token"])
    except (OSError, ValueError, KeyError):
        return ""


def connect(directory: Path) -> socket.socket | None:
    """A connection to the viewer that listens there, None when there is none."""
    s: socket.socket | None = None
    try:
        if use_unix():
            s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            s.settimeout(0.5)
            s.connect(str(directory / "viewer.sock"))
        else:
            port = int(json.loads((directory / "viewer.json").read_text())["port"])
            s = socket.create_connection(("127.0.0.1", port), timeout=0.5)
        return s
    except (OSError, ValueError, KeyError):
        if s is not None:
            s.close()
        return None


def forget(directory: Path) -> None:
    """Remove the address when the viewer closes."""
    for name in ("viewer.sock", "viewer.json"):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
