"""A real HTTP server that speaks S3, for tests: moto's, in a process of its own.

    with S3Server() as server:
        subprocess.run(..., env=os.environ | server.environment)

The same tests run against another server if LLMKIT_TEST_S3_ENDPOINT and LLMKIT_TEST_S3_BUCKET name it (with the usual
AWS variables for its credentials); they leave it as they found it.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any, Self

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "llmkit-tests"


class S3Server:
    """Moto's server on a free port; it ends with the process that started it."""

    bucket = BUCKET

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.environment = KEYS | {"AWS_ENDPOINT_URL_S3": self.endpoint}
        self.client().create_bucket(Bucket=self.bucket)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(input="")  # the server ends with its input
        self._process.wait()

    def client(self) -> Any:
        """Plain boto3, to see what is really there."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_DEFAULT_REGION"],
        )


class OtherServer:
    """The server that the environment names."""

    def __init__(self) -> None:
        self.endpoint, self.bucket = os.environ["LLMKIT_TEST_S3_ENDPOINT"], os.environ["LLMKIT_TEST_S3_BUCKET"]
        self.environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self.environment["AWS_ENDPOINT_URL_S3"] = self.endpoint

    def client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server | OtherServer]:
    """The server all tests of a session share; `s3_place` is an empty place on it."""
    if "LLMKIT_TEST_S3_ENDPOINT" in os.environ:
        yield OtherServer()
        return
    with S3Server() as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The `s3://` URL of a place that is empty, and emptied again; the environment leads there and has the keys."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION", *KEYS):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    prefix = f"test-{uuid.uuid4().hex}"
    yield f"s3://{s3_server.bucket}/{prefix}"
    client = s3_server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=s3_server.bucket, Prefix=prefix):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=s3_server.bucket, Key=item["Key"])


def serve() -> None:
    """The program: print the port, serve until the input ends."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads may be busy


if __name__ == "__main__":
    serve()
