"""The connection to an S3-compatible server, and its errors in words for the user."""

import contextlib
import gc
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from llmkit.config.schema import StorageConfig
from llmkit.storage.errors import StorageError

_CREDENTIALS = "the AWS variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE) or storage.profile"
_ADVICE = {
    "AccessDenied": f"access denied; check {_CREDENTIALS} and what they may do there",
    "AllAccessDisabled": "access denied: all access to it is disabled",
    "InvalidAccessKeyId": f"the server does not know the access key; check {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; check {_CREDENTIALS}",
    "ExpiredToken": f"the session token has expired; renew {_CREDENTIALS}",
    "InvalidToken": f"the session token is not valid; renew {_CREDENTIALS}",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "NoSuchBucket": "there is no such bucket; check its name, storage.endpoint_url and storage.region",
    "PermanentRedirect": "the bucket is in another region; set storage.region",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set storage.region",
    "SlowDown": "the server is overloaded; try again later",
    "ServiceUnavailable": "the server is not available; try again later",
}
_ADVICE_OF_STATUS = {
    301: _ADVICE["PermanentRedirect"],
    401: _ADVICE["AccessDenied"],
    403: _ADVICE["AccessDenied"],
    503: _ADVICE["ServiceUnavailable"],
}


def open_client(config: StorageConfig, *, url: str) -> Any:
    """A boto3 client for S3, safe to use from several threads. Nothing is sent yet.

    Raises StorageError, naming `url`, if the profile or the endpoint cannot be used.
    """
    with _without_garbage_collection():
        return _open_client(config, url)


def _open_client(config: StorageConfig, url: str) -> Any:
    import boto3
    from botocore.config import Config

    with explained("cannot be opened", url):
        return boto3.session.Session(profile_name=config.profile, region_name=config.region).client(
            "s3",
            endpoint_url=config.endpoint_url,
            config=Config(
                connect_timeout=config.timeout_s,
                read_timeout=config.timeout_s,
                retries={"mode": "standard", "total_max_attempts": config.max_attempts},
                max_pool_connections=config.max_concurrency,
                request_checksum_calculation=config.checksums,
                response_checksum_validation=config.checksums,
                # The signature covers the x-amz-checksum-sha256 that goes with every body. Signing the body as well
                # would hash it a second time.
                s3={"addressing_style": config.addressing_style, "payload_signing_enabled": False},
            ),
        )


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """boto3 reads megabytes of descriptions, and a third of that time would go into looking for garbage in them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def explained(what: str, url: str) -> Iterator[None]:
    """Turn whatever boto3 raises into a StorageError: `what` ("cannot be listed") of `url`, why, and what to check."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (BotoCoreError, ClientError, HTTPError, ResponseParserError, ValueError, OSError) as error:
        raise StorageError(f"{url} {what}: {reason_of(error)}.") from error


def reason_of(error: Exception) -> str:
    """Why a request failed and what to check, without a full stop."""
    import botocore.exceptions as boto
    from urllib3.exceptions import NameResolutionError

    if isinstance(error, boto.ClientError):
        return _answer(error)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return f"there are no credentials; set {_CREDENTIALS}"
    if isinstance(error, boto.ProfileNotFound):
        return f"{_text(error)}; check storage.profile and AWS_PROFILE"
    if isinstance(error, boto.SSLError):
        return (
            f"the server's certificate is not accepted; check storage.endpoint_url and AWS_CA_BUNDLE ({_text(error)})"
        )
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return f"the server at {_host(error)} timed out; check the network, storage.endpoint_url and storage.timeout_s"
    if isinstance(error, boto.EndpointConnectionError | boto.ProxyConnectionError):
        if isinstance(error.kwargs.get("error"), NameResolutionError | socket.gaierror):
            return f"cannot resolve the host {_host(error)}; check storage.endpoint_url and the network"
        return f"cannot connect to {_host(error)}; check storage.endpoint_url and the network"
    if _was_cut(error):
        return "the connection was cut; check the network and try again"
    return f"{_text(error)}; check storage.endpoint_url and the network"


def _was_cut(error: Exception) -> bool:
    import botocore.exceptions as boto
    from urllib3.exceptions import HTTPError

    kinds = (boto.ConnectionClosedError, boto.ResponseStreamingError, boto.IncompleteReadError, HTTPError)
    return isinstance(error, (*kinds, ConnectionError))


def status_and_code(error: Any) -> tuple[int, str]:
    """The HTTP status and the code of a ClientError; proxies in front of a store answer without a code."""
    code = error.response["Error"].get("Code") or ""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), code


def _answer(error: Any) -> str:
    status, code = status_and_code(error)
    told = error.response["Error"].get("Message", "")
    advice = _ADVICE.get(code) or _ADVICE_OF_STATUS.get(status) or f"the server answered {told or code}"
    return f"{advice} ({' '.join(dict.fromkeys(filter(None, (str(status), code))))})"


def _host(error: Any) -> str:
    """The server of a failed request; a user name and password in its address are left out."""
    address = urlsplit(str(error.kwargs.get("endpoint_url") or ""))
    return address.hostname or "the storage"


def _text(error: Exception) -> str:
    """The first line of what the error says, less a user name and password in an address."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return re.sub(r"//[^/@\s]*@", "//", line)
