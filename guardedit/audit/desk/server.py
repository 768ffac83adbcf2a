"""What MLflow's server is like: whether it asks for a login, who we are there, and the command that starts one."""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from guardedit.errors import BadRequestError, TrackingError

_SECONDS = 5.0
_LOOK = "/api/2.0/mlflow/experiments/search?max_results=1"
_WHO = "/api/2.0/mlflow/users/current"
PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
MIN_PASSWORD = 12


@dataclass(frozen=True)
class Server:
    """What was found at an address."""

    login: bool
    """It refuses whoever does not log in; then `completed_by` is what the server wrote."""
    user: str | None
    """Whom our own credentials belong to, by the server's word."""


def look(uri: str, seconds: float = _SECONDS) -> Server | None:
    """Ask a server whether it wants a login: once without credentials, then with ours. None where `uri` is no server.

    Raises TrackingError where it does not answer within seconds.
    """
    if not uri.startswith(("http://", "https://")):
        return None
    import requests

    parts = urlsplit(uri)
    bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    try:
        with requests.Session() as session:
            session.trust_env = False  # no credentials from a .netrc: the first question is a stranger's
            asked = session.get(bare + _LOOK, timeout=seconds)
            if asked.status_code == 200:
                return Server(False, None)
            if asked.status_code != 401:
                raise TrackingError(f"MLflow at {bare} answered {asked.status_code}; try again later")
            return Server(True, _user(session, bare, uri))
    except (requests.RequestException, ValueError) as error:
        raise TrackingError(
            f"MLflow at {bare} did not answer: {type(error).__name__}; try again later"
        ) from error


def _user(session: Any, bare: str, uri: str) -> str | None:
    parts = urlsplit(uri)
    name = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not name or password is None:
        return None
    told = session.get(bare + _WHO, timeout=_SECONDS, auth=(name, password))
    found = told.json() if told.status_code == 200 else {}
    user = found.get("username") or found.get("user", {}).get("username")
    return str(user) if user else None


def command(uri: str, artifacts: Path, port: int, login: bool) -> list[str]:
    """The words that start MLflow's server on this machine alone."""
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--workers", "1", "--artifacts-destination", artifacts.as_uri()]
    return [*words, "--app-name", "basic-auth"] if login else words


def environment(home: Path, login: bool) -> dict[str, str]:
    """The server's switches: no usage reports; with a login, where its users lie and who the first is."""
    made = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    # Seven workers for jobs that guardedit has none of; they would outlive the server, too.
    made["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    if not login:
        return made
    _require_login_parts()
    users = home.absolute() / "mlflow-users.db"
    if not users.exists() and len(os.environ.get(PASSWORD, "")) < MIN_PASSWORD:
        raise BadRequestError(
            f"${PASSWORD} is missing or shorter than {MIN_PASSWORD} characters; it becomes the password of the user "
            "`admin` when the server with a login starts for the first time"
        )
    made["MLFLOW_AUTH_CONFIG_PATH"] = str(_settings(home, users))
    made.setdefault("MLFLOW_FLASK_SERVER_SECRET_KEY", secrets.token_hex(32))
    return made


def _settings(home: Path, users: Path) -> Path:
    """MLflow's file of settings; whoever has no role sees nothing."""
    path = home.absolute() / "mlflow-login.ini"
    lines = (
        "[mlflow]",
        "default_permission = NO_PERMISSIONS",
        f"database_uri = sqlite:///{users}",
        "admin_username = admin",
        # Passwords are hashed slowly on purpose; once a minute is enough, and a change counts at once.
        "auth_cache_ttl_seconds = 60",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _require_login_parts() -> None:
    import importlib.util

    if importlib.util.find_spec("flask_wtf") is None:
        raise BadRequestError("a login needs the extra guardedit[login]: pip install 'guardedit[login]'")
