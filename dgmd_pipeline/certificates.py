"""Checks the variables that name certificate files, before a library fails on one of these files."""

import ssl
from collections.abc import Mapping
from pathlib import Path

# boto3 reads AWS_CA_BUNDLE or, if that variable is unset, REQUESTS_CA_BUNDLE. MLflow's client reads the MLFLOW_
# variables. MLflow's client uses the library requests, which reads REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE. urllib, which
# sends messages to NOTIFY_URL and downloads ImageNet weights, reads SSL_CERT_FILE.
VARIABLES = (
    "AWS_CA_BUNDLE",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
)
# Variables that may also name a folder of certificate files.
FOLDERS_ALLOWED = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def mistakes(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable that is set, but names no readable file with certificates in PEM format.

    A variable in FOLDERS_ALLOWED may instead name a folder that is not empty.
    """
    return [
        f"{name}={value}: expected the path of a readable file of certificates (PEM); {problem}. For a "
        "container, give the path inside the container: mount the file, or correct the path."
        for name in VARIABLES
        if (value := environment.get(name)) and (problem := _problem(Path(value), name in FOLDERS_ALLOWED))
    ]


def _problem(path: Path, may_be_folder: bool) -> str | None:
    """Return what is wrong with a file of certificates, or None."""
    try:
        if path.is_dir():
            # Docker creates an empty folder if the source of a bind mount does not exist.
            return None if may_be_folder and any(path.iterdir()) else "this is a folder"
        path.open("rb").close()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return "this file contains no certificate"
    except OSError as error:
        return f"this file cannot be read ({error.strerror})"
    return None
