"""Compile what DeepSpeed would else compile in the first run, for about two minutes: `python compile_deepspeed.py`.

Optimizer steps in host memory (deepspeed=zero3_offload), and on a machine without a GPU the exchange between processes.
"""

import shutil
import sys
import warnings

warnings.filterwarnings("ignore")


def main() -> int:
    missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
    if missing:
        print(f"note: without {' and '.join(missing)} DeepSpeed cannot compile what its offloading needs")
        return 0
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builders = [get_accelerator().create_op_builder("CPUAdamBuilder")]
    if get_accelerator().device_name() == "cpu":
        builders.append(ShareMemCommBuilder())
    for builder in builders:
        builder.load(verbose=False)
        print(f"DeepSpeed's {builder.name} is compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
