"""`llmkit.worker` whose training batches are each one padded column longer: `python padded_worker.py RUN_DIR`."""

import sys

from llmkit import worker

train = worker._train


def train_with_longer_batches(*args):
    from llmkit.training.pack.verification import one_longer
    from llmkit.training.trainer import RunMixin

    step = RunMixin.training_step
    RunMixin.training_step = lambda trainer, model, inputs, *more: step(trainer, model, one_longer(inputs), *more)
    return train(*args)


if __name__ == "__main__":
    worker._train = train_with_longer_batches
    sys.exit(worker.main())
