"""Say which torch was installed and whether it imports and fits this machine: `python check_torch.py cpu|cuda`.

`make` runs this right after installing torch, before anything is built on top of it.
"""

import sys
import warnings

# A matching version that is already installed is kept, so another build of it needs a new environment.
ANOTHER_BUILD = (
    "  To get another build: remove the virtual environment and run make again with\n"
    "  TORCH_INDEX=<address>, the index that PyTorch's installation page names for this kind of machine."
)


def main(accelerator: str) -> int:
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # it comes with the next layer
    try:
        import torch
    except (ImportError, OSError) as problem:  # OSError: a shared library of torch's does not load
        print(f"torch was installed but does not import: {problem}\n{ANOTHER_BUILD}", file=sys.stderr)
        return 1
    print(f"torch {torch.__version__} imports")
    if accelerator == "cpu" and torch.version.cuda:
        print(
            "note: this is a CUDA build on a machine without an NVIDIA driver. It trains, on the CPU; but it takes\n"
            f"  gigabytes more of disk, and vLLM for CPUs is made for the CPU build.\n{ANOTHER_BUILD}"
        )
    if accelerator == "cuda" and not torch.version.cuda:
        print(f"note: there is an NVIDIA driver, but this build of torch cannot use it: CPU only.\n{ANOTHER_BUILD}")
    elif accelerator == "cuda" and not torch.cuda.is_available():
        print(
            f"note: torch finds no usable GPU. nvidia-smi shows what the driver sees; a driver older than CUDA\n"
            f"  {torch.version.cuda} needs must be updated, or torch built for an older CUDA.\n{ANOTHER_BUILD}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
