"""Where a key for Weights & Biases lies. Free of wandb and torch."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

# Where `wandb login` puts a key if WANDB_BASE_URL is unset: since wandb 0.31 the first, before it the second.
DEFAULT_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")


def wandb_key_place() -> str | None:
    """`WANDB_API_KEY`, or the netrc file with a key for the server of WANDB_BASE_URL; None where W&B would ask for one.

    The key itself goes no further.
    """
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    own = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(own).netloc,) if own else DEFAULT_HOSTS
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entries = netrc.netrc(file)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    return str(file) if any((entries.authenticators(host) or ("",))[-1] for host in hosts) else None
